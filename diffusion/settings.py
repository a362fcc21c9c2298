"""What one generating call may ask for: fields, defaults and checks, shared by the command line and by Python.

Nothing slow is imported, so that a wrong request is answered before any library is loaded.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

from diffusion.names import resolve_sampler, resolve_schedule
from diffusion.places import Limits
from diffusion.values import (
    Source,
    as_image,
    interval,
    name_of,
    number,
    picture,
    sides,
    sigmas,
    text,
    whole,
    whole_or_auto,
)

MAX_SEED = 2**64 - 1  # the largest that torch.Generator.manual_seed takes
MAX_SIDE = 2**14  # a picture of such sides is 3 GiB as floats: what is larger is a slip, found before it takes memory
MAX_COUNT = 10**6  # of each prompt: months on any machine, and what names them still fits in its memory
TILES = ("", "x", "y", "xy")
PICTURES = ("init_image", "mask", "control_image")

# --- the rules of the fields, each one a line

WHOLE = {  # field -> (least, most)
    **dict.fromkeys(("steps", "clip_skip"), (1, math.inf)),
    **dict.fromkeys(("width", "height", "vae_tiling"), (1, MAX_SIDE)),
    **dict.fromkeys(("seed", "variation_seed", "to_seed"), (0, MAX_SEED)),
    "num_images": (1, MAX_COUNT),
    "frames": (2, MAX_COUNT),
}
NUMBERS = {  # field -> (least, most)
    **dict.fromkeys(("guidance_scale", "control_scale", "mask_blur"), (0, math.inf)),
    **dict.fromkeys(("guidance_rescale", "variation_strength", "share", "strength", "hires_strength"), (0, 1)),
    "hires": (1, 8),
}
BEGIN, AWAY = "a picture to begin from", "somewhere to go"
NEEDS = (  # field, one of these must be given as well, what that is
    ("strength", ("init_image",), BEGIN),
    ("mask", ("init_image",), BEGIN),
    ("extend", ("init_image",), BEGIN),
    ("mask_blur", ("mask", "extend"), "an edge to fade"),
    ("control_scale", ("control_image",), "a picture to lead by"),
    ("hires_strength", ("hires",), "a larger picture to draw"),
    ("variation_seed", ("variation_strength",), "how far to go"),
    ("variation_strength", ("variation_seed",), AWAY),
    ("to_prompt", ("frames", "share"), "how many pictures on the way"),
    ("to_seed", ("frames", "share"), "how many pictures on the way"),
    ("frames", ("to_prompt", "to_seed"), AWAY),
    ("share", ("to_prompt", "to_seed"), AWAY),
)
EXCLUDES = (  # two fields of which one makes no sense beside the other, and why
    ("frames", "share", "many pictures on the way, or one"),
    *(
        (to, other, "there is one way to go")
        for to in ("to_prompt", "to_seed")
        for other in ("num_images", "variation_seed")
    ),
    ("hires", "mask", "hires draws the whole picture again, larger"),
    ("hires", "extend", "hires draws the whole picture again, larger"),
    ("hires", "sigmas", "sigmas are the levels of one descent, and hires has two"),
    ("tile", "vae_tiling", "the autoencoder's tiles would not fit each other over the edges"),
    ("strength", "sigmas", "the first of the sigmas says how much is drawn anew"),
)
GUIDED = ("negative_prompt", "guidance_rescale", "guidance_interval")  # what a guidance of 1 has no use for
# what makes a value plain, or refuses it -> of which fields
PLAIN: dict[Callable[[str, Any], Any], tuple[str, ...]] = {
    text: ("negative_prompt", "to_prompt"),
    name_of: ("sampler", "schedule", "tile"),
    picture: PICTURES,
    partial(sides, most=MAX_SIDE): ("extend",),
    whole_or_auto: ("batch_size",),
    interval: ("guidance_interval",),
    sigmas: ("sigmas",),
}
ANSWERS = {"mask_blur": 4.0, "control_scale": 1.0, "hires_strength": 0.5}  # where they are needed and not given


class Defaults(Protocol):
    """What a model's recipe answers where the call says nothing."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str

    @property
    def guidance_interval(self) -> Sequence[float | None] | None:
        """Where that scale guides."""


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
    vae_tiling: int | None = None  # the autoencoder works in tiles of so many pixels, which takes less memory

    # how many, and from which noise
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    batch_size: int | Literal["auto"] | None = None  # "auto": as many as memory has room for
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
    mask_blur: float | None = None  # pixels over which the edge fades, inside of what is drawn anew
    extend: tuple[int, int, int, int] | None = None  # pixels to add: left, top, right, bottom
    control_image: Source | None = None
    control_scale: float | None = None
    hires: float | None = None  # drawn again, so many times as large
    hires_strength: float | None = None

    def __post_init__(self) -> None:
        given: Any = self.prompts
        if isinstance(given, str):
            raise ValueError(f"prompts are several texts: give ({given!r},)")
        if not self.prompts:
            raise ValueError('no prompt: say what to draw, for instance "a red apple"')
        self._make_plain()
        self._check_names()
        for name, needed, what in NEEDS:
            if self.gives(name) and not any(map(self.gives, needed)):
                raise ValueError(f"{name} needs {what}: give {' or '.join(needed)}")
        for one, other, why in EXCLUDES:
            if self.gives(one) and self.gives(other):
                raise ValueError(f"{one} and {other} exclude each other: {why}")
        self._check_values()

    def gives(self, name: str) -> bool:
        """Whether a field says something: it is not what it is when it is left out."""
        value, default = getattr(self, name), DEFAULTS[name]
        return value is not default and (type(value) is not type(default) or value != default)

    def _make_plain(self) -> None:
        """Numbers of any library as Python's own, pixels as pictures. ValueError for what is neither."""
        self._set("prompts", tuple(text("a prompt", prompt) for prompt in self.prompts))
        for name, limits in WHOLE.items():
            self._change(name, partial(whole, least=limits[0], most=limits[1]))
        for name, limits in NUMBERS.items():
            self._change(name, partial(number, least=limits[0], most=limits[1]))
        for name in ("literal", "long_prompts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for change, names in PLAIN.items():
            for name in names:
                self._change(name, change)

    def _change(self, name: str, change: Callable[[str, Any], Any]) -> None:
        value = getattr(self, name)
        if value is not None or DEFAULTS[name] is not None:
            self._set(name, change(name, value))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        """Names as this toolkit writes them, and the schedule that a sampler's name or sigmas stand for."""
        if self.tile not in TILES:
            raise ValueError(f"tile {self.tile!r} is none of x, y and xy")
        schedule = None if self.schedule is None else resolve_schedule(self.schedule)
        if self.sampler is not None:
            sampler, implied = resolve_sampler(self.sampler)
            if implied is not None and schedule not in (None, implied):
                raise ValueError(f"sampler {self.sampler!r} asks for {implied}, and schedule for {schedule}: give one")
            self._set("sampler", sampler)
            schedule = implied if schedule is None else schedule
        self._set("schedule", schedule)
        if self.sigmas is not None:
            if self.steps not in (None, len(self.sigmas)) or self.schedule is not None:
                raise ValueError("sigmas say the steps and the schedule: leave those out")
            self._set("steps", len(self.sigmas))

    def _check_values(self) -> None:
        """What depends on values, and not only on which fields are given."""
        for name in ("seed", "variation_seed"):
            seed = getattr(self, name)
            if seed is not None and seed + self.num_images - 1 > MAX_SEED:
                raise ValueError(f"{name} {seed} is too large: picture k has it + k, which must not pass {MAX_SEED}")
        for name in ("strength", "hires_strength"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} 0 would change nothing: give more, up to 1")
        if self.hires == 1:
            raise ValueError("hires 1 would be no larger: give a number above 1")
        for name in ("width", "height") if self.hires is not None else ():
            if (side := getattr(self, name)) is not None and side * self.hires > MAX_SIDE:
                raise ValueError(
                    f"hires {self.hires:g} makes {name} {side * self.hires:g}: it must not pass {MAX_SIDE}"
                )
        for name in GUIDED if self.guidance_scale == 1 else ():
            if self.gives(name):
                raise ValueError(f"guidance_scale 1 turns guidance off, and {name} has no effect then: leave one out")

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
        where = self.guidance_interval
        if where is None and self.guidance_scale is None and recipe.guidance_interval is not None:
            where = interval("guidance_interval", recipe.guidance_interval)
        pixels = answers["width"] * answers["height"] * (1 if self.hires is None else self.hires) ** 2
        batch = max(1, min(16, int(4 * 512 * 512 / pixels)))
        return replace(
            self,
            **answers | self._needed(),
            guidance_interval=where,
            seed=self.seeded().seed,
            batch_size=min(self.count, batch) if self.batch_size is None else self.batch_size,
        )

    def _needed(self) -> dict[str, float]:
        """What other fields need and nobody has given."""
        strength = 1.0 if self.mask is not None or self.extend is not None else 0.75
        needs = {name: needed for name, needed, _ in NEEDS}
        answers = ANSWERS | ({} if self.sigmas is not None else {"strength": strength})
        return {
            name: value
            for name, value in answers.items()
            if getattr(self, name) is None and any(map(self.gives, needs[name]))
        }

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
    def finished(self) -> tuple[int, int]:
        """Width and height of a finished picture; both must be known."""
        assert self.width is not None and self.height is not None  # noqa: PT018 - filled() gives them
        times = 1 if self.hires is None else self.hires
        return round(self.width * times), round(self.height * times)

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
        self._check_sides(limits.side)
        if self.vae_tiling is not None and self.vae_tiling % (4 * limits.side):
            near = max(1, round(self.vae_tiling / (4 * limits.side))) * 4 * limits.side
            raise ValueError(f"vae_tiling {self.vae_tiling} is not a multiple of {4 * limits.side}: try {near}")
        if self.steps is not None and self.steps > limits.steps:
            raise ValueError(f"steps {self.steps} is more than this model's {limits.steps} noise levels: ask for fewer")
        for name in ("strength", "hires_strength"):
            part = getattr(self, name)
            if self.steps is not None and part is not None and self.steps / part > limits.steps:
                raise ValueError(
                    f"{self.steps} steps at {name} {part:g} are the last of {self.steps / part:.0f}, more than this "
                    f"model's {limits.steps} noise levels: ask for fewer steps, or for more {name}"
                )

    def _check_sides(self, side: int) -> None:
        """A picture is padded to what the model draws in; noise alone, and a tile, must have such sides."""
        for name, axis in (("width", "x"), ("height", "y")):
            value = getattr(self, name)
            if value is None or (self.init_image is not None and axis not in self.tile):
                continue
            times = self.hires if self.hires is not None and axis in self.tile else 1
            for pixels in (value, round(value * times)):
                if pixels % side:
                    near = max(side, round(pixels / side) * side)
                    said = f"{name} {pixels} is not a multiple of {side}"
                    raise ValueError(
                        f"{said}, as a tile has to be: try {near}" if axis in self.tile else f"{said}: try {near}"
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
        if self.variation_seed is not None:
            kept["variation_seed"] = shot.to_seed
        elif shot.to_prompt is not None or shot.to_seed is not None:
            kept |= {"to_prompt": shot.to_prompt, "to_seed": shot.to_seed, "share": shot.share}
        return {"prompt": shot.prompt, "seed": shot.seed, **kept}


def sides_of(source: Source) -> tuple[int, int]:
    """Width and height of a picture as it is seen; ValueError names a file that cannot be read."""
    from pathlib import Path

    from diffusion.pixels import oriented_size, read_size

    return read_size(Path(source)) if isinstance(source, str | Path) else oriented_size(as_image(source))


def facts_of(source: Source) -> dict[str, str]:
    """Name and SHA-256 of a picture's file, or of its pixels where it is no file."""
    from pathlib import Path

    if isinstance(source, str | Path):
        return {"name": Path(source).name, "sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()}
    return {"name": "", "sha256": hashlib.sha256(as_image(source).convert("RGBA").tobytes()).hexdigest()}


DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(Settings)}
