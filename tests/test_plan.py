"""What a run finds out before it trains: what it will see, what it leaves out, and what this machine lacks."""

import json
import os
import sys

import pytest
from PIL import Image

from diffusion import checkpoint, config, memory, plan, trainer
from diffusion.models.folder import load_vae
from runs import autoencoder, denoiser


@pytest.fixture
def album(tmp_path):
    """Six pictures with captions of every kind, of which two are held out by their metadata."""
    folder = tmp_path / "10_red car"
    folder.mkdir()
    rows = []
    for n in range(6):
        Image.new("RGB", (16, 16), (n * 40, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
        rows.append({"file_name": f"{n}.png", "text": f"row {n}", "split": "held_out" if n > 3 else "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def reading(folder, **data):
    data = {"path": str(folder), "size": 16} | data
    tree = {"task": "text_to_image", "name": "x", "output": str(folder / "runs"), "data": data}
    return config.validate(tree)


@pytest.mark.parametrize(
    "captions",
    [{}, {"text": "a thing"}, {"source": "file"}, {"source": "folder"}, {"source": "txt"}]
    + [{"source": source, "text": "a thing"} for source in ("metadata", "txt", "file")],
)
@pytest.mark.parametrize("listing", ["jsonl", "csv", "jsonl without captions"])
def test_what_is_held_out_stays_so_whatever_captions_say(album, captions, listing):
    rows = [json.loads(line) for line in (album / "metadata.jsonl").read_text().splitlines()]
    if listing == "csv":
        (album / "metadata.jsonl").unlink()
        lines = ["file_name,text,split", *(",".join(row.values()) for row in rows)]
        (album / "metadata.csv").write_text("\n".join(lines))
    elif listing != "jsonl" and ("text" in captions or captions.get("source", "metadata") != "metadata"):
        slim = [{key: value for key, value in row.items() if key != "text"} for row in rows]
        (album / "metadata.jsonl").write_text("\n".join(map(json.dumps, slim)))
    source = plan.read_source(reading(album, captions=captions))
    assert {p.file.name for p in source.held_out} == {"4.png", "5.png"}
    assert {p.file.name for p in source.pictures} == {"0.png", "1.png", "2.png", "3.png"}
    if "text" in captions:
        assert {p.texts for p in (*source.pictures, *source.held_out)} == {("a thing",)}
        assert {p.keywords for p in source.pictures} == {()}


def test_a_listing_holds_out_a_picture_by_whatever_way_leads_to_it(album):
    (album / "way").symlink_to(album)
    rows = [{"file_name": "way/4.png", "split": "held_out"}, {"file_name": "./0.png"}, {"file_name": "way/../5.png"}]
    (album / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = plan.read_source(reading(album, captions={"source": "txt"}))
    assert [p.file.name for p in source.held_out] == ["4.png"]
    source = plan.read_source(reading(album, captions={"text": "x"}))
    assert {p.file.name for p in source.pictures} == {"0.png", "5.png"}
    assert {file[len(str(album)) + 1 :] for file in source.left_out} == {"1.png", "2.png", "3.png", "way"}


def ledger(run, tmp_path):
    source = plan.read_source(run)
    file = tmp_path / "coverage.jsonl"
    plan.feed(run, source, task=None).write_coverage(file, 8, [])
    return {row["file"]: row for row in map(json.loads, file.read_text().splitlines())}, source


def test_every_picture_that_is_not_trained_on_is_in_the_ledger_with_its_reason(album, tmp_path, monkeypatch):
    deep, closed = album / "deep", album / "closed"
    for folder in (deep, closed, album / ".cache", album / "runs/x/samples"):
        folder.mkdir(parents=True)
    for name in ("extra.png", "._0.png", ".hidden.jpg", "deep/more.webp", ".cache/small.png", "runs/x/samples/1.png"):
        Image.new("RGB", (16, 16)).save(album / name, format="PNG")
    for suffix in (".heic", ".avif", ".TGA", ".jxl", ".md"):
        (album / f"phone{suffix}").write_bytes(b"no picture that is read")
    (album / "gone.png").symlink_to(tmp_path / "nothing.png")
    (album / "more").symlink_to(tmp_path / "nowhere")
    (deep / "up").symlink_to(album)
    (album / "round.png").symlink_to(album / "round.png")
    scandir = os.scandir

    def refuse(path):
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    Image.new("RGB", (12, 16)).save(album / "3.png")
    rows, source = ledger(reading(album), tmp_path)
    reasons = {name[len(str(album)) + 1 :]: row.get("left_out") for name, row in rows.items()}
    assert reasons == {
        "0.png": None,
        "1.png": None,
        "2.png": None,
        "3.png": "12x16 is smaller than 16x16",
        "4.png": "held out by its split in the metadata",
        "5.png": "held out by its split in the metadata",
        "extra.png": "is not listed in the metadata",
        "deep/more.webp": "is not listed in the metadata",
        "._0.png": "is hidden: its name, or its folder's, begins with a dot",
        ".hidden.jpg": "is hidden: its name, or its folder's, begins with a dot",
        ".cache/small.png": "is hidden: its name, or its folder's, begins with a dot",
        **{
            f"phone{kind}": f"is of a kind that is not read: {kind.lower()} (read are .png, .jpg, .jpeg, .webp, .bmp, "
            ".tif, .tiff, .gif)"
            for kind in (".heic", ".avif", ".TGA", ".jxl")
        },
        "gone.png": "is a link to nothing",
        "round.png": "is a link to nothing",
        "more": "is a link to nothing",
        "deep/up": f"is the folder {album}, which is read there",
        "closed": "cannot be read (Permission denied)",
    }
    assert all(rows[name]["visits"] == 0 for name in rows if "left_out" in rows[name])
    assert sum(row["visits"] for row in rows.values()) == 8
    assert source.note().startswith("15 of 20 pictures are left out, first ")
    assert "data.upscale=true takes those that are too small" in source.note()


def test_a_picture_that_is_held_out_by_its_name_is_in_the_ledger_too(album, tmp_path):
    rows, source = ledger(reading(album, hold_out=0.5), tmp_path)
    reasons = [row["left_out"] for row in rows.values() if "left_out" in row]
    assert reasons.count("held out by data.hold_out 0.5") == len(source.held_out) - 2 > 0
    assert source.note() is None, "what is held out is counted as such"


def test_linked_folders_are_read_once(tmp_path):
    shelf, album = tmp_path / "shelf", tmp_path / "album"
    for folder in (shelf / "inner", album / "own"):
        folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(shelf / "inner/a.png")
    Image.new("RGB", (16, 16)).save(album / "own/b.png")
    for link, target in (("all", shelf), ("again", shelf), ("a-first", album / "own")):
        (album / link).symlink_to(target)
    (shelf / "inner/back").symlink_to(shelf)
    source = plan.read_source(reading(album, captions={"text": "x"}))
    names = [p.file.relative_to(album).as_posix() for p in source.pictures]
    assert names == ["again/inner/a.png", "own/b.png"]
    assert {name[len(str(album)) + 1 :] for name in source.left_out} == {"all", "a-first", "again/inner/back"}


# --- an autoencoder reads no captions ---------------------------------------------------------------------------------


def test_an_autoencoder_learns_from_bare_pictures(tmp_path):
    for n in range(4):
        Image.effect_noise((16, 16), 40 + n).convert("RGB").save(tmp_path / f"{n}.png")
    run = autoencoder(tmp_path)
    run.train.steps = 2
    load_vae(trainer.train(run, quiet=True))
    (tmp_path / "metadata.csv").write_text("file_name,split,kind\n0.png,test,x\n1.png,,x\n2.png,,y\n3.png,,y\n")
    run.data.balance, run.data.balance_power = "kind", 1.0
    source = plan.read_source(run)
    assert [p.file.name for p in source.held_out] == ["0.png"]
    assert [p.group for p in source.pictures] == ["x", "y", "y"]


# --- a dry run refuses what training refuses --------------------------------------------------------------------------


def faults(run):
    """What a dry run and training say against a run: the same."""
    said = []
    for begin in (trainer.describe, lambda run: trainer.train(run, quiet=True)):
        with pytest.raises(ValueError, match=r"\w") as error:
            begin(run)
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0]


def test_a_dry_run_refuses_what_this_machine_lacks(home, straight, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "fp16 is slow and wrong on the CPU" in faults(denoiser(home, "refused", precision="fp16"))
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    assert "pip install prodigyopt" in faults(denoiser(home, "refused", optimizer="prodigy"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "train.log_with wandb is not installed" in faults(denoiser(home, "refused", log_with=["wandb"]))
    assert not (home / "runs/refused").exists()


def test_a_dry_run_refuses_a_folder_that_cannot_be_written(home, straight):
    run = denoiser(home, "refused")
    run.output = str(home / "metadata.jsonl")
    assert f"output {run.output}/refused cannot be written" in faults(run)


def test_a_dry_run_refuses_a_run_that_cannot_go_on(home, straight):
    before = sorted(file for file in straight.rglob("*") if file.is_file())
    assert "begun with train.batch_size=8" in faults(denoiser(home, "straight", batch_size=4))
    assert "at step 6 already, beyond train.steps 2" in faults(denoiser(home, "straight", steps=2))
    assert sorted(file for file in straight.rglob("*") if file.is_file()) == before
    assert "going on from step-00000006" in trainer.describe(denoiser(home, "straight"))
    assert checkpoint.latest(straight / "checkpoints").name == "step-00000006"


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(home, straight):
    run = denoiser(home, "dry", validate_every=3)
    said = trainer.describe(run)
    for name in ("model/", "samples/", "checkpoints/", "metrics.jsonl", "report.html", "validation.jsonl", "best/"):
        assert name in said
    assert f"{home}/runs/cache/" in said
    assert "left out     none" in said
    assert not run.folder.exists()


def test_a_dry_run_of_giants_is_told_and_not_tried(home, straight, monkeypatch):
    run = denoiser(home, "giant")
    assert "too little free" not in trainer.describe(run)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**15)
    assert "for which this machine has too little free" in trainer.describe(run)
    run.data.size, run.data.upscale = 100_000, True
    with pytest.raises(ValueError, match="recipe: width 100000 is too large"):
        trainer.describe(run)


def test_a_prior_of_shards_is_refused():
    tree = {"task": "text_to_image", "name": "x", "data": {"path": "a-{0..3}.tar", "prior": {"prompt": "a dog"}}}
    with pytest.raises(ValueError, match=r"data\.prior: has no effect with shards"):
        config.validate(tree)
