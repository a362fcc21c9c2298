"""What the page of ``diffusion ui`` does, without a page: requests, pictures, their lines, and its command."""

import json
import shlex
import socket
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from browsing import decibels
from commands import made
from diffusion import TextToImage
from diffusion.cli import main
from diffusion.cli.generate import run as generate
from diffusion.cli.request import fields_of, parser
from diffusion.images import save_image
from diffusion.notices import Flagged, Repaired
from diffusion.settings import Settings
from diffusion.studio import Form, Studio, troubles, words
from test_alive import failing, fails
from test_speed import modules_after


@pytest.fixture
def studio(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Studio(model=TextToImage.load(tiny_model, "cpu"), name=str(tiny_model))


def crafted(path, into="outputs/crafted.png", **changes):
    """A picture as it is, with something else in its record."""
    image = Image.open(path)
    record = json.loads(image.info.get("diffusion", "{}"))
    image.info["diffusion"] = json.dumps(record | changes)
    return save_image(image, into)


def again(line):
    """What the command line of a picture draws; nothing that was there before is written over."""
    python, program, *rest = shlex.split(line)
    assert (python, program) == ("python", "generate.py")
    before = set(Path().rglob("*.png"))
    assert generate(rest, prog=program) == 0
    (path,) = set(Path().rglob("*.png")) - before
    return path


def test_fields_that_say_nothing_leave_it_to_the_model():
    empty = Form(prompt="a cat", num_images=None, strength=" ")
    assert empty.wanted() == Settings(prompts=("a cat",))
    full = Form(prompt="a cat", seed="18446744073709551615", guidance_interval="0.3,inf", steps=7, guidance_scale=0)
    wanted = full.wanted()
    assert (wanted.seed, wanted.guidance_interval, wanted.guidance_scale) == (2**64 - 1, (0.3, None), 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": " "}, "no prompt: say what to draw"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),
        ({"guidance_interval": "3"}, "guidance_interval: '3' is not LOW,HIGH"),
        ({"strength": "much"}, "strength: 'much' is not a number"),
        ({"strength": "0.5"}, "strength needs a picture to begin from"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"guidance_scale": 1, "negative_prompt": "blue"}, "guidance_scale 1 turns guidance off"),
    ],
    ids=str,
)
def test_what_is_filled_in_wrongly_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        Form(**{"prompt": "a cat", **given}).wanted()


def test_the_fields_begin_as_the_model_draws(studio):
    own = Form.of(studio.model.model.recipe)
    assert (own.width, own.steps, own.guidance_scale, own.sampler) == (16, 4, 3.0, "ddim")
    *_, last = studio.draw(Form(**vars(own) | {"prompt": "red cat", "seed": "5"}))
    plain = studio.model("red cat", seed=5)[0]
    assert Image.open(last.files[0]).tobytes() == plain.tobytes()
    assert made(last.files[0]) == json.loads(plain.info["diffusion"])


@pytest.mark.parametrize(
    "given",
    [
        {"prompts": ("a 'quoted' \"cat\"", "-n", "--seed"), "seed": 3},
        {"negative_prompt": "-blue, $HOME", "literal": True, "steps": 3, "guidance_scale": 2.25},
        {"guidance_interval": (0.3, None), "guidance_rescale": 0.1 + 0.2, "tile": "xy"},
        {"sigmas": (14.6, 5, 0.3), "clip_skip": 2},
        {"init_image": "a b.png", "mask": "-m.png", "mask_blur": 0, "extend": (2, 0, 3, 4), "width": 32},
        {"to_prompt": "dog", "to_seed": 4, "share": 0.25},
        {"variation_seed": 9, "variation_strength": 0.0, "sampler": "euler", "schedule": "karras", "num_images": 2},
        {"hires": 1.5, "hires_strength": 0.4, "height": 24, "batch_size": 1, "long_prompts": True},
    ],
    ids=str,
)
def test_a_command_line_asks_for_the_same(given):
    wanted = Settings(**{"prompts": ("a cat",), **given})
    args = parser("generate.py").read(shlex.split(shlex.join(words(wanted))), words="words")
    assert (
        Settings(prompts=(*args.words, *args.prompt), **fields_of(Namespace(**vars(args) | {"size": None}))) == wanted
    )


def test_each_picture_of_a_call_has_its_own_line(studio):
    form = Form(prompt="red cat", negative_prompt="a 'blue' boat", seed="7", num_images=3, steps=2, sampler="euler")
    seen = list(studio.draw(form))
    assert [(one.done, one.total, len(one.files)) for one in seen] == [(0, 6, 0), (3, 6, 0), (6, 6, 3)]
    first, *seen = seen
    assert first.looks is None, "it is told that it has begun"
    assert [one.looks.size for one in seen] == [(32, 32)] * 2, "a sheet of all three"
    assert seen[0].looks.tobytes() != seen[1].looks.tobytes(), "it is looked at before it is done"
    for n, path in enumerate(seen[-1].files):
        assert made(path)["seed"] == 7 + n
        found = again(studio.command(path))
        assert decibels(found, path) >= 60
        assert made(found) == made(path)
    assert "--num-images 3" in studio.command(seen[-1].files[0], 3)
    assert sorted(studio.pictures(9), reverse=True) == studio.pictures(9), "the newest is the first"
    assert len(studio.pictures(2)) == 2


def test_pictures_that_are_given_are_kept_for_the_line(studio, photo):
    picture, mask = (Image.open(path) for path in photo)
    form = Form(prompt="red cat", seed="1", init_image=picture, mask=mask)
    for _ in range(2):
        *_, last = studio.draw(form)
    (path,) = last.files
    assert len(list(Path("outputs/inputs").iterdir())) == 2, "each once"
    assert decibels(again(studio.command(path)), path) >= 60
    back = Form.asking(studio.recalled(path).settings)
    assert Image.open(back.init_image).tobytes() == picture.tobytes()
    assert Image.open(back.mask).tobytes() == mask.tobytes()
    assert Form(**vars(back) | {"seed": ""}).wanted().strength == 1
    Path(back.mask).unlink()
    with pytest.raises(ValueError, match="which is not here"):
        studio.command(path)


def test_what_the_page_was_started_with_is_in_the_line(tiny_model, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loras = {"loras/red.safetensors": 0.25}
    model = TextToImage.load(tiny_model, "cpu", "bf16", loras)
    studio = Studio(model=model, name=str(tiny_model), loras=loras, device="cpu", output=Path("my pictures"))
    assert studio.title == "tiny + red:0.25"
    *_, last = studio.draw(Form(prompt="red cat", seed="1"))
    found = again(studio.command(last.files[0]))
    assert found.parent == Path("my pictures")
    assert made(found) == made(last.files[0])
    assert decibels(found, last.files[0]) >= 40, "bf16 rounds more"
    plain = Studio(model=TextToImage.load(tiny_model, "cpu"), name=str(tiny_model), output=studio.output)
    with pytest.raises(ValueError, match=r"drawn by tiny \+ red:0\.25, and not by tiny"):
        plain.command(found)


def test_what_has_no_field_is_refused_by_name(studio):
    for words_given, name in ((["--tile", "x"], "tile"), (["--hires", "2"], "hires")):
        generate(["red cat", "--model", studio.name, "--seed", "1", *words_given])
        (path,) = studio.pictures(1)
        with pytest.raises(ValueError, match=f"the page has no field for {name}"):
            Form.asking(studio.recalled(path).settings)
        assert made(again(studio.command(path))) == made(path), "its line has"
    both = Path("outputs/grid.png")
    generate(["red cat", "blue boat", "--model", studio.name, "--seed", "1", "--grid", str(both)])
    with pytest.raises(ValueError, match="the page has no field for several prompts: take the command line"):
        Form.asking(studio.recalled(both).settings)
    assert "'red cat' 'blue boat'" in studio.command(both)
    Image.new("RGB", (8, 8)).save("outputs/photo.png")
    with pytest.raises(ValueError, match="says nothing of how it was made"):
        studio.command(Path("outputs/photo.png"))


def test_one_drawing_at_a_time_and_each_can_be_stopped(studio):
    form, seen = Form(prompt="red cat", seed="1", steps=999), []
    left = studio.draw(form, lambda: bool(seen))
    seen.append(next(left))
    del left  # nobody looks on any more
    with pytest.raises(ValueError, match="steps 5000 is more"):
        list(studio.draw(Form(prompt="red cat", steps=5000)))
    stopped = []
    for one in studio.draw(form, lambda: bool(stopped)):
        stopped.append(one)
    assert [one.done for one in (*seen, *stopped)][:2] == [0, 0]
    assert stopped[-1].done < 999
    assert not studio.pictures(9)
    *_, last = studio.draw(Form(prompt="red cat", seed="1", steps=2))
    assert Image.open(last.files[0]).tobytes() == studio.model("red cat", seed=1, steps=2)[0].tobytes()
    studio.closed = True
    assert not list(studio.draw(form))


def test_what_is_stopped_while_it_waits_draws_nothing_and_waits_no_longer(studio):
    form, gate = Form(prompt="red cat", seed="1"), threading.Event()
    assert not list(studio.draw(form, lambda: True)), "not one step"
    before = studio._hand.submit(gate.wait, 30)
    assert not list(studio.draw(form, lambda: True))
    assert before.running(), "what is drawn before it goes on"
    gate.set()
    assert before.result(), "it was not waited for"
    assert list(studio.draw(form)), "the next one has its turn"


def test_a_black_picture_is_not_saved(studio, monkeypatch):
    monkeypatch.setattr("diffusion.repair.decode", lambda vae, latents: [Image.new("RGB", (16, 16))])
    with pytest.raises(FloatingPointError, match="came out black"):
        list(studio.draw(Form(prompt="red cat", seed="1")))
    assert not studio.pictures(9)


def test_a_black_picture_takes_no_other_with_it(studio, monkeypatch):
    seen = []
    monkeypatch.setattr("diffusion.studio.is_black", lambda image: seen.append(image) or len(seen) == 2)
    with pytest.raises(FloatingPointError, match="picture of seed 2 came out black"):
        list(studio.draw(Form(prompt="red cat", seed="1", num_images=3)))
    assert sorted(made(path)["seed"] for path in studio.pictures(9)) == [1, 3]


def test_what_went_wrong_while_drawing_is_known_of_a_picture(tiny_model, tmp_path):
    model = TextToImage.load(tiny_model, "cpu", "bf16", checker=lambda images: ["too red"] * len(images))
    studio = Studio(model=model, output=tmp_path / "drawn")
    with (
        failing(fails(model.model.vae.decoder.conv_in, lambda x: x.dtype == torch.bfloat16)),
        pytest.warns(Repaired, match="float32"),
        pytest.warns(Flagged, match="too red"),
    ):
        *_, last = studio.draw(Form(prompt="red cat", seed="1"))
    found = troubles(last.files[0])
    assert found == {"Repaired": made(last.files[0])["repairs"], "Flagged": ["too red"]}
    assert "float32" in found["Repaired"][0]
    for texts in ({}, {"diffusion": "[1]"}):
        image = Image.new("RGB", (8, 8))
        image.info.update(texts)
        assert troubles(save_image(image, tmp_path / "other.png")) == {"Repaired": [], "Flagged": []}


def test_only_files_are_on_the_shelf(studio):
    *_, last = studio.draw(Form(prompt="red cat", seed="1"))
    Path("outputs/folder.png").mkdir()
    Path("outputs/gone.png").symlink_to("nowhere.png")
    assert studio.pictures(9) == list(last.files)


def test_a_record_names_pictures_of_its_own_folder_only(studio, photo):
    *_, last = studio.draw(Form(prompt="red cat", seed="1", init_image=Image.open(photo[0])))
    (kept,) = Path("outputs/inputs").iterdir()
    Path("away").mkdir()
    away = kept.rename(Path("away", kept.name))
    init_image = made(last.files[0])["init_image"] | {"name": f"../../{away}"}
    with pytest.raises(ValueError, match="which is not here"):
        studio.recalled(crafted(last.files[0], init_image=init_image))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": None}, "its record says dtype None, and not one of float32, bfloat16, float16"),
        ({"dtype": "float64"}, "its record says dtype 'float64', and not one of"),
        ({"dtype": ["float32"]}, r"its record says dtype \['float32'\]"),
        ({"loras": [{"name": "red", "weight": "much"}]}, r"the LoRA 'red' \(no hash\) is not in"),
        ({"loras": 7}, "its record is damaged"),
        ({"model_hash": 7, "model": None}, "drawn by None, and not by tiny"),
        ({"steps": "many"}, "steps must be a whole number"),
    ],
    ids=str,
)
def test_a_damaged_record_is_told_in_plain_words(studio, wrong, said):
    *_, last = studio.draw(Form(prompt="red cat", seed="1"))
    with pytest.raises(ValueError, match=said):
        studio.command(crafted(last.files[0], **wrong))


def test_a_lora_of_a_damaged_record_is_another_one(studio, red):
    *_, last = studio.draw(Form(prompt="red cat", seed="1"))
    path = crafted(last.files[0], loras=[{"name": "red"}])
    with pytest.raises(ValueError, match=r"drawn by tiny \+ red:, and not by tiny"):
        studio.command(path)


@pytest.mark.parametrize(
    ("said", "told"),
    [(7, ["7"]), ("NaN", ["NaN"]), ([1, None], ["1", "None"]), ({"a": 1}, ["{'a': 1}"]), (None, [])],
    ids=str,
)
def test_whatever_a_damaged_record_says_of_troubles_is_text(tmp_path, said, told):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    path = crafted(tmp_path / "plain.png", tmp_path / "crafted.png", repairs=said, flagged=said)
    assert troubles(path) == {"Repaired": told, "Flagged": told}


# --- the command


def test_help_needs_neither_torch_nor_gradio():
    loaded = modules_after("from diffusion.cli import main; main(['ui', '--help'])")
    assert not loaded & {"torch", "gradio", "numpy", "diffusion.page"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prot", "80"], "unknown flag '--prot'; did you mean '--port'?"),
        (["a cat"], "prompts are typed into the page: leave out 'a cat'"),
        (["--model", "emojo"], "did you mean 'emoji'?"),
        (["--lora", "nowhere"], "no LoRA at nowhere"),
        (["--output", __file__], "is a file: name a folder"),
        (["--device", "cpu", "--dtype", "fp16"], "dtype float16 is slow and wrong on the CPU"),
        (["--port", "99999"], "cannot listen at 127.0.0.1 port 99999"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1 port 7860"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_line(given, said, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.cli.ui.find_spec", lambda name: object())
    assert main(["ui", *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("diffusion ui: ")
    assert said in err


def test_a_port_in_use_and_a_missing_library_are_told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion.cli.ui.find_spec", lambda name: object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    assert f"port {port} (Address already in use): give another --host or --port" in capsys.readouterr().err
    monkeypatch.setattr("diffusion.cli.ui.find_spec", lambda name: None)
    assert main(["ui", "--port", "0"]) == 2
    assert capsys.readouterr().err == "diffusion ui: the page needs gradio: pip install -e '.[ui]'\n"
