"""What the page does, without a page: a form becomes a request, pictures, and the line that draws them again."""

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from queue import Empty, SimpleQueue
from typing import Any

from PIL import Image

from diffusion.images import (
    DEFAULT_FOLDER,
    FORMATS,
    atomic,
    encode,
    is_black,
    parse_output,
    read_metadata,
    refuse_black,
    save_image,
    slugify,
)
from diffusion.names import DTYPES
from diffusion.pipeline import Progress, TextToImage
from diffusion.places import title_of
from diffusion.records import Recalled, read_record, recall
from diffusion.settings import ANSWERS, PICTURES, Defaults, Settings
from diffusion.sheets import make_grid
from diffusion.values import SIDES, Source, read_interval, read_number, read_whole

INPUTS = "inputs"  # in the folder of what is drawn: what was uploaded, in files that a command line can name
PATIENCE = 0.2  # seconds between two looks at whether a drawing that waits is to be stopped


@dataclass(frozen=True, kw_only=True)
class Form:
    """The fields of the page as they are filled in; None and an empty text are the model's own, or nothing."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: str = ""  # as text: the numbers of a browser are exact up to 2^53
    num_images: int | None = 1
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: str = ""
    sampler: str | None = None
    schedule: str | None = None
    width: int | None = None
    height: int | None = None
    strength: str = ""
    init_image: Source | None = None
    mask: Source | None = None

    @classmethod
    def of(cls, own: Defaults) -> "Form":
        """The fields before anybody has filled them in: what a model's recipe says."""
        names = ("width", "height", "steps", "guidance_scale", "sampler", "schedule")
        given: dict[str, Any] = {name: getattr(own, name) for name in names}
        return cls(**given, guidance_interval=written(own.guidance_interval))

    @classmethod
    def asking(cls, wanted: Settings) -> "Form":
        """The fields that make a request. ValueError for a request that they cannot make."""
        names = {item.name for item in fields(cls)} - {"prompt"}
        others = [item.name for item in fields(Settings) if item.name not in {*names, "prompts", *ANSWERS}]
        others += [name for name, own in ANSWERS.items() if getattr(wanted, name) != own]
        beyond = [name for name in others if wanted.gives(name)] + ["several prompts"] * (len(wanted.prompts) > 1)
        if beyond:
            raise ValueError(f"the page has no field for {', '.join(beyond)}: take the command line")
        texts = {name: written(getattr(wanted, name)) for name in READ}
        return cls(prompt=wanted.prompts[0], **{name: getattr(wanted, name) for name in names} | texts)

    def wanted(self) -> Settings:
        """The request. ValueError for one that cannot be met."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "prompt"}
        given |= {name: _read(name, given[name], how) for name, how in READ.items()}
        prompts = (self.prompt,) if self.prompt.strip() else ()
        return Settings(prompts=prompts, **{name: value for name, value in given.items() if value is not None})


READ: dict[str, Callable[[str], Any]] = {  # fields that are empty where they say nothing
    "seed": read_whole,
    "guidance_interval": read_interval,
    "strength": read_number,
}


@dataclass(frozen=True)
class Seen:
    """How far a drawing is: its steps, what it looks like from the first one on, and the files that it has written."""

    done: int
    total: int
    looks: Image.Image | None
    files: Sequence[Path]


@dataclass(kw_only=True)
class Studio:
    """A model that draws into a folder, one request at a time; name, loras and device are as flags gave them."""

    model: TextToImage
    name: str = "emoji"
    loras: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None
    output: Path = Path(DEFAULT_FOLDER)
    closed: bool = False  # from then on every drawing ends at its next step
    _hand: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "drawing"))

    @property
    def title(self) -> str:
        """What the model is called, and what was put on it."""
        return _named(title_of(self.model.model.path or Path(self.name)), _weights(self.loras))

    # --- drawing

    def draw(self, form: Form, stopped: Callable[[], bool] = lambda: False) -> Iterator[Seen]:
        """Draw what a form asks for, step by step, until it is done or ``stopped``.

        The work goes on in one thread of its own, whoever looks on, so that a page which is closed meanwhile leaves
        nothing in the middle. ValueError for a request that cannot be met.
        """
        seen: SimpleQueue[Seen | None] = SimpleQueue()
        work = self._hand.submit(self._work, form, lambda: self.closed or stopped(), seen.put)
        while (one := self._next(seen, work, stopped)) is not None:
            yield one
        if not work.cancelled():
            work.result()

    def _next(self, seen: "SimpleQueue[Seen | None]", work: Future[None], stopped: Callable[[], bool]) -> Seen | None:
        """What is to be seen next; None at the end, for what still waits its turn as soon as it is stopped."""
        while True:
            try:
                return seen.get(timeout=PATIENCE)
            except Empty:
                if (self.closed or stopped()) and work.cancel():
                    return None

    def _work(self, form: Form, stopped: Callable[[], bool], tell: Callable[[Seen | None], None]) -> None:
        files: list[Path] = []
        try:
            wanted = self._kept(form.wanted().seeded())
            plan = self.model.plan(wanted)
            total, before = plan.full.total_steps * plan.full.count, 0
            if stopped():
                return  # while it waited
            tell(Seen(0, total, None, ()))
            for step in self.model.run(wanted):
                files += self._saved(step)
                done = before + step.index * len(step.pictures)
                before = done if step.images else before
                tell(Seen(done, total, make_grid(step.images or step.preview()), tuple(files)))
                if stopped():
                    break
        finally:
            tell(None)

    def _saved(self, step: Progress) -> Iterator[Path]:
        """The files of a batch, once it is done. FloatingPointError at the end for those that came out black."""
        black = list[int]()
        for image, shot in zip(step.images, step.pictures, strict=True) if step.images else ():
            if is_black(image):
                black.append(shot.seed)
            else:
                yield save_image(image, parse_output(f"{self.output}/"), seed=shot.seed, slug=slugify(shot.prompt))
        refuse_black(black)

    def _kept(self, wanted: Settings) -> Settings:
        """The same request with its pictures in files, which outlive the page."""
        pictures = {name: getattr(wanted, name) for name in PICTURES}
        files: dict[str, Any] = {
            name: self._file(one) for name, one in pictures.items() if isinstance(one, Image.Image)
        }
        return replace(wanted, **files)

    def _file(self, picture: Image.Image) -> Path:
        """Named by what it shows: one picture is one file, however often it is drawn from."""
        shown = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()
        path = self.output / INPUTS / f"{shown[:16]}.png"
        if not path.is_file():
            with atomic(path) as stream:
                encode(picture, stream, "PNG", {})
        return path

    def close(self, patience: float) -> bool:
        """End every drawing at its next step; whether they ended within so many seconds."""
        self.closed = True
        return bool(wait([self._hand.submit(bool)], patience).done)

    # --- what was drawn

    def pictures(self, most: int) -> list[Path]:
        """The newest pictures of the folder, the newest first."""
        found = self.output.iterdir() if self.output.is_dir() else ()
        drawn = [path for path in found if path.suffix.lower() in FORMATS and not path.name.startswith(".")]
        files = [path for path in drawn if path.is_file()]
        return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)[:most]

    def recalled(self, path: Path) -> Recalled:
        """What a picture was asked for with, as far as this model draws it. ValueError where nothing says so."""
        record = read_record(path).record
        kept = {name: record[name] for name in PICTURES if isinstance(record.get(name), Mapping)}
        named = {name: self.output / INPUTS / PurePath(str(facts.get("name"))).name for name, facts in kept.items()}
        given = {name: str(file) for name, file in named.items() if file.is_file()}
        return recall(path, model=self.name, loras=self.loras, **given)

    def command(self, path: Path, count: int = 1) -> str:
        """The line that draws a picture again, and those of its call that came after it, ``count`` in all.

        ValueError for one that this page's model does not draw.
        """
        made = self.recalled(path)
        self._refuse_others(made.record)
        wanted = replace(made.settings, num_images=count)
        machine = [*flag("model", self.name), *flag("dtype", _short_dtype(made))]
        machine += [word for lora, weight in self.loras.items() for word in flag("lora", f"{lora}:{weight!r}")]
        machine += [] if self.device is None else flag("device", self.device)
        machine += [] if self.output == Path(DEFAULT_FOLDER) else flag("output", f"{self.output}/")
        return shlex.join(["python", "generate.py", *words(wanted), *machine])

    def _refuse_others(self, record: Mapping[str, Any]) -> None:
        """ValueError for what another model has drawn, or this one with something else on it."""
        ours = (self.model.model_hash, _weights(self.loras), self.model.prediction)
        theirs = {str(one.get("name")): one.get("weight") for one in record.get("loras", ())}
        if ours != (record.get("model_hash"), theirs, record.get("prediction")) or "control" in record:
            model = _named(str(record.get("model", "a model without a name")), theirs)
            raise ValueError(
                f"drawn by {model}, and not by {self.title} as it is here: no line of this page draws it again"
            )


def troubles(path: Path) -> dict[str, list[str]]:
    """What did not go as it should while a picture was drawn, as far as it says so."""
    record = read_metadata(path).get("diffusion")
    ours = record if isinstance(record, dict) else {}  # another program's text under our key is none
    return {"Repaired": _texts(ours.get("repairs")), "Flagged": _texts(ours.get("flagged"))}


def words(wanted: Settings) -> list[str]:
    """A request as the words of a command line: its prompts, and a flag for each field that says something."""
    prompts = [
        word for prompt in wanted.prompts for word in ([prompt] if prompt[:1] != "-" else flag("prompt", prompt))
    ]
    given = [item.name for item in fields(Settings) if item.name != "prompts" and wanted.gives(item.name)]
    return prompts + [word for name in given for word in flag(name, getattr(wanted, name))]


def flag(name: str, value: Any) -> list[str]:
    """A field as the words that give it; a value that begins like a flag is joined to its own."""
    dashed = f"--{name.replace('_', '-')}"
    if value is True:
        return [dashed]
    text = ",".join(f"{s}={n}" for s, n in zip(SIDES, value, strict=True)) if name == "extend" else written(value)
    return [f"{dashed}={text}"] if text[:1] == "-" else [dashed, text]


def written(value: Any) -> str:
    """A value as it is typed; numbers have commas between them, and an interval without an end has the end inf."""
    if isinstance(value, list | tuple):
        return ",".join("inf" if one is None else written(one) for one in value)
    return "" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _read(name: str, text: str, how: Callable[[str], Any]) -> Any:
    try:
        return how(text) if text.strip() else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _texts(said: Any) -> list[str]:
    """What a record says in one text or several; of a damaged one whatever stands there."""
    return [str(one) for one in (said if isinstance(said, list) else [] if said is None else [said])]


def _short_dtype(made: Recalled) -> str:
    """A record's dtype as a flag gives it. ValueError for one that says none, or one that is not known."""
    said = made.record.get("dtype")
    found = [short for short, long in DTYPES.items() if long == said]
    if not found:
        dtypes = ", ".join(DTYPES.values())
        raise ValueError(f"{made.path} cannot be drawn again: its record says dtype {said!r}, and not one of {dtypes}")
    return found[0]


def _weights(loras: Mapping[str, float]) -> dict[str, float]:
    """How strong each is, by the name that records give it."""
    return {Path(path).stem: weight for path, weight in loras.items()}


def _named(model: str, loras: Mapping[str, Any]) -> str:
    return " + ".join([model, *(f"{name}:{written(weight)}" for name, weight in loras.items())])
