"""What is put on a model after it was loaded: LoRA files, learnt words, and folders that hold either.

recipe.json (names the base)  pytorch_lora_weights.safetensors  words/<word>.safetensors
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffusion.models import embeddings, lora, packing
from diffusion.models.folder import Model, read_recipe, write_json
from diffusion.places import ADAPTERS, OTHER_FORMAT

WORDS = "words"


def apply(model: Model, path: str | Path, strength: float = 1.0) -> None:
    """Merge a LoRA into the model's weights, or teach it a word, in place. ValueError if the file does not fit.

    A model without weights is taught its words all the same, and its ``reports`` say what was found.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such LoRA or learnt word")
    words, reports = ([path] if _is_word(path) else _words_of(path)), list[str]()
    if _is_word(path) or _only_words(path):
        if strength != 1:
            raise ValueError(f"{path}: a learnt word is not put on so strongly: write it in the prompt as (<word>:0.8)")
    else:
        found = lora.read(path, _networks(model))
        found.merge(_networks(model), strength)
        reports.append(found.report)
    reports += [_teach(model, file) for file in words]
    model.reports[str(path)] = ", ".join(reports)
    model.adapters[str(path)] = strength


def become(model: Model, path: Path) -> Model:
    """The model that a folder of adapters is, with what it belongs to: nothing of it counts as put on."""
    apply(model, path)
    model.path, model.recipe, model.adapters, model.reports = path, read_recipe(path), {}, {}
    return model


def check(model: Model, loras: Sequence[tuple[Path, float]]) -> None:
    """See that the LoRAs that a prompt asks for fit the model, and report on them. ValueError if one does not."""
    paths = [path for path, _ in loras]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"the prompt names the LoRA {path} twice: give it one weight")
        if _is_word(path):
            raise ValueError(
                f"{path} is a learnt word and no LoRA: give it by --lora, and write the word in the prompt"
            )
        model.reports[str(path)] = lora.read(path, _networks(model)).report


@contextmanager
def lent(model: Model, loras: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """Within the block LoRAs are merged into the model; afterwards it is what it was, to the last bit."""
    if not loras:
        yield
        return
    networks, before = _networks(model), dict[int, tuple[Tensor, Tensor]]()
    try:
        for path, strength in loras:
            found = lora.read(path, networks)
            for weight in found.weights(networks):
                before.setdefault(id(weight), (weight, weight.detach().clone()))
            found.merge(networks, strength)
        _repack(networks, set(before))
        yield
    finally:
        with torch.no_grad():
            for weight, value in before.values():
                weight.copy_(value)
        _repack(networks, set(before))


def save(model: Model, path: Path, base: str, kohya: bool = False) -> None:
    """Write the adapters and learnt words of a model in training as a folder of their own."""
    path.mkdir(parents=True, exist_ok=True)
    networks = _networks(model)
    if any("lora_" in name for network in networks.values() for name, _ in network.named_parameters()):
        lora.save(networks, path, kohya)
    tables = [embeddings.learnt(encoder) for encoder in model.text_encoders]
    if tables[0]:
        embeddings.save(tables, path / WORDS)
    write_json(path / ADAPTERS, asdict(model.recipe) | {"base": base})


def _repack(networks: Mapping[str, nn.Module], weights: set[int]) -> None:
    for network in networks.values():
        packing.forget(network, weights)


def _networks(model: Model) -> Mapping[str, nn.Module]:
    return {name: network for name, network in model.networks.items() if name != "vae"}


def _teach(model: Model, file: Path) -> str:
    """Teach a word, and say which one it is."""
    word, vectors = embeddings.read(file)
    if len(vectors) != len(model.text_encoders):
        raise ValueError(
            f"{file}: made for {len(vectors)} text encoders, and this model has {len(model.text_encoders)}"
        )
    for tokenizer, encoder, rows in zip(model.tokenizers, model.text_encoders, vectors, strict=True):
        try:
            embeddings.add(tokenizer, encoder, {word: rows}, {word: len(rows)})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        embeddings.finish(encoder)
    count = len(vectors[0])
    return f"the word {word}" + (f" of {count} vectors" if count > 1 else "")


def _only_words(path: Path) -> bool:
    return path.is_dir() and (path / WORDS).is_dir() and not (path / lora.FILE).is_file()


def _words_of(path: Path) -> list[Path]:
    """The learnt words of a folder of adapters, each in one of its two formats."""
    return [file for file in sorted((path / WORDS).glob("*.safetensors")) if not file.stem.endswith(OTHER_FORMAT)]


def _is_word(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as stored:
            keys = set(stored.keys())
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    return len(keys) == 1 or keys == {"clip_l", "clip_g"}
