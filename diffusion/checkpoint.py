"""Run state on disk, whole or not at all: safetensors and JSON under a manifest of SHA-256 digests.

A checkpoint is written to a staging folder, flushed to the disk, sealed with its manifest and only then renamed to
``step-00001000``; older ones are pruned last. A folder without a valid manifest does not exist for ``latest``.

A group of tensors is one file, or a folder of them where the tensors are sharded over processes: each process then
writes its own part, through ``torch.distributed.checkpoint``. Either is read by any number of processes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter  # type: ignore[attr-defined]
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

MANIFEST = "manifest.json"
SPARE = 64 << 20  # bytes left for logs and samples
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: named groups of tensors, and a few plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def write(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Write ``folder/step-<step>`` atomically, then remove all but the newest ``keep_last``.

    Those at multiples of ``keep_every`` steps stay. OSError, with nothing written or removed, if the disk is too full.
    Where tensors are sharded all processes call this, otherwise one does.
    """
    final, stage = folder / f"step-{step:08d}", folder / ".stage"
    shards = is_sharded(checkpoint.tensors)
    if not shards or dist.get_rank() == 0:
        _make_room(folder, sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values()))
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        stage.mkdir(parents=True)
    if shards:
        dist.barrier()
    for name, tensors in checkpoint.tensors.items():
        if shards:
            writer = HuggingFaceStorageWriter(str(stage / name), save_distributed=True)
            save_shards({key: tensor.detach() for key, tensor in tensors.items()}, storage_writer=writer)
        else:
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(whole, stage / f"{name}.safetensors")
    if not shards or dist.get_rank() == 0:
        _seal(stage, final, step, checkpoint.state)
        _prune(folder, keep_last, keep_every)
    if shards:
        dist.barrier()
    return final


def is_sharded(tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether any tensor lies on several processes."""
    return any(isinstance(tensor, DTensor) for group in tensors.values() for tensor in group.values())


def shortage(folder: Path, need: int, what: str = "a checkpoint takes") -> str | None:
    """Why ``need`` bytes do not fit on the disk of a folder, which may not be there yet; None if they do."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if need + SPARE <= free:
        return None
    return (
        f"{folder}: {what} {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
        "make room and run the same command again"
    )


def _make_room(folder: Path, need: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (lacking := shortage(folder, need)) is not None:
        raise OSError(lacking)


def _seal(stage: Path, final: Path, step: int, state: Mapping[str, Any]) -> None:
    """Flush what is in the stage, say what it is, and give it its name."""
    (stage / "state.json").write_text(json.dumps(dict(state), indent=2), encoding="utf-8")
    files = sorted(file for file in stage.rglob("*") if file.is_file())
    digests = {file.relative_to(stage).as_posix(): _sha256(file) for file in files}
    (stage / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2), encoding="utf-8")
    for path in (*stage.rglob("*"), stage):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # only ever an invalid or equal leftover of the same step
    stage.rename(final)
    _flush(final.parent)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    sealed = [path for path in sorted(folder.glob("step-*")) if (path / MANIFEST).is_file()]
    for old in sealed[:-keep_last]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((path for path in sorted(folder.glob("step-*"), reverse=True) if _is_whole(path)), None)


def newest_state(folder: Path) -> Mapping[str, Any]:
    """The plain values of the newest sealed checkpoint, without its tensors being looked at; empty if there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _is_whole(path, "state.json"):
            return json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A digest of weights by the sum of the bits of each: as fast as reading them, and blind only to permutations."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        whole = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        bits = whole.view(_INTEGERS[whole.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype} {bits}\n".encode())
    return digest.hexdigest()


def read(path: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> Checkpoint:
    """Load a checkpoint folder. A tensor is sharded like what ``like`` gives for its name, if that has its shape."""
    tensors = {
        file.stem: {k: _spread(v, like(k)) for k, v in load_file(file).items()} for file in path.glob("*.safetensors")
    }
    tensors |= {folder.name: _read_shards(folder, like) for folder in path.iterdir() if folder.is_dir()}
    return Checkpoint(tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))


def _spread(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _read_shards(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    reader = HuggingFaceStorageReader(str(folder))
    wanted: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parent = like(name)
        alike = isinstance(parent, DTensor) and parent.shape == stored.size
        wanted[name] = torch.empty_like(parent) if alike else torch.empty(stored.size, dtype=stored.properties.dtype)  # type: ignore[arg-type]
    load_shards(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return wanted


def _is_whole(path: Path, file: str | None = None) -> bool:
    """Whether all files of a sealed folder, or the one that is named, are as they were written."""
    try:
        digests = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        looked_at = digests if file is None else {file: digests[file]}
        return bool(digests) and all(_sha256(path / name) == digest for name, digest in looked_at.items())
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
