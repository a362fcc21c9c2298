"""How few steps a model needs: measured against what it draws with many, on captions that it was trained on.

Held-out captions stay out of it, so that the figures of ``evaluate`` remain figures of something unseen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data.source import read_folder
from diffusion.evaluation import one_of_each_base, rank, thumbnail
from diffusion.pipeline import TextToImage
from diffusion.schedules import levels

REFERENCE = {"sampler": "ddim", "schedule": "trailing", "steps": 50, "guidance_interval": None}
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


GUIDANCE: tuple[tuple[float, tuple[float, float] | None], ...] = ((1.0, None), (1.5, None), (2.0, (0.3, 6.0)))


def candidates(own: float) -> Iterator[dict[str, Any]]:
    """With ever more steps, and of these the least guided ones first; ``own`` is the model's own guidance scale."""
    for steps in (4, 5, 6, 8, 10, 12, 16):
        for scale, interval in (*GUIDANCE, (own, None)):
            for sampler in ("ddim", "dpmpp_2m", "unipc"):
                guided = {"guidance_scale": scale, "guidance_interval": interval}
                yield {"sampler": sampler, "schedule": "trailing", "steps": steps, **guided}


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
        trial = Trial(settings, float(np.mean(errors)), float(np.mean(hits)), evaluations(model, settings))
        on_trial(trial)
        return trial

    own = model.model.recipe.guidance_scale
    reference = measure(REFERENCE | {"guidance_scale": own})
    best = first_as_good(reference, map(measure, candidates(own)))
    interval = best.settings["guidance_interval"]
    chosen = best.settings | {"guidance_interval": None if interval is None else list(interval)}
    model.model.recipe = replace(model.model.recipe, **chosen)
    return best


def evaluations(model: TextToImage, settings: dict[str, Any]) -> float:
    """Passes of the U-Net for one picture: two at every level where it is guided."""
    scale, interval = settings["guidance_scale"], settings["guidance_interval"]
    if scale == 1:
        return settings["steps"]
    low, high = interval or (0.0, math.inf)
    ratios = [level.ratio for level in levels(model.model.schedule, settings["steps"], settings["schedule"])[:-1]]
    return len(ratios) + sum(low < ratio <= high for ratio in ratios)


def first_as_good(reference: Trial, trials: Iterator[Trial]) -> Trial:
    """Of those with the fewest steps that are as good as the reference the best, or the reference where none is."""
    found: list[Trial] = []
    for trial in trials:
        if found and trial.settings["steps"] > found[0].settings["steps"]:
            break
        found += [trial] if trial.as_good_as(reference) else []
    return min(found, key=lambda trial: trial.error, default=reference)


def _guidance(settings: dict[str, Any]) -> str:
    interval = settings["guidance_interval"]
    return f"{settings['guidance_scale']:g}" + (f" in {interval[0]:g}..{interval[1]:g}" if interval else "")


def table(trials: Sequence[Trial]) -> str:
    """A line a trial."""
    return "\n".join(
        f"{t.settings['sampler']:<10} {t.settings['steps']:>3} steps  guidance {_guidance(t.settings):<14} "
        f"{t.evaluations:>4g} evaluations  "
        f"error {t.error:7.1f}  nearest {t.hits:.2f}"
        for t in trials
    )
