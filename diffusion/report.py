"""One self-contained page about a run: how it learnt, what it drew on the way, what it saw, and with which config."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.sheets import save_sheet

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 620, 240, 62, 24, 28, 12
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")
Points = Sequence[tuple[float, float]]


def write(folder: Path, facts: Mapping[str, str]) -> Path:
    """Write ``folder/report.html`` from what the run has left in its folder so far; ``facts`` head the page."""
    metrics = _rows(folder / "metrics.jsonl")
    validation = _rows(folder / "validation.jsonl")
    curves = [
        ("Training loss", {"loss": _points(metrics, "loss"), "running mean": _smooth(_points(metrics, "loss"))}),
        ("Validation loss", {name: points for name, points in _validated(validation).items() if points}),
        ("Held out minus trained on", _gap(validation)),
        ("Loss by noise level, from the least to the most, at the last validation", _by_noise(validation)),
        ("Learning rate", {"learning rate": _points(metrics, "lr")}),
        ("Pictures a second", {"pictures a second": _points(metrics, "images_per_second")}),
        ("Gradient norm", {"gradient norm": _points(metrics, "grad_norm")}),
    ]
    charts = "".join(chart(title, series) for title, series in curves if any(series.values()))
    last = metrics[-1] if metrics else {}
    heading = {"steps done": f"{last.get('step', 0):,}", "loss": f"{last.get('loss', math.nan):.4f}", **facts}
    page = PAGE.format(
        name=html.escape(folder.name),
        facts="".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in heading.items()),
        samples=_samples(sorted((folder / "samples").glob("step-*.png"))),
        charts=charts or "<p>No step has been logged yet.</p>",
        coverage=_coverage(_rows(folder / "coverage.jsonl")),
        config=html.escape((folder / "config.yaml").read_text(encoding="utf-8")),
    )
    file, part = folder / "report.html", folder / ".report.part"
    part.write_text(page, encoding="utf-8")
    part.replace(file)  # whoever reads it meanwhile finds it whole
    return file


def write_card(model: Path, name: str, recipe: Mapping[str, Any], config: str, samples: Image.Image) -> None:
    """``README.md`` in a model folder, with its samples: what it is, how it was made, how to draw with it."""
    save_sheet(samples, model / "samples.png")
    prompts = "\n".join(f"- {prompt}" for prompt in recipe["prompts"])
    asked = f"\nThe pictures, row by row, with seed 0:\n\n{prompts}\n" if prompts else ""
    kind, stock = "A text-to-image model of", "The folder is in the layout of diffusers, whose pipelines read it too."
    if recipe.get("base"):
        kind = f"What is put on the text-to-image model `{recipe['base']}`, of"
        stock = (
            "`python generate.py -m another/model --lora path/to/this/folder:0.8` puts it on another model. diffusers\n"
            "reads it by `load_lora_weights`, and what is in `words/` by `load_textual_inversion`."
        )
    names = ("width", "height", "trained_on", "steps", "sampler", "guidance_scale")
    facts = {name: recipe[name] for name in names}
    text = CARD.format(name=name, config=config.strip(), asked=asked, kind=kind, stock=stock, **facts)
    (model / "README.md").write_text(text, encoding="utf-8")


def chart(title: str, series: Mapping[str, Points]) -> str:
    """A line chart as SVG: one line a series of (x, y), with ticks at round numbers; points not finite are left out."""
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return ""
    x_ticks = ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    y_ticks = ticks(min(y for _, y in everything), max(y for _, y in everything))
    x0, x1, y0, y1 = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for y in y_ticks:
        up = place(x0, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{place(x, y0)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.10g}</text>')
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in (place(x, y) for x, y in points))
        parts.append(f'<polyline points="{path}" stroke="{colour}"><title>{html.escape(name)}</title></polyline>')
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for colour, name in zip(COLOURS, lines, strict=False)
    )
    legend = f'<p class="legend">{legend}</p>' if len(lines) > 1 else ""
    title = html.escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}{legend}</figure>"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    window = max(1, round(len(points) * share))
    return [
        (x, sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / min(window, i + 1))
        for i, (x, _) in enumerate(points)
    ]


def _validated(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    names = {"train": "trained on", "held_out": "held out"}
    kinds = {"shipped": "shipped weights", "raw": "raw weights"}
    return {
        f"{names[probe]}, {kinds[kind]}": [(row["step"], row[probe][kind]) for row in rows if probe in row]
        for kind in kinds
        for probe in names
    }


def _gap(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """How much better pictures are known that were trained on: what overfitting adds."""
    both = [row for row in rows if "held_out" in row]
    kinds = {"shipped": "shipped weights", "raw": "raw weights"}
    return {
        name: [(row["step"], row["held_out"][kind] - row["train"][kind]) for row in both]
        for kind, name in kinds.items()
        if both
    }


def _by_noise(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The bins of the last measurement, of the weights that are shipped."""
    names = {"train": "trained on", "held_out": "held out"}
    last = rows[-1]["bins"] if rows else {}
    return {names[probe]: list(enumerate(kinds["shipped"], 1)) for probe, kinds in last.items()}


def _samples(files: Sequence[Path]) -> str:
    if not files:
        return "<p>No samples yet.</p>"
    pictures = []
    for file in files:
        buffer = io.BytesIO()
        with Image.open(file) as image:
            image.convert("RGB").save(buffer, "WEBP", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        step = int(file.stem.removeprefix("step-"))
        pictures.append(f'<img data-step="{step:,}" src="data:image/webp;base64,{data}" alt="samples at step {step}">')
    last = len(files) - 1
    hidden = "" if last else " hidden"
    slider = f'<label>step <output></output><input type="range" min="0" max="{last}" value="{last}"{hidden}></label>'
    return f'<div class="samples">{slider}{"".join(pictures)}</div>'


def _coverage(rows: Sequence[Mapping[str, Any]]) -> str:
    seen = [row["visits"] for row in rows if "left_out" not in row]
    if not seen:
        return "<p>Not written yet.</p>"
    out = [row for row in rows if "left_out" in row]
    mean = sum(seen) / len(seen)
    text = f"<p>{len(seen):,} pictures, each seen {min(seen):,} to {max(seen):,} times, {mean:,.1f} on average.</p>"
    if not out:
        return text + "<p>None was left out.</p>"
    items = "".join(f"<li>{html.escape(row['file'])}: {html.escape(row['left_out'])}</li>" for row in out[:50])
    more = f"<li>and {len(out) - 50:,} more in coverage.jsonl</li>" if len(out) > 50 else ""
    return f"{text}<p>{len(out):,} were left out:</p><ul>{items}{more}</ul>"


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

![Samples](samples.png)
{asked}
{kind} {width}x{height} pictures, trained on {trained_on}. Its own defaults are {steps} steps of
{sampler} at guidance {guidance_scale}:

```
python generate.py -m path/to/this/folder "a prompt"
```

{stock}

## The run

```yaml
{config}
```
"""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2937; --dim: #6b7280; --line: #e5e7eb; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e5e7eb; --dim: #9ca3af; --line: #374151; --paper: #111827; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1320px;
  margin: 2rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .8rem; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem; }}
dl {{ display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 0; }}
dt {{ color: var(--dim); font-size: .8rem; }} dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.2rem 2rem; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; font-size: .9rem; }}
svg {{ width: 100%; }} svg text {{ font-size: 11px; fill: var(--dim); }} .grid {{ stroke: var(--line); }}
polyline {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }} polyline:first-of-type {{ stroke-opacity: .85; }}
.legend {{ margin: 0; font-size: .8rem; color: var(--dim); }} .legend span {{ margin-right: 1.2rem; }}
.legend i {{ display: inline-block; width: .8rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }}
.samples img {{ display: block; max-width: 100%; border: 1px solid var(--line); }}
.samples img[hidden] {{ display: none; }} .samples input {{ flex: 1; max-width: 480px; }}
.samples label {{ display: flex; gap: .6rem; align-items: center; margin-bottom: .6rem; }}
pre {{ border: 1px solid var(--line); padding: 1rem; overflow: auto; font-size: 12.5px; }}
</style>
<h1>{name}</h1>
<dl>{facts}</dl>
<h2>What it draws</h2>{samples}
<h2>How it learns</h2><div class="charts">{charts}</div>
<h2>What it has seen</h2>{coverage}
<h2>Config</h2><pre>{config}</pre>
<script>
for (const box of document.querySelectorAll(".samples")) {{
  const range = box.querySelector("input"), pictures = [...box.querySelectorAll("img")];
  const show = () => {{
    pictures.forEach((picture, i) => picture.hidden = i != range.value);
    box.querySelector("output").textContent = pictures[range.value].dataset.step;
  }};
  range.addEventListener("input", show);
  show();
}}
</script>
</html>
"""
