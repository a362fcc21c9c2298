"""What a run refuses before it begins, and how it stops: with its state saved, and one line said."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion import (
    checkpoint,
    config,
    tasks,
    trainer,
)
from diffusion import run as run_module
from diffusion.cli import main as cli
from diffusion.data.order import Order
from diffusion.data.source import group_weights, read_folder
from diffusion.models.folder import load_vae, save_network
from diffusion.tasks.text_to_image import DenoisingLoss
from families import save as save_family
from runs import (
    autoencoder,
    command,
    denoiser,
    difference,
    frozen,
    metrics,
    train_with,
    weights,
)


def test_an_optimizer_that_is_not_installed_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="pip install prodigyopt"):
        trainer.train(denoiser(home, "missing", optimizer="prodigy"), quiet=True)


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_instant_ends_as_if_it_never_was(home, kills):
    """By SIGKILL, at instants drawn from the time that a run takes; checkpoints are being written all the while."""
    options = {"steps": 60, "checkpoint_minutes": 1e-4, "sample_every": 20}
    whole, killed = denoiser(home, "unharmed", **options), denoiser(home, f"killed-{kills}", **options)
    words, environment = command(home, whole)
    start = time.monotonic()
    train_with(home, whole, processes=1)
    length = time.monotonic() - start
    words, environment = command(home, killed)
    deaths, chance = 0, random.Random(kills)
    while deaths < kills:
        process = subprocess.Popen(words, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=length * chance.uniform(0.3, 0.9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        deaths += process.returncode != 0
        if process.returncode == 0:
            shutil.rmtree(killed.folder / "checkpoints")  # done: once more from the start
    train_with(home, killed, processes=1)
    assert difference(weights(whole.folder), weights(killed.folder)) == 0
    for name in ("metrics.jsonl", "coverage.jsonl"):
        rows = [[json.loads(line) for line in (run.folder / name).read_text().splitlines()] for run in (whole, killed)]
        for row in itertools.chain(*rows):
            row.pop("images_per_second", None)
        assert rows[0] == rows[1]
    assert not list((killed.folder / "checkpoints").glob(".stage*"))


def test_a_loss_that_is_not_finite_stops_before_the_update(home, monkeypatch):
    run = denoiser(home, "nan")
    forward = DenoisingLoss.forward
    calls = []

    def break_third(self, batch):
        calls.append(1)
        losses = forward(self, batch)
        return losses * torch.where(torch.arange(len(losses)) == 5, float("nan"), 1.0) if len(calls) == 3 else losses

    monkeypatch.setattr(DenoisingLoss, "forward", break_third)
    with pytest.raises(FloatingPointError, match=r"step 2.* look at ") as caught:
        trainer.train(run, quiet=True)
    order = Order(0, group_weights(read_folder(home), 0.0))
    poisoned = read_folder(home)[order.visits(16, 24)[5][0]].file
    assert str(caught.value).endswith(f"look at {poisoned}"), "the one picture whose loss is not a number"
    assert all(torch.isfinite(tensor).all() for tensor in weights(run.folder)["weights"].values())


def test_trap_20_captions_that_do_not_fit_are_refused_before_training(home):
    """Captions past the encoder's length are cut in silence."""
    run = denoiser(home, "long")
    run.data.captions.trigger = "a trigger that takes more tokens than the encoder reads"
    with pytest.raises(ValueError, match=r"10 pictures do not fit, first .*red\.png: longer than the 10 tokens"):
        trainer.train(run, quiet=True)


def test_a_batch_that_does_not_split_is_refused(home):
    with pytest.raises(ValueError, match="does not split"):
        trainer.train(denoiser(home, "odd", micro_batch=3), quiet=True)


def test_trap_14_latents_that_are_not_finite_are_refused_and_named(home, straight, tmp_path):
    """An autoencoder that overflows in half precision: NaN latents are replaced by zeros, or trained on."""
    base = tmp_path / "broken"
    shutil.copytree(straight / "model", base)
    vae = load_vae(base)
    vae.quant_conv.weight.data.fill_(float("nan"))
    save_network(vae, base / "vae")
    run = frozen(home, "overflow")
    run.model.base = str(base)
    with pytest.raises(FloatingPointError, match=r"latents of .*\.png and others are not finite"):
        trainer.train(run, quiet=True)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"sampler": "dpmpp2mm"}, "unknown sampler"),
        ({"steps": 5000}, "noise levels"),
        ({"prompts": ["a b c " * 9]}, "tokens"),
    ],
)
def test_a_recipe_that_cannot_be_drawn_is_told_before_training(home, recipe, message):
    run = denoiser(home, "bad-recipe")
    for name, value in recipe.items():
        setattr(run.recipe, name, value)
    with pytest.raises(ValueError, match=f"recipe: .*{message}"):
        trainer.train(run, quiet=True)
    assert not run.folder.exists()


def test_a_run_cannot_go_on_as_another_one(home):
    run = denoiser(home, "identity", steps=4)
    trainer.train(run, quiet=True)
    before = (run.folder / "config.yaml").read_text()
    for change, message in (
        ({"batch_size": 4}, r"begun with train\.batch_size=8 and cannot go on with 4"),
        ({"optimizer": "muon"}, r"train\.optimizer='adamw'"),
        ({"steps": 2}, r"at step 4 already, beyond train\.steps 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(denoiser(home, "identity", **({"steps": 4} | change)), quiet=True)
    assert (run.folder / "config.yaml").read_text() == before
    trainer.train(denoiser(home, "identity", steps=6, lr=1e-4), quiet=True)


def test_a_base_keeps_its_forward_process(home, straight):
    run = frozen(home, "forward")
    run.model.beta_schedule = "cosine"
    with pytest.raises(ValueError, match=r"model\.base brings its own model\.beta_schedule"):
        trainer.train(run, quiet=True)


def damaged(home, tmp_path, position, **train):
    """A run of two pictures a step that meets a damaged one at a position of its order, and the file of its config."""
    folder = tmp_path / "album"
    shutil.copytree(home, folder, ignore=shutil.ignore_patterns("runs*", "*.yaml"))
    run = autoencoder(home)
    run.name, run.data.path, run.output, run.data.upscale = "unreadable", str(folder), str(tmp_path / "runs"), True
    run.train = dataclasses.replace(run.train, steps=20, batch_size=2, **train)
    pictures = read_folder(folder)
    file = pictures[Order(0, group_weights(pictures, 0.0)).visits(position, position + 1)[0][0]].file
    file.write_bytes(file.read_bytes()[:60])
    return run, file


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_in_the_loop_saves_and_exits_with_1(home, tmp_path, capsys, workers):
    run, file = damaged(home, tmp_path, 6, workers=workers)
    (tmp_path / "run.yaml").write_text(config.dump(run))
    assert cli(["train", str(tmp_path / "run.yaml")]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "train.py:" in line]
    assert said.startswith(f"train.py: {file}: cannot be read as a picture")
    assert checkpoint.latest(run.folder / "checkpoints").name == "step-00000003"


def test_a_picture_that_another_process_cannot_read_stops_all_of_them(home, tmp_path):
    run, file = damaged(home, tmp_path, 5)
    words, environment = command(tmp_path, run, processes=2)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=home)
    assert done.returncode != 0
    assert done.stderr.count(f"train.py: {file}: cannot be read as a picture") == 1
    assert "gloo" not in done.stderr.lower()
    assert checkpoint.latest(run.folder / "checkpoints").name == "step-00000002"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_with_workers_saves_and_goes_on(home, number):
    run = denoiser(home, f"interrupted-{number}", workers=1, micro_batch=1, steps=3000, sample_every=0)
    words, environment = command(home, run)
    with subprocess.Popen(
        words,
        env=environment,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not (run.folder / "metrics.jsonl").is_file() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said[-500:]
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert checkpoint.latest(run.folder / "checkpoints") is not None
    assert "stopped" not in (page := (run.folder / "report.html").read_text())
    assert "Training loss" in page


@pytest.mark.parametrize(("network", "argument"), [("unet", "dropout"), ("text_encoder", "attention_dropout")])
def test_dropout_that_no_run_could_repeat_is_refused(home, network, argument):
    run = denoiser(home, "dropout")
    setattr(run.model, network, getattr(run.model, network) | {argument: 0.1})
    with pytest.raises(ValueError, match=rf"model\.{network}: {argument} 0\.1 .*set it to 0"):
        trainer.train(run, quiet=True)


def test_a_whole_checkpoint_of_before_is_read_and_another_base_refused(home, straight, tmp_path):
    run = frozen(home, "rebased")
    run.train.steps = 3
    trainer.train(run, quiet=True)
    path = checkpoint.latest(run.folder / "checkpoints")
    task = tasks.build(run, read_folder(home), torch.device("cpu"))
    found = checkpoint.read(path)
    assert not any(name.startswith("text_encoder") for name in found.tensors["weights"])
    groups = found.tensors | {"weights": task.module.state_dict() | found.tensors["weights"]}
    state = {name: value for name, value in found.state.items() if name not in ("frozen", "precision")}
    checkpoint.write(path.parent, 3, checkpoint.Checkpoint(groups, state))
    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=4))
    trainer.train(longer, quiet=True)
    assert metrics(run.folder) == pytest.approx(metrics(run.folder))
    assert len(metrics(run.folder)) == 4
    base = tmp_path / "base"
    shutil.copytree(straight / "model", base)
    file = base / "text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    longer.model.base, longer.train.steps = str(base), 5
    with pytest.raises(ValueError, match=r"was begun on other weights than those that model\.base has now"):
        trainer.train(longer, quiet=True)


def test_a_base_of_another_shape_is_refused_in_one_line(home, straight, tmp_path, capsys):
    run = frozen(home, "reshaped")
    run.train.steps = 2
    trainer.train(run, quiet=True)
    run.model.base, run.train.steps = str(save_family("sd1", tmp_path / "sd1")), 3
    run.data.captions.trigger = ""
    run.recipe.prompts, run.recipe.steps = ["red apple"], 1
    (tmp_path / "run.yaml").write_text(config.dump(run))
    capsys.readouterr()
    assert cli(["train", str(tmp_path / "run.yaml")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "train.py:" in line]
    assert "holds other networks than these: " in said
    assert "set model.base back, or give the run another name" in said


def test_a_disk_that_is_too_full_is_told_before_training(home, monkeypatch, capsys):
    run = denoiser(home, "no-room")
    (home / "no-room.yaml").write_text(config.dump(run))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    assert cli(["train", str(home / "no-room.yaml")]) == 2
    assert "a checkpoint and the model take 1 MB and 0 MB are free; make room" in capsys.readouterr().err
    assert not run.folder.exists()


@pytest.mark.parametrize("breaks", [7, 3])
def test_a_gradient_of_fp16_that_never_becomes_finite_stops_the_run(home, monkeypatch, breaks):
    """The scaler passes over a step that overflows; without an end to that the run would do nothing, and not say so."""
    accelerator_of, prepare = trainer._accelerator, trainer.prepare

    def with_scaler(config):
        accelerator = accelerator_of(config)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def broken(accelerator, module, optimizer_of):
        counted = itertools.count()
        weight = next(p for p in module.parameters() if p.requires_grad)
        weight.register_hook(lambda g: g * float("nan") if 2 <= next(counted) < 2 + breaks else g)
        return prepare(accelerator, module, optimizer_of)

    monkeypatch.setattr(trainer, "_accelerator", with_scaler)
    monkeypatch.setattr(trainer, "prepare", broken)
    monkeypatch.setattr(run_module, "PATIENCE", 5)
    run = denoiser(home, f"overflowing-{breaks}", steps=12)
    if breaks < 5:
        trainer.train(run, quiet=True)
        assert len(metrics(run.folder)) == 12
        return
    with pytest.raises(FloatingPointError, match="step 6: the gradient is not finite for 5 steps in a row"):
        trainer.train(run, quiet=True)
    assert checkpoint.latest(run.folder / "checkpoints").name == "step-00000006"
