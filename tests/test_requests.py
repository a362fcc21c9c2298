"""What cannot be drawn is refused before anything is: by a run, by a dry run and by Python, with the same words."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import made, process
from diffusion import TextToImage
from diffusion.comparison import variants
from diffusion.interop import outline_model, save_single_file
from diffusion.models.folder import load_model
from diffusion.settings import Settings
from families import save

PROMPT = "red apple"


@pytest.fixture
def files(photo, tmp_path):
    """Pictures that are and that are none, and what else a flag may name; by name, in the folder of the command."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:2000])
    Image.new("L", (21, 19), 0).save(tmp_path / "black.png")
    Image.new("L", (30, 10), 255).save(tmp_path / "wide.png")
    for folder in ("folder", "dir.gif", "dir.jpg", "dir.png"):
        (tmp_path / folder).mkdir()
    save_file({"<it>": torch.zeros(2, 32)}, tmp_path / "it.safetensors")
    save_file({"<it>": torch.zeros(2, 31)}, tmp_path / "narrow.safetensors")
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 2), "x": torch.zeros(1)}, tmp_path / "alien.safetensors")
    return tmp_path


PHOTO, MASKED = ["-i", "photo.png"], ["-i", "photo.png", "--mask", "mask.png"]
REFUSED = [
    # what only the model can tell
    (["--sigmas", "5,0.00001"], "outside of this model's"),
    (["--sigmas", "5,1", "--hires", "2"], "hires has two"),
    (["--clip-skip", "3"], "this text encoder has 2 layers"),
    (["--compare", "clip_skip=1,3"], "this text encoder has 2 layers"),
    (["--compare", "steps=1,2000"], "1000 noise levels"),
    (["--compare", "width=16,15"], "not a multiple of 2"),
    (["a <lora:nowhere>"], "'nowhere', which is not in loras/"),
    (["a <lora:alien>", "--lora-dir", "."], "fit no layer of this model"),
    (["--lora", "alien.safetensors"], "fit no layer of this model"),
    (["--lora", "narrow.safetensors"], "narrow.safetensors: a learnt word of shape (2, 31) does not fit"),
    (["-n", "x <lora:a>"], "belongs into the prompt"),
    (["--to-prompt", "x <lora:a>", "--frames", "2"], "belongs into the prompt"),
    (["apple " * 30, "--lora", "it.safetensors"], "30 tokens long"),
    (["apple " * 20 + "<it> <it>", "--lora", "it.safetensors"], "24 tokens long"),
    (["--device", "xpu"], "not present on this machine"),
    (["--device", "cpu", "--dtype", "fp16"], "use float32 or bfloat16"),
    (["--compile", "--tile", "x"], "a compiled U-Net"),
    # pictures
    (["-i", "cut.png"], "cut.png: cannot be read as a picture"),
    ([*PHOTO, "--mask", "cut.png"], "cut.png: cannot be read"),
    ([*PHOTO, "--mask", "wide.png"], "the mask is 30x10 and the picture 21x19"),
    ([*PHOTO, "--mask", "black.png"], "there is nothing to draw"),
    ([*MASKED, "-o", "x.jpg"], "name a .png"),
    ([*MASKED, "-o", "x/{index}.webp"], "name a .png"),
    ([*PHOTO, "--extend", "left=2", "-o", "x.webp"], "name a .png"),
    ([*PHOTO, "--extend", "left=2,left=4"], "has left twice"),
    ([*PHOTO, "--extend", "left=0"], "would change nothing"),
    ([*PHOTO, "--tile", "x"], "width 21 is not a multiple of 2, as a tile has to be: try 2"),
    ([*PHOTO, "--tile", "y"], "height 19 is not a multiple of 2, as a tile has to be: try "),
    (["--tile", "x", "--hires", "1.3"], "as a tile has to be"),
    (["--control", "folder", "--control-image", "photo.png"], "no config.json"),
    (["--control", "nowhere", "--control-image", "photo.png"], "no config.json"),
    (["-i", "http://example.com/x.png"], "init_image http://example.com/x.png is an address, and no file: download it"),
    # numbers that are slips: nothing is made of them
    (["--num-images", "1000001"], "num_images 1000001 is too large: it must not pass 1000000"),
    (["--to-seed", "2", "--frames", "1000001"], "frames 1000001 is too large"),
    (["--size", "16x16386"], "height 16386 is too large: it must not pass 16384"),
    ([*PHOTO, "--width", "800000"], "width 800000 is too large"),
    ([*PHOTO, "--height", "16384"], "width 18109 is too large"),
    ([*PHOTO, "--extend", "left=10000000"], "extend 10000000 is too large: it must not pass 16384"),
    ([*PHOTO, "--extend", "left=9000,right=9000"], "width 18021 is too large"),
    (["--size", "16x2050", "--hires", "8"], "hires 8 makes height 16400: it must not pass 16384"),
    # what has no effect
    ([*PHOTO, "--sigmas", "5,1", "--strength", "0.5"], "strength and sigmas exclude each other"),
    ([*PHOTO, "--sigmas", "5,1", "--compare", "strength=0.5,0.6"], "strength and sigmas exclude each other"),
    (["--mask-blur", "3"], "mask_blur needs an edge"),
    ([*PHOTO, "--mask-blur", "4"], "mask_blur needs an edge"),
    (["--hires-strength", "0.5"], "hires_strength needs"),
    (["--compare", "hires_strength=0.4,0.5"], "hires_strength needs"),
    (["--control-scale", "1"], "control_scale needs"),
    (["--prompts", "list.txt", "--wildcards", "nowhere"], "nowhere is no folder of wildcards"),
    (["--wildcards", "folder"], "give --prompts"),
    (["--lora-dir", "nowhere"], "nowhere is no folder of LoRAs"),
    (["--cfg", "1", "-n", "blue"], "guidance_scale 1 turns guidance off, and negative_prompt has no effect"),
    (["--cfg", "1", "--guidance-rescale", "0.5"], "guidance_rescale has no effect"),
    (["--cfg", "1", "--guidance-interval", "1,2"], "guidance_interval has no effect"),
    (["--compare", "cfg=1,2", "-n", "blue"], "negative_prompt has no effect"),
    (["--sampler", "DPM++ 2M Karras", "--schedule", "exponential"], "asks for karras, and schedule for exponential"),
    (["--steps", "3", "--compare", "steps=1,2"], "steps is compared: leave 3 out"),
    # the same twice
    (["--lora", "it.safetensors", "--lora", "./it.safetensors"], "is given twice"),
    (["--compare", "steps=1,2", "--compare", "steps=3"], "steps twice"),
    (["--compare", "cfg=1,2", "cfg_scale=3"], "guidance_scale twice"),
    # files
    (["--film", "dir.gif"], "dir.gif is a folder"),
    (["--grid", "dir.jpg"], "dir.jpg is a folder"),
    (["--preview", "dir.png"], "dir.png is a folder"),
    (["--grid", "/proc/nowhere/x.png"], "/proc/nowhere is not writable"),
    (["--grid", "x.png", "--preview", "./x.png"], "is --grid too"),
    (["--grid", "x.png", "-o", "x.png"], "is --output too"),
    ([*PHOTO, "--preview", "photo.png"], "is init_image too"),
    ([*MASKED, "-o", "mask.png"], "is mask too"),
    (["--grid", "some/1.png", "-o", "some/{index}.png"], "is --output too"),
    (["--grid", "{seed}.png"], "without braces"),
    (["--film", "x{slug}.gif"], "without braces"),
    (["--film", "x.gif", "--compare", "steps=1,2"], "--compare draws several"),
    (["--to-seed", "2", "--frames", "2", "-o", "dir.gif"], "dir.gif is a folder"),
    # words and numbers
    (["--to-seed", str(2**64), "--frames", "2"], "must not pass"),
    (["(a:1e300)"], "beyond 100"),
    (["(a:-101)"], "beyond 100"),
    (["--lora", "it.safetensors:0.5"], "a learnt word is not put on so strongly"),
    (["--compare", "steps=1,"], "'' is not a whole number"),
    (["a <lora:it><lora:it:0.5>", "--lora-dir", "."], "twice"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: " ".join(value)[:50] if value else "")
def test_a_run_and_a_dry_run_refuse_alike(draw, files, words, message):
    (files / "list.txt").write_text("red\n")
    words = words if not words[0].startswith("-") else [PROMPT, *words]
    before = sorted(files.rglob("*"))
    for more in ([], ["--dry-run"], ["--dry-run", "--json"]):
        said = draw(*words, *more)
        assert said.code == 2, (more, said.err, said.out)
        assert said.err.count("\n") == 1, said.err
        assert message in said.err, (more, said.err)
    assert sorted(files.rglob("*")) == before, "and nothing is written"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extend": 5, "init_image": Image.new("RGB", (8, 8))}, "four whole numbers"),
        ({"extend": (1, 2, 3), "init_image": Image.new("RGB", (8, 8))}, "four whole numbers"),
        ({"guidance_interval": 5}, "must be two sigma"),
        ({"guidance_interval": (5, 5)}, "must be two sigma"),
        ({"sampler": 3}, "sampler must be a name, got 3"),
        ({"schedule": 3}, "schedule must be a name, got 3"),
        ({"tile": ["x"]}, "tile must be a name"),
        ({"steps": True}, "whole number"),
        ({"num_images": None}, "whole number"),
        ({"num_images": 10**9}, "num_images 1000000000 is too large: it must not pass 1000000"),
        ({"to_seed": 2, "frames": 10**9}, "frames 1000000000 is too large"),
        ({"width": 800000}, "width 800000 is too large: it must not pass 16384"),
        ({"extend": (10**7, 0, 0, 0), "init_image": Image.new("RGB", (8, 8))}, "extend 10000000 is too large"),
        ({"hires": 2, "init_image": Image.new("RGB", (8, 8200))}, "hires 2 makes height 16400"),
        ({"mask": "https://a.b/x.png", "init_image": Image.new("RGB", (8, 8))}, "mask https://a.b/x.png is an address"),
        ({"literal": "no"}, "True or False"),
        ({"init_image": np.zeros((8, 8, 3))}, "uint8 pixels"),
        ({"init_image": 5}, "uint8 pixels"),
        ({"init_image": Image.new("RGB", (8, 8)), "mask": np.zeros((8, 8), np.uint8)}, "nothing to draw"),
        ({"sigmas": (5, 1), "strength": 0.5, "init_image": Image.new("RGB", (8, 8))}, "exclude each other"),
        ({"mask_blur": 3.0}, "needs an edge"),
        ({"hires_strength": 0.5}, "needs a larger"),
        ({"control_scale": 0.5}, "needs a picture"),
        ({"guidance_scale": 1, "negative_prompt": "x"}, "guidance off"),
        ({"to_seed": 2**64, "share": 0.5}, "must not pass"),
        ({"sigmas": (5.0, 1.0), "hires": 2}, "hires has two"),
        ({"hires": 2, "hires_strength": 0}, "would change nothing"),
        ({"prompt": "(a:1e300)"}, "beyond 100"),
        ({"negative_prompt": "<lora:x>"}, "belongs into the prompt"),
        ({"to_prompt": "<lora:x>", "share": 0.5}, "belongs into the prompt"),
    ],
    ids=str,
)
def test_python_refuses_with_the_same_words(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        tiny.stream(**{"prompt": PROMPT, "seed": 1} | given)


def test_numbers_and_pictures_of_other_libraries_are_understood(tiny):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    theirs = tiny(
        PROMPT,
        seed=np.int64(3),
        steps=np.uint8(2),
        guidance_scale=np.float32(2),
        init_image=pixels,
        strength=np.float64(0.5),
        guidance_interval=np.array([0.3, math.inf]),
    )
    ours = tiny(
        PROMPT,
        seed=3,
        steps=2,
        guidance_scale=2.0,
        init_image=Image.fromarray(pixels),
        strength=0.5,
        guidance_interval=[0.3, None],
    )
    assert theirs[0].tobytes() == ours[0].tobytes()
    assert theirs[0].info == ours[0].info
    sheets = [tiny.compare(PROMPT, {"cfg": values}, seed=1, steps=1) for values in ([1.0, 2.0], np.array([1.0, 2.0]))]
    assert sheets[0].tobytes() == tiny.compare(PROMPT, {"cfg": (c for c in (1.0, 2.0))}, seed=1, steps=1).tobytes()
    assert sheets[0].tobytes() == sheets[1].tobytes()
    for wrong in ("ddim", 5, []):
        with pytest.raises(ValueError, match="is compared over"):
            tiny.compare(PROMPT, {"sampler": wrong})


def test_half_precision_on_the_cpu_is_refused_by_either_name(tiny_model):
    for name in ("fp16", "float16", torch.float16):
        with pytest.raises(ValueError, match="slow and wrong on the CPU"):
            TextToImage.load(tiny_model, "cpu", name)


def test_a_name_with_a_schedule_is_compared_with_its_schedule():
    cells, *_ = variants(Settings(prompts=("a",)), {"sampler": ["Euler a", "DPM++ 2M Karras", "ddim"]})
    assert [(cell.sampler, cell.schedule) for cell in cells] == [
        ("euler_ancestral", None),
        ("dpmpp_2m", "karras"),
        ("ddim", None),
    ]
    with pytest.raises(ValueError, match="sampler is compared: leave 'dpmpp_2m' out"):
        variants(Settings(prompts=("a",), sampler="DPM++ 2M Karras"), {"sampler": ["ddim"]})


def test_an_empty_value_is_compared_too(draw):
    said = draw(PROMPT, "--compare", "negative_prompt=,blue boat", "-s", "1", "--steps", "1", "-o", "x.png")
    assert said.code == 0, said.err
    assert made("x.png")["compare"] == {"negative_prompt": ["", "blue boat"]}


# --- ControlNets


def test_a_controlnet_that_does_not_belong_is_refused(draw, net, files, tmp_path):
    sd1, words = net.parent / "sd1", [PROMPT, "--control-image", "photo.png", "-i", "photo.png", "--dry-run"]
    assert draw(*words, "--control", str(net), model=sd1).code == 0

    def copy(name, **changed):
        shutil.copytree(net, tmp_path / name)
        config = json.loads((net / "config.json").read_text()) | changed
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    for control, message in [
        (copy("other", cross_attention_dim=64), "cross_attention_dim is 64, and not 32"),
        (copy("fine", conditioning_embedding_out_channels=[16, 32]), "pictures 2 times as large as latents"),
        (copy("strange", _class_name="UNet2DConditionModel"), "describes UNet2DConditionModel"),
        (str(sd1), "no config.json"),
    ]:
        for dry in (words, words[:-1]):
            said = draw(*dry, "--control", control, model=sd1)
            assert (said.code, said.err.count("\n")) == (2, 1), said.err
            assert message in said.err
    cut = draw(*words[:1], "--control", str(net), "--control-image", "cut.png", "--dry-run", model=sd1)
    assert (cut.code, "cut.png: cannot be read" in cut.err) == (2, True)


# --- what a dry run knows


def test_a_dry_run_reads_no_weights_and_says_all_that_it_knows(draw, tiny_model, red, photo, tmp_path):
    folder = tmp_path / "hollow"
    shutil.copytree(tiny_model, folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    words = [f"{PROMPT} <lora:red:0.5>", "-s", "3", "--dry-run", "--grid", "g.png", "-i", str(photo[0])]
    said = draw(*words, "-n", "apple, " * 12, "--long-prompts", "--strength", "0.5", "--steps", "4", model=folder)
    assert said.code == 0, said.err
    for part in (
        "64 of 64 keys, 32 layers of unet",
        "2 of 22 tokens",
        "24 tokens in 2 chunks of 22",
        "4 steps of ddim on trailing, the last of 8,",
        "21x19",
        "outputs/00001-3-red-apple.png, its grid to g.png",
    ):
        assert part in said.err, said.err
    start, lora = draw(*words, "--json", model=folder).events
    assert start["tokens"][f"{PROMPT} <lora:red:0.5>"] == "2 of 22 tokens"
    assert lora["event"] == "lora"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_outline_is_the_model_without_its_weights(family, tmp_path):
    folder = save(family, tmp_path / family)
    model = load_model(folder)
    save_single_file(model, tmp_path / "one.safetensors")
    for path in (folder, tmp_path / "one.safetensors"):
        found = outline_model(path)
        assert (found.forward, found.factor, found.zero_empty) == (model.forward, model.factor, model.zero_empty)
        assert [len(t) for t in found.tokenizers] == [len(t) for t in model.tokenizers]
        shapes = [{k: v.shape for k, v in one.unet.state_dict().items()} for one in (found, model)]
        assert shapes[0] == shapes[1]
        assert {parameter.device.type for parameter in found.unet.parameters()} == {"meta"}
    assert outline_model(folder, "v_prediction").prediction == "v_prediction"


def test_a_single_file_draws_in_the_multiples_that_it_holds(draw, tiny_model, tmp_path):
    save("sd1", tmp_path / "sd1")
    save_single_file(load_model(tmp_path / "sd1"), tmp_path / "one.safetensors")
    words = [PROMPT, "-H", "32", "--steps", "1"]
    said = draw(*words, "-W", "30", model=tmp_path / "one.safetensors")
    assert said.code == 0, said.err
    assert "not a multiple of 2" in draw(*words, "-W", "31", "--dry-run", model=tmp_path / "one.safetensors").err


def test_a_learnt_word_is_told(draw, files):
    for more in ([], ["--dry-run"]):
        said = draw("<it> apple", "--lora", "it.safetensors", "--steps", "1", *more)
        assert said.code == 0, said.err
        assert "it.safetensors: the word <it> of 2 vectors" in said.err


def test_what_a_model_is_made_of_is_not_told(draw, tmp_path):
    """Its own adapters fit; those that are put on it are reported."""
    student, few = Path(__file__).parents[1] / "assets/emoji-fast", ("panda", "-s", "1", "--steps", "1")
    for more in ([], ["--dry-run"]):
        assert "keys" not in draw(*few, *more, model="emoji-fast").err
        told = draw(*few, *more, "--lora", str(student), model="emoji").err
        assert f"{student}: 156 of 156 keys, 78 layers of unet" in told
    assert TextToImage.load("emoji-fast", weights=False).model.reports == {}


def test_a_picture_that_is_not_there_is_told_so(tiny):
    for name in ("init_image", "mask"):
        pictures = {"init_image": Image.new("RGB", (16, 16)), name: "nowhere.png"}
        with pytest.raises(ValueError, match=r"^nowhere\.png is not there$"):
            tiny(PROMPT, **pictures)


def test_a_model_without_weights_plans_and_draws_nothing(tiny_model):
    hollow = TextToImage.load(tiny_model, "cpu", weights=False)
    plan = hollow.plan(Settings(prompts=(PROMPT,), hires=2, seed=1))
    assert [descent.size for descent in plan.descents] == [(16, 16), (32, 32)]
    with pytest.raises(ValueError, match="without its weights"):
        hollow(PROMPT)


# --- how it speaks


def test_a_prompt_that_looks_like_a_flag_is_a_prompt(draw):
    said = draw("--steps", "1", "-s", "1", "--", "--json")
    assert said.code == 0, said.err
    assert made(said.paths[0])["prompt"] == "--json"
    assert draw("--steps", "1", "-s", "1", "--", "--quiet").err == ""


def test_json_speaks_of_every_kind_of_file(draw):
    few = ("--json", "-s", "1", "--steps", "1")
    for words, kinds in [
        ([PROMPT, "-o", "a.png", "--grid", "g.png", "--film", "f.gif"], [None, "grid", "film"]),
        ([PROMPT, "--compare", "cfg=1,2", "-o", "c.png"], ["comparison"]),
        ([PROMPT, "--to-seed", "2", "--frames", "2", "-o", "w.gif"], ["animation"]),
    ]:
        said = draw(*words, *few)
        assert said.code == 0, said.err
        images = [event for event in said.events if event["event"] == "image"]
        assert [event.get("kind") for event in images] == kinds
        assert all(Path(event["path"]).is_file() for event in images)


def test_quiet_is_quiet_with_a_controlnet(net, photo, tmp_path):
    sd1 = net.parent / "sd1"
    words = ["-m", str(sd1), "--control", str(net), "--control-image", str(photo[0]), "--steps", "1", "--quiet"]
    done = process("", PROMPT, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_loading_in_python_shows_no_bar_and_leaves_bars_as_they_were(tmp_path):
    """transformers has one of the weights that it reads; a program that uses us may want it for its own models."""
    save("sdxl", tmp_path / "xl")
    save_single_file(load_model(tmp_path / "xl"), tmp_path / "one.safetensors")
    code = (
        "import sys; from diffusion import TextToImage; from transformers.utils import logging\n"
        "from huggingface_hub import utils\n"
        "def load():\n"
        "    for path in sys.argv[1:]: TextToImage.load(path, 'cpu')\n"
        "    print(logging.is_progress_bar_enabled(), not utils.are_progress_bars_disabled())\n"
        "load(); utils.disable_progress_bars(); load(); logging.disable_progress_bar(); load()"
    )
    done = process(code, str(tmp_path / "xl"), str(tmp_path / "one.safetensors"))
    assert (done.stdout.split("\n"), done.stderr) == (["True True", "True False", "False False", ""], "")


def test_libraries_are_told_to_be_quiet_before_they_are_imported():
    code = (
        "import os, sys; from diffusion.cli import request, generate\n"
        "def find(name, *, offline):\n"
        "    print(os.environ['HF_HUB_DISABLE_PROGRESS_BARS'], 'huggingface_hub' in sys.modules); raise ValueError\n"
        "request.find_model = find; generate.run(['a', '-m', 'owner/name'])"
    )
    done = process(code)
    assert done.stdout == "1 False\n", done.stderr
