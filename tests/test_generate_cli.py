"""generate.py as its users meet it: flags, exit codes, what goes to which stream, and what is loaded when."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import Command, made, process
from diffusion import TextToImage
from diffusion.images import read_metadata
from families import psnr

HEAVY = ("torch", "numpy", "PIL", "pydantic", "transformers", "diffusers", "tqdm")


# --- what is drawn


def test_a_prompt_makes_one_picture_and_its_path_is_all_of_stdout(draw: Command) -> None:
    said = draw("a red apple")
    (path,) = said.paths
    seed = made(path)["seed"]
    assert said.code == 0
    assert str(path) == f"outputs/00001-{seed}-a-red-apple.png"
    assert f"seed {seed}" in said.err  # it was drawn, so it is told
    assert said.err.count("\n") == 1  # and no bar where nobody watches
    assert Image.open(path).size == (16, 16)


@pytest.mark.parametrize(("size", "far"), [("24x16", False), ("32x16", True), ("16x8", True)])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("listed", [False, True])
def test_a_size_far_from_the_models_own_is_told_once(
    draw: Command, size: str, far: bool, dry: list[str], listed: bool
) -> None:
    Path("list.txt").write_text("a red apple\na blue boat\n")
    words = ["--prompts", "list.txt"] if listed else ["a red apple", "a blue boat"]
    said = draw(*words, "--size", size, "-s", "1", *dry)
    (hires,) = [line for line in said.err.splitlines() if "far from" in line] or [""]
    assert (f"{size} is far from the model's own 16x16" in hires) == far
    assert ("--hires" in hires) == (size == "32x16")
    assert "far from" not in draw(*words, "--size", size, "-s", "1", *dry, "--quiet").err


FLAGS = [
    (["--negative-prompt", "blue boat"], {"negative_prompt": "blue boat"}),
    (["--negative_prompt=blue_boat --x"], {"negative_prompt": "blue_boat --x"}),
    (["-n", ""], {"negative_prompt": ""}),
    (["--seed", "5"], {"seed": 5}),
    (["-s0"], {"seed": 0}),
    (["--steps", "2"], {"steps": 2}),
    (["--guidance-scale", "2.5"], {"guidance_scale": 2.5}),
    (["--guidance_scale", "0"], {"guidance_scale": 0.0}),
    (["--cfg", "1"], {"guidance_scale": 1.0}),
    (["--cfg-scale=4"], {"guidance_scale": 4.0}),
    (["--cfg_scale=4"], {"guidance_scale": 4.0}),
    (["--sampler", "DPM++ 2M"], {"sampler": "dpmpp_2m"}),
    (["--schedule", "Karras"], {"schedule": "karras"}),
    (["--width", "32"], {"width": 32, "height": 16}),
    (["-W", "32", "-H", "24"], {"width": 32, "height": 24}),
    (["--height", "32"], {"width": 16, "height": 32}),
    (["--size", "24x32"], {"width": 24, "height": 32}),
    (["--device", "cpu"], {"device": "cpu"}),
    (["--device", "auto", "--dtype", "bf16"], {"dtype": "bfloat16"}),
    (["--batch-size", "1", "--num_images", "1"], {}),
    (["--batch_size", "1"], {}),
]


@pytest.mark.parametrize(("words", "expected"), FLAGS, ids=lambda value: " ".join(value) if value else "")
def test_every_flag_reaches_the_picture(draw: Command, words: list[str], expected: dict[str, Any]) -> None:
    said = draw("a red apple", *words)
    assert said.code == 0, said.err
    record = made(said.paths[0])
    assert {name: record[name] for name in expected} == expected
    assert Image.open(said.paths[0]).size == (record["width"], record["height"])


def test_compiling_is_told_and_changes_no_picture(
    draw: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward) or forward)
    said = draw("red", "-s", "1", "--compile", "--dtype", "fp32", "-o", "fast.png")
    assert (said.code, len(compiled)) == (0, 1), said.err
    assert re.search("--compile: .* s to compile", said.err)
    fast = TextToImage.load(tiny_model, "cpu", "fp32", compile=True)
    assert len(compiled) == 2
    (plain,) = TextToImage.load(tiny_model, "cpu", "fp32")("red", seed=1)
    assert all(psnr(image, plain) >= 60 for image in (Image.open("fast.png"), *fast("red", seed=1)))


def test_prompts_may_stand_anywhere(draw: Command) -> None:
    said = draw("red", "--seed", "3", "green", "--prompt", "blue", "-p", "_x_", "--steps", "1", "--", "-dash")
    assert said.code == 0, said.err
    assert [made(path)["prompt"] for path in said.paths] == ["red", "green", "-dash", "blue", "_x_"]
    assert {made(path)["seed"] for path in said.paths} == {3}


def test_picture_k_of_a_call_is_the_picture_of_seed_plus_k(draw: Command) -> None:
    several = draw("cat", "--seed", "5", "--num-images", "3", "--batch-size", "2", "--sampler", "euler_ancestral")
    assert [made(path)["seed"] for path in several.paths] == [5, 6, 7]
    alone = draw("cat", "--seed", "7", "--sampler", "euler_ancestral")
    assert Image.open(several.paths[2]).tobytes() == Image.open(alone.paths[0]).tobytes()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("apple.png", ["apple.png"]),
        ("new/deep/apple.jpg", ["new/deep/apple.jpg"]),
        ("apple.webp", ["apple.webp"]),
        ("folder", ["folder/00001-5-red-apple.png"]),
        ("folder/", ["folder/00001-5-red-apple.png"]),
        ("{seed}/{slug}-{index}.png", ["5/red-apple-1.png"]),
    ],
)
def test_output(draw: Command, output: str, expected: list[str]) -> None:
    said = draw("red apple", "-s", "5", "--steps", "1", "-o", output)
    assert said.code == 0, said.err
    assert [str(path) for path in said.paths] == expected
    assert read_metadata(expected[0])["parameters"].startswith("red apple\n")


def test_only_a_file_that_was_named_is_overwritten(draw: Command) -> None:
    words = ("red apple", "--steps", "1", "-s")
    first, second = (draw(*words, "1", "-o", "x.png") for _ in range(2))
    assert first.paths == second.paths
    assert len({path for _ in range(2) for path in draw(*words, "1", "-o", "{slug}.png").paths}) == 2
    assert [path.name[:5] for _ in range(2) for path in draw(*words, "1").paths] == ["00001", "00002"]


def test_a_file_that_is_write_protected_stays(draw: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save("x.png")
    access = os.access  # which lets root write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "x.png" and access(path, mode))
    for flag in ("--output", "--grid", "--preview"):
        said = draw("red apple", flag, "x.png", "--steps", "1")
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert f"{flag} x.png is write-protected" in said.err
    assert Image.open("x.png").size == (8, 8)
    assert draw("red apple", "-o", "y.png", "--steps", "1").code == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_choices_are_for_lists_and_that_is_told(draw: Command, dry: list[str]) -> None:
    few = ("--steps", "1", "-s", "1", "--size", "16x16", *dry)
    for prompt in ("a {red|green} apple", "a __thing__"):
        said = draw("a boat", "-p", prompt, *few)
        assert said.code == 0, said.err
        (told,) = [line for line in said.err.splitlines() if "warning" in line]
        assert f"warning: {prompt!r}: choices and wildcards are made in lists (--prompts FILE)" in told
        assert "lists" not in draw(prompt, *few, "--literal").err
    for prompt in ("{red}", "[red|green]", r"a \{red|green\}", "two__three", "red|green"):
        assert "lists" not in draw(prompt, *few).err
    Path("list.txt").write_text("a {red|green} apple\n")
    assert "are made in lists" not in draw("--prompts", "list.txt", *few).err
    (event,) = [event for event in draw("{a|b}", *few, "--json").events if event["event"] == "warning"]
    assert "--prompts FILE" in event["message"]


def test_no_metadata(draw: Command) -> None:
    said = draw("red apple", "--no-metadata", "--steps", "1")
    assert read_metadata(said.paths[0]) == {}


def test_quiet_says_only_the_paths(draw: Command) -> None:
    said = draw("red apple", "--quiet", "--steps", "1")
    assert (said.code, said.err) == (0, "")
    assert said.paths[0].is_file()


def test_json_is_one_event_a_line(draw: Command) -> None:
    said = draw("red apple", "--json", "--steps", "2", "--seed", "4", "--num-images", "3", "--batch-size", "2")
    assert (said.code, said.err) == (0, "")
    kinds = ["start", "step", "step", "image", "image", "step", "step", "image"]
    assert [event["event"] for event in said.events] == kinds
    assert said.events[0]["seed"] == 4
    assert [(event["index"], event["total"]) for event in said.events if event["event"] == "step"] == [
        (1, 2),
        (2, 2),
    ] * 2
    images = [event for event in said.events if event["event"] == "image"]
    assert [event["seed"] for event in images] == [4, 5, 6]
    assert [hashlib.sha256(Path(event["path"]).read_bytes()).hexdigest() for event in images] == [
        event["sha256"] for event in images
    ]


def test_a_dry_run_writes_nothing(draw: Command, tmp_path: Path) -> None:
    said = draw("red apple", "--dry-run", "--steps", "3", "--sampler", "Euler a", "-o", "new/")
    assert (said.code, said.out) == (0, "")
    assert "euler_ancestral" in said.err
    assert list(tmp_path.iterdir()) == []
    events = draw("red apple", "--dry_run", "--json").events
    assert [event["event"] for event in events] == ["start"]


def test_a_dry_run_finds_what_a_run_would(draw: Command) -> None:
    assert draw("apple " * 30, "--dry-run").code == 2


# --- what cannot be drawn

WRONG = [
    ([], "no prompt"),
    (["a", "--setps", "3"], "did you mean '--steps'"),
    (["a", "--num_imags=3"], "did you mean '--num-images'"),
    (["a", "--step", "3"], "did you mean '--steps'"),
    (["a", "-x"], "-x"),
    (["a", "-size", "16x16"], "unknown flag '-size'; did you mean '--size'?"),
    (["a", "-num_images=3"], "did you mean '--num-images'?"),
    (["--from-image", "http://a.b/x.png"], "from_image http://a.b/x.png is an address, and no file: download it first"),
    (["a", "--steps"], "--steps"),
    (["a", "--steps", "many"], "'many'"),
    (["a", "--steps", "0"], "steps must be at least 1, got 0"),
    (["a", "--steps", "-3"], "steps must be at least 1, got -3"),
    (["a", "--steps", "1001"], "1000 noise levels"),
    (["a", "--seed", "-1"], "seed must be at least 0"),
    (["a", "--cfg", "nan"], "finite"),
    (["a", "--cfg=-inf"], "finite"),
    (["a", "--cfg", "-1"], "at least 0"),
    (["a", "--sampler", "eulr"], "did you mean 'euler'"),
    (["a", "--schedule", "karas"], "did you mean 'karras'"),
    (["a", "--width", "15"], "width 15 is not a multiple of 2"),
    (["a", "--size", "16x15"], "height 15 is not a multiple of 2"),
    (["a", "--size", "big"], "'big'"),
    (["a", "--size", "16x16", "--width", "16"], "give one of them"),
    (["a", "--num-images", "0"], "at least 1"),
    (["a", "--batch-size", "0"], "at least 1"),
    (["a", "--device", "cdua"], "did you mean 'cuda'"),
    (["a", "--dtype", "fp61"], "did you mean 'fp16'"),
    (["a", "--device", "cpu", "--dtype", "fp16"], "use float32 or bfloat16"),
    (["a", "--dtype", "fp16"], "use float32 or bfloat16"),
    (["apple " * 30], "30 tokens long, but this text encoder reads 22"),
    (["a", "-n", "apple " * 30], "30 tokens long"),
    (["a", "--model", "nowhere"], "'nowhere' not found"),
    (["a", "--model", "emoji-fst"], "did you mean 'emoji-fast'? (models that are here: emoji, emoji-fast)"),
    (["--from-image", "nowhere.png"], "generate.py: nowhere.png is not there"),
    (["a", "--model", "."], "is not a model folder"),
    (["a", "-o", "x.gif"], "must end in one of"),
    (["a", "-o", "{sed}.png"], "unknown field {sed}"),
    (["a", "b", "-o", "x.png"], "names one file, but 2 pictures"),
    (["a", "-o", "/proc/nowhere/x.png"], "/proc/nowhere is not writable"),
    (["a", "-o", "y" * 300 + ".png"], "longer than 255 bytes"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: " ".join(value)[:40] if value else "none")
def test_a_wrong_request_is_answered_in_one_line(draw: Command, tmp_path: Path, words: list[str], message: str) -> None:
    if words[1:2] == ["--dtype"] and torch.cuda.is_available():
        pytest.skip("half precision is right on this machine")
    said = draw(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("generate.py: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_request_is_an_event_too(draw: Command) -> None:
    said = draw("a", "--json", "--steps", "0")
    assert said.code == 2
    assert [event["event"] for event in said.events] == ["error"]
    assert "steps" in said.events[0]["message"]


# --- what goes wrong on the way


@pytest.mark.parametrize(
    "failure",
    [FloatingPointError("not finite"), RuntimeError("two\nlines"), ValueError("shape"), KeyError("x"), OSError("full")],
    ids=repr,
)
def test_a_failure_while_running_is_one_line_and_1(
    draw: Command, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("diffusion.repair.decode", fail)
    said = draw("a", "--quiet", "--steps", "1")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("generate.py: ")
    assert said.err.count("\n") == 1


def test_no_black_picture_is_a_success(draw: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffusion.repair.decode", lambda vae, x: [Image.new("RGB", (16, 16)) for _ in x])
    said = draw("a", "--json", "--steps", "1")
    assert said.code == 1
    assert said.events[-1]["event"] == "error"
    assert not list(tmp_path.rglob("*.png"))


def test_weights_that_are_not_finite_are_a_failure(draw: Command, tiny_model: Path, tmp_path: Path) -> None:
    from diffusion.models.folder import load_model, save_model

    broken = load_model(tiny_model)
    broken.unet.conv_out.weight.data.fill_(float("nan"))
    save_model(broken, tmp_path / "broken")
    said = draw("a", "--quiet", model=tmp_path / "broken")
    assert (said.code, said.out) == (1, "")
    assert "not finite" in said.err


def test_pictures_of_finished_batches_stay_and_ctrl_c_is_130(draw: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion import repair

    decode, calls = repair.decode, []

    def interrupted(vae: Any, latents: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return decode(vae, latents)

    monkeypatch.setattr(repair, "decode", interrupted)
    said = draw("a", "--steps", "1", "--num-images", "3", "--batch-size", "1")
    assert said.code == 130
    assert len(said.paths) == 1
    assert said.paths[0].is_file()
    assert "Traceback" not in said.err


# --- the process


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], ["a", "--setps", "3"], ["a", "--sampler", "eulr"], ["a", "--steps", "0"], []], ids=str
)
def test_nothing_heavy_is_loaded_for_a_quick_answer(words: list[str]) -> None:
    code = (
        "import sys; from diffusion.cli.generate import run\n"
        "try: run(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"sys.exit(str([name for name in {HEAVY} if name in sys.modules]) if set({HEAVY}) & set(sys.modules) else 0)"
    )
    done = process(code, *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["a"], ["--prompts", "list.txt"]])
def test_ctrl_c_ends_it_while_libraries_are_imported_whatever_they_do_with_exceptions(
    words: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("a\n")
    code = """
import os, signal, sys, time
from diffusion.cli import request
from diffusion.cli.generate import run

def load(*given, **named):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise RecursionError("numpy") from None

request.load_model = load
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(run(sys.argv[1:], prog="generate.py"))
"""
    done = process(code, *words, "--model", str(tiny_model), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "generate.py: interrupted\n")


def test_help_names_every_flag() -> None:
    done = process("", "--help")
    assert done.returncode == 0
    names = {
        word for words, _ in FLAGS for word in words if word.startswith("--") and "_" not in word and "=" not in word
    }
    for flag in names | {"--json", "--dry-run", "--no-metadata", "--quiet", "--prompt", "--model", "--output"}:
        assert flag in done.stdout
    said = " ".join(done.stdout.split())
    assert "--output PATH file (overwritten), folder/ or template" in said
    assert "shipped model (emoji, emoji-fast)" in said
    assert "--wildcards DIR of a list: where __name__ finds its lines" in said


def test_the_script_draws(tiny_model: Path, tmp_path: Path) -> None:
    done = process("", "a red apple", "--model", str(tiny_model), "-s", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / done.stdout.strip()).is_file()


def test_the_installed_command_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    code = "import sys; from diffusion.cli import main; sys.exit(main())"
    done = process(code, "generate", "a", "--model", str(tiny_model), "--steps", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "diffusion generate: steps must be at least 1, got 0\n"
