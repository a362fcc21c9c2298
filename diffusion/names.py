"""Names that people use for samplers, schedules, devices and dtypes, and what to say about a wrong one. No torch."""

import difflib
import re
from collections.abc import Iterable

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
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v_prediction", "v": "v_prediction"}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short name -> torch's


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``known``: it names all of them, and the nearest one."""
    known = list(known)
    return ValueError(f"unknown {kind} {name!r}, must be one of {', '.join(known)}{did_you_mean(name, known)}")


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


def resolve_prediction(name: str | None) -> str | None:
    """diffusers' name of what a network puts out, from it or its short name. ValueError for any other."""
    if name is not None and name not in PREDICTIONS:
        raise unknown("prediction", name, PREDICTIONS)
    return None if name is None else PREDICTIONS[name]


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


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
