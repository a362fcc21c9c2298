"""Low-rank adapters (LoRA, Hu et al. 2106.09685; DoRA, Liu et al. 2402.09353): put on, saved, read and merged.

Training puts ``peft``'s layers into a network. Drawing merges what a file holds into the weights, so it costs nothing.
Files are read in diffusers' and in kohya's names, which for XL are those of the original format; a key that finds no
layer is an error, never ignored.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for it in a folder
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]
TARGETS = {"attention": ATTENTION, "all": EVERYTHING}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
DOWN = ("lora_A.weight", "lora.down.weight", "lora_down.weight", "lora_linear_layer.down.weight")
UP = ("lora_B.weight", "lora.up.weight", "lora_up.weight", "lora_linear_layer.up.weight")
MAGNITUDE = ("lora_magnitude_vector.weight", "lora_magnitude_vector", "dora_scale")
SUFFIXES = {suffix: part for part, names in (("down", DOWN), ("up", UP), ("magnitude", MAGNITUDE)) for suffix in names}
KOHYA = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
}  # lora_te1_ where there are two
ORIGINAL = re.compile("lora_unet_(input_blocks|middle_block|output_blocks)_")  # the U-Net of XL, as sd-scripts has it


def add(network: nn.Module, targets: list[str], rank: int, alpha: float, dora: bool = False) -> list[str]:
    """Put trainable float32 adapters on the ``targets`` of a network, which begin as no change at all.

    Returns the names of the layers; ValueError if there is none.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and drawing does without
    from peft.tuners.lora import LoraLayer

    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=dora, init_lora_weights=True)
    inject_adapter_in_model(settings, network)
    names = [name for name, layer in network.named_modules() if isinstance(layer, LoraLayer)]
    if not names:
        raise ValueError(f"model.lora: {type(network).__name__} has no layer named {', '.join(targets)}")
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # in half precision their gradients vanish
            parameter.requires_grad_(True)
    return names


@dataclass
class Delta:
    """What an adapter does to one layer: ``weight + alpha / rank * up @ down``, with DoRA new lengths."""

    down: Tensor | None = None  # (rank, in) or, of a convolution, (rank, in, h, w)
    up: Tensor | None = None  # (out, rank) or (out, rank, 1, 1)
    alpha: float | None = None
    magnitude: Tensor | None = None  # (out,)

    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """The layer's weight with the adapter, computed in float32; at strength 0 the weight as it is."""
        if strength == 0:
            return weight
        assert self.down is not None and self.up is not None  # noqa: PT018 - read() has checked it
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        change = (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(weight.shape) * scale
        exact = weight.float()
        if self.magnitude is None:
            return (exact + strength * change.to(exact.device)).to(weight.dtype)
        turned = exact + change.to(exact.device)
        lengths = turned.flatten(1).norm(dim=1)
        gain = (self.magnitude.float().flatten().to(exact.device) / lengths).view(-1, *[1] * (weight.ndim - 1))
        return (exact + strength * (gain * turned - exact)).to(weight.dtype)


@dataclass
class Lora:
    """A file taken apart: of each network the changes by the names of its layers."""

    path: Path
    networks: dict[str, dict[str, Delta]] = field(default_factory=dict)
    keys: int = 0

    @property
    def report(self) -> str:
        """How much of the file has found its place: all of it, or ``read`` would have refused it."""
        parts = ", ".join(f"{len(layers)} layers of {name}" for name, layers in self.networks.items())
        return f"{self.keys} of {self.keys} keys, {parts}"

    def merge(self, networks: Mapping[str, nn.Module], strength: float) -> None:
        """Merge it into the weights of the networks, in place."""
        deltas = (delta for layers in self.networks.values() for delta in layers.values())
        with torch.no_grad():
            for weight, delta in zip(self.weights(networks), deltas, strict=True):
                weight.copy_(delta.merged(weight, strength))

    def weights(self, networks: Mapping[str, nn.Module]) -> list[Tensor]:
        """The weights that it changes, in its own order."""
        layers = {name: dict(networks[name].named_modules()) for name in self.networks}
        return [getattr(layers[name][layer], "weight") for name, deltas in self.networks.items() for layer in deltas]  # noqa: B009


def save(networks: Mapping[str, nn.Module], folder: Path, kohya: bool = False) -> None:
    """Write the adapters of the networks that have any, in diffusers' format, and on request in kohya's beside it.

    ``alpha`` of every layer is written as a tensor and, for diffusers, in the file's header.
    """
    adapters = {name: _adapters(network) for name, network in networks.items()}
    adapters = {name: found for name, found in adapters.items() if found}
    folder.mkdir(parents=True, exist_ok=True)
    _write(_stock(adapters), folder / FILE, _header(adapters))
    if kohya:
        file = folder / FILE.replace("pytorch_lora_weights", "kohya")
        _write(_kohya(adapters, networks), file, {"format": "pt"})


def rewrite(
    lora: Lora, networks: Mapping[str, nn.Module], file: Path, kohya: bool, dtype: torch.dtype | None = None
) -> None:
    """Write what was read for these networks in kohya's names, or in diffusers'; ``dtype`` None keeps the numbers."""
    adapters = {
        network: {layer: _parts(delta, dtype) for layer, delta in deltas.items()}
        for network, deltas in lora.networks.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    if kohya:
        _write(_kohya(adapters, networks), file, {"format": "pt"})
    else:
        _write(_stock(adapters), file, _header(adapters))


def read(path: Path, networks: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA file, or the one in a folder, for these networks. ValueError if a key or a shape does not fit."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no LoRA there; give a .safetensors file, or a folder that holds {FILE}")
    try:
        with safe_open(file, "pt") as stored:
            header = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None
    lora = Lora(path, keys=len(tensors))
    layers = {name: _names(network, name, tensors) for name, network in networks.items()}
    unknown = []
    for key, tensor in tensors.items():
        found = _place(key, layers)
        if found is None:
            unknown.append(key)
            continue
        network, layer, part = found
        delta = lora.networks.setdefault(network, {}).setdefault(layer, Delta())
        setattr(delta, part, float(tensor) if part == "alpha" else tensor)
    if unknown:
        raise ValueError(
            f"{file}: {len(unknown)} of {len(tensors)} keys fit no layer of this model, first {unknown[0]}: it was "
            "made for another family of models"
        )
    _check(lora, file, networks, header)
    return lora


# --- names ------------------------------------------------------------------------------------------------------------


def _names(network: Any, name: str, written: Iterable[str]) -> dict[str, str]:
    """Every way that a layer of a network may be written, in a file of such keys -> its name there."""
    found: dict[str, str] = {}
    theirs = _original_names(network) if name == "unet" and any(map(ORIGINAL.match, written)) else {}
    prefixes = [f"{name}.", f"{name}.base_model.model.", f"{name}.text_model."]
    kohya = [KOHYA[name], *(["lora_te1_"] if name == "text_encoder" else [])]
    for layer, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            plain = layer.removesuffix(".base_layer")
            flat = plain.replace(".", "_")
            ways = [prefix + plain for prefix in prefixes] + [prefix + flat for prefix in kohya]
            ways += [KOHYA[name] + theirs[plain]] if plain in theirs else []
            found |= dict.fromkeys([*ways, *(f"{prefix}text_model_{flat}" for prefix in kohya)], plain)
    return found


def _original_names(unet: Any) -> dict[str, str]:
    """Layers of a U-Net by the names that sd-scripts gives them for XL, which are those of the original format."""
    from diffusion.models.original import unet_key  # slow to import

    found = {}
    for layer, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            plain = layer.removesuffix(".base_layer")
            try:
                key = unet_key(f"{plain}.weight", unet)
            except ValueError:  # a layer that the original format does not have
                continue
            found[plain] = key.removesuffix(".weight").replace(".", "_")
    return found


def _place(key: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """``unet.mid_block.x.lora_A.weight`` as (network, layer, part)."""
    for suffix, part in (*SUFFIXES.items(), ("alpha", "alpha")):
        if key.endswith(f".{suffix}"):
            written = key.removesuffix(f".{suffix}")
            for network, names in layers.items():
                if written in names:
                    return network, names[written], part
    return None


def _check(lora: Lora, file: Path, networks: Mapping[str, nn.Module], header: Mapping[str, Any]) -> None:
    """Fill in what the header says of alpha, and see that every shape fits its layer."""
    if not lora.networks:
        raise ValueError(f"{file} holds no LoRA: none of its {lora.keys} keys is one")
    for network, deltas in lora.networks.items():
        modules = dict(networks[network].named_modules())
        patterns = header.get(f"{network}.alpha_pattern") or {}
        for layer, delta in deltas.items():
            if delta.down is None or delta.up is None:
                raise ValueError(f"{file}: {network} {layer} has only half of its adapter")
            if delta.alpha is None:
                delta.alpha = patterns.get(layer, header.get(f"{network}.lora_alpha"))
            shape = getattr(modules[layer], "weight").shape  # noqa: B009 - typed as Tensor | Module
            if delta.up.shape[0] * delta.down[0].numel() != shape.numel() or delta.up.shape[1] != delta.down.shape[0]:
                raise ValueError(
                    f"{file}: {network} {layer} is {tuple(delta.up.shape)} x {tuple(delta.down.shape)}, which does not "
                    f"fit {tuple(shape)}: it was made for another family of models"
                )


# --- writing ----------------------------------------------------------------------------------------------------------


def _adapters(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Of every layer with an adapter its tensors, ``alpha`` among them."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            parts = {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
            if "default" in layer.lora_magnitude_vector:
                parts["magnitude"] = layer.lora_magnitude_vector["default"].weight
            parts["alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
            found[name] = {part: tensor.detach().float().cpu().contiguous() for part, tensor in parts.items()}
    return found


def _parts(delta: Delta, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one layer. Without an alpha the change counts as it is, which is an alpha equal to the rank."""
    assert delta.down is not None and delta.up is not None  # noqa: PT018 - read() has checked it
    parts = {"down": delta.down, "up": delta.up}
    parts |= {} if delta.magnitude is None else {"magnitude": delta.magnitude}
    found = {part: tensor.to(dtype or tensor.dtype).contiguous() for part, tensor in parts.items()}
    return found | {"alpha": torch.tensor(float(len(delta.down) if delta.alpha is None else delta.alpha))}


def _header(adapters: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, str]:
    """What diffusers reads rank, alpha and layers from: a ``LoraConfig`` for each network."""
    header: dict[str, Any] = {}
    for name, layers in adapters.items():
        ranks = {layer: len(parts["down"]) for layer, parts in layers.items()}
        alphas = {layer: parts["alpha"].item() for layer, parts in layers.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        facts = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
        facts |= {"use_dora": any("magnitude" in parts for parts in layers.values())}
        others = {"rank_pattern": _others(ranks, rank), "alpha_pattern": _others(alphas, alpha)}
        header |= {f"{name}.{key}": value for key, value in (facts | {k: v for k, v in others.items() if v}).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(header, sort_keys=True)}


def _others(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The layers whose rank or alpha is not the usual one."""
    return {layer: value for layer, value in values.items() if value != usual}


def _stock(adapters: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    names = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    return {
        f"{network}.{layer}.{names[part]}": tensor
        for network, layers in adapters.items()
        for layer, parts in layers.items()
        for part, tensor in parts.items()
        if part != "alpha"
    }


def _kohya(
    adapters: Mapping[str, Mapping[str, Mapping[str, Tensor]]], networks: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """In kohya's names. For XL, where there are two text encoders, the first and the U-Net have others than for 1.x."""
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", "alpha": "alpha"}
    two = "text_encoder_2" in networks
    theirs = _original_names(networks["unet"]) if two else {}
    found: dict[str, Tensor] = {}
    for network, layers in adapters.items():
        prefix = "lora_te1_" if two and network == "text_encoder" else KOHYA[network]
        prefix += "text_model_" if network != "unet" else ""
        for layer, parts in layers.items():
            flat = layer.removeprefix("text_model.").replace(".", "_")
            written = theirs.get(layer, flat) if network == "unet" else flat
            found |= {f"{prefix}{written}.{names[part]}": tensor for part, tensor in parts.items()}
    return found


def _write(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str]) -> None:
    part = file.with_name(f".{file.name}.part")
    save_file(dict(tensors), part, metadata=header)
    part.chmod(0o644)
    part.replace(file)
