"""The same picture under each combination of the values of one or two settings: its requests, and their labels.

Nothing slow is imported: a comparison is checked before any library is loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from diffusion.names import unknown
from diffusion.settings import Settings

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


def variants(base: Settings, axes: Mapping[str, Iterable[Any]]) -> tuple[list[Settings], list[str], list[str]]:
    """One request for each combination of the values of one or two fields, row by row; labels of columns and of rows.

    The first field goes across, the second one down; all have the seed of ``base``, so that they compare. ValueError
    for a field that is none, and for one that says how many pictures there are.
    """
    values = [listed(name, given) for name, given in axes.items()]
    names = [COMPARED.get(name.replace("-", "_"), name.replace("-", "_")) for name in axes]
    for written, name in zip(axes, names, strict=True):
        if name not in COMPARED.values():
            raise unknown("field to compare", written, dict.fromkeys(COMPARED.values()))
        if name != "seed" and base.gives(name):
            raise ValueError(f"{name} is compared: leave {getattr(base, name)!r} out")
    if len(set(names)) != len(axes) or not 1 <= len(axes) <= 2:
        raise ValueError("compare one or two different fields, each with its values: steps=10,20 cfg=3,5")
    if base.count != 1:
        raise ValueError("compare draws one picture of each kind: give one prompt, and neither num_images nor frames")
    across, down = [*values, [None]][:2]
    made = [
        replace(base.seeded(), **dict(zip(names, pair, strict=False)))
        for pair in ((one, other) for other in down for one in across)
    ]
    labels = [[f"{name} {label(value)}" for value in given] for name, given in zip(axes, values, strict=True)]
    return made, labels[0], labels[1] if len(labels) > 1 else []


def listed(name: str, given: Iterable[Any]) -> list[Any]:
    """Those of one field to compare: at least one."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is compared over several values: give a list, not {given!r}")
    found = [value.item() if hasattr(value, "item") else value for value in given]  # of arrays Python's own
    if not found:
        raise ValueError(f"{name} is compared over no value: give at least one")
    return found


def label(value: Any) -> str:
    """A value as a label shows it."""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):g}"
    return '""' if value == "" else str(value)
