"""Settings as text writes them: cells of a table, and options of a line as other programs write theirs. No torch.

A line is AUTOMATIC1111's (``--prompt "a cat" --steps 20``, of "prompts from file or textbox") or kohya's (``a cat --n
blurry --s 20``, of gen_img and of sample prompts). What is known there and means nothing here is refused by name.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from diffusion import settings, values
from diffusion.names import did_you_mean
from diffusion.settings import Settings

FIELDS = tuple(item.name for item in fields(Settings) if item.name != "prompts")
ALIASES = {  # how people write them -> the field
    **{name: name for name in ("prompt", "size", "output", "model", *FIELDS)},
    **dict.fromkeys(("cfg", "cfg_scale"), "guidance_scale"),
    **dict.fromkeys(("negative", "n"), "negative_prompt"),
    "sampler_name": "sampler",
    "num_inference_steps": "steps",
}
READERS: Mapping[str, Callable[[str], Any]] = {  # field -> what reads it from text; any other is text
    **dict.fromkeys(settings.WHOLE, values.read_whole),
    **dict.fromkeys(settings.NUMBERS, values.read_number),
    **dict.fromkeys(("literal", "long_prompts"), values.read_switch),
    "batch_size": values.read_whole_or_auto,
    "size": values.read_size,
    "sigmas": values.read_numbers,
    "guidance_interval": values.read_interval,
    "extend": values.read_sides,
}
A1111 = {  # its names that are not ours
    "outpath_samples": "output",
    "sd_model": "model",
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "tiling": "tile",
    "n_iter": "n_iter",
}
KOHYA = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
    "t": "strength",
    "ss": "sampler",
    "cn": "control_image",
}
IDLE = {  # option -> the values that ask for what happens anyway
    "restore_faces": ("false",),
    "do_not_save_samples": ("false",),
    "do_not_save_grid": ("true",),
    "seed_resize_from_h": ("0", "-1"),
    "seed_resize_from_w": ("0", "-1"),
    "subseed": ("-1",),
    "subseed_strength": ("0", "0.0"),
}
NO_SIZES, NO_SHRINK = "SDXL is told the size that is drawn, cut nowhere", "what it does is not known here"
REFUSED = {  # option -> what to do instead, or why there is nothing to do
    "outpath_grids": "no grid is made of a row: --grid makes one of all",
    "prompt_for_display": "a picture tells the prompt that it was drawn from",
    "styles": "styles are not known here: write them into the prompt",
    "sampler_index": "name it: --sampler_name",
    "restore_faces": "faces are not restored",
    "do_not_save_samples": "every picture is written",
    "do_not_save_grid": "no grid is made of a row: --grid makes one of all",
    "seed_resize_from_h": "noise is of the size that is drawn",
    "seed_resize_from_w": "noise is of the size that is drawn",
    "nl": "the negative prompt has no scale of its own",
    "am": "write <lora:name:0.8> into the prompt",
    "c": "no second prompt leads by CLIP",
    "f": "name it: --output",
    "g": "it is of distilled guidance: --l is the guidance scale",
    **dict.fromkeys(("ow", "oh", "nw", "nh", "ct", "cl"), NO_SIZES),
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr", "glt", "glr", "gls", "gle"), NO_SHRINK),
    **dict.fromkeys(("ctr", "rcfg", "fs"), NO_SHRINK),
    **dict.fromkeys(("lora", "loras"), "write <lora:name:0.8> into the prompt, or give --lora for all rows"),
    **dict.fromkeys(("device", "dtype", "control"), "it is of the whole call: give it as a flag"),
}
OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def field_of(name: str, known: Mapping[str, str] = ALIASES) -> str:
    """The field that a name stands for. ValueError for one that stands for none."""
    plain = name.strip().lower().replace("-", "_")
    if plain in known:
        return known[plain]
    if plain in REFUSED:
        raise ValueError(f"{name!r} is not supported: {REFUSED[plain]}")
    raise ValueError(f"unknown name {name!r}{did_you_mean(plain, known)}")


def named(name: str, value: Any, known: Mapping[str, str] = ALIASES) -> tuple[str, Any]:
    """The field that a name stands for, and the value. ValueError for an ``n`` that is meant as elsewhere: how many."""
    field = field_of(name, known)
    if name.strip().lower() == "n" and re.fullmatch(r"\s*[+-]?\d+\s*", str(value)):
        raise ValueError("n is the negative prompt here: num_images is how many pictures")
    return field, value


def read_text(field: str, text: str) -> Any:
    """A field's value as JSON would hold it, from text. ValueError if it is none."""
    try:
        return READERS.get(field, str)(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def settled(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Field -> value, each given once; a size as its two sides, and -1 as a seed that is drawn."""
    found = dict[str, Any]()
    for field, value in pairs:
        for name, part in _sides(value) if field == "size" else ((field, value),):
            if name in found:
                raise ValueError(f"{name} is given twice: give it once")
            found[name] = None if (name, part) == ("seed", -1) else part
    return found


def read_line(line: str) -> dict[str, Any]:
    """A prompt and the options behind it. ValueError for an option that is unknown, or means nothing here."""
    written = _quoted(line) if OPTION.match(line) else _plain(line)
    known = ALIASES | A1111 | KOHYA
    used = [(name, text) for name, text in written if text.lower() not in IDLE.get(name.lower(), ())]
    fields = [named(name, text, known) for name, text in used]
    return _counted(settled((field, _of_line(field, text)) for field, text in fields))


def _plain(line: str) -> list[tuple[str, str]]:
    """``a cat --n blurry --s 20``: a value ends where the next option begins."""
    prompt, *options = OPTION.split(line)
    parts = [(*option.split(maxsplit=1), "")[:2] for option in options]
    return [("prompt", prompt.strip()), *((name, text.strip()) for name, text in parts)]


def _quoted(line: str) -> list[tuple[str, str]]:
    """``--prompt "a cat" --steps 20``: a value may be quoted as a shell has it, and words add up to one."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"its quotes do not match ({str(error).lower()}): quote a value that holds one") from None
    found = list[tuple[str, list[str]]]()
    for word in words:
        if OPTION.match(word) and " " not in word:
            found.append((word[2:], []))
        elif not found:
            raise ValueError(f'{word!r} is no option: write --prompt "a red apple"')
        else:
            found[-1][1].append(word)
    return [(name, " ".join(parts)) for name, parts in found]


def _of_line(field: str, text: str) -> Any:
    """What a line's option says; AUTOMATIC1111 knows a switch where a tile has directions, and a folder of pictures."""
    if field == "tile" and text.lower() in ("true", "false"):
        return "xy" if values.read_switch(text) else ""
    return values.read_whole(text) if field == "n_iter" else read_text(field, text)


def _counted(found: dict[str, Any]) -> dict[str, Any]:
    """AUTOMATIC1111 draws ``n_iter`` batches of ``batch_size`` pictures: so many are wanted."""
    batches, size = found.pop("n_iter", None), found.get("batch_size")
    size = None if size == "auto" else size  # which is ours, and says nothing of how many
    if batches is None and size is None:
        return found
    if "num_images" in found:
        raise ValueError("num_images and n_iter or batch_size say the same thing in a line: give one of them")
    return found | {"num_images": (1 if batches is None else batches) * (1 if size is None else size)}


def _sides(size: Any) -> Iterable[tuple[str, Any]]:
    given = values.read_size(size) if isinstance(size, str) else size
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(f"size {size!r} is not WIDTHxHEIGHT, for instance 128x64")
    return zip(("width", "height"), given, strict=True)
