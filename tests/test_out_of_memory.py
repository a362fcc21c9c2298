"""Memory that is short while drawing: fewer pictures at once, the decoder in tiles, and what is said of it."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import Command
from diffusion import TextToImage, loading, memory, repair
from diffusion.notices import Repaired
from diffusion.repair import Batch, Repairs
from diffusion.settings import Shot
from test_alive import PROMPT, SAID, failing, fails, repairs_of, weights_of
from test_alive import half as half  # a fixture
from test_alive import tiny as tiny  # a fixture


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A request whose picture is larger than tiles, which are small here."""
    monkeypatch.setattr(repair, "TILES", (64, 32))
    return {"seed": 1, "steps": 1, "width": 80, "height": 64}


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", SHORT, ids=["cuda", "cpu", "python", "onednn"])
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
    assert [image.tobytes() for image in images] == [image.tobytes() for image in whole]
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
        pytest.raises(MemoryError, match=r"ask for a smaller picture \(what was tried: .*drawn one by one\)"),
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


def test_the_last_rung_brings_networks_home_when_the_call_ends(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an ``Offload`` does is tested by itself: here only that it comes once, and goes."""
    comings = []

    class Waiting:
        end = staticmethod(lambda: comings.append("home"))

    def offload(model: Any, control: Any, device: torch.device) -> None:
        comings.append(device.type)
        model.offload = Waiting()

    monkeypatch.setattr(loading, "offload", offload)
    monkeypatch.setattr(type(tiny.model), "device", torch.device("cuda"))
    batch = Batch(shots=[Shot(PROMPT, 1)])
    with Repairs(model=tiny.model) as repairs:
        with pytest.warns(Repaired, match="only the network that is at work"):
            assert repairs.again(batch, SHORT[0]) == [batch]
        assert comings == ["cuda"]
        with pytest.raises(MemoryError, match="only the network that is at work is on the device"):
            repairs.again(batch, SHORT[0])
    assert comings == ["cuda", "home"]
    assert tiny.model.offload is None
    tiny.model.compiled = tiny.model.unet
    with Repairs(model=tiny.model) as repairs, pytest.raises(MemoryError):
        repairs.again(batch, SHORT[0])
    assert comings == ["cuda", "home"], "a compiled network does not travel"
