"""Lists of pictures as they are drawn: rows, batches, going on after a kill, several processes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from PIL import Image

from commands import ROOT, made
from diffusion import TextToImage, manifest
from diffusion.cli import jobs as command
from diffusion.cli import listed
from diffusion.jobs import Job, Row, choose, read_jobs, run_jobs
from diffusion.jobs import draw as draw_together


def written(folder: str | Path = "out") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text().splitlines()]


def listing(name: str, *rows: str | dict) -> str:
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


# --- what is drawn


def test_a_row_is_what_the_command_line_with_its_flags_is(draw):
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


def test_neighbours_that_are_alike_are_drawn_together_and_choices_stay_what_they_were(draw):
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


def test_a_row_that_fails_while_it_is_drawn_is_1_and_its_batch_goes_on(draw, monkeypatch):
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
    monkeypatch.setattr(manifest.Manifest, "append", lambda *_: int("x"))
    said = draw("--prompts", "list.txt", "--steps=1", "-o", "out/")
    assert (said.code, said.err.count("\n")) == (1, 3), "a ValueError is no wrong request then"


def test_rows_that_are_drawn_again_find_the_model_as_it_was(tiny, red, monkeypatch):
    """What the first attempt has put on it is off, though a traceback still refers to that."""
    monkeypatch.setattr(tiny, "lora_folder", red.parent)
    rows = [Row(n, {"prompt": f"{prompt} <lora:red:1>"}, "") for n, prompt in enumerate(("red cat", "boat"), 1)]
    calm = [result.images[0].tobytes() for result in run_jobs(tiny, rows, seed=1)]
    failed = []

    def watch(steps):
        for step in steps:
            if not failed:
                failed.append(step)
                raise OSError("no space left")
            yield step

    right = [Job(row, row.settings(seed=1)) for row in rows]
    assert [result.images[0].tobytes() for result in draw_together(tiny, right, watch)] == calm
    assert failed


def test_what_has_failed_is_closed_though_its_error_is_kept():
    """A traceback refers to what it went through."""
    closed = []

    class Drawer:
        def run(self, wanted):
            try:
                yield Namespace(images=None)
            finally:
                closed.append(wanted)

    def watch(steps):
        for _ in steps:
            raise OSError("no space left")
        yield

    row = Row(1, {"prompt": "red cat"}, "")
    (result,) = draw_together(Drawer(), [Job(row, row.settings(seed=1))], watch)
    assert str(result.error) == "no space left"
    assert len(closed) == 1


def test_a_row_whose_picture_nobody_waits_for_is_done(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--prompts", listing("list.txt", "red", "boat --steps 200"), "-s", "1", "-o", "out/")
    process = start(tiny_model, *words)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, "")
    assert written()[0]["status"] == "done"
    again = start(tiny_model, *words, "--resume")
    out, _ = again.communicate()
    assert again.returncode == 0
    assert "-red" not in out


def _poisoned(condition):
    def fail(self, shot, chunks):
        if shot.prompt == "bad":
            raise OSError("out of luck")
        return condition(self, shot, chunks)

    return fail


def test_the_seed_of_a_call_is_said_where_a_row_has_it(draw):
    words = ("--prompts", listing("list.txt", "red --seed 1", "blue --seed -1"), "--steps=1", "-o", "out/")
    assert "seed" not in draw(*words).err
    listing("list.txt", "red --seed 1", "blue")
    said = draw(*words)
    assert said.err == f"generate.py: seed {made(said.paths[1])['seed']}\n"


# --- going on


def test_resume_does_what_is_not_done_or_has_changed_or_is_gone(draw, monkeypatch):
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


def test_resume_knows_whose_picture_it_is(draw):
    words = ("--prompts", "rows.jsonl", "-s", "1", "--steps", "1", "-o", "out/", "--resume")
    for prompt in ("red apple", "panda", "red apple"):
        (path,) = draw(*words[:1], listing("rows.jsonl", {"prompt": prompt, "output": "out/a.png"}), *words[2:]).paths
        assert made(path)["prompt"] == prompt, "it was drawn over"
    assert not draw(*words).paths
    Path("out/a.png").write_bytes(b"retouched")
    assert not draw(*words).paths, "what somebody else has made of it is not ours to draw over"


def test_a_row_is_known_by_all_that_it_asks_for_and_by_nothing_else(tiny_model, red, tmp_path, monkeypatch):
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
    moved = {"prompt": "{red|green|blue} cat", "seed": 3}
    assert keys(moved)[0] != keys(row, moved)[1], "what is chosen depends on its place"
    put_on = {"prompt": "cat <lora:red:1> {<lora:red:0.5>|<lora:gone:1>}"}
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/red.safetensors").write_bytes(red.read_bytes())
    assert keys(put_on) == keys(put_on, words=["--lora-dir", "moved"])
    (tmp_path / "moved/red.safetensors").write_bytes(b"another")
    assert keys(put_on) != keys(put_on, words=["--lora-dir", "moved"])
    literal = [keys(put_on, words=["--literal", "--lora-dir", folder]) for folder in ("moved", "loras")]
    assert literal[0] == literal[1], "text is text"
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


def test_a_torn_last_line_counts_as_not_there(draw):
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


def test_a_kill_loses_no_row_but_the_one_in_work(tiny_model, tmp_path, monkeypatch, draw):
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


# --- several processes


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


def test_the_last_process_tells_how_the_list_has_ended(draw, monkeypatch):
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


def test_a_process_that_comes_late_knows_what_those_that_were_launched_with_it_have_done(draw, monkeypatch):
    """A refused row takes no time: who has only such has gone before the other one comes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    words = ("--prompts", listing("rows.jsonl", {"prompt": "red cat"}, {"prompt": "boat", "steps": 0}), "--steps", "1")
    for rank, code in zip(reversed(ranks()), (0, 2), strict=True):
        for name, value in rank.items():
            monkeypatch.setenv(name, value)
        assert draw(*words, "-o", "out/").code == code
    assert draw(*words, "-o", "out/").code == 0, "it was the last one already, and this is another call"
    assert [line["row"] for line in written()] == [2, 1, 1]
    monkeypatch.setattr("psutil.Process.create_time", lambda self: 1.0)
    monkeypatch.setenv("RANK", "1")
    draw(*words, "-o", "out/")
    assert [line["row"] for line in written()] == [2, 1, 1, 2], "another launch begins anew"


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


# --- what is told


def test_every_event_is_documented():
    page = (ROOT / "docs/scripting.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "diffusion/cli").glob("*.py"))
    emitted = set(re.findall(r"""(?:voice|self)\.(?:event|trouble)\(\s*"(\w+)\"""", sources))
    assert {"start", "step", "image", "error", "warning", "row", "done", "lora"} <= emitted
    assert emitted == table - {"event"}
