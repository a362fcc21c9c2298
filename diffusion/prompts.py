r"""The prompt language that people write, AUTOMATIC1111's: emphasis, BREAK, LoRA tags, choices, wildcards. No torch.

``(x)`` weighs 1.1, ``[x]`` 1 / 1.1, ``(x:1.2)`` what it says, and what is nested multiplies. ``\(`` is text.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from diffusion.names import unknown

STRESS = {"(": 1.1, "[": 1 / 1.1}  # what a pair of brackets without a number multiplies by
OPENED = {")": "(", "]": "["}
MOST = 100.0  # what a weight may be; beyond a few, pictures fall apart
DEEPEST = 16  # choices within choices, and wildcards within wildcards

SYNTAX = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    |(?P<open>[(\[])
    |:\s*(?P<weight>[+-]?(?:[.\d]+(?:e[+-]?\d+)?|nan|inf(?:inity)?))\s*\)
    |(?P<close>[)\]])
    |(?P<stop>(?:(?<!\s)\s+)?\bBREAK\b\s*)""",
    re.VERBOSE,
)
LORA = re.compile(r"<lora:(?P<body>[^<>]*)(?P<end>>?)")
# ``[from:to:0.5]``, ``[to:0.5]`` and ``[a|b]``: other prompts at other steps, in AUTOMATIC1111.
SCHEDULED = re.compile(r"(?<!\\)\[(?:[^\[\]|]*\|[^\[\]]*|[^\[\]]*:\s*[.\d]+\s*)(?<!\\)\]")
CHOICE = re.compile(
    r"\\(?P<escaped>.)|(?P<open>\{)|(?P<close>\})|(?P<bar>\|)|__(?P<name>[^\W_](?:[\w/ .-]*?[^\W_])?)__", re.DOTALL
)


class Span(NamedTuple):
    """A stretch of text, and what the context vectors of its tokens are multiplied by."""

    text: str
    weight: float


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart."""

    written: str  # as the user wrote it
    parts: tuple[tuple[Span, ...], ...]  # BREAK separates them; there is one at least, if only of one empty span
    loras: tuple[tuple[str, float], ...]  # (name, weight) of each tag, in order; the tags are not in the text

    @property
    def plain(self) -> bool:
        """Whether it is one text without emphasis."""
        return len(self.parts) == 1 and all(span.weight == 1 for span in self.parts[0])


def literal(text: str) -> Prompt:
    """A prompt that is taken as it stands."""
    return Prompt(text, ((Span(text, 1.0),),), ())


def parse(text: str) -> Prompt:
    """Take a prompt apart, as AUTOMATIC1111 does: an unclosed bracket ends with the prompt, a stray one is text.

    What has no syntax in it is exactly its text. Raises ValueError, naming it, for a weight that is no finite number, a
    LoRA tag that is none, and for prompts that change from step to step, ``[a:b:0.5]`` and ``[a|b]``.
    """
    loras = tuple(_lora(tag) for tag in LORA.finditer(text))
    rest = LORA.sub("", text).strip() if loras else text
    changing = SCHEDULED.search(rest)
    if changing:
        raise ValueError(
            f"{changing[0]!r} asks for another prompt at other steps, which is not supported: "
            r"write \[ and \] for brackets that are text, and (x:0.9) for a weight"
        )
    return Prompt(text, _parts(_weighed(rest)), loras)


def expand(
    text: str,
    seed: int,
    row: int,
    wildcards: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]],
) -> str:
    r"""One line of a prompt list with its choices made: ``{a|b|c}`` and ``__name__``, a line of that wildcard.

    Choices may hold choices, and so may a wildcard's lines. Every option is as likely as the others. Each choice is a
    draw of its own, f(seed, row, n), where n counts choices in the order in which they are met from left to right: so
    another row changes none in this one. ``\{``, ``\}``, ``\|`` and ``\_`` are text. Raises ValueError for braces that
    do not match, a wildcard that is unknown or empty, and for more than 16 levels.
    """
    count = itertools.count()

    def pick(options: Sequence[str]) -> str:
        from diffusion import rng  # numpy, which a single prompt does not wait for

        return options[int(rng.uniform(seed, "prompt.choice", row, next(count), size=1)[0] * len(options))]

    return _expand(text, pick, lambda name: _lines(wildcards, name), 0)


def read_wildcards(folder: Path) -> Mapping[str, Sequence[str]]:
    """Name -> lines of ``<folder>/<name>.txt``, in sub-folders ``a/b``; blank lines and those of ``#`` are left out.

    A file is read when its name is asked for. Raises ValueError for a folder that is none, and for a file that is not
    UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of wildcards")
    files = sorted(folder.rglob("*.txt"))
    return _Wildcards({file.relative_to(folder).with_suffix("").as_posix(): file for file in files})


# --- emphasis


@dataclass
class _Piece:
    text: str | None  # None is a BREAK
    weight: float = 1.0


def _weighed(text: str) -> list[_Piece]:
    """Texts in order, each with the product of the brackets around it. Round and square ones may overlap."""
    pieces: list[_Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # of every open bracket, the number of its first piece

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece.weight *= factor

    for kind, value, whole in _tokens(text):
        if kind == "open":
            opened[value].append(len(pieces))
        elif kind == "weight" and opened["("]:
            close("(", _number(value, f"the weight {value!r} in {text!r}"))
        elif kind == "close" and opened[OPENED[value]]:
            close(OPENED[value], STRESS[OPENED[value]])
        else:
            pieces.append(_Piece(None if kind == "stop" else value if kind == "escaped" else whole))
    for bracket in opened:
        while opened[bracket]:
            close(bracket, STRESS[bracket])
    return pieces


def _tokens(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, what counts of it, as written) of each piece of syntax, and of the text between."""
    end = 0
    for match in SYNTAX.finditer(text):
        between = text[end : match.start()]
        yield "text", between, between
        assert match.lastgroup is not None, "every alternative is named"
        yield match.lastgroup, match[match.lastgroup], match[0]
        end = match.end()
    yield "text", text[end:], text[end:]


def _parts(pieces: Sequence[_Piece]) -> tuple[tuple[Span, ...], ...]:
    """Neighbours of equal weight are one span. A BREAK at the very end separates nothing."""
    parts: list[list[Span]] = [[]]
    for text, weight in ((piece.text, piece.weight) for piece in pieces if piece.text != ""):
        if text is None:
            parts.append([])
            continue
        if not abs(weight) <= MOST:
            raise ValueError(f"the weight {weight:g} of {text!r} is beyond {MOST:g}: its brackets multiply")
        joins = parts[-1] and parts[-1][-1].weight == weight
        before = parts[-1].pop().text if joins else ""
        parts[-1].append(Span(before + text, weight))
    kept = parts if parts[-1] or len(parts) == 1 else parts[:-1]
    return tuple(tuple(part) or (Span("", 1.0),) for part in kept)


def _lora(tag: re.Match[str]) -> tuple[str, float]:
    name, *weights = tag["body"].split(":")
    if not tag["end"] or not name.strip() or len(weights) > 1:
        raise ValueError(f"{tag[0]!r} is no LoRA tag: write <lora:name> or <lora:name:0.8>")
    return name.strip(), _number(weights[0], f"the weight of {tag[0]!r}") if weights else 1.0


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} is no finite number")
    return value


# --- choices


def _expand(text: str, pick: Callable[[Sequence[str]], str], lines: Callable[[str], Sequence[str]], depth: int) -> str:
    if depth > DEEPEST:
        raise ValueError(
            f"choices within choices are more than {DEEPEST} deep at {text!r}: does a wildcard name itself?"
        )
    found, at = "", 0
    while match := CHOICE.search(text, at):
        found, at = found + text[at : match.start()], match.end()
        if match["close"]:
            raise ValueError(
                rf"a choice is closed that was never opened in {text!r}: write \}} for a brace that is text"
            )
        if match["open"] or match["name"]:
            options, at = _options(text, at) if match["open"] else (lines(match["name"]), at)
            found += _expand(pick(options), pick, lines, depth + 1)
        else:
            found += match["escaped"] if match["escaped"] in {"{", "}", "|", "_"} else match[0]
    return found + text[at:]


def _options(text: str, start: int) -> tuple[list[str], int]:
    """What a choice that opens before ``start`` chooses from, and where the text goes on after it."""
    options, depth, first = list[str](), 0, start
    for match in CHOICE.finditer(text, start):
        if depth == 0 and (match["bar"] or match["close"]):
            options.append(text[first : match.start()])
            first = match.end()
            if match["close"]:
                return options, first
        depth += bool(match["open"]) - bool(match["close"])
    raise ValueError(rf"the choice {text[start - 1 :]!r} is never closed: write \{{ for a brace that is text")


def _lines(wildcards: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]], name: str) -> Sequence[str]:
    """Those of one wildcard: at least one."""
    if not isinstance(wildcards, Mapping):
        lines = wildcards(name)
    elif name in wildcards:
        lines = wildcards[name]
    elif wildcards:
        raise unknown("wildcard", name, wildcards)
    else:
        raise ValueError(rf"there are no wildcards to take {name!r} from: write \__{name}__ for text in underscores")
    if not lines:
        raise ValueError(f"the wildcard {name!r} has no lines to choose from")
    return lines


@dataclass(frozen=True)
class _Wildcards(Mapping[str, Sequence[str]]):
    """Files that are read when they are asked for, and once."""

    files: Mapping[str, Path]
    lines: dict[str, list[str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Sequence[str]:
        if name not in self.lines:
            self.lines[name] = _read_lines(self.files[name])
        return self.lines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _read_lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the wildcard {file} cannot be read as UTF-8: {error}") from None
    return [line for line in lines if line and not line.startswith("#")]
