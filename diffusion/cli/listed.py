"""A list of pictures as it is asked for: its rows, checked, with their keys and the files that they write."""

import hashlib
import json
import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import jobs, places
from diffusion.cli import request
from diffusion.cli.outputs import Outputs
from diffusion.jobs import UNMET, Job, Row
from diffusion.prompts import LORA, parse, read_wildcards
from diffusion.settings import PICTURES, Settings, facts_of
from diffusion.values import read_whole, whole

if TYPE_CHECKING:
    from diffusion.pipeline import TextToImage


@dataclass(frozen=True)
class Task:
    """A row of the list, on its way to pictures."""

    job: Job
    key: str  # of what it asks for, wherever in the list it stands
    outputs: Outputs | None = None  # where its pictures go

    @property
    def number(self) -> int:
        """Its line in the file."""
        return self.job.row.number


@dataclass(frozen=True)
class Listed:
    """A list, once no more can be wrong with it than a library can tell."""

    args: Namespace
    model: Path
    loras: dict[str, float]
    seed: int
    tasks: list[Task]
    outputs: Outputs

    @classmethod
    def check(cls, args: Namespace) -> "Listed":
        """Raises ValueError for what is wrong with the call; what is wrong with a row is kept with it."""
        given = request.fields_of(args)
        seed = Settings(prompts=("",), seed=given["seed"]).seeded().seed
        assert seed is not None, "seeded() gave it"
        listed = jobs.choose(jobs.read_jobs(args.prompts), seed, _wildcards(args))
        rows = [Row(0, {"prompt": text}, text) for text in (*args.words, *args.prompt)] + listed
        _check_flags(args)
        loras = request.check_call(args)
        model = request.find_model(args.model, offline=args.offline)
        made = _jobs(args, model, rows, given | {"seed": seed})
        outputs = _outputs(args, made, seed, given["num_images"])
        request.check_checker(args)
        return cls(args, model, loras, seed, _tasks(args, made), outputs)

    @property
    def folder(self) -> Path:
        """Where the manifest is: the folder that all pictures of the call go into."""
        from diffusion.images import render

        some = [render(self.outputs.pictures, index=n, seed=n, slug="ab"[n]).parent for n in (0, 1)]
        return Path(os.path.commonpath(some))

    def load(self, *, weights: bool) -> "TextToImage":
        """The model; on a machine with several GPUs each process has its own."""
        device = self.args.device if self.args.device not in (None, "auto") or not weights else own_device()
        return request.load_model(
            Namespace(**vars(self.args) | {"device": device}), self.model, self.loras, weights=weights
        )


def share_of(tasks: Sequence[Task]) -> list[Task]:
    """What this process draws where a launcher has started several: every n-th row, whoever comes first."""
    rank, size = _place()
    return list(tasks[rank::size])


def processes() -> int:
    """How many a launcher has started."""
    return _place()[1]


def _place() -> tuple[int, int]:
    """Which process this is, of how many. ValueError for what no launcher sets: some rows would be nobody's."""
    given = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if not given:
        return 0, 1
    if len(given) == 1:
        (other,) = {"RANK", "WORLD_SIZE"} - given
        raise ValueError(f"{given.pop()} is set in the environment, and {other} is not: set both, or neither")
    size = _variable("WORLD_SIZE", 1)
    return _variable("RANK", 0, size - 1), size


def _variable(name: str, least: int = 0, most: float = math.inf) -> int:
    """A whole number of the environment."""
    try:
        found = read_whole(os.environ[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return whole(name, found, least, most)


def own_device() -> str | None:
    """The GPU of this process where a launcher has started several on one machine."""
    import torch

    if processes() == 1 or not torch.cuda.is_available():
        return None
    number = _variable("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    return f"cuda:{number % torch.cuda.device_count()}"


def planned(outline: "TextToImage", task: Task) -> Task:
    """The same task, or why the model cannot do it."""
    if task.job.wanted is None:
        return task
    try:
        outline.plan(task.job.wanted)
        return task
    except UNMET as error:
        return replace(task, job=Job.refused(task.job.row, error))


def _check_flags(args: Namespace) -> None:
    several = processes() > 1
    for flag, given in (("--compare", args.compare), ("--film", args.film)):
        if given:
            raise ValueError(f"{flag} makes one file of one prompt, and --prompts draws a list: leave one out")
    if args.grid is not None and (args.resume or several):
        raise ValueError("--grid is of the pictures of one call, and this one draws a part of them: leave it out")


def _wildcards(args: Namespace) -> Mapping[str, Sequence[str]]:
    named, folder = args.wildcards is not None, Path("wildcards") if args.wildcards is None else args.wildcards
    return read_wildcards(folder) if named or folder.is_dir() else {}


def _outputs(args: Namespace, made: Sequence[Job], seed: int, num_images: int) -> Outputs:
    """Where the pictures of all rows go that do not say it themselves."""
    prompts = tuple(job.wanted.prompts[0] for job in made if job.row.output is None and job.wanted is not None)
    return Outputs.check(args, Settings(prompts=prompts or ("",), seed=seed, num_images=num_images), False)


def _jobs(args: Namespace, model: Path, rows: Sequence[Row], given: Mapping[str, Any]) -> list[Job]:
    limits = places.read_limits(model) if (places.base_of(model) or model).is_dir() else None
    made = list[Job]()
    for row in rows:
        try:
            wanted = row.settings(**given)
            request.check_pictures(args, wanted)
            if row.model not in (None, args.model, places.title_of(model)):
                raise ValueError(f"the rows of a call share one model, {args.model}: draw this one with -m {row.model}")
            if limits is not None:
                wanted.check(limits)
            made.append(Job(row, wanted))
        except UNMET as error:
            made.append(Job.refused(row, error))
    return made


def _tasks(args: Namespace, made: Sequence[Job]) -> list[Task]:
    """Each job with its key and its files; rows that are the same are told apart by which of them they are."""
    seen, taken = Counter[str](), _taken(args, made)
    tasks = list[Task]()
    for job in made:
        task = _task(args, job, taken)
        asked = _asked(args, task.job)
        seen[asked] += 1
        tasks.append(replace(task, key=hashlib.sha256(f"{asked}#{seen[asked]}".encode()).hexdigest()))
    return tasks


def _taken(args: Namespace, made: Iterable[Job]) -> dict[Path, str]:
    """The files that no row may write: the list, what any row reads, the call's sheets, which may be none of those."""
    taken = {args.prompts.resolve(): "the list"}
    for row in (job.row for job in made):
        for name in PICTURES:
            source = row.fields.get(name, getattr(args, name))
            if isinstance(source, str | Path) and os.path.exists(source):  # which no name can make fail
                taken.setdefault(Path(source).resolve(), f"{name} of row {row.number}")
    for name in ("grid", "preview"):
        if (path := getattr(args, name)) is not None:
            _take(f"--{name} {path}", path, f"--{name}", taken)
    return taken


def _take(what: str, path: Path, whose: str, taken: dict[Path, str]) -> None:
    if path.resolve() in taken:
        raise ValueError(f"{what} is {taken[path.resolve()]} too: give each a file of its own")
    taken[path.resolve()] = whose


def _task(args: Namespace, job: Job, taken: dict[Path, str]) -> Task:
    """A job with the files that it writes, which are nobody else's."""
    from diffusion.images import render

    if job.wanted is None:
        return Task(job, "")
    output = args.output if job.row.output is None else job.row.output
    alone = Namespace(**vars(args) | {"output": output, "grid": None, "preview": None})
    try:
        outputs = Outputs.check(alone, job.wanted, False)
        if outputs.animation is not None:
            raise ValueError(f"a list draws pictures, and {output} is an animation: end it in .png, or in /")
        if outputs.pictures.named:
            path = render(outputs.pictures, index=1, seed=0, slug="")
            _take(f"output {output}", path, f"that of row {job.row.number}", taken)
        return Task(job, "", outputs)
    except UNMET as error:
        return Task(Job.refused(job.row, error), "")


def _asked(args: Namespace, job: Job) -> str:
    """All that decides what a row's pictures are, as text. A seed that is drawn is none: it is not asked for."""
    if job.wanted is None:
        return json.dumps({"row": job.row.number, "reason": str(job.error)})
    said = job.row.fields.get("seed", args.seed)
    facts = told_of(job.wanted, {"prompts", "batch_size", "seed"})
    facts |= {name: facts_of(getattr(job.wanted, name)) for name in PICTURES if name in facts}
    facts |= {"prompt": job.row.written if said is None else job.wanted.prompts[0], "seed": said}
    facts |= {} if job.wanted.literal else _put_on(facts["prompt"], args.lora_dir)
    call = {name: str(getattr(args, name)) for name in ("model", "lora", "control", "dtype", "prediction")}
    output = args.output if job.row.output is None else job.row.output
    return json.dumps(facts | call | {"output": output}, sort_keys=True, default=str)


def _put_on(prompt: str, given: Path | None) -> dict[str, str]:
    """By its tag the hash of each LoRA of a prompt: what a name means is for the folder to say."""
    found, folder = dict[str, str](), places.LORAS if given is None else given
    for tag in LORA.finditer(prompt):
        with suppress(ValueError, OSError):  # planning tells what is wrong with it
            ((name, _),) = parse(tag[0]).loras
            found[tag[0]] = places.hash_files(places.weight_files(places.find_lora(name, folder)))
    return found


def told_of(full: Settings, but: set[str]) -> dict[str, Any]:
    """The fields that say something, as JSON holds them."""
    return {
        item.name: getattr(full, item.name) for item in fields(full) if item.name not in but and full.gives(item.name)
    }
