"""What other programs write into their pictures, in the words of our own records. Nothing is loaded.

AUTOMATIC1111 and those that write as it does (Forge, SD.Next), InvokeAI, ComfyUI and kohya's scripts. A record has the
fields of ``Settings`` and, like our own, ``model``, ``model_hash``, ``loras`` and pictures by name and SHA-256, empty
where nobody wrote them down. Names stay what they are: whether there is such a sampler is not decided here. What has no
meaning here is kept as a note, so that nothing is lost in silence.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from diffusion.parameters import parse_parameters

UNNAMED = {"name": "", "sha256": ""}  # a picture that was drawn from, of which nothing is recorded
Texts = Mapping[str, str]


class Found(NamedTuple):
    """How a picture was made, as far as it says so."""

    program: str
    record: dict[str, Any]
    notes: tuple[str, ...] = ()  # what is recorded, and is not done here


def read(texts: Texts, size: tuple[int, int]) -> Found | None:
    """The record of a picture of a size, from the texts that it carries; None where none of them is known.

    Where it says nothing of a size, that is the picture's.

    ValueError for a text that is damaged, or says more than a record can.
    """
    key = next((key for key in READERS if key in texts), None)
    if key is None:
        return None
    try:
        found = READERS[key](texts)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"its {key!r} is damaged, or of a program that is not known here") from None
    return found._replace(record={"width": size[0], "height": size[1]} | found.record)


def shown(texts: Texts) -> dict[str, Any]:
    """What programs have written, as it stands; JSON as what it holds."""
    return {key: _held(texts[key]) for key in TEXTS if key in texts}


def told(extras: Mapping[str, Any]) -> tuple[str, ...]:
    """One note of all that is recorded and has no meaning here."""
    kept = [(name, value) for name, value in extras.items() if value not in (None, "", False, [], {})]
    texts = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for name, value in kept]
    found = ", ".join(f"{name} {text if len(text) <= 60 else f'{text[:57]}...'}" for name, text in texts)
    return (f"recorded, and not done here: {found}",) if found else ()


# --- AUTOMATIC1111

NUMBERS = {  # its name of a number -> ours
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    **dict.fromkeys(("CFG Rescale", "CFG rescale"), "guidance_rescale"),
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    **dict.fromkeys(("Variation seed strength", "Variation strength"), "variation_strength"),
    "Mask blur": "mask_blur",
    **dict.fromkeys(("Hires upscale", "Hires scale"), "hires"),
    "To seed": "to_seed",
    "Share": "share",
}
WORDS = {"Model": "model", "Model hash": "model_hash", "To prompt": "to_prompt"}
AUTOMATIC = {"dpmpp2m": "karras", "dpmppsde": "karras", "dpmpp2msde": "exponential", "dpmpp3msde": "exponential"}
SCHEDULES = {"normal": "discrete", "simple": "trailing"}  # others' name of a schedule that has another one here -> ours
SAID = {  # what changes no pixel, or says again what something else has said
    *("Version", "App", "Backend", "Pipeline", "Operations", "Parser", "Comment", "User", "Created Date", "Batch"),
    *("Index", "Batch size", "Batch pos", "RNG", "ControlNet Enabled", "Init image size", "Init image hash", "Frames"),
    *("Downcast alphas_cumprod", "Pad conds", "Second pass", "Hires resize", "Hires size", "Hashes"),
}
NESTED = re.compile(r",?\s*(Hashes|Civitai resources|Civitai metadata):\s*(\{.*?\}|\[.*?\])(?=,|$)")


def _automatic1111(texts: Texts) -> Found:
    text = texts["parameters"].strip()
    if text.startswith("{"):
        raise ValueError("its parameters are JSON of a program that is not known here, and not AUTOMATIC1111's text")
    nested = {match[1]: match[2] for match in NESTED.finditer(text)}
    values = parse_parameters(NESTED.sub("", text))
    record: dict[str, Any] = {"prompt": values.pop("prompt"), "negative_prompt": values.pop("negative_prompt")}
    ours = values.get("Version", "").startswith("diffusion ")
    record |= {field: _number(label, values.pop(label)) for label, field in NUMBERS.items() if label in values}
    record |= {field: values.pop(label) for label, field in WORDS.items() if label in values}
    record |= _sides(values.pop("Size", "")) | _sampler(values)
    record |= _again(values, record) | {"tile": "xy" if values.pop("Tiling", "") == "True" else ""}
    for label, field in (("CFG interval", "guidance_interval"), ("Sigmas", "sigmas")):
        if label in values:
            record[field] = [_number(label, part) for part in values.pop(label).split(",")]
    record["prompt_loras"] = _hashed(values.pop("Lora hashes", ""), nested.get("Hashes", ""))
    notes = list(told({name: value for name, value in values.items() if name not in SAID}))
    if values.get("RNG", "GPU") != "CPU":
        notes.append("its noise was drawn on a GPU: drawn on the CPU, the same settings give another picture")
    if re.search(r"\bAND\b|<(?!lora:)\w+:[^<>]*>", record["prompt"]):
        notes.append("AND and tags other than <lora:...> are text here")
    return Found("diffusion" if ours else "AUTOMATIC1111", record, tuple(notes))


def _sampler(values: dict[str, str]) -> dict[str, str]:
    """The sampler, and the schedule where it is no part of its name."""
    if "Sampler" not in values:
        return {}
    sampler, schedule = values.pop("Sampler"), values.pop("Schedule type", None)
    ends = sampler.lower().endswith(("karras", "exponential"))
    if schedule is None:  # before 1.9 it was the model's own unless the sampler's name had it
        return {"sampler": sampler} if ends else {"sampler": sampler, "schedule": "discrete"}
    if schedule == "Automatic":
        return {"sampler": sampler, "schedule": AUTOMATIC.get(_plain(sampler), "discrete")}
    return {"sampler": sampler, "schedule": SCHEDULES.get(_plain(schedule), schedule)}


def _again(values: dict[str, str], record: dict[str, Any]) -> dict[str, Any]:
    """Drawn larger once more, or from a picture: it is the denoising strength of either."""
    larger, width = _sides(values.get("Hires resize", "")).get("width", 0), record.get("width", 0)
    times = record.get("hires") or (larger / width if width else 0)
    strength = values.pop("Denoising strength", None)
    if values.get("Hires steps") in ("0", str(record.get("steps"))):  # as many as before: so it is here
        del values["Hires steps"]
    if strength is None:
        return {}
    share = _number("Denoising strength", strength)
    if times > 1:
        return {"hires": times, "hires_strength": share}
    record.pop("hires", None)
    if "First pass size" in values:  # of old: the picture was drawn smaller first, by a rule of that time
        return {}
    mask = {"mask": UNNAMED} if "mask_blur" in record else {}
    return {"strength": share, "init_image": UNNAMED} | mask


def _hashed(listed: str, hashes: str) -> list[dict[str, str]]:
    """LoRAs of a prompt by name and hash: ``a: 0123, b: 4567``, or keys ``lora:a`` of a JSON object."""
    found = {name.strip(): value.strip() for name, value in re.findall(r"([^,]+):([^,:]*)", listed)}
    others = {} if found else _held(hashes)
    if isinstance(others, dict):
        found |= {key[5:]: str(value) for key, value in others.items() if key.startswith("lora:")}
    return [{"name": name, "hash": value} for name, value in found.items()]


# --- InvokeAI

INVOKED = {  # its name of a value -> ours
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "cfg_scale": "guidance_scale",
    "cfg_rescale_multiplier": "guidance_rescale",
    **{name: name for name in ("width", "height", "seed", "steps", "strength")},
}
INVOKED_SAID = {"generation_mode", "rand_device", "app_version", "_canvas_objects", "canvas_v2_metadata"}
COMPEL = re.compile(r"[\w)\"][+-]{1,4}(?=[\s,)]|$)|\)\d*\.?\d+")


def _invokeai(texts: Texts) -> Found:
    values = _object(texts["invokeai_metadata"], "invokeai_metadata")
    record = {ours: values.pop(theirs) for theirs, ours in INVOKED.items() if values.get(theirs) is not None}
    record |= _scheduler(values.pop("scheduler", None))
    sides = "".join(axis for axis in "xy" if values.pop(f"seamless_{axis}", False))
    record |= {"tile": sides, "clip_skip": (values.pop("clip_skip", None) or 0) + 1}
    model = _invoked(values.pop("model", None))
    record |= {"model": model["name"], "model_hash": model["hash"]}
    loras = values.pop("loras", None) or ()
    named = [(_invoked(one.get("model") or one.get("lora")), one.get("weight", 1.0)) for one in loras]
    record["loras"] = [lora | {"weight": weight} for lora, weight in named]
    begun = values.pop("init_image", None)
    if begun or "img2img" in str(values.get("generation_mode")):
        record["init_image"] = UNNAMED | {"name": str(begun or "")}
    if values.get("rand_device") not in (None, "cpu"):
        values["noise drawn on"] = values["rand_device"]
    for name in ("positive_style_prompt", "negative_style_prompt"):
        if values.get(name) == record.get(name.replace("positive_style_", "").replace("style_", "")):
            values.pop(name, None)  # what SDXL's second encoder reads is what the first one does
    return _literal(record, {name: values[name] for name in values if name not in INVOKED_SAID})


def _invokeai_2(texts: Texts) -> Found:
    whole = _object(texts["sd-metadata"], "sd-metadata")
    values = dict(whole.get("image") or {})
    prompts = values.pop("prompt", "")
    text = prompts if isinstance(prompts, str) else " ".join(str(dict(one).get("prompt", "")) for one in prompts)
    record = {ours: values.pop(theirs) for theirs, ours in INVOKED.items() if values.get(theirs) is not None}
    record |= _in_brackets(text) | _scheduler(values.pop("sampler", None))
    record |= {"tile": "xy" if values.pop("seamless", False) else ""}
    record |= {"model": whole.get("model_weights", ""), "model_hash": str(whole.get("model_hash", ""))}
    if values.pop("type", "txt2img") == "img2img":
        record["init_image"] = UNNAMED
    extras = {name: value for name, value in values.items() if name not in ("orig_hash", "mask_hash")}
    return _literal(record, extras)


DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "guidance_scale", "f": "strength"}


def _dream(texts: Texts) -> Found:
    """``"a cat" -s 50 -S 1 -W 512 -H 512 -C 7.5 -A k_lms``, with or without blanks."""
    match = re.match(r'\s*"(.*)"(.*)$', texts["Dream"], re.DOTALL)
    if match is None:
        raise ValueError("its Dream text is not a prompt in quotes and flags")
    values = dict(re.findall(r"(?:^|\s)-(\w)\s*([^\s-]\S*)?", match[2]))
    record: dict[str, Any] = _in_brackets(match[1]) | _scheduler(values.pop("A", None))
    record |= {ours: _number(f"-{flag}", values.pop(flag)) for flag, ours in DREAM.items() if flag in values}
    if "I" in values:
        record["init_image"] = UNNAMED | {"name": values.pop("I")}
    extras = {f"-{flag}": value or "set" for flag, value in values.items() if flag not in "bndg"}
    return _literal(record, extras)


def _literal(record: dict[str, Any], extras: Mapping[str, Any]) -> Found:
    """A prompt of another prompt language: to the letter, but for weights that its signs would be.

    A strength is written down whatever was done, and means something beside a picture to begin from.
    """
    signs = COMPEL.findall(f"{record.get('prompt', '')} {record.get('negative_prompt', '')}")
    notes = (f"weights in InvokeAI's way ({', '.join(signs)}) are text here",) if signs else ()
    kept = {name: value for name, value in record.items() if name != "strength" or "init_image" in record}
    return Found("InvokeAI", kept | {"literal": True}, (*told(extras), *notes))


def _in_brackets(text: str) -> dict[str, str]:
    """What InvokeAI 2 kept away from stands in square brackets in the prompt."""
    away = re.findall(r"\[([^\[\]]*)\]", text)
    return {"prompt": re.sub(r"\s*\[[^\[\]]*\]", "", text).strip(), "negative_prompt": " ".join(away).strip()}


def _scheduler(name: Any) -> dict[str, str]:
    """``dpmpp_2m_k`` and ``k_euler_a`` as a sampler and a schedule."""
    if not isinstance(name, str):
        return {}
    karras = name.endswith("_k")
    sampler = re.sub(r"^k_|_k$", "", name)
    return {"sampler": sampler, "schedule": "karras" if karras else "discrete"}


def _invoked(model: Any) -> dict[str, Any]:
    """Name and hash of a model; of the hashes only SHA-256 can be compared here."""
    named = model if isinstance(model, dict) else {"name": model or ""}
    kind, _, digest = str(named.get("hash") or "").rpartition(":")
    return {"name": str(named.get("model_name") or named.get("name") or ""), "hash": digest if kind == "sha256" else ""}


# --- kohya's scripts

KOHYA_NUMBERS = {"seed": "seed", "steps": "steps", "scale": "guidance_scale"}
KOHYA_SAID = ("raw-prompt", "original-")  # how the names begin of what something else has said


def _kohya(texts: Texts) -> Found:
    """A text for each value. Neither the model nor what was put on it is among them; the size is the picture's."""
    values = {name: texts[name] for name in KOHYA if name in texts}
    record: dict[str, Any] = {"prompt": values.pop("prompt"), "negative_prompt": values.pop("negative-prompt", "")}
    record |= {ours: _number(name, values.pop(name)) for name, ours in KOHYA_NUMBERS.items() if name in values}
    record |= _scheduler(values.pop("sampler", None))
    extras = {name: value for name, value in values.items() if not name.startswith(KOHYA_SAID) and value != "0"}
    return Found("kohya", record, told(extras))


KOHYA = (
    *("prompt", "negative-prompt", "seed", "sampler", "steps", "scale", "negative-scale", "clip-prompt", "raw-prompt"),
    *("original-height", "original-width", "original-height-negative", "original-width-negative"),
    *("crop-top", "crop-left"),
)

# --- ComfyUI

PLAIN_NODES = {  # a graph of nothing but these can be read
    *("KSampler", "CLIPTextEncode", "EmptyLatentImage", "CheckpointLoaderSimple", "VAEDecode", "SaveImage"),
    *("PreviewImage", "CLIPSetLastLayer", "LoraLoader", "LoraLoaderModelOnly", "VAEEncode", "LoadImage"),
    *("Note", "MarkdownNote", "PrimitiveNode", "SaveAnimatedWEBP"),
}
Graph = Mapping[str, Mapping[str, Any]]


def _comfyui(texts: Texts) -> Found:
    graph: Graph = _object(texts["prompt"], "prompt")
    strange = sorted({str(node["class_type"]) for node in graph.values()} - PLAIN_NODES)
    samplers = [node for node in graph.values() if node["class_type"] == "KSampler"]
    if strange or len(samplers) != 1:
        why = f"has {', '.join(strange)}" if strange else f"has {len(samplers)} KSampler nodes"
        raise ValueError(f"ComfyUI's graph is not simple enough to be read: it {why}; give the prompt and settings")
    drawn = samplers[0]["inputs"]
    record = dict[str, Any](prompt=_text(graph, drawn, "positive"), negative_prompt=_text(graph, drawn, "negative"))
    record |= {"seed": drawn["seed"], "steps": drawn["steps"], "guidance_scale": drawn["cfg"]}
    sampler = str(drawn["sampler_name"]).removesuffix("_gpu").removesuffix("_bh2")
    record |= {"sampler": sampler, "schedule": SCHEDULES.get(str(drawn["scheduler"]), drawn["scheduler"])}
    record |= _encoder(graph, drawn) | _weights(graph, drawn)
    begun, extras = _link(graph, drawn, "latent_image"), {}
    if begun["class_type"] == "EmptyLatentImage":
        extras = {"batch_size": count} if (count := begun["inputs"].get("batch_size", 1)) != 1 else {}
        record |= {name: begun["inputs"][name] for name in ("width", "height")}
        extras |= {"denoise": drawn["denoise"]} if drawn.get("denoise", 1) != 1 else {}
    else:
        name = _link(graph, begun["inputs"], "pixels")["inputs"]["image"]
        record |= {"init_image": UNNAMED | {"name": str(name)}, "strength": drawn.get("denoise", 1)}
    return Found("ComfyUI", record, told(extras))


def _link(graph: Graph, inputs: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The node that an input comes from. ValueError for an input that is none."""
    try:
        return graph[str(inputs[name][0])]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"ComfyUI's graph has nothing for {name}") from None


def _text(graph: Graph, inputs: Mapping[str, Any], name: str) -> str:
    """A prompt as we write it: square brackets are no signs there."""
    node = _link(graph, inputs, name)
    text = node["inputs"].get("text")
    if node["class_type"] != "CLIPTextEncode" or not isinstance(text, str):
        raise ValueError(f"ComfyUI's graph is not simple enough to be read: its {name} prompt is no plain text")
    return re.sub(r"(?<!\\)([\[\]])", r"\\\1", text)


def _chain(graph: Graph, inputs: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """The nodes that something runs through, from its end to its beginning."""
    for _ in graph:
        node = _link(graph, inputs, name)
        yield node
        inputs = node["inputs"]
        if name not in inputs:
            return
    raise ValueError("ComfyUI's graph goes in a circle")


def _encoder(graph: Graph, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Which layer of the text encoder is read: -1 is the last one."""
    chain = _chain(graph, _link(graph, drawn, "positive")["inputs"], "clip")
    found = [node["inputs"]["stop_at_clip_layer"] for node in chain if node["class_type"] == "CLIPSetLastLayer"]
    return {"clip_skip": -found[0]} if found else {}


def _weights(graph: Graph, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint, and the LoRAs between it and the sampler."""
    *loras, loader = _chain(graph, drawn, "model")
    inputs = [node["inputs"] for node in reversed(loras)]
    named = [{"name": _stem(one["lora_name"]), "weight": one["strength_model"], "hash": ""} for one in inputs]
    return {"model": _stem(loader["inputs"].get("ckpt_name", "")), "loras": named}


# --- values


def _prompt(texts: Texts) -> Found:
    """Two programs call a text ``prompt``: ComfyUI writes a graph, and kohya words."""
    return (_comfyui if texts["prompt"].lstrip().startswith("{") else _kohya)(texts)


READERS: dict[str, Callable[[Texts], Found]] = {
    "invokeai_metadata": _invokeai,
    "sd-metadata": _invokeai_2,
    "Dream": _dream,
    "parameters": _automatic1111,
    "prompt": _prompt,
}
TEXTS = (*READERS, *KOHYA[1:], "workflow", "invokeai_workflow", "invokeai_graph")  # what belongs to a picture's making


def _held(text: str) -> Any:
    try:
        return json.loads(text) if text.lstrip().startswith("{") else text
    except (ValueError, RecursionError):
        return text


def _object(text: str, what: str) -> dict[str, Any]:
    found = _held(text)
    if not isinstance(found, dict):
        raise ValueError(f"its {what} is damaged JSON, or no JSON object")
    return found


def _number(name: str, text: str) -> int | float:
    try:
        return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else float(text)
    except ValueError:
        raise ValueError(f"its {name} {text!r} is no number") from None


def _sides(text: str) -> dict[str, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    return {} if found is None else {"width": int(found[1]), "height": int(found[2])}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


def _stem(name: Any) -> str:
    """A file of another machine, whose folders may be written with either slash, by its name."""
    return PurePath(str(name).replace("\\", "/")).stem
