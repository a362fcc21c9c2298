"""One value of a request: checked, and made Python's own whatever library it comes from. Nothing slow is imported."""

import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from PIL import Image

Source = Union[str, "Path", "Image.Image", "npt.NDArray[Any]"]  # a picture, its pixels, or where one is
SIDES = ("left", "top", "right", "bottom")


def text(name: str, value: Any) -> str:
    """Words that every library can spell."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    if any("\ud800" <= char <= "\udfff" for char in value):  # what bytes that are no UTF-8 turn into on their way here
        raise ValueError(f"{name} {value!r} is not valid text: give it as UTF-8")
    return value


def name_of(name: str, value: Any) -> str:
    """One of a list of names, which somebody else knows."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a name, got {value!r}")
    return value


def whole(name: str, value: Any, least: float, most: float = math.inf) -> int:
    """A whole number within its limits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    found = int(value)
    if found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    if found > most:
        raise ValueError(f"{name} {found} is too large: it must not pass {most}")
    return found


def whole_or_auto(name: str, value: Any) -> int | str:
    """A whole number of at least 1, or ``auto``."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name} must be a whole number or 'auto', got {value!r}")
        return value
    return whole(name, value, 1)


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """A finite number within its limits; 2 is 2.0, so that it is recorded alike whoever gives it."""
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # of a whole number that is longer than a float
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number, got {_brief(value)}")
    if not least <= found <= most:
        limits = f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return found


def _brief(value: Any) -> str:
    """A value as a line shows it, however long it is."""
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def picture(name: str, value: Any) -> Any:
    """A path as it is, and anything else as a picture in memory."""
    from pathlib import Path

    if isinstance(value, str | Path):
        return no_address(name, value)
    try:
        return as_image(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def no_address(name: str, path: "str | Path") -> "str | Path":
    """What names a file, and not a place on a network, of which nothing is fetched."""
    if isinstance(path, str) and re.match(r"[A-Za-z][\w+.-]*://", path):
        raise ValueError(f"{name} {path} is an address, and no file: download it first")
    return path


def as_image(source: Any) -> "Image.Image":
    """A picture in memory; of pixels ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)`` uint8. ValueError for anything else."""
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    shape: tuple[int, ...] = tuple(getattr(source, "shape", ()))
    kind = str(getattr(source, "dtype", type(source).__name__))
    if kind != "uint8" or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        found = f"{kind} {shape}" if shape else kind
        raise ValueError(f"a picture is a path, a PIL picture or uint8 pixels (H, W, 3), not {found}")
    return Image.fromarray(source)


def sides(name: str, value: Any, most: float = math.inf) -> tuple[int, int, int, int]:
    """Four numbers of pixels, not all of them 0: left, top, right, bottom."""
    found = _several(value)
    if len(found) != 4:
        raise ValueError(f"{name} must be four whole numbers of pixels, left, top, right, bottom, got {value!r}")
    left, top, right, bottom = (whole(name, pixels, 0, most) for pixels in found)
    if not left + top + right + bottom:
        raise ValueError(f"{name} by nothing would change nothing: give some pixels, left, top, right, bottom")
    return left, top, right, bottom


def interval(name: str, value: Any) -> tuple[float, float | None]:
    """Two sigma / alpha, the second the larger one; None and infinity are no upper end."""
    found = _several(value)
    if len(found) != 2:
        raise ValueError(f"{name} must be two sigma / alpha, low, high; None: no end; got {value!r}")
    low = number(name, found[0], 0)
    high = None if found[1] is None or found[1] == math.inf else number(name, found[1], 0)
    if high is not None and low >= high:
        raise ValueError(f"{name} {low:g},{high:g} must be two sigma / alpha, low, high; None: no end")
    return low, high


def sigmas(name: str, value: Any) -> tuple[float, ...]:
    """sigma / alpha of the steps: a 0 at the end, where clean data is, goes without saying."""
    given = [float(number(name, one, 0)) for one in _several(value)]
    kept = tuple(given[: -1 if len(given) > 1 and given[-1] == 0 else None])
    if not kept or kept[-1] <= 0 or any(high <= low for high, low in pairwise(kept)):
        raise ValueError(f"{name} must be numbers that fall, above 0 but for the last, got {value!r}")
    return kept


def _several(value: Any) -> list[Any]:
    """Those of a list or an array; of anything else, none."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []


# --- a value as people write it: a flag, a cell of a table, an option of a line


def read_whole(written: str) -> int:
    """A whole number."""
    return _read(int, written, "a whole number")


def read_whole_or_auto(written: str) -> int | str:
    """A whole number, or ``auto``."""
    return written if written == "auto" else _read(int, written, "a whole number or auto")


def read_number(written: str) -> float:
    """A number."""
    return _read(float, written, "a number")


def read_numbers(written: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(read_number(part) for part in written.split(","))


def read_switch(written: str) -> bool:
    """``true`` or ``false``."""
    if written.lower() not in ("true", "false"):
        raise ValueError(f"{written!r} is neither true nor false")
    return written.lower() == "true"


def read_size(written: str) -> tuple[int, int]:
    """``128x64`` as (width, height)."""
    found = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", written.strip())
    if found is None:
        raise ValueError(f"{written!r} is not WIDTHxHEIGHT, for instance 128x64")
    return int(found[1]), int(found[2])


def read_interval(written: str) -> tuple[float, float | None]:
    """``0.3,5`` as two numbers; ``0.3,inf`` has no end."""
    found = read_numbers(written)
    if len(found) != 2:
        raise ValueError(f"{written!r} is not LOW,HIGH")
    return found[0], None if found[1] == math.inf else found[1]


def read_sides(written: str) -> tuple[int, int, int, int]:
    """``left=64,top=32`` as the pixels on each side."""
    found: dict[str, int] = {}
    for part in written.split(","):
        side, _, pixels = part.strip().partition("=")
        if side not in SIDES or not re.fullmatch(r"\d+", pixels):
            raise ValueError(f"{written!r} is not like left=64,top=32,right=64,bottom=0")
        if side in found:
            raise ValueError(f"{written!r} has {side} twice")
        found[side] = int(pixels)
    left, top, right, bottom = (found.get(side, 0) for side in SIDES)
    return left, top, right, bottom


def _read(kind: Callable[[str], Any], written: str, meant: str) -> Any:
    try:
        return kind(written)
    except ValueError:
        raise ValueError(f"{written!r} is not {meant}") from None
