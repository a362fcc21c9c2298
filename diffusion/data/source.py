"""Read a captioned image folder, in any of the layouts that people have, into records."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion import rng
from diffusion.data.scan import Scan, scan
from diffusion.pixels import View, look, read_rgb, read_size

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


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder by their split, and what in it is none of them: file -> reason."""

    path: Path
    splits: Mapping[str, list[Picture]]
    passed_over: Mapping[str, str]

    def of(self, split: str, *, may_be_empty: bool = False) -> list[Picture]:
        """The pictures of one split. ValueError if there is none, unless that may be."""
        found = self.splits.get(split, [])
        if not found and not may_be_empty:
            why = "".join(f"; {file} {reason}" for file, reason in list(self.passed_over.items())[:1])
            raise ValueError(f"{self.path}: no picture has the split {split!r}{why}")
        return found


def read_folder(
    path: str | Path, split: str = "train", group: str | None = None, source: str = "auto", may_be_empty: bool = False
) -> list[Picture]:
    """The pictures of one split of ``open_folder``, which says what may be wrong."""
    return open_folder(path, group, source).of(split, may_be_empty=may_be_empty)


def open_folder(
    path: str | Path,
    group: str | None = None,
    source: str = "auto",
    text: str | None = None,
    apart: Path | None = None,
) -> Folder:
    """All that is in a folder. ``group`` names the metadata field to balance over.

    ``source`` says where captions are: ``metadata`` (metadata.jsonl, or metadata.csv), ``txt`` (a file beside each
    picture, a caption a line), ``folder`` (the folder's name; ``10_red car`` weighs 10), ``file`` (the file's name),
    ``none`` (there are none); ``auto`` takes the first of ``metadata`` and ``txt`` that is there. With a ``text``
    captions are not looked for: it is that of every picture. Wherever captions are, a metadata file says the split,
    which is ``train`` where it says nothing, and the groups. ``apart`` is passed over. ``ValueError`` names the place
    and what is wrong with it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures")
    found = scan(folder, apart)
    source = _find_source(folder, found, text) if source == "auto" else source
    splits: dict[str, list[Picture]] = {"train": [], "held_out": []}
    for where, row in _rows(folder, source, found, text is None):
        try:
            splits[_split(row)].append(_picture(folder, row, group, text))
        except (KeyError, AttributeError, TypeError) as error:
            reason = f"needs {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: {reason}; a row holds file_name and text") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    pictures = [picture for split in splits.values() for picture in split]
    _check(folder, pictures)
    return Folder(folder, splits, _passed_over(found, pictures))


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
    sides: tuple[list[Picture], list[Picture]] = ([], [])
    for picture in pictures:
        sides[is_held_out(picture, share)].append(picture)
    if not sides[0]:
        raise ValueError(f"data.hold_out {share} holds out all {len(pictures)} pictures")
    return sides


def is_held_out(picture: Picture, share: float) -> bool:
    """Whether a picture is in the share that is never trained on; a function of its name."""
    return bool(rng.uniform(0, "hold_out", picture.id, size=1)[0] < share)


def group_weights(pictures: Sequence[Picture], power: float) -> npt.NDArray[np.float64]:
    """Share of the draws for each picture, summing to 1: its weight over the size of its group to the given power."""
    _, inverse, counts = np.unique([picture.group for picture in pictures], return_inverse=True, return_counts=True)
    weights = counts[inverse].astype(np.float64) ** -power * [picture.weight for picture in pictures]
    return weights / weights.sum()


# --- layouts ----------------------------------------------------------------------------------------------------------


def _find_source(folder: Path, found: Scan, text: str | None) -> str:
    if _listing_of(folder) is not None:
        return "metadata"
    if text is not None:
        return "none"
    if any(file.with_suffix(".txt").is_file() for file in found.pictures):
        return "txt"
    raise ValueError(
        f"{folder} has no captions: it needs metadata.jsonl, metadata.csv or a .txt beside each picture, "
        "or set data.captions.source=folder or =file to take names as captions"
    )


def _rows(folder: Path, source: str, found: Scan, captioned: bool) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of every picture."""
    listing = _listing_of(folder)
    if source == "metadata":
        if listing is None:
            raise ValueError(f"{folder} has neither metadata.jsonl nor metadata.csv")
        yield from _listed(listing)
        return
    known = _facts(listing) if listing is not None else {}
    for file in found.pictures:
        facts = known.get(os.path.realpath(file), {}) if known else {}
        name = {"file_name": file.relative_to(folder).as_posix()}
        yield str(file), facts | name | _said(file, source, captioned)


def _said(file: Path, source: str, captioned: bool) -> Row:
    """What a picture's name, or the file beside it, says of it."""
    match source:
        case "txt":
            return {"text": _sidecar(file)} if captioned else {}
        case "folder":
            repeats, name = re.fullmatch(r"(?:(\d+)_)?(.*)", file.parent.resolve().name).groups()  # type: ignore[union-attr]
            return {"text": _words(name), "weight": float(repeats or 1)}
        case "file":
            return {"text": _words(re.sub(r"[ _-]*(\(\d+\)|\d+)$", "", file.stem) or file.stem)}
    return {"text": ""}


def _listing_of(folder: Path) -> Path | None:
    files = (folder / name for name in ("metadata.jsonl", "metadata.csv"))
    return next((file for file in files if file.is_file()), None)


def _listed(listing: Path) -> Iterator[tuple[str, Row]]:
    return _jsonl(listing) if listing.suffix == ".jsonl" else _csv(listing)


def _facts(listing: Path) -> dict[str, Row]:
    """By its file, what a listing says of a picture besides its captions, which are somewhere else."""
    found = {}
    for where, row in _listed(listing):
        try:
            file = os.path.realpath(listing.parent / _name(row))
            found[file] = {name: value for name, value in row.items() if name not in ("text", "keywords")}
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{where}: needs a file_name") from None
    return found


def _jsonl(listing: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(read_lines(listing), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{listing}, line {number}: not JSON ({error})") from None
            yield f"{listing}, line {number}", row


def _csv(listing: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(f"{line}\n" for line in read_lines(listing))
    try:
        for row in reader:
            given = {key: value for key, value in row.items() if key is not None and value not in (None, "")}
            if "weight" in given:
                given["weight"] = _number(given["weight"])
            if "keywords" in given:
                given["keywords"] = [word.strip() for word in given["keywords"].split(",") if word.strip()]
            yield f"{listing}, line {reader.line_num}", given
    except csv.Error as error:
        raise ValueError(f"{listing}, line {reader.line_num}: not CSV ({error})") from None


def _sidecar(file: Path) -> list[str]:
    listing = file.with_suffix(".txt")
    if not listing.is_file():
        raise ValueError(f"{file} has no {listing.name} beside it: write its caption there")
    return [line.strip() for line in read_lines(listing) if line.strip()]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file. ValueError names one that is not UTF-8."""
    try:
        return lines_of(file.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def lines_of(content: bytes) -> list[str]:
    """UTF-8 as lines, which end as files end them: U+2028 and its like are part of a caption."""
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _words(name: str) -> str:
    return " ".join(re.split(r"[_\-\s]+", name)).strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # refused with its place when the row is read


# --- rows -------------------------------------------------------------------------------------------------------------


def _picture(folder: Path, row: Row, group: str | None, text: str | None) -> Picture:
    name, weight = _name(row), row.get("weight", 1.0)
    said, keywords = (text, ()) if text is not None else (row["text"], row.get("keywords", ()))
    texts = [said] if isinstance(said, str) else said
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise TypeError("text must be a caption or a list of captions")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise TypeError(f"weight must be a number above 0, got {weight!r}")
    if isinstance(keywords, str) or not all(isinstance(word, str) for word in keywords):
        raise TypeError("keywords must be a list of words")
    for words in (*texts, *keywords):
        check_text(words)
    return Picture(
        file=folder / os.path.normpath(name),
        texts=tuple(texts),
        keywords=tuple(keywords),
        group=str(row[group]) if group is not None else name,
        weight=float(weight),
        id=rng.name_id(name),
    )


def check_text(text: str) -> None:
    """ValueError for a caption that holds half a character, which no encoder reads."""
    if not is_whole(text):
        raise ValueError(f"{text!a} holds half a character (a lone surrogate): write it anew")


def is_whole(text: str) -> bool:
    """Whether a text is characters all through: a lone surrogate is half of one, or a byte that was none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(row: Row) -> str:
    name = row["file_name"]
    if not isinstance(name, str):
        raise TypeError(f"file_name must be a text, got {name!r}")
    if not is_whole(name):
        raise ValueError(f"the file name {name!a} is not UTF-8: rename the file")
    return name


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


def _passed_over(found: Scan, pictures: Sequence[Picture]) -> dict[str, str]:
    """What is in the folder and not among the pictures. A listing may lead to a file by another way than we went."""
    listed = {picture.file for picture in pictures}
    passed_over = {file: reason for file, reason in found.passed_over.items() if Path(file) not in listed}
    others = [file for file in found.pictures if file not in listed]
    known = {os.path.realpath(file) for file in listed} if others else set()
    unlisted = {str(file): "is not listed in the metadata" for file in others if os.path.realpath(file) not in known}
    return passed_over | unlisted
