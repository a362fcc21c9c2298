"""What is told of a drawing that did not go as it should: warnings to listen for, and errors in a line. No torch."""

import sys
import warnings

INSIDE = {"diffusion", "torch", "contextlib"}  # packages between who asks for a picture and what has to be told


class Repaired(UserWarning):
    """Drawing failed, and something was done about it (see ``repair``)."""


class Flagged(UserWarning):
    """A checker flagged a picture (see ``safety``)."""


class CheckerError(Exception):
    """A checker failed, or its answers are none."""


def tell(warning: Warning) -> None:
    """Warn the code that called this package, every time: a warning that is said once would hide the next picture's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INSIDE:
        frame = frame.f_back
    warnings.warn_explicit(warning, type(warning), frame.f_code.co_filename, frame.f_lineno)


SHORT = (
    "out of memory",
    "allocate memory",
    *("could not create a primitive", "could not create a memory"),  # in oneDNN's words
)


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory was short: PyTorch has several, and some of them say so in their text alone."""
    text = str(error).lower() if isinstance(error, RuntimeError | OSError) else ""
    return isinstance(error, MemoryError) or any(phrase in text for phrase in SHORT)


def reason(error: Exception) -> str:
    """A failure in one line: its first, and what to do where that is known."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, CheckerError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: install the toolkit with its libraries first, pip install -c constraints.txt -e ."
    if is_short(error):
        return text if text.startswith("out of memory: ") else "out of memory: ask for a smaller --size"
    return text if isinstance(error, OSError | FloatingPointError) else f"{type(error).__name__}: {text}"
