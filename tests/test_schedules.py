"""Forward processes and grids against diffusers' schedulers, closed forms, and their own limits."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale
from torch import Tensor

from diffusion.schedules import (
    CLEAN,
    GRIDS,
    MAX_RATIO,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    NoiseSchedule,
    beta_quantile,
    cosine_betas,
    levels,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    trailing,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_BETAS = scaled_linear_betas(1000, 0.00085, 0.012)

SCHEDULES: dict[str, NoiseSchedule] = {
    "scaled_linear": DiscreteSchedule(SD_BETAS),
    "cosine": DiscreteSchedule(cosine_betas(1000)),
    "zero_terminal": DiscreteSchedule(rescale_zero_terminal_snr(SD_BETAS)),
    "short_zero_terminal": DiscreteSchedule(rescale_zero_terminal_snr(linear_betas(10, 0.01, 0.5))),
    "flow": FlowSchedule(),
    "shifted_flow": FlowSchedule(shift=3.0),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_grid = pytest.mark.parametrize("grid", GRIDS)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ratios(noise_levels: list[Level]) -> Tensor:
    return f64(*(level.ratio for level in noise_levels))


# --- Level ------------------------------------------------------------------------------------------------------------


def test_ratio_and_log_snr_of_a_level() -> None:
    level = Level(0.8, 0.6)
    assert level.ratio == pytest.approx(0.75)
    assert level.log_snr == pytest.approx(math.log(4 / 3))
    assert (Level(0.0, 1.0).ratio, Level(0.0, 1.0).log_snr) == (math.inf, -math.inf)
    assert (CLEAN.ratio, CLEAN.log_snr) == (0.0, math.inf)


# --- betas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("linear", linear_betas(1000, 0.0001, 0.02)),
        ("scaled_linear", scaled_linear_betas(1000, 0.0001, 0.02)),
        ("squaredcos_cap_v2", cosine_betas(1000)),
    ],
)
def test_betas_are_those_of_diffusers(name: str, betas: Tensor) -> None:
    scheduler = DDIMScheduler(beta_schedule=name, beta_start=0.0001, beta_end=0.02)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=1e-6, atol=0)
    alpha, sigma = DiscreteSchedule(betas).level_at(torch.arange(1000))
    torch.testing.assert_close((alpha**2).float(), scheduler.alphas_cumprod, rtol=1e-4, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-14, atol=0)


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    betas = rescale_zero_terminal_snr(SD_BETAS)
    torch.testing.assert_close(betas, diffusers_rescale(SD_BETAS), rtol=1e-11, atol=0)
    assert betas[-1] == 1
    assert betas[0] == pytest.approx(SD_BETAS[0].item(), rel=1e-12)  # the first alpha_bar stays


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.1, 1.1], [1.0, 0.1], [0.1, math.nan], [[0.1, 0.2]]])
def test_what_are_not_betas_is_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas must be"):
        DiscreteSchedule(torch.tensor(betas))


# --- level_at, time_of, time_from_unit --------------------------------------------------------------------------------


@each_schedule
def test_integer_times_come_back_exactly(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_timesteps + schedule.continuous)
    alpha, sigma = schedule.level_at(t)
    assert [schedule.time_of(level) for level in map(Level, alpha.tolist(), sigma.tolist())] == t.tolist()


@each_schedule
def test_times_between_integers_come_back(schedule: NoiseSchedule) -> None:
    t = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (schedule.num_timesteps - 1)
    t[-1] = schedule.num_timesteps - 1.25  # between the last two: where zero terminal SNR reaches infinity
    alpha, sigma = schedule.level_at(t)
    times = f64(*(schedule.time_of(level) for level in map(Level, alpha.tolist(), sigma.tolist())))
    torch.testing.assert_close(times, t, rtol=0, atol=1e-8)


@each_schedule
def test_noise_grows_with_time(schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule.level_at(torch.linspace(0, schedule.num_timesteps - 1, 3001, dtype=torch.float64))
    assert alpha.isfinite().all()
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_times_between_integers_interpolate_the_log_ratio() -> None:
    schedule = SCHEDULES["scaled_linear"]
    alpha, sigma = schedule.level_at(f64(500, 500.25, 501))
    start, between, end = (sigma / alpha).log().tolist()
    assert between == pytest.approx(0.75 * start + 0.25 * end, rel=1e-12)


def test_time_depends_on_the_ratio_alone_and_stays_in_range() -> None:
    schedule = SCHEDULES["scaled_linear"]
    alpha, sigma = (value.item() for value in schedule.level_at(f64(321)))
    assert schedule.time_of(Level(1.0, sigma / alpha)) == 321  # variance exploding, same picture
    assert schedule.time_of(CLEAN) == schedule.time_of(Level(1.0, 1e-9)) == 0
    assert schedule.time_of(Level(0.0, 1.0)) == schedule.time_of(Level(1.0, 1e9)) == 999


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    schedule = SCHEDULES["zero_terminal"]
    assert [value.item() for value in schedule.level_at(torch.tensor(999))] == [0.0, 1.0]
    assert schedule.time_of(Level(0.0, 1.0)) == 999


def test_flow_is_a_straight_line_and_its_shift_that_of_diffusers() -> None:
    alpha, sigma = FlowSchedule().level_at(f64(0, 250, 1000))
    assert sigma.tolist() == [0, 0.25, 1]
    assert alpha.tolist() == [1, 0.75, 0]

    flow, scheduler = FlowSchedule(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    told = flow.time_from_unit(torch.arange(1000, 0, -1) / 1000)
    torch.testing.assert_close(told.float(), scheduler.timesteps, rtol=1e-6, atol=0)
    alpha, sigma = flow.level_at(told)
    torch.testing.assert_close(sigma.float(), scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(alpha, 1 - sigma, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_tells_the_network_its_sigma_whatever_the_shift(shift: float) -> None:
    flow, scheduler = FlowSchedule(shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist())
    told = [flow.time_of(level) for level in levels(flow, 7)[:-1]]
    torch.testing.assert_close(torch.tensor(told), scheduler.timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_timesteps", "shift"), [(1, 1.0), (1000, 0.0), (1000, math.nan)])
def test_what_is_not_a_flow_is_refused(num_timesteps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="shift > 0"):
        FlowSchedule(num_timesteps, shift)


def test_unit_interval_covers_the_training_times() -> None:
    u = f64(0, 0.0005, 0.001, 0.9995, math.nextafter(1, 0))
    assert SCHEDULES["scaled_linear"].time_from_unit(u).tolist() == [0, 0, 1, 999, 999]
    assert SCHEDULES["scaled_linear"].time_from_unit(u.float()).max() == 999  # float32 rounds the last one to 1
    assert SCHEDULES["flow"].time_from_unit(u[:2]).tolist() == [0, 0.5]


# --- grids ------------------------------------------------------------------------------------------------------------


@each_schedule
@each_grid
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_levels_descend_from_the_schedule_to_clean_data(schedule: NoiseSchedule, grid: str, steps: int) -> None:
    noise_levels = levels(schedule, steps, grid)
    assert len(noise_levels) == steps + 1
    assert noise_levels[-1] == CLEAN
    assert all(math.isfinite(level.alpha) and math.isfinite(level.sigma) for level in noise_levels)
    assert all(first.ratio > second.ratio for first, second in pairwise(noise_levels))
    family = 1 if schedule.continuous else 2  # alpha + sigma = 1, or alpha^2 + sigma^2 = 1
    assert all(level.alpha**family + level.sigma**family == pytest.approx(1, rel=1e-14) for level in noise_levels)


@each_grid
@pytest.mark.parametrize("name", ["zero_terminal", "short_zero_terminal", "flow"])
def test_grids_over_time_start_in_pure_noise_and_grids_over_ratio_near_it(name: str, grid: str) -> None:
    schedule = SCHEDULES[name]
    first = levels(schedule, 5, grid)[0]
    if grid in ("karras", "exponential"):
        last_finite = schedule.num_timesteps - (1 if schedule.continuous else 2)
        assert schedule.time_of(first) == last_finite
    else:
        assert first == (0.0, 1.0)


def test_an_almost_infinite_ratio_is_capped() -> None:
    betas = f64(0.1, 1 - 1e-12, 1.0)  # its last finite sigma / alpha is about a million
    assert levels(DiscreteSchedule(betas), 3, "karras")[0].ratio == pytest.approx(MAX_RATIO, rel=1e-6)


def test_trailing_times_are_those_of_diffusers() -> None:
    schedule, scheduler = SCHEDULES["scaled_linear"], DDIMScheduler(**SD, timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        # numpy's arange sometimes ends one late, with a time of -1: only `steps` were asked for
        assert trailing(schedule, steps).tolist() == scheduler.timesteps[:steps].tolist()


def test_trailing_flow_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist())
    sigmas = f64(*(level.sigma for level in levels(SCHEDULES["shifted_flow"], 7)))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_discrete_times_are_those_of_diffusers(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(steps)
    times = GRIDS["discrete"](SCHEDULES["scaled_linear"], steps)
    # one step: torch and k-diffusion start at the noisiest time, numpy's reversed linspace at the cleanest
    expected = scheduler.timesteps if steps > 1 else torch.tensor([999.0])
    torch.testing.assert_close(times.float(), expected, rtol=1e-6, atol=1e-4)
    if steps > 1:  # between integers diffusers interpolates sigma / alpha, k-diffusion its logarithm
        torch.testing.assert_close(
            ratios(levels(SCHEDULES["scaled_linear"], steps, "discrete")).float(), scheduler.sigmas, rtol=1e-4, atol=0
        )

    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(steps)
    torch.testing.assert_close(GRIDS["discrete"](FlowSchedule(), steps).float(), flow.timesteps, rtol=1e-6, atol=0)


def test_sgm_uniform_is_evenly_spaced_and_stops_one_short() -> None:
    times = GRIDS["sgm_uniform"](SCHEDULES["scaled_linear"], 4)
    torch.testing.assert_close(times, f64(999, 749.25, 499.5, 249.75))


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_grids_over_ratio_are_those_of_diffusers(grid: str, name: str, scheduler_class: type) -> None:
    scheduler = scheduler_class(**{**SD, "beta_schedule": name}, **{f"use_{grid}_sigmas": True})
    scheduler.set_timesteps(9)
    schedule = SCHEDULES["scaled_linear" if name == "scaled_linear" else "cosine"]
    noise_levels = levels(schedule, 9, grid)
    # diffusers' alpha_bar is float32, of which the smallest sigma^2 = 1 - alpha_bar keep only three digits
    torch.testing.assert_close(ratios(noise_levels).float(), scheduler.sigmas, rtol=2e-3, atol=0)
    times = f64(*(schedule.time_of(level) for level in noise_levels[:-1]))
    # Euler keeps fractional times; DPM-Solver truncates or rounds them to integers, away from their sigmas
    tolerance = 0.05 if scheduler_class is EulerDiscreteScheduler else 1.05
    torch.testing.assert_close(times, scheduler.timesteps.double(), rtol=0, atol=tolerance)


@each_schedule
@pytest.mark.parametrize(("grid", "warp"), [("karras", lambda ratio: ratio ** (1 / 7)), ("exponential", torch.log)])
def test_grids_over_ratio_are_even_under_their_warp(
    schedule: NoiseSchedule, grid: str, warp: Callable[[Tensor], Tensor]
) -> None:
    strides = warp(ratios(levels(schedule, 9, grid)[:-1])).diff()
    torch.testing.assert_close(strides, strides.mean().expand(8), rtol=1e-6, atol=0)


def test_beta_quantile_against_closed_forms() -> None:
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p, 1.0), p, rtol=0, atol=1e-12)  # uniform
    torch.testing.assert_close(beta_quantile(p, 0.5), torch.sin(math.pi / 2 * p) ** 2, rtol=0, atol=1e-12)  # arcsine
    x = beta_quantile(p, 2.0)
    torch.testing.assert_close(3 * x**2 - 2 * x**3, p, rtol=0, atol=1e-12)  # the cubic smoothstep
    assert beta_quantile(f64(0, 0.5, 1), 0.6).tolist() == pytest.approx([0, 0.5, 1], abs=1e-15)


def test_beta_grid_is_the_papers_and_its_quantiles_those_of_diffusers() -> None:
    schedule = SCHEDULES["scaled_linear"]
    torch.testing.assert_close(GRIDS["beta"](schedule, 4), 999 * beta_quantile(f64(1, 0.75, 0.5, 0.25), 0.6))

    pytest.importorskip("scipy")  # which diffusers needs for these
    scheduler = EulerDiscreteScheduler(**SD, use_beta_sigmas=True)
    scheduler.set_timesteps(9)
    quantiles = beta_quantile(torch.linspace(1, 0, 9, dtype=torch.float64), 0.6)
    high, low = ratios(levels(schedule, 2, "discrete")).tolist()[:2]
    torch.testing.assert_close((low + (high - low) * quantiles).float(), scheduler.sigmas[:-1], rtol=1e-4, atol=0)


def test_mistyped_grid_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown grid 'karas', must be one of .*; did you mean 'karras'\?"):
        levels(FlowSchedule(), 10, "karas")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be 1 to 1000.*got {steps}"):
        levels(FlowSchedule(), steps)
