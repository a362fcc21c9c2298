"""Sets in tar shards, read as streams: what is read when, by whom, and how a run goes on."""

import io
import json
import tarfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Thread

import pytest
import torch
from PIL import Image

from diffusion import config, plan, trainer
from diffusion.data.feed import Share, ahead
from diffusion.data.shards import ShardFeed, find_shards, read_shard
from diffusion.data.source import is_held_out
from runs import denoiser, difference, metrics, stop_and_go_on, train_with, weights

COLOURS = ["red", "green", "blue", "yellow", "black", "cyan", "magenta", "orange"]


def write_shard(file, samples):
    """``samples``: (key, suffix -> content)."""
    with tarfile.open(file, "w") as tar:
        for key, parts in samples:
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def png(colour, side=16):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Four shards of 3, 4, 5 and 6 pictures."""
    for n in range(4):
        samples = [
            (f"p{n}{k}", {"png": png(COLOURS[k]), "txt": f"{COLOURS[k]} picture".encode()}) for k in range(3 + n)
        ]
        write_shard(tmp_path / f"set-{n}.tar", samples)
    return str(tmp_path / "set-{0..3}.tar")


class Names:
    """A dataset whose batches are names and visit numbers."""

    def collate(self, visited):
        return {
            "id": torch.tensor([picture.id for picture, _ in visited]),
            "visited": [(p.file.name, n) for p, n in visited],
        }


def steps_of(feed, steps, process=0, processes=1, micro=8):
    share = Share(batch_size=8, micro_batch=micro, process=process, processes=processes)
    batches = [batch["visited"] for batch in feed.batches(Names(), 0, steps, share)]
    each = 8 // processes // micro
    return [list(chain(*batches[start : start + each])) for start in range(0, len(batches), each)]


def test_every_picture_comes_once_an_epoch_whoever_reads_it(shards):
    urls = find_shards(shards)
    assert [url[-9:] for url in urls] == [f"set-{n}.tar" for n in range(4)]
    whole = steps_of(ShardFeed(urls=urls, seed=0, batch_size=8), 30)
    seen = Counter(visit for step in whole for visit in step)
    assert max(seen.values()) == 1, "no visit twice"
    for name in {name for name, _ in seen}:
        assert {visit for other, visit in seen if other == name} >= {0, 1, 2}
    for processes, micro in ((2, 4), (4, 1), (1, 2)):
        shares = [
            steps_of(ShardFeed(urls=urls, seed=0, batch_size=8), 30, rank, processes, micro)
            for rank in range(processes)
        ]
        assert [sorted(chain(*parts)) for parts in zip(*shares, strict=True)] == [sorted(step) for step in whole]
    assert steps_of(ShardFeed(urls=urls, seed=1, batch_size=8), 30) != whole
    with pytest.raises(ValueError, match="cut it into a multiple of 3 shards"):
        ShardFeed(urls=urls, seed=0, batch_size=12).check(3)


def test_a_feed_goes_on_where_it_was_for_any_number_of_processes(shards):
    make = partial(ShardFeed, urls=find_shards(shards), seed=3, batch_size=8)
    whole = steps_of(make(), 20)
    halves = [make() for _ in range(2)]
    for rank, feed in enumerate(halves):
        steps_of(feed, 7, rank, 2, 4)
    states = json.loads(json.dumps([feed.state() for feed in halves]))
    alone = make()
    alone.load(states)
    assert steps_of(alone, 13) == whole[7:]
    again = [make(), make()]
    for feed in again:
        feed.load(states)
    rest = [steps_of(feed, 13, rank, 2, 4) for rank, feed in enumerate(again)]
    assert [sorted(a + b) for a, b in zip(*rest, strict=True)] == [sorted(step) for step in whole[7:]]


def test_what_cannot_be_used_is_left_out_by_name(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            ("good", {"png": png("red"), "json": json.dumps({"caption": ["a", "b"]}).encode()}),
            ("mute", {"png": png("red")}),
            ("latin", {"png": png("red"), "txt": "grün".encode("latin-1")}),
            ("half", {"png": png("red"), "json": b'{"text": "half \\ud83d"}'}),
            ("words", {"txt": b"no picture"}),
            ("broken", {"jpg": b"not a picture", "txt": b"broken"}),
            ("small", {"png": png("red", 8), "txt": b"small"}),
            ("cut", {"png": png("red")[:-30], "txt": b"cut"}),
        ],
    )
    data = {"path": str(tmp_path / "a.tar"), "size": 16, "cache": False}
    run = config.validate({"task": "text_to_image", "name": "x", "data": data, "train": {"batch_size": 8}})
    source = plan.read_source(run)
    assert [(p.file.name, p.texts) for p in source.pictures] == [("good.png", ("a", "b"))]
    feed = source.shards
    steps_of(feed, 2)
    file = tmp_path / "coverage.jsonl"
    feed.write_coverage(file, 16, [feed.state()])
    rows = {row["file"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert rows[str(tmp_path / "a.tar")]["visits"] == 16
    assert {name[6:]: row["left_out"] for name, row in rows.items() if "left_out" in row} == {
        "mute": "has no caption: neither .txt, nor text or caption in .json",
        "latin": "has a .txt that cannot be read ('utf-8' codec can't decode byte 0xfc in position 2: "
        "invalid start byte)",
        "half": r"'half \ud83d' holds half a character (a lone surrogate): write it anew",
        "words": "holds no picture, only txt",
        "broken": "a.tar/broken.jpg: cannot be read as a picture (none of PNG, JPEG, WEBP, BMP, TIFF, GIF)",
        "small": "8x8 is smaller than 16x16",
        "cut": "a.tar/cut.png: cannot be read as a picture (image file is truncated)",
    }
    write_shard(tmp_path / "b.tar", [("small", {"png": png("red", 8), "txt": b"small"})])
    run.data.path = str(tmp_path / "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar: no picture with a caption of at least 16x16"):
        plan.read_source(run)
    for path, message in (
        *(("d.tar", "no such shard"), ("pipe:cat x.tar", "would run a command")),
        *((f"z-0{end}", f"z-0{end}': shards are plain .tar files, uncompressed") for end in (".tar.gz", ".tgz")),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards(path if ":" in path else str(tmp_path / path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: whole[:900], "unexpected end of data"),
        (lambda whole: b"", "empty file"),
        (lambda whole: b"no tar", "."),
    ],
)
def test_a_shard_that_is_cut_is_named_in_one_line(tmp_path, content, reason):
    write_shard(tmp_path / "c.tar", [("good", {"png": png("red", 64), "txt": b"red"})])
    (tmp_path / "c.tar").write_bytes(content((tmp_path / "c.tar").read_bytes()))
    with pytest.raises(OSError, match=rf"^\S+/c\.tar: cannot be read as a shard \([^(<]*{reason}[^(<]*\)$") as error:
        list(read_shard(str(tmp_path / "c.tar")))
    assert "\n" not in str(error.value)


def test_an_address_that_gives_nothing_is_named():
    with pytest.raises(OSError, match=r"^http://127.0.0.1:9/a.tar: cannot .* \(nothing comes from this address\)$"):
        list(read_shard("http://127.0.0.1:9/a.tar"))


def test_an_autoencoder_learns_from_shards_without_captions(tmp_path):
    write_shard(tmp_path / "a.tar", [(colour, {"png": png(colour)}) for colour in COLOURS])
    data = {"path": str(tmp_path / "a.tar"), "size": 16, "cache": False}
    run = config.validate({"task": "autoencoder", "name": "x", "data": data, "train": {"batch_size": 8}})
    source = plan.read_source(run)
    assert len(source.pictures) == len(COLOURS)
    assert len(set(chain(*steps_of(source.shards, 2)))) == 16


def test_shards_come_over_http_too(shards, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = find_shards(f"http://127.0.0.1:{server.server_port}/set-{{0..3}}.tar")
        assert len(urls) == 4
        assert [p.text for _, p in read_shard(urls[1])] == [f"{colour} picture" for colour in COLOURS[:4]]
    finally:
        server.shutdown()


def streamed(home, shards, name, **train):
    run = denoiser(home, name, **train)
    run.data.path, run.data.cache = shards, False
    run.model = type(run.model)(base=str(home / "runs/straight/model"))
    return run


def test_a_model_trains_from_shards_and_goes_on_bit_for_bit(home, straight, shards, monkeypatch):
    whole, stopped = (streamed(home, shards, name, workers=2) for name in ("streamed", "streamed-stopped"))
    for run in (whole, stopped):
        run.data.hold_out = 0.2
        run.train.validate_every = 3
    trainer.train(whole, quiet=True)
    stop_and_go_on(stopped, monkeypatch, 4)
    assert difference(weights(whole.folder), weights(stopped.folder)) == 0
    assert metrics(whole.folder) == metrics(stopped.folder)
    coverage = [[json.loads(line) for line in (run.folder / "coverage.jsonl").open()] for run in (whole, stopped)]
    assert coverage[0] == coverage[1]
    assert sum(row["visits"] for row in coverage[0]) == 6 * 8
    rows = [json.loads(line) for line in (whole.folder / "validation.jsonl").open()]
    assert all(row["held_out"]["raw"] > 0 for row in rows)
    assert "4 shards, in 4 lanes" in trainer.describe(whole)
    held = [picture for picture in plan.read_source(whole).pictures if is_held_out(picture, 0.2)]
    assert held == []


def test_two_processes_read_shards_like_one(home, straight, shards):
    alone, shared = (streamed(home, shards, name) for name in ("streamed-alone", "streamed-shared"))
    trainer.train(alone, quiet=True)
    train_with(home, shared, processes=2)
    assert metrics(shared.folder) == pytest.approx(metrics(alone.folder), rel=1e-5)


def test_shards_say_what_they_do_not_do(home, straight, shards):
    run = streamed(home, shards, "streamed-wrong")
    run.data.cache = True
    with pytest.raises(ValueError, match=r"set data\.cache=false"):
        trainer.train(run, quiet=True)
    run.data.buckets = True
    with pytest.raises(ValueError, match=r"data\.buckets and data\.balance need a folder"):
        trainer.train(run, quiet=True)


def test_items_are_made_ahead_and_their_faults_come_through():
    made = []

    def items():
        for n in range(5):
            made.append(n)
            if n == 4:
                raise OSError("gone")
            yield n

    found = ahead(items())
    assert next(found) == 0
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        list(found)
    assert made == [0, 1, 2, 3, 4]
