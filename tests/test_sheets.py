"""What is shown of a drawing: frames, films, previews, sheets and comparisons."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from commands import made
from diffusion import TextToImage
from diffusion.models import previews
from diffusion.repair import Repairs

PROMPT = "red apple"


def test_frames_go_from_one_prompt_and_seed_to_another(tiny, draw):
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


def test_a_film_a_sheet_and_a_preview_are_written(draw):
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


def test_comparing_draws_each_with_the_same_noise(draw, tiny):
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
