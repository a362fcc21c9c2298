"""Folders, order, captions and batches: every choice a function of the seed, the picture and the visit."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data import cache
from diffusion.data.captions import choose_caption
from diffusion.data.dataset import LatentSet, PixelSet
from diffusion.data.order import Order, batches
from diffusion.data.source import group_weights, read_folder, read_pixels


@pytest.fixture
def folder(tmp_path):
    rows = []
    for n in range(8):
        Image.new("RGB", (16, 16), (n * 30, 0, 255 - n * 30)).save(tmp_path / f"{n}.png")
        base, split = ("pair" if n < 2 else f"base {n}"), ("held_out" if n == 7 else "train")
        rows.append(
            {"file_name": f"{n}.png", "text": f"thing {n}", "keywords": ["k", f"w{n}"], "base": base, "split": split}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_splits_do_not_mix(folder):
    train, held_out = read_folder(folder), read_folder(folder, "held_out")
    assert [p.text for p in held_out] == ["thing 7"]
    assert not {p.file for p in train} & {p.file for p in held_out}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"text": "x"}', "file_name"),
        ('{"file_name": "no.png", "text": "x"}', r"no\.png"),
        ("", "no picture"),
    ],
)
def test_a_bad_listing_says_what_is_wrong(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        read_pixels(tmp_path / "bad.png", 8)


def test_colours_under_alpha_stay_hidden(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_pixels(tmp_path / "clear.png", 8) == 255).all()
    Image.new("P", (8, 8), 0).save(tmp_path / "palette.png", transparency=0)
    assert (read_pixels(tmp_path / "palette.png", 8) == 255).all()


def test_exif_orientation_is_followed(tmp_path):
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = read_pixels(tmp_path / "turned.png", 8)
    assert pixels[0].max() == 255
    assert pixels[-1].max() == 0


def test_equal_weights_visit_each_picture_once_an_epoch():
    order = Order(3, np.full(10, 0.1))
    for epoch in range(3):
        visits = order.visits(epoch * 10, epoch * 10 + 10)
        assert sorted(index for index, _ in visits) == list(range(10))
    assert len({tuple(order.visits(e * 10, e * 10 + 10)) for e in range(3)}) == 3


def test_groups_share_one_weight(folder):
    weights = group_weights(read_folder(folder, group="base"), 1.0)
    assert weights[0] == pytest.approx(weights[2] / 2)
    counts = Counter(index for index, _ in Order(0, weights).visits(0, 7 * 600))
    assert counts[0] + counts[1] == pytest.approx(600 * 7 / 6, rel=0.02)
    assert counts[5] == pytest.approx(600 * 7 / 6, rel=0.02)


def test_no_visit_is_drawn_twice(folder):
    visits = Order(0, group_weights(read_folder(folder, group="base"), 1.0)).visits(0, 5000)
    assert len(set(visits)) == 5000


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (2, 4), (1, 4), (4, 1), (2, 2)])
def test_any_split_of_a_batch_covers_the_same_visits(processes, micro):
    order = Order(1, np.full(5, 0.2))
    shares = [list(batches(order, 2, 5, 8, micro, rank, processes)) for rank in range(processes)]
    per_step = 8 // (micro * processes)
    for step in range(3):
        mine = [v for share in shares for batch in share[step * per_step : (step + 1) * per_step] for v in batch]
        assert Counter(mine) == Counter(order.visits((step + 2) * 8, (step + 3) * 8))


def test_caption_choice(folder):
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
        mean=torch.zeros(len(pictures), 2, 4, 4),
        std=torch.ones(len(pictures), 2, 4, 4),
        seed=0,
        caption=lambda picture, visit: f"{picture.text} {visit}",
        tokenize=lambda captions: torch.tensor([[len(c), ord(c[-1])] for c in captions]),
    )
    visits = [(1, 0), (2, 5), (1, 1)]
    whole = latents.__getitems__(visits)
    for place, visit in enumerate(visits):
        alone = latents.__getitems__([visit])
        assert all(torch.equal(whole[name][place], alone[name][0]) for name in whole)
    assert not torch.equal(whole["noise"][0], whole["noise"][2])
    assert not torch.equal(whole["latents"][0], whole["latents"][2]), "the posterior is sampled anew at each visit"


def test_the_cache_is_never_stale(folder, tmp_path_factory):
    shelf, calls = tmp_path_factory.mktemp("cache"), []

    def encode(pixels):
        calls.append(len(pixels))
        return pixels.mean(dim=(2, 3), keepdim=True), torch.ones(len(pixels), 3, 1, 1)

    pictures = read_folder(folder)
    first = cache.posteriors(pictures, 16, encode, "v1", shelf)
    again = cache.posteriors(pictures, 16, encode, "v1", shelf)
    assert torch.equal(first[0], again[0])
    assert sum(calls) == len(pictures)
    cache.posteriors(pictures, 16, encode, "v2", shelf)
    cache.posteriors(pictures, 8, encode, "v1", shelf)
    assert sum(calls) == 3 * len(pictures)
    Image.new("RGB", (16, 16), "lime").save(pictures[0].file)
    edited = cache.posteriors(pictures, 16, encode, "v1", shelf)
    assert not torch.equal(edited[0][0], first[0][0])
