"""ControlNets (Zhang et al. 2302.05543): a picture, of edges or depth or poses, leads the U-Net."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.models.folder import Model
from diffusion.models.stock import bare_packages

with bare_packages():
    from diffusers.models.controlnets.controlnet import ControlNetModel


def load_control(path: str | Path, model: Model, device: torch.device, dtype: torch.dtype) -> ControlNetModel:
    """A stock ``ControlNetModel`` folder. ValueError if it is none, or was made for another family of models."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a ControlNet folder: it has no config.json")
    try:
        net = ControlNetModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a ControlNet ({str(error).splitlines()[0]})") from None
    for name in ("in_channels", "cross_attention_dim", "block_out_channels"):
        theirs, ours = (_plain(part.config[name]) for part in (net, model.unet))
        if theirs != ours:
            raise ValueError(f"{path}: made for a model whose {name} is {theirs}, and not {ours} as in {model.path}")
    return net.to(device).eval()


class Controlled:
    """A U-Net that a ControlNet leads, called like the U-Net itself.

    ``image`` ``(B, 3, H, W)`` in [0, 1]; under guidance the same pictures serve both halves of a batch.
    """

    def __init__(self, unet: Any, net: Any, image: Tensor, scale: float) -> None:
        self.unet, self.net, self.scale = unet, net, scale
        self.image = image.to(unet.device, net.dtype)
        self.device, self.dtype = unet.device, unet.dtype

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        image = self.image.repeat(len(x) // len(self.image), 1, 1, 1)
        down, middle = self.net(x, t, controlnet_cond=image, conditioning_scale=self.scale, **condition)
        return self.unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle, **condition)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
