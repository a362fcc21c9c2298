"""What is told of a drawing that did not go as it should: warnings to listen for, and errors known. No torch."""

import sys
import warnings

INSIDE = {"diffusion", "torch", "contextlib"}  # packages between who asks for a picture and what has to be told


class Repaired(UserWarning):
    """Drawing failed, and something was done about it (see ``repair``)."""


class Flagged(UserWarning):
    """A checker flagged a picture (see ``safety``)."""


def tell(warning: Warning) -> None:
    """Warn the code that called this package, every time: a warning that is said once would hide the next picture's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INSIDE:
        frame = frame.f_back
    warnings.warn_explicit(warning, type(warning), frame.f_code.co_filename, frame.f_lineno)


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory was short: PyTorch has several."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
