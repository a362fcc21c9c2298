"""A picture drawn again: its metadata as a request, whoever wrote it, and how near what is drawn comes to it.

``recall("apple.png")`` finds the model, what was put on it and the pictures that it began from by name, and sees by
their hashes that they are the same. What is not there is an error that says what to give; what is another one, or is
not done here, is a note. What is given stands in for what the picture says. No torch: it is asked before loading.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from diffusion import foreign, prompts
from diffusion.foreign import Found
from diffusion.images import encode, read_texts
from diffusion.names import resolve_sampler
from diffusion.places import LORAS, SINGLE_FILE, find_model, hash_files, is_hash_of, is_hub_id, weight_files
from diffusion.settings import DEFAULTS, GUIDED, PICTURES, Settings, facts_of, sides_of

FIELDS = {item.name for item in fields(Settings)} - {"prompts", "batch_size"}
LEVELS = ("steps", "schedule", "strength", "hires", "hires_strength")
STANDS_IN = {"sigmas": LEVELS, **dict.fromkeys(LEVELS, ("sigmas",))}  # what is given -> what else of the record goes


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How near a picture that was drawn again comes to the first one."""

    path: Path
    levels: int | None  # the largest difference of a channel, of 255; None: they are not of one size
    decibels: float | None  # PSNR; infinite where no pixel differs; None: they are not of one size
    differs: Mapping[str, tuple[Any, Any]]  # what was recorded then, and is so now
    rounding: int = 1  # levels that it makes in the precision that was drawn in, at most

    @property
    def identical(self) -> bool:
        """Whether no pixel differs."""
        return self.levels == 0

    def __str__(self) -> str:
        near = "of another size" if self.decibels is None else f"up to {self.levels} of 255, {self.decibels:.1f} dB"
        what = ", ".join(_told(name, then, now) for name, (then, now) in self.differs.items())
        if self.levels is not None and 0 < self.levels <= self.rounding and not what:
            what = "as rounding does: by the number of threads, --compile, or on a GPU the size of the batch"
        return f"{self.path}: {'identical' if self.identical else f'differs, {near}'}" + (f" ({what})" if what else "")


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """What draws a picture again: ``TextToImage.load(made.model, **made.options).run(made.settings)``."""

    path: Path
    program: str  # who wrote it: diffusion, AUTOMATIC1111, InvokeAI, ComfyUI, kohya
    record: Mapping[str, Any]  # what it says, in the words of our own records
    settings: Settings
    model: str | Path
    options: Mapping[str, Any]  # what else ``TextToImage.load`` is to be told
    changes: tuple[str, ...]  # what was given in place of what it says
    notes: tuple[str, ...]  # what cannot be done here, or is not what it was

    @property
    def loras(self) -> Mapping[str, float]:
        """What is put on the model, and how strongly; what its prompt asks for is put on by the prompt."""
        return self.options["loras"]

    def verify(self, image: Image.Image) -> Verdict:
        """Compare a picture that was drawn again with this one, as its format stores it."""
        levels, decibels = _difference(image, self.path)
        made = json.loads(image.info.get("diffusion", "{}"))
        if self.program != "diffusion":
            differs: dict[str, tuple[Any, Any]] = {"program": (self.program, f"diffusion {made.get('version', '')}")}
        else:
            names = [name for name in {**self.record, **made} if self.record.get(name) != made.get(name)]
            names = [name for name in names if name != "flagged"]  # says what a checker found, and not how it was drawn
            differs = {name: (self.record.get(name), made.get(name)) for name in names}
        rounding = 1 if self.record.get("dtype") == "float32" else 30
        return Verdict(path=self.path, levels=levels, decibels=decibels, differs=differs, rounding=rounding)


def recall(
    path: str | Path,
    *,
    model: str | Path | None = None,
    loras: Mapping[str, float | None] | None = None,
    lora_folder: str | Path | None = None,
    control: str | Path | None = None,
    prediction: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **given: Any,
) -> Recalled:
    """What draws a picture again, from its metadata. Whatever is given stands in for what it says.

    ``given`` are fields of ``Settings``. A model or LoRA is looked for by its name: among the shipped models, from the
    current folder, in ``lora_folder`` (``loras``) and in the Hub's cache, never on the network; a picture to begin from
    beside this one or in the current folder. ``loras`` are put on as well; one that has the name or the hash of a
    recorded one takes its place, and if its strength is None its strength too. ValueError for a picture that says
    nothing, or what cannot be read or found.
    """
    path, folder = Path(path), LORAS if lora_folder is None else Path(lora_folder)
    found = read_record(path)
    record, notes = found.record, list(found.notes)
    try:
        asked = _request(record)
        gone = _overruled(asked, given)
        sources = _pictures(path, asked, given, notes)
        kept = {name: value for name, value in asked.items() if name not in gone}
        options = {
            "device": _device(record) if device is None else device,
            "dtype": record.get("dtype") if dtype is None else dtype,
            "loras": _loras(record.get("loras", ()), loras or {}, folder, notes),
            "control": _control(path, record.get("control"), control, notes),
            "lora_folder": lora_folder,
            "prediction": record.get("prediction") if prediction is None else prediction,
        }
        settings = _settled(kept | given | sources, given)
        _check_tags(settings, record, folder, notes)
        where = _model(record, model, notes)
        changes = tuple(_changes(asked, given, gone, settings))
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: {error}") from None
    except PermissionError:  # says itself what may not be read, and nothing of the record
        raise
    except (TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} cannot be drawn again: its record is damaged ({error})") from None
    return Recalled(
        path=path,
        program=found.program,
        record=record,
        settings=settings,
        model=where,
        options=options,
        changes=changes,
        notes=tuple(notes),
    )


def read_record(path: str | Path) -> Found:
    """What a picture says of how it was made, in the words of our own records. ValueError where it says nothing."""
    texts, size = read_texts(path)
    try:
        ours = json.loads(texts.get("diffusion", ""))
    except (ValueError, RecursionError):
        ours = None  # another program's text under our key
    if isinstance(ours, dict):
        return Found("diffusion", ours)
    try:
        found = foreign.read(texts, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found is None:
        raise ValueError(silence(path))
    return found


def silence(path: str | Path) -> str:
    """What is said of a picture that has no record."""
    return f"{path} says nothing of how it was made: it was never written down, or was taken out"


# --- what is asked for


def _request(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that a record holds; pictures as it holds them, by name and SHA-256."""
    if "compare" in record:
        raise ValueError("it compares pictures that were drawn otherwise each: draw one of them again")
    prompts = record["prompts"] if "prompts" in record else [record["prompt"]] if "prompt" in record else []
    if not isinstance(prompts, list):
        raise ValueError(f"its prompts are no list: {prompts!r}")
    return {"prompts": tuple(prompts)} | {name: record[name] for name in FIELDS if record.get(name) is not None}


def _settled(asked: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """The request. ValueError for one that cannot be met, which does not blame the picture for what is given."""
    try:
        return Settings(**asked)
    except ValueError as error:
        raise ValueError(f"with what is given, {error}" if given else str(error)) from None


def _overruled(asked: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """What of a record has no place beside what is given, or, without guidance, no meaning."""
    gone = set(given).union(*(STANDS_IN.get(name, ()) for name in given))
    if given.get("sampler") is not None and resolve_sampler(given["sampler"])[1] is not None:
        gone.add("schedule")  # the sampler's name says it
    return gone | set(GUIDED if given.get("guidance_scale", asked.get("guidance_scale")) == 1 else ())


def _changes(asked: Mapping[str, Any], given: Mapping[str, Any], gone: set[str], settings: Settings) -> Iterable[str]:
    """What is drawn otherwise than it was; what is not recorded was what it is when it is left out."""
    for name in sorted(gone & asked.keys()):
        if name not in given and asked[name] not in ("", 0):
            yield f"without {name} {_brief(asked[name])}"
        elif name in given and not _is_same(name, given[name], asked[name]):
            yield f"{name} {_brief(given[name])} in place of {_brief(asked[name])}"
    for name in sorted(FIELDS & given.keys() - asked.keys()):
        if settings.gives(name):
            yield f"{name} {_brief(given[name])} in place of {_brief(DEFAULTS[name])}"


def _check_tags(settings: Settings, record: Mapping[str, Any], folder: Path, notes: list[str]) -> None:
    """See that the LoRAs which the prompt will put on are those that it has put on."""
    recorded = {str(one.get("name")): one for one in record.get("prompt_loras", ())}
    if not recorded or settings.literal or settings.prompts != _request(record)["prompts"]:
        return
    named = {
        PurePath(name).name.removesuffix(SINGLE_FILE): name for name, _ in prompts.parse(settings.prompts[0]).loras
    }
    for name, one in recorded.items():
        if name not in named:
            notes.append(f"the LoRA {name} was on the model, and the prompt does not name it: give it by lora")
        elif (at := _at(named[name], folder)) is not None:
            _compare_hash("LoRA", at, one.get("hash"), notes)


# --- what it is drawn with


def _model(record: Mapping[str, Any], given: str | Path | None, notes: list[str]) -> str | Path:
    """The model that is given, or that of the record; a note where it has another hash than it had."""
    name = str(record.get("model", ""))
    where = _find_model(name if given is None else given)
    if where is not None:
        _compare_hash("model", where, record.get("model_hash"), notes)
        return where
    if given is not None:
        return given  # what is not on this machine yet is found, or refused, by what loads it
    what = f"its model {name!r} ({record.get('model_hash') or 'no hash'}) is not here" if name else "it names no model"
    raise ValueError(f"{what}: give model")


def _find_model(name: str | Path) -> Path | None:
    """A shipped model, a folder or file from the current folder, or what the Hub's cache holds of that name."""
    for candidate in (name, f"{name}{SINGLE_FILE}") if name else ():
        try:
            return find_model(candidate)
        except ValueError:
            continue
    if not is_hub_id(name):
        return None
    from diffusion.models.hub import find_on_hub  # slow to import

    try:
        return find_model(find_on_hub(str(name), offline=True))
    except ValueError:
        return None


def _loras(
    recorded: Sequence[Mapping[str, Any]], given: Mapping[str, float | None], folder: Path, notes: list[str]
) -> dict[str, float]:
    """What is put on the model: each LoRA of the record from where it is, and whatever else is given."""
    left, found = dict(given), dict[str, float]()
    for one in recorded:
        name, hashed = str(one.get("name")), str(one.get("hash", ""))
        named = [path for path in left if Path(path).stem == name or (hashed and is_hash_of(Path(path), hashed))]
        at = Path(named[0]) if named else _at(name, folder)
        if at is None:
            raise ValueError(f"the LoRA {name!r} ({hashed or 'no hash'}) is not in {folder}/: give lora or lora_folder")
        strength = left.pop(named[0]) if named else None
        _compare_hash("LoRA", at, hashed, notes)
        found[str(at)] = float(one.get("weight", 1)) if strength is None else strength
    return found | {path: 1.0 if strength is None else strength for path, strength in left.items()}


def _at(name: str, folder: Path) -> Path | None:
    """Where a LoRA of that name is: a picture may name it, but no other folder."""
    plain = PurePath(name.replace("\\", "/")).name
    places = [base / tail for base in (folder, Path()) for tail in (plain, f"{plain}{SINGLE_FILE}") if plain]
    return next((place for place in places if place.exists()), None)


def _control(path: Path, recorded: Any, given: str | Path | None, notes: list[str]) -> str | Path | None:
    """The ControlNet that is given, or one of the recorded name beside the picture or in the current folder."""
    if not isinstance(recorded, Mapping):
        return given
    name = PurePath(str(recorded.get("name"))).name
    at = given if given is not None else next((p for p in (path.parent / name, Path(name)) if p.is_dir()), None)
    if at is None:
        raise ValueError(f"its ControlNet {name!r} ({recorded.get('hash')}) is not here: give control")
    if Path(at).exists():
        _compare_hash("ControlNet", Path(at), recorded.get("hash"), notes)
    return at


def _device(record: Mapping[str, Any]) -> str | None:
    """The CPU if it was drawn there; any other is whichever this machine has."""
    return "cpu" if record.get("device") == "cpu" else None


def _pictures(path: Path, asked: Mapping[str, Any], given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The pictures to begin from: those that are given, with a note if one is another, or those of the record."""
    found, missing = dict[str, Any](), list[str]()
    for name, facts in ((name, dict(asked[name])) for name in PICTURES if name in asked):
        title = PurePath(str(facts.get("name", "")).replace("\\", "/")).name
        recorded, source = str(facts.get("sha256", "")), given.get(name)
        if source is not None:
            sides_of(source)  # ValueError for one that cannot be read
            if recorded and not _same_picture(source, recorded):
                other = f"{name} {_brief(source)} is not the picture {title!r} ({recorded[:10]})"
                notes.append(f"{other} that it was drawn from")
        else:
            here = [place for place in (path.parent / title, Path(title)) if title and place.is_file()]
            source = next((str(place) for place in here if not recorded or _same_picture(place, recorded)), None)
            missing += [_missing(name, title, recorded, here)] if source is None else []
        found[name] = source
    if missing:
        raise ValueError(f"it was drawn from {'; and from '.join(missing)}")
    return found


def _missing(name: str, title: str, recorded: str, here: Sequence[Path]) -> str:
    """What picture is not there, what is in its place, and what to give."""
    other = f", and {here[0]} is another one" if here else ""
    what = f"{title!r} ({recorded[:10] or 'no hash'})" if title else "that has no name"
    return f"a picture {what}, which is not here{other}: give {name}"


# --- whether it is the same


def _is_same(name: str, given: Any, asked: Any) -> bool:
    """Whether what is given is what is recorded; of pictures the record has only the name and the hash."""
    if name in PICTURES and given is not None:
        return _same_picture(given, str(dict(asked).get("sha256", "")))
    return bool(given == asked)


def _same_picture(source: Any, sha256: str) -> bool:
    """By its file, or by its pixels where it was in memory."""
    if facts_of(source)["sha256"] == sha256:
        return True
    if not isinstance(source, str | Path):
        return False
    with Image.open(source) as image:
        return facts_of(image)["sha256"] == sha256


def _compare_hash(what: str, path: Path, recorded: Any, notes: list[str]) -> None:
    """A note where weights are not those that were recorded."""
    if recorded and not is_hash_of(path, str(recorded)):
        found = hash_files(weight_files(path))
        notes.append(f"the {what} {path} has the hash {found}, and the picture was drawn with {str(recorded)[:10]}")


def _difference(image: Image.Image, path: Path) -> tuple[int | None, float | None]:
    """The largest difference of a channel, and PSNR in decibels, of a picture and one that is stored."""
    try:
        with Image.open(path) as opened:
            buffer, stored = io.BytesIO(), np.asarray(opened.convert("RGB"), np.int16)
            encode(image, buffer, str(opened.format), {})
    except OSError as fault:
        raise OSError(f"{path} cannot be read as a picture ({fault})") from None
    drawn = np.asarray(Image.open(buffer).convert("RGB"), np.int16)
    if drawn.shape != stored.shape:
        return None, None
    error = np.abs(drawn - stored)
    mean = float(np.square(error, dtype=np.float64).mean())
    return int(error.max()), math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def _told(name: str, then: Any, now: Any) -> str:
    """What was recorded then and is so now; of repairs, which are sentences, what had to be done and when."""
    if name != "repairs":
        return f"{name} {_brief(then)} -> {_brief(now)}"
    each = (("then", then), ("now", now))
    return ", ".join(f"repaired {when}: {_brief(what)}" if what else f"not repaired {when}" for when, what in each)


def _brief(value: Any) -> str:
    """A value as a line shows it: several prompts with commas between them, nothing as a word."""
    if value is None or value == "":
        return "nothing"
    if isinstance(value, Mapping) and "sha256" in value:
        return f"{value.get('name') or 'a picture without a name'} ({str(value['sha256'])[:10]})"
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
