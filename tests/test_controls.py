"""What leads a picture besides its words: noise, levels, guidance, a ControlNet, LoRAs; flags and their page."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import made
from diffusion import TextToImage, drawing, samplers
from diffusion.parameters import parse_parameters
from diffusion.schedules import levels
from diffusion.settings import Settings
from families import KINDS, over, parity, psnr, save, stock

PROMPT = "red apple"


def latents(model, **given):
    return list(model.stream(PROMPT, **{"seed": 1, "steps": 3} | given))[-1].latents


# --- which noise


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_a_tile_moves_with_its_noise(tiny, monkeypatch, axes):
    """If edges fit each other there are no edges: noise that is moved around gives the picture moved around."""
    given = {"tile": axes, "seed": 4, "steps": 2, "width": 16, "height": 16}
    (still,), (edged,) = tiny(PROMPT, **given), tiny(PROMPT, **given | {"tile": ""})
    plain = drawing.seed_noise
    dims = [{"x": 2, "y": 1}[axis] for axis in axes]
    monkeypatch.setattr(drawing, "seed_noise", lambda seed, shape: plain(seed, shape).roll([2] * len(dims), dims))

    def moved_back(tile):
        (moved,) = tiny(PROMPT, **given | {"tile": tile})
        return Image.fromarray(np.roll(np.asarray(moved), [-4] * len(dims), [dim - 1 for dim in dims]))

    assert psnr(moved_back(axes), still) > 55
    assert psnr(moved_back(""), edged) < 50, "with edges it is another picture"


def test_tiling_leaves_the_model_as_it_was(tiny):
    before = latents(tiny)
    latents(tiny, tile="xy")
    stopped = tiny.stream(PROMPT, tile="xy", seed=1, steps=3)
    next(stopped)
    stopped.close()
    assert torch.equal(latents(tiny), before)


def test_variations_lie_on_the_way_to_another_seed(tiny, draw):
    """(A1111: picture k of a batch is a variation of the same seed, towards variation seed + k.)"""
    given = {"variation_seed": 8, "variation_strength": 0.0}
    assert torch.equal(latents(tiny, **given), latents(tiny))
    assert torch.equal(latents(tiny, **given | {"variation_strength": 1.0}), latents(tiny, seed=8))
    said = draw(PROMPT, "-s", "1", "--variation-seed", "8", "--variation-strength", "0.3", "--num-images", "2")
    assert [made(path)["seed"] for path in said.paths] == [1, 1]
    assert [made(path)["variation_seed"] for path in said.paths] == [8, 9]
    assert made(said.paths[0])["variation_strength"] == 0.3
    for sampler in ("euler_ancestral", "dpmpp_2m_sde", "lcm"):
        ends = [latents(tiny, sampler=sampler, **given | {"variation_strength": share}) for share in (0.0, 0.5, 1.0)]
        assert torch.equal(ends[0], latents(tiny, sampler=sampler))
        assert torch.equal(ends[2], latents(tiny, sampler=sampler, seed=8)), "the noise on the way turns too"
        assert not torch.equal(ends[1], ends[2])
    again = draw(PROMPT, "-s", "1", "--variation-seed", "9", "--variation-strength", "0.3")
    assert Image.open(again.paths[0]).tobytes() == Image.open(said.paths[1]).tobytes()


def test_noise_on_the_way_is_noise(tiny):
    one, other = (samplers.seed_noise(seed, (4, 64, 64)) for seed in (1, 2))
    for share in (0.25, 0.5, 0.9):
        assert samplers.rotate(one, other, share).std() == pytest.approx(1, abs=0.02)
    half = samplers.rotate(one, other, 0.5)
    assert torch.allclose(half, samplers.rotate(other, one, 0.5), atol=1e-5)
    assert torch.equal(samplers.rotate(one, one, 0.5), one), "nowhere to go"


# --- how


def test_sigmas_are_the_levels_that_are_visited(tiny, draw):
    grid = levels(tiny.model.schedule, 4, "karras")
    ratios = [level.ratio for level in grid[:-1]]
    assert torch.allclose(
        latents(tiny, sigmas=tuple(ratios), steps=None, sampler="euler"),
        latents(tiny, schedule="karras", steps=4, sampler="euler"),
        atol=1e-4,
    )
    said = draw(PROMPT, "--sigmas", "20,5,1,0.2,0")
    assert made(said.paths[0])["sigmas"] == [20, 5, 1, 0.2]
    assert made(said.paths[0])["steps"] == 4
    assert "schedule" not in made(said.paths[0])


def test_guidance_is_rescaled_as_in_the_stock_library(sd1):
    theirs = stock(sd1)
    settings = {"guidance_scale": 9.0, "guidance_rescale": 0.7, "num_inference_steps": 4}
    noise = torch.Generator("cpu").manual_seed(3)
    picture = theirs(PROMPT, generator=noise, **settings).images[0]
    draws = TextToImage.load(sd1, "cpu", "fp32")
    given = {"seed": 3, "steps": 4, "guidance_scale": 9.0}
    plain, rescaled = (draws(PROMPT, **given, guidance_rescale=share)[0] for share in (0.0, 0.7))
    # the paper rescales the network's output, we the estimate of x0: near for any model, and not the same
    assert psnr(rescaled, picture) > psnr(plain, picture)


def test_guidance_may_be_kept_to_an_interval(tiny, draw):
    given = {"guidance_scale": 4.0}
    assert torch.equal(latents(tiny, **given, guidance_interval=(0.0, None)), latents(tiny, **given))
    assert torch.equal(latents(tiny, **given, guidance_interval=(1e6, 1e7)), latents(tiny, guidance_scale=1.0))
    said = draw(PROMPT, "--guidance-interval", "0.3,5")
    assert made(said.paths[0])["guidance_interval"] == [0.3, 5]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--clip-skip", "2"], {"clip_skip": 2}),
        (["--guidance-rescale", "0.7"], {"guidance_rescale": 0.7}),
        (["--tile", "x"], {"tile": "x"}),
        (["--literal"], {"literal": True}),
        (["--long-prompts"], {"long_prompts": True}),
    ],
    ids=str,
)
def test_every_flag_is_recorded(draw, words, expected):
    said = draw("(red:1.3) apple", *words)
    assert said.code == 0, said.err
    assert expected.items() <= made(said.paths[0]).items()


def test_brackets_weigh_unless_they_are_literal(tiny):
    weighed, literal = (
        list(tiny.stream("(red:1.5) apple", seed=1, literal=take))[-1].latents for take in (False, True)
    )
    plain = list(tiny.stream("red apple", seed=1))[-1].latents
    assert not torch.equal(weighed, plain)
    assert not torch.equal(weighed, literal)
    assert torch.equal(list(tiny.stream("(red:1) apple", seed=1))[-1].latents, plain)


def test_long_prompts_are_read_in_chunks_where_that_is_asked_for(tiny, draw):
    long = "red apple, " * 12
    assert draw(long).code == 2
    assert draw(long, "--long-prompts").code == 0
    ends = [list(tiny.stream(long + end, seed=1, long_prompts=True))[-1].latents for end in ("cat", "boat")]
    assert not torch.equal(*ends), "the last word counts too"
    mixed = tiny([PROMPT, long], seed=1, long_prompts=True, steps=2)
    assert mixed[0].tobytes() == tiny(PROMPT, seed=1, steps=2)[0].tobytes(), "beside a longer prompt nothing changes"


def test_layers_of_the_text_encoder_are_skipped(tiny):
    assert not torch.equal(latents(tiny), latents(tiny, clip_skip=2))


# --- ControlNet


def test_a_controlnet_leads_as_in_the_stock_library(net):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    sd1 = net.parent / "sd1"
    edges = Image.fromarray(np.random.default_rng(2).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    controlnet = ControlNetModel.from_pretrained(net, local_files_only=True)
    theirs = over(sd1, StableDiffusionControlNetPipeline, controlnet=controlnet)
    picture = theirs(
        PROMPT,
        image=edges,
        num_inference_steps=3,
        guidance_scale=5.0,
        controlnet_conditioning_scale=0.8,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    given = {"seed": 3, "steps": 3, "guidance_scale": 5.0, "width": picture.width, "height": picture.height}
    led = TextToImage.load(sd1, "cpu", "fp32", control=net)
    (ours,) = led(PROMPT, control_image=edges, control_scale=0.8, **given)
    assert psnr(ours, picture) >= 60
    assert psnr(TextToImage.load(sd1, "cpu")(PROMPT, **given)[0], ours) < 40, "it does lead"
    (other,) = led(PROMPT, control_image=Image.new("RGB", edges.size), control_scale=0.8, **given)
    assert psnr(ours, other) < 40, "and by this picture"
    batch = led(["blue boat", PROMPT], control_image=edges, control_scale=0.8, **given)
    assert batch[1].tobytes() == ours.tobytes(), "whoever else is in its batch"
    (weaker,) = led(PROMPT, control_image=edges, control_scale=0.2, **given)
    assert psnr(ours, weaker) < 40, "as strongly as it was told to"
    record = json.loads(ours.info["diffusion"])
    assert record["control"]["name"] == "net"
    assert len(record["control"]["hash"]) == 10
    assert parse_parameters(ours.info["parameters"])["ControlNet 0"].startswith("Model: net [")


def test_a_controlnet_leads_from_the_command_line(draw, net, tmp_path):
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / "e.png")
    sd1, few = net.parent / "sd1", ["-s", "3", "--steps", "2"]
    led = TextToImage.load(sd1, "cpu", "fp32", control=net)
    for scale in ("0.3", "1.5"):
        words = ["--control", str(net), "--control-image", "e.png", "--control-scale", scale]
        said = draw(PROMPT, *few, *words, model=sd1)
        assert said.code == 0, said.err
        (ours,) = led(PROMPT, seed=3, steps=2, control_image=tmp_path / "e.png", control_scale=float(scale))
        assert Image.open(said.paths[0]).tobytes() == ours.tobytes()
        assert made(said.paths[0])["control_scale"] == float(scale)


# --- LoRAs in prompts


def test_a_prompt_may_put_a_lora_on_the_model(draw, red, tiny):
    words = ("-s", "1", "--steps", "2")
    plain = draw(PROMPT, *words)
    tagged = draw(f"{PROMPT} <lora:red:0.5>", *words)
    assert tagged.code == 0, tagged.err
    flagged = draw(PROMPT, *words, "--lora", f"{red}:0.5")
    for said in (tagged, flagged):
        assert "red.safetensors: 64 of 64 keys, 32 layers of unet" in said.err
    pictures = [Image.open(said.paths[0]).tobytes() for said in (plain, tagged, flagged)]
    assert pictures[0] != pictures[1]
    assert pictures[1] == pictures[2]
    assert made(tagged.paths[0])["prompt_loras"] == made(flagged.paths[0])["loras"]
    (ours,) = tiny.__class__(tiny.model, lora_folder=red.parent)(f"{PROMPT} <lora:red:0.5>", seed=1, steps=2)
    assert ours.tobytes() == pictures[1]
    elsewhere = red.parent.rename(red.parent.with_name("shelf"))
    assert draw(f"{PROMPT} <lora:red:0.5>", *words).code == 2
    there = draw(f"{PROMPT} <lora:red:0.5>", *words, "--lora-dir", "shelf")
    assert Image.open(there.paths[0]).tobytes() == pictures[1]
    elsewhere.rename(red.parent)
    planned = draw(PROMPT, "--dry-run", "--lora", str(red))
    assert "64 of 64 keys" in planned.err
    assert draw(PROMPT, "--dry-run", "--lora", str(red.parent)).code == 2
    both = draw(f"{PROMPT} <lora:red:0.5>", PROMPT, f"{PROMPT} <lora:red>", *words)
    assert [Image.open(path).tobytes() for path in both.paths][:2] == [pictures[1], pictures[0]], "and takes it off"
    assert Image.open(both.paths[2]).tobytes() not in pictures


# --- all of it


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("family", KINDS)
def test_the_pictures_of_the_families_are_the_stock_librarys(tmp_path, family, sampler):
    """(`python tests/families.py` prints the figures.)"""
    assert parity(save(family, tmp_path / family), sampler, steps=8) >= 60


def test_what_does_not_go_together_is_one_line(draw, photo):
    image, mask = (str(path) for path in photo)
    for words, message in [
        (["--mask", mask], "mask needs a picture"),
        (["--strength", "0.5"], "strength needs a picture"),
        (["-i", image, "--strength", "0"], "would change nothing"),
        (["-i", image, "--strength", "1.5"], "strength must be 0 to 1"),
        (["-i", image, "--strength", "0.001", "--steps", "20"], "more than this model's 1000"),
        (["-i", "nowhere.png"], ": nowhere.png is not there\n"),
        (["-i", __file__], "cannot be read as a picture"),
        (["-i", image, "--mask", mask, "--hires", "2"], "hires and mask exclude each other"),
        (["--hires", "1"], "above 1"),
        (["--extend", "left=4"], "extend needs a picture"),
        (["-i", image, "--extend", "up=4"], "is not like left=64"),
        (["--tile", "z"], "none of x, y and xy"),
        (["--clip-skip", "3"], "this text encoder has 2 layers"),
        (["--clip-skip", "0"], "clip_skip must be at least 1"),
        (["--sigmas", "1,2"], "numbers that fall"),
        (["--sigmas", "1,x"], "'x' is not a number"),
        (["--sigmas", "5,1", "--steps", "3"], "leave those out"),
        (["--sigmas", "5,0.00001"], "outside of this model's"),
        (["--guidance-interval", "5,1"], "low, high; None"),
        (["--guidance-interval", "5"], "LOW,HIGH"),
        (["--variation-seed", "1"], "give variation_strength"),
        (["--frames", "4"], "needs somewhere to go"),
        (["--to-prompt", "x"], "give frames"),
        (["--to-prompt", "x", "--frames", "4", "--num-images", "2"], "exclude"),
        (["--control-image", image], "belong together"),
        (["--compare", "stpes=1,2"], "is not FIELD=VALUE"),
        (["--compare", "steps=1,2", "cfg=1", "seed=1,2"], "one or two"),
        (["--compare", "steps=1,x"], "'x' is not a whole number"),
        (["--film", "x.gif", "--num-images", "2"], "one picture comes about, and 2"),
        (["--film", "x.mp4"], "must end in"),
        (["--grid", "x.gif"], "must end in"),
        (["(a:nan)"], "no finite number"),
        (["<lora:nowhere:1>"], "'nowhere', which is not in loras/"),
        (["-n", "<lora:x>"], "belongs into the prompt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt is not there"),
    ]:
        said = draw("a", *words)
        assert (said.code, said.out) == (2, ""), (words, said.err)
        assert said.err.count("\n") == 1, (words, said.err)
        assert message in said.err, (words, said.err)


def test_the_documentation_knows_every_flag_and_shows_what_is_there():
    from diffusion.cli.request import parser

    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "generating.md").read_text(encoding="utf-8")
    flags = {flag for action in parser("x")._actions for flag in action.option_strings if flag.startswith("--")}
    assert len(flags) > 50
    assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", page)} <= {"--help", "--cfg-scale"}
    shown = re.findall(r"!\[\]\((.*?)\)", page)
    assert len(shown) > 10
    assert not [name for name in shown if not (docs / name).is_file()]


def test_every_flag_and_every_setting_is_tried_by_a_test():
    """That it stands in one; what the tests do with it only a reader sees."""
    from diffusion.cli.request import parser

    tests = "\n".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    flags = [action.option_strings for action in parser("x")._actions if action.option_strings]
    assert not [names for names in flags if not any(re.search(rf"""["' ]{name}["' =]""", tests) for name in names)]
    settings = [item.name for item in dataclasses.fields(Settings)]
    assert not [name for name in settings if not re.search(rf"""\b{name}=(?!=)|"{name}":""", tests)]
