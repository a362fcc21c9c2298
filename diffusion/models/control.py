"""ControlNets (Zhang et al. 2302.05543): a picture, of edges or depth or poses, leads the U-Net."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.models.folder import Model
from diffusion.models.stock import bare_packages

with bare_packages():
    from diffusers.models.controlnets.controlnet import ControlNetModel

FAMILY = ("in_channels", "cross_attention_dim", "block_out_channels")  # what it has in common with its U-Net


@dataclass(frozen=True)
class Control:
    """A ControlNet, and where it comes from."""

    net: ControlNetModel
    path: Path


def load_control(path: str | Path, model: Model, device: torch.device, dtype: torch.dtype) -> Control:
    """A stock ``ControlNetModel`` folder. ValueError if it is none, or does not belong to the model."""
    path = Path(path)
    outline_control(path, model)
    try:
        net = ControlNetModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a ControlNet ({str(error).splitlines()[0]})") from None
    return Control(net.to(device).eval(), path)


def outline_control(path: str | Path, model: Model) -> Control:
    """The same without its weights, on the meta device. ValueError if it is none, or does not belong to the model."""
    path = Path(path)
    config = _config(path)
    if not [*path.glob("diffusion_pytorch_model*.safetensors")]:
        raise ValueError(f"{path} has no weights: there is no diffusion_pytorch_model.safetensors")
    try:
        with torch.device("meta"):
            net = ControlNetModel.from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a ControlNet ({str(error).splitlines()[0]})") from None
    for name in FAMILY:
        theirs, ours = (_plain(part.config[name]) for part in (net, model.unet))
        if theirs != ours:
            raise ValueError(f"{path}: made for a model whose {name} is {theirs}, and not {ours} as in {model.path}")
    factor = 2 ** (len(net.config["conditioning_embedding_out_channels"]) - 1)
    if factor != model.factor:
        raise ValueError(
            f"{path}: reads pictures {factor} times as large as latents, and those of {model.path} are "
            f"{model.factor} times as large"
        )
    return Control(net, path)


def _config(path: Path) -> dict[str, Any]:
    """What a folder says of itself. ValueError if that is no ControlNet."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a ControlNet folder: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read ({error})") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "ControlNetModel":
        raise ValueError(f"{path} is not a ControlNet: its config.json describes {kind or 'something else'}")
    return config


class Controlled:
    """A U-Net that a ControlNet leads, called like the U-Net itself.

    ``image`` ``(B, 3, H, W)`` in [0, 1]; under guidance the same pictures serve both halves of a batch.
    """

    def __init__(self, unet: Any, net: Any, image: Tensor, scale: float) -> None:
        self.unet, self.net, self.scale = unet, net, scale
        self.image = image.to(unet.device, net.dtype)
        self.parameters = unet.parameters

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        image = self.image.repeat(len(x) // len(self.image), 1, 1, 1)
        down, middle = self.net(x, t, controlnet_cond=image, conditioning_scale=self.scale, **condition)
        return self.unet(x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle, **condition)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
