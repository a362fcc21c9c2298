"""Staying alive: numbers that are not finite are repaired, what is said of it, what is left as it was."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import Command, made
from diffusion import TextToImage, drawing, repair
from diffusion.models.networks import AutoencoderNotFinite, first_weight
from diffusion.notices import Repaired
from families import psnr

PROMPT = "red apple"


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
    vae.float()
    assert tiny(PROMPT, seed=1)[0].tobytes() == mended.tobytes(), "and so it would on the way to float32"


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


@pytest.mark.filterwarnings("ignore::diffusion.notices.Repaired")
@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_picture_that_nothing_helps_takes_no_other_with_it(
    draw: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, part: str, dtype: str
) -> None:
    call = {"seed": 1, "num_images": 4, "batch_size": 3}
    t2i = TextToImage.load(tiny_model, "cpu", dtype)
    plain, drawn = t2i(PROMPT, **call), list[Image.Image]()
    hopeless = _spoil_seed_2(monkeypatch, t2i, part)
    with pytest.raises(FloatingPointError, match=r"not finite.*: no picture of seed 2$"):
        drawn.extend(image for step in t2i.stream(PROMPT, **call) for image in step.images or ())
    assert hopeless, "it was tried"
    assert [image.tobytes() for image in drawn] == [plain[n].tobytes() for n in (0, 2, 3)]
    assert [repairs_of(image) for image in drawn] == [[], [], []]
    told = draw(PROMPT, "-s", "1", "--num-images", "4", "--batch-size", "3", "--dtype", dtype)
    assert told.code == 1
    assert [made(path)["seed"] for path in told.paths] == [1, 3, 4]
    assert told.err.splitlines()[-1].endswith("no picture of seed 2")


def test_a_black_picture_takes_no_other_with_it(draw: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decode = list[Any](), repair.decode

    def second(vae: Any, latents: torch.Tensor) -> list[Image.Image]:
        seen.append(latents)
        return [Image.new("RGB", (16, 16))] if len(seen) == 2 else decode(vae, latents)

    monkeypatch.setattr(repair, "decode", second)
    told = draw(PROMPT, "-s", "1", "--num-images", "3", "--steps", "1")
    assert told.code == 1
    assert [made(path)["seed"] for path in told.paths] == [1, 3]
    assert told.err.splitlines()[-1].endswith("the picture of seed 2 came out black and was not saved")


def _spoil_seed_2(monkeypatch: pytest.MonkeyPatch, t2i: TextToImage, part: str) -> list[int]:
    """Whatever the precision, seed 2 comes out as NaN of the U-Net, or of the decoder."""
    (start,), tried = t2i.first_noise([2], 16, 16), list[int]()
    (final,) = [step.latents[0] for step in t2i.stream(PROMPT, seed=2)][-1:]
    if part == "unet":
        whole = drawing.network_denoiser

        def faulty(*given: Any) -> Any:
            denoise = whole(*given)

            def spoilt(x: torch.Tensor, level: Any) -> torch.Tensor:
                seen = rows_of(start)(x)
                tried.extend(seen.nonzero().flatten().tolist())
                return denoise(x, level).masked_fill(seen.view(-1, 1, 1, 1), math.nan)

            return spoilt

        monkeypatch.setattr(drawing, "network_denoiser", faulty)
        return tried
    decode = repair.decode

    def refuse(vae: Any, latents: torch.Tensor) -> Any:
        if (latents - final).abs().max() < 0.1:
            tried.append(1)
            raise AutoencoderNotFinite("the autoencoder put out numbers that are not finite")
        return decode(vae, latents)

    monkeypatch.setattr(repair, "decode", refuse)
    return tried


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
