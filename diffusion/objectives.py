"""What the network learns: the four things it may predict, how their errors are weighted, and which times are drawn.

With `x = alpha * x0 + sigma * eps`, each prediction is one linear combination of data and noise, so that any of them
together with x gives back x0: they are four ways to write one denoiser. What differs is the error that training sees,
and `loss_weight` says by how much.
"""

import torch
from torch import Tensor

from diffusion.names import unknown

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = ("uniform", "min_snr")
DENSITIES = ("uniform", "logit_normal")

Coefficient = Tensor | float  # alpha or sigma: a number, or a tensor that broadcasts against x


def target(prediction: str, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """What the network should output for `x = alpha * x0 + sigma * eps`; of x0's shape.

    Raises ValueError when `prediction` is not one of PREDICTIONS.
    """
    match prediction:
        case "epsilon":  # Ho et al. 2006.11239, eq. 14
            return eps
        case "v_prediction":  # Salimans & Ho 2202.00512, sec. 4
            return alpha * eps - sigma * x0
        case "sample":  # the data itself
            return x0
        case "flow":  # the velocity of the straight path: Liu et al. 2209.03003, eq. 1, from data to noise
            return eps - x0
    raise unknown("prediction", prediction, PREDICTIONS)


def denoised(prediction: str, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The estimate of x0 that an `output` at `x = alpha * x0 + sigma * eps` stands for: `target` solved for x0.

    None of these assumes alpha^2 + sigma^2 = 1 or alpha + sigma = 1. At alpha = 0, x is all noise and epsilon says
    nothing of x0: the estimate is then 0, the mean of centred data. Raises ValueError as `target` does.
    """
    match prediction:
        case "epsilon":
            return (x - sigma * output) * _inverse_or_zero(alpha)
        case "v_prediction":
            return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
        case "sample":
            return output
        case "flow":
            return (x - sigma * output) / (alpha + sigma)
    raise unknown("prediction", prediction, PREDICTIONS)


def loss_weight(weighting: str, prediction: str, alpha: Coefficient, sigma: Coefficient, gamma: float = 5.0) -> Tensor:
    """The factor on the squared error of the network's output; of alpha's shape, finite at alpha = 0 and at sigma = 0.

    `uniform` is 1. `min_snr` weighs the error of x0 by min(SNR, gamma), SNR = alpha^2 / sigma^2 (Hang et al.
    2303.09556, sec. 3.4); for another prediction that is min(SNR, gamma) * (d x0 / d output)^2, by `denoised`.
    Raises ValueError for a `weighting` not in WEIGHTINGS or a `prediction` not in PREDICTIONS.
    """
    if weighting not in WEIGHTINGS:
        raise unknown("weighting", weighting, WEIGHTINGS)
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    alpha, sigma = torch.as_tensor(alpha), torch.as_tensor(sigma)
    return torch.ones_like(alpha) if weighting == "uniform" else _min_snr(prediction, alpha, sigma, gamma)


def unit_time(density: str, u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times in (0, 1), larger being noisier, of the given density: its inverse CDF at uniform `u` in (0, 1).

    `logit_normal` is sigmoid(mean + std * normal) (Esser et al. 2403.03206, eq. 19). Raises ValueError for a `density`
    not in DENSITIES.
    """
    match density:
        case "uniform":
            return u
        case "logit_normal":
            return torch.sigmoid(mean + std * torch.special.ndtri(u))
    raise unknown("density", density, DENSITIES)


def _min_snr(prediction: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    snr = (alpha / sigma) ** 2  # 0 for pure noise, infinite for clean data
    capped = snr.clamp(max=gamma)
    match prediction:
        case "epsilon":  # (d x0 / d eps)^2 = 1 / SNR
            return (gamma / snr).clamp(max=1)
        case "v_prediction":
            return capped * (sigma / (alpha**2 + sigma**2)) ** 2
        case "flow":
            return capped * (sigma / (alpha + sigma)) ** 2
    return capped


def _inverse_or_zero(alpha: Coefficient) -> Coefficient:
    if isinstance(alpha, Tensor):
        return alpha.reciprocal().masked_fill(alpha == 0, 0)
    return 1 / alpha if alpha else 0.0
