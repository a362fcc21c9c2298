"""Models of the Hugging Face Hub: in the local cache first, and on the network only where that is allowed."""

import json
import os
from pathlib import Path

from diffusion.places import MODEL_PARTS

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(
    ("text_encoder", "text_encoder_2"), "model"
)
PARTS = (*MODEL_PARTS, "text_encoder_2", "tokenizer_2")
# Full weights as safetensors, whole or in shards; no pickles, no half precision beside them, no other formats.
FILES = [
    "model_index.json",
    "recipe.json",
    *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt")),
    *(f"{part}/{name}{tail}.safetensors" for part, name in WEIGHTS.items() for tail in ("", "-?????-of-?????")),
]


def find_on_hub(name: str, offline: bool = False) -> Path:
    """The folder in the local cache of the model ``owner/name``, downloaded if need be.

    The network is asked only if the cache does not hold the whole model, and not if ``offline``, ``HF_HUB_OFFLINE`` or
    ``TRANSFORMERS_OFFLINE`` forbids it. ValueError if the model cannot be had, or is none that draws.
    """
    cached = _snapshot(name, local=True)
    if cached is not None and not _lacking(cached):
        return cached
    if offline or _forbidden():
        what = "is not in the local cache" if cached is None else f"is in the local cache without {_lacking(cached)}"
        raise ValueError(f"{name} {what}, and the network is not to be asked: download it while online")
    folder = _snapshot(name, local=False)
    assert folder is not None, "a download that failed has said so"
    if missing := _lacking(folder):
        raise ValueError(f"{name}: the Hugging Face Hub has no {missing} of it, or could not be reached ({folder})")
    return folder


def _snapshot(name: str, local: bool) -> Path | None:
    """The folder of the newest revision; of the cache alone, None if it is not there."""
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns="*.fp16*", local_files_only=local))
    except Exception as error:  # of several libraries, by release: nothing cached, no network, no such name, no access
        if local:
            return None
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} cannot be had from the Hugging Face Hub: {said or type(error).__name__}") from None


def _forbidden() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _lacking(folder: Path) -> str:
    """The first thing that a model needs and the folder does not have, or nothing."""
    parts = [part for part in PARTS if part in MODEL_PARTS or (folder / part).is_dir()]
    for part in parts:
        if not (folder / part).is_dir():
            return f"{part}/"
        if part in WEIGHTS and not _has_weights(folder / part, WEIGHTS[part]):
            return f"{part}/{WEIGHTS[part]}.safetensors"
    return ""


def _has_weights(folder: Path, name: str) -> bool:
    if (folder / f"{name}.safetensors").is_file():
        return True
    index = folder / f"{name}.safetensors.index.json"
    if not index.is_file():
        return False
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)
