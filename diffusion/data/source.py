"""Read a captioned image folder, in any of the layouts that people have, into records."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion import rng
from diffusion.pixels import View, look, read_rgb, read_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
HELD_OUT = ("held_out", "validation", "valid", "test")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and what may be said of it."""

    file: Path
    texts: tuple[str, ...]  # captions that mean the same; each visit takes one
    keywords: tuple[str, ...]
    group: str
    weight: float  # how often it is drawn, in relation to the others
    id: int  # a function of the file name alone: adding a picture changes no other picture's draws
    plain: bool = False  # its caption is said as it stands: no trigger, no template
    loss_weight: float = 1.0
    content: bytes | None = field(default=None, repr=False)  # of a picture that is no file of its own
    decoded: dict[str, Image.Image] = field(default_factory=dict, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The first caption."""
        return self.texts[0]

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Width and height as a viewer shows them."""
        return read_size(self.file, self.content)

    def pixels(self, view: View | int) -> npt.NDArray[np.uint8]:
        """``(height, width, 3)`` uint8 sRGB; ValueError names a file that cannot be read."""
        view = View(width=view, height=view) if isinstance(view, int) else view
        return look(self.image(view.background), view)

    def image(self, background: str) -> Image.Image:
        """The whole picture, decoded. One that is no file of its own passes through once, and keeps it."""
        if self.content is None:
            return read_rgb(self.file, background)
        if background not in self.decoded:
            self.decoded[background] = read_rgb(self.file, background, self.content)
        return self.decoded[background]


def read_folder(
    path: str | Path, split: str = "train", group: str | None = None, source: str = "auto", may_be_empty: bool = False
) -> list[Picture]:
    """The pictures of one split. ``group`` names the metadata field to balance over.

    ``source`` says where captions are: ``metadata`` (metadata.jsonl, or metadata.csv), ``txt`` (a file beside each
    picture, a caption a line), ``folder`` (the folder's name; ``10_red car`` weighs 10), ``file`` (the file's name),
    ``none`` (there are none); ``auto`` takes the first of ``metadata`` and ``txt`` that is there. Rows without a
    ``split`` belong to ``train``. ``ValueError`` names the place and what is wrong with it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; data.path names a folder of pictures")
    source = _find_source(folder) if source == "auto" else source
    pictures = []
    for where, row in _rows(folder, source):
        try:
            if _split(row) == split:
                pictures.append(_picture(folder, row, group))
        except (KeyError, AttributeError, TypeError) as error:
            reason = f"needs {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: {reason}; a row holds file_name and text") from None
    if not pictures and not may_be_empty:
        raise ValueError(f"{folder}: no picture has the split {split!r}")
    _check(folder, pictures)
    return pictures


def leave_out_small(
    pictures: Sequence[Picture], size: int, shape_of: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> tuple[list[Picture], dict[str, str]]:
    """Those that cover their shape without being enlarged, and the reason for each of the others by its file.

    ``shape_of`` gives the shape (width, height) for a picture's sides; without it all are squares of ``size``.
    """
    reasons = ((str(picture.file), too_small(picture, size, shape_of)) for picture in pictures)
    small = {file: reason for file, reason in reasons if reason is not None}
    return [picture for picture in pictures if str(picture.file) not in small], small


def too_small(
    picture: Picture, size: int, shape_of: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> str | None:
    """The reason why a picture would have to be enlarged, if it would."""
    across, down = (size, size) if shape_of is None else shape_of(picture.sides)
    fits = picture.sides[0] >= across and picture.sides[1] >= down
    return None if fits else f"{picture.sides[0]}x{picture.sides[1]} is smaller than {across}x{down}"


def hold_out(pictures: Sequence[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """(to train on, held out): by name, so that a picture stays on its side when others come and go."""
    sides = [[p for p in pictures if is_held_out(p, share) == held] for held in (False, True)]
    if not sides[0]:
        raise ValueError(f"data.hold_out {share} holds out all {len(pictures)} pictures")
    return sides[0], sides[1]


def is_held_out(picture: Picture, share: float) -> bool:
    """Whether a picture is in the share that is never trained on; a function of its name."""
    return bool(rng.uniform(0, "hold_out", picture.id, size=1)[0] < share)


def group_weights(pictures: Sequence[Picture], power: float) -> npt.NDArray[np.float64]:
    """Share of the draws for each picture, summing to 1: its weight over the size of its group to the given power."""
    _, inverse, counts = np.unique([picture.group for picture in pictures], return_inverse=True, return_counts=True)
    weights = counts[inverse].astype(np.float64) ** -power * [picture.weight for picture in pictures]
    return weights / weights.sum()


# --- layouts ----------------------------------------------------------------------------------------------------------


def _find_source(folder: Path) -> str:
    if any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
        return "metadata"
    if any(file.with_suffix(".txt").is_file() for file in _images(folder)):
        return "txt"
    raise ValueError(
        f"{folder} has no captions: it needs metadata.jsonl, metadata.csv or a .txt beside each picture, "
        "or set data.captions.source=folder or =file to take names as captions"
    )


def _rows(folder: Path, source: str) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of every picture."""
    if source == "metadata":
        yield from _jsonl(folder / "metadata.jsonl") if (folder / "metadata.jsonl").is_file() else _csv(folder)
        return
    for file in _images(folder):
        row: Row = {"file_name": file.relative_to(folder).as_posix()}
        if source == "txt":
            row["text"] = _sidecar(file)
        elif source == "none":
            row["text"] = ""
        elif source == "folder":
            repeats, name = re.fullmatch(r"(?:(\d+)_)?(.*)", file.parent.resolve().name).groups()  # type: ignore[union-attr]
            row |= {"text": _words(name), "weight": float(repeats or 1)}
        else:
            row["text"] = _words(re.sub(r"[ _-]*(\(\d+\)|\d+)$", "", file.stem) or file.stem)
        yield str(file), row


def _jsonl(listing: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{listing}, line {number}: not JSON ({error})") from None
            yield f"{listing}, line {number}", row


def _csv(folder: Path) -> Iterator[tuple[str, Row]]:
    listing = folder / "metadata.csv"
    if not listing.is_file():
        raise ValueError(f"{folder} has neither metadata.jsonl nor metadata.csv")
    with open(listing, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            given = {key: value for key, value in row.items() if key is not None and value not in (None, "")}
            if "weight" in given:
                given["weight"] = _number(given["weight"])
            if "keywords" in given:
                given["keywords"] = [word.strip() for word in given["keywords"].split(",") if word.strip()]
            yield f"{listing}, line {reader.line_num}", given


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _sidecar(file: Path) -> list[str]:
    listing = file.with_suffix(".txt")
    if not listing.is_file():
        raise ValueError(f"{file} has no {listing.name} beside it: write its caption there")
    return [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _words(name: str) -> str:
    return " ".join(re.split(r"[_\-\s]+", name)).strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # refused with its place when the row is read


# --- rows -------------------------------------------------------------------------------------------------------------


def _picture(folder: Path, row: Row, group: str | None) -> Picture:
    name, weight = row["file_name"], row.get("weight", 1.0)
    texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise TypeError("text must be a caption or a list of captions")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise TypeError(f"weight must be a number above 0, got {weight!r}")
    keywords = row.get("keywords", ())
    if isinstance(keywords, str) or not all(isinstance(word, str) for word in keywords):
        raise TypeError("keywords must be a list of words")
    return Picture(
        file=folder / name,
        texts=tuple(texts),
        keywords=tuple(keywords),
        group=str(row[group]) if group is not None else name,
        weight=float(weight),
        id=rng.name_id(name),
    )


def _split(row: Row) -> str:
    """``train`` or ``held_out``, which other tools call ``validation`` or ``test``."""
    split = row.get("split", "train")
    if split not in ("train", *HELD_OUT):
        raise TypeError(f"split must be train or one of {', '.join(HELD_OUT)}, got {split!r}")
    return "held_out" if split in HELD_OUT else split


def _check(folder: Path, pictures: Sequence[Picture]) -> None:
    missing = [str(picture.file) for picture in pictures if not picture.file.is_file()]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(pictures)} files do not exist, first {missing[0]}")
    for file, times in Counter(picture.file for picture in pictures).most_common(1):
        if times > 1:
            raise ValueError(f"{folder}: {file} is listed {times} times; several captions go into one row, as a list")
