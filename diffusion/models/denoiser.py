"""The one place where a network with a prediction type becomes a denoiser."""

from typing import Any

import torch
from torch import Tensor

from diffusion import objectives
from diffusion.samplers import Denoise
from diffusion.schedules import Level, NoiseSchedule


def network_denoiser(unet: Any, schedule: NoiseSchedule, prediction: str, context: Tensor) -> Denoise:
    """``denoise(x, level) -> denoised`` for a U-Net and a context ``(B, L, D)``; x is ``(B, C, H, W)``.

    The network runs in its own dtype; x and the estimate stay in the dtype of x.
    """
    dtype = next(unet.parameters()).dtype
    context = context.to(dtype)

    @torch.inference_mode()
    def denoise(x: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x),), schedule.time_of(level), device=x.device)
        output = unet(x.to(dtype), t, encoder_hidden_states=context, return_dict=False)[0]
        return objectives.denoised(prediction, output.to(x.dtype), x, level.alpha, level.sigma)

    return denoise
