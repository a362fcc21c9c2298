"""One run on several processes is the run of one, and they end well."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import ROOT, environment
from diffusion import (
    TextToImage,
    checkpoint,
    config,
    tasks,
    trainer,
)
from diffusion.data.source import read_folder
from families import save as save_family
from runs import (
    denoiser,
    difference,
    metrics,
    train_with,
    weights,
)
from watched_train import watched


@pytest.fixture(scope="module")
def pair(home):
    """The folders of one run by one process, and by two that a second run of one resumes, and the other way round."""

    def run(name, steps):
        return denoiser(home, name, steps=steps, warmup=4, lr_schedule="constant", validate_every=10)

    folders = [run("one_process", 20).folder]
    trainer.train(run("one_process", 20), quiet=True)
    for name, first, then in (("two_then_one", 2, 1), ("one_then_two", 1, 2)):
        train_with(home, run(name, 10), processes=first)
        train_with(home, run(name, 20), processes=then)
        folders.append(run(name, 20).folder)
    return folders


def test_two_processes_agree_with_one_also_when_resumed_by_the_other(pair):
    for folder in pair[1:]:
        assert metrics(folder) == pytest.approx(metrics(pair[0]), rel=1e-5)
        assert metrics(folder, "grad_norm") == pytest.approx(metrics(pair[0], "grad_norm"), rel=1e-4)
        assert {name: error for name, error in apart(pair[0], folder, "weights").items() if error > 1e-5} == {}


def apart(one, other, group):
    """The relative distance of each tensor of two runs."""
    mine, theirs = (weights(folder)[group] for folder in (one, other))
    off = {name: ((mine[name] - theirs[name]).norm() / (1e-3 + mine[name].norm())).item() for name in mine}
    # softmax cancels a bias of the keys: its gradient is rounding alone, of which Adam makes whole steps
    return {name: error for name, error in off.items() if not name.endswith("k_proj.bias")}


@pytest.fixture(scope="module")
def noted(home):
    """What each optimizer step used, in fp32 and fp64: by one process, by one that accumulates, and by each of two."""

    def run(name, micro_batch=None):
        double = {"steps": 3} if "double" in name else {"steps": 20, "warmup": 4}
        return denoiser(home, name, clip=0, micro_batch=micro_batch, lr_schedule="constant", **double)

    found, shared = {}, [run(f"{kind}-shared") for kind in ("single", "double")]
    for kind in ("single", "double"):
        for one in (run(f"{kind}-whole"), run(f"{kind}-parts", 4)):
            with watched(double=kind == "double") as notes:
                trainer.train(one, quiet=True)
            found[one.name] = (notes, weights(one.folder)["weights"])
    # one launch for both: a process is not done with the others when its first run is
    train_with(home, *shared, processes=2, script=Path(__file__).with_name("watched_train.py"))
    for one in shared:
        for rank in (0, 1):
            notes = torch.load(one.folder / f"notes-{rank}.pt")
            found[f"{one.name}-{rank}"] = (notes, weights(one.folder)["weights"])
    return found


def test_trap_01_the_learning_rate_counts_optimizer_steps_whatever_the_number_of_processes(noted):
    """Stepped once a process, the schedule runs as many times too fast."""
    for name in ("whole", "parts", "shared-0", "shared-1"):
        notes, _ = noted[f"single-{name}"]
        assert len(notes) == 20
        assert {len(set(note["lr"])) for note in notes} == {1}, "of all groups of parameters"
        assert [note["lr"][0] for note in notes] == pytest.approx([2.5e-4, 5e-4, 7.5e-4] + 17 * [1e-3], rel=1e-12)


def test_trap_03_processes_draw_their_own_noise(pair, home):
    """One seed on every rank makes identical noise on all of them: then the mean loss would be another one."""
    assert metrics(pair[1])[:10] == pytest.approx(metrics(pair[0])[:10], rel=1e-5)
    task = tasks.build(denoiser(home, "noise"), read_folder(home), torch.device("cpu"))
    noise = task.dataset.__getitems__([(index, 0) for index in range(8)])["noise"].flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 8


def test_trap_15_the_average_follows_on_every_process_and_the_weights_come_back(pair):
    """An average that is not updated under DDP; averaged weights left in place after validating with them."""
    for folder in pair[1:]:
        assert {name: error for name, error in apart(pair[0], folder, "ema").items() if error > 1e-5} == {}
    stored = weights(pair[1])
    assert difference({"x": stored["ema"]}, {"x": {name: stored["weights"][name] for name in stored["ema"]}}) > 1e-4


@pytest.mark.parametrize("name", ["parts", "shared-0", "shared-1"])
@pytest.mark.parametrize(("kind", "most"), [("double", 1e-12), ("single", 1e-5)])
def test_trap_21_gradients_do_not_depend_on_how_a_batch_is_split(noted, kind, most, name):
    """Accumulation normalised wrongly. In double precision only the order of sums is left to differ."""
    (whole, after), (notes, others) = noted[f"{kind}-whole"], noted[f"{kind}-{name}"]
    assert len(whole) == len(notes)
    for mine, theirs in zip(whole, notes, strict=True):
        exact, split = mine["gradient"], theirs["gradient"]
        assert exact.dtype == (torch.float64 if kind == "double" else torch.float32)
        # in fp32 the weights of later steps differ by what Adam makes of rounding
        assert ((split - exact).norm() / exact.norm()).item() <= (most if kind == "double" else 1e-4)
    first = whole[0]["gradient"]
    assert ((notes[0]["gradient"] - first).norm() / first.norm()).item() <= most
    off = {key: ((others[key] - after[key]).norm() / (1e-3 + after[key].norm())).item() for key in after}
    # softmax cancels a bias of the keys: its gradient is rounding alone, of which Adam makes whole steps
    assert {key: error for key, error in off.items() if error > most and not key.endswith("k_proj.bias")} == {}


def test_trap_13_sharded_weights_are_saved_and_read_by_any_number_of_processes(home, straight):
    """Rank-0-only saves hang under FSDP: here all processes write their part."""
    script = str(Path(__file__).with_name("sharded_train.py"))
    first = denoiser(home, "sharded", steps=3, lr_schedule="constant", validate_every=3)
    train_with(home, first, processes=2, script=script)
    stored = checkpoint.latest(first.folder / "checkpoints")
    parts = sorted(file.name for file in (stored / "weights").iterdir())
    assert len(parts) == 2, "one file a process"
    whole = denoiser(home, "unsharded", steps=6, lr_schedule="constant", validate_every=3)
    trainer.train(whole, quiet=True)
    for processes, name in ((1, "sharded-then-whole"), (2, "sharded-on")):
        run = denoiser(home, name, steps=6, lr_schedule="constant", validate_every=3)
        shutil.copytree(first.folder, run.folder)
        if processes == 1:
            trainer.train(run, quiet=True)
        else:
            train_with(home, run, processes=2, script=script)
        assert metrics(run.folder) == pytest.approx(metrics(whole.folder), rel=1e-5)
        rows = [[json.loads(line) for line in (r.folder / "validation.jsonl").open()] for r in (run, whole)]
        for mine, theirs in zip(*rows, strict=True):
            assert mine["train"]["shipped"] == pytest.approx(theirs["train"]["shipped"], rel=1e-4)
        pictures = [TextToImage.load(r.folder / "model")("red square", seed=1)[0] for r in (run, whole)]
        assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in pictures), strict=True)) <= 8
    back = denoiser(home, "whole-then-sharded", steps=6, lr_schedule="constant")
    shutil.copytree(whole.folder, back.folder)
    for step in ("step-00000006",):
        shutil.rmtree(back.folder / "checkpoints" / step)
    half = denoiser(home, "half", steps=3, lr_schedule="constant")
    trainer.train(half, quiet=True)
    shutil.copytree(half.folder / "checkpoints", back.folder / "checkpoints", dirs_exist_ok=True)
    train_with(home, back, processes=2, script=script)
    assert metrics(back.folder) == pytest.approx(metrics(whole.folder), rel=1e-5)


def test_processes_that_measure_otherwise_train_in_one_precision(home):
    run = denoiser(home, "parted", steps=2, precision="auto")
    train_with(home, run, processes=2, script=Path(__file__).with_name("parted_train.py"))
    alone = denoiser(home, "unparted", steps=2)
    trainer.train(alone, quiet=True)
    assert config.load(run.folder / "config.yaml").train.precision == "fp32"
    assert metrics(run.folder) == pytest.approx(metrics(alone.folder), rel=1e-5)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A tiny SDXL folder."""
    return save_family("sdxl", tmp_path_factory.mktemp("xl") / "base")


def of_xl(home, xl, name, **model):
    tree = dataclasses.asdict(denoiser(home, name, steps=3, lr=1e-4))
    tree |= {"output": str(xl.parent), "model": {"base": str(xl)} | model}
    tree["data"] |= {"size": 32, "upscale": True, "captions": {}}
    return config.validate(tree)


def test_sharded_sdxl_encodes_its_captions_and_is_delivered_whole(home, xl):
    whole, sharded = of_xl(home, xl, "whole"), of_xl(home, xl, "sharded")
    train_with(home, sharded, processes=2, script=Path(__file__).with_name("sharded_train.py"))
    trainer.train(whole, quiet=True)
    # random weights this large make much of rounding, and sharded ones lie in another layout, which rounds otherwise
    assert metrics(sharded.folder) == pytest.approx(metrics(whole.folder), rel=1e-3)
    assert metrics(sharded.folder)[0] == pytest.approx(metrics(whole.folder)[0], rel=1e-6)
    norms = [metrics(run.folder, "grad_norm")[0] for run in (sharded, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    settings = {"seed": 1, "steps": 2, "width": 32, "height": 32}
    pictures = [TextToImage.load(run.folder / "model")("red apple", **settings)[0] for run in (whole, sharded)]
    assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in pictures), strict=True)) <= 12


@pytest.mark.parametrize("model", [{"train_text_encoder": True}, {"lora": {"rank": 2, "text_encoder": True}}])
def test_what_takes_no_part_in_sdxl_is_not_waited_for(home, xl, model):
    """The end of its first text encoder: processes that wait for its gradient fail at the second step."""
    name = next(iter(model))
    alone, shared = of_xl(home, xl, f"{name}-1", **model), of_xl(home, xl, f"{name}-2", **model)
    task = tasks.build(alone, read_folder(home), torch.device("cpu"))
    learning = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(task.module(task.example(1)).mean(), list(learning.values()), allow_unused=True)
    assert [name for name, gradient in zip(learning, found, strict=True) if gradient is None] == []
    assert any(name.startswith("text_encoder.") for name in learning)
    trainer.train(alone, quiet=True)
    train_with(home, shared, processes=2)
    assert metrics(shared.folder) == pytest.approx(metrics(alone.folder), rel=1e-4)


def test_processes_part_in_peace():
    """What gloo's threads still hold when a process ends makes it hang or abort, now and then."""
    words = [sys.executable, str(Path(__file__).with_name("parting.py")), "12"]
    own = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines() == 12 * ["0 0"], done.stderr[-2000:]
