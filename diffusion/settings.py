"""What one generating call may ask for: names, defaults and checks, shared by the command line and by Python.

Nothing slow is imported, so that a wrong request is answered before any library is loaded.
"""

import difflib
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Our name -> the name that AUTOMATIC1111 writes into ``parameters``.
SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
}
SCHEDULES = {
    "discrete": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",
    "trailing": "Trailing",
}
SCHEDULER_CLASSES = {  # diffusers' class, in lower case without its ending -> our name
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler_ancestral",
    "flowmatcheulerdiscrete": "euler",
    "flowmatchheundiscrete": "heun",
    "heundiscrete": "heun",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "unipcmultistep": "unipc",
    "deismultistep": "deis",
}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short name -> torch's
MAX_SEED = 2**64 - 1  # the largest that torch.Generator.manual_seed takes
PACKAGE = Path(__file__).parent
ADAPTERS = "recipe.json"  # with a ``base`` in it, what is beside it is put on that model
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class Defaults(Protocol):
    """What a model's recipe answers where the call says nothing."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str


class Limits(NamedTuple):
    """What a model folder allows: sides are multiples of ``side`` pixels, steps are 1 to ``steps``."""

    side: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One checked request. ``None`` means the model's own default; 0 and "" are values.

    Picture k of each prompt has the seed ``seed + k``: every prompt starts at ``seed``, so that prompts compare.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError('no prompt: say what to draw, for instance "a red apple"')
        for text in (*self.prompts, self.negative_prompt):
            _check_text(text)
        for name in ("steps", "width", "height", "num_images", "batch_size"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("seed", self.seed, 0)
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} is too large: picture k has seed + k, which must not pass {MAX_SEED}")
        _check_guidance(self.guidance_scale)
        schedule = None if self.schedule is None else resolve_schedule(self.schedule)
        if self.sampler is not None:
            sampler, implied = resolve_sampler(self.sampler)
            object.__setattr__(self, "sampler", sampler)
            schedule = implied if schedule is None else schedule
        object.__setattr__(self, "schedule", schedule)

    def seeded(self) -> "Settings":
        """The same request with a seed: a random one where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def filled(self, recipe: Defaults) -> "Settings":
        """The same request with every ``None`` answered: by the recipe, a random seed, a batch that fits in memory."""
        known = {item.name: getattr(recipe, item.name) for item in fields(self) if hasattr(recipe, item.name)}
        given = {name: value for name in known if (value := getattr(self, name)) is not None}
        side = {**known, **given}
        batch = max(1, min(16, 4 * 512 * 512 // (side["width"] * side["height"])))
        return replace(
            self,
            **side,
            seed=self.seeded().seed,
            batch_size=min(self.count, batch) if self.batch_size is None else self.batch_size,
        )

    @property
    def count(self) -> int:
        """Pictures in this call."""
        return len(self.prompts) * self.num_images

    def pictures(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, in order; the seed must be known."""
        assert self.seed is not None, "filled() gives the seed"
        return [(prompt, self.seed + k) for prompt in self.prompts for k in range(self.num_images)]

    def check(self, limits: Limits) -> None:
        """Raises ValueError where the request does not fit the model."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None and value % limits.side:
                near = max(limits.side, round(value / limits.side) * limits.side)
                raise ValueError(f"{name} {value} is not a multiple of {limits.side}: try {near}")
        if self.steps is not None and self.steps > limits.steps:
            raise ValueError(f"steps {self.steps} is more than this model's {limits.steps} noise levels: ask for fewer")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``known``: it names the nearest one, and all of them."""
    known = list(known)
    return ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)} ({kind}s: {', '.join(known)})")


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Our name of a sampler, from ours, AUTOMATIC1111's or diffusers' class name, and the schedule at its end, if any.

    ``"DPM++ 2M Karras"`` is ``("dpmpp_2m", "karras")``. Raises ValueError for any other name.
    """
    names = {_plain(label): ours for ours, label in SAMPLERS.items()} | {_plain(ours): ours for ours in SAMPLERS}
    names |= SCHEDULER_CLASSES
    plain = _plain(name).removesuffix("scheduler")
    for schedule in (None, *SCHEDULES):
        sampler = plain if schedule is None else plain.removesuffix(_plain(schedule))
        if sampler in names:
            return names[sampler], schedule
    raise unknown("sampler", name, SAMPLERS)


def resolve_schedule(name: str) -> str:
    """Our name of a schedule, from ours or AUTOMATIC1111's. ValueError for any other."""
    names = {_plain(label): ours for ours, label in SCHEDULES.items()} | {_plain(ours): ours for ours in SCHEDULES}
    if _plain(name) not in names:
        raise unknown("schedule", name, SCHEDULES)
    return names[_plain(name)]


def resolve_dtype(name: str | None, device: str | None) -> str | None:
    """torch's name of a dtype, from it or its short name. Half precision on the CPU is refused."""
    if name is None:
        return None
    found = DTYPES.get(name, name)
    if found not in DTYPES.values():
        raise unknown("dtype", name, [*DTYPES, *DTYPES.values()])
    if found == "float16" and device == "cpu":
        raise ValueError("dtype float16 is slow and wrong on the CPU: use float32 or bfloat16")
    return found


def check_device(name: str | None) -> None:
    """Raises ValueError for a name that is no device; whether the machine has it, only torch can tell."""
    if name is not None and not re.fullmatch(rf"(cuda|xpu):\d+|{'|'.join(DEVICES)}", name):
        raise unknown("device", name, [*DEVICES, "cuda:1"])


def find_model(name: str | Path) -> Path:
    """The folder of a model: a path, or the name of one that ships with the project. ValueError when there is none."""
    shelves = (PACKAGE.parent / "assets", PACKAGE / "assets")
    for folder in (Path(name), *(shelf / name for shelf in shelves)):
        if (folder / "unet").is_dir():
            missing = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
            if missing:
                raise ValueError(f"{folder} is not a whole model folder: it has no {missing[0]}/")
            return folder
        if base_of(folder) is not None:
            return folder
    shipped = sorted({unet.parent.name for shelf in shelves for unet in shelf.glob("*/unet")})
    if Path(name).exists():
        raise ValueError(f"{name} is not a model folder: it has no unet/")
    known = f" (models that are here: {', '.join(shipped)})" if shipped else ""
    raise ValueError(
        f"model {str(name)!r} not found: give the path of a model folder{did_you_mean(str(name), shipped)}{known}"
    )


def parse_lora(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH:0.8`` as the path and its strength, 1 where none is given. ValueError if nothing is there."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        path, weight = text, "1"
    try:
        strength = float(weight)
    except ValueError:
        path, strength = text, 1.0
    if not Path(path).exists():
        raise ValueError(
            f"no LoRA at {path}: give a .safetensors file or a folder, and if you like its weight, PATH:0.8"
        )
    if not math.isfinite(strength):
        raise ValueError(f"the weight of {path} must be a finite number, got {weight}")
    return path, strength


def base_of(folder: Path) -> Path | None:
    """Of a folder of adapters (LoRA, learnt words) the model that they belong to; None for a model of its own."""
    if (folder / "unet").is_dir() or not (folder / ADAPTERS).is_file():
        return None
    recipe = _read_json(folder / ADAPTERS)
    base = recipe.get("base") if isinstance(recipe, dict) else None
    if not base:
        return None
    try:
        return find_model(base)
    except ValueError as error:
        raise ValueError(f"{folder} belongs to another model: {error}") from None


def read_limits(folder: Path) -> Limits:
    """The limits of a model folder, from its JSON files alone."""
    folder = base_of(folder) or folder
    vae, scheduler = (
        _read_json(folder / "vae" / "config.json"),
        _read_json(folder / "scheduler" / "scheduler_config.json"),
    )
    try:
        return Limits(2 ** (len(vae["block_out_channels"]) - 1), scheduler.get("num_train_timesteps", 1000))
    except (KeyError, TypeError):
        raise ValueError(f"{folder / 'vae' / 'config.json'} does not describe an autoencoder") from None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


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


def _check_guidance(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"guidance_scale must be a finite number of at least 0, got {value!r}: 1 turns guidance off")
