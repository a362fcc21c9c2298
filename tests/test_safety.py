"""Checkers look at finished pictures: what they flag is said and written down, and withheld where that is asked."""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from commands import Command, made, process
from diffusion import TextToImage, jobs, notices, safety
from diffusion.images import read_metadata
from diffusion.notices import Flagged
from diffusion.records import recall

PROMPT = "red apple"
WORDS = (PROMPT, "--steps", "1", "--seed", "7", "--num-images", "2")
CHECKS = '''
from dataclasses import dataclass
from PIL import ImageDraw
import beside

count = 0

@dataclass
class Seen:
    images: list

def second(images):
    """What came second in a batch, by whatever it shows; it paints what it has seen."""
    Seen(images)
    for image in images:
        ImageDraw.Draw(image).rectangle((0, 0, 99, 99), "black")
    return [beside.WHY if number == 1 else None for number, _ in enumerate(images)]

def all_of_them(images):
    return ["shy"] * len(images)

def none(images):
    return [None] * len(images)

def broken(images):
    raise ValueError("boom\\nand more")

def short(images):
    return [None]

def true(images):
    return [True] * len(images)

def empty(images):
    return [""] * len(images)
'''


@pytest.fixture
def checks(tmp_path: Path) -> Iterator[Path]:
    """A file of checkers in the current folder, with a module beside it."""
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "beside.py").write_text('WHY = "two\\n  lines"')
    safety.find_checker.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        for name in ("beside", "checks"):
            patch.delitem(sys.modules, name, raising=False)
        yield tmp_path / "checks.py"
    safety.find_checker.cache_clear()


# --- what is flagged is written as it is, and said


@pytest.mark.parametrize("where", ["checks.py:second", "checks:second"])
def test_what_is_flagged_is_written_as_it_is_and_said(draw: Command, checks: Path, where: str) -> None:
    plain = draw(*WORDS, "-o", "plain/")
    said = draw(*WORDS, "-o", "out/", "--checker", where)
    assert (said.code, said.out.count("\n")) == (0, 2)
    assert said.err == "generate.py: warning: picture of seed 8 is flagged: two lines\n"
    for before, after in zip(plain.paths, said.paths, strict=True):
        assert Image.open(before).tobytes() == Image.open(after).tobytes()
    assert [made(path).get("flagged") for path in said.paths] == [None, "two lines"]
    assert {**made(said.paths[1]), "flagged": None} == {**made(plain.paths[1]), "flagged": None}, "nothing else"
    assert made(said.paths[0]) == made(plain.paths[0]), "the checker is the call's, and not the picture's"


def test_quiet_and_bare_pictures_are_flagged_aloud(draw: Command, checks: Path) -> None:
    said = draw(*WORDS, "--checker", "checks.py:all_of_them", "--quiet", "--no-metadata")
    assert said.err.splitlines() == [f"generate.py: warning: picture of seed {n} is flagged: shy" for n in (7, 8)]
    assert [read_metadata(path) for path in said.paths] == [{}, {}]


def test_a_program_hears_of_it_in_an_event(draw: Command, checks: Path) -> None:
    words = (*WORDS, "--json", "--checker", "checks.py:second")
    events = draw(*words, "-o", "out/").events
    assert [event["event"] for event in events] == ["start", "step", "image", "image", "flagged"]
    facts = {"seed": 8, "reason": "two lines", "withheld": False, "path": events[3]["path"]}
    assert {name: events[4][name] for name in facts} == facts
    event = draw(*words, "--flagged", "withhold").events[-1]
    assert (event["event"], event["path"], event["withheld"], event["seed"]) == ("flagged", None, True, 8)


def test_what_is_not_flagged_changes_nothing(draw: Command, checks: Path) -> None:
    words = ("--checker", "checks.py:none", "--flagged", "withhold")
    said, plain = draw(*WORDS, "-o", "a/", *words), draw(*WORDS, "-o", "b/")
    assert (said.code, said.err) == (0, "")
    assert [path.read_bytes() for path in said.paths] == [path.read_bytes() for path in plain.paths]


# --- withheld


def test_what_is_withheld_is_written_nowhere(draw: Command, checks: Path) -> None:
    words = ("--checker", "checks.py:second", "--flagged", "withhold", "--grid", "g.png")
    said = draw(*WORDS, "-o", "out/", *words)
    assert said.code == 1
    assert said.err == "generate.py: warning: picture of seed 8 is flagged: two lines; it is withheld\n"
    assert [str(path) for path in said.paths] == ["out/00001-7-red-apple.png", "g.png"]
    assert Image.open("g.png").size == Image.open(said.paths[0]).size
    assert [path.name for path in Path("out").iterdir()] == ["00001-7-red-apple.png"]


@pytest.mark.parametrize(
    "words",
    [
        ["--film", "film.png", "--grid", "g.png", "-o", "one.png"],
        ["--compare", "cfg=1,2", "-o", "sheet.png"],
        ["--to-prompt", "blue boat", "--frames", "2", "-o", "way.gif"],
    ],
)
def test_no_file_shows_what_is_withheld(draw: Command, checks: Path, words: list[str]) -> None:
    before = sorted(Path().iterdir())
    said = draw(PROMPT, "-s", "7", "--steps", "1", *words, "--checker", "checks:all_of_them", "--flagged", "withhold")
    assert (said.code, said.out) == (1, "")
    assert "picture of seed 7 is flagged: shy; it is withheld" in said.err
    assert {path for path in Path().iterdir() if path.name != "__pycache__"} <= set(before)


def test_a_sheet_says_what_is_flagged_on_it(draw: Command, checks: Path) -> None:
    words = ("-s", "7", "--compare", "steps=1,2", "--checker", "checks:all_of_them")
    said = draw(PROMPT, *words, "-o", "sheet.png")
    assert (said.code, said.err.count("is flagged: shy")) == (0, 2)
    assert made(said.paths[0])["flagged"] == "shy"
    grid = draw(*WORDS, "--grid", "g.png", "--checker", "checks:second").paths[-1]
    assert made(grid)["flagged"] == "two lines", "though not all of it is"


# --- lists


@pytest.mark.parametrize("flagged", ["keep", "withhold"])
def test_a_list_and_its_manifest(draw: Command, checks: Path, flagged: str) -> None:
    Path("rows.txt").write_text(f"{PROMPT} --n_iter 2\nblue boat\n")
    words = ("--prompts", "rows.txt", "-s", "7", "--steps", "1", "-o", "out/", "--checker", "checks:second")
    said = draw(*words, "--flagged", flagged)
    rows = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done", "done"]
    if flagged == "keep":
        assert (said.code, len(said.paths)) == (0, 3)
        assert [one.get("flagged") for one in rows[0]["images"]] == [None, "two lines"]
        assert "withheld" not in rows[0]
        return
    assert (said.code, len(said.paths)) == (1, 2)
    assert said.err.splitlines()[-1] == "generate.py: 2 rows: 2 drawn; 1 picture withheld"
    assert rows[0]["withheld"] == [{"seed": 8, "flagged": "two lines"}]
    assert [one["seed"] for one in rows[0]["images"]] == [7]
    again = draw(*words, "--flagged", flagged, "--resume", "--json")
    done = {"event": "done", "rows": 2, "drawn": 0, "already": 2, "refused": 0, "failed": 0, "withheld": 1}
    assert (again.code, again.events[-1]) == (1, done), "what is missing is missing still"


def test_a_list_tells_of_the_row(draw: Command, checks: Path) -> None:
    Path("rows.txt").write_text(f"{PROMPT}\n")
    words = ("--prompts", "rows.txt", "-s", "7", "--steps", "1", "--json", "--grid", "g.png", "--flagged", "withhold")
    said = draw(*words, "--checker", "checks:all_of_them")
    (event,) = [event for event in said.events if event["event"] == "flagged"]
    assert (event["row"], event["seed"], event["path"], event["withheld"]) == (1, 7, None, True)
    assert not Path("g.png").exists()


def test_the_last_of_several_processes_tells_of_what_is_withheld(draw: Command, checks: Path, monkeypatch) -> None:
    Path("rows.txt").write_text(f"{PROMPT} --n_iter 2\nblue boat\n")
    words = ("--prompts", "rows.txt", "-s", "7", "--steps", "1", "-o", "out/", "--resume", "--flagged", "withhold")
    monkeypatch.setenv("WORLD_SIZE", "2")
    codes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        codes.append(draw(*words, "--checker", "checks:second").code)
    assert codes == [0, 1]


def test_a_checker_that_breaks_fails_its_rows(draw: Command, checks: Path) -> None:
    Path("rows.txt").write_text(f"{PROMPT}\n")
    said = draw("--prompts", "rows.txt", "-s", "7", "--steps", "1", "--checker", "checks:broken")
    assert said.code == 1
    assert "row 1: checker checks:broken failed (ValueError: boom" in said.err


# --- what goes wrong


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("checks.py:secnd", "checks.py has no function 'secnd'; did you mean 'second'?"),
        ("checks.py:count", "checks.py has no function 'count'"),
        ("nothing_there:f", "nothing_there cannot be imported (ModuleNotFoundError"),
        ("nothing.py:f", "nothing.py cannot be imported (FileNotFoundError"),
        ("torn.py:f", "torn.py cannot be imported (SyntaxError"),
        ("nowhere", "nowhere is not there: give module:function, file.py:function or a folder"),
        (":f", ":f is not there"),
        ("checks.py", "checker checks.py names no function: give checks.py:function"),
        ("checks.py:", "checker checks.py: names no function: give checks.py:function"),
        (".", "holds no safety_checker/"),
    ],
)
def test_a_checker_that_is_not_there_is_refused(draw: Command, checks: Path, monkeypatch, where, said) -> None:
    monkeypatch.setattr("diffusion.cli.request.load_model", None)
    Path("torn.py").write_text("def f(:")
    Path("rows.txt").write_text(f"{PROMPT}\n")
    for words in ([PROMPT], [PROMPT, "--dry-run"], ["--prompts", "rows.txt"]):
        found = draw(*words, "--checker", where)
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
        assert said in found.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--flagged", "withhold"], "give --checker as well"),
        (["--checker", "checks:none", "--flagged", "hide"], "invalid choice: 'hide'"),
        (["--checker", "checks:none", "--flagged", "withhold", "--preview", "p.png"], "--preview is written before"),
    ],
)
def test_flags_that_do_not_fit_are_refused(draw: Command, checks: Path, words: list[str], said: str) -> None:
    found = draw(PROMPT, *words)
    assert found.code == 2
    assert said in found.err


def test_a_checker_is_read_after_everything_else_is_right(draw: Command, checks: Path) -> None:
    Path("loud.py").write_text("open('read', 'w').close()\ndef f(images): return [None] * len(images)")
    assert draw(PROMPT, "--steps", "0", "--checker", "loud.py:f").code == 2
    assert not Path("read").exists()
    assert draw(PROMPT, "--dry-run", "--checker", "loud.py:f").code == 0
    assert Path("read").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "checker checks.py:broken failed (ValueError: boom and more)"),
        ("short", "checker checks.py:short does not answer for each picture: pictures 2, answers 1"),
        ("true", "checker checks.py:true answered True: it is to be None, or why it is flagged"),
        ("empty", "checker checks.py:empty answered '': it is to be None, or why it is flagged"),
    ],
)
def test_a_checker_that_does_not_say_is_a_failure(draw: Command, checks: Path, name: str, said: str) -> None:
    found = draw(*WORDS, "--checker", f"checks.py:{name}")
    assert (found.code, found.out, found.err) == (1, "", f"generate.py: {said}\n")


# --- pictures drawn again


def test_a_flagged_picture_is_drawn_again(draw: Command, checks: Path, tiny_model: Path) -> None:
    words = ("--checker", "checks:all_of_them", "-o", "a.png")
    path = draw(PROMPT, "-s", "7", "--steps", "1", *words).paths[0]
    assert recall(path, model=tiny_model).settings.seed == 7
    same = draw("--from-image", str(path), "--verify")
    assert (same.code, same.out) == (0, "a.png: identical\n")
    twice = draw("--from-image", str(path), "--verify", "--checker", "checks:all_of_them")
    assert (twice.code, twice.out) == (0, "a.png: identical\n")
    words = ("--from-image", str(path), "--verify", "--checker", "checks:all_of_them", "--flagged", "withhold")
    held = draw(*words, "-o", "b.png")
    assert (held.code, held.out) == (1, "a.png: identical\n")
    assert not Path("b.png").exists()


# --- Python


def shy(images: list[Image.Image]) -> list[str | None]:
    return [None, *["shy"] * (len(images) - 1)]


def test_python_says_it_too(tiny_model: Path) -> None:
    t2i = TextToImage.load(tiny_model, "cpu", "fp32", checker=shy)
    with pytest.warns(Flagged, match="^picture of seed 8 is flagged: shy$") as said:
        images = t2i(PROMPT, seed=7, steps=1, num_images=2)
    assert [image.info.get("flagged") for image in images] == [None, "shy"]
    assert [json.loads(image.info["diffusion"]).get("flagged") for image in images] == [None, "shy"]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t2i(PROMPT, seed=7, steps=1)


def test_python_lists_and_errors(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("red apple\nblue boat\n")
    t2i = TextToImage.load(tiny_model, "cpu", "fp32", checker=lambda images: [None])
    rows = jobs.read_jobs(tmp_path / "rows.txt")
    assert [result.error for result in jobs.run_jobs(t2i, rows, seed=1, steps=1)] == [None, None], "one by one it does"
    with pytest.raises(notices.CheckerError, match="<lambda> does not answer for each picture: pictures 2, answers 1"):
        t2i(PROMPT, steps=1, num_images=2)


# --- the stock checker


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder's ``safety_checker/`` of random weights that flags all, under the names of the published files."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig

    from diffusion.models.checker import safety_checker

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
    seeing = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=sizes | words, vision_config=sizes | seeing, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = safety_checker.StableDiffusionSafetyChecker(config)
    net.concept_embeds_weights.data.fill_(-1.1)  # a threshold that every cosine is above
    folder = tmp_path_factory.mktemp("stock") / "safety_checker"
    net.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): value.clone() for name, value in weights.items()
    }
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    return folder.parent


def test_the_stock_checker_flags_and_blackens_nothing(draw: Command, stock: Path, caplog) -> None:
    plain = draw(*WORDS, "-o", "plain/")
    said = draw(*WORDS, "-o", "out/", "--checker", str(stock))
    assert said.code == 0
    assert said.err.count(f"is flagged: the safety checker of {stock.name} takes it for unsafe") == 2
    assert "black" not in said.err + caplog.text
    assert [Image.open(a).tobytes() for a in said.paths] == [Image.open(b).tobytes() for b in plain.paths]


def test_the_stock_checker_is_the_stock_one(stock: Path) -> None:
    """By the figures that it compares: with weights of the published names, and pictures of any size."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    checker = safety.find_checker(str(stock))
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "white")]
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = checker.net(pixels(images=images, return_tensors="pt").pixel_values, [torch.ones(2), torch.ones(2)])[1]
    assert [answer is not None for answer in checker(images)] == theirs == [True, True]
    checker.net.concept_embeds_weights.data.fill_(1.1)
    try:
        assert checker(images) == [None, None]
    finally:
        checker.net.concept_embeds_weights.data.fill_(-1.1)


def test_reading_the_stock_checker_shows_no_bar(stock: Path) -> None:
    done = process("import sys; from diffusion.safety import find_checker; find_checker(sys.argv[1])", str(stock))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stock_folder_that_is_none_is_refused(draw: Command, stock: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(stock / "safety_checker" / "model.safetensors")
    (tmp_path / "torn" / "safety_checker").mkdir(parents=True)
    assert "cannot be read as a safety checker" in draw(PROMPT, "--dry-run", "--checker", "torn").err
    config = (stock / "safety_checker" / "config.json").read_text()
    (tmp_path / "torn" / "safety_checker" / "config.json").write_text(config)
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "torn" / "safety_checker" / "model.safetensors", {"format": "pt"})
    said = draw(PROMPT, "--dry-run", "--checker", "torn")
    assert said.code == 2
    assert "its weights have no visual_projection.weight" in said.err


def test_looking_for_a_checker_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from diffusion.safety import find_checker; find_checker('checks:none')"
    (tmp_path / "checks.py").write_text("def none(images): return [None]")
    done = process(f"{code}; sys.exit('torch' in sys.modules)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
