"""How few steps a model needs: measured against what it draws with many, on captions that it was trained on.

Held-out captions stay out of it, so that the figures of ``evaluate`` remain figures of something unseen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data.source import read_folder
from diffusion.evaluation import one_of_each_base, rank, thumbnail
from diffusion.pipeline import TextToImage

REFERENCE = {"sampler": "ddim", "schedule": "trailing", "steps": 50}
SLACK = 1.02  # times the reference's error that is still as good
MISSES = 0.01  # share of captions


@dataclass(frozen=True)
class Trial:
    """One way to draw, and how near it comes to the pictures that were asked for."""

    settings: dict[str, Any]
    error: float  # mean squared error on 32x32 RGB
    hits: float  # share of captions whose picture is the nearest of all
    evaluations: float  # of the U-Net, for a picture

    def as_good_as(self, reference: "Trial") -> bool:
        """Whether it may take the reference's place."""
        return self.error <= SLACK * reference.error and self.hits >= reference.hits - MISSES


def candidates() -> Iterator[dict[str, Any]]:
    """From the cheapest on."""
    for steps in (3, 4, 5, 6, 8, 10, 12, 16):
        for sampler in ("ddim", "dpmpp_2m", "unipc"):
            yield {"sampler": sampler, "schedule": "trailing", "steps": steps}


def tune(
    model: TextToImage,
    data: Path,
    count: int = 100,
    seed: int = 1,
    on_trial: Callable[[Trial], object] = lambda _: None,
) -> Trial:
    """The cheapest settings that draw as well as many steps do; they become the recipe's, in memory.

    ``count`` captions, each of another base, one seed each. ValueError for a folder without captions.
    """
    pictures = read_folder(data, "train", group="base")
    side = model.model.recipe.width
    thumbnails = np.stack([thumbnail(Image.fromarray(picture.pixels(side))) for picture in pictures])
    questions = one_of_each_base(pictures, count, seed)

    def measure(settings: dict[str, Any]) -> Trial:
        drawn = [
            thumbnail(model(question.prompt, seed=seed + n, literal=True, **settings)[0])
            for n, question in enumerate(questions)
        ]
        errors = [float(np.square(one - thumbnails[q.answer]).mean()) for one, q in zip(drawn, questions, strict=True)]
        hits = [rank(one, thumbnails, q.answer) == 0 for one, q in zip(drawn, questions, strict=True)]
        guided = 1 if model.model.recipe.guidance_scale == 1 else 2
        trial = Trial(settings, float(np.mean(errors)), float(np.mean(hits)), guided * settings["steps"])
        on_trial(trial)
        return trial

    reference = measure(REFERENCE)
    best = first_as_good(reference, map(measure, candidates()))
    model.model.recipe = replace(model.model.recipe, **best.settings)
    return best


def first_as_good(reference: Trial, trials: Iterator[Trial]) -> Trial:
    """The best of the cheapest ones that are as good as the reference, or the reference where none is."""
    found: list[Trial] = []
    for trial in trials:
        if found and trial.evaluations > found[0].evaluations:
            break
        found += [trial] if trial.as_good_as(reference) else []
    return min(found, key=lambda trial: trial.error, default=reference)


def table(trials: Sequence[Trial]) -> str:
    """A line a trial."""
    return "\n".join(
        f"{t.settings['sampler']:<10} {t.settings['steps']:>3} steps  {t.evaluations:>4g} evaluations  "
        f"error {t.error:7.1f}  nearest {t.hits:.2f}"
        for t in trials
    )
