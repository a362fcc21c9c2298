"""What a run will train on, and in which portions: found out before anything is trained."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import torch

from diffusion import checkpoint, memory, optimizers, tasks
from diffusion.config import Config, Data, Train
from diffusion.data.buckets import BucketOrder, nearest, shapes
from diffusion.data.feed import Feed, FolderFeed, Share
from diffusion.data.order import Order, Visits
from diffusion.data.shards import ShardFeed, are_shards, find_shards
from diffusion.data.source import (
    Picture,
    group_weights,
    hold_out,
    is_held_out,
    leave_out_small,
    read_folder,
    too_small,
)
from diffusion.tasks.prior import missing, read_prior

SAMPLE = 512  # pictures of a stream that stand for all of it


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pictures of a run. Of shards they are a sample, and ``shards`` is where all of them come from."""

    pictures: list[Picture]
    held_out: list[Picture]
    left_out: dict[str, str]  # file -> reason
    shards: ShardFeed | None = None

    def note(self) -> str | None:
        """One line on what is left out, if anything is."""
        if not self.left_out:
            return None
        (file, reason), count = next(iter(self.left_out.items())), len(self.left_out)
        return (
            f"{count} of {count + len(self.pictures) + len(self.held_out)} pictures are left out, first {file}: "
            f"{reason}; data.upscale=true takes them, coverage.jsonl names all"
        )


def read_source(config: Config) -> Source:
    """What is trained on, what is held out, and what is left out for which reason."""
    data = config.data
    if are_shards(data.path):
        return _read_shards(config)
    said = data.captions.source if data.captions.text is None or data.balance is not None else "none"
    pictures = read_folder(data.path, "train", data.balance, said)
    held_out = read_folder(data.path, "held_out", data.balance, said, may_be_empty=True)
    if data.captions.text is not None:
        same = {"texts": (data.captions.text,), "keywords": ()}
        pictures, held_out = ([replace(picture, **same) for picture in some] for some in (pictures, held_out))  # type: ignore[arg-type]
    pictures, more = hold_out(pictures, data.hold_out)
    held_out += more
    prior = read_prior(config, pictures) if data.prior is not None else []
    if data.upscale:
        return Source(pictures=pictures + prior, held_out=held_out, left_out={})
    shape_of = partial(nearest, among=_shapes(data)) if data.buckets else None
    kept, left_out = leave_out_small(pictures + prior, data.size, shape_of)
    if not kept:
        raise ValueError(
            f"all {len(pictures)} pictures are smaller than data.size {data.size}: lower it, or set data.upscale=true"
        )
    held_out, unseen = leave_out_small(held_out, data.size, shape_of)
    return Source(pictures=kept, held_out=held_out, left_out=left_out | unseen)


def feed(config: Config, source: Source, task: tasks.Task) -> Feed:
    """The batches of a run, in its order."""
    if source.shards is not None:
        small = source.shards.refuse
        source.shards.refuse = lambda picture: small(picture) or task.refuses(picture)
        return source.shards
    return FolderFeed(_order(config, source.pictures), source.pictures, source.left_out)


def share(config: Config, process: int, processes: int) -> Share:
    """What one process computes of a step. ValueError if the batch does not split like this."""
    train = config.train
    micro = train.batch_size // processes if train.micro_batch is None else train.micro_batch
    if micro < 1 or train.batch_size % (micro * processes):
        raise ValueError(
            f"train.batch_size {train.batch_size} does not split into {processes} processes x micro-batches of "
            f"{micro}: choose a multiple of {max(1, micro) * processes}"
        )
    return Share(
        batch_size=train.batch_size,
        micro_batch=micro,
        process=process,
        processes=processes,
        workers=train.workers,
    )


def portions(share: Share) -> str:
    """How a batch is split, for a person."""
    processes = "1 process" if share.processes == 1 else f"{share.processes} processes"
    return f"{processes} x {share.micro_batch} pictures x {share.accumulation} accumulated"


def learning_rate(train: Train, step: int) -> float:
    """Linear warm-up to the peak, then constant, a half cosine or a line to zero at the last step."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    shape = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return train.lr * shape[train.lr_schedule]


def describe(config: Config, processes: int) -> str:
    """What training would do, without doing any of it: a few lines of text."""
    t, source = config.train, read_source(config)
    if source.shards is not None:
        source.shards.check(processes)
    portion = share(config, 0, processes)
    task = tasks.build(config, source.pictures, torch.device("cpu"))
    state, trained, total = state_bytes(task, t)
    kept = memory.saved_bytes(partial(_loss, task, 1))
    newest = checkpoint.latest(config.folder / "checkpoints")
    count = len(source.pictures)
    epochs = f", {t.steps * t.batch_size / count:,.1f} epochs" if source.shards is None else ""
    rows = {
        "pictures": f"{count:,} to train on, {len(source.held_out):,} held out"
        if source.shards is None
        else f"{len(source.shards.urls):,} shards, in {source.shards.lanes} lanes",
        "left out": source.note() or "none",
        **({"prior": f"{len(missing(config)):,} pictures to draw first"} if config.data.prior else {}),
        "steps": f"{t.steps:,} of {t.batch_size} pictures{epochs}",
        "batch": portions(portion),
        "weights": f"{trained:,} trained of {total:,}",
        "memory": f"{state / 2**30:.2f} GiB a process for weights, gradients, {t.optimizer} and averages, "
        f"{kept * portion.micro_batch / 2**30:.2f} GiB for what a micro-batch keeps (in fp32)",
        "checkpoints": f"{(state - 4 * trained) / 2**30:.2f} GiB each",
        "cache": task.cache_note(),
        **({"buckets": _buckets(config, source.pictures)} if config.data.buckets else {}),
        "writes": f"{config.folder}/" + (f", going on from {newest.name}" if newest is not None else ""),
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


def state_bytes(task: tasks.Task, train: Train) -> tuple[int, int, int]:
    """Bytes of weights, gradients, optimizer and averages; number of trained weights; number of all weights."""
    weights = [(p.numel(), p.requires_grad) for p in task.parameters()]
    total, trained = sum(count for count, _ in weights), sum(count for count, trains in weights if trains)
    copies = 1 + optimizers.NUMBERS[train.optimizer] + (train.ema > 0)
    return int(4 * (total + trained * copies)), trained, total


def _loss(task: tasks.Task, count: int) -> torch.Tensor:
    return task.module(task.example(count)).mean()


def _read_shards(config: Config) -> Source:
    data = config.data
    if data.buckets or data.balance is not None:
        raise ValueError("shards are read as they come: data.buckets and data.balance need a folder")
    if config.data.cache:
        raise ValueError("shards are encoded at every visit: set data.cache=false")
    stream = ShardFeed(
        urls=find_shards(data.path),
        seed=config.seed,
        batch_size=config.train.batch_size,
        refuse=partial(_refuses, data),
        held_out=lambda picture: data.hold_out > 0 and is_held_out(picture, data.hold_out),
    )
    pictures = stream.sample(SAMPLE, held_out=False)
    if not pictures:
        raise ValueError(f"{data.path}: no picture with a caption of at least {data.size}x{data.size} in any shard")
    held_out = stream.sample(config.train.validate_pictures, held_out=True) if data.hold_out > 0 else []
    return Source(pictures=pictures, held_out=held_out, left_out={}, shards=stream)


def _refuses(data: Data, picture: Picture) -> str | None:
    """Why a picture cannot be used, if it cannot; what is decoded to see it is kept with it."""
    try:
        picture.image(data.background)
    except ValueError as error:
        return str(error)
    return None if data.upscale else too_small(picture, data.size)


def _order(config: Config, pictures: list[Picture]) -> Visits:
    weights = group_weights(pictures, config.data.balance_power if config.data.balance else 0.0)
    if not config.data.buckets:
        return Order(config.seed, weights)
    among = _shapes(config.data)
    shape_of = [nearest(picture.sides, among) for picture in pictures]
    return BucketOrder(config.seed, weights, shape_of, config.train.batch_size)


def _buckets(config: Config, pictures: list[Picture]) -> str:
    counts = Counter(nearest(picture.sides, _shapes(config.data)) for picture in pictures)
    return ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in sorted(counts.items()))


def _shapes(data: Data) -> list[tuple[int, int]]:
    return shapes(data.size, data.bucket_step, data.bucket_ratio)
