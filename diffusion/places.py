"""Where models and what is put on them are found, and what their JSON files allow. Nothing slow is imported."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.names import did_you_mean

PACKAGE = Path(__file__).parent
ADAPTERS = "recipe.json"  # with a ``base`` in it, what is beside it is put on that model
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SINGLE_FILE = ".safetensors"
LORAS = Path("loras")  # where <lora:name> is looked for unless another folder is given
OTHER_FORMAT = "-a1111"  # of a learnt word's second file: what it adds to the name


class Limits(NamedTuple):
    """What a model allows: sides are multiples of ``side`` pixels, steps are 1 to ``steps``."""

    side: int
    steps: int


def find_model(name: str | Path) -> Path:
    """The folder of a model: a path, or the name of one that ships with the project; or the one file of a checkpoint.

    ValueError when there is none.
    """
    shelves = (PACKAGE.parent / "assets", PACKAGE / "assets")
    for folder in (Path(name), *(shelf / name for shelf in shelves)):
        if (folder / "unet").is_dir():
            missing = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
            if missing:
                raise ValueError(f"{folder} is not a whole model folder: it has no {missing[0]}/")
            return folder
        if base_of(folder) is not None:
            return folder
    if Path(name).is_file():
        return _single_file(Path(name))
    shipped = sorted({recipe.parent.name for shelf in shelves for recipe in shelf.glob(f"*/{ADAPTERS}")})
    if Path(name).exists():
        inside = Path(name) / "model"  # of the folder of a run
        hint = f"; give {inside}" if (inside / "unet").is_dir() or (inside / ADAPTERS).is_file() else ""
        raise ValueError(f"{name} is not a model folder: it has no unet/{hint}")
    known = f" (models that are here: {', '.join(shipped)})" if shipped else ""
    raise ValueError(
        f"model {str(name)!r} not found: give the path of a model folder{did_you_mean(str(name), shipped)}{known}"
    )


def is_hub_id(name: str | Path) -> bool:
    """Whether a name that is nowhere on disk has the form of a model on the Hugging Face Hub, ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None and not Path(name).exists()


def title_of(path: Path) -> str:
    """What a model is called: by its Hub id, a file without its ending, a folder by its name."""
    repository = re.fullmatch(r"models--(.+?)--(.+)", path.parent.parent.name)
    if path.parent.name == "snapshots" and repository:
        return f"{repository[1]}/{repository[2]}"
    return path.stem if path.suffix.lower() == SINGLE_FILE else path.name


def parse_lora(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH:0.8`` as the path and its strength, 1 where none is given. ValueError if nothing is there."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        path, weight = text, "1"
    try:
        strength = float(weight)
    except ValueError:
        path, strength = text, 1.0
    if not Path(path).exists():
        raise ValueError(
            f"no LoRA at {path}: give a .safetensors file or a folder, and if you like its weight, PATH:0.8"
        )
    if not math.isfinite(strength):
        raise ValueError(f"the weight of {path} must be a finite number, got {weight}")
    return path, strength


def find_lora(name: str, folder: Path) -> Path:
    """What ``<lora:name:...>`` in a prompt means: a path, or a file or folder of ``folder``. ValueError if nothing."""
    for path in (Path(name), folder / name, folder / f"{name}{SINGLE_FILE}"):
        if path.exists():
            return path
    known = sorted(path.name.removesuffix(SINGLE_FILE) for path in folder.glob("*")) if folder.is_dir() else []
    raise ValueError(f"the prompt names the LoRA {name!r}, which is not in {folder}/{did_you_mean(name, known)}")


def base_of(folder: Path) -> Path | None:
    """Of a folder of adapters (LoRA, learnt words) the model that they belong to; None for a model of its own."""
    if (folder / "unet").is_dir() or not (folder / ADAPTERS).is_file():
        return None
    recipe = _read_json(folder / ADAPTERS)
    base = recipe.get("base") if isinstance(recipe, dict) else None
    if not base:
        return None
    try:
        return find_model(base)
    except ValueError as error:
        raise ValueError(f"{folder} belongs to another model: {error}") from None


def weight_files(path: Path) -> list[Path]:
    """Those of a model folder, of a folder of adapters with its base, or the one file."""
    if path.is_file():
        return [path]
    base = base_of(path)
    return sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors"), *(weight_files(base) if base else [])])


def hash_files(files: Sequence[Path]) -> str:
    """Ten hexadecimal digits of the SHA-256 of files, one after the other. Read once, unless they change."""
    return digest_once(*_stamped(files))[:10]


def is_hash_of(path: Path, recorded: str) -> bool:
    """Whether a hash is that of weights: SHA-256, of LoRAs without their header as AUTOMATIC1111 has it."""
    files, changed = _stamped(weight_files(path))
    starts = [0, *(_header_end(file) for file in files[: 1 if len(files) == 1 else 0])]
    return any(digest_once(files, changed, start).startswith(recorded.lower()) for start in starts)


def _header_end(file: Path) -> int:
    """Where the weights of a safetensors file begin: its first 8 bytes say how long its header is."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _stamped(files: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    return tuple(files), tuple(file.stat().st_mtime_ns for file in files)


@cache
def digest_once(files: tuple[Path, ...], changed: tuple[int, ...], start: int = 0) -> str:
    """The whole SHA-256 of files, one after the other; of each what is behind ``start``."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            stream.seek(start)
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def word_tokens(word: str, vectors: int) -> list[str]:
    """A learnt word of several vectors is that many tokens, as the stock library names them: ``<cat> <cat>_1 ...``."""
    return [word, *(f"{word}_{n}" for n in range(1, vectors))]


def word_file(word: str) -> tuple[str, str]:
    """The files of a learnt word: in the stock library's format, and in AUTOMATIC1111's."""
    name = "".join(letter for letter in word if letter.isalnum() or letter in "-_") or "word"
    return f"{name}{SINGLE_FILE}", f"{name}{OTHER_FORMAT}{SINGLE_FILE}"


def read_limits(path: Path) -> Limits:
    """The limits of a model folder, from its JSON files alone; those of a single file are in its header."""
    folder = base_of(path) or path
    vae, scheduler = (
        _read_json(folder / "vae" / "config.json"),
        _read_json(folder / "scheduler" / "scheduler_config.json"),
    )
    try:
        return Limits(2 ** (len(vae["block_out_channels"]) - 1), scheduler.get("num_train_timesteps", 1000))
    except (KeyError, TypeError):
        raise ValueError(f"{folder / 'vae' / 'config.json'} does not describe an autoencoder") from None


def _single_file(path: Path) -> Path:
    if path.suffix.lower() != SINGLE_FILE:
        raise ValueError(
            f"{path} is not a {SINGLE_FILE} file: other checkpoints can run code when they are opened, "
            "and are not read; convert it, or take a copy in that format"
        )
    return path


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
