"""Every control of a picture, through Python and the command line: against the stock library or what it says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusion import TextToImage, drawing, jobs, prompts, samplers
from diffusion.canvas import Canvas, make_canvas, soften
from diffusion.images import read_metadata
from diffusion.models import previews
from diffusion.models.folder import load_model
from diffusion.models.networks import decode, to_latents, to_pixels
from diffusion.parameters import parse_parameters
from diffusion.repair import Batch, Repairs
from diffusion.schedules import levels
from diffusion.settings import Settings
from families import KINDS, parity, psnr, save, stock
from test_generate_cli import Command, draw, made  # noqa: F401 - a fixture

PROMPT = "red apple"


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return TextToImage.load(tiny_model, "cpu", "fp32")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return save("sd1", tmp_path_factory.mktemp("controls") / "sd1")


@pytest.fixture
def photo(tmp_path):
    """A picture of odd sides, and a mask that opens its right half."""
    noise = np.random.default_rng(0).integers(0, 256, (19, 21, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    mask = Image.new("L", (21, 19), 0)
    ImageDraw.Draw(mask).rectangle((10, 0, 20, 18), fill=255)
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def latents(model, **given):
    return list(model.stream(PROMPT, **{"seed": 1, "steps": 3} | given))[-1].latents


# --- from a picture


def test_a_picture_is_drawn_over_as_the_stock_library_does(sd1, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs = StableDiffusionImg2ImgPipeline(**stock(sd1).components)
    theirs.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mean, _ = to_latents(load_model(sd1).vae, to_pixels([image]))
    picture = theirs(
        PROMPT,
        image=mean,
        strength=0.75,
        num_inference_steps=8,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    given = {"seed": 3, "steps": 6, "guidance_scale": 5.0, "init_image": image, "strength": 0.75}
    assert psnr(TextToImage.load(sd1, "cpu", "fp32")(PROMPT, **given)[0], picture) >= 60


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_as_many_steps_are_done_as_were_asked_for(draw, photo, strength):  # noqa: F811
    said = draw(PROMPT, "-i", str(photo[0]), "--strength", str(strength), "--steps", "5", "--json")
    assert [event["event"] for event in said.events].count("step") == 5
    path = said.events[-1]["path"]
    assert (made(path)["strength"], made(path)["steps"]) == (strength, 5)
    assert Image.open(path).size == (21, 19), "the picture keeps its size, though the model draws in twos"
    assert parse_parameters(read_metadata(path)["parameters"])["Denoising strength"] == str(strength)
    assert set(made(path)["init_image"]) == {"name", "sha256"}


def test_less_strength_stays_nearer_to_the_picture(tiny):
    image = Image.new("RGB", (16, 16), "orange")
    known = to_latents(tiny.model.vae, to_pixels([image]))[0]
    far = [(latents(tiny, init_image=image, strength=strength) - known).norm() for strength in (0.004, 0.5)]
    assert far[0] < 0.5 * far[1]


def test_a_size_fits_the_picture_without_stretching_it(tiny):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (10, 0, 30, 20))
    assert tiny(PROMPT, init_image=image, seed=1, steps=1, width=20)[0].size == (20, 10)
    cut = make_canvas(Settings(prompts=("",), init_image=image, width=20, height=20, seed=0), 2)
    assert cut.pixels[:, 4:16].max() <= 3, "the middle of it, cut and not squeezed"


def test_what_the_mask_keeps_stays_to_the_last_bit(draw, photo):  # noqa: F811
    image, mask = photo
    said = draw(PROMPT, "-i", str(image), "--mask", str(mask), "--mask-blur", "3", "-s", "2", "-o", "out.png")
    assert said.code == 0, said.err
    before, after = np.asarray(Image.open(image)), np.asarray(Image.open(said.paths[0]))
    assert np.array_equal(before[:, :10], after[:, :10])
    changed = (before != after).any(axis=2)
    assert changed[:, 13:].mean() > 0.9, "and the rest is drawn anew"
    assert made(said.paths[0])["strength"] == 1.0, "wholly"


def test_a_soft_edge_fades_inwards_only():
    mask = Image.new("L", (32, 1), 0)
    mask.paste(255, (16, 0, 32, 1))
    soft = np.asarray(soften(mask, 8))[0]
    assert not soft[:16].any()
    assert (np.diff(soft[16:].astype(int)) >= 0).all()
    assert 0 < soft[16] < 64
    assert soft[-1] == 255
    assert np.array_equal(np.asarray(soften(mask, 0)), np.asarray(mask))


@pytest.mark.parametrize("grey", [64, 128, 255])
def test_grey_keeps_its_meaning_under_a_soft_edge(grey):
    mask = Image.new("L", (40, 40), 0)
    mask.paste(grey, (10, 0, 40, 40))
    soft = np.asarray(soften(mask, 4))[20]
    assert not soft[:10].any()
    assert (soft[15:] == grey).all(), "inside it is what it was"
    assert 0 < soft[10] < grey / 2
    assert np.array_equal(np.asarray(soften(Image.new("L", (8, 8), grey), 4)), np.full((8, 8), grey)), (
        "no edge, no fade"
    )


@pytest.mark.parametrize("side", [1, 2, 24])
def test_a_small_opening_opens(side):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (20, 20, 20 + side, 20 + side))
    mask.paste(255, (50, 0, 64, 64))  # a large one beside it does not close it
    soft = np.asarray(soften(mask, 32))
    assert soft[20 : 20 + side, 20 : 20 + side].max() >= 250
    assert not soft[np.asarray(mask) == 0].any()


def test_any_bright_colour_opens_and_a_mask_may_be_of_another_size(tmp_path):
    image = Image.new("RGB", (16, 8), "navy")
    for colour in ("red", "blue", "white", (0, 255, 0)):
        mask = Image.new("RGB", (32, 16), "black")
        mask.paste(colour, (16, 0, 32, 16))
        given = {"init_image": image, "mask": mask, "mask_blur": 0, "width": 16, "height": 8, "seed": 0}
        found = make_canvas(Settings(prompts=("",), **given), 2).mask
        assert (found[:, 9:] == 255).all()
        assert not found[:, :7].any()


def test_how_softly_a_mask_ends_is_what_was_asked_for(tiny, draw, photo):  # noqa: F811
    image, mask = photo
    few = ("-i", str(image), "--mask", str(mask), "-s", "2", "--steps", "1")
    pictures = {blur: np.asarray(Image.open(draw(PROMPT, *few, "--mask-blur", blur).paths[0])) for blur in ("0", "8")}
    assert (pictures["0"] != pictures["8"])[:, 10:].any()
    own = made(draw(PROMPT, *few).paths[0])
    assert own["mask_blur"] == 4, "what was not said is recorded"
    (ours,) = tiny(PROMPT, init_image=image, mask=mask, seed=2, steps=1, mask_blur=8)
    assert np.array_equal(np.asarray(ours), pictures["8"])


def test_a_cell_is_as_open_as_its_most_open_pixel():
    mask = np.zeros((4, 4), np.uint8)
    mask[0, 1], mask[3, 3] = 255, 51
    cells = Canvas(np.zeros((4, 4, 3), np.uint8), mask, (4, 4)).cells(2)
    assert np.allclose(cells, [[1, 0], [0, 0.2]])


def test_what_is_beyond_a_picture_begins_as_its_edge(tiny, photo):
    given = {"init_image": photo[0], "extend": (4, 0, 0, 3), "mask_blur": 0}
    board = make_canvas(Settings(prompts=("",), **given, width=25, height=22, seed=0), 2)
    inside = np.asarray(Image.open(photo[0]))
    assert np.array_equal(board.pixels[:22, :25], np.pad(inside, ((0, 3), (4, 0), (0, 0)), mode="edge"))
    assert (board.mask[:19, :4] == 255).all()
    assert not board.mask[:19, 4:25].any()
    (ours,) = tiny(PROMPT, init_image=photo[0], extend=(4, 0, 0, 3), seed=1, steps=1)
    assert np.array_equal(np.asarray(ours)[:19, 4:], inside)


def test_the_part_that_is_kept_leads_the_part_that_is_drawn(tiny, monkeypatch):
    """The network sees what is known at every level, and not its own idea of it."""
    image = Image.new("RGB", (16, 16), "navy")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    known = to_latents(tiny.model.vae, to_pixels([image]))[0]
    noise = tiny.first_noise([1], 16, 16)
    grid = levels(tiny.model.schedule, 3)
    for step, level in zip(tiny.stream(PROMPT, init_image=image, mask=mask, seed=1, steps=3), grid[1:], strict=True):
        wanted = level.alpha * known + level.sigma * noise
        assert torch.allclose(step.latents[..., :4], wanted[..., :4], atol=1e-4)
        assert not torch.allclose(step.latents[..., 4:], wanted[..., 4:], atol=1e-2)


def test_a_picture_is_extended_around_itself(draw, photo):  # noqa: F811
    said = draw(PROMPT, "-i", str(photo[0]), "--extend", "left=6,bottom=5", "-s", "2", "-o", "out.png")
    assert said.code == 0, said.err
    before, after = np.asarray(Image.open(photo[0])), np.asarray(Image.open(said.paths[0]))
    assert after.shape == (24, 27, 3)
    assert np.array_equal(before, after[:19, 6:])
    assert after[19:].std() > 0


def test_hires_draws_twice_and_ends_larger(draw):  # noqa: F811
    said = draw(PROMPT, "--hires", "1.5", "--hires-strength", "0.4", "--steps", "3", "-s", "1", "--json")
    assert [event["index"] for event in said.events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    path = said.events[-1]["path"]
    assert Image.open(path).size == (24, 24)
    small = Image.open(draw(PROMPT, "--steps", "3", "-s", "1").paths[0]).resize((24, 24), Image.Resampling.LANCZOS)
    other = Image.open(draw(PROMPT, "--size", "24x24", "--steps", "3", "-s", "1").paths[0])
    assert psnr(Image.open(path), small) > psnr(other, small), "it is the small picture, drawn over"
    shown = parse_parameters(read_metadata(path)["parameters"])
    assert (shown["Hires upscale"], shown["Denoising strength"], shown["Size"]) == ("1.5", "0.4", "16x16")


def test_hires_of_an_odd_picture_is_so_many_times_as_large(tiny, draw, photo):  # noqa: F811
    smooth = Image.open(photo[0]).resize((101, 77), Image.Resampling.BICUBIC)
    (ours,) = tiny(PROMPT, init_image=smooth, strength=0.004, hires=2, hires_strength=0.004, seed=1, steps=1)
    assert ours.size == (202, 154)
    said = draw(PROMPT, "-i", str(photo[0]), "--hires", "1.5", "--steps", "2", "-s", "1", "--film", "f.png")
    assert said.code == 0, said.err
    assert Image.open(said.paths[0]).size == (32, 28)
    assert Image.open("f.png").size == (5 * 32, 28), "and all of the film is"
    draw(PROMPT, "-i", str(photo[0]), "--steps", "2", "-s", "1", "--film", "f.gif", "--preview", "now.png")
    with Image.open("f.gif") as film:
        assert (film.size, Image.open("now.png").size) == ((21, 19), (21, 19))


def test_hires_begins_where_the_picture_is(tiny):
    """What is drawn again lies where it lay: the enlarged picture is cut from its padded canvas, and not squeezed."""
    image = Image.new("RGB", (21, 19), "white")
    image.paste("black", (10, 0, 21, 19))
    drawing_ = tiny.plan(Settings(prompts=("",), init_image=image, hires=2, seed=1, steps=1))
    latent = to_latents(tiny.model.vae, to_pixels([Image.fromarray(drawing_.board.pixels)]))[0]
    small = decode(tiny.model.vae, latent)[0].crop((0, 0, 21, 19))
    batch = Batch(shots=drawing_.full.shots())
    (board,) = drawing_._boards(batch, drawing_.descents[1], latent, Repairs(model=tiny.model))
    assert board.size == (42, 38)
    large = np.asarray(small.resize((42, 38), Image.Resampling.LANCZOS))
    assert np.array_equal(board.pixels[:38, :42], large)


def test_how_much_is_drawn_again_and_by_which_noise(tiny, monkeypatch):
    given = {"hires": 2, "sampler": "euler_ancestral", "steps": 2}
    drawn = [latents(tiny, **given, hires_strength=share) for share in (0.2, 0.9)]
    assert not torch.equal(*drawn)
    assert torch.equal(latents(tiny, **given), latents(tiny, **given, hires_strength=0.5))
    plain, purposes = drawing.rng.normal, []

    def normal(seed, purpose, *ids, shape):
        purposes.append((purpose, shape[-1]))
        return plain(seed, purpose, *ids, shape=shape)

    monkeypatch.setattr(drawing.rng, "normal", normal)
    latents(tiny, **given)
    assert purposes == [("sampler", 8)] * 2 + [("sampler.hires", 16)] * 2


def test_sdxl_is_told_the_size_of_what_it_draws(tmp_path, monkeypatch):
    xl = TextToImage.load(save("sdxl", tmp_path / "sdxl"), "cpu", "fp32")
    told, plain = [], xl.model.unet.forward

    def forward(*args, added_cond_kwargs, **given):
        told.append(added_cond_kwargs["time_ids"][0].tolist())
        return plain(*args, added_cond_kwargs=added_cond_kwargs, **given)

    monkeypatch.setattr(xl.model.unet, "forward", forward)
    xl(PROMPT, seed=1, steps=1, width=32, height=24, hires=2)
    assert [told[0], told[-1]] == [[24, 32, 0, 0, 24, 32], [48, 64, 0, 0, 48, 64]]


def test_layers_of_the_text_encoder_are_skipped(tiny):
    assert not torch.equal(latents(tiny), latents(tiny, clip_skip=2))


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


def test_variations_lie_on_the_way_to_another_seed(tiny, draw):  # noqa: F811
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


def test_frames_go_from_one_prompt_and_seed_to_another(tiny, draw):  # noqa: F811
    words = (PROMPT, "-s", "1", "--to-prompt", "blue boat", "--to-seed", "5", "--steps", "2")
    said = draw(*words, "--frames", "3", "-o", "f/")
    assert said.code == 0, said.err
    assert [made(path)["share"] for path in said.paths] == [0, 0.5, 1]
    ends = [tiny(PROMPT, seed=1, steps=2)[0], tiny("blue boat", seed=5, steps=2)[0]]
    assert [Image.open(path).tobytes() for path in (said.paths[0], said.paths[2])] == [one.tobytes() for one in ends]
    alone = draw(*words, "--share", "0.5")
    assert Image.open(alone.paths[0]).tobytes() == Image.open(said.paths[1]).tobytes()
    here = tiny(PROMPT, seed=1, to_prompt="blue boat", to_seed=5, steps=2, frames=3)
    assert [image.tobytes() for image in here] == [Image.open(path).tobytes() for path in said.paths]
    (half,) = tiny(PROMPT, seed=1, to_prompt="blue boat", to_seed=5, steps=2, share=0.5)
    assert half.tobytes() == here[1].tobytes()
    film = draw(*words, "--frames", "3", "-o", "way.gif")
    assert film.out == "way.gif\n"
    with Image.open("way.gif") as opened:
        assert opened.n_frames == 3


# --- how


def test_sigmas_are_the_levels_that_are_visited(tiny, draw):  # noqa: F811
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


def test_guidance_may_be_kept_to_an_interval(tiny, draw):  # noqa: F811
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
def test_every_flag_is_recorded(draw, words, expected):  # noqa: F811
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


def test_long_prompts_are_read_in_chunks_where_that_is_asked_for(tiny, draw):  # noqa: F811
    long = "red apple, " * 12
    assert draw(long).code == 2
    assert draw(long, "--long-prompts").code == 0
    ends = [list(tiny.stream(long + end, seed=1, long_prompts=True))[-1].latents for end in ("cat", "boat")]
    assert not torch.equal(*ends), "the last word counts too"
    mixed = tiny([PROMPT, long], seed=1, long_prompts=True, steps=2)
    assert mixed[0].tobytes() == tiny(PROMPT, seed=1, steps=2)[0].tobytes(), "beside a longer prompt nothing changes"


# --- ControlNet


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A stock ControlNet whose branches say something, beside its tiny model, whose latents are an eighth in size."""
    from diffusers import ControlNetModel

    sd1 = save("sd1", tmp_path_factory.mktemp("control") / "sd1", vae_blocks=4)
    torch.manual_seed(0)
    made = ControlNetModel.from_unet(load_model(sd1).unet, conditioning_channels=3)
    for layer in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.5)
    for layer in made.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        made.controlnet_cond_embedding.conv_out.weight *= 4
    made.save_pretrained(sd1.parent / "net")
    return sd1.parent / "net"


def test_a_controlnet_leads_as_in_the_stock_library(net):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    sd1 = net.parent / "sd1"
    edges = Image.fromarray(np.random.default_rng(2).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    theirs = StableDiffusionControlNetPipeline(
        **stock(sd1).components, controlnet=ControlNetModel.from_pretrained(net, local_files_only=True)
    )
    theirs.set_progress_bar_config(disable=True)
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


def test_a_controlnet_leads_from_the_command_line(draw, net, tmp_path):  # noqa: F811
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


def test_what_does_not_go_together_is_one_line(draw, photo):  # noqa: F811
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
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
    ]:
        said = draw("a", *words)
        assert (said.code, said.out) == (2, ""), (words, said.err)
        assert said.err.count("\n") == 1, (words, said.err)
        assert message in said.err, (words, said.err)


# --- what it looks like on the way, and side by side


def test_a_film_a_sheet_and_a_preview_are_written(draw):  # noqa: F811
    said = draw(PROMPT, "-s", "1", "--steps", "4", "--film", "film.gif", "--preview", "now.png", "-o", "x.png")
    assert said.code == 0, said.err
    assert [str(path) for path in said.paths] == ["x.png", "film.gif"]
    with Image.open("film.gif") as film:
        assert film.n_frames == 5
        assert film.size == (16, 16)
    assert Image.open("now.png").size == (16, 16)
    draw(PROMPT, "-s", "1", "--steps", "4", "--film", "film.png", "-o", "y.png")
    strip = Image.open("film.png")
    assert strip.size == (5 * 16, 16)
    assert strip.crop((64, 0, 80, 16)).tobytes() == Image.open("y.png").tobytes()
    draw(PROMPT, "blue boat", "-s", "1", "--num-images", "2", "--steps", "1", "--grid", "grid.png", "-o", "some/")
    assert Image.open("grid.png").size == (32, 32)
    grid = np.asarray(Image.open("grid.png"))
    files = sorted(Path("some").iterdir())
    assert len(files) == 4
    assert all(holds(grid, np.asarray(Image.open(path))) for path in files), "each of them is on it"


def test_a_preview_is_of_the_estimate(tiny):
    first = next(tiny.stream(PROMPT, seed=1, steps=4))
    shown = first.preview()[0].tobytes()
    look = Repairs(model=tiny.model).preview
    assert shown == look(first.denoised, exact=False)[0].tobytes()
    assert shown != look(first.latents, exact=False)[0].tobytes()


def test_a_preview_has_the_colours_of_the_picture():
    """On the shipped model: a linear function of its latents, against its decoder."""
    model = TextToImage.load("emoji", "cpu")
    assert model.model.recipe.latent_rgb is not None, "the recipe carries it"
    last = list(model.stream("red apple", seed=1, steps=4))[-1]
    cheap, exact = (np.asarray(last.preview(exact=exact)[0].resize((16, 16), Image.Resampling.BOX)) for exact in (0, 1))
    assert np.corrcoef(cheap.ravel(), exact.ravel())[0, 1] > 0.95
    assert np.abs(cheap.astype(int) - exact).mean() < 20


def test_a_model_without_a_fit_gets_one(tiny):
    matrix = np.array(previews.fit(tiny.model.vae))
    assert matrix.shape == (5, 3)
    assert np.array_equal(matrix, previews.fit(tiny.model.vae)), "the same each time"


def test_comparing_draws_each_with_the_same_noise(draw, tiny):  # noqa: F811
    said = draw(PROMPT, "-s", "1", "--compare", "steps=1,2", "cfg=1,5", "-o", "sheet.png")
    assert said.code == 0, said.err
    assert said.out == "sheet.png\n"
    sheet = np.asarray(Image.open("sheet.png"))
    for steps, guidance in ((1, 1.0), (2, 1.0), (1, 5.0), (2, 5.0)):
        (cell,) = tiny(PROMPT, seed=1, steps=steps, guidance_scale=guidance)
        assert holds(sheet, np.asarray(cell)), (steps, guidance)
    record = json.loads(Image.open("sheet.png").info["diffusion"])
    assert record["seed"] == 1
    assert record["compare"] == {"steps": [1, 2], "cfg": [1, 5]}
    assert not {"steps", "guidance_scale"} & record.keys(), "what differs is not told as if it were the same"
    other = tiny.compare(PROMPT, {"steps": [1, 2], "cfg": [1.0, 5.0]}, seed=1)
    assert np.array_equal(np.asarray(other), sheet)
    assert json.loads(other.info["diffusion"])["compare"] == {"steps": [1, 2], "cfg": [1, 5]}
    after = draw("--compare", "sampler=ddim,DPM++ 2M", "--", "blue boat")
    assert after.code == 0, after.err


def holds(sheet, cell):
    """Whether a sheet shows a picture somewhere, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, cell.shape)[:, :, 0]
    return bool((windows == cell).all(axis=(2, 3, 4)).any())


# --- lists of prompts, and LoRAs in prompts


def test_lists_of_prompts_draw_their_choices(draw, tmp_path):  # noqa: F811
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
    rows = jobs.choose(jobs.read_jobs("list.txt"), 5, prompts.read_wildcards(Path("words")))
    assert rows[0].fields["prompt"] == first
    (tmp_path / "words").rename(tmp_path / "wildcards")
    again = draw("--prompts", "list.txt", "-s", "5", "--steps", "1")
    assert made(again.paths[0])["prompt"] == first


@pytest.fixture
def red(tiny_model, tmp_path):
    """A LoRA that changes the tiny model a lot."""
    from diffusion.models import lora

    model = load_model(tiny_model)
    torch.manual_seed(0)
    lora.add(model.unet, lora.TARGETS["attention"], 2, 2.0)
    for name, weight in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    lora.save({"unet": model.unet}, tmp_path / "loras" / "red", kohya=False)
    (tmp_path / "loras/red/pytorch_lora_weights.safetensors").rename(tmp_path / "loras/red.safetensors")
    (tmp_path / "loras/red").rmdir()
    return tmp_path / "loras/red.safetensors"


def test_a_prompt_may_put_a_lora_on_the_model(draw, red, tiny):  # noqa: F811
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


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("family", KINDS)
def test_the_pictures_of_the_families_are_the_stock_librarys(tmp_path, family, sampler):
    """(`python tests/families.py` prints the figures.)"""
    assert parity(save(family, tmp_path / family), sampler, steps=8) >= 60


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
