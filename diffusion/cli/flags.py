"""argparse as our commands use it: a wrong flag is one line with the nearest right one, in either spelling."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from diffusion.names import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse without its usage dump: a wrong command line is a ValueError like any other wrong request."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            **arguments, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
        )
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def read(self, argv: Sequence[str], words: str) -> argparse.Namespace:
        """Read flags, written with - or _, anywhere between the positional ``words``; after ``--`` all are words."""
        end = len(flags_of(argv))
        flags = [re.sub(r"^--\w[\w-]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv[:end]]
        args, rest = self.parse_known_intermixed_args(flags)
        if rest and not args.help:
            flag = rest[0].partition("=")[0]
            near = did_you_mean(flag, self._option_string_actions)
            raise ValueError(f"unknown flag {flag!r}{near} (--help lists them all)")
        setattr(args, words, [*getattr(args, words), *argv[end + 1 :]])
        return args


def flags_of(argv: Sequence[str]) -> Sequence[str]:
    """What may be flags: all before ``--``."""
    return argv[: list(argv).index("--")] if "--" in argv else argv


def only_model(names: Sequence[str]) -> str:
    """The one model that was named, or the shipped one. ValueError for several."""
    if len(names) > 1:
        raise ValueError(f"one model at a time, not {len(names)}: {' '.join(names)}")
    return names[0] if names else "emoji"


def whole(text: str) -> int:
    """A whole number."""
    return _read(int, text, "a whole number")


def number(text: str) -> float:
    """A number."""
    return _read(float, text, "a number")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(number(part) for part in text.split(","))


def size(text: str) -> tuple[int, int]:
    """``128x64`` as (width, height)."""
    found = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for instance 128x64")
    return int(found[1]), int(found[2])


def _read(kind: Any, text: str, meant: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {meant}") from None
