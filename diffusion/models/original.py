"""The original format of Stable Diffusion 1.x, 2.x and XL: the networks of each family, and the names of their weights.

It is that of CompVis' ``latent-diffusion`` and of Stability's ``generative-models``. Their names are turned into ours
by diffusers' own converters; the way back is written here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from diffusion.models.stock import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PARTS = (UNET, VAE, "cond_stage_model.", "conditioner.embedders.")  # the rest is averages, schedules and losses


@dataclass(frozen=True)
class Family:
    """What the files of one family have in common. ``texts``: where each text encoder's weights are."""

    title: str
    architecture: str  # its name in Stability's ModelSpec
    texts: tuple[str, ...]
    side: int  # pixels
    configs: Mapping[str, Mapping[str, Any]]  # of each network, what differs from its class's own defaults


_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_OPEN_CLIP_H = {  # its last layer of 24 is never asked for, so it is not there
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_UNET_2 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
_UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # six numbers of 256, and 1280 of the second text encoder
}
FAMILIES = {
    "sd1": Family(
        "Stable Diffusion 1.x",
        "stable-diffusion-v1",
        (CLIP,),
        512,
        {
            "unet": {"sample_size": 64, "cross_attention_dim": 768},
            "vae": _VAE | {"sample_size": 512},
            "text_encoder": _CLIP_L,
        },
    ),
    "sd2": Family(
        "Stable Diffusion 2.x",
        "stable-diffusion-v2-768-v",
        (OPEN_CLIP,),
        768,
        {
            "unet": _UNET_2 | {"sample_size": 96, "upcast_attention": True},
            "vae": _VAE | {"sample_size": 768},
            "text_encoder": _OPEN_CLIP_H,
        },
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        "stable-diffusion-xl-v1-base",
        (CLIP_XL, OPEN_CLIP_XL),
        1024,
        {
            "unet": _UNET_XL,
            "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": _CLIP_L,
            "text_encoder_2": _OPEN_CLIP_BIG_G,
        },
    ),
}


# --- which family -----------------------------------------------------------------------------------------------------

_INPUTS = {5: "depth", 7: "upscaling", 8: "InstructPix2Pix", 9: "inpainting"}
_STRANGERS = (  # (what stands in a key, what such a file is), the more telling first
    ("lora", "a LoRA: put it on a model with --lora"),
    ("double_blocks.", "Flux"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("control_model.", "a ControlNet"),
    ("down_blocks.", "one network in diffusers' names, a part of a model folder"),
    ("decoder.conv_in.", "an autoencoder alone"),
    ("text_model.", "a text encoder alone"),
    ("clip_l", "a learnt word: put it on a model with --lora"),
    ("emb_params", "a learnt word: put it on a model with --lora"),
)


def identify(shapes: Mapping[str, Sequence[int]]) -> str:
    """The family of a file, from the names and shapes of its tensors. ValueError says what it is instead."""
    shapes = {_modern(key): shape for key, shape in shapes.items()}
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        found = next((what for part, what in _STRANGERS if any(part in key for key in shapes)), "no model known here")
        raise ValueError(f"this is {found}")
    if first[1] != 4:
        raise ValueError(f"this is a model of {first[1]} input channels ({_INPUTS.get(first[1], 'unknown')}), not 4")
    if any(key.startswith("edm_") for key in shapes):
        raise ValueError("this is a model of another forward process (EDM, as of Playground 2.5 and CosXL)")
    family = next((name for name, one in FAMILIES.items() if _has(shapes, *one.texts)), None)
    if family != "sdxl" and _has(shapes, f"{UNET}label_emb."):
        raise ValueError(
            "this is a model that is told more than a text (the refiner of Stable Diffusion XL, or unCLIP)"
        )
    if family is None:
        raise ValueError("this is a U-Net without its text encoder")
    if not _has(shapes, VAE):
        raise ValueError("this is a U-Net without its autoencoder")
    return family


def family_of(networks: Mapping[str, Any]) -> str:
    """The family that networks of any width are built like. ValueError if there is no original format for them."""
    unet = networks["unet"].config
    added = unet.addition_embed_type
    if "text_encoder_2" in networks and added == "text_time":
        return "sdxl"
    if "text_encoder_2" in networks or added is not None:
        raise ValueError(
            f"Stable Diffusion's original format has no place for addition_embed_type {added!r}: export a folder"
        )
    family = "sd2" if unet.use_linear_projection else "sd1"
    layers = networks["text_encoder"].config.num_hidden_layers
    if family == "sd2" and layers > _OPEN_CLIP_H["num_hidden_layers"]:
        raise ValueError(f"a text encoder of {layers} layers does not fit Stable Diffusion 2's format: export a folder")
    return family


def _has(shapes: Mapping[str, Any], *prefixes: str) -> bool:
    return all(any(key.startswith(prefix) for key in shapes) for prefix in prefixes)


# --- to ours ----------------------------------------------------------------------------------------------------------


def outline(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The networks that configs describe, by the names of their folders, without weights: on the meta device."""
    with torch.device("meta"):
        found = {
            "unet": UNet2DConditionModel.from_config(dict(configs["unet"])),
            "vae": AutoencoderKL.from_config(dict(configs["vae"])),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
        if "text_encoder_2" in configs:
            second = CLIPTextConfig(**configs["text_encoder_2"])
            found["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return found


def from_original(
    tensors: Mapping[str, Tensor], family: str, networks: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """The weights of each network in its own names. ValueError if one of them is missing, too many or misshapen."""
    named = {_modern(key): tensor for key, tensor in tensors.items()}
    parts = {prefix: {key: t for key, t in named.items() if key.startswith(prefix)} for prefix in PARTS}
    found = {
        "unet": convert_ldm_unet_checkpoint(parts[UNET], networks["unet"].config),
        "vae": convert_ldm_vae_checkpoint(parts[VAE], networks["vae"].config),
    }
    for name, prefix in zip(("text_encoder", "text_encoder_2"), FAMILIES[family].texts, strict=False):
        found[name] = _text_from_original(named, prefix, networks[name])
    for name, weights in found.items():
        _check(name, weights, networks[name])
    if len(found["unet"]) != len(parts[UNET]):  # the converter passes over names that it does not know
        raise ValueError(f"its U-Net has {len(parts[UNET]) - len(found['unet'])} weights more than the stock model's")
    return found


def _text_from_original(tensors: Mapping[str, Tensor], prefix: str, network: Any) -> dict[str, Tensor]:
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if prefix in (CLIP, CLIP_XL):
        found = convert_ldm_clip_checkpoint(own)
    else:
        found = convert_open_clip_checkpoint(network, own, prefix=prefix)
    wrapped = hasattr(network, "text_model")  # transformers took the wrapper off CLIPTextModel in 5.6
    return {
        key if wrapped else key.removeprefix("text_model."): tensor
        for key, tensor in found.items()
        if not key.endswith("position_ids")  # 0 to 76, in old files
    }


def _modern(key: str) -> str:
    """Some tools wrote the text encoder of 1.x without its ``text_model``, and that of 2.x where XL has its first."""
    key = re.sub(rf"^{re.escape(CLIP)}(?=embeddings\.|encoder\.|final_layer_norm\.)", f"{CLIP}text_model.", key)
    return key.replace("conditioner.embedders.0.model.", OPEN_CLIP)


def _check(name: str, weights: Mapping[str, Tensor], network: nn.Module) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{len(wrong)} of the {len(wanted)} weights of its {name} are not those of the stock model, first {first}: "
            f"{given.get(first, 'missing')}, not {wanted.get(first, 'there')}"
        )


# --- to theirs --------------------------------------------------------------------------------------------------------

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "final_layer_norm.": "ln_final.",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)\.(weight|bias)")


def to_original(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of all networks in the original names and shapes. ValueError for one that has no name there."""
    texts = FAMILIES[family_of(networks)].texts
    found = {UNET + key: tensor for key, tensor in _unet_to_original(networks["unet"]).items()}
    found |= {VAE + key: tensor for key, tensor in _vae_to_original(networks["vae"]).items()}
    for name, prefix in zip(("text_encoder", "text_encoder_2"), texts, strict=False):
        weights = {key.removeprefix("text_model."): t for key, t in networks[name].state_dict().items()}
        if prefix in (CLIP, CLIP_XL):
            found |= {f"{prefix}text_model.{key}": tensor for key, tensor in weights.items()}
        else:
            found |= {prefix + key: tensor for key, tensor in _open_clip_to_original(weights).items()}
    return found


def _unet_to_original(unet: Any) -> dict[str, Tensor]:
    return {unet_key(key, unet): tensor for key, tensor in unet.state_dict().items()}


def unet_key(key: str, unet: Any) -> str:
    """The name of a weight of this U-Net in the original format. ValueError if it has none there."""
    each = unet.config.layers_per_block
    if not isinstance(each, int):
        raise ValueError(f"Stable Diffusion's original format has no blocks of {each} layers: export a folder")
    attended = {block for block, module in enumerate(unet.up_blocks) if hasattr(module, "attentions")}
    return _unet_key(key, each + 1, attended)


def _unet_key(key: str, each: int, attended: set[int]) -> str:
    """``down_blocks.1.resnets.0.conv1.weight`` as ``input_blocks.4.0.in_layers.2.weight``.

    Each of our blocks is ``each`` of theirs: going down the last of them is the downsampler, going up every one is
    a layer and the upsampler is beside the last. ``attended`` are the blocks up that have attention.
    """
    found = _BLOCK.fullmatch(key)
    if found is None:
        layer, _, end = key.rpartition(".")
        return f"{_known(_UNET_ENDS, layer, key)}.{end}"
    way, kind, rest, end = found[1], found[3], found[5], found[6]
    block, layer_index = int(found[2] or 0), int(found[4])
    if kind == "resnets":
        rest = _known(_RESNET, rest, key)
    place = block * each + layer_index
    if way == "mid":
        where = f"middle_block.{2 * layer_index + (kind == 'attentions')}"
    elif kind in ("resnets", "attentions"):
        side = "output_blocks" if way == "up" else "input_blocks"
        where = f"{side}.{place + (way == 'down')}.{int(kind == 'attentions')}"
    elif kind == "downsamplers":
        where, rest = f"input_blocks.{(block + 1) * each}.0", "op"
    else:
        where = f"output_blocks.{(block + 1) * each - 1}.{1 + (block in attended)}"
    return f"{where}.{rest}.{end}"


def _vae_to_original(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    found = {_vae_key(key, blocks): tensor for key, tensor in vae.state_dict().items()}
    # There a projection of the attention is a convolution of one pixel.
    flat = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {key: tensor[:, :, None, None] if key.endswith(flat) else tensor for key, tensor in found.items()}


def _vae_key(key: str, blocks: int) -> str:
    """``decoder.up_blocks.0.resnets.1.conv1.weight`` as ``decoder.up.3.block.1.conv1.weight``: up is counted down."""
    half, _, tail = key.partition(".")
    found = _BLOCK.fullmatch(tail)
    if found is None:
        return key.replace("conv_norm_out", "norm_out")
    way, kind, rest, end = found[1], found[3], found[5], found[6]
    block, layer = int(found[2] or 0), int(found[4])
    block = blocks - 1 - block if way == "up" else block
    if kind == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        where = f"mid.block_{layer + 1}" if way == "mid" else f"{way}.{block}.block.{layer}"
    elif kind == "attentions":
        where, rest = f"mid.attn_{layer + 1}", _known(_VAE_ATTENTION, rest, key)
    else:
        where = f"{way}.{block}.{kind.removesuffix('rs')}"
    return f"{half}.{where}.{rest}.{end}"


def _open_clip_to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one matrix there, and the projection at the end multiplies from the right."""
    named = {_open_clip_key(key): tensor for key, tensor in weights.items()}
    found = {key: tensor for key, tensor in named.items() if "self_attn." not in key}
    for key in (key for key in named if "self_attn.q_proj." in key):
        parts = [named[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
        found[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T
    return found


def _open_clip_key(key: str) -> str:
    for ours, theirs in _OPEN_CLIP.items():
        key = key.replace(ours, theirs)
    return key


def _known(names: Mapping[str, str], name: str, key: str) -> str:
    if name not in names:
        raise ValueError(f"Stable Diffusion's original format has no name for {key}: export a folder")
    return names[name]
