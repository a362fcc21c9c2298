"""What a run says of itself: validation, coverage, metrics, report, model card, dry run."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion import TextToImage, config, report, trainer
from diffusion.cli import main as cli
from diffusion.data.source import hold_out, read_folder
from diffusion.run import Run
from diffusion.tasks.text_to_image import DenoisingLoss
from diffusion.validation import History, Probe
from runs import ROOT, denoiser, difference, metrics, weights


def test_validation_leaves_training_alone_and_keeps_the_best(home, straight):
    run = denoiser(home, "validated", validate_every=2, validate_pictures=4)
    trainer.train(run, quiet=True)
    assert difference(weights(straight), weights(run.folder)) == 0
    rows = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(0 < row["train"][kind] < 10 for row in rows for kind in ("raw", "shipped"))
    assert [len(row["bins"]["train"]["raw"]) for row in rows] == [8] * 3
    assert len({row["train"]["raw"] for row in rows}) == 3
    assert TextToImage.load(run.folder / "best")("red square", steps=1, seed=0)[0].size == (16, 16)


def test_held_out_pictures_are_measured_and_never_trained_on(home, monkeypatch):
    run = denoiser(home, "held", validate_every=3)
    run.data.hold_out = 0.4
    seen = []
    forward = DenoisingLoss.forward

    def watch(self, batch):
        seen.extend(batch["id"].tolist() if self.training else [])
        return forward(self, batch)

    monkeypatch.setattr(DenoisingLoss, "forward", watch)
    trainer.train(run, quiet=True)
    kept, held_out = hold_out(read_folder(home), 0.4)
    assert 0 < len(held_out) < 10
    assert set(seen) == {picture.id for picture in kept}
    rows = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"step", "train", "held_out", "bins"}] * 2


def test_a_probe_is_the_same_each_time_and_covers_all_noise(home):
    run = denoiser(home, "probe")
    task = trainer.tasks.build(run, read_folder(home), torch.device("cpu"))
    probe = Probe(task.probe(read_folder(home)), 5)
    one, two = (probe.dataset.__getitems__(probe.visits) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (one["u"] * 8).int().tolist() == [level for level in range(8) for _ in range(5)]
    assert len(set(one["id"].tolist())) == 5


def test_overfitting_is_said_in_a_sentence(tmp_path):
    history = History(tmp_path / "validation.jsonl")
    said = []
    for step, (train, held_out) in enumerate([(1.0, 1.1), (0.8, 0.9), (0.6, 0.95), (0.5, 0.96), (0.4, 0.97)]):
        losses = {"train": {"shipped": [train]}, "held_out": {"shipped": [held_out]}}
        assert history.add(step, losses) == (step < 2)
        said.append(history.verdict())
    assert said[:4] == [None] * 4
    assert "best at step 1 (0.9000) and is now 0.9700" in said[4]
    again = History(tmp_path / "validation.jsonl")
    assert again.rows == history.rows
    again.forget_after(2)
    assert [row["step"] for row in History(tmp_path / "validation.jsonl").rows] == [0, 1, 2]


def test_metrics_go_to_tensorboard_too(home):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = denoiser(home, "boarded", log_with=["tensorboard"])
    trainer.train(run, quiet=True)
    (folder,) = {file.parent for file in run.folder.rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert logged["loss"] == pytest.approx(metrics(run.folder))
    assert {"lr", "images_per_second", "grad_norm"} <= set(logged)


def test_a_logger_that_is_not_installed_says_how_to_get_it(home, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ValueError, match="pip install wandb"):
        trainer.train(denoiser(home, "unlogged", log_with=["wandb"]), quiet=True)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a chromium to open the page in")
def test_the_report_opens_in_a_browser_and_its_slider_works(home):
    run = denoiser(home, "reported", sample_every=2, validate_every=2)
    run.name, run.data.hold_out = "a <b> & c", 0.4
    trainer.train(run, quiet=True)
    page = (run.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "one self-contained page"
    move = '<script>{ const r = document.querySelector("input"); r.value = 0; r.dispatchEvent(new Event("input")) }'
    (run.folder / "moved.html").write_text(page.replace("</html>", f"{move}</script></html>"))
    first, last = (dom(run.folder / name) for name in ("moved.html", "report.html"))
    for shown, step in ((first, 2), (last, 6)):
        assert f"<output>{step}</output>" in shown
        visible = [tag for tag in re.findall(r"<img[^>]*>", shown) if "hidden" not in tag]
        assert [f'data-step="{step}"' in tag for tag in visible] == [True]
    assert last.count("<polyline") == 13, "2 of loss, 4 validated, 2 gaps, 2 by noise level, and 3 others"
    assert "Held out minus trained on" in last
    assert "Loss by noise level" in last
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in last
    assert f"{len(hold_out(read_folder(home), 0.4)[0])} pictures, each seen" in last


def test_the_report_follows_the_checkpoints(home, monkeypatch):
    run = denoiser(home, "stopped-early", keep_every=2, sample_every=0)
    seen, save = [], Run.save

    def save_and_look(self, step):
        save(self, step)
        seen.append(re.search(r"steps done</dt><dd>(\d+)<", (run.folder / "report.html").read_text())[1])
        self.stop = step == 2

    monkeypatch.setattr(Run, "save", save_and_look)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(run, quiet=True)
    assert seen == ["2", "2"], "at a checkpoint, and when it was stopped there"
    assert "No samples yet" in (run.folder / "report.html").read_text()


def test_the_gap_and_the_bins_are_those_of_the_measurements():
    kinds = {"shipped": 1.0, "raw": 2.0}
    bins = {"train": {"shipped": [0.5, 1.5]}, "held_out": {"shipped": [1.0, 2.5]}}
    rows = [{"step": 3, "train": kinds, "held_out": {"shipped": 1.75, "raw": 2.5}, "bins": bins}]
    assert report._gap(rows) == {"shipped weights": [(3, 0.75)], "raw weights": [(3, 0.5)]}
    assert report._by_noise(rows) == {"trained on": [(1, 0.5), (2, 1.5)], "held out": [(1, 1.0), (2, 2.5)]}
    assert report._gap([{"step": 3, "train": kinds, "bins": {}}]) == {}


def dom(file):
    """The page after its script has run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_chart_has_round_ticks_around_its_points():
    assert report.ticks(0.13, 0.48) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert report.ticks(5, 5)[0] < 5 < report.ticks(5, 5)[-1]
    assert report.chart("x", {"empty": []}) == ""
    drawn = report.chart("loss", {"a": [(0, 1.0), (10, float("nan")), (20, 3.0)]})
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', drawn)[1].split()]
    assert len(points) == 2
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1], "up is more"
    assert ">2,000,000<" in report.chart("steps", {"a": [(0, 1.0), (1_900_000, 2.0)]})


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(home, straight, capsys):
    run = denoiser(home, "planned", micro_batch=2)
    run.data.hold_out, run.data.background = 0.3, "black"
    (home / "planned.yaml").write_text(config.dump(run))
    before = sorted(home.rglob("*"))
    assert cli(["train", str(home / "planned.yaml"), "--dry-run", "train.steps=60"]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert sorted(home.rglob("*")) == before
    kept = len(hold_out(read_folder(home), 0.3)[0])
    assert said["pictures"] == f"{kept} to train on, {10 - kept} held out"
    assert said["steps"] == f"60 of 8 pictures, {60 * 8 / kept:.1f} epochs"
    assert said["batch"] == "1 process x 2 pictures x 4 accumulated"
    assert f"0 of {kept} views there" in said["cache"]
    assert cli(["train", str(straight / "config.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    trained = sum(tensor.numel() for tensor in weights(straight)["ema"].values())
    assert f"{trained:,} trained of " in said
    assert "10 of 10 views there" in said
    assert "going on from step-00000006" in said
    stored = sum(file.stat().st_size for file in (straight / "checkpoints/step-00000006").iterdir())
    assert f"checkpoints  {stored / 2**30:.2f} GiB each" in said


@pytest.fixture
def album(tmp_path):
    """A few dozen pictures of all sizes and kinds, with a caption beside each."""
    folder = tmp_path / "album"
    folder.mkdir()
    kinds = [
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("RGBA", "png"),
        ("L", "webp"),
        ("P", "gif"),
        ("CMYK", "tif"),
        ("1", "bmp"),
    ]
    for n in range(28):
        mode, suffix = kinds[n % len(kinds)]
        picture = Image.new("RGB", (90 + 17 * n, 500 - 13 * n), (9 * n, 255 - 9 * n, 128))
        picture.paste("white", (20, 20, 60, 60))
        picture.convert(mode).save(folder / f"{n}.{suffix}")
        (folder / f"{n}.txt").write_text(f"my picture {n}\na card with a white square")
    return folder


def test_the_shipped_model_is_fine_tuned_on_a_folder_by_one_command(album, tmp_path, capsys):
    short = ["train.steps=4", "train.batch_size=4", "train.validate_every=2", "train.validate_pictures=2"]
    words = [f"data.path={album}", f"output={tmp_path / 'runs'}", "recipe.steps=2", *short]
    assert cli(["train", str(ROOT / "configs/finetune.yaml"), *words]) == 0
    model = Path(capsys.readouterr().out.strip())
    assert model == tmp_path / "runs/finetune/model"
    recipe = json.loads((model / "recipe.json").read_text())
    shipped = json.loads((ROOT / "assets/emoji/recipe.json").read_text())
    assert recipe["steps"] == 2
    assert recipe["guidance_scale"] == shipped["guidance_scale"], "what the config leaves open is the base model's"
    assert recipe["trained_on"].endswith(f"album, after {shipped['trained_on']}")
    assert (model.parent / "report.html").is_file()
    assert (model.parent / "best/unet").is_dir()
    card = (model / "README.md").read_text()
    assert f"trained on {recipe['trained_on']}" in card
    assert "2 steps of ddim" in card.replace("\n", " ")
    assert Image.open(model / "samples.png").size == (8 * 128, 2 * 128)
    before, after = (TextToImage.load(path)("my picture 3", seed=1, steps=2)[0] for path in ("emoji", model))
    assert before.size == after.size == (128, 128)
    assert before.tobytes() != after.tobytes()


def test_a_base_brings_its_own_parts(home):
    run = denoiser(home, "both")
    run.model.base = "emoji"
    with pytest.raises(ValueError, match=r"model\.base brings its own model\.autoencoder"):
        trainer.train(run, quiet=True)
    run.model = type(run.model)(base="emojo")
    with pytest.raises(ValueError, match="did you mean 'emoji'"):
        trainer.train(run, quiet=True)


def test_coverage_is_written_and_small_pictures_are_named(home, straight, capsys):
    rows = [json.loads(line) for line in (straight / "coverage.jsonl").read_text().splitlines()]
    assert sum(row["visits"] for row in rows) == 6 * 8
    assert len(rows) == 10
    run = denoiser(home, "big")
    run.data.size = 32
    with pytest.raises(ValueError, match=r"all 10 pictures are smaller than data\.size 32"):
        trainer.train(run, quiet=True)
