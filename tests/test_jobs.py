"""Lists of pictures: their three formats, what is refused, the manifest, going on after a kill, several processes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from diffusion import TextToImage, manifest
from diffusion.cli import jobs as command
from diffusion.cli import listed
from diffusion.jobs import choose, read_jobs, run_jobs
from diffusion.options import read_line
from diffusion.settings import Settings
from test_controls import red  # noqa: F401 - a fixture
from test_generate_cli import ROOT, draw, made  # noqa: F401 - a fixture


def written(folder: str | Path = "out") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text().splitlines()]


def listing(name: str, *rows: str | dict) -> str:
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


# --- what lines say

LINES = [
    ("a cat", {"prompt": "a cat"}),
    ("a -- b, 3--4 and --5", {"prompt": "a -- b, 3--4 and --5"}),
    (
        "a cat, up --n bad, low quality --w 512 --h 384 --d 1 --s 20 --l 7.5 --t 0.5 --ss euler_a --cn x.png",
        {"prompt": "a cat, up", "negative_prompt": "bad, low quality", "width": 512, "height": 384, "seed": 1}
        | {"steps": 20, "guidance_scale": 7.5, "strength": 0.5, "sampler": "euler_a", "control_image": "x.png"},
    ),
    (
        '--prompt "a cat" and more --negative_prompt "b -- c" --steps 20 --cfg_scale 7 --seed -1 --width 64',
        {"prompt": "a cat and more", "negative_prompt": "b -- c", "steps": 20, "guidance_scale": 7.0, "seed": None}
        | {"width": 64},
    ),
    (
        '--prompt x --sampler_name "DPM++ 2M" --batch_size 4 --n_iter 2 --outpath_samples some/ --tiling true',
        {"prompt": "x", "sampler": "DPM++ 2M", "batch_size": 4, "num_images": 8, "output": "some/", "tile": "xy"},
    ),
    (
        "--prompt x --subseed 5 --subseed_strength 0.25 --restore_faces false --do_not_save_grid true --n_iter 3",
        {"prompt": "x", "variation_seed": 5, "variation_strength": 0.25, "num_images": 3},
    ),
    ("--prompt x --subseed -1 --subseed_strength 0 --seed_resize_from_h 0", {"prompt": "x"}),
    ("x --size 64x32 --guidance-interval 0.5,inf", {"prompt": "x", "width": 64, "height": 32}
     | {"guidance_interval": (0.5, None)}),
]  # fmt: skip
BAD_LINES = [
    ("a --setps 3", "did you mean 'steps'"),
    ("a --s many", "steps: 'many' is not a whole number"),
    ("a --s 3 --steps 4", "steps is given twice"),
    ('--prompt "a', "quotes do not match"),
    ("a --d 1,2", "seed: '1,2' is not a whole number"),
    ("a --batch_size 2 --num_images 2", "say the same thing"),
    ("--prompt a --styles x", "'styles' is not supported"),
    ("a --nl 1 --s 3", "'nl' is not supported: the negative prompt has no scale of its own"),
    ("a --am 0.5", "'am' is not supported: write <lora:name:0.8> into the prompt"),
    ("a --n b --c d", "'c' is not supported"),
    ("--prompt a --outpath_grids x/", "'outpath_grids' is not supported: no grid is made of a row"),
    ("--prompt a --sampler_index 3", "'sampler_index' is not supported: name it"),
    ("--prompt a --restore_faces true", "faces are not restored"),
    ("--prompt a --seed_resize_from_w 512", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fields"), LINES, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_line_is_read_as_the_programs_read_it_that_people_know(line, fields):
    assert read_line(line) == fields


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=lambda value: value[:40])
def test_what_a_line_cannot_mean_is_refused_by_name(tmp_path, line, message):
    (tmp_path / "list.txt").write_text(f"# first\n{line}\na cat\n")
    wrong, right = read_jobs(tmp_path / "list.txt")
    assert message in wrong.fault
    assert (wrong.number, right.number) == (2, 3)
    assert right.settings(seed=1) == Settings(prompts=("a cat",), seed=1)


def test_three_formats_say_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("a cat --n bad --steps 3 --cfg 2.5 --size 64x32 --seed 4\n\na dog\n")
    objects = [{"prompt": "a cat", "negative": "bad", "steps": 3, "cfg_scale": 2.5, "size": "64x32", "seed": 4}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*objects, {"prompt": "a dog", "seed": None}])))
    (tmp_path / "a.csv").write_text(
        'prompt,negative-prompt,Steps,cfg,size,seed\n"a cat",bad,3,2.5,64x32,4\na dog,,,,,\n'
    )
    found = [[row.settings(seed=9) for row in read_jobs(tmp_path / f"a.{end}")] for end in ("txt", "jsonl", "csv")]
    assert found[0] == found[1] == found[2]
    assert found[0][0].guidance_scale == 2.5
    assert found[0][1] == Settings(prompts=("a dog",), seed=9)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "# nothing\n\n", "holds no prompt"),
        ("x.jsonl", "", "holds no prompt"),
        ("x.csv", "red apple,3\n", "unknown name 'red apple'"),
        ("x.csv", "steps,seed\n3,1\n", "no header with a column named prompt"),
        ("x.csv", "prompt,setps\na,3\n", "did you mean 'steps'"),
        ("x.csv", 'prompt\n"a', "x.csv: "),
        ("x.csv", "", "no header"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_one_line_and_loads_nothing(
    draw,  # noqa: F811
    monkeypatch,
    name,
    text,
    message,
):
    monkeypatch.setattr("diffusion.cli.request.load_model", None)
    Path(name).write_text(text)
    for words in (["--prompts", name], ["--prompts", name, "--dry-run", "--json"]):
        said = draw(*words)
        assert said.code == 2
        assert message in said.err
        assert said.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == [name]


WRONG = [
    ({"prompt": "a", "setps": 3}, "did you mean 'steps'"),
    ({"prompt": "a", "steps": 0}, "steps must be at least 1, got 0"),
    ({"prompt": "a", "steps": "3"}, "steps must be a whole number"),
    ({"prompt": 3}, "prompt must be text"),
    ({"steps": 3}, "no prompt"),
    ({"prompt": "apple " * 30}, "30 tokens long"),
    ({"prompt": "a", "size": "15x16"}, "width 15 is not a multiple of 2"),
    ({"prompt": "a", "size": "16x16", "width": 16}, "width is given twice"),
    ({"prompt": "a", "init_image": "nowhere.png"}, "nowhere.png"),
    ({"prompt": "a", "strength": 0.5}, "strength needs"),
    ({"prompt": "a", "sampler": "eulr"}, "did you mean 'euler'"),
    ({"prompt": "a <lora:nowhere>"}, "'nowhere', which is not in loras/"),
    ({"prompt": "a {b"}, "never closed"),
    ({"prompt": "a", "model": "other"}, "draw this one with -m other"),
    ({"prompt": "a", "lora": "x"}, "write <lora:name:0.8>"),
    ({"prompt": "a", "output": "x.gif"}, "must end in one of"),
    ({"prompt": "a", "output": "one.png"}, "that of row 1 too"),
    ({"prompt": "a", "control_image": "one.png"}, "belong together"),
    ("{", "it is no JSON"),
    ('["a"]', "it is no JSON object"),
    ('{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
]


def test_a_wrong_row_is_told_and_spoils_no_other(draw):  # noqa: F811
    good = {"prompt": "red apple", "output": "one.png"}, {"prompt": "green apple"}
    listing("rows.jsonl", good[0], *(row for row, _ in WRONG), good[1])
    words = ("--prompts", "rows.jsonl", "-o", "out/", "-s", "1", "--steps", "1")
    planned = draw(*words, "--dry-run")
    assert planned.code == 2
    assert not Path("out").exists(), "a dry run writes nothing"
    assert "row 1: would draw 'red apple': 1 picture, 16x16, 1 steps of ddim" in planned.err
    said = draw(*words, "--json")
    assert said.code == 2
    errors = {event["row"]: event["message"] for event in said.events if event["event"] == "error"}
    assert list(errors) == list(range(2, 2 + len(WRONG)))
    for (row, message), told in zip(WRONG, errors.values(), strict=True):
        assert message in told, row
    for number, told in errors.items():
        assert told.startswith(f"row {number}: ")
        assert f"generate.py: {told}\n" in said.err
        assert f"generate.py: {told}\n" in planned.err
    images = [event for event in said.events if event["event"] == "image"]
    assert [(event["row"], event["prompt"]) for event in images] == [(1, "red apple"), (len(WRONG) + 2, "green apple")]
    counts = {"rows": len(WRONG) + 2, "drawn": 2, "already": 0, "refused": len(WRONG), "failed": 0, "withheld": 0}
    assert said.events[-1] == {"event": "done", **counts}
    lines = {line["row"]: line for line in written()}
    assert lines[2]["status"] == "refused"
    assert "did you mean" in lines[2]["reason"]
    for event in images:
        (file,) = lines[event["row"]]["images"]
        assert file == {name: event[name] for name in ("path", "seed", "sha256")}
        assert hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest() == file["sha256"]
        settings = lines[event["row"]]["settings"]
        assert (settings["prompt"], settings["steps"], settings["seed"]) == (event["prompt"], 1, 1)


def test_where_no_row_is_right_nothing_is_loaded(draw, monkeypatch):  # noqa: F811
    monkeypatch.setattr("diffusion.cli.request.load_model", None)
    said = draw("--prompts", listing("rows.jsonl", {"prompt": "a", "steps": 0}, {"prompt": ""}), "--cfg", "nan")
    assert said.code == 2
    assert "row 1: " in said.err
    assert "row 2: guidance_scale must be a finite number" in said.err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--resume"], "--resume is for the prompts of a list"),
        (["--prompts", "l.txt", "-o", "x.png"], "names one file, but 2 pictures"),
        (["--prompts", "l.txt", "--compare", "steps=1,2"], "--compare makes one file"),
        (["--prompts", "l.txt", "--film", "x.gif"], "--film makes one file"),
        (["--prompts", "l.txt", "--resume", "--grid", "x.png"], "--grid is of the pictures of one call"),
        (["--prompts", "l.txt", "--num-images", "0"], "num_images must be at least 1"),
    ],
)
def test_what_a_list_cannot_do_is_refused_at_once(draw, words, message):  # noqa: F811
    listing("l.txt", "red", "green")
    said = draw(*words)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


# --- what is drawn


def test_a_row_is_what_the_command_line_with_its_flags_is(draw):  # noqa: F811
    assert draw("red cat", "-s", "1", "-o", "first.png").code == 0
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 8))
    mask.save("mask.png")
    rows = {
        "n": ({"negative": "blue boat", "cfg": 4}, ["-n", "blue boat", "--cfg", "4"]),
        "s": ({"seed": 8, "steps": 2, "sampler": "DPM++ 2M Karras"}, ["-s8", "--steps=2", "--sampler=DPM++ 2M Karras"]),
        "w": ({"size": [24, 32], "schedule": "beta"}, ["--size", "24x32", "--schedule", "beta"]),
        "i": ({"init_image": "first.png", "strength": 0.5}, ["-i", "first.png", "--strength", "0.5"]),
        "m": ({"init_image": "first.png", "mask": "mask.png"}, ["-i", "first.png", "--mask", "mask.png"]),
    }
    some = [{"prompt": "red apple", "output": f"rows/{name}.png", **fields} for name, (fields, _) in rows.items()]
    said = draw("--prompts", listing("rows.jsonl", *some, {"prompt": "cat", "num_images": 2}), "-s", "3", "-o", "out/")
    assert said.code == 0, said.err
    for name, (_, words) in rows.items():
        words = ["-s", "3", *words] if "-s8" not in words else words
        (alone,) = draw("red apple", *words, "-o", "alone.png").paths
        assert Image.open(alone).tobytes() == Image.open(f"rows/{name}.png").tobytes(), name
        assert made(alone) == made(Path(f"rows/{name}.png"))
    assert [path.name for path in said.paths[-2:]] == ["00001-3-cat.png", "00002-4-cat.png"]
    assert [one["seed"] for one in written()[-1]["images"]] == [3, 4]


def test_neighbours_that_are_alike_are_drawn_together_and_choices_stay_what_they_were(draw):  # noqa: F811
    listing("list.txt", "# all", "{red|blue} cat", "green {boat|apple}", "cat --seed 7", "house")
    words = ("--prompts", "list.txt", "-s", "5", "--steps", "1", "-o", "out/")
    said = draw(*words, "--grid", "grid.png", "--json")
    steps = [event for event in said.events if event["event"] == "step"]
    assert [event["rows"] for event in steps] == [[2, 3], [4], [5]]
    images = [event for event in said.events if event["event"] == "image"]
    assert Image.open("grid.png").size == (32, 32)
    assert images[-1]["kind"] == "grid"
    for event in images[:-1]:
        (alone,) = draw(event["prompt"], "-s", str(event["seed"]), "--steps", "1", "-o", "alone.png").paths
        assert Image.open(alone).tobytes() == Image.open(event["path"]).tobytes()
    rows = choose(read_jobs("list.txt"), 5, {})
    assert [row.fields["prompt"] for row in rows] == [event["prompt"] for event in images[:-1]]
    more = draw("cat", *words, "--num-images", "2")
    assert [made(path)["seed"] for path in more.paths] == [5, 6] * 3 + [7, 8, 5, 6], "words come before the list"


def test_rows_are_drawn_in_python(tiny_model, tmp_path):
    model = TextToImage.load(tiny_model, "cpu")
    (tmp_path / "rows.csv").write_text("prompt,steps,seed\nred cat,1,3\napple,0,\nblue boat,1,3\n" + "apple " * 30)
    results = list(run_jobs(model, read_jobs(tmp_path / "rows.csv"), seed=1, guidance_scale=2.0))
    assert [result.row.number for result in results] == [2, 3, 4, 5]
    assert [type(result.error) for result in results] == [type(None), ValueError, type(None), ValueError]
    (alone,) = model("blue boat", seed=3, steps=1, guidance_scale=2.0)
    assert results[2].images[0].tobytes() == alone.tobytes()
    assert results[2].shots[0].seed == 3
    (row, *_) = read_jobs(tmp_path / "rows.csv")
    assert [step.index for step in model.run(row.settings())] == [1]


def test_a_row_that_fails_while_it_is_drawn_is_1_and_its_batch_goes_on(draw, monkeypatch):  # noqa: F811
    from diffusion.drawing import Drawing

    monkeypatch.setattr(Drawing, "_condition", _poisoned(Drawing._condition))
    said = draw("--prompts", listing("list.txt", "red", "bad", "blue", "a --s 0"), "-s", "1", "--steps=1", "-o", "out/")
    assert said.code == 1
    assert "row 2: out of luck" in said.err
    assert [made(path)["prompt"] for path in said.paths] == ["red", "blue"]
    assert {line["row"]: line["status"] for line in written()} == {4: "refused", 1: "done", 2: "failed", 3: "done"}
    assert "4 rows: 2 drawn, 1 refused, 1 failed" in said.err
    monkeypatch.setattr("diffusion.repair.decode", lambda vae, x: [Image.new("RGB", (16, 16)) for _ in x])
    assert "came out black" in draw("--prompts", listing("list.txt", "red"), "--steps=1", "-o", "out/").err


def _poisoned(condition):
    def fail(self, shot, chunks):
        if shot.prompt == "bad":
            raise OSError("out of luck")
        return condition(self, shot, chunks)

    return fail


# --- going on


def test_resume_does_what_is_not_done_or_has_changed_or_is_gone(draw, monkeypatch):  # noqa: F811
    words = ("--prompts", "list.txt", "--steps", "1", "-o", "out/", "--resume")
    drawn = lambda: [made(path)["prompt"] for path in draw(*words).paths]  # noqa: E731
    listing("list.txt", "red {cat|boat}", "green", "green", "blue")
    first = draw(*words)
    assert [line["row"] for line in written()] == [1, 2, 3, 4]
    assert drawn() == [], "though no seed was given, and each call draws one"
    listing("list.txt", "new", "green", "red {cat|boat}", "blue --seed 2", "green")
    assert drawn() == ["new", "blue"], "a row is known by what it says, not by where it stands"
    first.paths[1].unlink()
    assert drawn() == ["green"]
    planned = draw(*words, "--dry-run")
    assert "would draw" not in planned.err
    with monkeypatch.context() as patched:
        patched.setattr("diffusion.cli.jobs.Listed.load", _only_without_weights)
        assert draw(*words).code == 0, "where nothing is left no weights are read"
    assert len(draw(*words[:-1]).paths) == 5, "without --resume all of it is drawn"
    assert draw(*words, "--cfg", "2").paths, "another call is another picture"


def test_a_row_is_known_by_all_that_it_asks_for_and_by_nothing_else(tiny_model, red, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").symlink_to(tiny_model)
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text("{}")

    def keys(*rows, words=()):
        words = ["-m", str(tiny_model), "--prompts", listing("rows.jsonl", *rows), *words]
        args = command.request.parser("x").read(words, words="words")
        return [task.key for task in command.Listed.check(args).tasks]

    def picture(colour):
        Image.new("RGB", (16, 16), colour).save("begin.png")
        return keys(row | {"init_image": "begin.png"})[0]

    row = {"prompt": "red {cat|boat}"}
    (plain,) = keys(row)
    assert plain == keys(row)[0] == keys({"prompt": "green"}, row)[1] == keys(row, words=["--batch-size", "2"])[0]
    seeded = keys(row | {"seed": 3})[0]
    assert seeded == keys(row, words=["-s", "3"])[0] == keys(row | {"seed": 3}, words=["-s", "4"])[0]
    chosen = [{"prompt": prompt, "seed": 3} for prompt in ("red {cat|cat}", "red cat")]
    assert keys(chosen[0]) == keys(chosen[1]), "by what was chosen, where that is known"
    flags = ["--steps 3", "--cfg 2", "-s 4", "-m other", "--lora loras/red.safetensors", "--dtype bf16", "-o some/"]
    flags += ["--prediction epsilon", "--tile x", "--num-images 2", "-n blue"]
    found = [keys(row, words=flag.split())[0] for flag in flags]
    found += [
        keys(row | more)[0] for more in ({"prompt": "red cat"}, {"output": "x/"}, {"steps": 4}, {"sampler": "lcm"})
    ]
    found += [
        picture("red"),
        picture("blue"),
        *keys(row, row),
        *keys({"prompt": ""}, *[{"prompt": "a", "steps": 0}] * 2),
    ]
    led = ["--control", "net", "--control-image", "begin.png"], ["--control", "./net", "--control-image", "begin.png"]
    found += [keys(row, words=words)[0] for words in led]
    assert len({plain, seeded, *found}) == 2 + len(found) - 1, "one of two that are the same is plain"


def _only_without_weights(self, *, weights):
    assert not weights
    return command.request.load_model(self.args, self.model, self.loras, weights=False)


def test_a_torn_last_line_counts_as_not_there(draw):  # noqa: F811
    words = ("--prompts", listing("list.txt", "red", "blue --seed 3"), "-s", "1", "--steps", "1", "-o", "out/")
    assert draw(*words).code == 0
    file = Path("out/manifest.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert [made(path)["prompt"] for path in draw(*words, "--resume").paths] == ["blue"]
    lines = file.read_bytes().split(b"\n")
    assert [line[:1] + line[-1:] for line in lines if line][::2] == [b"{}", b"{}"], "the torn one stays apart"
    assert not draw(*words, "--resume").paths


def start(tiny_model, *words, **environment):
    command = [sys.executable, str(ROOT / "generate.py"), "-m", str(tiny_model), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def test_a_kill_loses_no_row_but_the_one_in_work(tiny_model, tmp_path, monkeypatch, draw):  # noqa: F811
    rows = [{"prompt": "red cat", "seed": seed, "steps": 20} for seed in range(24)]
    words = ("--prompts", listing("rows.jsonl", *rows), "-o", "out/")
    process = start(tiny_model, *words)
    file = Path("out/manifest.jsonl")
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = written()
    assert 3 <= len(before) < 24
    for line in before:
        assert hashlib.sha256(Path(line["images"][0]["path"]).read_bytes()).hexdigest() == line["images"][0]["sha256"]
    assert len(list(Path("out").glob("*.png"))) - len(before) in (0, 1)
    assert all(Image.open(path).load() for path in Path("out").glob("*.png"))
    again = draw(*words, "--resume")
    assert again.code == 0, again.err
    assert len(again.paths) == 24 - len(before)
    assert sorted(line["row"] for line in written()) == list(range(1, 25))


def ranks(count=2):
    return [{"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(count)} for n in range(count)]


def test_launched_processes_share_a_list(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "red cat", "seed": seed, "steps": 20} for seed in range(12)]
    words = ("--prompts", listing("rows.jsonl", *rows), "-o", "out/")
    processes = [start(tiny_model, *words, **rank) for rank in ranks()]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    drawn = [[int(Path(path).name.split("-")[1]) for path in out.splitlines()] for out, _ in said]
    assert drawn == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]], "by their seeds"
    assert sorted(line["row"] for line in written()) == list(range(1, 13))
    assert len(list(Path("out").glob("*.png"))) == 12


def test_the_last_process_tells_how_the_list_has_ended(draw, monkeypatch):  # noqa: F811
    """A launcher ends all processes as soon as one of them has another exit code than 0."""
    monkeypatch.setattr(manifest.Manifest, "_begin", lambda self: 0)  # as of processes that began together
    rows = [{"prompt": "red cat"}, {"prompt": "boat", "steps": 0}, {"prompt": "boat"}]
    words = ("--prompts", listing("rows.jsonl", *rows), "-s", "1", "--steps", "1", "-o", "out/")
    said = {}
    for rank in reversed(ranks()):
        for name, value in rank.items():
            monkeypatch.setenv(name, value)
        said[rank["RANK"]] = draw(*words)
    assert (said["1"].code, len(said["1"].paths)) == (0, 0)
    assert "row 2: steps must be at least 1" in said["1"].err
    assert (said["0"].code, len(said["0"].paths)) == (2, 2)
    assert [line["row"] for line in written()] == [2, 1, 3]


def test_two_shells_share_a_list(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "red cat", "seed": seed, "steps": 20} for seed in range(16)]
    words = ("--prompts", listing("rows.jsonl", *rows), "-o", "out/")
    held = _at_work()
    processes = [start(tiny_model, *words) for _ in range(2)]
    said = [process.communicate() for process in processes]
    os.close(held)
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted(line["row"] for line in written()) == list(range(1, 17))
    assert len(list(Path("out").glob("*.png"))) == 16


def _at_work():
    """Somebody who is at work in the folder, so that two processes meet there however fast one of them is."""
    return manifest.Manifest(Path("out"), resume=False)._locks


def test_what_a_dead_process_had_claimed_falls_to_the_others(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from diffusion.manifest import Manifest\n"
        "book = Manifest(Path(sys.argv[1]), resume=False)\n"
        "with book.claim('ab' * 32) as ours:\n"
        "    print(ours, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout.readline() == "True\n"
    with manifest.Manifest(tmp_path, resume=False) as book:
        with book.claim("ab" * 32) as ours:
            assert not ours
        with book.claim("cd" * 32) as ours:
            assert ours
        other.kill()
        with book.claim("ab" * 32, wait=True) as ours:
            assert ours
    other.communicate()


# --- the manifest by itself

KEY, OTHER = "ab" * 32, "ac" * 32  # that begin alike


def line(key, status="done", *paths):
    return {"row": 1, "key": key, "status": status, "images": [{"path": str(path)} for path in paths]}


def test_a_manifest_tells_what_has_come_of_a_row_and_to_whom_it_matters(tmp_path):
    file = tmp_path / "x.png"
    file.touch()
    with manifest.Manifest(tmp_path, resume=False) as before:
        for key, status in ((KEY, "failed"), (OTHER, "refused"), ("ad" * 32, "done")):
            before.append(line(key, status, file))
    with manifest.Manifest(tmp_path, resume=True) as book:
        assert [book.is_settled(key) for key in (KEY, OTHER, "ad" * 32)] == [False, True, True]
        book.append(line(KEY, "failed"))
        assert book.is_settled(KEY), "it has failed in this call"
        assert manifest.finished(tmp_path) == {"ad" * 32}
        file.unlink()
        assert not book.is_settled("ad" * 32), "its picture is gone"
        assert manifest.finished(tmp_path) == set()
    with manifest.Manifest(tmp_path, resume=False) as book:
        assert book.line_of(KEY) is None, "what was before this call does not count"


def test_what_is_not_whole_or_is_no_line_of_a_row_is_not_read_yet(tmp_path):
    with manifest.Manifest(tmp_path, resume=True) as book:
        whole = json.dumps(line(KEY, "failed")).encode()
        with (tmp_path / "manifest.jsonl").open("ab", buffering=0) as stream:
            stream.write(b'[1]\n{"key": 1}\n{torn\n' + whole[:20])
            assert book.line_of(KEY) is None
            stream.write(whole[20:] + b"\n")
        assert book.line_of(KEY)["status"] == "failed", "its first half was left for later"


def test_a_line_is_on_disk_before_the_next_row_and_a_full_disk_is_told(tmp_path, monkeypatch):
    settled, write = [], os.write
    monkeypatch.setattr(os, "fsync", settled.append)
    with manifest.Manifest(tmp_path, resume=False) as book:
        book.append(line(KEY, "failed"))
        assert settled == [book._file]
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        with pytest.raises(OSError, match="is the disk full"):
            book.append(line(OTHER, "failed"))


OTHERS = """
import fcntl
import sys
from pathlib import Path
from diffusion.manifest import APPENDING, Manifest
book = Manifest(Path(sys.argv[1]), resume=False)
for word in map(str.strip, sys.stdin):
    if word == "claim":
        claim = book.claim("ab" * 32)
        said = claim.__enter__()
    elif word == "free":
        said = claim.__exit__(None, None, None) or None
    elif word == "done":
        said = book.append({"key": "ab" * 32, "status": "done", "images": []})
    elif word == "fail":
        said = book.append({"key": "ac" * 32, "status": "failed"})
    elif word == "try":
        with book.claim("ac" * 32) as said:
            pass
    elif word == "hold":
        said = book._lock(APPENDING)
    elif word == "loose":
        said = fcntl.lockf(book._locks, fcntl.LOCK_UN, 1, APPENDING)
    elif word == "wait":
        said = book.wait() or book.close()  # either of two that wait may be the first
    else:
        said = book._read
    print(said, flush=True)
"""


@pytest.fixture
def another(tmp_path):
    """Another process at work on the list, that does what it is told, and says what comes of it."""
    words = [sys.executable, "-c", OTHERS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)

    def ask(word):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield ask
    process.kill()
    process.communicate()


def test_processes_at_work_share_a_beginning_and_rows_and_wait_for_each_other(another, tmp_path):
    with manifest.Manifest(tmp_path, resume=False) as early:
        early.append(line(OTHER, "failed"))
    (tmp_path / ".manifest.lock").write_text("99999999")  # of a call that has ended
    began = another("began")
    assert another("claim") == "True"
    assert another("fail") == "None"
    with manifest.Manifest(tmp_path, resume=False) as book:
        assert book._read == int(began) == (tmp_path / "manifest.jsonl").read_bytes().find(b"\n") + 1
        with book.claim(KEY) as ours, book.claim(OTHER) as free:
            assert (ours, free) == (False, True)
            assert another("try") == "False"
        assert another("try") == "True"
        assert another("done") == "None"
        assert another("free") == "None"
        with book.claim(KEY) as ours:
            assert not ours, "it is done"
        with book.claim(OTHER) as ours:
            assert ours
        assert another("hold") == "True"
        appending = started(lambda: book.append(line(OTHER, "refused")))
        assert appending.is_alive(), "two lines at once could mix"
        assert another("loose") == "None"
        appending.join()
        waiting = started(book.wait)
        assert waiting.is_alive(), "somebody else is at work"
        answers = []
        other = started(lambda: answers.append(another("wait")))
        waiting.join(60)
        assert not waiting.is_alive(), "who waits is not at work"
    other.join(60)
    assert answers == ["None"]


def started(work):
    """A thread that has had the time to do what nobody hinders."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert listed.own_device() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert listed.own_device() == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert listed.own_device() == "cuda:3", "two share one where there are fewer GPUs than processes"
    assert listed.share_of(list(range(20))) == [5, 13]


def test_every_event_is_documented():
    page = (ROOT / "docs/scripting.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "diffusion/cli").glob("*.py"))
    emitted = set(re.findall(r"""(?:voice|self)\.(?:event|trouble)\(\s*"(\w+)\"""", sources))
    assert {"start", "step", "image", "error", "warning", "row", "done", "lora"} <= emitted
    assert emitted == table - {"event"}


def resident(code):
    """MiB by which a fresh process has grown at its peak since it had its libraries."""
    script = (  # getrusage would tell of the parent's memory
        "import psutil, diffusion.drawing, diffusion.interop, diffusion.models.packing\n"
        "from diffusion import TextToImage\n"
        "before = psutil.Process().memory_info().rss\n"
        f"{code}\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print((int(peak.split()[1]) * 1024 - before) / 2**20)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_a_dry_run_knows_what_memory_drawing_takes(draw):  # noqa: F811
    from diffusion.memory import drawing_bytes

    wanted = {"width": 512, "height": 512, "steps": 1}
    outline = TextToImage.load("emoji", "cpu", weights=False)
    plan = outline.plan(Settings(prompts=("red apple",), seed=1, **wanted))
    found = drawing_bytes(outline.model, plan.full)
    weights = [weight.nbytes for network in outline.model.networks.values() for weight in network.parameters()]
    assert found.weights == pytest.approx(sum(weights), rel=1e-4)
    grown = resident(f"TextToImage.load('emoji', 'cpu')('red apple', seed=1, **{wanted})")
    assert 0.7 < found.peak / 2**20 / grown < 1.3, (found, grown)
    half = drawing_bytes(TextToImage.load("emoji", "cpu", "bf16", weights=False).model, plan.full)
    assert half.weights == pytest.approx(found.weights / 2, rel=1e-4)
    said = draw("red apple", "--dry-run", "--size", "512x512", model="emoji")
    assert f"memory: about {found.peak / 2**30:.2f} GiB" in said.err


def test_memory_grows_with_the_batch_and_guidance_but_weights_do_not(tiny_model):
    from diffusion.memory import drawing_bytes

    outline = TextToImage.load(tiny_model, "cpu", weights=False)

    def drawn(**fields):
        full = outline.plan(Settings(prompts=("cat",), seed=1, **fields)).full
        return drawing_bytes(outline.model, full)

    one, four, bare = drawn(), drawn(num_images=4), drawn(guidance_scale=1.0, num_images=4)
    assert one.weights == four.weights
    assert four.decoding == one.decoding, "pictures are decoded one by one"
    assert 3.9 < four.evaluation / one.evaluation < 4.1
    assert 1.9 < four.evaluation / bare.evaluation < 2.1
