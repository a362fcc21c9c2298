"""Warnings that a program may listen for, by Python's own ``warnings``. Nothing slow is imported."""


class Repaired(UserWarning):
    """Drawing failed, and something was done about it (see ``repair``)."""


class Flagged(UserWarning):
    """A checker flagged a picture (see ``safety``)."""
