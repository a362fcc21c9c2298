"""Run state on disk, whole or not at all: safetensors and JSON under a manifest of SHA-256 digests.

A checkpoint is written to a staging folder, flushed to the disk, sealed with its manifest and only then renamed to
``step-00001000``; older ones are pruned last. A folder without a valid manifest does not exist for ``latest``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
SPARE = 64 << 20  # bytes left for logs and samples


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: named groups of tensors, and a few plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def write(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Write ``folder/step-<step>`` atomically, then remove all but the newest ``keep_last``.

    Those at multiples of ``keep_every`` steps stay. OSError, with nothing written or removed, if the disk is too full.
    """
    final, stage = folder / f"step-{step:08d}", folder / f".stage-{os.getpid()}"
    for left in folder.glob(".stage-*"):  # of a process that was killed: there is one writer a run
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if need + SPARE > free:
        raise OSError(
            f"{folder}: a checkpoint takes {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
            "make room and run the same command again"
        )
    stage.mkdir()
    for name, tensors in checkpoint.tensors.items():
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, stage / f"{name}.safetensors"
        )
    (stage / "state.json").write_text(json.dumps(dict(checkpoint.state), indent=2), encoding="utf-8")
    digests = {file.name: _sha256(file) for file in sorted(stage.iterdir())}
    (stage / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2), encoding="utf-8")
    for path in (*stage.iterdir(), stage):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # only ever an invalid or equal leftover of the same step
    stage.rename(final)
    _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-keep_last]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((path for path in sorted(folder.glob("step-*"), reverse=True) if _is_whole(path)), None)


def read(path: Path) -> Checkpoint:
    """Load a checkpoint folder."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))


def _is_whole(path: Path) -> bool:
    try:
        digests = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return bool(digests) and all(_sha256(path / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
