"""``diffusion info`` and ``diffusion evaluate``: what they print, and one line for a wrong request."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from commands import ROOT
from diffusion import TextToImage
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


def test_info_says_of_a_picture_without_a_record_that_it_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("plain.png")
    assert main(["info", "plain.png"]) == 0
    said = capsys.readouterr()
    assert said.out == "{}\n"
    assert said.err.startswith("diffusion info: plain.png says nothing of how it was made: ")


def test_what_may_not_be_read_is_one_line_and_2(tiny_model, tmp_path, monkeypatch, capsys):
    """No mode bits: root may read everything."""
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "apple", "-m", str(tiny_model), "--steps", "1", "-o", "made.png", "--quiet"]) == 0
    capsys.readouterr()

    def closed(look):
        def looked(path):
            if "noread" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return look(path)

        return looked

    for name in ("is_dir", "is_file", "exists"):
        monkeypatch.setattr(Path, name, closed(getattr(Path, name)))
    few = ["generate", "apple", "--dry-run", "-m", str(tiny_model)]
    for words, what in [
        (["generate", "apple", "-m", "noread/x"], "noread/x/unet"),
        ([*few, "--checker", "noread/x.py:f"], "noread/x.py:f"),
        (["generate", "--from-image", "made.png", "-m", "noread/x"], "noread/x/unet"),
        ([*few, "--lora", "noread/x"], "noread/x"),
        ([*few, "-o", "noread/x.png"], "noread/x.png"),
        (["info", "noread/x"], "noread/x"),
        (["ui", "-m", "noread/x"], "noread/x/unet"),
    ]:
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"no access to {what} (Permission denied): ask for the right to it, or name another place" in line


def test_a_model_that_is_nowhere_or_in_a_folder_of_a_run(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/lora").mkdir(parents=True)
    Path("runs/lora/model").symlink_to(tiny_model)
    inside = "runs/lora is not a model folder: it has no unet/; give runs/lora/model"
    for words, message in [
        (
            ["generate", "a", "-m", "runs/none", "--offline"],
            "there is no folder or file runs/none here, and runs/none is",
        ),
        (["generate", "a", "-m", "runs/lora"], inside),
        (["info", "runs/lora"], inside),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=inside):
        TextToImage.load("runs/lora")


def test_the_page_takes_no_lora_twice_and_names_the_host(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.safetensors").touch()
    assert main(["ui", "--lora", "x.safetensors", "--lora", "./x.safetensors:0.5"]) == 2
    assert "--lora x.safetensors is given twice: give it one weight" in capsys.readouterr().err
    monkeypatch.setattr("diffusion.cli.ui.find_spec", lambda name: name)
    assert main(["ui", "--host", "192.0.2.1"]) == 2
    assert capsys.readouterr().err.strip().endswith(": give another --host or --port")


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
