"""Lists of pictures as they are read: three formats, options in lines, choices, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from commands import made
from diffusion import TextToImage, prompts
from diffusion.jobs import choose, read_jobs, run_jobs
from diffusion.options import read_line
from diffusion.settings import Settings
from test_jobs import listing, written

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
    ("---", {"prompt": "---"}),
    ("-- a cat", {"prompt": "-- a cat"}),
    ("--1girl, solo --s 3 --n 2 cats", {"prompt": "--1girl, solo", "steps": 3, "negative_prompt": "2 cats"}),
    ("x --size 64x32 --guidance-interval 0.5,inf", {"prompt": "x", "width": 64, "height": 32}
     | {"guidance_interval": (0.5, None)}),
]  # fmt: skip
BAD_LINES = [
    ("a --setps 3", "did you mean 'steps'"),
    ("a --s many", "steps: 'many' is not a whole number"),
    ("a --s 3 --steps 4", "steps is given twice"),
    ('--prompt "a', "quotes do not match"),
    ('--prompt" a cat" --s 3', "'--prompt a cat' is no option"),
    ("a --n 2", "n is the negative prompt here: num_images is how many pictures"),
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


def test_lines_end_where_editors_end_them(tmp_path):
    odd = "red\u2028cat\x0bup\x0con\x85it"
    objects = (json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in (odd, "a dog"))
    for name, text in (
        ("a.txt", f"{odd}\r\n\r\na dog\r\n"),
        ("a.csv", f'prompt,steps\r\n{odd},3\r\n"a\r\ndog",\r\n'),
        ("a.jsonl", "\r\n\r\n".join(objects)),
    ):
        (tmp_path / name).write_bytes(text.encode())
        first, second = read_jobs(tmp_path / name)
        assert (first.fault, first.written) == ("", odd)
        assert (second.number, second.written.split()) == (3, ["a", "dog"])


def test_an_n_that_is_a_number_is_not_taken_for_words(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "n": 2}\n{"prompt": "a", "N": "2"}\n{"prompt": "a", "n": "2 b"}\n'
    )
    (tmp_path / "a.csv").write_text("prompt,n\na,2\na,-1\na,2 b\n")
    (tmp_path / "a.txt").write_text("a --n 2\n--prompt a --n 2\na --n 2 b\n")
    for end in ("jsonl", "csv", "txt"):
        *wrong, right = read_jobs(tmp_path / f"a.{end}")
        assert {row.fault for row in wrong} == {"n is the negative prompt here: num_images is how many pictures"}
        assert right.settings(seed=1).negative_prompt == "2 b"
    (tmp_path / "a.csv").write_text("prompt,negative\na,2\n")
    assert read_jobs(tmp_path / "a.csv")[0].settings().negative_prompt == "2", "nobody counts by that name"


def test_lists_of_prompts_draw_their_choices(draw, tmp_path):
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards/thing.txt").write_text("boat\ncat\n")
    (tmp_path / "list.txt").write_text("# a list\n{red|blue} __thing__\n\ngreen {apple|house}\n")
    found = set()
    for seed in range(6):
        said = draw("--prompts", "list.txt", "-s", str(seed), "--steps", "1")
        assert said.code == 0, said.err
        first, second = (made(path)["prompt"] for path in said.paths)
        assert first.split()[0] in ("red", "blue")
        assert first.split()[1] in ("boat", "cat")
        found.add(first)
        assert second in ("green apple", "green house")
    assert len(found) > 1
    (tmp_path / "wildcards").rename(tmp_path / "words")
    assert draw("--prompts", "list.txt", "-s", "5", "--steps", "1").code == 2
    named = draw("--prompts", "list.txt", "-s", "5", "--steps", "1", "--wildcards", "words")
    assert made(named.paths[0])["prompt"] == first
    rows = choose(read_jobs("list.txt"), 5, prompts.read_wildcards(Path("words")))
    assert rows[0].fields["prompt"] == first
    (tmp_path / "words").rename(tmp_path / "wildcards")
    again = draw("--prompts", "list.txt", "-s", "5", "--steps", "1")
    assert made(again.paths[0])["prompt"] == first


# --- what is refused


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "# nothing\n\n", "holds no prompt"),
        ("x.jsonl", "", "holds no prompt"),
        ("x.csv", "red apple,3\n", "unknown name 'red apple'"),
        ("x.csv", "steps,seed\n3,1\n", "no header with a column named prompt"),
        ("x.csv", "prompt,setps\na,3\n", "did you mean 'steps'"),
        (
            "x.csv",
            'prompt,seed\na,1\n"b,2\nc,3\n',
            "line 3 is no CSV (unexpected end of data): quotes come in pairs",
        ),
        ("x.csv", "prompt;seed\na;1\n", "x.csv: its cells have ';' between them: write commas"),
        ("x.csv", "", "no header"),
        ("x.png", "\x89PNG", "x.png is no text file in UTF-8: a list is one"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_one_line_and_loads_nothing(
    draw,
    monkeypatch,
    name,
    text,
    message,
):
    monkeypatch.setattr("diffusion.cli.request.load_model", None)
    Path(name).write_text(text, encoding="latin-1")
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
    ({"prompt": "\ud800"}, "is not valid text: give it as UTF-8"),
    ({"prompt": "a", "output": "\ud800.png"}, "surrogates not allowed"),
    ({"prompt": "a", "init_image": "x" * 5000}, "File name too long"),
    ({"prompt": f"a <lora:{'x' * 5000}>"}, "File name too long"),
    ({"prompt": "a", "cfg": 10**400}, "must be a finite number"),
    ("[" * 200_000, "too many brackets"),
]


def test_a_wrong_row_is_told_and_spoils_no_other(draw):
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


def test_where_no_row_is_right_nothing_is_loaded(draw, monkeypatch):
    monkeypatch.setattr("diffusion.cli.request.load_model", None)
    said = draw("--prompts", listing("rows.jsonl", {"prompt": "a", "steps": 0}, {"prompt": ""}), "--cfg", "nan")
    assert said.code == 2
    assert "row 1: " in said.err
    assert "row 2: guidance_scale must be a finite number" in said.err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "gone.csv"], "gone.csv is not there"),
        (["a", "--resume"], "--resume is for the prompts of a list"),
        (["--prompts", "l.txt", "-o", "x.png"], "names one file, but 2 pictures"),
        (["--prompts", "l.txt", "--compare", "steps=1,2"], "--compare makes one file"),
        (["--prompts", "l.txt", "--film", "x.gif"], "--film makes one file"),
        (["--prompts", "l.txt", "--resume", "--grid", "x.png"], "--grid is of the pictures of one call"),
        (["--prompts", "l.txt", "--num-images", "0"], "num_images must be at least 1"),
    ],
)
def test_what_a_list_cannot_do_is_refused_at_once(draw, words, message):
    listing("l.txt", "red", "green")
    said = draw(*words)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


def picture(name):
    Image.new("RGB", (16, 16), "blue").save(name)
    return Path(name).read_bytes()


def test_no_row_writes_over_what_the_list_reads_or_its_call_writes(draw):
    read = {name: picture(name) for name in ("begin.png", "mask.png", "list.png")}
    rows = [
        {"prompt": "cat", "output": "begin.png"},
        {"prompt": "cat", "output": "./mask.png"},
        {"prompt": "cat", "output": "list.png"},
        {"prompt": "cat", "output": "rows.jsonl.png"},
        {"prompt": "cat", "output": "g.png"},
        {"prompt": "cat", "output": "p.png"},
        {"prompt": "cat", "init_image": "begin.png", "mask": "mask.png"},
        {"prompt": "cat", "init_image": "list.png", "steps": 0},
    ]
    Path("rows.jsonl.png").symlink_to(listing("rows.jsonl", *rows))
    read["rows.jsonl"] = Path("rows.jsonl").read_bytes()
    words = ("--prompts", "rows.jsonl", "-s", "1", "--steps=1", "-o", "out/")
    said = draw(*words, "--grid", "g.png", "--preview", "p.png")
    assert said.code == 2
    whose = ("init_image of row 7", "mask of row 7", "init_image of row 8", "the list", "--grid", "--preview")
    for number, (row, owner) in enumerate(zip(rows, whose, strict=False), 1):
        assert f"row {number}: output {row['output']} is {owner} too: give each a file of its own\n" in said.err
    assert {line["row"]: line["status"] for line in written()}[7] == "done"
    assert {name: Path(name).read_bytes() for name in read} == read
    for flag in ("--grid", "--preview"):
        refused = draw(*words, flag, "begin.png")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert f"{flag} begin.png is init_image of row 7 too" in refused.err
    assert {name: Path(name).read_bytes() for name in read} == read


def test_a_row_that_memory_is_too_short_for_spoils_no_other(draw, monkeypatch, tiny_model):
    from diffusion.drawing import Drawing

    plan = Drawing.plan

    def planned(model, full, *others):
        if "vast" in full.prompts:
            raise MemoryError
        return plan(model, full, *others)

    monkeypatch.setattr(Drawing, "plan", planned)
    said = draw("--prompts", listing("list.txt", "red", "vast", "blue"), "-s", "1", "--steps", "1", "-o", "out/")
    assert (said.code, len(said.paths)) == (2, 2)
    assert "row 2: out of memory" in said.err
    errors = [result.error for result in run_jobs(TextToImage.load(tiny_model, "cpu"), read_jobs("list.txt"), steps=1)]
    assert [type(error) for error in errors] == [type(None), ValueError, type(None)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, and RANK is not: set both, or neither"),
        ({"RANK": "0"}, "RANK is set in the environment, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK: 'abc' is not a whole number"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE: '' is not a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 is too large: it must not pass 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK must be at least 0, got -1"),
    ],
)
def test_a_part_of_a_list_is_drawn_only_where_it_is_clear_which(draw, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = draw("--prompts", listing("l.txt", "red", "green"), "--steps", "1")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err
    assert draw("red", "--steps", "1").code == 0, "which is no list"
