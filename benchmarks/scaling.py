"""How it grows: drawing with the batch and the size, training with processes, a feed with the number of pictures."""

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.measure import contest
from benchmarks.table import Row
from benchmarks.training import DATA, ROOT, timed
from diffusion import TextToImage
from diffusion.data.feed import FolderFeed, Share
from diffusion.data.order import Order, batches
from diffusion.data.source import Picture
from diffusion.rng import name_id

SIZES = (10**3, 10**4, 10**5, 10**6)
BATCH, STEPS, WARM = 64, 5, 1  # of training by several processes: pictures a step, steps, and how many do not count


def rows(rounds: int) -> list[Row]:
    """One picture over one of many, one process over two, and a step with few pictures over one with many."""
    return [*drawing(rounds), *processes(rounds), *feeding()]


def drawing(rounds: int) -> list[Row]:
    """Seconds a picture of the shipped model, four steps, at batch sizes and at sizes."""
    model = TextToImage.load("emoji")

    def draw(count: int, side: int) -> float:
        started = time.perf_counter()
        model("panda", seed=1, num_images=count, batch_size=count, steps=4, width=side, height=side)
        return (time.perf_counter() - started) / count

    found = contest({f"batch {n}": partial(draw, n, 128) for n in (1, 4, 16)}, rounds, "batch")
    sizes = contest({f"{side}x{side}": partial(draw, 1, side) for side in (128, 192, 256)}, rounds, "size")
    more = {f"{name}, ms": round(1e3 * t.median, 1) for c in (found, sizes) for name, t in c.timings.items()}
    more["A/A of the sizes"] = round(sizes.drift, 3)
    limit = "1 where one picture keeps the cores busy"
    return [Row.of("", "a picture alone / one of 16", found, "batch 1", "batch 16", 1.0, limit=limit, **more)]


def processes(rounds: int) -> list[Row]:
    """Seconds of the same steps of the shipped model by one process and by two, of one thread each."""
    found = contest({f"{n} at once": partial(launched, n) for n in (1, 2)}, rounds, "processes")
    pictures = (STEPS - WARM) * BATCH
    rate = {f"{name}, pictures a second": round(pictures / t.median, 2) for name, t in found.timings.items()}
    what = f"training, shipped model, batch {BATCH}: one process / two, one thread each"
    return [Row.of("", what, found, "1 at once", "2 at once", 1.8, limit="2, the cores", **rate)]


def launched(count: int) -> float:
    """Seconds of the steps after the warm-up, of a fine-tune by so many processes of a launcher."""
    launch = ["--config_file", "configs/accelerate/ddp.yaml", "--num_processes", str(count), "--main_process_port", "0"]
    train = {"steps": STEPS, "batch_size": BATCH, "log_every": WARM, "sample_every": 0, "validate_every": 0}
    with TemporaryDirectory() as scratch:
        given = [f"data.path={DATA}", f"output={scratch}", "data.hold_out=0", "recipe.steps=1"]
        run = ["train.py", "configs/finetune.yaml", *given, *(f"train.{name}={value}" for name, value in train.items())]
        words = [sys.executable, "-m", "accelerate.commands.launch", *launch, *run]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(words, env=environment, cwd=ROOT, check=True, capture_output=True)
        return sum(seconds for _, seconds in timed(Path(scratch) / "finetune", BATCH)[WARM:])


def feeding() -> list[Row]:
    """Start-up, memory and time a step of the order of samples, from a thousand pictures to a million."""
    told = {f"{size:,} pictures": feed(size) for size in SIZES}
    few, many = (told[f"{size:,} pictures"]["microseconds a step"] for size in (SIZES[0], SIZES[-1]))
    return [Row("", "time a step: 1,000 pictures / 1,000,000", few / many, 0.5, limit="1", more=told)]


def feed(size: int) -> dict[str, float]:
    """What an index of so many pictures costs, and the order that they come in."""
    started = time.perf_counter()
    pictures = [_picture(n) for n in range(size)]
    read = time.perf_counter() - started
    order = Order(0, np.full(size, 1 / size))
    FolderFeed(order, pictures, {})
    share = Share(batch_size=64, micro_batch=64)
    steps = batches(order, 0, 200, share.batch_size, share.micro_batch)
    started = time.perf_counter()
    next(steps)
    first = time.perf_counter() - started
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    each = (time.perf_counter() - started) / count
    del pictures, order, steps
    return {
        "seconds to make the index": round(read, 2),
        "seconds to the first step": round(first, 3),
        "microseconds a step": round(1e6 * each, 1),
        "bytes a picture": round(_bytes(lambda: [_picture(n) for n in range(size)]) / size),
        "bytes a picture of the order": round(_bytes(lambda: _begun(size)) / size),
    }


def _begun(size: int) -> Order:
    """An order that has made its first epoch."""
    order = Order(0, np.full(size, 1 / size))
    order.visits(0, 1)
    return order


def _bytes(make: Callable[[], object]) -> int:
    """What Python and numpy hold for something, whatever the process has used and freed before."""
    tracemalloc.start()
    kept = make()
    found, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return found


def _picture(number: int) -> Picture:
    name = f"{number}.png"
    return Picture(file=Path(name), texts=("a",), keywords=(), group=name, weight=1.0, id=name_id(name))
