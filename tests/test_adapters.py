"""Ways to train a finished model of any family, whole or by parts; the stock library reads what comes of it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion import TextToImage, config, objectives, plan, rng, tasks, trainer
from diffusion.cli import main as cli
from diffusion.data.source import read_folder
from diffusion.models import embeddings, lora
from diffusion.models.folder import Forward, load_model
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


def test_an_xl_lora_of_kohya_has_the_names_of_the_original_unet(shelf, tmp_path):
    """What sd-scripts writes: its U-Net for XL is that of the original format, and so are the names of its layers."""
    run = make(shelf, "sdxl", "kohya", model={"lora": {"rank": 2, "kohya": True, "targets": "all"}})
    folder = trainer.train(run, quiet=True)
    keys = {key.split(".")[0] for key in load_file(folder / "kohya.safetensors")}
    for layer in (
        "input_blocks_1_0_in_layers_2",
        "input_blocks_3_0_skip_connection",
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "middle_block_2_out_layers_3",
        "output_blocks_1_1_proj_out",
    ):
        assert f"lora_unet_{layer}" in keys
    assert not any("down_blocks" in key or "up_blocks" in key or "mid_block" in key for key in keys)
    theirs, ours_ = stock(shelf / "sdxl"), ours(folder, "red apple", 7)
    theirs.load_lora_weights(str(folder / "kohya.safetensors"))
    assert psnr(ours_, draw(theirs, "red apple", 7)) > 45
    tensors = load_file(folder / "kohya.safetensors")
    network = load_model(shelf / "sdxl").unet
    read = lora.read(folder / "kohya.safetensors", {"unet": network})
    assert read.keys == len(tensors) == 3 * len(read.networks["unet"])
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    first, none = (f"lora_unet_input_blocks_{block}_1_proj_in" for block in (3, 9))
    stray = {f"{none}.{part}": tensors[f"{first}.{part}"].clone() for part in parts}
    save_file(tensors | stray, tmp_path / "stray.safetensors")
    with pytest.raises(ValueError, match=r"3 of \d+ keys fit no layer of this model"):
        lora.read(tmp_path / "stray.safetensors", {"unet": network})


def test_the_dora_that_is_shipped_trains(shelf):
    pictures = {"data.path": shelf / "pictures", "data.size": 32, "output": shelf / "runs", "model.base": shelf / "sd1"}
    short = {"train.steps": 2, "train.batch_size": 2, "train.precision": "fp32", "recipe.prompts": "[red apple]"}
    overrides = [f"{name}={value}" for name, value in (pictures | short).items()]
    run = config.load(Path(__file__).parents[1] / "configs/dora.yaml", [*overrides, "recipe.steps=2"])
    folder = trainer.train(run, quiet=True)
    assert any("lora_magnitude_vector" in key for key in load_file(folder / lora.FILE))
    theirs = stock(shelf / "sd1")
    theirs.load_lora_weights(str(folder))
    assert psnr(ours(folder, "red apple", 7), draw(theirs, "red apple", 7)) > 45


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


def test_words_of_which_one_begins_like_another_keep_their_own_vectors(shelf):
    words = [
        {"word": "zib", "start": "red", "vectors": 2},
        {"word": "zib_dog", "start": "blue"},
        {"word": "zib_1x", "start": "cat"},
    ]
    run = make(shelf, "sdxl", "words", model={"words": words}, data={"captions": {"text": "zib"}}, lr=0.0, steps=1)
    folder = trainer.train(run, quiet=True)
    assert {file.name for file in (folder / "words").iterdir()} == {
        f"{word}{tail}.safetensors" for word in ("zib", "zib_dog", "zib_1x") for tail in ("", "-a1111")
    }
    before = load_model(shelf / "sdxl")
    for word in words:
        name, tables = embeddings.read(folder / f"words/{word['word']}.safetensors", word["word"])
        for tokenizer, encoder, vectors in zip(before.tokenizers, before.text_encoders, tables, strict=True):
            ids = tokenizer(word["start"], add_special_tokens=False).input_ids
            start = encoder.get_input_embeddings().weight[[ids[n % len(ids)] for n in range(word.get("vectors", 1))]]
            assert torch.equal(vectors, start), name
    ours(folder, "zib zib_dog zib_1x", 7)


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


def prior_run(shelf, name, model="sd1", **prior):
    data = {"captions": {"text": "zib apple", "dropout": 0.0}, "prior": {"prompt": "apple", "count": 3} | prior}
    return make(shelf, model, name, data=data)


def test_a_prior_folder_that_is_not_there_is_an_error(shelf, tmp_path):
    for path, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no picture has")):
        run = prior_run(shelf, "pathless", path=str(path))
        for begin in (trainer.describe, lambda run: trainer.train(run, quiet=True)):
            with pytest.raises(ValueError, match=f"{path}: {message}"):
                begin(run)
    assert not run.folder.exists()


def test_a_prior_that_was_drawn_otherwise_is_drawn_again(shelf, tmp_path):
    """Another prompt, another model, a cut file; and no more of them than are asked for."""
    from diffusion.tasks.prior import draw_missing, missing

    run = prior_run(shelf, "redrawn", count=4)
    draw_missing(run, quiet=True)
    assert missing(run) == []
    file = run.folder / "prior/prior-00001.png"
    before = file.read_bytes()
    run.data.prior.prompt = "a photo of boat"
    assert missing(run) == [0, 1, 2, 3]
    draw_missing(run, quiet=True)
    assert missing(run) == []
    assert file.read_bytes() != before
    base, run.model.base = run.model.base, str(shelf / "sd2")
    assert missing(run) == [0, 1, 2, 3]
    run.model.base = base
    file.write_bytes(before[:100])
    assert missing(run) == [1]
    Image.new("RGB", (32, 32)).save(run.folder / "prior/prior-00002.png")
    assert missing(run) == [1, 2], "a picture that does not say what drew it is none of these"
    draw_missing(run, quiet=True)
    run.data.prior.count = 2
    names = [p.file.name for p in plan.read_source(run).pictures if p.file.name.startswith("prior")]
    assert names == ["prior-00000.png", "prior-00001.png"]


def test_all_pictures_of_a_prior_that_is_given_are_taken(shelf):
    run = prior_run(shelf, "given", path=str(shelf / "pictures"), count=1)
    prior = [p for p in plan.read_source(run).pictures if p.plain]
    assert [p.text for p in prior] == ["apple"] * 4
    assert "0 pictures to draw first" in trainer.describe(run)


def batches_of(shelf, run):
    """A task, and a batch of its own pictures and of the prior's at different noise levels."""
    from diffusion.tasks.prior import draw_missing

    draw_missing(run, quiet=True)
    pictures = plan.read_source(run).pictures
    task = tasks.build(run, pictures, torch.device("cpu"))
    batch = task.dataset.__getitems__([(place, 0) for place in range(len(pictures))])
    times = torch.linspace(0.02, 0.98, len(pictures), dtype=torch.float64)
    return task, batch | {"u": torch.cat([times[::2], times[1::2]])}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_trap_10_min_snr_weighs_every_loss_of_a_batch_the_priors_too(shelf, family):
    """A prior whose loss is added without the weight that the pictures of the subject have."""
    plain, weighed = (prior_run(shelf, f"snr-{kind}", family, weight=0.5) for kind in ("plain", "weighed"))
    weighed.loss.weighting, weighed.loss.gamma = "min_snr", 3.0
    (one, batch), (other, _) = (batches_of(shelf, run) for run in (plain, weighed))
    schedule = one.model.schedule
    alpha, sigma = schedule.level_at(schedule.time_from_unit(batch["u"]))
    by_hand = objectives.loss_weight("min_snr", one.model.prediction, alpha, sigma, 3.0)
    assert batch["weight"].tolist() == [1.0] * 4 + [0.5] * 3
    assert min(by_hand[:4].std(), by_hand[4:].std()) > 0.1, "it matters for both"
    with torch.no_grad():
        torch.testing.assert_close(other.module(batch).double(), one.module(batch) * by_hand, rtol=1e-5, atol=0)


def test_the_density_of_times_is_that_of_the_config(shelf):
    plain, dense = (prior_run(shelf, f"density-{kind}") for kind in ("plain", "dense"))
    dense.loss.density, dense.loss.density_mean, dense.loss.density_std = "logit_normal", 1.0, 0.5
    (one, batch), (other, _) = (batches_of(shelf, run) for run in (plain, dense))
    moved = objectives.unit_time("logit_normal", batch["u"], 1.0, 0.5)
    with torch.no_grad():
        assert torch.equal(other.module(batch), one.module(batch | {"u": moved}))
        assert not torch.allclose(other.module(batch), one.module(batch))


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
    entries = {view: task.encodings.latents([(picture, view)])[0] for view in task._views(picture)}
    batch = task.dataset.__getitems__([(0, visit) for visit in range(40)])
    seen, shown = set(), set()
    for visit, (row, latents) in enumerate(zip(batch["sizes"].tolist(), batch["latents"], strict=True)):
        assert row[:2] == [64, 128]
        assert row[4:] == [32, 32]
        seen.add((row[2], row[3]))
        drawn = torch.from_numpy(rng.normal(run.seed, "posterior", [picture.id], [visit], shape=latents.shape))[0]
        (view,) = (view for view, one in entries.items() if torch.equal(latents, one["mean"] + one["std"] * drawn))
        assert view.corner(picture.sides) == (row[3], row[2])
        shown.add(view)
    assert shown == set(entries), "each of the four is told apart"
    assert seen == {(0.0, 8.0), (0.0, 24.0)}


# --- flow matching ----------------------------------------------------------------------------------------------------


def flow_run(home, name, **train):
    """A U-Net and its text encoder from nothing, on the straight path."""
    from runs import denoiser

    run = denoiser(home, name, save_dtype="fp32", **train)
    run.model.prediction, run.model.beta_schedule, run.model.zero_terminal_snr = "flow", "scaled_linear", False
    return config.validate(json.loads(json.dumps(asdict(run))))


def test_a_flow_is_trained_on_the_straight_path_and_told_a_thousand_sigma(home):
    run = flow_run(home, "straight-path")
    task = tasks.build(run, plan.read_source(run).pictures, torch.device("cpu"))
    batch, heard = task.dataset.__getitems__([(place, 0) for place in range(4)]), []
    task.model.unet.register_forward_pre_hook(lambda _, given: heard.append(given))
    task.model.unet.register_forward_hook(lambda _, given, output: heard.append(output[0]))
    with torch.no_grad():
        losses = task.module(batch)
    (x, t), output = heard
    sigma, x0, noise = batch["u"].view(-1, 1, 1, 1).float(), batch["latents"], batch["noise"]
    torch.testing.assert_close(t, 1000 * batch["u"])
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise)
    torch.testing.assert_close(losses, (output - (noise - x0)).square().mean(dim=(1, 2, 3)), check_dtype=False)


def test_a_flow_learns_and_the_stock_pipeline_draws_the_same(home):
    folder = trainer.train(flow_run(home, "flow", steps=120, lr=3e-3), quiet=True)
    losses = [json.loads(line)["loss"] for line in (folder.parent / "metrics.jsonl").open()]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    model = TextToImage.load(folder, dtype="fp32")
    assert model.model.forward == Forward(prediction="flow")
    mine = model("red square", seed=7, steps=8, guidance_scale=3.0, sampler="euler", schedule="discrete")[0]
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    for pipeline in (theirs, model.to_diffusers()):
        assert psnr(mine, draw(pipeline, "red square", 7, steps=8, guidance=3.0, side=16)) > 40
    other = model("blue square", seed=7, steps=8, guidance_scale=3.0, sampler="euler", schedule="discrete")[0]
    assert psnr(mine, other) < 40


def test_a_flow_of_another_kind_is_refused():
    stock_flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    assert Forward.from_diffusers(stock_flow | {"shift": 3.0}) == Forward(prediction="flow", shift=3.0)
    assert Forward.from_diffusers(stock_flow).to_diffusers()["shift"] == 1.0
    for name, value in (("use_dynamic_shifting", True), ("invert_sigmas", True), ("shift_terminal", 0.1)):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            Forward.from_diffusers(stock_flow | {name: value})


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
