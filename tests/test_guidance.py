"""Guidance: who is called when, against the two calls it stands for, and rescaling against diffusers' own."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from diffusion.guidance import classifier_free_guidance
from diffusion.samplers import Denoise
from diffusion.schedules import CLEAN, Level

LEVEL, PURE_NOISE = Level(0.6, 0.8), Level(0.0, 1.0)
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def toward(context: Tensor) -> Denoise:
    """A denoiser of a batch under one number of context for each picture: nonlinear in both."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert len(x) == len(context)
        return torch.tanh(level.alpha * x + context.view(-1, 1, 1, 1) * x.square())

    return denoise


UNCONDITIONAL, CONDITIONAL = torch.zeros(2), torch.tensor([0.5, -1.0])


class Calls:
    """A denoiser that counts how often it is called."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.count = denoise, 0

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        self.count += 1
        return self.denoise(x, level)


def guided(
    scale: float, rescale: float = 0.0, interval: tuple[float, float] | None = None, level: Level = LEVEL
) -> tuple[Tensor, int, int]:
    """The guided estimate at X, and the calls it made of `both` and of `conditional`."""
    both, conditional = Calls(toward(torch.cat([UNCONDITIONAL, CONDITIONAL]))), Calls(toward(CONDITIONAL))
    denoised = classifier_free_guidance(both, conditional, scale, rescale, interval)(X, level)
    return denoised, both.count, conditional.count


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5, -1.0])
def test_one_batch_equals_two_calls(scale: float) -> None:
    """Ho & Salimans 2207.12598, eq. 6, with scale = 1 + w."""
    without, wanted = toward(UNCONDITIONAL)(X, LEVEL), toward(CONDITIONAL)(X, LEVEL)
    torch.testing.assert_close(guided(scale)[0], scale * wanted + (1 - scale) * without)


@pytest.mark.parametrize(("scale", "calls"), [(1, (0, 1)), (1.0, (0, 1)), (0.0, (1, 0)), (2.0, (1, 0))])
def test_scale_1_calls_only_the_conditional(scale: float, calls: tuple[int, int]) -> None:
    assert guided(scale)[1:] == calls
    assert guided(scale, rescale=0.7)[1:] == calls


@pytest.mark.parametrize(
    ("level", "interval", "inside"),
    [
        (Level(1.0, 2.0), (2.0, 5.0), False),  # low is left out
        (Level(1.0, 3.0), (2.0, 5.0), True),
        (Level(1.0, 5.0), (2.0, 5.0), True),  # high is in
        (Level(1.0, 6.0), (2.0, 5.0), False),
        (PURE_NOISE, (2.0, 5.0), False),
        (PURE_NOISE, (2.0, math.inf), True),
        (CLEAN, (0.0, math.inf), False),
        (Level(0.6, 0.8), (1.3, 1.4), True),  # in sigma / alpha, not in sigma
    ],
)
def test_interval(level: Level, interval: tuple[float, float], inside: bool) -> None:
    denoised, both, conditional = guided(4.0, interval=interval, level=level)
    assert (both, conditional) == ((1, 0) if inside else (0, 1))
    if not inside:
        assert torch.equal(denoised, toward(CONDITIONAL)(X, level))


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(rescale: float) -> None:
    theirs = rescale_noise_cfg(guided(5.0)[0], toward(CONDITIONAL)(X, LEVEL), guidance_rescale=rescale)
    torch.testing.assert_close(guided(5.0, rescale)[0], theirs)


def test_full_rescale_has_the_spread_of_the_conditional() -> None:
    axes = (1, 2, 3)
    torch.testing.assert_close(guided(9.0, rescale=1.0)[0].std(dim=axes), toward(CONDITIONAL)(X, LEVEL).std(dim=axes))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    alone = classifier_free_guidance(toward(torch.tensor([0.0, -1.0])), toward(torch.tensor([-1.0])), 5.0, rescale=0.5)
    torch.testing.assert_close(alone(X[1:], LEVEL), guided(5.0, rescale=0.5)[0][1:])
