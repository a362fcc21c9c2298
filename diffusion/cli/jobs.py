"""A list of pictures on the command line (``--prompts FILE``): every row is a request, and the model is loaded once.

What comes of each row is written into the manifest beside the pictures. A row that is wrong, or fails, stops no other.
"""

import hashlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import jobs
from diffusion.cli import request
from diffusion.cli.generate import follow, sheet_of, tell, tell_of_sizes, watched
from diffusion.cli.listed import Listed, Task, planned, processes, share_of, told_of
from diffusion.cli.voice import Voice
from diffusion.jobs import Job, Result
from diffusion.notices import reason
from diffusion.settings import PICTURES, Settings, Shot

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.manifest import Manifest
    from diffusion.pipeline import Progress, TextToImage


def draw_list(args: Namespace, voice: Voice) -> int:
    """Draw a list, and return the exit code: 1 where a row failed, else 2 where one was refused."""
    listed = Listed.check(args)
    tasks = share_of(listed.tasks)
    if not any(task.job.wanted for task in listed.tasks):
        return _finish(voice, Counter(refused=_refuse(tasks, voice)), len(tasks))
    with voice.leaving():
        outline = listed.load(weights=False)
        tasks = [planned(outline, task) for task in tasks]
    voice.event("start", rows=len(tasks), seed=listed.seed, model=str(listed.model), dry_run=args.dry_run)
    tell(outline.model.reports, voice)
    if args.dry_run or (processes() == 1 and not any(task.job.wanted for task in tasks)):
        return _foresee(listed, outline, tasks, voice)
    from diffusion.manifest import Manifest

    with Manifest(listed.folder, resume=args.resume) as manifest:
        return _work(listed, tasks, manifest, voice)


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
    counts, left, filled = Counter[str](), list[Job](), list[Settings]()
    for task in tasks:
        counts["refused"] += _refuse([task], voice)
        counts["already"] += task.key in done
        if task.job.wanted is None or task.key in done:
            continue
        plan = outline.plan(task.job.wanted)
        left.append(task.job)
        filled.append(plan.full)
        voice.event("row", row=task.number, **_told(plan.full), tokens=request.counted([plan]))
        count, size = plan.full.count, "{}x{}".format(*plan.full.finished)
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        said = f"{plan.full.prompts[0]!r}: {pictures}, {size}, {request.how(plan.full)}, seed {plan.full.seed}"
        voice.note(f"row {task.number}: would draw {said}")
    tell_of_sizes(outline, filled, voice)
    batches = (outline.plan(jobs.joined(some)) for some in jobs.together(outline, left))
    largest = max(batches, key=request.pixels_at_once, default=None)
    if largest is not None:
        voice.note(f"memory: {request.memory_of(largest)}")
    return _finish(voice, counts, len(tasks))


def _work(listed: Listed, tasks: Sequence[Task], manifest: "Manifest", voice: Voice) -> int:
    """Draw what is left to draw, and write down what has come of every row."""
    counts = Counter(refused=_refuse(tasks, voice))
    for task in tasks:
        if task.job.wanted is None and manifest.line_of(task.key) is None:
            manifest.append(_line(task, "refused", reason=str(task.job.error)))
    right = [task for task in tasks if task.job.wanted is not None]
    left = [task for task in right if not manifest.is_done(task.key)]
    counts["already"] = len(right) - len(left)
    if left:
        if listed.args.seed is None and any("seed" not in task.job.row.fields for task in left):
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
    with voice.leaving():
        model = listed.load(weights=True)
    try:
        return _draw_with(model, listed, left, manifest, voice)
    except ValueError as error:  # which no longer means that the request cannot be met: something failed
        raise RuntimeError(str(error)) from error


def _draw_with(
    model: "TextToImage", listed: Listed, left: Sequence[Task], manifest: "Manifest", voice: Voice
) -> Counter[str]:
    from tqdm import tqdm

    images = list["Image.Image"]()
    task_of = {id(task.job): task for task in left}
    filled = [model.resolved(task.job.wanted) for task in left if task.job.wanted is not None]
    tell_of_sizes(model, filled, voice)
    total = sum(full.total_steps * full.count for full in filled)
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
        settings = _told(self.model.resolved(task.job.wanted))
        files = [_file(path, image, shot) for path, image, shot in shown if path is not None]
        held = [_looked_at(image, shot) for path, image, shot in shown if path is None]
        withheld = {"withheld": held} if held else {}
        self.manifest.append(_line(task, "done", settings=settings, images=files, **withheld))
        with self.bar.external_write_mode():  # who listens may have left: the row is done all the same
            for path, image, shot in shown:
                if path is not None:
                    self.voice.picture(path, row=task.number, prompt=shot.prompt, seed=shot.seed)
                self.voice.flagged(image, shot.seed, path, withheld=path is None, row=task.number)
        return "drawn"

    def _save(self, task: Task, result: Result) -> "list[Path | None]":
        """Where each picture went; None where it is withheld."""
        from diffusion.images import is_black, refuse_black, save_image, slugify

        assert task.outputs is not None, "it was checked"
        pairs = zip(result.images, result.shots, strict=True)
        refuse_black([shot.seed for image, shot in pairs if is_black(image)])
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


def _told(full: Settings) -> dict[str, Any]:
    facts = told_of(full, {"prompts", "batch_size"})
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
        voice.note(f"{rows} {'row' if rows == 1 else 'rows'}: {said}{end}")
    return 1 if told["failed"] or held else 2 if told["refused"] else 0
