"""The emoji folder: what is held out, what is a base, and that the font gives distinct pictures of them."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

HOME = Path(__file__).parents[1] / "assets" / "emoji"
spec = importlib.util.spec_from_file_location("build", HOME / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("elephant", "elephant"),
        ("woman running: medium-dark skin tone", "woman running"),
        ("kiss: man, man, light skin tone, dark skin tone", "kiss: man, man"),
        ("person: medium-dark skin tone, blond hair", "person: blond hair"),
        ("flag: Norway", "flag: Norway"),
    ],
)
def test_base(name, base):
    assert build.base_of(name) == base


def test_held_out_is_a_function_of_the_name():
    names = [f"thing {n}: {tone}" for n in range(200) for tone in build.SKIN_TONES]
    chosen = [name for name in names if build.is_held_out(name)]
    assert chosen == [name for name in names if int(hashlib.md5(name.encode()).hexdigest(), 16) % 10 == 0]
    assert 60 < len(chosen) < 140
    assert not any(build.is_held_out(f"thing {n}") for n in range(100))


@pytest.mark.skipif(not (build.FONT.exists() and build.CLDR.exists()), reason="needs the font and the CLDR names")
def test_the_folder(tmp_path):
    rows = build.build(build.FONT, build.CLDR, tmp_path)
    assert rows == [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert 3000 < len(rows) < 5000
    pictures = {(tmp_path / row["file_name"]).read_bytes() for row in rows}
    assert len(pictures) == len(rows), "duplicates are dropped"
    apple = Image.open(tmp_path / next(row["file_name"] for row in rows if row["text"] == "red apple"))
    assert (apple.mode, apple.size) == ("RGB", (128, 128))
    assert apple.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = apple.getpixel((64, 80))
    assert red > 150 > max(green, blue)
    texts = {row["text"] for row in rows}
    wanted = [json.loads(line) for line in (HOME / "paraphrases.jsonl").read_text().splitlines()]
    assert len(wanted) == 30
    assert all(row["text"] in texts and row["prompt"] not in texts for row in wanted)
    held_out = [row for row in rows if row["split"] == "held_out"]
    assert {row["text"] for row in held_out} == {row["text"] for row in rows if build.is_held_out(row["text"])}


def test_a_missing_font_is_named(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["build.py", "--font", "nowhere.ttf"])
    assert build.main() == 2
    assert "nowhere.ttf" in capsys.readouterr().err
