"""What memory a drawing takes and how it takes less: estimates, batches of auto size, tiles, offload, a bound."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import Command, environment
from diffusion import TextToImage, loading, memory
from diffusion.models.folder import load_model
from diffusion.models.networks import tiled
from diffusion.models.offload import Offload
from diffusion.settings import Settings
from families import psnr, save
from test_alive import PROMPT
from test_alive import tiny as tiny  # a fixture

# --- what it will take


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
    command = [sys.executable, "-W", "ignore", "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout)


@pytest.mark.parametrize("side", [512, 1024])
def test_a_dry_run_knows_what_memory_drawing_takes(draw, side):
    from diffusion.memory import drawing_bytes

    wanted = {"width": side, "height": side, "steps": 1}
    outline = TextToImage.load("emoji", "cpu", weights=False)
    plan = outline.plan(Settings(prompts=("red apple",), seed=1, **wanted))
    found = drawing_bytes(outline.model, plan.full)
    weights = [weight.nbytes for network in outline.model.networks.values() for weight in network.parameters()]
    assert found.weights == pytest.approx(sum(weights), rel=1e-4)
    grown = resident(f"TextToImage.load('emoji', 'cpu')('red apple', seed=1, **{wanted})")
    assert 0.7 < found.peak / 2**20 / grown < 1.4, (found, grown)
    half = drawing_bytes(TextToImage.load("emoji", "cpu", "bf16", weights=False).model, plan.full)
    assert half.weights == pytest.approx(found.weights / 2, rel=1e-4)
    said = draw("red apple", "--dry-run", "--size", f"{side}x{side}", model="emoji")
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
    one, two = (memory.taken(evaluation(tiny, n)) for n in (1, 2))
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
    two, longer = (memory.taken(evaluation(tiny, 2, n)) for n in (1, chunks))
    assert two < longer
    for room, pictures in ((two, [1, 1]), (longer, [2])):
        assert batches(tiny, memory.KEPT + room, long, long_prompts=True) == pictures
    assert batches(tiny, memory.KEPT + two, PROMPT) == [2]
    picture = {"control_image": Image.new("RGB", (64, 64))}
    alone = TextToImage.load(led.model.path or "", "cpu", "fp32")
    two, more = memory.taken(evaluation(alone, 2)), memory.taken(evaluation(led, 2, **picture))
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


# --- tiles


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
            "and the device is the CPU: leave it out",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_drawn(draw: Command, flags: list[str], message: str) -> None:
    for more in ([], ["--dry-run"]):
        told = draw(PROMPT, *flags, *more)
        assert (told.code, told.out) == (2, "")
        assert message in told.err


def test_a_large_picture_of_the_shipped_model_within_its_bound(tmp_path: Path) -> None:
    """docs/scripting.md: the whole process stays under 1.5 GiB at 2048x2048 in tiles of 512."""
    script = (
        "import sys; from diffusion.cli.generate import run; code = run(sys.argv[1:]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    words = ["panda", "-s", "1", "--steps", "1", "--size", "2048x2048", "--vae-tiling", "512", "-o", "a.png"]
    command = [sys.executable, "-c", script, *words, "--quiet", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment())
    assert Image.open(tmp_path / "a.png").size == (2048, 2048)
    assert int(done.stdout.splitlines()[-1]) / 2**20 < 1.5


# --- networks that wait


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_wait_in_the_memory_of_the_machine(tiny_model: Path) -> None:
    plain = TextToImage.load(tiny_model, "cuda", "fp32")(PROMPT, seed=1)[0]
    t2i = TextToImage.load(tiny_model, "cuda", "fp32", offload=True)
    assert psnr(t2i(PROMPT, seed=1)[0], plain) > 60
    where = {next(network.parameters()).device.type for network in (t2i.model.unet, t2i.model.text_encoder)}
    assert where == {"cpu"}, "the autoencoder was the last one"
