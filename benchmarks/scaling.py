"""How it grows: pictures a second with the batch and the size, and a training feed with the number of pictures."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import contest
from benchmarks.table import Row
from diffusion import TextToImage
from diffusion.data.feed import FolderFeed, Share
from diffusion.data.order import Order, batches
from diffusion.data.source import Picture
from diffusion.rng import name_id

SIZES = (10**3, 10**4, 10**5, 10**6)


def rows(rounds: int) -> list[Row]:
    """Ratios of a picture alone over a picture in a batch, and of time a step with few pictures over with many."""
    return [*drawing(rounds), *feeding()]


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
    limit = "1 where one picture keeps the cores busy"
    return [Row.of("", "a picture alone / one of 16", found, "batch 1", "batch 16", 1.0, limit=limit, **more)]


def feeding() -> list[Row]:
    """Start-up, memory and time a step of the order of samples, from a thousand pictures to a million."""
    told = {f"{size:,} pictures": feed(size) for size in SIZES}
    few, many = (told[f"{size:,} pictures"]["microseconds a step"] for size in (SIZES[0], SIZES[-1]))
    return [Row("", "time a step: 1,000 pictures / 1,000,000", few / many, 0.5, limit="1", more=told)]


def feed(size: int) -> dict[str, float]:
    """What an index of so many pictures costs."""
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    pictures = [_picture(n) for n in range(size)]
    read = time.perf_counter() - started
    index = psutil.Process().memory_info().rss - before
    order = Order(0, np.full(size, 1 / size))
    FolderFeed(order, pictures, {})
    started = time.perf_counter()
    share = Share(batch_size=64, micro_batch=64)
    steps = batches(order, 0, 200, share.batch_size, share.micro_batch)
    next(steps)
    first = time.perf_counter() - started
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    each = (time.perf_counter() - started) / count
    return {
        "seconds to make the index": round(read, 2),
        "seconds to the first step": round(first, 2),
        "microseconds a step": round(1e6 * each, 1),
        "bytes a picture": round(index / size),
    }


def _picture(number: int) -> Picture:
    name = f"{number}.png"
    return Picture(file=Path(name), texts=("a",), keywords=(), group=name, weight=1.0, id=name_id(name))
