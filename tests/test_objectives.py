"""The four predictions are one denoiser, the weights are one weight, and neither breaks at the ends."""

import math
from itertools import product

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusion.objectives import DENSITIES, PREDICTIONS, WEIGHTINGS, denoised, loss_weight, target, unit_time

# variance preserving, flow, variance exploding; then clean data and pure noise
LEVELS = [(0.8, 0.6), (0.3, 0.7), (1.0, 5.0), (1.0, 0.0), (0.0, 1.0)]
X0, EPS = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- target and denoised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "level"), [p for p in product(PREDICTIONS, LEVELS) if p != ("epsilon", LEVELS[-1])]
)
def test_every_target_gives_back_x0(prediction: str, level: tuple[float, float]) -> None:
    alpha, sigma = level
    output = target(prediction, X0, EPS, alpha, sigma)
    torch.testing.assert_close(denoised(prediction, output, alpha * X0 + sigma * EPS, alpha, sigma), X0)


@each_prediction
def test_each_sample_of_a_batch_has_its_own_level(prediction: str) -> None:
    alpha, sigma = (
        torch.tensor(column, dtype=torch.float64).view(3, 1, 1, 1) for column in zip(*LEVELS[:3], strict=True)
    )
    x = alpha * X0 + sigma * EPS
    together = denoised(prediction, target(prediction, X0, EPS, alpha, sigma), x, alpha, sigma)
    torch.testing.assert_close(together, X0)


def test_targets_are_their_formulas() -> None:
    x0, eps = f64(2.0), f64(3.0)
    outputs = {prediction: target(prediction, x0, eps, 0.8, 0.6).item() for prediction in PREDICTIONS}
    assert outputs == pytest.approx({"epsilon": 3.0, "v_prediction": 1.2, "sample": 2.0, "flow": 1.0})


def test_v_prediction_is_that_of_diffusers() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    t = torch.tensor([0, 500, 999])
    alpha, sigma = (
        root.sqrt().view(3, 1, 1, 1) for root in (scheduler.alphas_cumprod[t], 1 - scheduler.alphas_cumprod[t])
    )
    x0, eps = X0.float(), EPS.float()
    torch.testing.assert_close(target("v_prediction", x0, eps, alpha, sigma), scheduler.get_velocity(x0, eps, t))


@pytest.mark.parametrize("alpha", [0.0, torch.zeros(3, 1, 1, 1, dtype=torch.float64)], ids=["number", "tensor"])
def test_epsilon_of_pure_noise_says_the_mean_of_the_data(alpha: float | Tensor) -> None:
    assert denoised("epsilon", EPS, EPS, alpha, 1.0).tolist() == torch.zeros_like(EPS).tolist()


# --- loss_weight ------------------------------------------------------------------------------------------------------


@each_prediction
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS[:3])
def test_min_snr_is_the_weight_of_x0_seen_through_the_prediction(prediction: str, alpha: float, sigma: float) -> None:
    def estimate(output: Tensor) -> Tensor:
        return denoised(prediction, output, f64(0.4), alpha, sigma)

    slope = torch.autograd.functional.jacobian(estimate, f64(0.1)).item()
    weight = loss_weight("min_snr", prediction, f64(alpha), f64(sigma), gamma=2.0)
    assert weight.item() == pytest.approx(min((alpha / sigma) ** 2, 2.0) * slope**2)


@pytest.mark.parametrize(("prediction", "offset"), [("epsilon", 0), ("v_prediction", 1)])
def test_trap_10_min_snr_is_right_for_every_prediction(prediction: str, offset: int) -> None:
    scheduler, t = DDPMScheduler(), torch.arange(1000)
    snr = compute_snr(scheduler, t)
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    weight = loss_weight("min_snr", prediction, alpha, sigma, gamma=5.0)
    torch.testing.assert_close(weight, snr.clamp(max=5.0) / (snr + offset), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("prediction", "clean", "noise"),
    [("epsilon", 0, 1), ("v_prediction", 0, 0), ("sample", 5, 0), ("flow", 0, 0)],
)
def test_trap_10_min_snr_is_finite_at_zero_terminal_snr(prediction: str, clean: float, noise: float) -> None:
    weight = loss_weight("min_snr", prediction, f64(1, 0), f64(0, 1), gamma=5.0)
    assert weight.tolist() == [clean, noise]
    near = loss_weight("min_snr", prediction, f64(1, 1e-6), f64(1e-6, 1), gamma=5.0)
    torch.testing.assert_close(weight, near, rtol=0, atol=1e-9)


@each_prediction
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_have_the_shape_of_alpha_and_take_numbers(weighting: str, prediction: str) -> None:
    alpha, sigma = torch.full((3, 1, 1, 1), 0.8), torch.full((3, 1, 1, 1), 0.6)
    weight = loss_weight(weighting, prediction, alpha, sigma)
    assert (weight.shape, weight.dtype) == (alpha.shape, alpha.dtype)
    torch.testing.assert_close(weight[0].squeeze(), loss_weight(weighting, prediction, 0.8, 0.6))


@each_prediction
def test_uniform_weight_is_one_everywhere(prediction: str) -> None:
    assert loss_weight("uniform", prediction, f64(1, 0.5, 0), f64(0, 0.5, 1)).tolist() == [1, 1, 1]


# --- unit_time --------------------------------------------------------------------------------------------------------


def test_logit_normal_inverts_its_cdf() -> None:
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    t = unit_time("logit_normal", u, mean=-0.5, std=1.5)
    cdf = 0.5 * (1 + torch.erf((t.logit() + 0.5) / (1.5 * math.sqrt(2))))
    torch.testing.assert_close(cdf, u, rtol=0, atol=1e-12)
    assert unit_time("logit_normal", f64(0.5)).item() == pytest.approx(0.5)


def test_uniform_time_is_the_identity() -> None:
    u = f64(0.1, 0.9)
    assert unit_time("uniform", u, mean=3.0, std=2.0).tolist() == u.tolist()


@pytest.mark.parametrize("density", DENSITIES)
def test_times_stay_in_order_and_inside(density: str) -> None:
    t = unit_time(density, torch.linspace(1e-6, 1 - 1e-6, 1000, dtype=torch.float64))
    assert (t.diff() > 0).all()
    assert t[0] > 0
    assert t[-1] < 1


# --- mistyped names ---------------------------------------------------------------------------------------------------


def test_mistyped_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown prediction 'v_predicton', .*did you mean 'v_prediction'\?"):
        target("v_predicton", X0, EPS, 0.8, 0.6)
    with pytest.raises(ValueError, match=r"unknown prediction 'epsilom', .*did you mean 'epsilon'\?"):
        denoised("epsilom", EPS, X0, 0.8, 0.6)
    with pytest.raises(ValueError, match=r"unknown weighting 'min-snr', .*did you mean 'min_snr'\?"):
        loss_weight("min-snr", "epsilon", 0.8, 0.6)
    with pytest.raises(
        ValueError, match=r"unknown prediction 'x', must be one of epsilon, v_prediction, sample, flow$"
    ):
        loss_weight("uniform", "x", 0.8, 0.6)
    with pytest.raises(ValueError, match=r"unknown density 'logitnormal', .*did you mean 'logit_normal'\?"):
        unit_time("logitnormal", f64(0.5))
