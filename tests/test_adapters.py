"""Ways to train a finished model of any family, whole or by parts; the stock library reads what comes of it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion import TextToImage, config, plan, tasks, trainer
from diffusion.cli import main as cli
from diffusion.data.source import read_folder
from diffusion.models import embeddings, lora
from diffusion.models.folder import load_model
from diffusion.pixels import View
from families import FAMILIES, draw, psnr, save, stock


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A tiny model of every family, and a folder of pictures."""
    shelf = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save(family, shelf / family)
    (shelf / "pictures").mkdir()
    for n, colour in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (40 + 8 * n, 32), colour).save(shelf / f"pictures/{colour}.png")
        (shelf / f"pictures/{colour}.txt").write_text(f"{colour} apple")
    return shelf


def make(shelf, family, name, *, model=None, data=None, loss=None, **train):
    """A run of a few steps at a rate that moves pictures."""
    settings = {
        "steps": 3,
        "batch_size": 4,
        "lr": 3e-2,
        "precision": "fp32",
        "ema": 0,
        "log_every": 1,
        "sample_every": 0,
    }
    return config.validate(
        {
            "task": "text_to_image",
            "name": f"{family}-{name}",
            "output": str(shelf / "runs"),
            "data": {"path": str(shelf / "pictures"), "size": 32} | (data or {}),
            "model": {"base": str(shelf / family)} | (model or {}),
            "loss": loss or {},
            "train": settings | train,
            "recipe": {"steps": 4, "guidance_scale": 5.0, "prompts": ["red apple"]},
        }
    )


def ours(folder, prompt, seed, **load):
    return TextToImage.load(folder, **load)(prompt, seed=seed, steps=4, guidance_scale=5.0, width=32, height=32)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_what_the_stock_library_draws(shelf, family):
    picture = draw(stock(shelf / family), "red apple", 7)
    assert psnr(ours(shelf / family, "red apple", 7, dtype="fp32"), picture) > 60
    assert psnr(ours(shelf / family, "blue boat", 7), picture) < 40, "another prompt is another picture"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_gives_a_stock_folder(shelf, family):
    run = make(shelf, family, "full", model={"train_text_encoder": family != "sd2"}, lr=1e-3, weight_decay=0.0)
    folder = trainer.train(run, quiet=True)
    before, after = load_model(shelf / family), load_model(folder)
    moved = {
        name
        for name, network in before.networks.items()
        if any(
            not torch.equal(a.bfloat16(), b.bfloat16())
            for a, b in zip(network.parameters(), after.networks[name].parameters(), strict=True)
        )
    }
    texts = {"sd1": {"text_encoder"}, "sd2": set(), "sdxl": {"text_encoder", "text_encoder_2"}}[family]
    assert moved == {"unet"} | texts
    assert psnr(ours(folder, "red apple", 7), draw(stock(folder), "red apple", 7)) > 40
    assert after.prediction == ("v_prediction" if family == "sd2" else "epsilon")
    assert after.schedule.alphas_bar[-1].item() == (0.0 if family == "sd2" else pytest.approx(0.0047, abs=1e-4))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_the_same_in_the_stock_library(shelf, family, dora):
    settings = {"rank": 4, "alpha": 2.0, "dora": dora, "text_encoder": True, "kohya": True, "targets": "all"}
    run = make(shelf, family, f"lora-{dora}", model={"lora": settings})
    folder = trainer.train(run, quiet=True)
    assert not (folder / "unet").exists()
    assert "load_lora_weights" in (folder / "README.md").read_text()
    mine = ours(folder, "red apple", 7)
    base = ours(shelf / family, "red apple", 7)
    assert psnr(mine, base) < 35, "it changes pictures"
    theirs = stock(shelf / family)
    theirs.load_lora_weights(str(folder))
    assert psnr(mine, draw(theirs, "red apple", 7)) > 45
    beside = ours(shelf / family, "red apple", 7, loras={str(folder): 1.0})
    assert beside.tobytes() == mine.tobytes()
    assert ours(shelf / family, "red apple", 7, loras={str(folder): 0.0}).tobytes() == base.tobytes()
    half = ours(shelf / family, "red apple", 7, loras={str(folder): 0.5})
    assert psnr(half, base) > psnr(mine, base)
    kohya = folder / "kohya.safetensors"
    assert psnr(mine, ours(shelf / family, "red apple", 7, loras={str(kohya): 1.0})) > 55
    if not dora:
        again = stock(shelf / family)
        again.load_lora_weights(str(kohya))
        assert psnr(mine, draw(again, "red apple", 7)) > 45


def test_trap_12_alpha_is_saved_in_both_formats(shelf):
    """Alpha lost or guessed: the adapter comes back at another strength."""
    run = make(shelf, "sd1", "alpha", model={"lora": {"rank": 4, "alpha": 1.0, "kohya": True}})
    folder = trainer.train(run, quiet=True)
    with safe_open(folder / lora.FILE, "pt") as stored:
        header = json.loads(stored.metadata()["lora_adapter_metadata"])
    assert header["unet.lora_alpha"] == 1.0
    assert header["unet.r"] == 4
    alphas = [value.item() for key, value in load_file(folder / "kohya.safetensors").items() if key.endswith(".alpha")]
    assert alphas
    assert set(alphas) == {1.0}
    networks = {"unet": load_model(shelf / "sd1").unet}
    found = lora.read(folder / lora.FILE, networks).networks["unet"]
    assert {delta.alpha for delta in found.values()} == {1.0}


def test_trap_11_adapters_learn_in_float32_on_a_half_precision_model(shelf):
    """Adapters in fp16: gradients that cannot be unscaled, or that vanish."""
    network = load_model(shelf / "sd1", dtype=torch.bfloat16).unet
    lora.add(network, lora.ATTENTION, 2, 2.0)
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lora_" not in name} == {torch.bfloat16}


def test_a_lora_resumes_bit_for_bit(shelf, monkeypatch):
    from runs import difference, metrics, stop_and_go_on, weights

    whole, halved = (make(shelf, "sdxl", name, model={"lora": {"rank": 2}}, lr=1e-3, ema=0.9) for name in ("w", "h"))
    trainer.train(whole, quiet=True)
    stop_and_go_on(halved, monkeypatch, 2)
    assert difference(weights(whole.folder), weights(halved.folder)) == 0
    assert metrics(whole.folder) == metrics(halved.folder)


def test_a_lora_of_another_family_is_refused(shelf, tmp_path, capsys):
    folder = trainer.train(make(shelf, "sd1", "other", model={"lora": {"rank": 2}}), quiet=True)
    with pytest.raises(ValueError, match=r"another family of models"):
        ours(shelf / "sdxl", "red apple", 1, loras={str(folder): 1.0})
    save_file({"x.weight": torch.zeros(2, 2), "y": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="2 of 2 keys fit no layer of this model"):
        ours(shelf / "sd1", "red apple", 1, loras={str(tmp_path / "no.safetensors"): 1.0})
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    words = ["generate", "red apple", "-m", str(shelf / "sd1"), "-o", str(tmp_path / "x.png"), "--steps", "1"]
    for file, message in (("bad.safetensors", "not a safetensors file"), ("none.safetensors", "no LoRA at")):
        assert cli([*words, "--lora", str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_loras_are_asked_for_on_the_command_line_and_recorded(shelf, tmp_path, capsys):
    folder = trainer.train(make(shelf, "sd1", "cli", model={"lora": {"rank": 2}}), quiet=True)
    flags = ["--size", "32x32", "--steps", "2", "--seed", "1", "--cfg", "5", "--quiet"]

    def picture(name, *words):
        assert cli(["generate", "red apple", *flags, "-o", str(tmp_path / name), *words]) == 0
        return Image.open(tmp_path / name).tobytes()

    full, half = (picture(f"{w}.png", "-m", str(shelf / "sd1"), "--lora", f"{folder}:{w}") for w in ("1", "0.5"))
    assert full != half
    assert picture("alone.png", "-m", str(folder)) == full
    capsys.readouterr()
    assert cli(["info", str(tmp_path / "0.5.png")]) == 0
    assert '"weight": 0.5' in capsys.readouterr().out
    assert "Lora hashes" in Image.open(tmp_path / "0.5.png").info["parameters"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learnt_word_is_the_same_in_the_stock_library(shelf, family):
    words = [{"word": "<zib>", "start": "red cat", "vectors": 2}]
    data = {"captions": {"text": "<zib>", "templates": ["{}", "a photo of {}"], "dropout": 0.0}}
    run = make(shelf, family, "word", model={"words": words}, data=data, lr=0.3)
    folder = trainer.train(run, quiet=True)
    mine = ours(folder, "a photo of <zib>", 7)
    before = load_model(shelf / family)
    start = before.text_encoder.get_input_embeddings().weight[
        before.tokenizer("red cat", add_special_tokens=False).input_ids
    ]
    name, vectors = embeddings.read(folder / "words/zib.safetensors")
    assert name == "<zib>"
    assert vectors[0].shape == (2, 32)
    assert not torch.allclose(vectors[0], start, atol=0.05), "it has moved"
    theirs = stock(shelf / family)
    if family == "sdxl":
        stored = load_file(folder / "words/zib.safetensors")
        for key, tokenizer, encoder in (
            ("clip_l", "tokenizer", "text_encoder"),
            ("clip_g", "tokenizer_2", "text_encoder_2"),
        ):
            tokenizer, encoder = getattr(theirs, tokenizer), getattr(theirs, encoder)
            theirs.load_textual_inversion(stored[key], token="<zib>", tokenizer=tokenizer, text_encoder=encoder)
    else:
        theirs.load_textual_inversion(str(folder / "words/zib.safetensors"))
    assert psnr(mine, draw(theirs, "a photo of <zib>", 7)) > 45
    if family != "sdxl":
        again = stock(shelf / family)
        again.load_textual_inversion(str(folder / "words/zib-a1111.safetensors"), token="<zib>")
        assert psnr(mine, draw(again, "a photo of <zib>", 7)) > 45
    assert ours(shelf / family, "red boat", 7).tobytes() == ours(folder, "red boat", 7).tobytes(), "nothing else moved"
    beside = TextToImage.load(shelf / family, loras={str(folder / "words/zib.safetensors"): 1.0})
    assert (
        beside("a photo of <zib>", seed=7, steps=4, guidance_scale=5.0, width=32, height=32)[0].tobytes()
        == mine.tobytes()
    )


def test_words_and_adapters_learn_together(shelf):
    words = [{"word": "<zib>", "start": "red cat"}]
    data = {"captions": {"text": "<zib>"}}
    run = make(shelf, "sd1", "both", model={"words": words, "lora": {"rank": 2, "text_encoder": True}}, data=data)
    folder = trainer.train(run, quiet=True)
    assert {file.name for file in folder.rglob("*.safetensors")} == {
        lora.FILE,
        "zib.safetensors",
        "zib-a1111.safetensors",
    }
    theirs = stock(shelf / "sd1")
    theirs.load_textual_inversion(str(folder / "words/zib.safetensors"))
    theirs.load_lora_weights(str(folder))
    assert psnr(ours(folder, "<zib>", 7), draw(theirs, "<zib>", 7)) > 45


def test_a_word_that_is_known_or_starts_from_nothing_is_refused(shelf):
    for word, message in (
        ({"word": "apple</w>", "start": "cat"}, "known to the tokenizer"),
        ({"word": "<a>", "start": ""}, "a text to start from"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(make(shelf, "sd1", "refused", model={"words": [word]}), quiet=True)
    with pytest.raises(ValueError, match=r"name it in model\.base"):
        trainer.train(make(shelf, "sd1", "baseless", model={"lora": {}, "base": None}), quiet=True)


def test_dreambooth_keeps_the_prior_and_draws_it_itself(shelf, capsys):
    prior = {"prompt": "a photo of apple", "count": 6, "weight": 0.5}
    data = {"captions": {"text": "a photo of zib apple", "dropout": 0.0}, "prior": prior}
    run = make(shelf, "sd1", "booth", data=data, lr=1e-3, steps=6)
    assert "6 pictures to draw first" in trainer.describe(run)
    folder = trainer.train(run, quiet=True)
    drawn = sorted((run.folder / "prior").glob("*.png"))
    assert len(drawn) == 6
    assert Image.open(drawn[3]).tobytes() == TextToImage.load(shelf / "sd1")("a photo of apple", seed=3)[0].tobytes()
    rows = {Path(row["file"]).name: row["visits"] for row in map(json.loads, (run.folder / "coverage.jsonl").open())}
    of_prior = sum(visits for name, visits in rows.items() if name.startswith("prior"))
    assert of_prior == pytest.approx(12, abs=2), "half of 24"
    source = plan.read_source(run)
    task = tasks.build(run, source.pictures, torch.device("cpu"))
    batch = task.dataset.__getitems__([(0, 0), (len(source.pictures) - 1, 0)])
    assert batch["weight"].tolist() == [1.0, 0.5]
    plain = task.module(batch | {"weight": torch.ones(2)})
    assert torch.allclose(task.module(batch), plain * torch.tensor([1.0, 0.5]))
    drawn[2].unlink()
    assert "1 pictures to draw first" in trainer.describe(run)
    assert psnr(ours(folder, "red apple", 7), ours(shelf / "sd1", "red apple", 7)) < 60


def test_trap_07_sizes_and_crops_are_those_of_the_view_also_when_it_is_mirrored(shelf, tmp_path):
    """Latents cached with one crop and time ids from another; a flip with the corner of the picture that was not."""
    assert View(width=32, height=32, place=0.0).corner((64, 32)) == (0, 0)
    assert View(width=32, height=32, place=1.0).corner((64, 32)) == (32, 0)
    assert View(width=32, height=32, place=0.0, flip=True).corner((64, 32)) == (32, 0)
    assert View(width=32, height=32, place=0.5).corner((32, 128)) == (0, 48)
    folder = tmp_path / "wide"
    folder.mkdir()
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (64, 0, 128, 64))
    wide.save(folder / "wide.png")
    (folder / "wide.txt").write_text("red apple")
    run = make(shelf, "sdxl", "sizes", data={"path": str(folder), "crops": 2, "flip": True})
    task = tasks.build(run, read_folder(folder), torch.device("cpu"))
    picture = task.pictures[0]
    batch = task.dataset.__getitems__([(0, visit) for visit in range(40)])
    seen = set()
    for row, latents in zip(batch["sizes"].tolist(), batch["latents"], strict=True):
        assert row[:2] == [64, 128]
        assert row[4:] == [32, 32]
        seen.add((row[2], row[3]))
        views = [view for view in task._views(picture) if view.corner(picture.sides) == (row[3], row[2])]
        means = [task.encodings.latents([(picture, view)])[0] for view in views]
        assert any((latents - entry["mean"]).abs().max() < 6 * entry["std"].max() for entry in means)
    assert seen == {(0.0, 8.0), (0.0, 24.0)}


def test_the_critic_joins_when_it_is_told_to(tmp_path):
    from runs import VAE

    rows = []
    for n in range(6):
        Image.effect_noise((16, 16), 80 + n).convert("RGB").save(tmp_path / f"{n}.png")
        rows.append(json.dumps({"file_name": f"{n}.png", "text": "noise"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))

    def run(name, **loss):
        return config.validate(
            {
                "task": "autoencoder",
                "name": name,
                "output": str(tmp_path / "runs"),
                "data": {"path": str(tmp_path), "size": 16},
                "model": {"vae": VAE},
                "loss": loss,
                "train": {"steps": 6, "batch_size": 4, "lr": 1e-3, "precision": "fp32", "log_every": 1, "ema": 0},
            }
        )

    plain, late, soon = (
        run("plain"),
        run("late", adversarial=0.5, adversarial_after=100),
        run("soon", adversarial=0.5, adversarial_after=3),
    )
    folders = [trainer.train(one, quiet=True) for one in (plain, late, soon)]
    losses = [[json.loads(line)["loss"] for line in (folder.parent / "metrics.jsonl").open()] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5), "before it joins nothing changes"
    assert losses[2][:3] == pytest.approx(losses[0][:3], rel=1e-5)
    assert abs(losses[2][3] - losses[0][3]) > 0.1
    task = tasks.build(soon, read_folder(tmp_path), torch.device("cpu"))
    batch = task.dataset.__getitems__([(0, 0), (1, 0)])
    task.module(batch).mean().backward()
    x, drawn = batch["pixels"], torch.randn(2, 3, 16, 16, requires_grad=True)
    judge = task.module.critic
    judge.zero_grad()
    contest = task.module._contest(judge, x, drawn, None)
    contest.sum().backward()
    fooled = drawn.grad.clone()
    assert fooled.abs().max() > 0
    drawn.grad = None
    (-0.5 * judge(drawn).flatten(1).mean(1)).sum().backward()
    assert torch.allclose(fooled, drawn.grad, atol=1e-7), "the autoencoder hears the critic alone, not its training"
    assert not any("critic" in name for name in load_file(folders[2] / "vae/diffusion_pytorch_model.safetensors"))
