"""From a name to a model in memory: where it is, how it is read, on which device, in which precision, and its hash."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion.models.folder import Model, check_channels, load_model
from diffusion.models.networks import first_weight
from diffusion.models.packing import pack
from diffusion.names import check_device, resolve_dtype
from diffusion.places import base_of, find_model, hash_files, is_hub_id, weight_files
from diffusion.precision import fast_dtype

SMALL = 100_000_000  # weights of a U-Net; Stable Diffusion's has 860 million


def locate(path: str | Path, *, offline: bool = False) -> Path:
    """Where a model is: a folder, a shipped model, one file, or a Hub id in the cache or, if need be, on the Hub."""
    try:
        return find_model(path)
    except ValueError:
        if not is_hub_id(path):
            raise
    from diffusion.models.hub import find_on_hub  # slow to import

    return find_model(find_on_hub(str(path), offline))


def read_model(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: str | None = None,
) -> Model:
    """Read a model folder or a single file. ValueError if it does not hold a model that draws.

    ``prediction`` (epsilon, v_prediction) overrules what the model says, or does not say, that its U-Net puts out.
    """
    if path.is_file():
        from diffusion.interop import load_single_file  # slow to import

        model = load_single_file(path, device, dtype, prediction)
    else:
        model = load_model(path, device, dtype)
        if prediction is not None:
            model.forward = replace(model.forward, prediction=prediction)
    check_channels(model, path)
    hasten(model)
    return model


def hasten(model: Model) -> None:
    """Memory layouts that kernels are fast at; pixels stay what they were, but for rounding in float32."""
    for network in (model.unet, model.vae):
        lay_out(network)
    for layer in model.vae.modules():  # in place, on what a norm has just made; a U-Net's would change its shared times
        if isinstance(layer, torch.nn.SiLU):
            layer.inplace = True


def lay_out(network: Any) -> None:
    """The layout of memory that its convolutions are fast in, and on the CPU its weights as the kernels read them."""
    network.to(memory_format=torch.channels_last)
    if first_weight(network).device.type == "cpu":
        pack(network)


def compile_network(model: Model) -> None:
    """Draw with a compiled U-Net from now on; its weights must not change afterwards."""
    from diffusion.models.compiled import Compiled  # slow to import

    model.compiled = Compiled(model.unet)


def offload(model: Model, control: torch.nn.Module | None, device: torch.device) -> None:
    """Keep on the device only the network that is at work, a ControlNet's too. ValueError where that gains nothing."""
    if device.type == "cpu":
        raise ValueError("offload moves networks to a GPU and back, and the device is the CPU: leave it out")
    if model.compiled is not None:
        raise ValueError("offload moves networks, and a compiled one stays where it is: leave out offload or compile")
    from diffusion.models.offload import Offload

    networks = [*model.networks.values(), *([] if control is None else [control])]
    if model.device.type != "meta":
        model.offload = Offload(networks, device)


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the fastest one present for None and "auto"; ValueError for one this machine lacks."""
    check_device(name)
    present = [kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name is None or name == "auto":
        return torch.device(present[0])
    if torch.device(name).type not in present:
        raise ValueError(f"device {name!r} is not present on this machine: it has {', '.join(present)}")
    return torch.device(name)


def choose_dtype(name: str | torch.dtype | None, device: torch.device, weights: int = 0) -> torch.dtype:
    """The named dtype; by default what the device is fast at, and float32 for a U-Net of few ``weights`` on a CPU.

    A small network takes no longer in float32 than its libraries take to import, and float32 draws the same picture on
    every machine, in every batch.
    """
    if isinstance(name, torch.dtype):
        return name
    found = resolve_dtype(name, device.type)
    if found is not None:
        return getattr(torch, found)
    return torch.float32 if device.type == "cpu" and weights < SMALL else fast_dtype(device)


def count_weights(path: Path) -> int:
    """Of a model's U-Net, or of all of a single file, by the size of its files: two bytes a weight at least."""
    folder = base_of(path) or path
    files = [folder] if folder.is_file() else list((folder / "unet").glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) // 2


def hash_of(model: Model) -> str:
    """Ten hexadecimal digits of the SHA-256 of the model's weight files, or of the U-Net where it has none."""
    files = weight_files(model.path) if model.path else []
    if files:
        return hash_files(files)
    digest = hashlib.sha256()
    for weight in model.unet.state_dict().values():
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]
