"""A few-step student: one step of it goes as far as several guided steps of its teacher.

Progressive distillation (Salimans & Ho 2202.00512, algorithm 2) in one go and with the guidance inside (Meng et al.
2210.03142). From a picture under noise the teacher walks several steps of DDIM with classifier-free guidance, and the
student learns the estimate of x0 with which a single step lands where the teacher did. It then draws in ``steps``
evaluations, where the teacher took 2 * steps * teacher_steps.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import objectives
from diffusion.data.dataset import Batch
from diffusion.models import text
from diffusion.models.denoiser import predict
from diffusion.models.folder import Model
from diffusion.schedules import NoiseSchedule, levels
from diffusion.schema import Distill
from diffusion.tasks.task import mean_of_each


class Ladder:
    """The levels of a grid as tensors, so that every sample of a batch may be at a step of its own."""

    def __init__(self, schedule: NoiseSchedule, steps: int, device: torch.device) -> None:
        found = levels(schedule, steps)
        times = [schedule.time_of(level) for level in found[:-1]]
        table = [[*times, 0.0], [level.alpha for level in found], [level.sigma for level in found]]
        self.times, self.alphas, self.sigmas = torch.tensor(table, dtype=torch.float32, device=device)

    def at(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Network time ``(B,)``, and alpha and sigma ``(B, 1, 1, 1)``, at the places ``(B,)``."""
        shape = (-1, 1, 1, 1)
        return self.times[place], self.alphas[place].view(shape), self.sigmas[place].view(shape)


class DistillationLoss(nn.Module):
    """The squared error of the student's estimate of x0 against the one that the teacher's steps stand for."""

    def __init__(self, model: Model, teacher: Any, settings: Distill) -> None:
        super().__init__()
        self.unet, self.prediction, self.settings = model.unet, model.prediction, settings
        self.text_encoder, self.text_encoder_2 = model.text_encoder, model.text_encoder_2
        self.teacher = [teacher]  # in a list: it is none of the modules that are trained and saved
        self.parts = model
        steps = settings.steps * settings.teacher_steps
        if model.schedule.num_timesteps % steps:
            raise ValueError(
                f"loss.distill: {settings.steps} x {settings.teacher_steps} steps do not divide the model's "
                f"{model.schedule.num_timesteps} noise levels, so the student's would not be among the teacher's"
            )
        self.ladder = Ladder(model.schedule, steps, next(model.unet.parameters()).device)

    def forward(self, batch: Batch) -> Tensor:
        # a picture at the noise of one of the student's steps
        each, x0 = self.settings.teacher_steps, batch["latents"]
        start = (batch["u"] * self.settings.steps).floor().clamp(max=self.settings.steps - 1).long() * each
        t, alpha, sigma = self.ladder.at(start)
        x = alpha * x0 + sigma * batch["noise"]
        wanted = batch if "context" in batch else batch | text.encode(self.parts, batch)

        # where the teacher gets to from there, and the estimate of x0 with which one step gets there too:
        # x_end = a x + b D with a = sigma_end / sigma, b = alpha_end - a alpha
        end = self._walk(x, start, wanted)
        _, alpha_end, sigma_end = self.ladder.at(start + each)
        a = sigma_end / sigma
        target = (end - a * x) / (alpha_end - a * alpha)

        # the student's
        output = predict(self.unet, x.contiguous(memory_format=torch.channels_last), t, wanted).to(x.dtype)
        return mean_of_each((objectives.denoised(self.prediction, output, x, alpha, sigma) - target).square())

    @torch.no_grad()
    def _walk(self, x: Tensor, start: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
        """DDIM with guidance, ``teacher_steps`` steps from each sample's own place."""
        both = _doubled(wanted, self._unwanted(wanted))
        for step in range(self.settings.teacher_steps):
            t, alpha, sigma = self.ladder.at(start + step)
            _, alpha_end, sigma_end = self.ladder.at(start + step + 1)
            twice = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
            output = predict(self.teacher[0], twice, torch.cat([t, t]), both).to(x.dtype)
            without, within = objectives.denoised(
                self.prediction, output, twice, torch.cat([alpha, alpha]), torch.cat([sigma, sigma])
            ).chunk(2)
            denoised = without + self._guidance(alpha, sigma) * (within - without)
            eps_share = sigma_end / sigma
            x = eps_share * x + (alpha_end - eps_share * alpha) * denoised
        return x

    def _guidance(self, alpha: Tensor, sigma: Tensor) -> Tensor | float:
        """The teacher's scale at the level of each sample, ``(B, 1, 1, 1)``: 1 outside of its interval."""
        if self.settings.interval is None:
            return self.settings.guidance
        low, high = self.settings.interval
        inside = (low * alpha < sigma) & (sigma <= high * alpha)
        return torch.where(inside, self.settings.guidance, 1.0)

    def _unwanted(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of the empty prompt, as often as there are samples."""
        count = len(wanted["context"])
        empty = text.encode(self.parts, text.tokenize(self.parts, [""]))
        found = {name: value.expand(count, *value.shape[1:]) for name, value in empty.items()}
        return found | ({"sizes": wanted["sizes"]} if "sizes" in wanted else {})


def frozen_copy(unet: nn.Module) -> nn.Module:
    """The teacher: the network as it is now."""
    return copy.deepcopy(unet).requires_grad_(False).eval()


def _doubled(wanted: Mapping[str, Tensor], unwanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both conditions in one batch, the unwanted ones first."""
    return {name: torch.cat([unwanted[name], wanted[name]]) for name in unwanted}
