"""What is told of a drawing that did not go as it should: warnings to listen for, and errors known. No torch."""


class Repaired(UserWarning):
    """Drawing failed, and something was done about it (see ``repair``)."""


class Flagged(UserWarning):
    """A checker flagged a picture (see ``safety``)."""


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory was short: PyTorch has several."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
