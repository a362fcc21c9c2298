"""A list of pictures on the command line (``--prompts FILE``): every row is a request, and the model is loaded once.

What comes of each row is written into the manifest beside the pictures. A row that is wrong, or fails, stops no other.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import jobs, places
from diffusion.cli import request
from diffusion.cli.generate import Voice, follow, reason, refuse_black, sheet_of, tell, watched
from diffusion.cli.outputs import Outputs
from diffusion.jobs import Job, Result, Row
from diffusion.prompts import read_wildcards
from diffusion.settings import PICTURES, Settings, Shot, facts_of

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.manifest import Manifest
    from diffusion.pipeline import Progress, TextToImage


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
        outputs = _outputs(args, rows, seed, given["num_images"])
        model = request.find_model(args.model, offline=args.offline)
        made = _jobs(args, model, rows, given | {"seed": seed})
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


def draw_list(args: Namespace, voice: Voice) -> int:
    """Draw a list, and return the exit code: 1 where a row failed, else 2 where one was refused."""
    listed = Listed.check(args)
    tasks = share_of(listed.tasks)
    if not any(task.job.wanted for task in listed.tasks):
        return _finish(voice, Counter(refused=_refuse(tasks, voice)), len(tasks))
    outline = listed.load(weights=False)
    tasks = [_planned(outline, task) for task in tasks]
    voice.event("start", rows=len(tasks), seed=listed.seed, model=str(listed.model), dry_run=args.dry_run)
    tell(outline.model.reports, voice)
    if args.dry_run or (processes() == 1 and not any(task.job.wanted for task in tasks)):
        return _foresee(listed, outline, tasks, voice)
    from diffusion.manifest import Manifest

    with Manifest(listed.folder, resume=args.resume) as manifest:
        return _work(listed, tasks, manifest, voice)


def share_of(tasks: Sequence[Task]) -> list[Task]:
    """What this process draws where a launcher has started several: every n-th row, whoever comes first."""
    return list(tasks[int(os.environ.get("RANK", 0)) :: processes()])


def processes() -> int:
    """How many a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> str | None:
    """The GPU of this process where a launcher has started several on one machine."""
    import torch

    if processes() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


# --- what is asked for


def _check_flags(args: Namespace) -> None:
    for flag, given in (("--compare", args.compare), ("--film", args.film)):
        if given:
            raise ValueError(f"{flag} makes one file of one prompt, and --prompts draws a list: leave one out")
    if args.grid is not None and (args.resume or processes() > 1):
        raise ValueError("--grid is of the pictures of one call, and this one draws a part of them: leave it out")


def _wildcards(args: Namespace) -> Mapping[str, Sequence[str]]:
    named, folder = args.wildcards is not None, Path("wildcards") if args.wildcards is None else args.wildcards
    return read_wildcards(folder) if named or folder.is_dir() else {}


def _outputs(args: Namespace, rows: Sequence[Row], seed: int, num_images: int) -> Outputs:
    """Where the pictures of all rows go that do not say it themselves."""
    prompts = tuple(row.fields["prompt"] for row in rows if row.output is None and not row.fault)
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
        except ValueError as error:
            made.append(Job(row, None, error))
    return made


def _tasks(args: Namespace, made: Iterable[Job]) -> list[Task]:
    """Each job with its key and its files; rows that are the same are told apart by which of them they are."""
    seen, taken = Counter[str](), dict[Path, int]()
    tasks = list[Task]()
    for job in made:
        task = _task(args, job, taken)
        asked = _asked(args, task.job)
        seen[asked] += 1
        tasks.append(replace(task, key=hashlib.sha256(f"{asked}#{seen[asked]}".encode()).hexdigest()))
    return tasks


def _task(args: Namespace, job: Job, taken: dict[Path, int]) -> Task:
    """A job with the files that it writes. Two rows do not write the same one."""
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
            path = render(outputs.pictures, index=1, seed=0, slug="").resolve()
            if path in taken:
                raise ValueError(f"output {output} is that of row {taken[path]} too: give each a file of its own")
            taken[path] = job.row.number
        return Task(job, "", outputs)
    except ValueError as error:
        return Task(replace(job, wanted=None, error=error), "")


def _asked(args: Namespace, job: Job) -> str:
    """All that decides what a row's pictures are, as text. A seed that is drawn is none: it is not asked for."""
    if job.wanted is None:
        return json.dumps({"row": job.row.number, "reason": str(job.error)})
    said = job.row.fields.get("seed", args.seed)
    facts = _given(job.wanted, {"prompts", "batch_size", "seed"})
    facts |= {name: facts_of(getattr(job.wanted, name)) for name in PICTURES if name in facts}
    facts |= {"prompt": job.row.written if said is None else job.wanted.prompts[0], "seed": said}
    call = {name: str(getattr(args, name)) for name in ("model", "lora", "control", "dtype", "prediction")}
    output = args.output if job.row.output is None else job.row.output
    return json.dumps(facts | call | {"output": output}, sort_keys=True, default=str)


def _given(full: Settings, but: set[str]) -> dict[str, Any]:
    """The fields that say something, as JSON holds them."""
    return {
        item.name: getattr(full, item.name) for item in fields(full) if item.name not in but and full.gives(item.name)
    }


def _planned(outline: "TextToImage", task: Task) -> Task:
    """The same task, or why the model cannot do it."""
    if task.job.wanted is None:
        return task
    try:
        outline.plan(task.job.wanted)
        return task
    except ValueError as error:
        return replace(task, job=replace(task.job, wanted=None, error=error))


# --- what comes of it


def _refuse(tasks: Iterable[Task], voice: Voice) -> int:
    """Say what is wrong with every row that is wrong, and count them."""
    wrong = [task for task in tasks if task.job.wanted is None]
    for task in wrong:
        voice.trouble("error", f"row {task.number}: {task.job.error}", row=task.number)
    return len(wrong)


def _foresee(listed: Listed, outline: "TextToImage", tasks: Sequence[Task], voice: Voice) -> int:
    """What each row would draw, and which are wrong."""
    from diffusion.manifest import finished

    done = finished(listed.folder) if listed.args.resume else set[str]()
    counts, left = Counter[str](), list[Job]()
    for task in tasks:
        counts["refused"] += _refuse([task], voice)
        counts["already"] += task.key in done
        if task.job.wanted is None or task.key in done:
            continue
        plan = outline.plan(task.job.wanted)
        left.append(task.job)
        voice.event("row", row=task.number, **_plain(plan.full), tokens=request.counted([plan]))
        count, size = plan.full.count, "{}x{}".format(*plan.full.finished)
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        said = f"{plan.full.prompts[0]!r}: {pictures}, {size}, {request.how(plan.full)}, seed {plan.full.seed}"
        voice.note(f"row {task.number}: would draw {said}")
    batches = (outline.plan(jobs.joined(some)) for some in jobs.together(outline, left))
    largest = max(batches, key=request.pixels_at_once, default=None)
    if largest is not None:
        voice.note(f"memory: {request.memory_of(largest)}")
    return _finish(voice, counts, len(tasks))


def _work(listed: Listed, tasks: Sequence[Task], manifest: "Manifest", voice: Voice) -> int:
    """Draw what is left to draw, and write down what has come of every row."""
    from diffusion.manifest import is_done

    counts = Counter(refused=_refuse(tasks, voice))
    for task in tasks:
        if task.job.wanted is None and manifest.line_of(task.key) is None:
            manifest.append(_line(task, "refused", reason=str(task.job.error)))
    right = [task for task in tasks if task.job.wanted is not None]
    left = [task for task in right if not is_done(manifest.line_of(task.key))]
    counts["already"] = len(right) - len(left)
    if left:
        if listed.args.seed is None:
            voice.note(f"seed {listed.seed}")
        counts += _draw(listed, left, manifest, voice)
    counts["withheld"] = sum(map(_withheld, (manifest.line_of(task.key) for task in right)))
    code = _finish(voice, counts, len(tasks))
    return code if processes() == 1 else _last(listed.tasks, manifest)


def _last(tasks: Sequence[Task], manifest: "Manifest") -> int:
    """The exit code of one process of several: a launcher ends all when one tells of a fault, so the last one does."""
    if not all(manifest.is_settled(task.key) for task in tasks):
        return 0
    lines = [manifest.line_of(task.key) for task in tasks]
    ends = {line["status"] for line in lines if line is not None}
    code = 1 if "failed" in ends or any(map(_withheld, lines)) else 2 if "refused" in ends else 0
    if code:
        manifest.wait()
    return code


def _draw(listed: Listed, left: Sequence[Task], manifest: "Manifest", voice: Voice) -> Counter[str]:
    """Neighbours that are alike at once. What another process is at comes last: should that die, it falls to us."""
    from tqdm import tqdm

    model, images = listed.load(weights=True), list["Image.Image"]()
    task_of = {id(task.job): task for task in left}
    total = sum(model.resolved(task.job.wanted).total_steps * task.job.wanted.count for task in left if task.job.wanted)
    with tqdm(total=total, unit="step", leave=False, disable=True if voice.quiet or voice.json else None) as bar:
        hand = Hand(listed, model, manifest, voice, bar, images)
        counts, others = Counter[str](), list[Task]()
        for some in jobs.together(model, [task.job for task in left]):
            counts += hand.draw([task_of[id(job)] for job in some], others)
        for task in others:
            counts += hand.draw([task], None)
    if listed.args.grid is not None and images:
        from diffusion.sheets import make_grid, save_sheet

        sheet = sheet_of(make_grid(images), images, listed.outputs, seed=listed.seed)
        voice.picture(save_sheet(sheet, listed.args.grid), kind="grid")
    if listed.args.compile:
        voice.note(f"--compile: {model.model.compiled.report}")
    return counts


@dataclass(frozen=True)
class Hand:
    """What draws tasks that are claimed, and writes down what comes of them."""

    listed: Listed
    model: "TextToImage"
    manifest: "Manifest"
    voice: Voice
    bar: Any
    images: "list[Image.Image]"  # for the grid

    def draw(self, tasks: Sequence[Task], others: list[Task] | None) -> Counter[str]:
        """Those that nobody has done. What others are at is left to them and noted in ``others``, or waited for."""
        counts = Counter[str]()
        with ExitStack() as claims:
            claim = partial(self.manifest.claim, wait=others is None)
            ours = [task for task in tasks if claims.enter_context(claim(task.key))]
            if others is not None:
                others += [task for task in tasks if task not in ours]
            else:
                counts["already"] += len(tasks) - len(ours)
            if ours:
                found = jobs.draw(self.model, [task.job for task in ours], partial(self._watch, ours))
                counts.update(self._keep(task, result) for task, result in zip(ours, found, strict=True))
        return counts

    def _watch(self, tasks: Sequence[Task], steps: "Iterator[Progress]") -> "Iterator[Progress]":
        """The same steps, told to whoever listens."""
        before = self.bar.n
        wanted = tasks[0].job.wanted  # alike but for their prompts
        assert wanted is not None, "only right rows are drawn"
        for step in watched(steps, self.listed.outputs, [], wanted):
            before = follow(self.bar, step, before)
            rows = [task.number for task in tasks]
            self.voice.event("step", index=step.index, total=step.total, seeds=step.seeds, rows=rows)
            yield step

    def _keep(self, task: Task, result: Result) -> str:
        """Write the pictures of a row, then its line. What has come of it."""
        try:
            if result.error is not None:
                raise result.error
            shown = list(zip(self._save(task, result), result.images, result.shots, strict=True))
        except Exception as error:  # whatever it was, the other rows are still to be drawn
            why = reason(error)
            self.voice.trouble("error", f"row {task.number}: {why}", row=task.number)
            self.manifest.append(_line(task, "failed", reason=why))
            return "failed"
        assert task.job.wanted is not None, "only right rows are drawn"
        settings = _plain(self.model.resolved(task.job.wanted))
        files = [_file(path, image, shot) for path, image, shot in shown if path is not None]
        held = [_looked_at(image, shot) for path, image, shot in shown if path is None]
        with self.bar.external_write_mode():
            for path, image, shot in shown:
                if path is not None:
                    self.voice.picture(path, row=task.number, prompt=shot.prompt, seed=shot.seed)
                self.voice.flagged(image, shot.seed, path, withheld=path is None, row=task.number)
        withheld = {"withheld": held} if held else {}
        self.manifest.append(_line(task, "done", settings=settings, images=files, **withheld))
        return "drawn"

    def _save(self, task: Task, result: Result) -> "list[Path | None]":
        """Where each picture went; None where it is withheld."""
        from diffusion.images import save_image, slugify

        assert task.outputs is not None, "it was checked"
        for image, shot in zip(result.images, result.shots, strict=True):
            refuse_black(image, shot.seed)
        held = partial(request.withheld, self.listed.args)
        if self.listed.args.grid is not None:
            self.images.extend(image for image in result.images if not held(image))
        keep = partial(save_image, output=task.outputs.pictures, metadata=task.outputs.metadata)
        shown = zip(result.images, result.shots, strict=True)
        return [
            None if held(image) else keep(image, seed=shot.seed, slug=slugify(shot.prompt)) for image, shot in shown
        ]


def _line(task: Task, status: str, **facts: Any) -> dict[str, Any]:
    return {"row": task.number, "key": task.key, "status": status, **facts}


def _file(path: Path, image: "Image.Image", shot: Shot) -> dict[str, Any]:
    return {"path": str(path), **_looked_at(image, shot), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _looked_at(image: "Image.Image", shot: Shot) -> dict[str, Any]:
    """A picture by its seed, and why it is flagged if it is."""
    return {"seed": shot.seed} | ({"flagged": image.info["flagged"]} if "flagged" in image.info else {})


def _plain(full: Settings) -> dict[str, Any]:
    facts = _given(full, {"prompts", "batch_size"})
    return {"prompt": full.prompts[0], **facts, **{name: str(facts[name]) for name in PICTURES if name in facts}}


def _withheld(line: Mapping[str, Any] | None) -> int:
    """How many pictures of a row were drawn and not written."""
    return 0 if line is None else len(line.get("withheld", ()))


def _finish(voice: Voice, counts: Counter[str], rows: int) -> int:
    """Say how it has ended, and the exit code."""
    told = {name: counts[name] for name in ("drawn", "already", "refused", "failed")}
    held = counts["withheld"]
    voice.event("done", rows=rows, **told, withheld=held)
    if told["already"] or told["refused"] or told["failed"] or held:
        said = ", ".join(f"{count} {name}" for name, count in told.items() if count)
        end = f"; {held} {'picture' if held == 1 else 'pictures'} withheld" if held else ""
        voice.note(f"{rows} rows: {said}{end}")
    return 1 if told["failed"] or held else 2 if told["refused"] else 0
