"""The pipeline in Python: what a picture depends on, and that it is the stock library's."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffusion
from diffusion import names
from diffusion.models.folder import load_model
from diffusion.parameters import parse_parameters
from diffusion.pipeline import TextToImage
from diffusion.settings import Settings, Shot
from families import psnr

PROMPT = "a red apple"


def test_the_package_offers_it_without_loading_it() -> None:
    assert diffusion.TextToImage is TextToImage
    assert "TextToImage" in dir(diffusion)


def test_a_call_gives_pictures_of_the_models_own_size(tiny: TextToImage) -> None:
    (image,) = tiny(PROMPT, seed=1)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert image.getbbox() is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 2},
        {"steps": 3},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0},
        {"negative_prompt": "a blue boat"},
        {"sampler": "euler_ancestral"},
        {"schedule": "discrete"},
    ],
    ids=str,
)
def test_each_setting_reaches_the_picture(tiny: TextToImage, changed: dict[str, Any]) -> None:
    base = {"seed": 1, "steps": 4}
    first, other = (tiny.stream(PROMPT, **given) for given in (base, base | changed))
    assert not torch.equal(list(first)[-1].latents, list(other)[-1].latents)


def test_the_prompt_reaches_the_picture(tiny: TextToImage) -> None:
    red, blue = (list(tiny.stream(prompt, seed=1))[-1].latents for prompt in ("red apple", "blue boat"))
    assert not torch.equal(red, blue)


@pytest.mark.parametrize("sampler", names.SAMPLERS)
def test_every_sampler_draws(tiny: TextToImage, sampler: str) -> None:
    (image,) = tiny(PROMPT, sampler=sampler, seed=1, steps=3)
    assert json.loads(image.info["diffusion"])["sampler"] == sampler


@pytest.mark.parametrize("schedule", names.SCHEDULES)
def test_every_schedule_draws(tiny: TextToImage, schedule: str) -> None:
    (image,) = tiny(PROMPT, schedule=schedule, sampler="dpmpp_2m", seed=1, steps=3)
    assert json.loads(image.info["diffusion"])["schedule"] == schedule


def test_the_size_is_what_was_asked_for(tiny: TextToImage) -> None:
    (image,) = tiny(PROMPT, width=32, height=16, seed=1, steps=1)
    assert image.size == (32, 16)


def test_the_first_noise_of_a_seed_is_the_stock_librarys(tiny: TextToImage) -> None:
    """(diffusers#2659, A1111#376: the same seed in a batch of another size was another picture.)"""
    alone = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(tiny.first_noise([5], 16, 16), alone)
    assert torch.equal(tiny.first_noise([3, 4, 5], 16, 16)[2:], alone)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_picture_does_not_know_its_batch(tiny: TextToImage, sampler: str) -> None:
    given = {"sampler": sampler, "steps": 4}
    together = tiny([PROMPT, "blue boat"], seed=10, num_images=3, batch_size=6, **given)
    split = tiny([PROMPT, "blue boat"], seed=10, num_images=3, batch_size=4, **given)
    alone = [tiny(prompt, seed=10 + k, **given)[0] for prompt in (PROMPT, "blue boat") for k in range(3)]
    for one, two, three in zip(together, split, alone, strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()
        assert one.info == three.info


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


LARGE = {"width": 256, "height": 256, "guidance_scale": 1.0}  # from 32x32 cells on threads share a group norm


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        ("fp32", {}),
        ("fp32", {"guidance_scale": 1.0}),
        ("fp32", {"width": 64, "height": 64, "hires": 1.5}),
        ("fp32", {"tile": "xy"}),
        ("fp32", LARGE),
        ("bf16", LARGE | {"tile": "x"}),
        ("bf16", {"width": 96}),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_a_picture_of_the_shipped_model_does_not_know_its_batch(dtype: str, given: dict[str, Any]) -> None:
    """Nor what was drawn before it: each in a model that has drawn nothing yet; on the CPU, whose kernels these are."""
    prompts = ["red apple", "panda", "crying face"]

    def drawn(*calls: list[str]) -> list[bytes]:
        t2i = TextToImage.load("emoji", "cpu", dtype)
        return [image.tobytes() for call in calls for image in t2i(call, seed=7, steps=2, **given)]

    together = drawn(prompts)
    assert drawn(prompts[:2], prompts[2:]) == together
    assert [drawn([prompt])[0] for prompt in prompts] == together


def test_a_new_call_ends_the_stream_before_it(tiny: TextToImage, red: Path) -> None:
    """Whoever stops following a stream may still refer to it: what it has put on the model must not stay there."""
    prompt, folder = f"{PROMPT} <lora:red:1>", tiny.lora_folder
    tiny.lora_folder = red.parent
    try:
        (alone,), (plain,) = tiny(prompt, seed=1), tiny(PROMPT, seed=1)
        left = tiny.stream(prompt, seed=2)
        next(left)
        assert tiny(prompt, seed=1)[0].tobytes() == alone.tobytes() != plain.tobytes()
        assert tiny(PROMPT, seed=1)[0].tobytes() == plain.tobytes()
        with pytest.raises(ValueError, match="another call of the same model has ended this stream"):
            next(left)
        whole = list(tiny.stream(PROMPT, seed=1))[-1].images
        assert whole is not None
        assert whole[0].tobytes() == plain.tobytes()
    finally:
        tiny.lora_folder = folder


def test_a_model_that_is_drawing_says_so(tiny: TextToImage) -> None:
    def meddle(images: list[Image.Image]) -> list[None]:
        with pytest.raises(ValueError, match="drawing at this moment: one call at a time"):
            tiny(PROMPT, seed=1)
        return [None] * len(images)

    tiny.checker = meddle
    try:
        tiny(PROMPT, seed=1)
    finally:
        tiny.checker = None


def test_a_request_may_be_given_whole(tiny: TextToImage) -> None:
    wanted = Settings(prompts=(PROMPT, "blue boat"), seed=3, steps=2)
    images = tiny(wanted)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in tiny(wanted.prompts, seed=3, steps=2)]
    assert tiny(wanted, seed=4)[0].tobytes() == tiny(PROMPT, seed=4, steps=2)[0].tobytes()
    assert [step.index for step in tiny.stream(wanted, steps=3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        tiny(wanted, steps=0)


def test_the_same_call_gives_the_same_bits(tiny: TextToImage) -> None:
    given = {"seed": 3, "num_images": 2, "sampler": "dpmpp_sde", "steps": 3}
    assert [image.tobytes() for image in tiny(PROMPT, **given)] == [image.tobytes() for image in tiny(PROMPT, **given)]


def test_metadata_makes_the_same_picture_again(tiny: TextToImage) -> None:
    (image,) = tiny(PROMPT, negative_prompt="a boat, a cat", steps=3, guidance_scale=2.5, sampler="DPM++ 2M")
    made = json.loads(image.info["diffusion"])
    names = ("negative_prompt", "seed", "steps", "guidance_scale", "sampler", "schedule", "width", "height")
    (again,) = tiny(made["prompt"], **{name: made[name] for name in names})
    assert again.tobytes() == image.tobytes()
    assert again.info == image.info
    shown = parse_parameters(image.info["parameters"])
    assert shown["prompt"] == PROMPT
    assert shown["negative_prompt"] == "a boat, a cat"
    assert (shown["Steps"], shown["Sampler"], shown["CFG scale"]) == ("3", "DPM++ 2M", "2.5")
    assert shown["Model"] == "tiny"
    assert shown["Model hash"] == made["model_hash"]
    assert len(made["model_hash"]) == 10


def test_a_stream_can_be_watched_and_left(tiny: TextToImage) -> None:
    stream = tiny.stream([PROMPT, "blue boat"], seed=1, steps=3, batch_size=1)
    first = next(stream)
    assert (first.index, first.total, first.pictures, first.images) == (1, 3, [Shot(PROMPT, 1)], None)
    assert first.preview()[0].size == (16, 16)
    rest = list(stream)
    assert [step.index for step in rest] == [2, 3, 1, 2, 3]
    assert [step.images is not None for step in rest] == [False, True, False, False, True]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_stock_pipeline_draws_the_same_picture(tiny: TextToImage, seed: int) -> None:
    stock = tiny.to_diffusers()
    stock.set_progress_bar_config(disable=True)
    given = {"negative_prompt": "blue boat", "guidance_scale": 3.0, "height": 16, "width": 16}
    theirs = stock(
        PROMPT, num_inference_steps=5, latents=tiny.first_noise([seed], 16, 16), output_type="pil", **given
    ).images[0]
    (ours,) = tiny(PROMPT, seed=seed, steps=5, sampler="ddim", schedule="trailing", **given)
    assert psnr(ours, theirs) >= 60


def test_the_stock_library_opens_the_folder_and_draws_the_same_picture(tiny: TextToImage, tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    for seed in (3, 4):
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = stock(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
        (ours,) = tiny(PROMPT, seed=seed)
        assert ours.size == theirs.size
        assert psnr(ours, theirs) >= 60


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_numbers_that_are_not_finite_are_an_error(tiny_model: Path, part: str) -> None:
    broken = TextToImage(load_model(tiny_model))
    with torch.no_grad():
        (broken.model.unet.conv_in if part == "unet" else broken.model.vae.decoder.conv_in).weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        broken(PROMPT, seed=1)


def test_bfloat16_draws_nearly_the_same_picture(tiny: TextToImage, tiny_model: Path) -> None:
    half = TextToImage.load(tiny_model, "cpu", torch.bfloat16)
    assert json.loads(half(PROMPT, seed=1)[0].info["diffusion"])["dtype"] == "bfloat16"
    assert psnr(half(PROMPT, seed=1)[0], tiny(PROMPT, seed=1)[0]) > 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a", 3]}, "must be text"),
        ({"prompt": "apple " * 30}, "30 tokens long, but this text encoder reads 22"),
        ({"negative_prompt": "apple " * 30}, "30 tokens long"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1001}, "more than this model's 1000 noise levels"),
        ({"steps": 2.0}, "whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "too large"),
        ({"width": 15}, "width 15 is not a multiple of 2: try 1[46]"),
        ({"guidance_scale": math.inf}, "finite"),
        ({"sampler": "eulr"}, "did you mean 'euler'"),
        ({"schedule": "karas"}, "did you mean 'karras'"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_before_the_first_step(
    tiny: TextToImage, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.stream(**{"prompt": PROMPT, **given})


def test_wrong_folders_devices_and_dtypes_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        TextToImage.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no unet/"):
        TextToImage.load(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        TextToImage.load(tiny_model, "cpu", "bf1")
    with pytest.raises(ValueError, match="float16 is slow and wrong on the CPU"):
        TextToImage.load(tiny_model, "cpu", "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not present on this machine"):
            TextToImage.load(tiny_model, "cuda")


def test_names_of_other_programs_are_understood() -> None:
    names = {"Euler a": "euler_ancestral", "DPM++ 2M SDE": "dpmpp_2m_sde", "UniPCMultistepScheduler": "unipc"}
    for theirs, ours in (names | {"DDIMScheduler": "ddim", "euler-ancestral": "euler_ancestral"}).items():
        assert Settings(prompts=("a",), sampler=theirs).sampler == ours
    assert Settings(prompts=("a",), schedule="SGM Uniform").schedule == "sgm_uniform"


def test_names_mean_the_samplers_and_grids_that_exist() -> None:
    """The lists that the command line knows without importing torch are those of the code behind them."""
    from diffusion import samplers, schedules

    assert set(names.SAMPLERS) == set(samplers.SAMPLERS)
    assert set(names.SCHEDULES) == set(schedules.GRIDS)


def test_a_sampler_name_may_end_in_a_schedule() -> None:
    assert Settings(prompts=("a",), sampler="DPM++ 2M Karras").schedule == "karras"
    assert Settings(prompts=("a",), sampler="DPM++ 2M Karras", schedule="Karras").schedule == "karras"
    with pytest.raises(ValueError, match="asks for karras, and schedule for beta"):
        Settings(prompts=("a",), sampler="DPM++ 2M Karras", schedule="beta")


def test_the_model_hash_knows_every_part(tiny: TextToImage, tiny_model: Path, tmp_path: Path) -> None:
    from diffusion.models.folder import save_model

    changed = load_model(tiny_model)
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight.add_(1)
    save_model(changed, tmp_path / "tiny")
    assert TextToImage.load(tmp_path / "tiny", "cpu").model_hash != tiny.model_hash


def test_a_wrong_device_or_recipe_is_a_value_error(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        TextToImage.load(tiny_model, device="gpu")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    for wrong in ({"width": 0}, {"steps": "20"}):
        (folder / "recipe.json").write_text(json.dumps(recipe | wrong))
        with pytest.raises(ValueError, match=r"recipe\.json: .* must be a whole number of at least 1"):
            TextToImage.load(folder)
