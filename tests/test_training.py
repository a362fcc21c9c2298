"""The loop: it learns, it is exact when split or resumed, and it stops before a NaN spreads."""

import contextlib
import copy
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
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion import (
    TextToImage,
    checkpoint,
    config,
    memory,
    optimizers,
    plan,
    rng,
    schema,
    tasks,
    trainer,
    validation,
)
from diffusion import run as run_module
from diffusion.cli import main as cli
from diffusion.data.dataset import to_tensor
from diffusion.data.order import Order
from diffusion.data.source import group_weights, read_folder
from diffusion.ema import Ema
from diffusion.images import GENERATED, XMP, read_texts
from diffusion.models import networks, text
from diffusion.models.folder import load_vae, save_network
from diffusion.models.networks import encode_pixels
from diffusion.pixels import read_pixels
from diffusion.schema import Train
from diffusion.tasks.text_to_image import DenoisingLoss
from families import save as save_family
from runs import (
    ROOT,
    autoencoder,
    command,
    denoiser,
    difference,
    metrics,
    stop_and_go_on,
    train_with,
    weights,
)
from watched_train import watched


def test_the_autoencoder_learns_and_its_latents_have_unit_variance(home):
    rows = [json.loads(line) for line in (home / "runs/ae/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    vae = load_vae(home / "runs/ae/model")
    pixels = torch.cat([to_tensor(read_pixels(p.file, 16)[None]) for p in read_folder(home)])
    mean, _ = encode_pixels(vae, pixels)
    assert mean.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (mean.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    assert vae.config.scaling_factor == 1.0


def test_a_decoder_alone_learns_on_and_latents_stay(home):
    run = autoencoder(home)
    run.name, run.model.vae, run.model.train_encoder = "decoder", None, False
    with pytest.raises(ValueError, match=r"model\.vae"):
        trainer.train(run, quiet=True)
    run.model.base = str(home / "runs/ae/model")
    trainer.train(run, quiet=True)
    before, after = (dict(load_vae(home / f"runs/{name}/model").named_parameters()) for name in ("ae", "decoder"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "post_quant_conv"}
    rows = [json.loads(line) for line in (home / "runs/decoder/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_what_train_writes_generate_reads(straight):
    model = TextToImage.load(straight / "model")
    assert model.model.recipe.steps == 2
    (image,) = model("red square", seed=1)
    assert image.size == (16, 16)
    assert {p.name for p in straight.iterdir()} >= {"config.yaml", "metrics.jsonl", "model", "samples", "checkpoints"}
    assert config.load(straight / "config.yaml").folder == straight
    for file in (*(straight / "samples").iterdir(), straight / "model/samples.png"):
        assert GENERATED in read_texts(file)[0][XMP], "what a run draws is marked as what generate draws"


@pytest.mark.parametrize(("stop_after", "micro_batch"), [(1, None), (4, None), (3, 2)])
def test_trap_02_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(home, monkeypatch, stop_after, micro_batch):
    """Resuming skips the wrong data, replays the first epoch, or skips too much with accumulation."""
    whole = denoiser(home, f"whole-{micro_batch}", micro_batch=micro_batch)
    trainer.train(whole, quiet=True)
    run = denoiser(home, f"stopped-{stop_after}", micro_batch=micro_batch)
    stop_and_go_on(run, monkeypatch, stop_after)
    assert difference(weights(whole.folder), weights(run.folder)) == 0
    assert metrics(run.folder) == metrics(whole.folder)
    assert len(metrics(whole.folder)) == 6


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ("muon", "torch"),
        ("adafactor", "torch"),
        ("prodigy", "prodigyopt"),
        ("schedule_free", "schedulefree"),
        ("adamw8bit", "bitsandbytes"),
    ],
)
def test_every_optimizer_learns_and_resumes_bit_for_bit(home, monkeypatch, optimizer, package):
    pytest.importorskip(package)
    rate = {"prodigy": 1.0, "adafactor": 1e-2}.get(optimizer, 3e-3)
    options = {"optimizer": optimizer, "lr": rate, "lr_schedule": "constant", "steps": 30, "ema": 0}
    whole, halved = (denoiser(home, f"{optimizer}-{name}", **options) for name in ("whole", "halved"))
    trainer.train(whole, quiet=True)
    stop_and_go_on(halved, monkeypatch, 17)
    assert difference(weights(whole.folder), weights(halved.folder)) == 0
    assert metrics(whole.folder) == metrics(halved.folder)
    losses = metrics(whole.folder)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_an_optimizer_that_is_not_installed_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="pip install prodigyopt"):
        trainer.train(denoiser(home, "missing", optimizer="prodigy"), quiet=True)


def test_muon_is_pytorchs_on_matrices_and_takes_kernels_in_either_layout():
    torch.manual_seed(0)
    linear, plain, last = torch.nn.Linear(48, 96, bias=False), torch.nn.Conv2d(32, 64, 3), torch.nn.Conv2d(32, 64, 3)
    stock, flat = copy.deepcopy(linear), torch.nn.Linear(32 * 9, 64, bias=False)
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    flat.weight.data = plain.weight.detach().flatten(1).clone()
    train = Train(optimizer="muon", lr=0.1, weight_decay=0.01)
    ours = optimizers.build(torch.nn.ModuleList([linear, plain, last]), train)
    theirs = torch.optim.Muon([stock.weight, flat.weight], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    start = linear.weight.detach().clone()
    for _ in range(3):
        linear.weight.grad = torch.randn_like(linear.weight)
        stock.weight.grad = linear.weight.grad.clone()
        plain.weight.grad = torch.randn(plain.weight.shape)
        flat.weight.grad = plain.weight.grad.flatten(1).clone()
        last.weight.grad = plain.weight.grad.contiguous(memory_format=torch.channels_last)
        plain.bias.grad, last.bias.grad = torch.ones(64), torch.ones(64)
        ours.step()
        theirs.step()
    for mine, reference in ((linear, stock.weight), (plain, flat.weight), (last, flat.weight)):
        error = (mine.weight.flatten(1) - reference).norm() / (stock.weight - start).norm()
        assert error < 0.05  # bfloat16 rounds otherwise in another layout
    assert torch.allclose(plain.bias, last.bias)
    assert ours.state[plain.bias]["exp_avg"].shape == (64,)  # a vector is AdamW's


def test_accumulation_changes_nothing(home, straight):
    run = denoiser(home, "accumulated", micro_batch=2)
    trainer.train(run, quiet=True)
    assert metrics(run.folder) == pytest.approx(metrics(straight), rel=1e-5)
    assert metrics(run.folder, "grad_norm") == pytest.approx(metrics(straight, "grad_norm"), rel=1e-4)


def test_trap_04_no_worker_has_random_state_of_its_own(home, straight):
    """Random states of ranks and workers are saved for the main one alone, or not at all."""
    run = denoiser(home, "workers", workers=2)
    trainer.train(run, quiet=True)
    assert difference(weights(straight), weights(run.folder)) == 0


@pytest.fixture(scope="module")
def pair(home):
    """The folders of one run by one process, and by two that a second run of one resumes, and the other way round."""

    def run(name, steps):
        return denoiser(home, name, steps=steps, warmup=4, lr_schedule="constant", validate_every=10)

    folders = [run("one_process", 20).folder]
    trainer.train(run("one_process", 20), quiet=True)
    for name, first, then in (("two_then_one", 2, 1), ("one_then_two", 1, 2)):
        train_with(home, run(name, 10), first)
        train_with(home, run(name, 20), then)
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

    found = {}
    for kind in ("single", "double"):
        whole, parts, shared = run(f"{kind}-whole"), run(f"{kind}-parts", 4), run(f"{kind}-shared")
        for one in (whole, parts):
            with watched(double=kind == "double") as notes:
                trainer.train(one, quiet=True)
            found[one.name] = (notes, weights(one.folder)["weights"])
        train_with(home, shared, 2, Path(__file__).with_name("watched_train.py"))
        for rank in (0, 1):
            notes = torch.load(shared.folder / f"notes-{rank}.pt")
            found[f"{shared.name}-{rank}"] = (notes, weights(shared.folder)["weights"])
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


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_instant_ends_as_if_it_never_was(home, kills):
    """By SIGKILL, at instants drawn from the time that a run takes; checkpoints are being written all the while."""
    options = {"steps": 60, "checkpoint_minutes": 1e-4, "sample_every": 20}
    whole, killed = denoiser(home, "unharmed", **options), denoiser(home, f"killed-{kills}", **options)
    words, environment = command(home, whole)
    start = time.monotonic()
    train_with(home, whole, 1)
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
    train_with(home, killed, 1)
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


@pytest.mark.parametrize(
    ("schedule", "values"), [("constant", [1, 1]), ("linear", [0.5, 0.125]), ("cosine", [0.5, 0.0380602])]
)
def test_learning_rate(schedule, values):
    train = Train(lr=1.0, steps=90, warmup=10, lr_schedule=schedule)
    assert plan.learning_rate(train, 0) == pytest.approx(0.1)
    assert plan.learning_rate(train, 9) == pytest.approx(1)
    assert [plan.learning_rate(train, step) for step in (50, 80)] == pytest.approx(values)


def test_pictures_of_any_shape_train_in_buckets(home, tmp_path, monkeypatch):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for n, size in enumerate([(40, 40), (80, 20), (20, 80), (48, 48), (64, 16), (10, 10)]):
        Image.new("RGB", size, (n * 40, 0, 200)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    run = denoiser(home, "buckets")
    run.data.path, run.data.buckets, run.data.bucket_step, run.data.flip = str(folder), True, 8, True
    run.data.bucket_ratio, run.data.captions.fillers, run.data.captions.keywords = 4.0, [], 0.0
    seen = set()
    forward = DenoisingLoss.forward

    def watch(self, batch):
        seen.add(tuple(batch["latents"].shape))
        return forward(self, batch)

    monkeypatch.setattr(DenoisingLoss, "forward", watch)
    model = trainer.train(run, quiet=True)
    assert seen == {(8, 4, 8, 8), (8, 4, 4, 16), (8, 4, 16, 4)}
    assert "16x16: 2, 32x8: 2" in trainer.describe(run)
    rows = [json.loads(line) for line in (run.folder / "coverage.jsonl").read_text().splitlines()]
    assert sum(row["visits"] for row in rows) == 6 * 8
    assert [row["left_out"] for row in rows if "left_out" in row] == ["10x10 is smaller than 16x16"]
    assert TextToImage.load(model)("picture 1", steps=1, width=24, height=8)[0].size == (24, 8)
    run.name, run.data.bucket_step = "buckets-of-1", 1
    with pytest.raises(ValueError, match="bucket_step 1 is not a multiple of this model's"):
        trainer.train(run, quiet=True)


def test_gradient_checkpointing_changes_nothing(home, straight):
    run = denoiser(home, "recomputed", gradient_checkpointing=True)
    trainer.train(run, quiet=True)
    assert difference(weights(straight), weights(run.folder)) < 1e-5


def test_offset_noise_and_input_perturbation_are_keyed_and_reach_the_loss(home, straight):
    run = denoiser(home, "noisy")
    run.loss.offset_noise, run.loss.input_perturbation = 0.3, 0.2
    trainer.train(run, quiet=True)
    assert metrics(run.folder)[0] != metrics(straight)[0]
    task = trainer.tasks.build(run, read_folder(home), torch.device("cpu"))
    batch = task.dataset.__getitems__([(0, 0), (1, 3)])
    plain = trainer.tasks.build(denoiser(home, "plain"), read_folder(home), torch.device("cpu"))
    added = batch["noise"] - plain.dataset.__getitems__([(0, 0), (1, 3)])["noise"]
    assert added.std(dim=(2, 3)).max() < 1e-6, "the same for every place of a channel"
    assert added.mean(dim=(2, 3)).abs().min() > 0
    alone = task.dataset.__getitems__([(1, 3)])
    assert all(torch.equal(alone[name][0], batch[name][1]) for name in batch)
    blind = batch | {"perturbation": torch.zeros_like(batch["perturbation"])}
    assert not torch.equal(task.module(batch), task.module(blind))


def test_ema_follows_and_is_put_back():
    module = torch.nn.Linear(2, 1)
    ema = Ema(module, 0.9)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    ema.update(module, 10_000)
    assert torch.allclose(ema.weights["weight"], before + 0.1)
    seen = []
    with contextlib.suppress(KeyError), ema.applied(module):
        seen.append(module.weight.detach().clone())
        raise KeyError
    assert torch.equal(seen[0], ema.weights["weight"])
    assert torch.equal(module.weight, before + 1)
    ema.update(module, 1)  # early on it forgets fast: decay 2 / 11
    assert torch.allclose(ema.weights["weight"], before + 0.1 + 0.9 * 9 / 11)


def test_ema_may_take_many_steps_at_once():
    often, seldom = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    averages = [Ema(module.requires_grad_(), 0.9, every) for module, every in ((often, 1), (seldom, 4))]
    for module, average in zip((often, seldom), averages, strict=True):
        average.weights["weight"].zero_()
        module.weight.data.fill_(1.0)
        for step in range(10_001, 10_009):
            average.update(module, step)
    assert averages[0].weights["weight"].item() == pytest.approx(1 - 0.9**8)
    assert averages[1].weights["weight"].item() == pytest.approx(1 - 0.9**8)


def frozen(home, name, **data):
    """A run that trains the U-Net of a finished model, with captions that can be counted."""
    run = denoiser(home, name)
    run.model.base = str(home / "runs/straight/model")
    run.model = type(run.model)(base=run.model.base)
    run.data.captions.keywords, run.data.captions.fillers = 0.0, []
    run.data.captions.templates = ["{}", "a {}"]
    for field, value in data.items():
        setattr(run.data, field, value)
    return run


def test_what_is_encoded_once_equals_what_is_encoded_at_every_visit(home, straight):
    kept, live = frozen(home, "kept", flip=True, crops=2), frozen(home, "live", flip=True, crops=2, cache=False)
    for run in (kept, live):
        trainer.train(run, quiet=True)
    assert metrics(live.folder) == pytest.approx(metrics(kept.folder), rel=1e-5)
    batch = tasks.build(kept, read_folder(home), torch.device("cpu")).dataset.__getitems__([(0, 0), (1, 0)])
    assert batch["context"].shape == (2, 12, 16)
    assert "tokens" not in batch
    assert "40 of 40 views there, 21 of 21 captions" in trainer.describe(kept), (
        "2 flips x 2 crops; 2 templates and none"
    )


def test_captions_are_encoded_again_when_they_or_their_encoder_change(home, straight, monkeypatch):
    run = frozen(home, "recaptioned")
    run.output = str(home.parent / "runs-captions")
    trainer.train(run, quiet=True)
    run.name, run.data.captions.trigger = "retriggered", "sks"
    assert "1 of 21 captions" in trainer.describe(run), "the empty one"
    run.data.captions.trigger = ""
    other = config.validate(json.loads(json.dumps(dataclasses.asdict(run))))
    other.model.base = str(home.parent / "runs-captions/recaptioned/model")
    assert "21 of 21 captions" in trainer.describe(other), "the text encoder was frozen: it is the same"


def test_auto_batch_takes_what_fits_and_changes_nothing(home, straight, monkeypatch, capsys):
    run = denoiser(home, "fitted", auto_batch=True)
    state, _, _ = plan.state_bytes(tasks.build(run, read_folder(home), torch.device("cpu")), run.train)
    task = tasks.build(run, read_folder(home), torch.device("cpu"))
    one, two = (memory.saved_bytes(lambda n=n: task.module(task.example(n)).mean()) for n in (1, 2))
    assert 1.8 < two / one < 2.2
    monkeypatch.setattr(memory, "free_bytes", lambda device: state + int(2.6 * one))
    trainer.train(run)
    assert "auto_batch: 2 pictures at a time of 8 a step" in capsys.readouterr().err
    assert metrics(run.folder) == pytest.approx(metrics(straight), rel=1e-5)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert memory.largest_micro_batch(8, lambda n: task.module(task.example(n)).mean(), torch.device("cpu"), 0) == 1


def test_quiet_keeps_only_what_is_warned_of(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation.History, "verdict", lambda _: "it overfits")
    for steps in (2, 4):  # begun, with nothing encoded yet, and gone on with
        run = denoiser(home, "quiet", steps=steps, validate_every=2, auto_batch=True)
        run.output = str(tmp_path)
        trainer.train(run, quiet=True)
        out, err = capsys.readouterr()
        left_out, verdict = err.splitlines()
        assert (out, verdict) == ("", "it overfits")
        assert left_out.endswith("; coverage.jsonl names all")
    run = denoiser(home, "quiet", steps=5)
    run.output = str(tmp_path)
    trainer.train(run)
    said = capsys.readouterr().err
    assert f"resuming {run.folder} at step 4" in said
    assert "steps 4 to 5 of quiet" in said


def test_trap_13_sharded_weights_are_saved_and_read_by_any_number_of_processes(home, straight):
    """Rank-0-only saves hang under FSDP: here all processes write their part."""
    script = str(Path(__file__).with_name("sharded_train.py"))
    first = denoiser(home, "sharded", steps=3, lr_schedule="constant", validate_every=3)
    train_with(home, first, 2, script)
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
            train_with(home, run, 2, script)
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
    train_with(home, back, 2, script)
    assert metrics(back.folder) == pytest.approx(metrics(whole.folder), rel=1e-5)


def test_trap_05_latents_and_captions_stay_with_their_picture_in_buckets(home, straight, tmp_path):
    """A shuffle of buckets out of step with caches that are indexed by step: the wrong caption for an image."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for n, size in enumerate([(32, 32), (64, 16), (16, 64), (48, 48), (80, 20)]):
        Image.new("RGB", size, (50 * n, 255 - 50 * n, 90)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    run = frozen(home, "aligned", path=str(folder), buckets=True, bucket_step=8, bucket_ratio=4.0)
    run.data.captions.templates, run.data.captions.dropout = [], 0.0
    pictures = read_folder(folder)
    task = tasks.build(run, pictures, torch.device("cpu"))
    feed = plan.feed(run, plan.read_source(run), task)
    seen = set()
    for batch in itertools.islice(feed.batches(task.dataset, 0, 12, plan.share(run, 0, 1)), 12):
        for place, (one, number) in enumerate(zip(batch["id"].tolist(), batch["visit"].tolist(), strict=True)):
            (picture,) = (picture for picture in pictures if picture.id == one)
            pixels = to_tensor(picture.pixels(task._views(picture)[0])[None])
            mean, std = networks.to_latents(task.model.vae, pixels)
            drawn = torch.from_numpy(rng.normal(0, "posterior", [one], [number], shape=mean.shape[1:]))
            assert torch.allclose(batch["latents"][place], (mean + std * drawn)[0], atol=1e-4)
            said = text.encode(task.model, text.tokenize(task.model, [picture.text]))["context"]
            assert torch.allclose(batch["context"][place], said[0], atol=1e-4)
            seen.add(one)
    assert len(seen) == 5


def test_trap_08_dropped_captions_are_the_encoded_empty_prompt_and_only_in_training(home, straight):
    """Dropout by zero vectors, or while validating."""
    run = frozen(home, "dropped")
    run.data.captions.dropout = 1.0
    task = tasks.build(run, read_folder(home), torch.device("cpu"))
    empty = text.encode(task.model, text.tokenize(task.model, [""]))["context"]
    context = task.dataset.__getitems__([(0, 0), (1, 0)])["context"]
    assert torch.allclose(context, empty.expand(2, -1, -1), atol=1e-5)
    assert context.abs().max() > 0.1
    probe = task.probe(read_folder(home)).__getitems__([(0, 0), (1, 0)])
    assert torch.equal(probe["tokens"], text.tokenize(task.model, [p.text for p in read_folder(home)[:2]])["tokens"])


def test_trap_09_latents_are_shifted_and_scaled_and_back(home):
    """An autoencoder's shift_factor or scaling_factor forgotten."""
    vae = load_vae(home / "runs/ae/model")
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    plain, _ = encode_pixels(vae, pixels)
    before = networks.decode(vae, plain)
    vae.register_to_config(shift_factor=0.5, scaling_factor=0.25)
    mean, std = networks.to_latents(vae, pixels)
    assert torch.allclose(mean, (plain - 0.5) * 0.25, atol=1e-6)
    assert torch.allclose(std, encode_pixels(vae, pixels)[1] * 0.25)
    again = networks.decode(vae, mean)
    assert max(abs(a - b) for a, b in zip(before[0].tobytes(), again[0].tobytes(), strict=True)) <= 1


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


def test_trap_17_a_set_smaller_than_a_batch_trains(home):
    """A division by zero, or everything dropped."""
    run = denoiser(home, "few", batch_size=32, steps=2)
    trainer.train(run, quiet=True)
    rows = [json.loads(line) for line in (run.folder / "coverage.jsonl").open()]
    assert sum(row["visits"] for row in rows) == 64
    assert {row["visits"] for row in rows} == {6, 7}


def test_trap_23_weights_that_are_mapped_into_memory_are_not_written_over(straight, tmp_path):
    """Rewriting a safetensors file that is still mapped corrupts it for whoever reads it."""
    folder = tmp_path / "vae"
    shutil.copytree(straight / "model/vae", folder)
    mapped = load_file(folder / "diffusion_pytorch_model.safetensors")
    before = {name: tensor.clone() for name, tensor in mapped.items()}
    vae = load_vae(tmp_path)
    for parameter in vae.parameters():
        parameter.data += 1
    save_network(vae, folder, torch.bfloat16)
    assert all(torch.equal(mapped[name], before[name]) for name in before)
    assert not torch.equal(load_vae(tmp_path).quant_conv.weight.float(), before["quant_conv.weight"].float())
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o044 == 0o044, "others may read it"


def test_validation_measures_pictures_of_any_shape(home, straight, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for n, size in enumerate([(32, 32), (64, 16), (16, 64)]):
        Image.new("RGB", size, (50 * n, 255 - 50 * n, 90)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    run = frozen(home, "probed-shapes", path=str(folder), buckets=True, bucket_step=8, bucket_ratio=4.0)
    run.data.captions.templates, run.train.validate_every = [], 3
    trainer.train(run, quiet=True)
    rows = [json.loads(line) for line in (run.folder / "validation.jsonl").open()]
    assert all(len(row["bins"]["train"]["raw"]) == 8 and row["train"]["raw"] > 0 for row in rows)


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


def test_averages_that_are_turned_on_later_begin_at_the_weights(home):
    trainer.train(denoiser(home, "no-average", steps=3, ema=0), quiet=True)
    before = weights(home / "runs/no-average")["weights"]
    run = denoiser(home, "no-average", steps=4, ema=0.999)
    trainer.train(run, quiet=True)
    after, decay = weights(run.folder), 5 / 14
    for name, average in after["ema"].items():
        assert torch.allclose(average, before[name].lerp(after["weights"][name], 1 - decay), atol=1e-6), name


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
    words, environment = command(tmp_path, run, 2)
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


def test_auto_precision_is_decided_once_for_a_run(home, monkeypatch, capsys):
    """Measured anew at each start, a run would go on in another precision whenever the machine is busy."""
    whole, halved = denoiser(home, "in-bf16", precision="bf16"), denoiser(home, "in-auto", precision="auto")
    trainer.train(whole, quiet=True)
    measured = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(trainer, "fast_dtype", lambda device: next(measured))
    trainer.train(dataclasses.replace(halved, train=dataclasses.replace(halved.train, keep_every=3)), quiet=True)
    shutil.rmtree(halved.folder / "checkpoints/step-00000006")
    trainer.train(halved, quiet=True)
    assert config.load(halved.folder / "config.yaml").train.precision == "bf16"
    assert difference(weights(whole.folder), weights(halved.folder)) == 0
    shutil.rmtree(halved.folder / "checkpoints/step-00000006")
    capsys.readouterr()
    trainer.train(denoiser(home, "in-auto", precision="fp32"))
    assert "at step 3, from here on in fp32 and not in bf16" in capsys.readouterr().err
    assert config.load(halved.folder / "config.yaml").train.precision == "fp32"


def test_processes_that_measure_otherwise_train_in_one_precision(home):
    run = denoiser(home, "parted", steps=2, precision="auto")
    train_with(home, run, 2, Path(__file__).with_name("parted_train.py"))
    alone = denoiser(home, "unparted", steps=2)
    trainer.train(alone, quiet=True)
    assert config.load(run.folder / "config.yaml").train.precision == "fp32"
    assert metrics(run.folder) == pytest.approx(metrics(alone.folder), rel=1e-5)


@pytest.mark.parametrize(("network", "argument"), [("unet", "dropout"), ("text_encoder", "attention_dropout")])
def test_dropout_that_no_run_could_repeat_is_refused(home, network, argument):
    run = denoiser(home, "dropout")
    setattr(run.model, network, getattr(run.model, network) | {argument: 0.1})
    with pytest.raises(ValueError, match=rf"model\.{network}: {argument} 0\.1 .*set it to 0"):
        trainer.train(run, quiet=True)


@pytest.fixture(scope="module")
def xl(home):
    """A tiny SDXL folder."""
    return save_family("sdxl", home / "runs-xl/base")


def of_xl(home, xl, name, **model):
    tree = dataclasses.asdict(denoiser(home, name, steps=3, lr=1e-4))
    tree |= {"output": str(home / "runs-xl"), "model": {"base": str(xl)} | model}
    tree["data"] |= {"size": 32, "upscale": True, "captions": {}}
    return config.validate(tree)


def test_sharded_sdxl_encodes_its_captions_and_is_delivered_whole(home, xl):
    whole, sharded = of_xl(home, xl, "whole"), of_xl(home, xl, "sharded")
    train_with(home, sharded, 2, Path(__file__).with_name("sharded_train.py"))
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
    train_with(home, shared, 2)
    assert metrics(shared.folder) == pytest.approx(metrics(alone.folder), rel=1e-4)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(home, straight, monkeypatch):
    run = frozen(home, "small")
    run.model = dataclasses.replace(run.model, lora=schema.Lora(rank=2))
    whole = dataclasses.replace(run, name="small-whole")
    trainer.train(whole, quiet=True)
    stop_and_go_on(run, monkeypatch, 3)
    assert difference(weights(whole.folder), weights(run.folder)) == 0
    assert metrics(whole.folder) == metrics(run.folder)
    stored = weights(run.folder)
    assert set(stored["weights"]) == set(stored["ema"])
    assert all("lora_" in name for name in stored["weights"])


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


def test_multiples_of_keep_every_are_saved_and_kept(home):
    run = denoiser(home, "kept-for-good", steps=7, keep_every=2, keep_last=1)
    trainer.train(run, quiet=True)
    found = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in (2, 4, 6, 7)]


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


@pytest.mark.parametrize(
    "name", ["emoji", *(pytest.param(f"emoji_{n}", marks=pytest.mark.slow) for n in ("autoencoder", "decoder"))]
)
def test_the_emoji_configs_go_on_bit_for_bit_after_a_kill(tmp_path, name):
    prompts = config.load(ROOT / "configs/emoji.yaml").recipe.prompts
    rows = []
    for n, prompt in enumerate(prompts[:6]):
        Image.effect_noise((128, 128), 60 + 20 * n).convert("RGB").save(tmp_path / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": prompt, "keywords": prompt.split(), "base": str(n // 2)})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = [f"data.path={tmp_path}", f"output={tmp_path}/runs", "train.compile=false", "train.batch_size=2"]
    few += ["train.steps=4", "train.log_every=1", "train.keep_every=2", "train.precision=fp32"]
    source = {"emoji": "model.autoencoder", "emoji_decoder": "model.base"}
    few += [f"{source[name]}={ROOT / 'assets/emoji'}"] if name in source else []
    few += [f"recipe.prompts=[{prompts[0]}]", "recipe.steps=1"] if name == "emoji" else []
    whole, killed = (config.load(ROOT / f"configs/{name}.yaml", [*few, f"name={end}"]) for end in ("whole", "killed"))
    trainer.train(whole, quiet=True)
    words, environment = command(tmp_path, killed)
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums are split otherwise by another number
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (killed.folder / "checkpoints/step-00000002").is_dir() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    shutil.rmtree(killed.folder / "checkpoints/step-00000004", ignore_errors=True)  # if the kill came late
    trainer.train(killed, quiet=True)
    assert difference(weights(whole.folder), weights(killed.folder)) == 0
    assert metrics(whole.folder) == metrics(killed.folder)
