"""Read a captioned image folder: its ``metadata.jsonl`` into records, its files into pixels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from diffusion.rng import name_id

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # an explicit list: no format that runs code or calls a program


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and what may be said of it."""

    file: Path
    text: str
    keywords: tuple[str, ...]
    group: str
    id: int  # a function of the file name alone: adding a picture changes no other picture's draws


def read_folder(path: str | Path, split: str = "train", group: str | None = None) -> list[Picture]:
    """The pictures of one split, in the order of the file. ``group`` names the metadata field to balance over.

    A row without a ``split`` belongs to ``train``. ``ValueError`` names the line and what is wrong with it.
    """
    folder, listing = Path(path), Path(path) / "metadata.jsonl"
    if not listing.is_file():
        raise ValueError(f"{listing} does not exist: it needs one JSON object a line with file_name and text")
    pictures = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("split", "train") == split:
                pictures.append(_picture(folder, row, group))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{listing}, line {number}: {type(error).__name__} {error}; need file_name and text"
            ) from None
    missing = [str(picture.file) for picture in pictures if not picture.file.is_file()]
    if missing:
        raise ValueError(f"{listing}: {len(missing)} of {len(pictures)} files do not exist, first {missing[0]}")
    if not pictures:
        raise ValueError(f"{listing}: no picture has the split {split!r}")
    return pictures


def _picture(folder: Path, row: dict, group: str | None) -> Picture:
    return Picture(
        file=folder / row["file_name"],
        text=row["text"],
        keywords=tuple(row.get("keywords", ())),
        group=str(row[group]) if group is not None else row["file_name"],
        id=name_id(row["file_name"]),
    )


def read_pixels(file: Path, size: int) -> npt.NDArray[np.uint8]:
    """A picture as ``(size, size, 3)`` uint8 RGB: turned as EXIF says, laid on white, fitted and centre-cropped."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read as a picture ({error})") from None


def group_weights(pictures: Sequence[Picture], power: float) -> npt.NDArray[np.float64]:
    """Share of the draws for each picture, summing to 1: one over the size of its group, to the given power."""
    _, inverse, counts = np.unique([picture.group for picture in pictures], return_inverse=True, return_counts=True)
    weights = counts[inverse].astype(np.float64) ** -power
    return weights / weights.sum()
