"""The loop: it learns, it is exact when split or resumed, and what it may be told to do."""

import contextlib
import copy
import dataclasses
import itertools
import json
import shutil
import subprocess
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion import (
    TextToImage,
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
from diffusion.data.dataset import to_tensor
from diffusion.data.source import read_folder
from diffusion.ema import Ema
from diffusion.images import GENERATED, XMP, read_texts
from diffusion.models import networks, text
from diffusion.models.folder import load_vae, save_network
from diffusion.models.networks import encode_pixels
from diffusion.pixels import read_pixels
from diffusion.schema import Train
from diffusion.tasks.text_to_image import DenoisingLoss
from runs import (
    ROOT,
    autoencoder,
    command,
    denoiser,
    difference,
    frozen,
    metrics,
    stop_and_go_on,
    weights,
)


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


def test_averages_that_are_turned_on_later_begin_at_the_weights(home):
    trainer.train(denoiser(home, "no-average", steps=3, ema=0), quiet=True)
    before = weights(home / "runs/no-average")["weights"]
    run = denoiser(home, "no-average", steps=4, ema=0.999)
    trainer.train(run, quiet=True)
    after, decay = weights(run.folder), 5 / 14
    for name, average in after["ema"].items():
        assert torch.allclose(average, before[name].lerp(after["weights"][name], 1 - decay), atol=1e-6), name


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


def test_multiples_of_keep_every_are_saved_and_kept(home):
    run = denoiser(home, "kept-for-good", steps=7, keep_every=2, keep_last=1)
    trainer.train(run, quiet=True)
    found = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in (2, 4, 6, 7)]


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
