"""The pages that show Python: each program runs as it stands, prints what stands behind it, and draws what is shown."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import TextToImage
from diffusion.images import read_metadata
from diffusion.settings import Settings
from families import psnr

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
COUNTS = {"README.md": 1, "docs/python.md": 10}  # programs of each page; tests/test_scripting_docs.py has another
NEAR = 28  # dB: what is shown has 128 colours


class Program(NamedTuple):
    page: str
    number: int
    code: str
    shown: list[str]  # the pictures below it

    @property
    def says(self) -> list[str]:
        """What it prints: the comment behind a ``print``, and those that are lines of their own."""
        return re.findall(r"^(?:.*print\(.*  )?# (.*)$", self.code, re.MULTILINE)


def programs(page: str) -> Iterator[Program]:
    text = (ROOT / page).read_text(encoding="utf-8")
    _, *parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for number, (code, below) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        yield Program(page, number, code, re.findall(r"!\[\]\(generating/(.*?)\)", below.split("\n## ")[0]))


def agrees(said: str, written: str) -> bool:
    """The same words, and numbers as another machine may round them."""
    words, numbers = r"\d+(?:\.\d+)?", lambda text: [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]
    return re.split(words, said) == re.split(words, written) and numbers(said) == pytest.approx(numbers(written), 0.05)


# --- what has come of those that say or show too little


def readme(made: dict[str, Any], said: list[str]) -> None:
    assert [json.loads(image.info["diffusion"])["seed"] for image in made["images"]] == [7, 8, 9, 10]
    assert psnr(made["step"].images[0], made["images"][0]) > 50
    assert psnr(made["preview"][0], made["images"][0]) > 15
    assert type(made["stock"]).__name__ == "StableDiffusionPipeline"


def pictures(made: dict[str, Any], said: list[str]) -> None:
    assert said == ["6 (128, 128)"]
    files = [f"crowns/{number}.png" for number in range(1, 7)]
    assert [read_metadata(file)["diffusion"]["seed"] for file in files] == [1, 2, 3, 4, 5, 6]


def style(made: dict[str, Any], said: list[str]) -> None:
    """More of the LoRA is more blue, and none of it is the model."""
    plain = TextToImage.load("emoji")(["house", "panda", "red apple"], seed=1)
    assert all(psnr(*pair) >= 60 for pair in zip(made["sheet"], plain, strict=False))
    red, _, blue = np.mean([np.asarray(image, float) for image in made["sheet"]], axis=(1, 2)).T
    none, half, whole = (blue - red).reshape(3, 3).mean(axis=1)
    assert none + 15 < half + 10 < whole


CHECKS: dict[tuple[str, int], Callable[[dict[str, Any], list[str]], None]] = {
    ("README.md", 1): readme,
    ("docs/python.md", 1): pictures,
    ("docs/python.md", 8): style,
}


@pytest.mark.parametrize(
    "program",
    [program for page in COUNTS for program in programs(page)],
    ids=lambda program: f"{program.page}-{program.number}",
)
def test_a_program_does_what_its_page_says(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    capsys.readouterr()
    made: dict[str, Any] = {}
    exec(compile(program.code, f"{program.page}, program {program.number}", "exec"), made)
    said = capsys.readouterr().out.splitlines()
    check = CHECKS.get((program.page, program.number))
    if check is not None:
        check(made, said)
    else:
        assert program.says, "a program that does nothing would not be found out"
        assert len(said) == len(program.says)
        assert all(map(agrees, said, program.says)), said
    drawn = [name for name in program.shown if Path(name).is_file()]
    assert bool(drawn) == bool(program.shown), "it draws what is shown below it"
    for name in drawn if check is not style else ():
        shown = Image.open(ROOT / "docs/generating" / name).convert("RGB")
        assert psnr(Image.open(name), shown) > NEAR, name


def test_every_program_of_the_pages_is_run():
    assert {page: len(list(programs(page))) for page in COUNTS} == COUNTS


# --- the tables


def rows(section: str) -> list[list[str]]:
    """The cells of the table below a heading, without the marks of code."""
    table = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [[cell.replace("`", "").strip() for cell in cells] for cells in found]


def test_the_table_of_settings_is_that_of_the_code():
    """Its names and defaults, and every comment that stands behind a field."""
    table = {name: (default, text) for name, default, text in rows("Settings")}
    assert list(table) == [item.name for item in fields(Settings)]
    source = inspect.getsource(Settings)
    for item in fields(Settings):
        default, text = table[item.name]
        assert default == ("" if item.name == "prompts" else '""' if item.default == "" else repr(item.default))
        comment = re.search(rf"^    {item.name}: .*?  # (.*)$", source, re.MULTILINE)
        assert text
        assert comment is None or comment[1].replace("`", "") in text, item.name


def test_every_name_of_the_table_is_there_and_none_of_the_model_is_left_out():
    names = [name for names, _ in rows("Names") for name in names.split(", ")]
    assert len(names) > 20
    for name in names:
        room, _, last = name.rpartition(".")
        whole = TextToImage if room == "TextToImage" else importlib.import_module(f"diffusion.{room}".rstrip("."))
        assert hasattr(whole, last), name
    public = {name for name in vars(TextToImage) if not name.startswith("_")} - {
        one.name for one in fields(TextToImage)
    }
    assert {f"TextToImage.{name}" for name in public} <= set(names)
    assert set(diffusion.__all__) - {"TextToImage", "__version__"} <= set(names)
