"""Staying alive: what is repaired, what is said of it, what is left as it was; memory, tiles, networks that wait."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import TextToImage, drawing, loading, memory, repair
from diffusion.models.folder import load_model
from diffusion.models.networks import first_weight, tiled
from diffusion.models.offload import Offload
from diffusion.notices import Repaired
from diffusion.settings import Settings
from families import save
from test_generate_cli import Command
from test_generate_cli import draw as draw  # a fixture

ROOT = Path(__file__).parents[1]
PROMPT = "red apple"


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def repairs_of(image: Image.Image) -> list[str]:
    return json.loads(image.info["diffusion"]).get("repairs", [])


def weights_of(t2i: TextToImage) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": weight.clone()
        for name, network in t2i.model.networks.items()
        for key, weight in network.state_dict().items()
    }


def fails(layer: torch.nn.Module, when: Callable[[torch.Tensor], bool], error: Exception | None = None) -> Any:
    """A layer that from now on puts out NaN, or raises, when its input is such a one."""

    def hook(_: Any, given: Any, out: Any) -> Any:
        if not when(given[0]):
            return out
        if error is not None:
            raise error
        return torch.full_like(out, math.nan)

    return layer.register_forward_hook(hook)


@contextmanager
def failing(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def tiny(tiny_model: Path) -> TextToImage:
    return TextToImage.load(tiny_model, "cpu", "fp32")


@pytest.fixture
def half(tiny_model: Path) -> TextToImage:
    return TextToImage.load(tiny_model, "cpu", "bf16")


# --- numbers that are not finite


def test_a_decoder_that_fails_in_bfloat16_works_in_float32_and_says_so(half: TextToImage) -> None:
    plain, before = half(PROMPT, seed=1)[0], weights_of(half)
    with (
        failing(fails(half.model.vae.decoder.conv_in, lambda x: x.dtype == torch.bfloat16)),
        pytest.warns(Repaired, match="autoencoder .* not finite: it works in float32"),
    ):
        (mended,) = half(PROMPT, seed=1)
    assert repairs_of(mended) == ["the autoencoder put out numbers that are not finite: it works in float32"]
    assert json.loads(mended.info["diffusion"])["dtype"] == "bfloat16", "the U-Net still works in that"
    half.model.vae.float()
    assert half(PROMPT, seed=1)[0].tobytes() == mended.tobytes(), "it is what a decoder in float32 makes of the latents"
    half.model.vae.bfloat16()
    after = weights_of(half)
    assert all(
        torch.equal(after[name], weight) and after[name].dtype == weight.dtype for name, weight in before.items()
    )
    again = half(PROMPT, seed=1)[0]
    assert again.tobytes() == plain.tobytes()
    assert repairs_of(again) == []


def test_a_decoder_in_float16_tries_bfloat16_first_and_its_weights_come_back_whole(tiny: TextToImage) -> None:
    vae = tiny.model.vae.half()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    tried = []

    def refuse(x: torch.Tensor) -> bool:
        tried.append(x.dtype)
        return x.dtype != torch.float32

    with failing(fails(vae.decoder.conv_in, refuse)), pytest.warns(Repaired) as said:
        (mended,) = tiny(PROMPT, seed=1)
    assert tried == [torch.float16, torch.bfloat16, torch.float32]
    assert [str(one.message).rsplit(" ", 1)[1] for one in said] == ["bfloat16", "float32"]
    assert len(repairs_of(mended)) == 2
    assert all(torch.equal(vae.state_dict()[name], weight) for name, weight in before.items()), (
        "bfloat16 would lose bits"
    )


def test_a_unet_that_fails_draws_the_batch_again_from_the_same_noise(half: TextToImage, tiny: TextToImage) -> None:
    with failing(fails(half.model.unet.conv_in, lambda x: x.dtype == torch.bfloat16)), pytest.warns(Repaired):
        steps = list(half.stream(PROMPT, seed=1, num_images=2))
    seen = [(step.index, step.total) for step in steps]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)], "the first step failed, and was not told"
    mended = steps[-1].images
    assert mended is not None
    half.model.vae.float(), half.model.unet.float(), half.model.text_encoder.float()
    whole = half(PROMPT, seed=1, num_images=2)
    assert [image.tobytes() for image in mended] != [image.tobytes() for image in whole], (
        "its decoder stayed in bfloat16"
    )
    assert all(psnr(one, other) > 35 for one, other in zip(mended, whole, strict=True))
    assert json.loads(mended[0].info["diffusion"])["dtype"] == "bfloat16", "in that --from-image fails, and is repaired"
    assert repairs_of(mended[0]) == ["the U-Net put out numbers that are not finite at step 1: drawn again in float32"]


def rows_of(latent: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Which rows of a batch are one picture's at its first step."""
    return lambda x: torch.isclose(x.float(), latent.float(), atol=1e-2).flatten(1).all(dim=1)


def spoils(layer: torch.nn.Module, whose: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A layer that from now on puts out NaN in bfloat16 for some rows of a batch."""

    def hook(_: Any, given: Any, out: Any) -> Any:
        bad = whose(given[0]).view(-1, 1, 1, 1)
        return out.masked_fill(bad, math.nan) if given[0].dtype == torch.bfloat16 else out

    return layer.register_forward_hook(hook)


SAID = "the U-Net put out numbers that are not finite at step 1: drawn again in float32"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_unet_that_fails_for_one_picture_fails_for_no_other(half: TextToImage, batch_size: int) -> None:
    """Else what it records would not draw it again: beside whom it was drawn is nowhere written."""
    call = {"seed": 1, "num_images": 3, "batch_size": batch_size}
    plain, before = half(PROMPT, **call), weights_of(half)
    (start,) = half.first_noise([2], 16, 16)
    faulty = spoils(half.model.unet.conv_in, rows_of(start.bfloat16()))
    with failing(faulty):
        with pytest.warns(Repaired) as said:
            images = half(PROMPT, **call)
        with pytest.warns(Repaired):
            (alone,) = half(PROMPT, seed=2)
    assert [str(one.message) for one in said] == [SAID]
    assert [image.tobytes() for image in images[::2]] == [image.tobytes() for image in plain[::2]]
    assert [repairs_of(image) for image in images] == [[], [SAID], []]
    assert psnr(images[1], plain[1]) > 35
    assert (alone.tobytes(), alone.info) == (images[1].tobytes(), images[1].info)
    after = weights_of(half)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_decoder_that_fails_for_one_picture_fails_for_no_other(half: TextToImage) -> None:
    steps = list(half.stream(PROMPT, seed=1, num_images=3))
    plain, latent = steps[-1].images, steps[-1].latents[1].bfloat16()
    assert plain is not None
    scaled = half.model.vae.post_quant_conv  # the first layer that sees them
    with failing(spoils(scaled, rows_of(latent / half.model.vae.config.scaling_factor))):
        with pytest.warns(Repaired) as said:
            images = half(PROMPT, seed=1, num_images=3)
        assert len(said) == 1
        with pytest.warns(Repaired):
            (alone,) = half(PROMPT, seed=2)
    assert [image.tobytes() for image in images[::2]] == [image.tobytes() for image in plain[::2]]
    assert [len(repairs_of(image)) for image in images] == [0, 1, 0]
    assert images[1].tobytes() != plain[1].tobytes()
    assert (alone.tobytes(), alone.info) == (images[1].tobytes(), images[1].info)


def test_a_repair_is_told_every_time_and_where_it_was_asked_for(half: TextToImage) -> None:
    hook = fails(half.model.unet.conv_in, lambda x: x.dtype == torch.bfloat16)
    with failing(hook), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")  # as a script has it: the same text from the same line once
        for _ in range(2):
            half(PROMPT, seed=1)
    assert [(str(one.message), one.filename) for one in said] == [(SAID, __file__)] * 2


def test_a_step_that_fails_late_begins_its_batch_again(half: TextToImage) -> None:
    calls = []

    def third(x: torch.Tensor) -> bool:
        calls.append(x.dtype)
        return len(calls) == 5  # two evaluations a step: conditional and not, in one batch; so this is step 5 / 2

    with failing(fails(half.model.unet.conv_in, third)), pytest.warns(Repaired):
        indices = [step.index for step in half.stream(PROMPT, seed=1, steps=6)]
    assert indices == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]


def test_a_compiled_unet_is_replaced_by_itself_uncompiled_while_it_is_repaired(half: TextToImage) -> None:
    unet = half.model.unet

    class Compiled:
        plain = unet.forward

        def __call__(self, *given: Any, **named: Any) -> Any:
            return tuple(torch.full_like(out, math.nan) for out in self.plain(*given, **named))

    half.model.compiled = unet.forward = Compiled()
    with pytest.warns(Repaired, match="drawn again in float32"):
        half(PROMPT, seed=1)
    assert unet.forward is half.model.compiled


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_nothing_helps_is_an_error_and_leaves_the_model_as_it_was(half: TextToImage, part: str) -> None:
    layer = half.model.unet.conv_in if part == "unet" else half.model.vae.decoder.conv_in
    with (
        failing(fails(layer, lambda x: True)),
        pytest.warns(Repaired, match="float32"),
        pytest.raises(FloatingPointError, match="not finite"),
    ):
        half(PROMPT, seed=1)
    assert {network.dtype for network in half.model.networks.values()} == {torch.bfloat16}


def test_a_picture_to_begin_from_that_cannot_be_encoded_is_encoded_in_float32(half: TextToImage) -> None:
    start = Image.new("RGB", (16, 16), "red")
    with (
        failing(fails(half.model.vae.encoder.conv_in, lambda x: x.dtype == torch.bfloat16)),
        pytest.warns(Repaired, match="it works in float32"),
    ):
        (mended,) = half(PROMPT, seed=1, init_image=start, strength=0.5)
    assert len(repairs_of(mended)) == 1


def test_what_is_looked_at_on_the_way_is_repaired_too(half: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(half.stream(PROMPT, seed=1))
    vae = half.model.vae
    with (
        failing(fails(vae.decoder.conv_in, lambda x: x.dtype == torch.bfloat16)),
        pytest.warns(Repaired, match="it works in float32"),
    ):
        (exact,) = step.preview(exact=True)
    assert exact.getbbox() is not None
    half.model.recipe.latent_rgb = None
    with (
        failing(fails(vae.encoder.conv_in, lambda x: x.dtype == torch.bfloat16)),
        pytest.warns(Repaired, match="it works in float32"),
    ):
        step.preview()
    matrix = half.model.recipe.latent_rgb
    assert matrix is not None
    assert np.isfinite(matrix).all(), "it is kept, so it must be good"
    assert vae.dtype == torch.bfloat16
    half.model.recipe.latent_rgb = None
    with failing(fails(vae.encoder.conv_in, lambda x: True)), pytest.raises(FloatingPointError), pytest.warns(Repaired):
        step.preview()
    assert half.model.recipe.latent_rgb is None


def test_a_film_shows_no_attempt_that_was_given_up(draw: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whole = [], drawing.network_denoiser

    def faulty(unet: Any, *given: Any) -> Any:
        denoise = whole(unet, *given)
        return lambda x, level: denoise(x, level) * (math.nan if calls.append(0) or len(calls) == 3 else 1)

    monkeypatch.setattr(drawing, "network_denoiser", faulty)
    told = draw(PROMPT, "-s", "1", "--dtype", "bf16", "--steps", "4", "--sampler", "ddim", "--film", "film.png")
    assert told.code == 0, told.err
    assert "at step 3: drawn again" in told.err
    assert Image.open("film.png").size == (5 * 16, 16), "four steps and the picture"


# --- memory that is short


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A request whose picture is larger than tiles, which are small here."""
    monkeypatch.setattr(repair, "TILES", (64, 32))
    return {"seed": 1, "steps": 1, "width": 80, "height": 64}


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT, ids=["cuda", "cpu", "python"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(tiny: TextToImage, error: Exception) -> None:
    whole = tiny(PROMPT, seed=1, num_images=5, batch_size=5)
    with failing(fails(tiny.model.unet.conv_in, lambda x: len(x) > 4, error)), pytest.warns(Repaired) as said:
        steps = list(tiny.stream(PROMPT, seed=1, num_images=5, batch_size=5))  # guidance doubles them
    parts = [step.images for step in steps if step.images is not None]
    assert [len(part) for part in parts] == [2, 1, 2], "5 are 3 and 2, and 3 are 2 and 1"
    assert [str(one.message) for one in said] == [
        "out of memory: drawn 3 at once",
        "out of memory: drawn 2 at once",
    ]
    images = [image for part in parts for image in part]
    assert all(psnr(one, other) > 60 for one, other in zip(images, whole, strict=True))
    assert repairs_of(images[0]) == [str(one.message) for one in said]


def test_a_decoder_without_room_works_in_tiles(tiny: TextToImage, small: dict[str, Any]) -> None:
    whole = tiny(PROMPT, **small)[0]
    with (
        failing(fails(tiny.model.vae.decoder.conv_in, lambda x: x.shape[-1] * 2 > 64, SHORT[1])),
        pytest.warns(Repaired, match="out of memory: the autoencoder works in tiles of 64 pixels"),
    ):
        (mended,) = tiny(PROMPT, **small)
    assert json.loads(mended.info["diffusion"])["vae_tiling"] == 64
    assert mended.tobytes() == tiny(PROMPT, vae_tiling=64, **small)[0].tobytes() != whole.tobytes()
    assert mended.size == whole.size
    with (
        failing(fails(tiny.model.vae.decoder.conv_in, lambda x: x.shape[-1] * 2 > 32, SHORT[1])),
        pytest.warns(Repaired) as said,
    ):
        (mended,) = tiny(PROMPT, **small)
    assert [re.findall(r"\d+", str(one.message)) for one in said] == [["64"], ["32"]]
    assert mended.tobytes() == tiny(PROMPT, vae_tiling=32, **small)[0].tobytes()
    assert tiny(PROMPT, **small)[0].tobytes() == whole.tobytes()


@pytest.mark.parametrize("given", [{"init_image": Image.new("RGB", (80, 64), "red")}, {"hires": 1.6}])
def test_what_is_decoded_in_tiles_was_encoded_in_tiles(
    tiny: TextToImage, small: dict[str, Any], given: dict[str, Any]
) -> None:
    """A batch of which some went through the autoencoder whole begins again: a record holds one size of tiles."""
    call = small | given
    asked = tiny(PROMPT, vae_tiling=64, num_images=2, **call)
    room = 80 if "hires" in given else 64
    hook = fails(tiny.model.vae.decoder.conv_in, lambda x: x.shape[-1] * 2 > room, SHORT[1])
    with failing(hook), pytest.warns(Repaired) as said:
        mended = tiny(PROMPT, num_images=2, **call)
    assert len(said) == 1
    assert [image.tobytes() for image in mended] == [image.tobytes() for image in asked]
    assert [json.loads(image.info["diffusion"])["vae_tiling"] for image in mended] == [64, 64]


def test_tiles_that_a_preview_needed_are_those_of_the_picture(tiny: TextToImage, small: dict[str, Any]) -> None:
    call = small | {"steps": 2, "init_image": Image.new("RGB", (80, 64), "red")}
    asked = tiny(PROMPT, vae_tiling=64, **call)
    hook = fails(tiny.model.vae.decoder.conv_in, lambda x: x.shape[-1] * 2 > 64, SHORT[1])
    with failing(hook), pytest.warns(Repaired):
        seen = [(step.index, step.preview(exact=True), step.images) for step in tiny.stream(PROMPT, **call)]
    assert [index for index, *_ in seen] == [1, 1, 2], "it had been encoded whole"
    assert seen[-1][2] is not None
    assert seen[-1][2][0].tobytes() == asked[0].tobytes()


def test_each_picture_says_how_it_was_decoded(tiny: TextToImage, small: dict[str, Any]) -> None:
    calls = []

    def second(x: torch.Tensor) -> bool:
        calls.append(x.shape)
        return len(calls) == 2

    with failing(fails(tiny.model.vae.decoder.conv_in, second, SHORT[1])), pytest.warns(Repaired):
        images = tiny(PROMPT, num_images=3, **small)
    made = [json.loads(image.info["diffusion"]) for image in images]
    assert [one.get("vae_tiling") for one in made] == [None, 64, 64]
    assert [len(one.get("repairs", [])) for one in made] == [0, 1, 1]
    for image, one in zip(images, made, strict=True):
        call = small | {"seed": one["seed"], "vae_tiling": one.get("vae_tiling")}
        assert tiny(PROMPT, **call)[0].tobytes() == image.tobytes()


def test_without_room_for_finer_weights_fewer_pictures_are_drawn(
    half: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cast, tried = weights_of(half), repair._cast, []

    def narrow(networks: Any, dtype: torch.dtype, undo: Any) -> None:
        networks = list(networks)
        cast(networks[:1], dtype, undo)
        tried.append(len(networks))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        cast(networks[1:], dtype, undo)

    monkeypatch.setattr(repair, "_cast", narrow)
    with failing(fails(half.model.unet.conv_in, lambda x: x.dtype == torch.bfloat16)), pytest.warns(Repaired) as said:
        images = half(PROMPT, seed=1, num_images=2)
    assert [str(one.message) for one in said] == [SAID, "out of memory: drawn one by one"]
    assert [repairs_of(image) for image in images] == [[SAID, "out of memory: drawn one by one"]] * 2
    after = weights_of(half)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_edges_that_fit_each_other_are_never_cut_into_tiles(tiny: TextToImage) -> None:
    with (
        failing(fails(tiny.model.vae.decoder.conv_in, lambda x: x.shape[-1] * 2 > 32, SHORT[0])),
        pytest.raises(MemoryError, match="out of memory: ask for a smaller picture"),
    ):
        tiny(PROMPT, seed=1, steps=1, width=64, height=64, tile="xy")


def test_what_was_tried_is_told_where_memory_stays_short(tiny: TextToImage) -> None:
    with (
        failing(fails(tiny.model.unet.conv_in, lambda x: True, SHORT[0])),
        pytest.warns(Repaired),
        pytest.raises(MemoryError, match=r"ask for a smaller picture; .* drawn one by one"),
    ):
        tiny(PROMPT, seed=1, num_images=2)


def test_another_error_is_no_matter_of_memory(tiny: TextToImage) -> None:
    hook = fails(tiny.model.unet.conv_in, lambda x: True, RuntimeError("shapes do not fit"))
    with failing(hook), warnings.catch_warnings():
        warnings.simplefilter("error", Repaired)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            tiny(PROMPT, seed=1, num_images=2)


def test_what_would_not_fit_on_a_cpu_is_not_tried(
    tiny: TextToImage, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes memory that the system has promised twice is ended, and says nothing."""
    monkeypatch.setattr(repair, "LARGE", 70 * 60)
    needed = memory.decoding_bytes(tiny.model, (80, 64))
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Repaired)
        whole = tiny(PROMPT, **small)[0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.warns(Repaired, match="memory is short: the autoencoder works in tiles of 64 pixels"):
        (mended,) = tiny(PROMPT, **small)
    assert mended.tobytes() != whole.tobytes()


# --- from the command line


@pytest.fixture
def faint(monkeypatch: pytest.MonkeyPatch) -> None:
    """U-Nets that are good for nothing in bfloat16."""
    whole = drawing.network_denoiser

    def faulty(unet: Any, *given: Any) -> Any:
        denoise, dtype = whole(unet, *given), first_weight(unet).dtype
        return lambda x, level: denoise(x, level) * (math.nan if dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(drawing, "network_denoiser", faulty)


def test_a_repair_is_a_line_an_event_and_in_the_picture(draw: Command, faint: None) -> None:
    told = draw(PROMPT, "-s", "1", "--dtype", "bf16", "-o", "a.png")
    assert (told.code, told.out) == (0, "a.png\n")
    assert f"generate.py: {SAID}\n" in told.err
    events = draw(PROMPT, "-s", "1", "--dtype", "bf16", "--json", "-o", "b.png").events
    assert [event["message"] for event in events if event["event"] == "repair"] == [SAID]
    for name in ("a.png", "b.png"):
        assert repairs_of(Image.open(name)) == [SAID]
    quiet = draw(PROMPT, "-s", "1", "--dtype", "bf16", "--quiet", "-o", "c.png")
    assert SAID in quiet.err, "nothing is repaired in silence"


def test_a_repaired_picture_is_made_again_by_what_it_says(draw: Command, faint: None) -> None:
    draw(PROMPT, "-s", "1", "--dtype", "bf16", "-o", "a.png")
    told = draw("--from-image", "a.png", "--verify")
    assert told.code == 0, told


def test_rows_of_a_list_are_repaired_too(draw: Command, faint: None, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("red apple\ngreen apple --steps 2\n")
    told = draw("--prompts", "rows.txt", "-s", "1", "--dtype", "bf16", "-o", "out/")
    assert told.code == 0
    assert told.err.count(SAID) == 2, "the two calls of rows that are not alike"
    assert [repairs_of(Image.open(path)) for path in told.paths] == [[SAID]] * 2


def test_what_nothing_helps_ends_with_1_and_no_picture(
    draw: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def none(*given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(repair, "decode", none)
    told = draw(PROMPT, "-s", "1", "-o", "out/")
    assert (told.code, told.out) == (1, "")
    assert told.err.splitlines()[-1] == "generate.py: out of memory: ask for a smaller picture"
    assert not list(tmp_path.rglob("*.png"))


# --- tiles, batches, and networks that wait


def test_tiles_of_the_shipped_autoencoder_are_near_the_whole(draw: Command) -> None:
    size = ("--size", "512x512", "-s", "1", "--steps", "2")
    draw("panda", *size, "-o", "whole.png", model="emoji")
    draw("panda", *size, "--vae-tiling", "256", "-o", "tiles.png", model="emoji")
    whole, tiles = Image.open("whole.png"), Image.open("tiles.png")
    assert 38 < psnr(whole, tiles) < 80
    assert json.loads(tiles.info["diffusion"])["vae_tiling"] == 256
    told = draw("--from-image", "tiles.png", "--verify", model="emoji")
    assert told.code == 0, told.err


def test_an_autoencoder_is_as_it_was_after_its_tiles(tiny: TextToImage) -> None:
    vae = tiny.model.vae
    before = (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor)
    with tiled(vae, 64):
        assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 64, 32)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vae-tiling", "100"], "vae_tiling 100 is not a multiple of 8: try 96"),
        (["--vae-tiling", "0"], "vae_tiling must be at least 1"),
        (["--vae-tiling", "64", "--tile", "x"], "tile and vae_tiling exclude each other"),
        (["--batch-size", "many"], "'many' is not a whole number or auto"),
        (
            ["--offload", "--device", "cpu"],
            "keeps networks out of a GPU's memory, and this is the CPU: leave",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_drawn(draw: Command, flags: list[str], message: str) -> None:
    for more in ([], ["--dry-run"]):
        told = draw(PROMPT, *flags, *more)
        assert (told.code, told.out) == (2, "")
        assert message in told.err


def test_a_batch_is_as_large_as_memory_has_room_for(
    draw: Command,
    tiny: TextToImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def batches(free: int, **settings: Any) -> list[int]:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        steps = tiny.stream(PROMPT, seed=1, steps=1, num_images=6, batch_size="auto", **settings)
        return [len(step.pictures) for step in steps]

    assert batches(2**40) == [6]
    assert batches(0) == [1] * 6
    one, two = (memory.COPIES * evaluation(tiny, n) for n in (1, 2))
    assert batches(memory.KEPT + one) == [1] * 6
    assert batches(memory.KEPT + one + (two - one)) == [2, 2, 2]
    assert batches(memory.KEPT + one + 2 * (two - one), guidance_scale=1.0) == [6], "without guidance half as many rows"
    monkeypatch.setattr(memory, "free_bytes", lambda device: memory.KEPT + two)
    told = draw(PROMPT, "--num-images", "4", "--batch-size", "auto", "--steps", "1", "--json", "-s", "1")
    assert [len(event["seeds"]) for event in told.events if event["event"] == "step"] == [2, 2]


def evaluation(t2i: TextToImage, count: int, chunks: int = 1, **given: Any) -> int:
    net = None if t2i.control is None else t2i.control.path
    outline = TextToImage.load(t2i.model.path or "", "cpu", control=net, weights=False)
    full = outline.resolved(Settings(prompts=(PROMPT,), seed=1, num_images=count, batch_size=count, **given))
    return memory.drawing_bytes(outline.model, full, chunks, outline.control).evaluation


def test_a_batch_of_auto_size_knows_long_prompts_and_controlnets(
    tiny: TextToImage, led: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(t2i: TextToImage, free: int, prompt: str, **settings: Any) -> list[int]:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        steps = t2i.stream(prompt, seed=1, steps=1, num_images=2, batch_size="auto", **settings)
        return [len(step.pictures) for step in steps]

    long, chunks = " ".join([PROMPT] * 99), 9
    assert tiny.plan(Settings(prompts=(long,), seed=1, long_prompts=True)).chunks == chunks
    two, longer = (memory.COPIES * evaluation(tiny, 2, n) for n in (1, chunks))
    assert two < longer
    for room, pictures in ((two, [1, 1]), (longer, [2])):
        assert batches(tiny, memory.KEPT + room, long, long_prompts=True) == pictures
    assert batches(tiny, memory.KEPT + two, PROMPT) == [2]
    picture = {"control_image": Image.new("RGB", (64, 64))}
    alone = TextToImage.load(led.model.path or "", "cpu", "fp32")
    two, more = memory.COPIES * evaluation(alone, 2), memory.COPIES * evaluation(led, 2, **picture)
    assert two < more
    assert batches(led, memory.KEPT + two, PROMPT, **picture) == [1, 1]
    assert batches(led, memory.KEPT + more, PROMPT, **picture) == [2]
    assert batches(alone, memory.KEPT + two, PROMPT) == [2]


@pytest.fixture
def led(tmp_path: Path) -> TextToImage:
    """A tiny model with a ControlNet on it."""
    from diffusers import ControlNetModel

    sd1 = save("sd1", tmp_path / "sd1", vae_blocks=4)
    ControlNetModel.from_unet(load_model(sd1).unet, conditioning_channels=3).save_pretrained(tmp_path / "net")
    return TextToImage.load(sd1, "cpu", "fp32", control=tmp_path / "net")


def test_a_compiled_network_does_not_travel(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="leave out offload or compile"):
        loading.offload(TextToImage.load(tiny_model, compile=True, weights=False).model, None, torch.device("cuda"))
    loading.offload(TextToImage.load(tiny_model, weights=False).model, None, torch.device("cuda"))


def test_one_network_at_a_time_is_on_the_device(tiny: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is the CPU, so that only the comings and goings can be seen: pictures are the same."""
    plain, model = tiny(PROMPT, seed=1)[0], tiny.model
    there, trips = set[str](), list[tuple[str, str]]()
    names = {id(network): name for name, network in model.networks.items()}
    move = torch.nn.Module.to

    def moved(network: Any, *given: Any, **named: Any) -> Any:
        if id(network) in names and given and not isinstance(given[0], torch.dtype):
            place = "cpu" if given[0] == "cpu" else "device"
            trips.append((names[id(network)], place))
            (there.add if place == "device" else there.discard)(names[id(network)])
            assert len(there) <= 1
            assert not torch.is_inference_mode_enabled(), "its weights could not be trained any more"
        return move(network, *given, **named)

    for network in model.networks.values():
        monkeypatch.setattr(type(network), "to", moved)
    model.offload = Offload(model.networks.values(), torch.device("cpu"))
    assert tiny(PROMPT, seed=1)[0].tobytes() == plain.tobytes()
    assert [name for name, place in trips if place == "device"] == ["text_encoder", "unet", "vae"]
    start = Image.new("RGB", (16, 16), "red")
    trips.clear()
    tiny(PROMPT, seed=1, init_image=start, strength=0.5)
    assert "vae" in [name for name, place in trips if place == "device"]
    trips.clear()
    there.clear()
    monkeypatch.undo()
    model.offload.end()
    model.offload = None
    assert tiny(PROMPT, seed=1)[0].tobytes() == plain.tobytes()
    assert not model.unet._forward_pre_hooks


@pytest.mark.parametrize("side", [1024, pytest.param(2048, marks=pytest.mark.slow)])
def test_a_large_picture_of_the_shipped_model_within_its_bound(side: int, tmp_path: Path) -> None:
    """docs/scripting.md: the whole process stays under 1.5 GiB at 2048x2048 in tiles of 512."""
    script = (
        "import sys; from diffusion.cli.generate import run; code = run(sys.argv[1:]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    words = ["panda", "-s", "1", "--steps", "1", "--size", f"{side}x{side}", "--vae-tiling", "512", "-o", "a.png"]
    command = [sys.executable, "-c", script, *words, "--quiet", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment())
    assert Image.open(tmp_path / "a.png").size == (side, side)
    assert int(done.stdout.splitlines()[-1]) / 2**20 < 1.5


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_wait_in_the_memory_of_the_machine(tiny_model: Path) -> None:
    plain = TextToImage.load(tiny_model, "cuda", "fp32")(PROMPT, seed=1)[0]
    t2i = TextToImage.load(tiny_model, "cuda", "fp32", offload=True)
    assert psnr(t2i(PROMPT, seed=1)[0], plain) > 60
    where = {next(network.parameters()).device.type for network in (t2i.model.unet, t2i.model.text_encoder)}
    assert where == {"cpu"}, "the autoencoder was the last one"
