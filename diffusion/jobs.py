"""Lists of pictures to draw: rows of a .txt, .jsonl or .csv file, each with settings of its own. No torch.

A row that is wrong says why (``Row.fault``) and spoils no other; a file that is wrong as a whole is a ValueError.
"""

import csv
import io
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from diffusion.notices import reason
from diffusion.options import field_of, named, read_line, read_text, settled
from diffusion.prompts import expand
from diffusion.settings import Settings, Shot

if TYPE_CHECKING:
    from PIL import Image

Said = Mapping[str, Any] | ValueError  # what a row says: field -> value, or why it cannot be read
UNMET = (ValueError, OSError, ArithmeticError, MemoryError)  # of a row that is wrong, or more than a machine can do


class Step(Protocol):
    """What a model tells of a step."""

    @property
    def pictures(self) -> Sequence[Shot]:
        """Those of the batch."""

    @property
    def images(self) -> "list[Image.Image] | None":
        """At the last step of a batch, its pictures."""


class Planned(Protocol):
    """What a model makes of a request before it draws."""

    @property
    def full(self) -> Settings:
        """The request with every default answered."""


class Drawer(Protocol):
    """A loaded model, as ``TextToImage`` is one."""

    def plan(self, wanted: Settings) -> Planned:
        """ValueError for a request that cannot be met."""

    def run(self, wanted: Settings) -> Generator[Any]:
        """Its steps."""


@dataclass(frozen=True)
class Row:
    """One row of a list: what it says, under the names of ``Settings`` and ``prompt``."""

    number: int  # the line of the file that it begins in
    fields: Mapping[str, Any]
    written: str = ""  # its prompt before choices were made
    output: str | None = None
    model: str | None = None
    fault: str = ""  # why it cannot be drawn

    def settings(self, **call: Any) -> Settings:
        """The request: what the row says, and where it says nothing ``call``. ValueError for one that is wrong."""
        if self.fault:
            raise ValueError(self.fault)
        fields = {**call, **self.fields}
        return Settings(prompts=(fields.pop("prompt"),), **fields).seeded()


@dataclass(frozen=True)
class Job:
    """A row and the request that it stands for, or why it stands for none."""

    row: Row
    wanted: Settings | None
    error: Exception | None = None

    @classmethod
    def refused(cls, row: Row, error: Exception) -> "Job":
        """One that cannot be met, whatever has told so: a ValueError."""
        return cls(row, None, error if isinstance(error, ValueError) else ValueError(reason(error)))


class Result(NamedTuple):
    """What has come of a row: its pictures, or an error. ValueError: it cannot be met. Any other: drawing failed."""

    row: Row
    images: "list[Image.Image]"
    shots: list[Shot]  # prompt and seed of each picture
    error: Exception | None


def read_jobs(path: str | Path) -> list[Row]:
    """The rows of a list. ``.jsonl``: an object a line; ``.csv``: a header and a row a picture; else a prompt a line.

    ValueError for a file that cannot be read, that holds no row, and for a table without a ``prompt`` in its header.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file in UTF-8: a list is one, for instance with a prompt a line") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a list of prompts ({error})") from None
    try:
        rows = [_row(number, said) for number, said in READERS.get(path.suffix.lower(), _lines)(text)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return rows


def choose(rows: Iterable[Row], seed: int, wildcards: Mapping[str, Sequence[str]]) -> list[Row]:
    """The same rows with ``{choices|of words}`` and ``__wildcards__`` made: a function of seed, row and choice."""
    return [row if row.fault else _chosen(row, number, seed, wildcards) for number, row in enumerate(rows)]


def run_jobs(model: Drawer, rows: Iterable[Row], **call: Any) -> Iterator[Result]:
    """Draw rows with a loaded model, and yield what has come of each, in order: no row's fault stops another.

    ``call`` are fields of ``Settings`` for the rows that say nothing of them. Neighbours that differ in nothing but
    their prompts go through the network together.
    """
    for right, jobs in groupby((_planned(model, row, call) for row in rows), lambda job: job.error is None):
        if right:
            for some in together(model, list(jobs)):
                yield from draw(model, some)
        else:
            yield from (Result(job.row, [], [], job.error) for job in jobs)


def together(model: Drawer, jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs that go through the network at once: alike but for their prompts, as many as a batch holds."""
    for _, some in groupby(jobs, lambda job: (_alike(job), job.row.output)):
        alike = list(some)
        full = model.plan(joined(alike)).full
        assert isinstance(full.batch_size, int), "plan() gives the batch size"
        size = max(1, full.batch_size // (full.count // len(alike)))
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def draw(
    model: Drawer, jobs: Sequence[Job], watch: Callable[[Iterator[Any]], Iterator[Any]] = iter
) -> Iterator[Result]:
    """Draw jobs that are alike, at once. Where that fails each is drawn by itself, so that one cannot spoil another."""
    try:
        with closing(model.run(joined(jobs))) as steps:  # a traceback would keep what it has put on the model
            shown = (zip(step.images, step.pictures, strict=True) for step in watch(steps) if step.images)
            drawn = [pair for pairs in shown for pair in pairs]
    except BrokenPipeError:  # who listens has left, which is no fault of a row
        raise
    except Exception as error:  # whatever it was, the other rows are still to be drawn
        if len(jobs) == 1:
            yield Result(jobs[0].row, [], [], error)
            return
        for job in jobs:
            yield from draw(model, [job], watch)
        return
    each = len(drawn) // len(jobs)
    for number, job in enumerate(jobs):
        part = drawn[number * each : (number + 1) * each]
        yield Result(job.row, [image for image, _ in part], [shot for _, shot in part], None)


def _planned(model: Drawer, row: Row, call: Mapping[str, Any]) -> Job:
    try:
        wanted = row.settings(**call)
        model.plan(wanted)
        return Job(row, wanted)
    except UNMET as error:
        return Job.refused(row, error)


def _alike(job: Job) -> Settings:
    assert job.wanted is not None, "only right rows are drawn"
    return replace(job.wanted, prompts=("",))


def joined(jobs: Sequence[Job]) -> Settings:
    """One request for jobs that are alike."""
    return replace(_alike(jobs[0]), prompts=tuple(job.wanted.prompts[0] for job in jobs if job.wanted is not None))


def _chosen(row: Row, number: int, seed: int, wildcards: Mapping[str, Sequence[str]]) -> Row:
    given = row.fields.get("seed")
    try:
        prompt = expand(row.written, seed if given is None else given, number, wildcards)
    except ValueError as error:
        return replace(row, fault=str(error))
    return replace(row, fields={**row.fields, "prompt": prompt})


# --- reading


def _row(number: int, said: Said) -> Row:
    if isinstance(said, ValueError):
        return Row(number, {}, fault=str(said))
    fields = dict(said)
    output, model = fields.pop("output", None), fields.pop("model", None)
    fault = _fault(fields, output, model)
    return Row(number, fields, fields.get("prompt", ""), output, model, fault)


def _fault(fields: Mapping[str, Any], output: Any, model: Any) -> str:
    """What is wrong with a row before its settings are looked at."""
    if "prompt" not in fields:
        return "no prompt: say what to draw"
    for name, value in (("prompt", fields["prompt"]), ("output", output), ("model", model)):
        if value is not None and not isinstance(value, str):
            return f"{name} must be text, got {value!r}"
    return ""


def _lines(text: str) -> Iterator[tuple[int, Said]]:
    """A prompt a line, with options behind it; blank lines and those of ``#`` are left out."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, _said(lambda line=line: read_line(line.strip()))  # type: ignore[misc]


def _objects(text: str) -> Iterator[tuple[int, Said]]:
    """A JSON object a line; null is a value that is not given."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _said(lambda line=line: _object(line))  # type: ignore[misc]


def _object(line: str) -> dict[str, Any]:
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("it is no JSON that a row can be: too many brackets are in each other") from None
    if not line.lstrip().startswith("{"):
        raise ValueError('it is no JSON object: write {"prompt": "a red apple"}')
    return settled(named(name, value) for name, value in pairs if value is not None)


def _table(text: str) -> Iterator[tuple[int, Said]]:
    """A header and a row a picture; an empty cell is a value that is not given."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = next(reader, [])
    if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)) is not None:
        raise ValueError(f"its cells have {other!r} between them: write commas")
    if "prompt" not in [field_of(name) for name in names]:
        raise ValueError("the first line is no header with a column named prompt")
    number = reader.line_num + 1
    try:
        for cells in reader:
            if any(cells):
                yield number, _said(lambda cells=cells: _cells(names, cells))  # type: ignore[misc]
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row of line {number} is no CSV ({error}): quotes come in pairs") from None


def _cells(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    if len(cells) > len(names):
        raise ValueError(f"{len(cells)} cells under {len(names)} names: quote a cell that holds a comma")
    fields = [named(name, cell) for name, cell in zip(names, cells, strict=False) if cell]
    return settled((field, read_text(field, cell)) for field, cell in fields)


def _said(read: Callable[[], dict[str, Any]]) -> Said:
    try:
        return read()
    except ValueError as error:
        return error


READERS = {".jsonl": _objects, ".csv": _table}
