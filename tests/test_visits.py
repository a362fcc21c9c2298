"""Order, crops, buckets and batches: every choice a function of the seed, the picture and the visit; and the cache."""

import json
import os
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.buckets import BucketOrder, nearest, shapes
from diffusion.data.cache import Cache, Kept
from diffusion.data.captions import choose_caption
from diffusion.data.dataset import LatentSet, PixelSet, to_tensor
from diffusion.data.feed import FolderFeed
from diffusion.data.order import Order, batches
from diffusion.data.source import group_weights, leave_out_small, read_folder
from diffusion.pixels import View, read_pixels


def test_the_ledger_counts_every_visit(folder, tmp_path_factory):
    pictures = read_folder(folder)
    order, file = Order(0, group_weights(pictures, 0.0)), tmp_path_factory.mktemp("run") / "coverage.jsonl"
    ledger = FolderFeed(order, pictures, {"small.png": "4x4 is smaller than 16x16"})
    ledger.write_coverage(file, 10)
    ledger.write_coverage(file, 100)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = Counter(index for index, _ in order.visits(0, 100))
    assert [row["visits"] for row in rows] == [*(expected[i] for i in range(7)), 0]
    assert rows[-1]["left_out"] == "4x4 is smaller than 16x16"
    resumed = FolderFeed(order, pictures, {})
    resumed.write_coverage(file, 100)
    assert [json.loads(line)["visits"] for line in file.read_text().splitlines()] == [expected[i] for i in range(7)]


def test_equal_weights_visit_each_picture_once_an_epoch():
    order = Order(3, np.full(10, 0.1))
    for epoch in range(3):
        visits = order.visits(epoch * 10, epoch * 10 + 10)
        assert sorted(index for index, _ in visits) == list(range(10))
    assert len({tuple(order.visits(e * 10, e * 10 + 10)) for e in range(3)}) == 3


def test_an_order_takes_a_few_bytes_a_picture():
    size, order = 20_000, Order(0, np.full(20_000, 1 / 20_000))
    tracemalloc.start()
    visits = order.visits(size - 3, size + 3)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 * 20 * size, "of two epochs, as numbers and not as objects"
    assert visits == order.visits(size - 3, size) + order.visits(size, size + 3)


def test_groups_share_one_weight(folder):
    weights = group_weights(read_folder(folder, group="base"), 1.0)
    assert weights[0] == pytest.approx(weights[2] / 2)
    counts = Counter(index for index, _ in Order(0, weights).visits(0, 7 * 600))
    assert counts[0] + counts[1] == pytest.approx(600 * 7 / 6, rel=0.02)
    assert counts[5] == pytest.approx(600 * 7 / 6, rel=0.02)


def test_no_visit_is_drawn_twice(folder):
    visits = Order(0, group_weights(read_folder(folder, group="base"), 1.0)).visits(0, 5000)
    assert len(set(visits)) == 5000


SHAPES = [(8, 8)] * 7 + [(8, 4)] * 4 + [(4, 8)]


@pytest.mark.parametrize(
    "order",
    [Order(1, np.full(5, 0.2)), BucketOrder(1, np.full(12, 1 / 12), SHAPES, 8)],
    ids=["pictures", "buckets"],
)
@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (2, 4), (1, 4), (4, 1), (2, 2)])
def test_any_split_of_a_batch_covers_the_same_visits(order, processes, micro):
    shares = [list(batches(order, 2, 5, 8, micro, rank, processes)) for rank in range(processes)]
    per_step = 8 // (micro * processes)
    for step in range(3):
        mine = [v for share in shares for batch in share[step * per_step : (step + 1) * per_step] for v in batch]
        assert Counter(mine) == Counter(order.visits((step + 2) * 8, (step + 3) * 8))


def test_trap_06_captions_are_chosen_and_dropped_anew_at_every_visit(folder):
    """Drawn once when captions are cached, and frozen."""
    picture = read_folder(folder)[3]

    def choose(visit, **shares):
        return choose_caption(picture, visit, 0, lambda caption: len(caption) < 25, **shares)

    assert {choose(v) for v in range(20)} == {"thing 3"}
    many = [choose(v, dropout=0.2, keywords=0.5, fillers=["a", "the"]) for v in range(2000)]
    assert many == [choose(v, dropout=0.2, keywords=0.5, fillers=["a", "the"]) for v in range(2000)]
    assert np.mean([caption == "" for caption in many]) == pytest.approx(0.2, abs=0.03)
    assert len(set(many)) > 20, "choice is live at every visit, not frozen at the first"
    assert max(map(len, many)) < 25
    assert np.mean(["w3" in caption for caption in many]) > 0.2


def test_captions_of_several_kinds(folder):
    picture = replace(read_folder(folder)[3], texts=("red, big, car", "a car"))

    def choose(**options):
        return [choose_caption(picture, visit, 0, **options) for visit in range(400)]

    assert set(choose()) == {"red, big, car", "a car"}
    assert np.mean([caption == "a car" for caption in choose()]) == pytest.approx(0.5, abs=0.1)
    shuffled = {caption for caption in choose(shuffle_tags=True, keep_tags=1) if "red" in caption}
    assert shuffled == {"red, big, car", "red, car, big"}
    assert len(set(choose(shuffle_tags=True))) == 7
    framed = choose(templates=["a photo of {}", "{} at night"], trigger="sks", dropout=0.3)
    assert {caption for caption in framed if "night" in caption} == {
        "sks, red, big, car at night",
        "sks, a car at night",
    }
    assert "" in framed, "no trigger where the caption is dropped"
    assert all(caption.startswith("sks, ") for caption in framed if caption)


def test_crops_and_noise_do_not_depend_on_the_batch(folder):
    pictures = read_folder(folder)
    pixels = PixelSet(pictures=pictures, size=16, crop=8, seed=0, latent_channels=4, factor=4)
    visits = [(0, 3), (4, 1), (0, 4)]
    whole = pixels.__getitems__(visits)
    assert whole["pixels"].shape == (3, 3, 8, 8)
    assert whole["noise"].shape == (3, 4, 2, 2)
    for place, visit in enumerate(visits):
        alone = pixels.__getitems__([visit])
        assert all(torch.equal(whole[name][place], alone[name][0]) for name in whole)


def test_latents_and_times_do_not_depend_on_the_batch(folder):
    pictures = read_folder(folder)
    latents = LatentSet(
        pictures=pictures,
        views=lambda picture: [View(width=16, height=16, flip=flip) for flip in (False, True)],
        posteriors=[
            {"mean": torch.full((2, 4, 4), float(view)), "std": torch.ones(2, 4, 4)}
            for _ in pictures
            for view in range(2)
        ],
        latent_channels=2,
        factor=4,
        seed=0,
        caption=lambda picture, visit: f"{picture.text} {visit}",
        encode_text=lambda captions: {"tokens": torch.tensor([[len(c), ord(c[-1])] for c in captions])},
    )
    visits = [(1, 0), (2, 5), (1, 1)]
    whole = latents.__getitems__(visits)
    for place, visit in enumerate(visits):
        alone = latents.__getitems__([visit])
        assert all(torch.equal(whole[name][place], alone[name][0]) for name in whole)
    assert not torch.equal(whole["noise"][0], whole["noise"][2])
    assert not torch.equal(whole["latents"][0], whole["latents"][2]), "the posterior is sampled anew at each visit"
    many = latents.__getitems__([(1, visit) for visit in range(200)])["latents"]
    assert many.mean().item() == pytest.approx(0.5, abs=0.15), "views take turns"


def cache_of(shelf, pictures, view, encoder="v1"):
    """(fill, count, calls) of a cache that keeps the mean colour."""
    kept, calls = Cache(shelf, encoder), []
    paths = [kept.picture_path(picture, view) for picture in pictures]

    def make(places):
        calls.append(len(places))
        return [{"mean": to_tensor(pictures[place].pixels(view)[None]).mean(dim=(0, 2, 3))} for place in places]

    return (
        lambda make=make, **options: kept.fill(paths, make, **options),
        lambda: sum(p.is_file() for p in paths),
        calls,
    )


def test_trap_18_the_cache_is_never_stale(folder, tmp_path_factory):
    """Stale after an image, a caption or the resolution changed."""
    shelf, view = tmp_path_factory.mktemp("cache"), View(width=16, height=16)
    pictures = read_folder(folder)[:1]
    fill, count, calls = cache_of(shelf, pictures, view)
    first = fill()[0]["mean"]
    assert torch.equal(fill()[0]["mean"], first)
    assert calls == [1]
    for change in ({"width": 8}, {"background": "black"}, {"flip": True}, {"place": 0.0}):
        assert cache_of(shelf, pictures, replace(view, **change))[1]() == 0
    assert cache_of(shelf, pictures, view, "v2")[1]() == 0
    Image.new("RGB", (16, 16), "lime").save(pictures[0].file)
    fill, count, calls = cache_of(shelf, pictures, view)
    assert count() == 0
    assert not torch.equal(fill()[0]["mean"], first)
    assert Cache(shelf, "v1").path(b"a cat", "caption") != Cache(shelf, "v1").path(b"a dog", "caption")
    assert not list(shelf.rglob("*.part"))


@pytest.mark.parametrize("harm", ["empty", "cut", "zeros", "longer"])
def test_an_entry_that_a_power_cut_has_broken_is_made_again(folder, tmp_path_factory, capsys, harm):
    pictures = read_folder(folder)[:3]
    fill, _, calls = cache_of(shelf := tmp_path_factory.mktemp("cache"), pictures, View(width=16, height=16))
    means = [entry["mean"] for entry in fill()]
    broken = sorted(shelf.rglob("*.safetensors"))[1]
    content = broken.read_bytes()
    harmed = {"empty": b"", "cut": content[:-4], "zeros": bytes(len(content)), "longer": content + b"x"}
    broken.write_bytes(harmed[harm])
    again = [entry["mean"] for entry in fill()]
    assert all(map(torch.equal, means, again))
    assert sum(calls) == 4
    assert f"1 cut entries of the cache are made again, first {broken}" in capsys.readouterr().err
    fill()
    assert capsys.readouterr().err == ""


def test_an_entry_is_on_the_disk_before_it_has_its_name(folder, tmp_path_factory, monkeypatch):
    pictures, events = read_folder(folder)[:1], []
    fsync, replace_file = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr("os.replace", lambda *paths: (events.append("replace"), replace_file(*paths)))
    cache_of(tmp_path_factory.mktemp("cache"), pictures, View(width=16, height=16))[0]()
    assert events == ["fsync", "replace"]


def test_what_an_interrupted_filling_has_done_stays(folder, tmp_path_factory):
    pictures = read_folder(folder)
    fill, count, calls = cache_of(tmp_path_factory.mktemp("cache"), pictures, View(width=16, height=16))
    made = []

    def interrupted(places):
        if made:
            raise KeyboardInterrupt
        made.extend(places)
        return [{"mean": torch.zeros(3)} for _ in places]

    with pytest.raises(KeyboardInterrupt):
        fill(interrupted, batch_size=3)
    assert count() == 3
    found = fill(batch_size=3)
    assert sum(calls) == len(pictures) - 3
    for place, picture in enumerate(pictures):
        expected = (
            torch.zeros(3) if place in made else to_tensor(read_pixels(picture.file, 16)[None]).mean(dim=(0, 2, 3))
        )
        assert torch.allclose(found[place]["mean"], expected)


def test_a_cache_keeps_in_memory_what_it_may_and_makes_twins_once(tmp_path):
    kept = Cache(tmp_path, "v1")
    paths = [kept.path(bytes([n % 3]), "number") for n in range(6)]
    made = []

    def make(places):
        made.extend(places)
        return [{"x": torch.full((4,), float(place % 3))} for place in places]

    found = kept.fill(paths, make, batch_size=2)
    assert sorted(place % 3 for place in made) == [0, 1, 2]
    small = Kept(paths, memory=40)
    for _ in range(2):
        assert [small[place]["x"][0].item() for place in range(6)] == [0, 1, 2, 0, 1, 2]
        assert small.held <= 40
    assert len(found) == 6


def test_bucket_shapes_have_about_one_area():
    found = shapes(512, 64)
    assert {(512, 512), (448, 576), (576, 448), (704, 320)} & set(found) == {(512, 512), (448, 576), (576, 448)}
    assert all(w * h <= 512 * 512 and w % 64 == 0 and h % 64 == 0 and max(w, h) <= 2 * min(w, h) for w, h in found)
    assert nearest((3000, 3000), found) == (512, 512)
    assert nearest((400, 600), found) == (384, 640) or nearest((400, 600), found) == (448, 576)
    with pytest.raises(ValueError, match="not a multiple of 64"):
        shapes(500, 64)


def test_trap_24_a_bucket_is_filled_without_stretching(tmp_path):
    wide = Image.new("RGB", (200, 100), "white")
    wide.paste("black", (95, 45, 105, 55))  # a square in the middle
    wide.save(tmp_path / "wide.png")
    pixels = read_pixels(tmp_path / "wide.png", View(width=96, height=32))
    assert pixels.shape == (32, 96, 3)
    dark = np.argwhere(pixels[:, :, 0] < 128)
    tall, across = np.ptp(dark, axis=0) + 1
    assert tall == across


def test_trap_17_each_batch_holds_one_shape_and_no_leftover_is_dropped():
    order = BucketOrder(0, np.full(12, 1 / 12), SHAPES, 8)
    visits = order.visits(0, 8 * 600)
    for start in range(0, len(visits), 8):
        assert len({SHAPES[i] for i, _ in visits[start : start + 8]}) == 1
    counts = Counter(i for i, _ in visits)
    assert all(counts[i] == pytest.approx(400, abs=12) for i in range(12))
    assert len(set(visits)) == len(visits), "no visit twice"
    assert BucketOrder(0, np.full(12, 1 / 12), SHAPES, 8).visits(8 * 100 + 3, 8 * 101 + 2) == visits[803:810]


def test_a_picture_that_cannot_cover_its_bucket_is_left_out(folder):
    Image.new("RGB", (40, 12)).save(folder / "3.png")
    shape_of = partial(nearest, among=shapes(16, 8, 4.0))
    assert len(leave_out_small(read_folder(folder), 16, shape_of)[0]) == 7, "40x12 covers 32x8, though not 16x16"
    Image.new("RGB", (12, 6)).save(folder / "3.png")
    assert len(leave_out_small(read_folder(folder), 16, shape_of)[1]) == 1


def test_crops_keep_the_ends_of_a_long_picture(tmp_path):
    wide = Image.new("RGB", (32, 8), "white")
    wide.paste("red", (0, 0, 8, 8))
    wide.paste("blue", (24, 0, 32, 8))
    wide.save(tmp_path / "wide.png")
    seen = [read_pixels(tmp_path / "wide.png", View(width=8, height=8, place=place))[4, 4] for place in (0.0, 0.5, 1.0)]
    assert [colour.tolist() for colour in seen] == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
