"""Checkpoints are whole or absent (the trap of a half-written "latest")."""

import json
import shutil

import pytest
import torch

from diffusion import checkpoint
from diffusion.checkpoint import Checkpoint


def some(value: float) -> Checkpoint:
    return Checkpoint(
        {"weights": {"w": torch.full((3,), value)}, "optimizer": {"w.step": torch.tensor(value)}}, {"step": 1}
    )


def test_what_is_written_is_read(tmp_path):
    path = checkpoint.write(tmp_path, 7, some(2.0))
    assert path.name == "step-00000007"
    assert checkpoint.latest(tmp_path) == path
    found = checkpoint.read(path)
    assert torch.equal(found.tensors["weights"]["w"], torch.full((3,), 2.0))
    assert found.state == {"step": 1}


def test_the_state_alone_is_read_from_the_newest_sealed_one(tmp_path):
    assert checkpoint.newest_state(tmp_path / "nowhere") == {}
    checkpoint.write(tmp_path, 1, Checkpoint(some(1.0).tensors, {"step": 1}))
    newest = checkpoint.write(tmp_path, 2, Checkpoint(some(1.0).tensors, {"step": 2}))
    (newest / "weights.safetensors").unlink()
    assert checkpoint.newest_state(tmp_path) == {"step": 2}, "the tensors are not looked at"
    (newest / "state.json").write_text("{}")
    assert checkpoint.newest_state(tmp_path) == {"step": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_knows_names_shapes_and_every_bit(dtype):
    weights = {"a": torch.randn(8, 3, 3, 3).to(dtype), "b": torch.zeros((), dtype=dtype)}
    before = checkpoint.fingerprint(weights)
    laid_out = weights["a"].to(memory_format=torch.channels_last)
    assert checkpoint.fingerprint({"b": weights["b"], "a": laid_out}) == before
    others = [{"c": weights["a"], "b": weights["b"]}, weights | {"a": weights["a"].flatten(1)}]
    moved = weights["a"].clone()
    moved[0, 0, 0, 0] *= 1 + 2 * torch.finfo(dtype).eps
    others.append(weights | {"a": moved})
    assert before not in {checkpoint.fingerprint(other) for other in others}


def test_older_ones_are_pruned(tmp_path):
    for step in (1, 2, 10):
        checkpoint.write(tmp_path, step, some(step), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


def test_some_are_kept_for_good(tmp_path):
    for step in (5, 10, 15, 20, 25):
        checkpoint.write(tmp_path, step, some(step), keep_last=1, keep_every=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020", "step-00000025"]


def test_a_full_disk_is_told_before_anything_is_lost(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, 1, some(1.0), keep_last=1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(OSError, match="make room"):
        checkpoint.write(tmp_path, 2, some(2.0), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_stage_of_a_killed_process_is_cleared(tmp_path):
    (tmp_path / ".stage").mkdir()
    checkpoint.write(tmp_path, 1, some(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("damage", ["missing manifest", "missing file", "flipped byte", "truncated"])
def test_trap_19_a_damaged_checkpoint_does_not_exist(tmp_path, damage):
    good, bad = checkpoint.write(tmp_path, 1, some(1.0)), checkpoint.write(tmp_path, 2, some(2.0))
    file = bad / "weights.safetensors"
    if damage == "missing manifest":
        (bad / "manifest.json").unlink()
    elif damage == "missing file":
        file.unlink()
    elif damage == "flipped byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(file.read_bytes()[:-4])
    assert checkpoint.latest(tmp_path) == good


def test_a_stage_that_was_left_behind_is_no_checkpoint(tmp_path):
    stage = tmp_path / ".stage-1"
    stage.mkdir()
    (stage / "manifest.json").write_text(json.dumps({"step": 9, "sha256": {}}))
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_trap_19_pruning_never_counts_what_is_not_whole(tmp_path):
    checkpoint.write(tmp_path, 1, some(1.0))
    (tmp_path / "step-00000003").mkdir()
    checkpoint.write(tmp_path, 2, some(2.0), keep_last=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
