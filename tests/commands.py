"""The command line, as tests call it: in this process on the tiny model, or in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.images import read_metadata

ROOT = Path(__file__).parents[1]


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Said]


def made(path: Path) -> dict[str, Any]:
    return read_metadata(path)["diffusion"]


def environment() -> dict[str, str]:
    """Of a process that is to find this copy of the package, whatever is installed."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def process(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    own = environment()
    own.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # the command sees to its own silence
    command = [sys.executable, *(["-c", code] if code else [str(ROOT / "generate.py")]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own, **options)
