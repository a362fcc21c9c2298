"""Cheap previews: the colour of a latent cell as a linear function of its channels, instead of a whole decoder."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.models.networks import finite, spatial_factor, to_images, to_latents

CELLS = 16  # colours along a side of a picture to fit on


@torch.inference_mode()
def fit(vae: Any, pictures: Tensor | None = None) -> list[list[float]]:
    """The ``(C + 1, 3)`` matrix from latents, and a one, to RGB in [-1, 1]: least squares over latent cells.

    ``pictures`` ``(B, 3, H, W)`` in [-1, 1]; without any, pictures of random smooth colours, the same ones each time.
    AutoencoderNotFinite if the autoencoder cannot encode them.
    """
    factor = spatial_factor(vae)
    if pictures is None:
        generator = torch.Generator().manual_seed(0)
        colours = torch.rand(8, 3, CELLS // 2, CELLS // 2, generator=generator) * 2 - 1
        pictures = torch.nn.functional.interpolate(colours, size=(CELLS * factor, CELLS * factor), mode="bicubic")
    pixels = pictures.clamp(-1, 1).to(vae.device, vae.dtype)
    latents = torch.cat([finite(to_latents(vae, one)[0]) for one in pixels.split(8)]).float().cpu()
    means = torch.nn.functional.avg_pool2d(pixels.float().cpu(), factor)
    inputs = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    colours = means.permute(0, 2, 3, 1).reshape(-1, 3).double()
    return [[round(value, 4) for value in row] for row in torch.linalg.lstsq(inputs, colours).solution.tolist()]


def draw(latents: Tensor, matrix: list[list[float]], factor: int) -> list[Image.Image]:
    """Pictures of latents ``(B, C, h, w)``, enlarged to the size that they stand for."""
    weights = torch.tensor(matrix, dtype=torch.float32)
    colours = torch.einsum("bchw,cr->brhw", latents.float().cpu(), weights[:-1]) + weights[-1].view(1, 3, 1, 1)
    size = latents.shape[3] * factor, latents.shape[2] * factor
    return [image.resize(size, Image.Resampling.BICUBIC) for image in to_images(colours)]
