"""Samplers against diffusers' schedulers, closed forms and their own limits, on data whose denoiser is known."""

import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.names import SAMPLERS as SAMPLER_NAMES
from diffusion.names import resolve_sampler
from diffusion.samplers import (
    SAMPLERS,
    Denoise,
    Sampler,
    between,
    deis,
    dpmpp_3m_sde,
    initial_scale,
    transfer,
)
from diffusion.schedules import (
    CLEAN,
    GRIDS,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    NoiseSchedule,
    levels,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_BETAS = scaled_linear_betas(1000, 0.00085, 0.012)
STOCHASTIC = {"euler_ancestral", "ddpm", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"}
DETERMINISTIC = sorted(SAMPLERS.keys() - STOCHASTIC)
SHAPE = (2, 3, 4, 4)

VE_LEVELS = [Level(1.0, 80 ** (1 - i / 12) * 0.02 ** (i / 12)) for i in range(13)] + [CLEAN]
SCHEDULES: dict[str, NoiseSchedule] = {
    "variance_preserving": DiscreteSchedule(SD_BETAS),
    "zero_terminal": DiscreteSchedule(rescale_zero_terminal_snr(SD_BETAS)),
    "flow": FlowSchedule(),
    "shifted_flow": FlowSchedule(shift=3.0),
}
LEVELS = {name: levels(schedule, 12) for name, schedule in SCHEDULES.items()} | {"variance_exploding": VE_LEVELS}


def gaussian(mean: float, std: float) -> Denoise:
    """E[x0 | x] for x0 ~ N(mean, std^2), elementwise: the regression line of x0 on x."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        return mean + gain * (x - level.alpha * mean)

    return denoise


def mixture(x: Tensor, level: Level) -> Tensor:
    """E[x0 | x] for x0 ~ 0.3 N(-1, 0.3^2) + 0.7 N(1.5, 0.5^2), elementwise: nonlinear in x, as networks are."""
    parts = [(0.3, -1.0, 0.3), (0.7, 1.5, 0.5)]
    scores = []
    for weight, mean, std in parts:
        variance = level.alpha**2 * std**2 + level.sigma**2
        scores.append(math.log(weight) - 0.5 * math.log(variance) - (x - level.alpha * mean) ** 2 / (2 * variance))
    means = torch.stack([gaussian(mean, std)(x, level) for _, mean, std in parts])
    return (torch.stack(scores).softmax(0) * means).sum(0)


def noise(step: int, draw: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7919 * step + draw), dtype=torch.float64)


def run(sampler: Sampler, denoise: Denoise, x: Tensor, grid: list[Level]) -> Tensor:
    *_, last = sampler(denoise, x, grid, lambda step, draw: noise(step, draw, tuple(x.shape)))
    return last.x


def start(grid: list[Level], shape: tuple[int, ...] = SHAPE) -> Tensor:
    return initial_scale(grid[0]) * noise(1000, 0, shape)


# --- diffusers --------------------------------------------------------------------------------------------------------


def variance_preserving(ratio: float) -> Level:
    return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))


def network(x: Tensor, level: Level, prediction: str) -> Tensor:
    """The mixture's denoiser, spoken in the prediction that a diffusers scheduler reads."""
    denoised = mixture(x.double(), level)
    eps = (x - level.alpha * denoised) / level.sigma
    return eps if prediction == "epsilon" else level.alpha * eps - level.sigma * denoised


def make(name: str, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    """A diffusers scheduler. One module imports torchsde, in whose place `brownian` makes the noise."""
    importlib.import_module("diffusers")  # it looks for torchsde by itself, and must not meet the stand-in
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
    scheduler = next(
        value
        for key, value in vars(module).items()
        if key.endswith("Scheduler") and value.__module__ == module.__name__
    )
    return scheduler(**SD, **config)


def hand_noise(scheduler: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the scheduler's next step draw ours."""
    module = sys.modules[scheduler.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise(step, 0), raising=False)


def by_time(scheduler: Any, x: Tensor, prediction: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Level]]:
    """Run a scheduler that knows its levels by integer times (DDIM, DDPM, LCM)."""
    grid = [variance_preserving(((1 - a) / a) ** 0.5) for a in scheduler.alphas_cumprod[scheduler.timesteps].tolist()]
    for i, (t, level) in enumerate(zip(scheduler.timesteps, grid, strict=True)):
        hand_noise(scheduler, i, monkeypatch)
        x = scheduler.step(network(x, level, prediction), t, x).prev_sample
    return x, [*grid, CLEAN]


def by_sigma(scheduler: Any, x: Tensor, prediction: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Level]]:
    """Run a scheduler that keeps its levels in `sigmas`, x being alpha x0 + sigma eps (DPM-Solver++, UniPC, DEIS)."""
    grid = [variance_preserving(ratio) for ratio in scheduler.sigmas.tolist()]
    for i, t in enumerate(scheduler.timesteps):
        hand_noise(scheduler, i, monkeypatch)
        x = scheduler.step(network(x, grid[i], prediction), t, x).prev_sample
    return x, grid


def by_ratio(scheduler: Any, x: Tensor, prediction: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Level]]:
    """Run a scheduler whose x is x0 + ratio eps and whose two-evaluation steps take two calls (Euler, Heun, SDE)."""
    ratios = list(dict.fromkeys(scheduler.sigmas.tolist()))
    grid = [variance_preserving(ratio) for ratio in ratios]
    x = x / grid[0].alpha
    for call, t in enumerate(scheduler.timesteps):
        step = call // 2 if scheduler.order == 2 else call
        hand_noise(scheduler, step, monkeypatch)
        scheduler.noise_sampler = brownian(step, ratios)
        scaled = scheduler.scale_model_input(x, t)
        # scaled = x / hypot(1, ratio), which tells the ratio of the half way evaluation too
        level = variance_preserving(float((x / scaled).square().mean() - 1) ** 0.5)
        x = scheduler.step(network(scaled, level, prediction), t, x).prev_sample
    return x, grid


def brownian(step: int, ratios: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """What k-diffusion's noise sampler returns between two sigmas: normalised increments of one Brownian motion."""

    def sample(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if not math.isclose(float(sigma_next), ratios[step + 1], rel_tol=1e-4):
            return noise(step, 0)
        middle = math.sqrt(ratios[step] * ratios[step + 1])
        first = math.sqrt(ratios[step] - middle) * noise(step, 0)
        second = math.sqrt(middle - ratios[step + 1]) * noise(step, 1)
        return (first + second) / math.sqrt(ratios[step] - ratios[step + 1])

    return sample


Runner = Callable[[Any, Tensor, str, pytest.MonkeyPatch], tuple[Tensor, list[Level]]]
NO_CLIP = {"clip_sample": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ORACLES: list[tuple[str, str, Runner, dict[str, Any]]] = [
    ("ddim", "ddim", by_time, NO_CLIP | {"timestep_spacing": "trailing"}),
    ("ddim", "ddim", by_time, NO_CLIP | {"timestep_spacing": "leading"}),
    ("ddpm", "ddpm", by_time, NO_CLIP | {"timestep_spacing": "trailing"}),
    ("lcm", "lcm", by_time, NO_CLIP),
    ("euler", "euler_discrete", by_ratio, {}),
    ("euler", "euler_discrete", by_ratio, {"use_karras_sigmas": True}),
    ("euler_ancestral", "euler_ancestral_discrete", by_ratio, {}),
    ("heun", "heun_discrete", by_ratio, {}),
    ("heun", "heun_discrete", by_ratio, {"use_karras_sigmas": True}),
    ("dpmpp_sde", "dpmsolver_sde", by_ratio, {}),
    ("dpmpp_2m", "dpmsolver_multistep", by_sigma, {}),
    ("dpmpp_2m", "dpmsolver_multistep", by_sigma, {"use_karras_sigmas": True}),
    ("dpmpp_2m_sde", "dpmsolver_multistep", by_sigma, SDE),
    ("dpmpp_2m_sde", "dpmsolver_multistep", by_sigma, SDE | {"use_karras_sigmas": True}),
    ("unipc", "unipc_multistep", by_sigma, {}),
    ("unipc", "unipc_multistep", by_sigma, {"use_karras_sigmas": True}),
    ("deis", "deis_multistep", by_sigma, {"lower_order_final": False}),
]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 8, 20])  # divisors of 1000: diffusers' DDIM rounds 1000 / steps down
@pytest.mark.parametrize(("name", "module", "runner", "config"), ORACLES)
def test_equals_diffusers(
    name: str,
    module: str,
    runner: Runner,
    config: dict[str, Any],
    steps: int,
    prediction: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    scheduler = make(module, monkeypatch, prediction_type=prediction, **config)
    scheduler.set_timesteps(steps)
    theirs, grid = runner(scheduler, noise(1000, 0), prediction, monkeypatch)
    assert len(grid) == steps + 1
    relative = difference(run(SAMPLERS[name], mixture, noise(1000, 0), grid), theirs)
    record_property("relative_difference", relative)
    assert relative < 1e-4


def test_deis_of_order_3_equals_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("deis_multistep", monkeypatch, solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(20)
    theirs, grid = by_sigma(scheduler, noise(1000, 0), "epsilon", monkeypatch)
    assert difference(run(partial(deis, order=3), mixture, noise(1000, 0), grid), theirs) < 1e-4


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [*GRIDS, "variance_exploding"])
def test_one_point_of_data_is_reached_exactly(name: str, spacing: str) -> None:
    point = noise(1, 1)
    for grid in [levels(s, 12, spacing) for s in SCHEDULES.values()] if spacing in GRIDS else [VE_LEVELS]:
        x = run(SAMPLERS[name], lambda x, _: point, start(grid), grid)
        torch.testing.assert_close(x, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", LEVELS.values(), ids=LEVELS)
def test_one_step_is_one_denoising(name: str, grid: list[Level]) -> None:
    steps = list(SAMPLERS[name](mixture, x := start(grid), [grid[0], CLEAN], noise))
    assert [(step.index, step.level) for step in steps] == [(0, CLEAN)]
    torch.testing.assert_close(steps[0].x, mixture(x, grid[0]))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", LEVELS.values(), ids=LEVELS)
def test_yields_every_interval_and_the_same_again(name: str, grid: list[Level]) -> None:
    once, again = (list(SAMPLERS[name](mixture, start(grid), grid, noise)) for _ in range(2))
    assert [step.index for step in once] == list(range(len(grid) - 1))
    assert [step.level for step in once] == grid[1:]
    assert all(step.x.isfinite().all() and step.denoised.isfinite().all() for step in once)
    assert all(torch.equal(a.x, b.x) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", LEVELS.values(), ids=LEVELS)
def test_all_randomness_is_the_noise_it_is_given(name: str, grid: list[Level]) -> None:
    """No draw is made twice, a step knows its own index, and only a stochastic sampler draws at all."""
    keys: list[tuple[int, int]] = []

    def draw(step: int, which: int) -> Tensor:
        keys.append((step, which))
        return noise(step + 100, which)

    state = torch.get_rng_state()
    *_, last = SAMPLERS[name](mixture, start(grid), grid, draw)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(keys) == len(set(keys))
    assert {step for step, _ in keys} == (set(range(12 + (grid is VE_LEVELS))) if name in STOCHASTIC else set())
    assert torch.equal(last.x, run(SAMPLERS[name], mixture, start(grid), grid)) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
def test_keeps_the_type_of_x(name: str) -> None:
    grid = LEVELS["flow"]

    def draw(step: int, which: int) -> Tensor:
        return noise(step, which).bfloat16()

    *_, last = SAMPLERS[name](mixture, start(grid).bfloat16(), grid, draw)
    assert last.x.dtype == last.denoised.dtype == torch.bfloat16


MEAN, STD = 0.5, 0.8


def on_the_ode(x: Tensor, first: Level, last: Level) -> Tensor:
    """Where the probability flow ODE takes x for N(MEAN, STD^2) data: the standard score of x does not change."""
    spread = [math.hypot(level.alpha * STD, level.sigma) for level in (first, last)]
    return last.alpha * MEAN + (x - first.alpha * MEAN) * spread[1] / spread[0]


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_many_steps_follow_the_ode(name: str, schedule: NoiseSchedule) -> None:
    grid = levels(schedule, 200)
    x = start(grid)
    tolerance = 0.02 if SAMPLERS[name] is SAMPLERS["euler"] else 0.004
    assert difference(run(SAMPLERS[name], gaussian(MEAN, STD), x, grid), on_the_ode(x, grid[0], CLEAN)) < tolerance


def arc(steps: int, power: float = 1) -> list[Level]:
    """alpha = cos, sigma = sin of angles down to 0.1, evenly spaced at power 1; neither is ever 0."""
    angles = [1.5 - 1.4 * (i / steps) ** power for i in range(steps + 1)]
    return [Level(math.cos(angle), math.sin(angle)) for angle in angles]


ORDERS: list[tuple[Sampler, float, float]] = [
    (SAMPLERS["euler"], 1, 1),
    (SAMPLERS["heun"], 1, 2),
    (SAMPLERS["dpmpp_2m"], 1, 2),
    (SAMPLERS["deis"], 1, 2),
    (SAMPLERS["unipc"], 1, 3),
    (partial(dpmpp_3m_sde, eta=0), 2, 3),  # its first step is an Euler step: h^2, unless that step is as short as h^2
]


@pytest.mark.parametrize(("sampler", "power", "order"), ORDERS, ids=lambda value: getattr(value, "__name__", None))
def test_order_of_convergence(sampler: Sampler, power: float, order: float) -> None:
    errors = []
    for steps in (80, 160):
        grid = arc(steps, power)
        x = noise(1000, 0)
        errors.append(difference(run(sampler, gaussian(MEAN, STD), x, grid), on_the_ode(x, grid[0], grid[-1])))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("eta", [0, 1])
def test_a_parabola_is_integrated_exactly(eta: float) -> None:
    """dpmpp_3m_sde without its noise, on a denoiser that is a parabola in lambda, once it has three values."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        return torch.full_like(x, 1 + 2 * level.log_snr - 3 * level.log_snr**2)

    grid = arc(6)
    steps = list(dpmpp_3m_sde(denoise, start(grid), grid, lambda *_: torch.zeros(SHAPE), eta=eta))
    for before, after in pairwise(steps[1:]):
        h = after.level.log_snr - before.level.log_snr
        u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        at = before.level.log_snr + h * u
        kernel = (1 + eta) * h * torch.exp((1 + eta) * h * (u - 1))
        mean = (kernel * (1 + 2 * at - 3 * at**2)).mean()
        a, _, _ = transfer(before.level, after.level, eta)
        torch.testing.assert_close(after.x, a * before.x + after.level.alpha * mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_stochastic_samplers_draw_from_the_data(name: str, schedule: NoiseSchedule) -> None:
    """For lcm the denoiser is what it is made for, a consistency function: the end of the ODE that x lies on."""

    def consistency(x: Tensor, level: Level) -> Tensor:
        return on_the_ode(x, level, CLEAN)

    grid = levels(schedule, 120)
    denoise = consistency if name == "lcm" else gaussian(MEAN, STD)
    x = run(SAMPLERS[name], denoise, start(grid, (40_000,)), grid)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.var()) == pytest.approx(STD**2, rel=0.1)


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0, 1])
def test_two_transfers_make_one(eta: float) -> None:
    first, middle, last = arc(2)
    (a_1, b_1, c_1), (a_2, b_2, c_2) = transfer(first, middle, eta), transfer(middle, last, eta)
    joined = (a_2 * a_1, a_2 * b_1 + b_2, math.hypot(a_2 * c_1, c_2))
    assert joined == pytest.approx(transfer(first, last, eta))


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("end", [Level(0.6, 0.8), Level(0.5, 0.5), CLEAN])
def test_pure_noise_and_clean_data_are_limits(end: Level, eta: float) -> None:
    from_noise = transfer(Level(0.0, 1.0), end, eta)
    assert from_noise == pytest.approx(transfer(Level(1e-12, 1.0), end, eta), abs=1e-11)
    to_data = transfer(end, CLEAN, eta) if end.sigma else transfer(Level(0.0, 1.0), CLEAN, eta)
    assert to_data == (0, 1, 0)


@pytest.mark.parametrize("grid", LEVELS.values(), ids=LEVELS)
def test_between_stays_on_the_curve(grid: list[Level]) -> None:
    for begin, end in pairwise(grid[1:-1]):
        middle = between(begin, end)
        assert middle.log_snr == pytest.approx((begin.log_snr + end.log_snr) / 2)
        norms = [(level.alpha, level.alpha + level.sigma, math.hypot(*level)) for level in (begin, end, middle)]
        assert any(column == pytest.approx([1.0] * 3) for column in zip(*norms, strict=True))


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = {
    "Euler": "euler",
    "EULER  A": "euler_ancestral",
    "dpm++2m": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
}


@pytest.mark.parametrize(("name", "sampler"), [*NAMES.items(), *zip(SAMPLERS, SAMPLERS, strict=True)])
def test_names_mean_samplers(name: str, sampler: str) -> None:
    assert resolve_sampler(name) == (sampler, None)


@pytest.mark.parametrize(("sampler", "label"), SAMPLER_NAMES.items())
def test_a_name_may_end_in_a_grid(sampler: str, label: str) -> None:
    for ending, grid in [("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("Exponential", "exponential")]:
        assert resolve_sampler(f"{label} {ending}") == (sampler, grid)


@pytest.mark.parametrize("name", ["dpmp_2m", "", "karras", "PNDMScheduler"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown sampler {name!r}"):
        resolve_sampler(name)


def test_every_sampler_has_a_name_that_the_command_line_knows() -> None:
    assert set(SAMPLER_NAMES) == set(SAMPLERS)
