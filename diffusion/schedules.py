"""Forward processes and sampling grids: how much noise at which time, and which noise levels a sampler visits.

A noise level is the pair (alpha, sigma) of `x = alpha * x0 + sigma * eps` (Kingma et al. 2107.00630, eq. 1). Variance
preserving (alpha^2 + sigma^2 = 1), variance exploding (alpha = 1), flow (alpha + sigma = 1) and zero terminal SNR
(alpha = 0) are four curves in that one plane. `t` is only what the network is told, never a noise level.

Everything here is float64: levels are computed once and on the CPU, so exactness costs nothing.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion.names import unknown

# Where karras and exponential start when the schedule itself starts at an infinite sigma / alpha: at its last finite
# level, and never above this bound. 4096 is what diffusers puts in place of infinity (alpha^2 = 2^-24).
MAX_RATIO = 4096.0


class Level(NamedTuple):
    """One noise level of `x = alpha * x0 + sigma * eps`, in Python floats: no device, no rounding, no sync."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the `sigma` of Karras et al. (2206.00364); infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the log of the SNR (Lu et al. 2206.00927); -inf for pure noise."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma else math.inf


CLEAN = Level(1.0, 0.0)


# --- betas: beta_t = 1 - alpha_bar_t / alpha_bar_(t-1) of a variance preserving chain, shape (num,) -------------------


def linear_betas(num: int, start: float, end: float) -> Tensor:
    """Evenly spaced betas (Ho et al. 2006.11239, sec. 4)."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def scaled_linear_betas(num: int, start: float, end: float) -> Tensor:
    """Betas with evenly spaced square roots (Rombach et al. 2112.10752, released code): Stable Diffusion."""
    return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2


def cosine_betas(num: int, max_beta: float = 0.999) -> Tensor:
    """alpha_bar(t) = cos^2((t / T + s) / (1 + s) * pi / 2), s = 0.008 (Nichol & Dhariwal 2102.09672, eq. 17)."""
    t = torch.linspace(0, 1, num + 1, dtype=torch.float64)
    alphas_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=max_beta)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar): the last becomes 0, the first stays (Lin et al. 2305.08891, algorithm 1)."""
    root = (1 - betas.double()).cumprod(0).sqrt()
    alphas_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


# --- forward processes ------------------------------------------------------------------------------------------------


class NoiseSchedule(Protocol):
    """A forward process: the path from data to noise, and the time by which the network knows each point of it."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of training times."""

    @property
    def continuous(self) -> bool:
        """Whether training times are the reals of [0, T], or the integers 0 .. T-1."""

    def level_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at network times `t`, float64, of t's shape and on its device."""

    def time_of(self, level: Level) -> float:
        """The network time at which sigma / alpha is the level's: the inverse of `level_at`, clamped to its ends."""

    def time_from_unit(self, u: Tensor) -> Tensor:
        """Training times for `u` in [0, 1), larger u being noisier; of u's shape."""


class DiscreteSchedule:
    """A variance preserving chain of T steps, alpha_t^2 = alpha_bar_t = prod(1 - beta) and alpha^2 + sigma^2 = 1.

    Training knows the integer times 0 .. T-1. Between them log(sigma / alpha) is linear in t, as in k-diffusion;
    before an infinite last one (zero terminal SNR) alpha / sigma is, which reaches infinity and can be inverted.

    Args: betas, shape (T,), each in (0, 1); the last may be 1.
    """

    continuous = False

    def __init__(self, betas: Tensor) -> None:
        self.betas = betas.detach().to("cpu", torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not _are_betas(self.betas):
            raise ValueError(f"betas must be two or more numbers in (0, 1), of which the last may be 1; got {betas}")
        self.num_timesteps = len(betas)
        self.alphas_bar = (1 - self.betas).cumprod(0)
        self.log_ratio = -0.5 * torch.logit(self.alphas_bar)  # log(sigma / alpha), ascending; the last may be +inf
        self._knots: list[float] = self.log_ratio.tolist()

    def level_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        low = t.floor().clamp(0, self.num_timesteps - 2).long()
        log_ratio = self.log_ratio.to(t.device)
        start, end, w = log_ratio[low], log_ratio[low + 1], t - low
        y = torch.where(end.isinf(), start - torch.log1p(-w), torch.lerp(start, end, w))
        # alpha^2 = sigmoid(log SNR), sigma^2 = sigmoid(-log SNR) (2107.00630, eq. 3-4): 0 and 1, not NaN, at infinity.
        return torch.sigmoid(-2 * y).sqrt(), torch.sigmoid(2 * y).sqrt()

    def time_of(self, level: Level) -> float:
        y = min(max(-level.log_snr, self._knots[0]), self._knots[-1])
        low = min(bisect_right(self._knots, y) - 1, self.num_timesteps - 2)
        start, end = self._knots[low : low + 2]
        w = 1 - math.exp(start - y) if math.isinf(end) else (y - start) / (end - start)
        return round(low + w, 9)  # a level taken at an integer time gives back that integer, not 499.9999999999

    def time_from_unit(self, u: Tensor) -> Tensor:
        return (u.double() * self.num_timesteps).floor().clamp(max=self.num_timesteps - 1).long()


@dataclass(frozen=True)
class FlowSchedule:
    """The straight path x = (1 - sigma) * x0 + sigma * eps (Lipman et al. 2210.02747; Liu et al. 2209.03003).

    The network is told t = T * sigma, as in diffusers. A shift above 1 spends more of the times that are drawn, and of
    the steps of a grid, in noise, as larger pictures need: sigma = shift * u / (1 + (shift - 1) * u) for u even in
    [0, 1] (Esser et al. 2403.03206, eq. 23).
    """

    num_timesteps: int = 1000
    shift: float = 1.0
    continuous = True

    def __post_init__(self) -> None:
        if self.num_timesteps < 2 or not self.shift > 0:
            raise ValueError(f"need num_timesteps >= 2 and shift > 0, not {self.num_timesteps} and {self.shift}")

    def level_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double() / self.num_timesteps
        return 1 - sigma, sigma

    def time_of(self, level: Level) -> float:
        return round(level.sigma / (level.alpha + level.sigma) * self.num_timesteps, 9)

    def time_from_unit(self, u: Tensor) -> Tensor:
        u = u.double()
        return self.shift * u / (1 + (self.shift - 1) * u) * self.num_timesteps


# --- sampling grids: (schedule, steps) -> network times, float64, shape (steps,), strictly descending -----------------


def levels(schedule: NoiseSchedule, steps: int, grid: str = "trailing", strength: float = 1.0) -> list[Level]:
    """The noise levels a sampler visits: `steps` of the schedule's own, strictly descending, then clean data.

    A strength below 1 begins further down, from a picture, and visits the last `steps` of round(steps / strength): as
    many steps as were asked for. Raises ValueError when `grid` is not one of GRIDS, or when those are not in
    1 .. schedule.num_timesteps.
    """
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    total = round(steps / strength)
    if not 1 <= total <= schedule.num_timesteps:
        raise ValueError(f"steps must be 1 to {schedule.num_timesteps}, the times of this schedule; got {total}")
    alphas, sigmas = schedule.level_at(GRIDS[grid](schedule, total)[total - steps :])
    return [*map(Level, alphas.tolist(), sigmas.tolist()), CLEAN]


def levels_of(schedule: NoiseSchedule, ratios: Iterable[float]) -> list[Level]:
    """The levels of the schedule that have these sigma / alpha, which fall, then clean data.

    Raises ValueError for one that is more or less than the schedule has.
    """
    low, high = _ratio_range(schedule)[1], schedule_end(schedule)
    wanted = list(ratios)
    for ratio in wanted:
        if not low * (1 - 1e-6) <= ratio <= high * (1 + 1e-6):
            raise ValueError(f"sigma {ratio:g} is outside of this model's {low:.4g} to {high:.4g}")
    alphas, sigmas = schedule.level_at(_times(schedule, torch.tensor(wanted, dtype=torch.float64)))
    return [*map(Level, alphas.tolist(), sigmas.tolist()), CLEAN]


def schedule_end(schedule: NoiseSchedule) -> float:
    """The largest sigma / alpha that the schedule has; infinite for zero terminal SNR."""
    alpha, sigma = schedule.level_at(torch.tensor([_time_range(schedule)[0]], dtype=torch.float64))
    return float(sigma / alpha)


def trailing(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every (T / steps)-th training time, counted from the noisiest (Lin et al. 2305.08891, table 2)."""
    # numpy's arange, as in diffusers, for its rounding of ties (937.5 at 48 steps); it sometimes runs one step too far
    t = torch.from_numpy(np.arange(schedule.num_timesteps, 0, -schedule.num_timesteps / steps)[:steps])
    return _shifted(schedule, t) if schedule.continuous else t.round() - 1


def discrete(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced times from the noisiest to the cleanest, both included (k-diffusion, `get_sigmas`)."""
    return _shifted(schedule, torch.linspace(*_time_range(schedule), steps, dtype=torch.float64))


def sgm_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced times that stop one short of the cleanest (Stability-AI/generative-models; ComfyUI)."""
    return discrete(schedule, steps + 1)[:-1]


def beta(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Times at even quantiles of Beta(0.6, 0.6): dense at both ends (Lee et al. 2407.12173; ComfyUI).

    diffusers applies the quantiles to sigma / alpha where the paper applies them to the time.
    """
    start, end = _time_range(schedule)
    p = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return _shifted(schedule, end + (start - end) * beta_quantile(p, 0.6))


def karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced (sigma / alpha)^(1 / rho) (Karras et al. 2206.00364, eq. 5)."""
    start, end = _ratio_range(schedule)
    ratios = torch.linspace(start ** (1 / rho), end ** (1 / rho), steps, dtype=torch.float64) ** rho
    return _times(schedule, ratios)


def exponential(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced log(sigma / alpha) (k-diffusion, `get_sigmas_exponential`)."""
    start, end = _ratio_range(schedule)
    return _times(schedule, torch.linspace(math.log(start), math.log(end), steps, dtype=torch.float64).exp())


GRIDS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    grid.__name__: grid for grid in (trailing, discrete, sgm_uniform, karras, exponential, beta)
}


def beta_quantile(p: Tensor, a: float) -> Tensor:
    """The inverse CDF of the symmetric Beta(a, a) at `p` in [0, 1], to 1e-12; of p's shape.

    Bisects the CDF x^a * sum_n (1 - a)_n / n! * x^n / (a + n), up to a constant (DLMF 8.17.7), whose every term adds
    a bit up to the median x = 1/2; symmetry gives the other half.
    """
    n = torch.arange(64, dtype=torch.float64)
    growth = torch.where(n > 0, (n - a) / n, 1.0)  # of (1 - a)_n / n!
    terms = growth.cumprod(0) / (a + n)

    def mass(x: Tensor) -> Tensor:
        return x**a * (terms * x.unsqueeze(-1) ** n).sum(-1)

    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    wanted = 2 * torch.minimum(p, 1 - p) * mass(torch.tensor(0.5, dtype=torch.float64))
    for _ in range(52):
        middle = (low + high) / 2
        below = mass(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(p > 0.5, 1 - low, low)


def _are_betas(betas: Tensor) -> bool:
    return bool((betas > 0).all() and (betas[:-1] < 1).all() and betas[-1] <= 1)


def _time_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The noisiest and the cleanest of T training times one apart: T-1 and 0, or T and 1 for a flow (0 is no noise)."""
    return (schedule.num_timesteps, 1) if schedule.continuous else (schedule.num_timesteps - 1, 0)


def _shifted(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Even times as those of a flow are spaced, which may be denser in noise; a chain has the times it has."""
    return schedule.time_from_unit(t / schedule.num_timesteps) if schedule.continuous else t


def _ratio_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """sigma / alpha at the same two ends; for the noisiest, the largest finite one and at most MAX_RATIO."""
    start, end = _time_range(schedule)
    times = _shifted(schedule, torch.tensor([start, start - 1, end], dtype=torch.float64))
    alpha, sigma = schedule.level_at(times)
    first, second, last = (sigma / alpha).tolist()
    return min(second, MAX_RATIO) if math.isinf(first) else first, last


def _times(schedule: NoiseSchedule, ratios: Tensor) -> Tensor:
    return torch.tensor([schedule.time_of(Level(1.0, ratio)) for ratio in ratios.tolist()], dtype=torch.float64)
