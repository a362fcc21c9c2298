"""What one generating call may ask for: fields, defaults and checks, shared by the command line and by Python.

Nothing slow is imported, so that a wrong request is answered before any library is loaded.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Union

from diffusion.names import resolve_sampler, resolve_schedule, unknown
from diffusion.places import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

Source = Union[str, "Path", "Image.Image"]  # a picture, or where one is
MAX_SEED = 2**64 - 1  # the largest that torch.Generator.manual_seed takes
TILES = ("", "x", "y", "xy")
COMPARED = {  # how people write the fields that can be compared -> the field
    **{
        name: name
        for name in (
            *("steps", "guidance_scale", "guidance_rescale", "sampler", "schedule", "seed", "strength", "clip_skip"),
            *("negative_prompt", "hires_strength", "control_scale", "variation_strength", "width", "height"),
        )
    },
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
}
PICTURES = ("init_image", "mask", "control_image")


class Defaults(Protocol):
    """What a model's recipe answers where the call says nothing."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str


class Shot(NamedTuple):
    """One picture of a call: where its words and its noise begin, and how far they have gone to somewhere else."""

    prompt: str
    seed: int
    to_prompt: str | None = None
    to_seed: int | None = None
    share: float = 0.0  # 0: prompt and seed; 1: to_prompt and to_seed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One checked request. ``None`` means the model's own default, or nothing; 0 and "" are values.

    Picture k of each prompt has the seed ``seed + k``: every prompt starts at ``seed``, so that prompts compare.
    """

    # what is drawn
    prompts: tuple[str, ...]
    negative_prompt: str = ""
    literal: bool = False  # prompts as they stand: no (weights:1.2), BREAK or <lora:...>
    long_prompts: bool = False  # read more tokens than the encoder was made for, in chunks; CLIP's 77 always may
    clip_skip: int = 1  # 1: the last layer of the text encoder, 2: the one before it

    # how it is drawn
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0  # share of the guided estimate brought back to its own contrast
    guidance_interval: tuple[float, float | None] | None = None  # (low, high) in sigma / alpha; None: no end
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None  # sigma / alpha of every step, descending, in place of a schedule
    tile: str = ""  # edges that fit each other: x, y or xy

    # how many, and from which noise
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    batch_size: int | None = None
    variation_seed: int | None = None  # picture k is a variation of ``seed`` towards variation_seed + k
    variation_strength: float | None = None
    to_prompt: str | None = None  # ``frames`` pictures on the way from the prompt and the seed to these
    to_seed: int | None = None
    frames: int | None = None
    share: float | None = None  # or the one picture this far on the way

    # from which picture
    init_image: Source | None = None
    strength: float | None = None  # how much of it is drawn anew; the steps stay as many as were asked for
    mask: Source | None = None  # white is drawn anew, black stays to the last bit
    mask_blur: float = 4.0  # pixels over which the edge fades, inside of what is drawn anew
    extend: tuple[int, int, int, int] | None = None  # pixels to add: left, top, right, bottom
    control_image: Source | None = None
    control_scale: float = 1.0
    hires: float | None = None  # drawn again, so many times as large
    hires_strength: float = 0.5

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError('no prompt: say what to draw, for instance "a red apple"')
        for text in (*self.prompts, self.negative_prompt, *([] if self.to_prompt is None else [self.to_prompt])):
            _check_text(text)
        for name in ("steps", "width", "height", "num_images", "batch_size", "clip_skip"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("seed", "variation_seed", "to_seed"):
            _check_whole(name, getattr(self, name), 0)
        _check_whole("frames", self.frames, 2)
        _check_number("guidance_scale", self.guidance_scale, 0, note=": 1 turns guidance off")
        _check_number("control_scale", self.control_scale, 0)
        _check_number("mask_blur", self.mask_blur, 0)
        for name in ("guidance_rescale", "variation_strength", "share", "strength", "hires_strength"):
            _check_number(name, getattr(self, name), 0, 1)
        self._check_names()
        self._check_noise()
        self._check_pictures()

    def _check_names(self) -> None:
        schedule = None if self.schedule is None else resolve_schedule(self.schedule)
        if self.sampler is not None:
            sampler, implied = resolve_sampler(self.sampler)
            object.__setattr__(self, "sampler", sampler)
            schedule = implied if schedule is None else schedule
        object.__setattr__(self, "schedule", schedule)
        if self.tile not in TILES:
            raise ValueError(f"tile {self.tile!r} is none of x, y and xy")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < (math.inf if high is None else high) or high == math.inf:
                raise ValueError(f"guidance_interval {low:g},{high} must be two sigma / alpha, low, high; None: no end")
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _check_sigmas(self.sigmas))
            if self.steps not in (None, len(self.sigmas)) or self.schedule is not None:
                raise ValueError("sigmas say the steps and the schedule: leave those out")
            object.__setattr__(self, "steps", len(self.sigmas))

    def _check_noise(self) -> None:
        for name, seed in (("seed", self.seed), ("variation_seed", self.variation_seed)):
            if seed is not None and seed + self.num_images - 1 > MAX_SEED:
                raise ValueError(f"{name} {seed} is too large: picture k has it + k, which must not pass {MAX_SEED}")
        if (self.variation_seed is None) != (self.variation_strength is None):
            raise ValueError("variation_seed and variation_strength belong together: give both")
        moving = self.to_prompt is not None or self.to_seed is not None
        if moving == (self.frames is None and self.share is None):
            raise ValueError(
                "to_prompt and to_seed say where the pictures go: give frames as well"
                if moving
                else "frames are pictures on the way: say where to, by to_prompt or to_seed"
            )
        if self.frames is not None and self.share is not None:
            raise ValueError("frames and share exclude each other: many pictures on the way, or one")
        if moving and (self.num_images > 1 or self.variation_seed is not None):
            raise ValueError("to_prompt and to_seed exclude num_images and variations")

    def _check_pictures(self) -> None:
        if self.init_image is None:
            for name in ("strength", "mask", "extend"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a picture to begin from: give init_image")
        if self.strength == 0:
            raise ValueError("strength 0 would change nothing: give more, up to 1")
        for pixels in self.extend or ():
            _check_whole("extend", pixels, 0)
        if self.hires is not None:
            _check_number("hires", self.hires, 1, 8)
            if self.mask is not None or self.extend is not None or self.hires == 1 or self.hires_strength == 0:
                raise ValueError("hires draws the whole picture again, larger: above 1, and without mask or extend")

    def seeded(self) -> "Settings":
        """The same request with a seed: a random one where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def filled(self, recipe: Defaults) -> "Settings":
        """The same request with every ``None`` answered: by the recipe, a random seed, a batch that fits in memory."""
        names = {"width", "height", "steps", "guidance_scale", "sampler"} | (
            {"schedule"} if self.sigmas is None else set()
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        from_picture = {} if self.init_image is None else dict(zip(("width", "height"), self._sides(), strict=True))
        answers = {name: getattr(recipe, name) for name in names} | given | from_picture
        pixels = answers["width"] * answers["height"] * (1 if self.hires is None else self.hires) ** 2
        batch = max(1, min(16, int(4 * 512 * 512 / pixels)))
        whole = self.mask is not None or self.extend is not None
        strength = (1.0 if whole else 0.75) if self.init_image is not None and self.strength is None else self.strength
        return replace(
            self,
            **answers,
            seed=self.seeded().seed,
            strength=strength,
            batch_size=min(self.count, batch) if self.batch_size is None else self.batch_size,
        )

    def _sides(self) -> tuple[int, int]:
        """Width and height of what is drawn from a picture: its own and what is added; one follows from the other."""
        assert self.init_image is not None, "only asked of a picture"
        left, top, right, bottom = self.extend or (0, 0, 0, 0)
        across, down = sides_of(self.init_image)
        width = None if self.width is None else self.width - left - right
        height = None if self.height is None else self.height - top - bottom
        if width is None:
            width = across if height is None else round(across * height / down)
        if height is None:
            height = round(down * width / across)
        if width < 1 or height < 1:
            raise ValueError("extend adds more pixels than the whole width or height: there is no room for the picture")
        return width + left + right, height + top + bottom

    @property
    def count(self) -> int:
        """Pictures in this call."""
        return len(self.prompts) * (self.num_images if self.frames is None else self.frames)

    @property
    def total_steps(self) -> int:
        """Steps of one picture; the steps must be known."""
        assert self.steps is not None, "filled() gives the steps"
        return self.steps * (1 if self.hires is None else 2)

    def shots(self) -> list[Shot]:
        """Every picture, in order; the seed must be known."""
        assert self.seed is not None, "filled() gives the seed"
        if self.frames is not None or self.share is not None:
            shares = [self.share] if self.frames is None else [k / (self.frames - 1) for k in range(self.frames)]
            return [
                Shot(prompt, self.seed, self.to_prompt, self.to_seed, float(share or 0))
                for prompt in self.prompts
                for share in shares
            ]
        if self.variation_seed is not None:
            strength, first = float(self.variation_strength or 0), self.variation_seed
            return [Shot(p, self.seed, None, first + k, strength) for p in self.prompts for k in range(self.num_images)]
        return [Shot(prompt, self.seed + k) for prompt in self.prompts for k in range(self.num_images)]

    def check(self, limits: Limits) -> None:
        """Raises ValueError where the request does not fit the model."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None and value % limits.side and self.init_image is None:
                near = max(limits.side, round(value / limits.side) * limits.side)
                raise ValueError(f"{name} {value} is not a multiple of {limits.side}: try {near}")
        if self.steps is not None and self.steps > limits.steps:
            raise ValueError(f"steps {self.steps} is more than this model's {limits.steps} noise levels: ask for fewer")
        for name, part in (("strength", self.strength), ("hires_strength", self.hires and self.hires_strength)):
            if self.steps is not None and part and self.steps / part > limits.steps:
                raise ValueError(
                    f"{self.steps} steps at {name} {part:g} are the last of {self.steps / part:.0f}, more than this "
                    f"model's {limits.steps} noise levels: ask for fewer steps, or for more {name}"
                )

    def record(self, shot: Shot) -> dict[str, Any]:
        """The settings that make one picture of the call again, as plain values; pictures by name and SHA-256."""
        always = ("negative_prompt", "steps", "guidance_scale", "sampler", "schedule", "width", "height")
        kept = {name: getattr(self, name) for name in always if name != "schedule" or self.sigmas is None}
        alone = {"prompts", "seed", "num_images", "batch_size", "frames", "to_prompt", "to_seed", "share"}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in {*always, *alone} and value != item.default:
                kept[item.name] = facts_of(value) if item.name in PICTURES else value
        if self.hires is not None:
            kept["hires_strength"] = self.hires_strength
        if self.variation_seed is not None:
            kept["variation_seed"] = shot.to_seed
        elif shot.to_prompt is not None or shot.to_seed is not None:
            kept |= {"to_prompt": shot.to_prompt, "to_seed": shot.to_seed, "share": shot.share}
        return {"prompt": shot.prompt, "seed": shot.seed, **kept}


def variants(base: Settings, axes: Mapping[str, Sequence[Any]]) -> tuple[list[Settings], list[str], list[str]]:
    """One request for each combination of the values of one or two fields, row by row; labels of columns and of rows.

    The first field goes across, the second one down; all have the seed of ``base``, so that they compare. ValueError
    for a field that is none, and for one that says how many pictures there are.
    """
    names = [COMPARED.get(name.replace("-", "_"), name.replace("-", "_")) for name in axes]
    for written, name in zip(axes, names, strict=True):
        if name not in COMPARED.values():
            raise unknown("field to compare", written, dict.fromkeys(COMPARED.values()))
    if len(set(names)) != len(axes) or not 1 <= len(axes) <= 2 or not all(axes.values()):
        raise ValueError("compare one or two different fields, each with its values: steps=10,20 cfg=3,5")
    if base.count != 1:
        raise ValueError("compare draws one picture of each kind: give one prompt, and neither num_images nor frames")
    across, down = [*axes.values(), [None]][:2]
    made = [
        replace(base.seeded(), **dict(zip(names, pair, strict=False)))
        for pair in ((one, other) for other in down for one in across)
    ]
    labels = [
        [f"{written} {value:g}" if isinstance(value, float) else f"{written} {value}" for value in values]
        for written, values in axes.items()
    ]
    return made, labels[0], labels[1] if len(labels) > 1 else []


def sides_of(source: Source) -> tuple[int, int]:
    """Width and height of a picture as it is seen; ValueError names a file that cannot be read."""
    from pathlib import Path

    from diffusion.pixels import oriented_size, read_size

    return read_size(Path(source)) if isinstance(source, str | Path) else oriented_size(source)


def facts_of(source: Source) -> dict[str, str]:
    """Name and SHA-256 of a picture's file, or of its pixels where it is no file."""
    from pathlib import Path

    if isinstance(source, str | Path):
        return {"name": Path(source).name, "sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()}
    return {"name": "", "sha256": hashlib.sha256(source.convert("RGBA").tobytes()).hexdigest()}


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be text, got {text!r}")
    if any("\ud800" <= char <= "\udfff" for char in text):  # what bytes that are no UTF-8 turn into on their way here
        raise ValueError(f"the prompt {text!r} is not valid text: give it as UTF-8")


def _check_whole(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: Any, least: float, most: float = math.inf, note: str = "") -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}{note}")
    if not least <= value <= most:
        limits = f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}"
        raise ValueError(f"{name} must be {limits}, got {value!r}{note}")


def _check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Those of the steps: a 0 at the end, where clean data is, goes without saying."""
    for value in sigmas:
        _check_number("sigmas", value, 0)
    kept = tuple(float(value) for value in sigmas[: -1 if len(sigmas) > 1 and sigmas[-1] == 0 else None])
    if not kept or kept[-1] <= 0 or any(high <= low for high, low in pairwise(kept)):
        raise ValueError(f"sigmas must be numbers that fall, above 0 but for the last, got {list(sigmas)}")
    return kept
