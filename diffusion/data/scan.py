"""Find the pictures of a folder, and name whatever looks like one and is not read."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREAD = (  # pictures to a person, but of kinds that are not read
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpe", ".jfif", ".apng", ".svg", ".psd", ".tga", ".ico"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dds", ".pcx", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw"),
)


@dataclass
class Scan:
    """The pictures of a folder in the order of their names, and what was passed over: path -> reason."""

    pictures: list[Path] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)


def scan(folder: Path, apart: Path | None = None) -> Scan:
    """Look through a folder and all that is in it. Links to folders are followed, and each folder is read once.

    ``apart`` is a folder that does not belong to it, wherever it is: what runs write is no data.
    """
    found = Scan()
    seen: dict[Path, Path | None] = (
        {} if apart is None or folder.resolve() == apart.resolve() else {apart.resolve(): None}
    )
    places, links = [folder], list[Path]()
    while places or links:  # links come last, so that a folder is known by its own name where it has one
        place = places.pop() if places else links.pop(0)
        real = place.resolve()
        if real in seen:
            if (first := seen[real]) is not None:
                found.passed_over[str(place)] = f"is the folder {first}, which is read there"
            continue
        seen[real] = place
        for entry in _entries(place, found):
            if _is(entry.is_dir):
                (links if entry.is_symlink() else places).append(Path(entry.path))
            else:
                _take(entry, folder, found)
    found.pictures.sort()
    return found


def _entries(place: Path, found: Scan) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        found.passed_over[str(place)] = f"cannot be read ({error.strerror})"


def _take(entry: os.DirEntry[str], folder: Path, found: Scan) -> None:
    """Sort one file in: a picture, something that looks like one, or nothing to speak of."""
    file = Path(entry.path)
    kind, dangling = file.suffix.lower(), entry.is_symlink() and not _is(entry.is_file)
    if kind not in (*SUFFIXES, *UNREAD) and not dangling:
        return
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        found.passed_over[str(file)] = "is hidden: its name, or its folder's, begins with a dot"
    elif dangling:
        found.passed_over[str(file)] = "is a link to nothing"
    elif kind in UNREAD:
        found.passed_over[str(file)] = f"is of a kind that is not read: {kind} (read are {', '.join(SUFFIXES)})"
    else:
        found.pictures.append(file)


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link that leads in a circle is of none."""
    try:
        return kind()
    except OSError:
        return False
