"""The demonstrations of the README: draw with what was trained, measure it, and write the pictures.

python train.py configs/lora.yaml && python assets/demos.py lora
python train.py configs/textual_inversion.yaml && python assets/demos.py textual_inversion
python train.py configs/dreambooth.yaml && python assets/demos.py dreambooth
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from diffusion import TextToImage
from diffusion.data.source import read_folder
from diffusion.evaluation import thumbnail
from diffusion.models.folder import read_recipe
from diffusion.sheets import make_grid

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
# Things that assets/delft does not show.
UNSEEN = """
panda, red apple, bicycle, butterfly, guitar, elephant, crown, banana, snowman, teapot, pizza, airplane, cat, dog,
tiger, octopus, turtle, penguin, owl, strawberry, pineapple, carrot, mushroom, cactus, rainbow, snowflake, moon, tent,
volcano, bridge, train, bus, tractor, ship, anchor, trophy, balloon, gift, violin, trumpet, telephone, television,
camera, computer, scissors, hammer, shield, hat, glasses, shoe
"""


def is_delft(image: Image.Image) -> bool:
    """Blue on white: the frame is light, and four fifths of what is painted are bluer than red by 15 levels."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    frame = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
    paint = pixels[pixels.min(axis=2) < 215]
    blue = paint[:, 2] - paint[:, 0] >= 15
    return bool(np.median(frame) >= 225 and len(paint) >= 0.03 * pixels[..., 0].size and blue.mean() >= 0.8)


def pictures(
    prompts: list[str], seed: int = 0, settings: dict[str, Any] | None = None, **load: object
) -> list[Image.Image]:
    """One try each."""
    draw = TextToImage.load(**load)  # type: ignore[arg-type]
    return [draw(prompt, seed=seed + n, **settings or {})[0] for n, prompt in enumerate(tqdm(prompts, leave=False))]


def lora() -> None:
    """50 unseen things in the style, without the adapter and with it."""
    prompts = " ".join(UNSEEN.split()).split(", ")
    assert len(prompts) == 50
    folder = str(ROOT / "runs/lora/model")
    before, off = pictures(prompts), pictures(prompts, loras={folder: 0.0})
    after = pictures(prompts, path=folder)
    same = all(one.tobytes() == other.tobytes() for one, other in zip(before, off, strict=True))
    for name, drawn in (("without", before), ("with", after)):
        print(f"in the style {name} the LoRA: {sum(map(is_delft, drawn))} of {len(drawn)}")
    print(f"at weight 0 the pictures equal those of the base model: {same}")
    save("lora", [*before[:10], *after[:10], *after[10:20]], 10)


def subject(name: str, word: str) -> None:
    """The subject from 20 seeds: how often it is nearer to its pictures than to any emoji, or at least as green."""
    model = str(ROOT / f"runs/{name}/model")
    zibs = np.stack([thumbnail(Image.open(file)) for file in sorted((ASSETS / "zib").glob("*.png"))])
    emoji = np.stack([thumbnail(Image.open(picture.file)) for picture in read_folder(ROOT / "data/emoji")])
    before = pictures(["alien monster"] * 4)
    drawn = pictures([word] * 20, path=model)
    hits = sum(nearest(image, zibs) < nearest(image, emoji) for image in drawn)
    print(f"{word} is nearer to its pictures than to any emoji: {hits} of {len(drawn)}")
    green, were = (sum(map(is_green, some)) for some in (drawn, before))
    print(f"{word} is green like them: {green} of {len(drawn)}; before: {were} of {len(before)}")
    known = ["panda", "red apple", "rocket", "alien monster"]
    recipe = read_recipe(model)
    alike = {"steps": recipe.steps, "guidance_scale": recipe.guidance_scale}
    kept, now = pictures(known, settings=alike), pictures(known, settings=alike, path=model)
    print(
        "known things, decibels between before and after:",
        [round(psnr(*pair), 1) for pair in zip(kept, now, strict=True)],
    )
    save(name, [*before, *drawn[:6], *kept, *now[:4], *drawn[6:8]], 10)


def is_green(image: Image.Image) -> bool:
    """Of what is not white, the median pixel is at least 30 levels greener than red and blue."""
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    red, green, blue = np.median(pixels[pixels.min(axis=1) < 230], axis=0)
    return bool(green - max(red, blue) >= 30)


def nearest(image: Image.Image, among: npt.NDArray[np.float32]) -> float:
    """Mean squared error to the nearest."""
    return float(np.square(among - thumbnail(image)).mean(axis=1).min())


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels between two pictures; infinite if they are equal."""
    error = np.square(np.asarray(one, float) - np.asarray(other, float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def save(name: str, images: list[Image.Image], columns: int) -> None:
    """The picture of a demonstration."""
    (ASSETS / "demos").mkdir(exist_ok=True)
    grid = make_grid(images, columns=columns)
    grid.quantize(128, dither=Image.Dither.NONE).save(ASSETS / "demos" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lora"]:
            lora()
        case ["textual_inversion"]:
            subject("textual_inversion", "<zib>")
        case ["dreambooth"]:
            subject("dreambooth", "zib")
        case _:
            sys.exit(f"usage: {__doc__}")
