"""Samplers: a descending list of noise levels becomes a picture, one denoising after another.

A sampler sees only `denoise(x, level)` and never asks which schedule or network is behind it. It works with the pairs
(alpha, sigma) of `x = alpha * x0 + sigma * eps`, and with lambda = log(alpha / sigma), in which the reverse process is

    x_t = sigma_t / sigma_s * x_s + sigma_t * integral of e^lambda D(lambda) dlambda over lambda_s .. lambda_t   (*)

for a denoised D along the path (DPM-Solver++, Lu et al. 2211.01095, proposition 4.1). The samplers differ in what they
take D to be between the levels: its last value, a line or a parabola through past values, or a corrected guess. Where
lambda is infinite, at pure noise (alpha = 0) and at clean data (sigma = 0), no curve reaches, and D is its last value.

Deterministic samplers follow the probability flow ODE (*); stochastic ones the reverse SDE, which forgets the noise in
x twice as fast and puts fresh noise in its place. Coefficients are Python floats: nothing waits for a device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.schedules import Level

Denoise = Callable[[Tensor, Level], Tensor]
"""denoise(x, level): the estimate of x0, of x's shape, from x at that level."""

Noise = Callable[[int, int], Tensor]
"""noise(step, draw): standard normal of x's shape; the same step and draw give the same tensor."""


class Step(NamedTuple):
    """What a sampler yields after each interval of its levels."""

    index: int  # type: ignore[assignment]  # 0 for the first interval; hides tuple.index
    level: Level  # the level that x has reached
    x: Tensor
    denoised: Tensor  # an estimate of x0 made on the way: what a preview shows


Sampler = Callable[[Denoise, Tensor, Sequence[Level], Noise], Iterator[Step]]
Past = list[tuple[float, Tensor]]  # (lambda, value) of what was predicted at earlier levels, the latest last


def initial_scale(level: Level) -> float:
    """The standard deviation of x at `level` for data of unit variance: first x = initial_scale * unit noise."""
    return math.hypot(level.alpha, level.sigma)


# --- the noise to begin with ------------------------------------------------------------------------------------------


def seed_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal of a shape without batch: what the stock library draws for a seed on the CPU."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[0]


def rotate(start: Tensor, end: Tensor, share: float) -> Tensor:
    """On the great arc from one noise to another (slerp, Shoemake 1985): noise all the way, as on no straight line."""
    if share in (0, 1):
        return end if share else start
    one, other = start.double(), end.double()
    angle = torch.acos(((one * other).sum() / (one.norm() * other.norm())).clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(start, end, share)
    turned = torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other
    return (turned / angle.sin()).to(start.dtype)


# --- one step ---------------------------------------------------------------------------------------------------------


def transfer(start: Level, end: Level, eta: float = 0.0) -> tuple[float, float, float]:
    """(a, b, c) of x_end = a * x_start + b * D + c * noise: exact while the denoised D does not change.

    eta 0 is the ODE, (*) with D constant; eta 1 is the SDE (SDE-DPM-Solver++ of order 1). With h = lambda_t - lambda_s,

        a = sigma_t / sigma_s * e^(-eta h),  b = alpha_t (1 - e^(-(1 + eta) h)),  c = sigma_t sqrt(1 - e^(-2 eta h))

    where e^-h = sigma_t / alpha_t * alpha_s / sigma_s is 0, and no limit is needed, from pure noise and to clean data.
    """
    decay = (end.sigma / start.sigma) * (start.alpha / end.alpha)
    kept = decay**eta
    return end.sigma / start.sigma * kept, end.alpha * (1 - decay * kept), end.sigma * math.sqrt(1 - kept**2)


def remember(past: Past, level: Level, value: Tensor, count: int) -> Past:
    """The latest `count` of `past` and this value; pure noise lies infinitely far back in lambda and is left out."""
    return [*past, (level.log_snr, value)][-count:] if level.alpha else past


def midway(past: Past, end: Level) -> Tensor | float:
    """What a line through the last two values adds to the last one half way to `end`: h / 2 * slope, 0 if no line."""
    if len(past) < 2 or not end.sigma:
        return 0.0
    (lambda_1, before), (lambda_0, now) = past[-2:]
    return (end.log_snr - lambda_0) / (lambda_0 - lambda_1) / 2 * (now - before)


def bend(points: Past, start: Level, end: Level, speed: float, value: Tensor) -> Tensor | float:
    """What the polynomial in lambda through `points` adds, averaged over the step, to the constant `value`.

    With u = 0 at start and 1 at end and H = speed * h, the values v_j at u_j have weights w_j for which

        sum_j w_j u_j^k = m_k = integral of H e^(-H (1 - u)) u^k du over 0 .. 1: m_0 = 1 - e^-H, m_k = 1 - k / H m_(k-1)

    so that the integral is exact for every polynomial of their degree. The speed is 1 for (*), 2 for the SDE, whose
    kernel is e^(2 lambda), and -1 for a noise prediction, whose kernel is e^-lambda. Returns sum_j w_j (v_j - value).
    """
    if len(points) < 2 or not end.sigma:
        return 0.0
    h = end.log_snr - start.log_snr
    nodes = [(at - start.log_snr) / h for at, _ in points]
    moments = [-math.expm1(-speed * h)]
    for k in range(1, len(nodes)):
        moments.append(1 - k / (speed * h) * moments[-1])
    powers = [[u**k for u in nodes] for k in range(len(nodes))]
    weights = torch.linalg.solve(*(torch.tensor(m, dtype=torch.float64, device="cpu") for m in (powers, moments)))
    return sum(w * (v - value) for w, (_, v) in zip(weights.tolist(), points, strict=True))


# --- D is its last value ----------------------------------------------------------------------------------------------


def euler(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Euler on dx = eps dsigma at alpha = 1 (Karras et al. 2206.00364, eq. 1), which is DDIM at any alpha: order 1.

    DDIM (Song et al. 2010.02502, eq. 12, eta = 0): x_t = alpha_t D + sigma_t eps, eps = (x_s - alpha_s D) / sigma_s.
    """
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        a, b, _ = transfer(start, end)
        x = a * x + b * denoised
        yield Step(i, end, x, denoised)


def euler_ancestral(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """A draw from q(x_t | x_s, x0 = D): DDPM's posterior (Ho et al. 2006.11239, eq. 6-7), whatever levels are skipped.

    The same as DDIM with eta = 1, and as Euler down to sigma_down = sigma_t^2 / sigma_s at alpha = 1 with noise of
    sigma_up^2 = sigma_t^2 - sigma_down^2 (k-diffusion, `sample_euler_ancestral`).
    """
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        a, b, c = transfer(start, end, eta=1)
        x = a * x + b * denoised + c * noise(i, 0)
        yield Step(i, end, x, denoised)


def lcm(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """All the way to D and back up with fresh noise, for consistency models (Luo et al. 2310.04378, algorithm 3)."""
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        x = end.alpha * denoised + end.sigma * noise(i, 0)
        yield Step(i, end, x, denoised)


# --- two evaluations a step -------------------------------------------------------------------------------------------


def heun(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Trapezoid rule on dx = eps dsigma at alpha = 1 (Karras et al. 2206.00364, algorithm 1): order 2.

    From pure noise sigma / alpha is infinite, and to clean data eps at the end is unknown: those two are Euler steps.
    """
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        a, b, _ = transfer(start, end)
        guess = a * x + b * denoised
        if start.alpha and end.sigma:
            eps = (x - start.alpha * denoised) / start.sigma
            eps_end = (guess - end.alpha * denoise(guess, end)) / end.sigma
            guess = guess + end.alpha * (end.ratio - start.ratio) / 2 * (eps_end - eps)
        x = guess
        yield Step(i, end, x, denoised)


def dpmpp_sde(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2S), r = 1/2, on the SDE: D is its value half way (2211.01095, algorithm 1; k-diffusion).

    One Brownian path over sigma / alpha drives both halves: the noise of a step is the normalised sum of its increments
    before and after the middle. A step without a middle, at either end of lambda, is ancestral.
    """
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = latest = denoise(x, start)
        fresh = noise(i, 0)
        if start.alpha and end.sigma:
            middle = between(start, end)
            a, b, c = transfer(start, middle, eta=1)
            latest = denoise(a * x + b * denoised + c * fresh, middle)
            before = (start.ratio - middle.ratio) / (start.ratio - end.ratio)
            fresh = math.sqrt(before) * fresh + math.sqrt(1 - before) * noise(i, 1)
        a, b, c = transfer(start, end, eta=1)
        x = a * x + b * latest + c * fresh
        yield Step(i, end, x, latest)


def between(start: Level, end: Level) -> Level:
    """The level half way in lambda on the curve of both: alpha = 1, alpha + sigma = 1, or alpha^2 + sigma^2 = 1."""
    ratio = math.sqrt(start.ratio * end.ratio)
    if start.alpha == end.alpha:
        return Level(end.alpha, end.alpha * ratio)
    scale = 1 + ratio if math.isclose(end.alpha + end.sigma, 1) else math.hypot(1, ratio)
    return Level(1 / scale, ratio / scale)


# --- D is a line or a parabola through past values --------------------------------------------------------------------


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise, eta: float = 0) -> Iterator[Step]:
    """DPM-Solver++(2M): D is the value half way of a line through the last two (2211.01095, algorithm 2): order 2."""
    past: Past = []
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        past = remember(past, start, denoised, 2)
        a, b, c = transfer(start, end, eta)
        x = a * x + b * (denoised + midway(past, end))
        x = x + c * noise(i, 0) if eta else x
        yield Step(i, end, x, denoised)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), midpoint: the line of `dpmpp_2m` in the reverse SDE (2211.01095; k-diffusion)."""
    return dpmpp_2m(denoise, x, levels, noise, eta=1)


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise, eta: float = 1) -> Iterator[Step]:
    """D is the parabola through the last three values, in the reverse SDE (k-diffusion, `sample_dpmpp_3m_sde`).

    The parabola is integrated exactly. k-diffusion gives its curvature half that weight, which leaves a step with an
    error of h^3 at eta = 0; here it is h^4.
    """
    past: Past = []
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        past = remember(past, start, denoised, 3)
        a, b, c = transfer(start, end, eta)
        x = a * x + b * denoised + end.alpha * bend(past, start, end, 1 + eta, denoised)
        x = x + c * noise(i, 0) if eta else x
        yield Step(i, end, x, denoised)


def deis(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise, order: int = 2) -> Iterator[Step]:
    """tAB-DEIS, interpolating eps in log rho = -lambda (Zhang & Chen 2204.13902, eq. 14-15): of the order given.

    The integral of e^-lambda eps takes the place of (*); its constant part is the same DDIM step.
    """
    past: Past = []
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        eps = (x - start.alpha * denoised) / start.sigma
        past = remember(past, start, eps, order)
        a, b, _ = transfer(start, end)
        x = a * x + b * denoised + end.sigma * bend(past, start, end, -1, eps)
        yield Step(i, end, x, denoised)


# --- D is a guess, corrected once its end is known --------------------------------------------------------------------


def unipc(denoise: Denoise, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """UniPC-2 on D with B(h) = e^h - 1 (Zhao et al. 2302.04867, sec. 3): `dpmpp_2m` that redoes every step: order 3.

    UniP predicts. UniC takes the same step again, once D at its end is known, which the next step needs anyway: it
    costs no evaluation, as D is not evaluated again at the corrected x.
    """
    past: Past = []
    last: tuple[Level, Tensor, Tensor] | None = None
    for i, (start, end) in enumerate(pairwise(levels)):
        denoised = denoise(x, start)
        x = x if last is None else unic(*last, start, past, denoised)
        past = remember(past, start, denoised, 2)
        last = (start, x, denoised)
        a, b, _ = transfer(start, end)
        x = a * x + b * (denoised + midway(past, end))
        yield Step(i, end, x, denoised)


def unic(start: Level, x: Tensor, denoised: Tensor, end: Level, past: Past, denoised_end: Tensor) -> Tensor:
    """UniC: the step from x at `start`, with D a parabola through its two `past` values and the one at `end`.

    Without two past values, D is the mean of its ends, as B(h) = e^h - 1 makes it.
    """
    a, b, _ = transfer(start, end)
    if len(past) < 2:
        return a * x + b * (denoised + denoised_end) / 2
    points = [*past, (end.log_snr, denoised_end)]
    return a * x + b * denoised + end.alpha * bend(points, start, end, 1, denoised)


# --- names ------------------------------------------------------------------------------------------------------------

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "ddim": euler,  # the same update, derived twice
    "ddpm": euler_ancestral,  # likewise
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_sde": dpmpp_sde,
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
}
