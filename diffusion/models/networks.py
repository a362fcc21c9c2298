"""Build the networks from plain keyword arguments, and put an autoencoder's latents on the unit scale."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion.models.stock import AutoencoderKL, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel


class NotFinite(FloatingPointError):
    """A network put out numbers that are not finite; ``which``: for each picture of a batch whether it did."""

    def __init__(self, message: str, which: Sequence[bool] = ()) -> None:
        super().__init__(message)
        self.which = which


class AutoencoderNotFinite(NotFinite):
    """An autoencoder did."""


class UNetNotFinite(NotFinite):
    """A U-Net did, or what leads it."""


def build_autoencoder(arguments: dict[str, Any]) -> AutoencoderKL:
    """A new ``AutoencoderKL``: pictures ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, H/f, W/f)``."""
    return _build(AutoencoderKL, arguments)


def build_unet(arguments: dict[str, Any]) -> UNet2DConditionModel:
    """A new ``UNet2DConditionModel``."""
    return _build(UNet2DConditionModel, arguments)


def build_text_encoder(arguments: dict[str, Any], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A new CLIP text encoder that fits the tokenizer: vocabulary, length and marker tokens are taken from it."""
    fitted = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(_build(CLIPTextConfig, {**fitted, **arguments}))


def unsharded(network: Any) -> Any:
    """The network itself, or a whole copy of it on the CPU if it is sharded: on the first process, else None.

    All processes call this together.
    """
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    weights = {name: _whole(tensor).cpu() for name, tensor in network.state_dict().items()}
    if dist.get_rank() != 0:
        return None
    copy = (
        type(network).from_config(network.config) if hasattr(network, "from_config") else type(network)(network.config)
    )
    copy.load_state_dict(weights)
    return copy.eval()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_weight(network: Any) -> Tensor:
    """Tells device and dtype; the stock classes look through all of their layers for that, a millisecond each time."""
    return next(iter(network.parameters()))


def spatial_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C, h, w)`` of the posterior of pixels ``(B, 3, H, W)``."""
    weight = first_weight(vae)
    posterior = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist
    return posterior.mean, posterior.std


def to_latents(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels ``(B, 3, H, W)`` on the scale that the U-Net sees, float32.

    Outside of any autocast: what is encoded at every visit equals what is encoded once and kept.
    """
    with torch.autocast(vae.device.type, enabled=False):
        mean, std = encode_pixels(vae, pixels)
    shift = vae.config.shift_factor
    scale = vae.config.scaling_factor
    return (mean.float() - (0.0 if shift is None else shift)) * scale, std.float() * scale


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Pictures from latents ``(B, C, h, w)`` as the U-Net sees them. AutoencoderNotFinite if there are none."""
    shift = vae.config.shift_factor
    dtype, raw = first_weight(vae).dtype, latents / vae.config.scaling_factor + (0.0 if shift is None else shift)
    pixels = torch.cat([vae.decode(one.to(dtype)).sample for one in raw.split(1)])
    return to_images(finite(pixels))


def encode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> Tensor:
    """The mean of the posterior of RGB pictures of one size, ``(B, C, h, w)`` as the U-Net sees it, one by one.

    AutoencoderNotFinite if there is none.
    """
    return torch.cat([finite(to_latents(vae, to_pixels([image]))[0]) for image in images])


def finite(values: Tensor) -> Tensor:
    """What an autoencoder has put out. AutoencoderNotFinite if there are infinities or NaN in it."""
    if not torch.isfinite(values).all():
        raise AutoencoderNotFinite("the autoencoder put out numbers that are not finite")
    return values


@contextmanager
def tiled(vae: AutoencoderKL, tile: int | None) -> Iterator[None]:
    """Within the block an autoencoder works in tiles of so many pixels, a quarter of which overlap and fade.

    Memory is then that of a tile. Normalisation sees a tile and not the picture, so colours drift a little between
    them. ``tile`` is a multiple of four latent cells; None: it works as it does.
    """
    if tile is None:
        yield
        return
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")
    before = {name: getattr(vae, name) for name in names}
    for name, value in zip(names, (True, tile, tile // spatial_factor(vae), 0.25), strict=True):
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as ``(B, 3, H, W)`` in [-1, 1]."""
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """``(B, 3, H, W)`` in [-1, 1] to pictures."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def wrapped_edges(networks: Iterable[nn.Module], axes: str) -> Iterator[None]:
    """Within the block, beyond an edge of the axes ``x`` and ``y`` convolutions see the opposite one: pictures tile."""
    every = (layer for network in networks for layer in network.modules()) if axes else ()
    layers = [layer for layer in every if isinstance(layer, nn.Conv2d)]
    padded = [layer for layer in layers if any(layer.padding) and not isinstance(layer.padding, str)]
    before = [(layer, layer.padding, layer.register_forward_pre_hook(_wrap(layer.padding, axes))) for layer in padded]
    for layer in padded:
        layer.padding = (0, 0)
    try:
        yield
    finally:
        for layer, padding, hook in before:
            layer.padding = padding
            hook.remove()


def _wrap(padding: Sequence[Any], axes: str) -> Callable[[Any, tuple[Tensor]], Tensor]:
    """What a convolution is given in place of its input, so that it need not pad."""
    down, across = padding

    def wrap(_: Any, given: tuple[Tensor]) -> Tensor:
        (x,) = given
        for axis, pad in (("x", (across, across, 0, 0)), ("y", (0, 0, down, down))):
            x = nn.functional.pad(x, pad, mode="circular" if axis in axes else "constant")
        return x

    return wrap


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold ``(z - mean) / std`` per latent channel, shape ``(C,)`` each, into the convolutions around the latents.

    The round trip is unchanged, and one ``scaling_factor`` of 1 is all that a stock pipeline has to know.
    ``quant_conv`` puts out C means and C log-variances; ``post_quant_conv`` takes the latent back.
    """
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a channel that says nothing stays as it is
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)


def _build(cls: type, arguments: dict[str, Any]) -> Any:
    """``cls(**arguments)``, where an unknown argument is a ``ValueError`` with a suggestion, not ignored."""
    known = set(inspect.signature(cls).parameters) | set(getattr(cls, "__dataclass_fields__", ()))
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            raise ValueError(
                f"{cls.__name__} has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return cls(**arguments)
