"""argparse as our commands use it: a wrong flag is one line with the nearest right one, in either spelling."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from diffusion import values
from diffusion.names import did_you_mean

Value = TypeVar("Value")


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
        for word in flags:
            long = "-" + word.partition("=")[0].replace("_", "-")
            if long in self._option_string_actions:  # -size would be -s and its value
                raise ValueError(f"unknown flag {long[1:]!r}; did you mean {long!r}? (--help lists them all)")
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


def _flag(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """What reads a value, as argparse wants it: only an error of its own reaches the user as it is."""

    def read_flag(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_flag


whole, number, numbers = _flag(values.read_whole), _flag(values.read_number), _flag(values.read_numbers)
whole_or_auto = _flag(values.read_whole_or_auto)
size, interval, sides = _flag(values.read_size), _flag(values.read_interval), _flag(values.read_sides)
