"""A picture draws itself again by the command line: the same bytes, --verify, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from commands import made, process
from diffusion.cli.generate import attempt
from diffusion.drawing import Drawing
from diffusion.images import save_image
from diffusion.records import read_record
from families import save
from test_foreign import NEWER, png
from test_recall import record_of

PROMPT = "red apple"


@pytest.fixture
def studio(draw, photo, red, tiny_model, tmp_path):
    """The command, in a folder with the tiny model, a picture, a mask and a LoRA."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    return draw


def again(command, path, *words):
    """The file that a picture makes of itself."""
    said = command("--from-image", str(path), *words, "-o", f"again{Path(path).suffix}", model=None)
    assert said.code == 0, said.err
    return said.paths[0].read_bytes()


# --- the same bytes

OWN = {
    "plain": [PROMPT, "-s", "3"],
    "one of a batch": [PROMPT, "-s", "3", "--num-images", "3", "--batch-size", "2", "--sampler", "Euler a"],
    "a variation": [PROMPT, "-s", "3", "--variation-seed", "9", "--variation-strength", "0.3", "--num-images", "2"],
    "on the way": [PROMPT, "-s", "3", "--to-prompt", "blue boat", "--to-seed", "5", "--frames", "3"],
    "a share of the way": [PROMPT, "-s", "3", "--to-prompt", "blue boat", "--share", "0.4"],
    "from a picture": [PROMPT, "-s", "3", "-i", "photo.png", "--strength", "0.5"],
    "a mask": [PROMPT, "-s", "3", "-i", "photo.png", "--mask", "mask.png", "--mask-blur", "2"],
    "beyond the edges": [PROMPT, "-s", "3", "-i", "photo.png", "--extend", "left=4"],
    "larger": [PROMPT, "-s", "3", "--hires", "1.5", "--hires-strength", "0.4"],
    "an interval": [PROMPT, "-s", "3", "--cfg", "4", "--guidance-interval", "0.3,inf", "--guidance-rescale", "0.5"],
    "no guidance": [PROMPT, "-s", "3", "--cfg", "1"],
    "sigmas": [PROMPT, "-s", "3", "--sigmas", "20,5,1,0"],
    "a tile": [PROMPT, "-s", "3", "--tile", "xy", "-n", "boat"],
    "another layer": [PROMPT, "-s", "3", "--clip-skip", "2", "--sampler", "DPM++ 2M Karras", "-W", "32"],
    "a LoRA": [PROMPT, "-s", "3", "--lora", "loras/red.safetensors:0.5"],
    "a LoRA of the prompt": [f"{PROMPT} <lora:red:0.5>", "-s", "3"],
    "a long prompt": [" ".join([PROMPT] * 30), "-s", "3", "--long-prompts"],
    "weights": ["(red:1.4) [apple] BREAK blue", "-s", "3"],
    "to the letter": ["(red:1.4) [apple]", "-s", "3", "--literal"],
    "half precision": [PROMPT, "-s", "3", "--dtype", "bf16"],
}


@pytest.mark.parametrize("name", OWN)
def test_our_own_come_back_to_the_last_byte(studio, name):
    suffix = {"plain": ".jpg", "larger": ".webp"}.get(name, ".png")
    steps = [] if name == "sigmas" else ["--steps", "2"]
    said = studio(*OWN[name], *steps, "-o", f"{{index}}{suffix}")
    assert said.code == 0, said.err
    assert again(studio, said.paths[-1]) == said.paths[-1].read_bytes()


def test_our_own_of_sdxl_come_back(studio, tmp_path):
    save("sdxl", tmp_path / "xl")
    said = studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png", model="xl")
    assert said.code == 0, said.err
    assert again(studio, "x.png") == Path("x.png").read_bytes()


# --- with other words, and compared


def test_flags_and_prompts_stand_in_for_what_is_recorded(studio):
    studio(PROMPT, "-s", "3", "--steps", "2", "-n", "boat", "--clip-skip", "2", "-o", "x.png")
    said = studio("--from-image", "x.png", "blue boat", "--steps", "3", "--clip-skip", "1", "-o", "y.png", model=None)
    assert said.code == 0, said.err
    record, before = made("y.png"), made("x.png")
    assert (record["prompt"], record["steps"], "clip_skip" in record) == ("blue boat", 3, False)
    same = before.keys() - {"prompt", "steps", "clip_skip"}
    assert {name: record[name] for name in same} == {name: before[name] for name in same}
    assert "from x.png, as diffusion wrote it" in said.err
    assert "steps 3 in place of 2" in said.err
    plain = studio("blue boat", "-s", "3", "--steps", "3", "-n", "boat", "-o", "z.png", model="tiny")
    assert plain.paths[0].read_bytes() == Path("y.png").read_bytes()


def test_more_pictures_are_drawn_from_one_and_compared_too(studio):
    studio(PROMPT, "-s", "3", "--steps", "2", "--sampler", "DPM++ 2M Karras", "-o", "x.png")
    said = studio("--from-image", "x.png", "--num-images", "2", "-o", "{seed}.png", model=None)
    assert [path.name for path in said.paths] == ["3.png", "4.png"]
    assert Path("3.png").read_bytes() == Path("x.png").read_bytes()
    words = ("--from-image", "x.png", "-o", "t.png", "--compare", "steps=1,2")
    said = studio(*words, "sampler=ddim,euler", model=None)
    assert said.code == 0, said.err
    assert (made("t.png")["seed"], made("t.png")["schedule"]) == (3, "karras")
    said = studio(*words, "sampler=Euler,DPM++ 2M Exponential", model=None)
    assert said.code == 0, said.err
    assert "schedule" not in made("t.png")


def test_a_lora_of_another_name_is_found_by_its_hash_and_keeps_its_strength(studio, red):
    studio(PROMPT, "-s", "3", "--steps", "2", "--lora", f"{red}:0.5", "-o", "x.png")
    red.rename("blue.safetensors")
    said = studio("--from-image", "x.png", "--lora", "blue.safetensors", "--verify", model=None)
    assert (said.code, said.out.splitlines()[0][:16]) == (0, "x.png: identical")
    assert studio("--from-image", "x.png", "--lora", "blue.safetensors:0.25", "--verify", model=None).code == 1


def test_a_dry_run_says_where_it_comes_from(studio, tmp_path):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = studio("--from-image", "x.png", "--cfg", "2", "--dry-run", model=None)
    assert (said.code, said.out) == (0, "")
    assert "from x.png, as diffusion wrote it; guidance_scale 2.0 in place of 3.0" in said.err
    assert "would draw 1 picture, 16x16, with tiny" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_verify_draws_again_and_writes_nothing(studio, tmp_path, suffix):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", f"x{suffix}")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = studio("--from-image", f"x{suffix}", "--verify", model=None)
    assert (said.code, said.out) == (0, f"x{suffix}: identical\n")
    said = studio("--from-image", f"x{suffix}", "--verify", "--steps", "3", model=None)
    assert said.code == 1
    assert said.out.startswith(f"x{suffix}: differs, up to ")
    assert said.out.endswith("(steps 2 -> 3)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert studio("--from-image", f"x{suffix}", "--verify", "-o", f"y{suffix}", model=None).code == 0
    assert Path(f"y{suffix}").read_bytes() == Path(f"x{suffix}").read_bytes()


def test_verify_takes_several_and_speaks_in_events(studio):
    for seed in ("3", "4"):
        studio(PROMPT, "-s", seed, "--steps", "2", "-o", f"{seed}.png")
    record_of(Path("4.png"), torch="0.1", model_hash="0123456789")
    said = studio("--from-image", "3.png", "changed.png", "4.png", "--verify", "--json", model=None)
    assert said.code == 0
    verdicts = {event["path"]: event for event in said.events if event["event"] == "verified"}
    assert [event["identical"] for event in verdicts.values()] == [True, True, True]
    assert verdicts["3.png"] | {"differs": {}} == verdicts["3.png"]
    assert verdicts["3.png"]["decibels"] is None
    assert verdicts["changed.png"]["differs"].keys() == {"torch", "model_hash"}
    assert [event["message"] for event in said.events if event["event"] == "warning"] == [
        line.partition(": ")[2] for line in said.err.splitlines()
    ]
    assert "was drawn with 0123456789" in said.err
    changed = read_record("3.png").record | {"seed": 5}
    other = Image.open("3.png")
    other.info["diffusion"] = json.dumps(changed)
    save_image(other, "5.png")
    said = studio("--from-image", "3.png", "5.png", "--verify", "--quiet", model=None)
    assert (said.code, said.err) == (1, "")
    assert [line.split(",")[0] for line in said.out.splitlines()] == ["3.png: identical", "5.png: differs"]


def test_another_programs_picture_is_drawn_with_a_model_of_ours(studio, tmp_path):
    png(tmp_path / "x.png", parameters=NEWER.replace("64x64", "16x16"))
    said = studio("--from-image", "x.png", "-o", "y.png")
    assert said.code == 0, said.err
    assert "warning: x.png: recorded, and not done here: TI hashes me: 12ab" in said.err
    expected = {"sampler": "dpmpp_2m", "schedule": "sgm_uniform", "steps": 8, "seed": 3, "variation_seed": 7}
    assert {name: made("y.png")[name] for name in expected} == expected
    said = studio("--from-image", "x.png", "--verify")
    assert said.code == 1
    assert "program AUTOMATIC1111 -> diffusion" in said.out


WRONG = [
    (["--from-image"], "--from-image"),
    (["--from-image", "gone.png"], "gone.png is not there"),
    (["--from-image", "x.png", "--batch-size", "0"], "again: with what is given, batch_size must be at least 1"),
    (["--from-image", "a prompt"], "--from-image a prompt is no picture"),
    (["--from-image", "mask.png"], "mask.png says nothing of how it was made"),
    (["--verify", PROMPT], "give --from-image"),
    (["--from-image", "x.png", "--verify", "--num-images", "2"], "compares one picture, and 2"),
    (["--from-image", "x.png", "--verify", "--grid", "g.png"], "--grid has no place beside --verify"),
    (["--from-image", "x.png", "--prompts", "list.txt"], "--prompts has no place beside --from-image"),
    (["--from-image", "x.png", "-o", "x.png"], "--output x.png is from_image too"),
    (["--from-image", "x.png", "--mask", "mask.png"], "mask needs a picture to begin from"),
    (["--from-image", "x.png", "--sampler", "eulr"], "did you mean 'euler'"),
    (["--from-image", "x.png", "lms.png"], "unknown sampler 'lms', must be one of euler"),
    (["--from-image", "x.png", "gone2.png"], "its model 'gone' (0123456789) is not here: give model"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_what_cannot_be_drawn_again_is_one_line(studio, tmp_path, words, message):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png")
    record_of(tmp_path / "x.png", sampler="lms").rename(tmp_path / "lms.png")
    record_of(tmp_path / "x.png", model="gone", model_hash="0123456789").rename(tmp_path / "gone2.png")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = studio(*words, model=None)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_one_that_fails_stops_no_other(studio, monkeypatch):
    for prompt in ("bad", "good"):
        studio(prompt, "-s", "3", "--steps", "2", "-o", f"{prompt}.png")
    condition = Drawing._condition

    def poisoned(self, shot, chunks):
        if shot.prompt == "bad":
            raise OSError("out of luck")
        return condition(self, shot, chunks)

    monkeypatch.setattr(Drawing, "_condition", poisoned)
    said = studio("--from-image", "bad.png", "good.png", "--verify", model=None)
    assert (said.code, said.out) == (1, "good.png: identical\n")
    assert "generate.py: bad.png: out of luck\n" in said.err
    Path("half.png").write_bytes(Path("good.png").read_bytes()[:-300])
    said = studio("--from-image", "half.png", "--verify", model=None)
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines()[-1].startswith("generate.py: half.png cannot be read as a picture (")


def test_a_reader_that_leaves_ends_all_of_them():
    def broken():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        attempt(broken, None, None)


def test_the_very_picture_is_no_change(studio, photo):
    image, mask = map(str, photo)
    studio(PROMPT, "-s", "3", "--steps", "2", "-i", image, "--mask", mask, "-o", "x.png")
    said = studio("--from-image", "x.png", "-i", image, "--mask", mask, "--verify", model=None)
    assert said.err == "generate.py: from x.png, as diffusion wrote it\n"
    said = studio("--from-image", "x.png", "-i", "x.png", "--dry-run", model=None)
    assert f"init_image x.png in place of {Path(image).name} (" in said.err
    said = studio("--from-image", "x.png", "-i", "gone.png", "--mask", mask, model=None)
    assert (said.code, said.err) == (2, "generate.py: x.png cannot be drawn again: gone.png is not there\n")


def test_it_is_refused_before_torch_is_loaded(studio):
    png(Path("x.png"), parameters=NEWER)
    code = (
        "import sys; from diffusion.cli.generate import run\n"
        "code = run(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = process(code, "--from-image", "x.png")
    assert done.returncode == 2, done.stderr
    assert "its model 'm' (abc) is not here: give model" in done.stderr
