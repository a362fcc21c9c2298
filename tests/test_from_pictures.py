"""Pictures that begin from pictures: drawn over, under a mask, beyond the edges, and larger."""

import numpy as np
import pytest
import torch
from PIL import Image

from commands import made
from diffusion import TextToImage, drawing
from diffusion.canvas import Canvas, make_canvas, soften
from diffusion.images import read_metadata
from diffusion.models.folder import load_model
from diffusion.models.networks import decode, to_latents, to_pixels
from diffusion.parameters import parse_parameters
from diffusion.repair import Batch, Repairs
from diffusion.schedules import levels
from diffusion.settings import Settings
from families import over, psnr, save
from test_controls import latents

PROMPT = "red apple"


# --- drawn over


def test_a_picture_is_drawn_over_as_the_stock_library_does(sd1, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs = over(sd1, StableDiffusionImg2ImgPipeline)
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
def test_as_many_steps_are_done_as_were_asked_for(draw, photo, strength):
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


def test_a_picture_is_no_prompt(draw, photo):
    told = "photo.png is a picture and no prompt: give --init-image photo.png to begin from it, or --from-image photo"
    again = "mask.png is a picture and no prompt: give --from-image mask.png to draw it again and compare it"
    for words, message in [
        (["photo.png"], told),
        ([PROMPT, "photo.png", "--dry-run"], told),
        (["--verify", "mask.png"], again),
        (["--from-image", "photo.png", "--verify", "mask.png"], again),
    ]:
        said = draw(*words)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert message in said.err
    assert draw("gone.png", "--steps", "1").code == 0, "no picture is there"
    assert draw("-p", "photo.png", "--steps", "1").code == 0, "who says so means it"


# --- a mask, and beyond the edges


def test_what_the_mask_keeps_stays_to_the_last_bit(draw, photo):
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


def test_how_softly_a_mask_ends_is_what_was_asked_for(tiny, draw, photo):
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


def test_a_picture_is_extended_around_itself(draw, photo):
    said = draw(PROMPT, "-i", str(photo[0]), "--extend", "left=6,bottom=5", "-s", "2", "-o", "out.png")
    assert said.code == 0, said.err
    before, after = np.asarray(Image.open(photo[0])), np.asarray(Image.open(said.paths[0]))
    assert after.shape == (24, 27, 3)
    assert np.array_equal(before, after[:19, 6:])
    assert after[19:].std() > 0


# --- larger


def test_hires_draws_twice_and_ends_larger(draw):
    said = draw(PROMPT, "--hires", "1.5", "--hires-strength", "0.4", "--steps", "3", "-s", "1", "--json")
    assert [event["index"] for event in said.events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    path = said.events[-1]["path"]
    assert Image.open(path).size == (24, 24)
    small = Image.open(draw(PROMPT, "--steps", "3", "-s", "1").paths[0]).resize((24, 24), Image.Resampling.LANCZOS)
    other = Image.open(draw(PROMPT, "--size", "24x24", "--steps", "3", "-s", "1").paths[0])
    assert psnr(Image.open(path), small) > psnr(other, small), "it is the small picture, drawn over"
    shown = parse_parameters(read_metadata(path)["parameters"])
    assert (shown["Hires upscale"], shown["Denoising strength"], shown["Size"]) == ("1.5", "0.4", "16x16")


def test_hires_of_an_odd_picture_is_so_many_times_as_large(tiny, draw, photo):
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
