"""What a benchmark found, as a row, a table and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import Contest


@dataclass(frozen=True)
class Row:
    """One figure: how many times as fast as the peer, what was asked, and what the machine allows at most."""

    label: str
    what: str
    figure: float
    wanted: float
    theirs: float | None = None  # medians, in seconds
    ours: float | None = None
    spread: float = 0.0
    drift: float = 0.0
    counts: bool = True
    limit: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, label: str, what: str, found: Contest, theirs: str, ours: str, wanted: float, limit: str = "", **more: Any
    ) -> "Row":
        """The row of a contest."""
        pair = found.timings[theirs], found.timings[ours]
        return cls(
            label,
            what,
            found.ratio(theirs, ours),
            wanted,
            pair[0].median,
            pair[1].median,
            max(timing.spread for timing in pair),
            found.drift,
            found.counts,
            limit,
            more,
        )

    @property
    def met(self) -> bool:
        return self.counts and self.figure >= self.wanted


HEAD = ("", "measure", "peer", "ours", "ratio", "asked", "", "spread", "A/A")


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    for row in rows:
        seconds = [f"{value:.3g} s" if value is not None else "" for value in (row.theirs, row.ours)]
        said = "yes" if row.met else "no" if row.counts else "too noisy"
        noise = (f"{row.spread:.1%}", f"{row.drift:.1%}") if row.theirs is not None else ("", "")
        lines.append((row.label, row.what, *seconds, f"{row.figure:.3g}", f"{row.wanted:g}", said, *noise))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
