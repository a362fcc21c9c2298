"""``diffusion info`` and ``diffusion evaluate``: what they print, and one line for a wrong request."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from commands import ROOT
from diffusion.cli import main


@pytest.fixture
def labelled(tmp_path):
    """Twelve plain pictures in six groups, a third of them held out."""
    rows = []
    for n in range(12):
        Image.new("RGB", (16, 16), (20 * n, 255 - 20 * n, 90)).save(tmp_path / f"{n}.png")
        split = "held_out" if n % 3 == 0 else "train"
        rows.append({"file_name": f"{n}.png", "text": f"red apple {n}", "base": f"base {n // 2}", "split": split})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_info_describes_the_installation(capsys):
    assert main(["info"]) == 0
    assert {"diffusion", "torch", "fast dtype"} <= set(json.loads(capsys.readouterr().out))


def test_a_reader_that_leaves_is_no_matter():
    command = [sys.executable, "-m", "diffusion", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, "")


@pytest.mark.parametrize(
    ("words", "prog"),
    [
        (["generate.py", "apple"], "generate.py"),
        (["train.py", "configs/emoji.yaml"], "train.py"),
        (["-m", "diffusion", "ui"], "diffusion"),
    ],
)
def test_a_copy_that_is_not_installed_says_so_in_one_line(words, prog):
    done = subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"{prog}: No module named '\w+': install the toolkit .*pip install .*\n", done.stderr)


def test_info_describes_models_and_pictures(tiny_model, tmp_path, capsys):
    made = str(tmp_path / "made.png")
    assert main(["generate", "red apple", "-m", str(tiny_model), "-s", "3", "-o", made, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["info", str(tiny_model), made]) == 0
    model, picture = json.loads(capsys.readouterr().out)
    assert model["recipe.json"]["steps"] == 4
    assert "3" in json.dumps(picture)
    assert "red apple" in json.dumps(picture)


def test_evaluate_prints_and_writes_figures(tiny_model, labelled, tmp_path, capsys):
    (labelled / "asked.jsonl").write_text('{"prompt": "an apple", "text": "red apple 4"}\n')
    words = ["evaluate", str(tiny_model), "--data", str(labelled), "--paraphrases", str(labelled / "asked.jsonl")]
    assert main([*words, "--count", "3", "--output", str(tmp_path / "figures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "figures/figures.json").read_text())
    assert [row["pictures"] for row in figures] == [4, 3, 3, 4, 4, 1, 1]
    assert len(lines) == 7
    assert all(row["figure"] in line and row["value"] in line for row, line in zip(figures, lines, strict=True))
    assert all(0 <= float(row["value"]) <= 1 for row in figures[1:])
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "figures.json", "train.png", "held_out.png", "paraphrases.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--colour"], "unknown flag '--colour'"),
        (["info", "nowhere"], "'nowhere' not found"),
        (["info", "nowhere"], "(models that are here: emoji, emoji-fast)"),
        (["info", "emoji-fst"], "did you mean 'emoji-fast'"),
        (["info", "nope.png"], "diffusion info: nope.png is not there"),
        (["info", "no/where.JPG"], "diffusion info: no/where.JPG is not there"),
        (["evaluate", "emojo"], "did you mean 'emoji'"),
        (["evaluate", "--cuont", "3"], "did you mean '--count'"),
        (["evaluate", "--count", "many"], "'many' is not a whole number"),
        (["evaluate", "--count", "0"], "is not at least 1"),
        (["evaluate", "a", "b"], "one model at a time"),
        (["evaluate", "emoji", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "nowhere.yaml"], "no such config file"),
        (["train", "--dry-run"], "no such config file"),
    ],
)
def test_a_wrong_request_is_one_line_and_2(words, message, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_broken_recipe_is_named(tiny_model, labelled, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken/recipe.json").write_text("{")
    assert main(["evaluate", str(tmp_path / "broken"), "--data", str(labelled)]) == 2
    assert "recipe.json" in capsys.readouterr().err
