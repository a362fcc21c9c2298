"""Folders: what is read of them, what is left out, and what is told."""

import json
import os
from collections import Counter

import pytest
from PIL import Image

from diffusion.data.order import Order
from diffusion.data.source import group_weights, leave_out_small, read_folder


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
