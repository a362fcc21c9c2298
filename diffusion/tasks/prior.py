"""Pictures of what a model knows already, drawn by itself, so that training something new keeps them (DreamBooth)."""

import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diffusion.config import Config
from diffusion.data.source import Picture, read_folder
from diffusion.images import save_image
from diffusion.pipeline import TextToImage


def prior_folder(config: Config) -> Path:
    """Where they are."""
    assert config.data.prior is not None
    return config.folder / "prior" if config.data.prior.path is None else Path(config.data.prior.path)


def missing(config: Config) -> list[int]:
    """The seeds of those that are not there yet."""
    prior, folder = config.data.prior, prior_folder(config)
    if prior is None or prior.path is not None:
        return []
    return [seed for seed in range(prior.count) if not (folder / _name(seed)).is_file()]


def draw_missing(config: Config, *, quiet: bool = False) -> None:
    """Draw what is missing with the model that is about to be trained, one seed a picture; stopping loses none."""
    seeds, prior = missing(config), config.data.prior
    if not seeds or prior is None:
        return
    if config.model.base is None:
        raise ValueError("data.prior is drawn by model.base: name it, or give data.prior.path")
    folder = prior_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"file_name": _name(seed), "text": prior.prompt}) for seed in range(prior.count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    draw = TextToImage.load(config.model.base)
    for seed in tqdm(seeds, desc="drawing the prior", unit="img", leave=False, disable=quiet):
        (image,) = draw(prior.prompt, seed=seed, literal=True)
        save_image(image, folder / _name(seed))


def read_prior(config: Config, pictures: list[Picture]) -> list[Picture]:
    """The pictures, weighted so that they are seen as often in all as ``pictures`` are; none where none are there."""
    prior, folder = config.data.prior, prior_folder(config)
    if prior is None or not folder.is_dir() or missing(config):
        return []
    found = read_folder(folder, source="none") if prior.path is not None else read_folder(folder)
    each = sum(picture.weight for picture in pictures) / len(found)
    same = {"texts": (prior.prompt,), "keywords": (), "weight": each, "plain": True, "loss_weight": prior.weight}
    return [replace(picture, group=f"prior/{picture.file.name}", **same) for picture in found]  # type: ignore[arg-type]


def _name(seed: int) -> str:
    return f"prior-{seed:05d}.png"
