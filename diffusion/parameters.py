"""AUTOMATIC1111's text of how a picture was made, which most tools read: written, and taken apart again. No torch."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion.names import SAMPLERS, SCHEDULES

WRITTEN: dict[str, Callable[[Mapping[str, Any]], Any]] = {  # AUTOMATIC1111's name of a value -> it, None: left out
    "Steps": lambda made: made.get("steps"),
    "Sampler": lambda made: _known_as(SAMPLERS, made.get("sampler")),
    "Schedule type": lambda made: _known_as(SCHEDULES, made.get("schedule")),
    "CFG scale": lambda made: _short(made.get("guidance_scale")),
    "Seed": lambda made: made.get("seed"),
    "Size": lambda made: f"{made['width']}x{made['height']}" if {"width", "height"} <= made.keys() else None,
    "Model hash": lambda made: made["model_hash"],
    "Model": lambda made: made["model"],
    "Denoising strength": lambda made: made.get("hires_strength", made.get("strength")),
    "Clip skip": lambda made: made.get("clip_skip"),
    "Variation seed": lambda made: made.get("variation_seed"),
    "Variation seed strength": lambda made: made.get("variation_strength"),
    "Mask blur": lambda made: made.get("mask_blur"),
    "Tiling": lambda made: True if made.get("tile") else None,
    "CFG Rescale": lambda made: made.get("guidance_rescale"),
    "CFG interval": lambda made: _joined(made.get("guidance_interval")),
    "Sigmas": lambda made: _joined(made.get("sigmas")),
    "Hires upscale": lambda made: made.get("hires"),
    "To prompt": lambda made: made.get("to_prompt"),
    "To seed": lambda made: made.get("to_seed"),
    "Share": lambda made: _short(made.get("share")),
    "Frames": lambda made: made.get("frames"),
    "ControlNet 0": lambda made: _control(made),
    "Script": lambda made: "X/Y/Z plot" if "compare" in made else None,
    "X Values": lambda made: _axis(made, 0),
    "Y Values": lambda made: _axis(made, 1),
    "RNG": lambda made: "CPU",
    "Lora hashes": lambda made: _lora_hashes(made),
    "Version": lambda made: f"diffusion {made['version']}",
}
# The pattern by which the ecosystem's readers take the last line of ``parameters`` apart.
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def format_parameters(made: Mapping[str, Any]) -> str:
    """The AUTOMATIC1111 text: the prompt, the negative prompt where there is one, and one line of ``Key: value``."""
    values = {label: found for label, value in WRITTEN.items() if (found := value(made)) is not None}
    negative = [f"Negative prompt: {made['negative_prompt']}"] if made.get("negative_prompt") else []
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in values.items())
    prompts = [made["prompt"]] if "prompt" in made else made.get("prompts", [])
    return "\n".join([*prompts, *negative, line])


def parse_parameters(text: str) -> dict[str, str]:
    """An AUTOMATIC1111 text taken apart: ``prompt``, ``negative_prompt`` and the keys of its last line as written."""
    *lines, last = text.strip().split("\n")
    pairs = PARAMETER.findall(last)
    if len(pairs) < 3:  # then the last line is prompt too
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return {"prompt": "\n".join(lines[:start]).strip(), "negative_prompt": negative} | {
        k: _unquote(v) for k, v in pairs
    }


def _known_as(names: Mapping[str, str], name: str | None) -> str | None:
    return None if name is None else names.get(name, name)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _joined(values: Sequence[float | None] | None) -> str | None:
    return None if values is None else ",".join("inf" if value is None else f"{value:g}" for value in values)


def _control(made: Mapping[str, Any]) -> str | None:
    if "control" not in made:
        return None
    name, hashed = made["control"]["name"], made["control"]["hash"]
    return f"Model: {name} [{hashed}], Weight: {made['control_scale']:g}"


def _axis(made: Mapping[str, Any], number: int) -> str | None:
    """A field that is compared, with its values."""
    axes = [f"{name}={','.join(map(str, values))}" for name, values in made.get("compare", {}).items()]
    return axes[number] if number < len(axes) else None


def _lora_hashes(made: Mapping[str, Any]) -> str | None:
    """Each LoRA once, though both flags and prompts may have put it on the model."""
    loras = [*made.get("loras", ()), *made.get("prompt_loras", ())]
    return ", ".join({f"{one['name']}: {one['hash']}": None for one in loras}) or None


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _unquote(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except json.JSONDecodeError:
        return value
