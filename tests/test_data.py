"""Folders, order, captions and batches: every choice a function of the seed, the picture and the visit."""

import json
import os
import struct
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffusion.data.buckets import BucketOrder, nearest, shapes
from diffusion.data.cache import Cache, Kept
from diffusion.data.captions import choose_caption
from diffusion.data.dataset import LatentSet, PixelSet, to_tensor
from diffusion.data.feed import FolderFeed
from diffusion.data.order import Order, batches
from diffusion.data.source import group_weights, leave_out_small, read_folder
from diffusion.pixels import View, read_pixels


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


def written(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (16, 16), "red").save(folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_captions_come_from_csv(tmp_path):
    table = 'file_name,text,keywords,weight\na.png,"one, two","x, y",3\nb.png,other,,\n'
    one, two = read_folder(written(tmp_path, {"metadata.csv": table, "a.png": None, "b.png": None}))
    assert (one.texts, one.keywords, one.weight) == (("one, two",), ("x", "y"), 3.0)
    assert (two.texts, two.keywords, two.weight) == (("other",), (), 1.0)


def test_captions_come_from_text_files_a_line_each(tmp_path):
    files = {"a.png": None, "deep/b.PNG.png": None, "a.txt": "\ufeffone\n\ntwo\n", "deep/b.PNG.txt": "three"}
    pictures = read_folder(written(tmp_path, files))
    assert [p.texts for p in pictures] == [("one", "two"), ("three",)]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.png has no a\.txt"):
        read_folder(tmp_path)


def test_captions_come_from_names_when_asked_for(tmp_path):
    written(tmp_path, {"10_red-car/x_001.png": None, "dog/big_dog (2).png": None})
    with pytest.raises(ValueError, match=r"no captions.*source=folder"):
        read_folder(tmp_path)
    assert [(p.text, p.weight) for p in read_folder(tmp_path, source="folder")] == [("red car", 10.0), ("dog", 1.0)]
    assert [p.text for p in read_folder(tmp_path, source="file")] == ["x", "big dog"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "a.png", "text": 3}', "line 1: text must be"),
        ('{"file_name": "a.png", "text": []}', "line 1: text must be"),
        ('{"file_name": "a.png", "text": "x", "weight": 0}', "weight must be a number above 0, got 0"),
        ('["a.png"]', "line 1"),
        ('{"file_name": 3, "text": "x"}', "line 1: file_name must be a text, got 3"),
        ('{"file_name": "a.png", "text": "half \\ud83d"}', r"line 1: 'half \\ud83d' holds half a character"),
        ('{"file_name": "a.png", "text": "x", "keywords": ["\\udc00"]}', "line 1: .* holds half a character"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "listed 2 times"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path, row, message):
    written(tmp_path, {"a.png": None, "metadata.jsonl": row})
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_line_ends_where_files_end_lines_and_nowhere_else(tmp_path, separator):
    text = f"one{separator}two"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    written(tmp_path, {"a.png": None, "metadata.jsonl": f"{row}\n"})
    assert read_folder(tmp_path)[0].texts == (text,)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "unused")
    (tmp_path / "a.txt").write_bytes(f"{text}\r\nthree\rfour\n".encode())
    assert read_folder(tmp_path)[0].texts == (text, "three", "four")
    written(tmp_path, {"metadata.csv": f'file_name,text\na.png,"{text}"\n'})
    assert read_folder(tmp_path)[0].texts == (text,)


def test_a_quoted_field_of_a_csv_may_hold_lines(tmp_path):
    written(tmp_path, {"a.png": None, "metadata.csv": 'file_name,text\r\na.png,"one\r\ntwo"\r\n'})
    assert read_folder(tmp_path)[0].texts == ("one\ntwo",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "grün".encode("latin-1")),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16")),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "grün"}'.encode("latin-1")),
    ],
)
def test_a_text_that_is_not_utf_8_is_named(tmp_path, name, content):
    written(tmp_path, {"a.png": None})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8 text .*save it as UTF-8"):
        read_folder(tmp_path)


def test_a_file_name_that_is_not_utf_8_is_named(tmp_path):
    written(tmp_path, {"a.png": None})
    try:
        (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.png"))
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match=r"'gr\\udcfcn\.png' is not UTF-8: rename the file"):
        read_folder(tmp_path, source="file")


def test_a_weight_says_how_often(tmp_path):
    rows = '{"file_name": "a.png", "text": "a", "weight": 3}\n{"file_name": "b.png", "text": "b"}'
    pictures = read_folder(written(tmp_path, {"a.png": None, "b.png": None, "metadata.jsonl": rows}))
    counts = Counter(index for index, _ in Order(0, group_weights(pictures, 0.0)).visits(0, 4000))
    assert counts[0] == pytest.approx(3000, abs=20)


def test_small_pictures_are_left_out_by_name(folder):
    Image.new("RGB", (16, 9)).save(folder / "3.png")
    kept, left_out = leave_out_small(read_folder(folder), 16)
    assert len(kept) == 6
    assert left_out == {str(folder / "3.png"): "16x9 is smaller than 16x16"}
    assert leave_out_small(read_folder(folder), 17)[0] == []


def test_splits_of_other_tools_are_never_trained_on(tmp_path):
    rows = [
        {"file_name": f"{n}.png", "text": "x", "split": split}
        for n, split in enumerate(("train", "validation", "test"))
    ]
    written(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows)), "0.png": None, "1.png": None, "2.png": None})
    assert [len(read_folder(tmp_path, split)) for split in ("train", "held_out")] == [1, 2]
    for row, message in (
        ({"split": "dev"}, "split must be train"),
        ({"keywords": "red, fruit"}, "keywords must be a list"),
    ):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x"} | row))
        with pytest.raises(ValueError, match=message):
            read_folder(tmp_path)


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


# --- colours: Pillow's convert("RGB") alone fails most of these -------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a picture", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_trap_22_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        read_pixels(tmp_path / "bad.png", 8)


def pixel_of(image, tmp_path, suffix="png", background="white", **options):
    file = tmp_path / f"picture.{suffix}"
    image.save(file, **options)
    pixels = read_pixels(file, View(width=8, height=8, background=background))
    assert pixels.shape == (8, 8, 3)
    return pixels[4, 4].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "options"),
    [
        ("RGBA", (255, 0, 0, 0), {}),
        ("LA", (0, 0), {}),
        ("P", 0, {"transparency": 0}),
        ("RGB", (255, 0, 0), {"transparency": (255, 0, 0)}),
        ("L", 7, {"transparency": 7}),
        ("I;16", 700, {"transparency": 700}),
    ],
)
def test_trap_16_colours_under_transparency_stay_hidden(tmp_path, mode, colour, options):
    picture = Image.new(mode, (8, 8), colour)
    assert pixel_of(picture, tmp_path, **options) == [255, 255, 255]
    assert pixel_of(picture, tmp_path, background="#102030", **options) == [16, 32, 48]


def test_half_transparent_colours_mix_with_the_background(tmp_path):
    assert pixel_of(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), tmp_path) == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path, value, grey):
    assert pixel_of(Image.new("I;16", (8, 8), value), tmp_path) == [grey] * 3
    assert pixel_of(Image.new("I;16", (8, 8), value), tmp_path, "tif") == [grey] * 3


def test_cmyk_keeps_its_colours(tmp_path):
    """Ink of one colour: the naive complement is the reference where no profile says otherwise."""
    assert pixel_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path, "tif") == [255, 0, 0]
    red, green, blue = pixel_of(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), tmp_path, "jpg", quality=95)
    assert green > 250
    assert max(red, blue) < 5


def test_a_colour_profile_is_followed(tmp_path):
    """A gamma of 1 in place of sRGB's curve: linear 0.5 is sRGB 188, which the profile-blind would leave at 128."""
    lab_free = ImageCms.createProfile("sRGB")
    srgb = ImageCms.ImageCmsProfile(lab_free).tobytes()
    assert pixel_of(Image.new("RGB", (8, 8), (200, 100, 50)), tmp_path, icc_profile=srgb) == pytest.approx(
        [200, 100, 50], abs=1
    )
    assert pixel_of(Image.new("RGB", (8, 8), (128,) * 3), tmp_path, icc_profile=linear_profile(srgb)) == pytest.approx(
        [188, 188, 188], abs=2
    )
    broken = pixel_of(Image.new("RGB", (8, 8), (9, 8, 7)), tmp_path, icc_profile=b"no profile")
    assert broken == [9, 8, 7]


def linear_profile(srgb):
    """The sRGB profile with its tone curves replaced by straight lines: tags rTRC, gTRC, bTRC point to a new 'curv'."""
    data = bytearray(srgb)
    place = len(data)
    data += b"curv" + bytes(8)  # no entries: the identity
    for tag in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * tag
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            data[at + 4 : at + 12] = struct.pack(">II", place, 12)
    data[0:4] = struct.pack(">I", len(data))
    data[84:100] = bytes(16)  # no checksum
    return bytes(data)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixel_of(frames[0], tmp_path, "gif", save_all=True, append_images=frames[1:]) == [255, 0, 0]
    webp = pixel_of(frames[0], tmp_path, "webp", save_all=True, append_images=frames[1:], lossless=True)
    assert webp == [255, 0, 0]


def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"picture\.tif.*float"):
        pixel_of(Image.new("F", (8, 8), 0.5), tmp_path, "tif")


def test_a_picture_is_cropped_and_never_stretched(tmp_path):
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("lime", (12, 0, 20, 8))
    assert pixel_of(wide, tmp_path) == [0, 255, 0]
    assert (read_pixels(tmp_path / "picture.png", 8) == [0, 255, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(tmp_path, orientation):
    """The corner that a viewer shows at the top left is black, wherever it is stored."""
    corners = {1: (0, 0), 2: (4, 0), 3: (4, 4), 4: (0, 4), 5: (0, 0), 6: (0, 4), 7: (4, 4), 8: (4, 0)}
    left, top = corners[orientation]
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("black", (left, top, left + 4, top + 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = read_pixels(tmp_path / "turned.png", 8)
    assert pixels[:4, :4].max() == 0
    assert pixels[4:].min() == 255
    assert pixels[:, 4:].min() == 255


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


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (2, 4), (1, 4), (4, 1), (2, 2)])
def test_any_split_of_a_batch_covers_the_same_visits(processes, micro):
    order = Order(1, np.full(5, 0.2))
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


# --- buckets ----------------------------------------------------------------------------------------------------------


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


SHAPES = [(8, 8)] * 7 + [(8, 4)] * 4 + [(4, 8)]


def test_trap_17_each_batch_holds_one_shape_and_no_leftover_is_dropped():
    order = BucketOrder(0, np.full(12, 1 / 12), SHAPES, 8)
    visits = order.visits(0, 8 * 600)
    for start in range(0, len(visits), 8):
        assert len({SHAPES[i] for i, _ in visits[start : start + 8]}) == 1
    counts = Counter(i for i, _ in visits)
    assert all(counts[i] == pytest.approx(400, abs=12) for i in range(12))
    assert len(set(visits)) == len(visits), "no visit twice"
    assert BucketOrder(0, np.full(12, 1 / 12), SHAPES, 8).visits(8 * 100 + 3, 8 * 101 + 2) == visits[803:810]


@pytest.mark.parametrize(("processes", "micro"), [(2, 4), (1, 4), (4, 1)])
def test_a_bucket_batch_splits_like_any_other(processes, micro):
    order = BucketOrder(1, np.full(12, 1 / 12), SHAPES, 8)
    shares = [list(batches(order, 2, 5, 8, micro, rank, processes)) for rank in range(processes)]
    per_step = 8 // (micro * processes)
    for step in range(3):
        mine = [v for share in shares for batch in share[step * per_step : (step + 1) * per_step] for v in batch]
        assert Counter(mine) == Counter(order.visits((step + 2) * 8, (step + 3) * 8))


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
