"""Checkers of finished pictures: found by where they are, asked, and held to an answer.

A checker takes a list of PIL pictures, and returns for each None or one line that says why it is flagged. It judges and
does no more: it is given copies, and what becomes of a flagged picture is for the caller to say. No torch, but what a
checker itself imports.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from diffusion.names import did_you_mean
from diffusion.notices import CheckerError

if TYPE_CHECKING:
    from PIL import Image

STOCK = "safety_checker"  # the folder that stock models keep theirs in
Checker = Callable[["list[Image.Image]"], Sequence[str | None]]


@lru_cache
def find_checker(where: str) -> Checker:
    """``module:function``, ``file.py:function``, or a folder that holds the stock ``safety_checker/``. Read once.

    A module is looked for where Python finds it, and in the current folder. ValueError where there is no checker.
    """
    if Path(where).is_dir():
        return _stock(Path(where))
    place, _, name = where.rpartition(":")
    if (not place or not name) and Path(file := where.removesuffix(":")).is_file():
        raise ValueError(f"checker {where} names no function: give {file}:function")
    if not place or not name:
        raise ValueError(f"checker {where} is not there: give module:function, file.py:function or a folder")
    module = _module(place)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"checker {where}: {place} has no function {name!r}{did_you_mean(name, vars(module))}")
    return found


def flags(checker: Checker, images: "Sequence[Image.Image]") -> list[str | None]:
    """For each picture None, or why it is flagged. CheckerError, by name, for a checker that does not say."""
    try:
        answers = list(checker([image.copy() for image in images]))
    except Exception as error:  # whatever it was, it is the checker's
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckerError(f"checker {_name(checker)} failed ({what})") from error
    if len(answers) != len(images):
        counts = f"pictures {len(images)}, answers {len(answers)}"
        raise CheckerError(f"checker {_name(checker)} does not answer for each picture: {counts}")
    for answer in answers:
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise CheckerError(f"checker {_name(checker)} answered {answer!r}: it is to be None, or why it is flagged")
    return [None if answer is None else " ".join(answer.split()) for answer in answers]


def _stock(folder: Path) -> Checker:
    if not (folder / STOCK).is_dir():
        raise ValueError(f"checker {folder} holds no {STOCK}/: give the folder of a model that has one")
    from diffusion.models.checker import load_checker  # slow to import

    return load_checker(folder / STOCK)


def _module(place: str) -> ModuleType:
    """A module, or a file as one. What it says by failing is the user's to read: any failure is a ValueError."""
    file = Path(place)
    try:
        if file.suffix != ".py":
            _look_in(Path.cwd())
            return importlib.import_module(place)
        _look_in(file.resolve().parent)
        spec = spec_from_file_location(place, file)  # under its path: no other module has that name
        assert spec is not None and spec.loader is not None, "it ends in .py"  # noqa: PT018
        sys.modules[place] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ValueError(f"checker {place} cannot be imported ({type(error).__name__}: {error})") from None


def _look_in(folder: Path) -> None:
    """Where Python finds modules, last of all: nothing that it finds now is hidden."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _name(checker: Checker) -> str:
    name = getattr(checker, "__qualname__", None)
    return str(checker) if name is None else f"{checker.__module__}:{name}"
