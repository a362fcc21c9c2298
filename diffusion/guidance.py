"""Guidance and masks: wrap denoisers, return a denoiser."""

import torch
from torch import Tensor

from diffusion.samplers import Denoise
from diffusion.schedules import Level


def classifier_free_guidance(
    both: Denoise,
    conditional: Denoise,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Push the estimate away from the unconditional one (Ho & Salimans 2207.12598, eq. 6).

    Args:
        both: denoises a batch of 2B, the unconditional half first. conditional: denoises a batch of B.
        scale: 1 is the conditional estimate, for which ``both`` is never called.
        rescale: share of the guided estimate that is brought back to the conditional one's standard deviation.
        interval: (low, high) in sigma / alpha; guidance only where low < sigma / alpha <= high (2404.07724, eq. 5).
    """

    def denoise(x: Tensor, level: Level) -> Tensor:
        if scale == 1 or (interval is not None and not interval[0] < level.ratio <= interval[1]):
            return conditional(x, level)
        unconditional, wanted = both(torch.cat([x, x]), level).chunk(2)
        guided = unconditional + scale * (wanted - unconditional)
        return _rescaled(guided, wanted, rescale) if rescale else guided

    return denoise


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Draw only where ``mask`` is 1: elsewhere the estimate is what is ``known`` to be there (RePaint's condition,
    2201.09865, eq. 8, on the estimate of x0 instead of on x).

    As x begins at ``known`` under noise and samplers move towards the estimate, x stays ``known`` under that noise.
    ``known`` ``(B, C, h, w)``, ``mask`` ``(1, 1, h, w)`` in 0 .. 1.
    """

    def denoise_open(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(known, denoise(x, level), mask)

    return denoise_open


def _rescaled(guided: Tensor, wanted: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2305.08891, eq. 14-16, on the denoised estimate; standard deviations over each picture."""
    axes = tuple(range(1, guided.ndim))
    matched = guided * (wanted.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return torch.lerp(guided, matched, rescale)
