"""``generate.py PROMPT ... [flags]``: make pictures from text.

The paths of the pictures go to stdout, one a line, or with ``--json`` one event a line; everything else goes to stderr.
Nothing slow is imported before the request has been checked as far as it can be without a library.
"""

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.cli import again, left_alone
from diffusion.cli.flags import flags_of
from diffusion.cli.outputs import Outputs, check_together, name_parts
from diffusion.cli.request import Request, counted, parser, quiet_libraries, separate, withheld
from diffusion.cli.voice import Voice, unmet
from diffusion.comparison import variants
from diffusion.notices import Flagged, Repaired, reason
from diffusion.settings import PICTURES, Settings, Shot

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.pipeline import Progress, TextToImage
    from diffusion.records import Recalled, Verdict

Keep = Callable[["Image.Image", Shot], "Path | None"]


def run(argv: Sequence[str], prog: str = "diffusion generate") -> int:
    """Make the pictures that the command line asks for, and return the exit code."""
    flags = flags_of(argv)
    voice = Voice(prog, json="--json" in flags, quiet="--quiet" in flags)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", Repaired)
            warnings.simplefilter("ignore", Flagged)  # said when it is known what has become of the picture
            warnings.showwarning = lambda message, *_: voice.warn(message)
            return generate(argv, voice)
    except KeyboardInterrupt:
        voice.trouble("error", "interrupted")
        return 130
    except BrokenPipeError:
        return left_alone()
    except Exception as error:  # whatever it was, a person gets one line
        voice.trouble("error", reason(error))
        return 1


def generate(argv: Sequence[str], voice: Voice) -> int:
    """Until the first step a ValueError means that the request cannot be met; from then on, that something failed."""
    try:
        reader = parser(voice.prog)
        args = reader.read(argv, words="words")
        if args.help:
            reader.print_help()
            return 0
        quiet_libraries()  # before any of them is imported
        calls = again.apart(separate(args))
        if args.prompts is not None:
            from diffusion.cli.jobs import draw_list  # which draws as this room does

            return draw_list(args, voice)
        loaded: dict[str, TextToImage] = {}
        with voice.leaving():
            requests = [Request.check(one) for one in calls]
            check_together([request.outputs for request in requests])
            left = [begin(request, voice, loaded) for request in requests]
    except (PermissionError, ValueError) as error:
        voice.trouble("error", unmet(error))
        return 2
    if len(left) == 1:
        return left[0]()
    return max(attempt(call, request, voice) for call, request in zip(left, requests, strict=True))


def attempt(call: Callable[[], int], request: Request, voice: Voice) -> int:
    """One call of several: that it fails is told, and the others are still to come. Its exit code."""
    try:
        return call()
    except BrokenPipeError:
        raise
    except Exception as error:
        voice.trouble("error", f"{request.args.from_image}: {reason(error)}")
        return 1


def begin(request: Request, voice: Voice, loaded: "dict[str, TextToImage]") -> Callable[[], int]:
    """All of a call that comes before its first step; what is left to do. ValueError if it cannot be met."""
    args = request.args
    at_once = request.is_small and not args.dry_run and not args.compile
    outline = request.load(loaded, weights=at_once)
    plans = [outline.plan(one) for one in request.cells()]
    full = plans[0].full
    voice.event("start", **_plain(full), model=str(request.model), dry_run=args.dry_run, tokens=counted(plans))
    if request.made is not None:
        tell_again(request.made, voice)
    tell(outline.model.reports, voice)
    tell_of_sizes(outline, [plan.full for plan in plans], voice)
    if not request.wanted.literal:
        tell_of_choices((*args.words, *args.prompt), voice)
    if args.dry_run:
        for line in request.summary(plans):
            voice.note(line)
        return lambda: 0
    model = request.load(loaded)
    steps = chain.from_iterable([model.run(one) for one in request.cells()])
    total = sum(plan.full.total_steps * plan.full.count for plan in plans)
    if args.seed is None:
        voice.note(f"seed {full.seed}")
    return partial(finish, request, model, steps, full, voice, total)


def finish(
    request: Request, model: "TextToImage", steps: "Iterator[Progress]", full: Settings, voice: Voice, total: int
) -> int:
    """Draw, and return the exit code."""
    if request.args.verify:
        code = judge(steps, request, voice, total)
    elif request.axes or request.outputs.animation is not None:
        code = together(steps, request, full, voice, total)
    else:
        code = apart(steps, request, full, voice, total)
    if request.args.compile:
        voice.note(f"--compile: {model.model.compiled.report}")
    return code


def judge(steps: "Iterator[Progress]", request: Request, voice: Voice, total: int) -> int:
    """Say how near a picture that is drawn again comes; it is written only where a place was named."""
    verdicts = list["Verdict"]()
    assert request.made is not None, "--verify needs a picture"
    verify = request.made.verify

    def keep(image: "Image.Image", shot: Shot) -> "Path | None":
        verdicts.append(verify(image))
        unwritten = request.args.output is None or withheld(request.args, image)
        return None if unwritten else _save(image, shot, request.outputs)

    held = draw(steps, keep, voice, total, request.args)
    voice.verdict(verdicts[0])
    return 0 if verdicts[0].identical and not held else 1


def tell_again(made: "Recalled", voice: Voice) -> None:
    """What a picture is drawn again from, what flags change, and what is not what it was."""
    changes = "".join(f"; {change}" for change in made.changes)
    voice.note(f"from {made.path}, as {made.program} wrote it{changes}")
    voice.event("recalled", path=str(made.path), program=made.program, changes=made.changes, notes=made.notes)
    for note in made.notes:
        voice.trouble("warning", f"warning: {made.path}: {note}")


def tell(reports: Mapping[str, str], voice: Voice) -> None:
    """How much of every LoRA has found its place, and which words were learnt."""
    for path, report in reports.items():
        voice.note(f"{path}: {report}")
        voice.event("lora", path=path, report=report)


def tell_of_sizes(model: "TextToImage", filled: Iterable[Settings], voice: Voice) -> None:
    """Each size that the model is not made for, once."""
    for width, height in dict.fromkeys((full.width, full.height) for full in filled):
        assert width is not None and height is not None  # noqa: PT018 - by filled()
        if (line := model.model.recipe.too_far(width, height)) is not None:
            voice.note(line)


def tell_of_choices(prompts: Iterable[str], voice: Voice) -> None:
    """Each prompt that would be drawn as one of several in a list, and is drawn as it stands here."""
    from diffusion.prompts import CHOICE

    for prompt in prompts:
        kinds = {match.lastgroup for match in CHOICE.finditer(prompt)}
        if "name" in kinds or {"open", "bar", "close"} <= kinds:
            what = "choices and wildcards are made in lists (--prompts FILE), and here they are text"
            voice.trouble("warning", f"warning: {prompt!r}: {what}")


def apart(steps: "Iterator[Progress]", request: Request, full: Settings, voice: Voice, total: int) -> int:
    """Write the pictures of each batch as soon as it is done, and at the end the sheet and the film of them.

    What is withheld is in none of them. The exit code.
    """
    from diffusion.sheets import make_grid, save_film, save_sheet

    images: list[Image.Image] = []
    frames: list[Image.Image] = []
    outputs = request.outputs

    def keep(image: "Image.Image", shot: Shot) -> "Path | None":
        if withheld(request.args, image):
            return None
        images.append(image)
        return _save(image, shot, outputs)

    held = draw(watched(steps, outputs, frames, request.wanted), keep, voice, total, request.args)
    if outputs.grid is not None and images:
        sheet = sheet_of(make_grid(images), images, outputs, **_call(full))
        voice.picture(save_sheet(sheet, outputs.grid), kind="grid")
    if outputs.film is not None and images:
        last = sheet_of(images[0].copy(), images, outputs)
        voice.picture(save_film([*frames, last], outputs.film), kind="film")
    return 1 if held else 0


def together(steps: "Iterator[Progress]", request: Request, full: Settings, voice: Voice, total: int) -> int:
    """Draw everything, then write it as one file: a labelled sheet of what is compared, or an animation.

    It is not written if any of its pictures is withheld. The exit code.
    """
    from diffusion.images import save_image
    from diffusion.sheets import make_table, save_film

    images: list[Image.Image] = []
    outputs = request.outputs
    seen = watched(steps, outputs, [], request.wanted)
    if draw(seen, lambda image, _: images.append(image), voice, total, request.args):
        return 1
    facts = {"prompt": full.prompts[0], "seed": full.seed}
    if outputs.animation is not None:
        last = sheet_of(images[-1].copy(), images, outputs, **_call(full))
        path = save_film([*images[:-1], last], outputs.animation, len(images) / 8)
        voice.picture(path, kind="animation", **facts)
        return 0
    _, columns, rows = variants(request.wanted, request.axes)
    sheet = sheet_of(make_table(images, columns, rows), images, outputs, compare=request.axes)
    path = save_image(sheet, outputs.pictures, **name_parts(full), metadata=outputs.metadata)
    voice.picture(path, kind="comparison", **facts)
    return 0


def sheet_of(sheet: "Image.Image", images: "Sequence[Image.Image]", outputs: Outputs, **call: Any) -> "Image.Image":
    """A sheet that says how its pictures were made, unless nothing is to."""
    from diffusion.images import sheet_texts

    sheet.info.clear()
    sheet.info.update(sheet_texts(images, **call) if outputs.metadata else {})
    return sheet


def watched(
    steps: "Iterator[Progress]", outputs: Outputs, frames: "list[Image.Image]", wanted: Settings
) -> "Iterator[Progress]":
    """The same steps; after each one its preview is written or kept, if that was asked for."""
    from diffusion.images import mark
    from diffusion.sheets import make_grid, save_sheet

    for step in steps:
        if outputs.preview is not None:
            sheet = make_grid(step.preview())
            sheet.info.update(mark(composite=wanted.init_image is not None) if outputs.metadata else {})
            save_sheet(sheet, outputs.preview)
        if outputs.film is not None:
            del frames[step.index - 1 :]  # of an attempt that failed
            frames.append(step.preview()[0])
        yield step


def draw(steps: "Iterator[Progress]", keep: Keep, voice: Voice, total: int, args: Namespace) -> int:
    """Follow the steps, and give the pictures of each batch away as soon as it is done. How many are withheld.

    FloatingPointError at the end for those that came out black.
    """
    from tqdm import tqdm

    from diffusion.images import is_black, refuse_black

    held, black = 0, list[int]()
    with tqdm(total=total, unit="step", leave=False, disable=True if voice.quiet or voice.json else None) as bar:
        before = 0
        for step in steps:
            before = follow(bar, step, before)
            voice.event("step", index=step.index, total=step.total, seeds=step.seeds)
            for image, shot in zip(step.images, step.pictures, strict=True) if step.images else ():
                if is_black(image):
                    black.append(shot.seed)
                    continue
                path, hidden = keep(image, shot), withheld(args, image)
                held += hidden
                with bar.external_write_mode():
                    if path is not None:
                        voice.picture(path, prompt=shot.prompt, seed=shot.seed)
                    voice.flagged(image, shot.seed, path, withheld=hidden)
    refuse_black(black)
    return held


def follow(bar: Any, step: "Progress", before: int) -> int:
    """Move a bar to a step, or back if a batch begins again. Where the batch begins, or the next one if it is done."""
    done = before + step.index * len(step.pictures)
    bar.update(done - bar.n)
    return before if step.images is None else done


def _save(image: "Image.Image", shot: Shot, outputs: Outputs) -> Path:
    from diffusion.images import save_image, slugify

    slug = slugify(shot.prompt)
    return save_image(image, outputs.pictures, seed=shot.seed, slug=slug, metadata=outputs.metadata)


def _call(full: Settings) -> dict[str, Any]:
    """What is true of a call and not of one picture."""
    several = full.num_images if full.num_images > 1 else None
    return {
        "prompts": list(full.prompts) if len(full.prompts) > 1 else None,
        "seed": full.seed,
        "num_images": several,
        "variation_seed": full.variation_seed,
        "frames": full.frames,
    }


def _plain(full: Settings) -> dict[str, Any]:
    """The settings as JSON holds them."""
    facts = {item.name: getattr(full, item.name) for item in fields(full)}
    return facts | {name: str(facts[name]) for name in PICTURES if facts[name] is not None}
