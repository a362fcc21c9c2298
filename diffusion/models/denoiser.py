"""The one place where a network with a prediction type becomes a denoiser."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion import objectives
from diffusion.models.networks import first_weight
from diffusion.samplers import Denoise
from diffusion.schedules import Level, NoiseSchedule

Condition = Mapping[str, Tensor]  # context (B, L, D); of SDXL also pooled (B, E) and sizes (B, 6)


def predict(unet: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """What a U-Net puts out for x ``(B, C, H, W)`` at its times ``(B,)``."""
    added = None
    if "pooled" in condition:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
    context = condition["context"]
    return unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]


def network_denoiser(unet: Any, schedule: NoiseSchedule, prediction: str, condition: Condition) -> Denoise:
    """``denoise(x, level) -> denoised`` for a U-Net under a condition; x is ``(B, C, H, W)``.

    The network runs in its own dtype; x and the estimate stay in the dtype of x.
    """
    weight = first_weight(unet)
    dtype = weight.dtype
    condition = {name: value.to(weight.device, dtype) for name, value in condition.items()}

    @torch.inference_mode()
    def denoise(x: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x),), schedule.time_of(level), device=x.device)
        output = predict(unet, x.to(dtype), t, condition)
        return objectives.denoised(prediction, output.to(x.dtype), x, level.alpha, level.sigma)

    return denoise
