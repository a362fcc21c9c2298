"""How the command line speaks: to a person in lines, or with ``--json`` to a program in events.

Paths and verdicts go to stdout, all else to stderr.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffusion.notices import Repaired

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.records import Verdict


@dataclass(frozen=True)
class Voice:
    """How we speak: to a person, or with ``json`` to a program, in one event a line on stdout."""

    prog: str
    json: bool
    quiet: bool

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Within the block, in which no file is written, Ctrl-C ends the process at once.

        Libraries that are being imported swallow its exception now and then, or come out of it broken.
        """
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main():
            yield
            return
        signal.signal(signal.SIGINT, self._leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _leave(self, *_: object) -> NoReturn:
        try:
            self.trouble("error", "interrupted")
            sys.stderr.flush()
        finally:  # whatever was being printed meanwhile
            os._exit(130)

    def event(self, kind: str, /, **facts: Any) -> None:
        """One event, for a program only."""
        if self.json:
            print(json.dumps({"event": kind, **facts}), flush=True)

    def note(self, text: str) -> None:
        """A word on stderr, for a person only."""
        if not self.json and not self.quiet:
            print(f"{self.prog}: {text}", file=sys.stderr)

    def trouble(self, kind: str, message: str, **facts: Any) -> None:
        """A warning or an error: one line on stderr, and an event."""
        line = " ".join(message.split())
        print(f"{self.prog}: {line}", file=sys.stderr)
        self.event(kind, message=line, **facts)

    def warn(self, warning: Warning | str) -> None:
        """What a library, or ours, has to say; of a repair also to a person who wants no notes."""
        if isinstance(warning, Repaired):
            self.trouble("repair", str(warning))
        else:
            self.trouble("warning", f"warning: {warning}")

    def picture(self, path: Path, **facts: Any) -> None:
        """A picture that was written: its path, or an event that holds it."""
        if self.json:
            self.event("image", path=str(path), **facts, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            print(path, flush=True)

    def flagged(self, image: "Image.Image", seed: int, path: Path | None, *, withheld: bool, **facts: Any) -> None:
        """A picture that its checker flags, if it does: a warning, whatever becomes of it."""
        if "flagged" not in image.info:
            return
        why, end = image.info["flagged"], "; it is withheld" if withheld else ""
        facts |= {"seed": seed, "reason": why, "path": None if path is None else str(path), "withheld": withheld}
        self.trouble("flagged", f"warning: picture of seed {seed} is flagged: {why}{end}", **facts)

    def verdict(self, verdict: "Verdict") -> None:
        """How near a picture that was drawn again comes to the first one: the result, so on stdout."""
        if self.json:
            facts = {name: getattr(verdict, name) for name in ("identical", "levels", "differs")}
            decibels = None if verdict.identical else verdict.decibels
            self.event("verified", path=str(verdict.path), **facts, decibels=decibels)
        else:
            print(verdict, flush=True)


def unmet(error: PermissionError | ValueError) -> str:
    """Why a request cannot be met; of what may not be read, looked into or written, what it is and what to do."""
    if isinstance(error, ValueError):
        return str(error)
    return f"no access to {error.filename} ({error.strerror}): ask for the right to it, or name another place"


def _is_main() -> bool:
    """Signals are the matter of one thread."""
    return threading.current_thread() is threading.main_thread()
