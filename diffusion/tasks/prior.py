"""Pictures of what a model knows already, drawn by itself, so that training something new keeps them (DreamBooth)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diffusion.data.source import Picture, open_folder
from diffusion.images import read_metadata, save_image
from diffusion.pipeline import TextToImage
from diffusion.places import find_model, hash_files, weight_files
from diffusion.schema import Config


def prior_folder(config: Config) -> Path:
    """Where they are."""
    assert config.data.prior is not None
    return config.folder / "prior" if config.data.prior.path is None else Path(config.data.prior.path)


def missing(config: Config) -> list[int]:
    """The seeds of those that are not there yet, or that show another prompt, or were drawn by another model."""
    prior, folder = config.data.prior, prior_folder(config)
    if prior is None or prior.path is not None:
        return []
    there = [seed for seed in range(prior.count) if (folder / _name(seed)).is_file()]
    made_by = _model_hash(config) if there else ""
    wanted = {seed: {"prompt": prior.prompt, "seed": seed, "model_hash": made_by} for seed in there}
    right = {seed for seed, facts in wanted.items() if facts.items() <= _drawn_with(folder / _name(seed)).items()}
    return [seed for seed in range(prior.count) if seed not in right]


def draw_missing(config: Config, *, quiet: bool = False) -> None:
    """Draw what is missing with the model that is about to be trained, one seed a picture; stopping loses none."""
    seeds, prior = missing(config), config.data.prior
    if not seeds or prior is None:
        return
    _base(config)
    draw, folder = TextToImage.load(str(config.model.base)), prior_folder(config)
    for seed in tqdm(seeds, desc="drawing the prior", unit="img", leave=False, disable=quiet):
        (image,) = draw(prior.prompt, seed=seed, literal=True)
        save_image(image, folder / _name(seed))


def read_prior(config: Config, pictures: list[Picture]) -> tuple[list[Picture], Mapping[str, str]]:
    """The pictures, weighted so that they are seen as often in all as ``pictures`` are, and what is none of them.

    None as long as they are to be drawn. ValueError for a ``data.prior.path`` that holds none.
    """
    prior = config.data.prior
    if prior is None or missing(config):
        return [], {}
    if not prior_folder(config).is_dir():
        raise ValueError(f"data.prior.path {prior.path}: no such folder; leave it out, and the model draws them")
    folder = open_folder(prior_folder(config), text=prior.prompt)
    found = folder.of("train")
    if prior.path is None:  # a smaller count leaves pictures there that are not asked for
        wanted = {_name(seed) for seed in range(prior.count)}
        found = [picture for picture in found if picture.file.name in wanted]
    each = sum(picture.weight for picture in pictures) / len(found)
    same = {"weight": each, "plain": True, "loss_weight": prior.weight}
    return [replace(one, group=f"prior/{one.file.name}", **same) for one in found], folder.passed_over  # type: ignore[arg-type]


def _base(config: Config) -> Path:
    if config.model.base is None:
        raise ValueError("data.prior is drawn by model.base: name it, or give data.prior.path")
    return find_model(config.model.base)


def _model_hash(config: Config) -> str:
    """What pictures say of the model that drew them."""
    return hash_files(weight_files(_base(config)))


def _drawn_with(file: Path) -> Mapping[str, object]:
    """What a picture says of how it was drawn; nothing if it is cut, or none of ours."""
    try:
        return read_metadata(file).get("diffusion", {})
    except ValueError:
        return {}


def _name(seed: int) -> str:
    return f"prior-{seed:05d}.png"
