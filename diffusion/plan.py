"""What a run will train on, and in which portions: found out before anything is trained."""

import importlib.util
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion import checkpoint, memory, optimizers, tasks
from diffusion import config as configs
from diffusion.data.buckets import BucketOrder, nearest, shapes
from diffusion.data.feed import Feed, FolderFeed, Share
from diffusion.data.order import Order, Visits
from diffusion.data.shards import ShardFeed, find_shards
from diffusion.data.source import (
    Picture,
    group_weights,
    hold_out,
    is_held_out,
    leave_out_small,
    open_folder,
    too_small,
)
from diffusion.schema import Config, Data, Train
from diffusion.tasks.prior import missing, read_prior

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLE = 512  # pictures of a stream that stand for all of it


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pictures of a run. Of shards they are a sample, and ``shards`` is where all of them come from."""

    pictures: list[Picture]
    held_out: list[Picture]
    small: Mapping[str, str] = field(default_factory=dict)  # file -> reason
    passed_over: Mapping[str, str] = field(default_factory=dict)  # file -> reason, of what is no picture of the set
    set_aside: Mapping[str, str] = field(default_factory=dict)  # file -> reason, of those that are held out
    shards: ShardFeed | None = None

    @property
    def left_out(self) -> dict[str, str]:
        """File -> reason of all that is neither trained on nor held out."""
        return {**self.small, **self.passed_over}

    def note(self) -> str | None:
        """One line on what is left out, if anything is."""
        if not self.left_out:
            return None
        (file, reason), count = next(iter(self.left_out.items())), len(self.left_out)
        return (
            f"{count} of {count + len(self.pictures) + len(self.held_out)} pictures are left out, "
            f"first {file}: {reason}"
            + ("; data.upscale=true takes those that are too small" if self.small else "")
            + "; coverage.jsonl names all"
        )


def check(config: Config) -> None:
    """What a run needs besides pictures and networks. ValueError if this machine lacks it."""
    train = config.train
    if train.precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("train.precision fp16 is slow and wrong on the CPU: use auto, bf16 or fp32")
    optimizers.check(train)
    for name in train.log_with:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"train.log_with {name} is not installed: pip install {name}, or leave it out")
    nearest_folder = next(folder for folder in (config.folder, *config.folder.parents) if folder.exists())
    try:  # permission bits alone do not tell of read-only mounts
        with tempfile.NamedTemporaryFile(dir=nearest_folder):
            pass
    except OSError as error:
        raise ValueError(f"output {config.folder} cannot be written ({error.strerror}): choose another one") from None


def check_same(config: Config, state: Mapping[str, Any]) -> None:
    """ValueError if a run cannot go on from the ``state`` of a checkpoint: it was another run, or it is done."""
    before, now = state.get("made_by", {}), configs.identity(config)
    changed = [name for name in before if before[name] != now.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{config.folder} was begun with {name}={before[name]!r} and cannot go on with {now.get(name)!r}"
            + (f" (nor with another {', '.join(changed[1:])})" if changed[1:] else "")
            + ": set it back, or give the run another name"
        )
    if state["step"] > config.train.steps:
        raise ValueError(
            f"{config.folder} is at step {state['step']:,} already, beyond train.steps {config.train.steps:,}: "
            "raise it, or give the run another name"
        )


def read_source(config: Config) -> Source:
    """What is trained on, what is held out, and what is left out for which reason."""
    data = config.data
    if data.sharded:
        return _read_shards(config)
    said = "" if config.task == "autoencoder" else data.captions.text  # an autoencoder reads no captions
    folder = open_folder(data.path, data.balance, data.captions.source, said, apart=Path(config.output))
    listed = folder.of("held_out", may_be_empty=True)
    pictures, drawn = hold_out(folder.of("train"), data.hold_out)
    prior, passed_over = read_prior(config, pictures) if data.prior is not None else ([], {})
    shape_of = partial(nearest, among=_shapes(data)) if data.buckets else None
    kept, small = (pictures + prior, {}) if data.upscale else leave_out_small(pictures + prior, data.size, shape_of)
    if not kept:
        raise ValueError(
            f"all {len(pictures)} pictures are smaller than data.size {data.size}: lower it, or set data.upscale=true"
        )
    held_out, unseen = listed + drawn, dict[str, str]()
    if not data.upscale:
        held_out, unseen = leave_out_small(held_out, data.size, shape_of)
    set_aside = dict.fromkeys((str(picture.file) for picture in listed), "held out by its split in the metadata")
    set_aside |= dict.fromkeys((str(picture.file) for picture in drawn), f"held out by data.hold_out {data.hold_out}")
    return Source(
        pictures=kept,
        held_out=held_out,
        small=small | unseen,
        passed_over={**folder.passed_over, **passed_over},
        set_aside={file: reason for file, reason in set_aside.items() if file not in unseen},
    )


def feed(config: Config, source: Source, task: tasks.Task) -> Feed:
    """The batches of a run, in its order."""
    if source.shards is not None:
        small = source.shards.refuse
        source.shards.refuse = lambda picture: small(picture) or task.refuses(picture)
        return source.shards
    return FolderFeed(_order(config, source.pictures), source.pictures, source.left_out | dict(source.set_aside))


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
    """What training would do, without doing any of it: a few lines of text. ValueError where it would refuse."""
    check(config)
    newest = _going_on(config)
    t, source = config.train, read_source(config)
    if source.shards is not None:
        source.shards.check(processes)
    portion = share(config, 0, processes)
    task = tasks.build(config, source.pictures, torch.device("cpu"))
    state, trained, total = state_bytes(task, t)
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
        f"{_kept(task, portion.micro_batch)} for what a micro-batch keeps (in fp32)",
        "checkpoints": f"{(state - 4 * total) / 2**30:.2f} GiB each",
        "cache": task.cache_note(),
        **({"buckets": _buckets(config, source.pictures)} if config.data.buckets else {}),
        "writes": _writes(config) + (f", going on from {newest.name}" if newest is not None else ""),
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


def _going_on(config: Config) -> Path | None:
    """The checkpoint that a run would go on from. ValueError if it cannot."""
    newest = checkpoint.latest(config.folder / "checkpoints")
    if newest is not None:
        check_same(config, json.loads((newest / "state.json").read_text(encoding="utf-8")))
    return newest


def _writes(config: Config) -> str:
    """What would be written, and where."""
    names = ["model/", "samples/", "checkpoints/", "config.yaml", "metrics.jsonl", "coverage.jsonl", "report.html"]
    names += ["validation.jsonl", "best/"] if config.train.validate_every else []
    names += ["prior/"] if config.data.prior is not None and config.data.prior.path is None else []
    cache = config.task == "text_to_image" and config.data.cache
    return f"{config.folder}/: {', '.join(names)}" + (f"; {Path(config.output) / 'cache'}/" if cache else "")


def _kept(task: tasks.Task, count: int) -> str:
    """What autograd keeps of so many pictures, measured with one."""
    most = memory.free_bytes(torch.device("cpu")) // 2  # the other half is for what is not kept
    try:
        return f"{memory.saved_bytes(partial(_loss, task, 1), most) * count / 2**30:.2f} GiB"
    except (RuntimeError, MemoryError):  # the allocator's own error is a RuntimeError
        return f"more than {most * count / 2**30:.0f} GiB, for which this machine has too little free,"


def state_bytes(task: tasks.Task, train: Train) -> tuple[int, int, int]:
    """Bytes of weights, gradients, optimizer and averages; number of trained weights; number of all weights."""
    weights = [(p.numel(), p.requires_grad) for p in task.parameters()]
    total, trained = sum(count for count, _ in weights), sum(count for count, trains in weights if trains)
    copies = 1 + optimizers.NUMBERS[train.optimizer] + (train.ema > 0)
    return int(4 * (total + trained * copies)), trained, total


def refuse_full_disk(config: Config, trained: int, total: int) -> None:
    """ValueError if a checkpoint and the model folders will not fit; of that many trained weights, and weights in all.

    Measured before anything is computed: later the first checkpoint would be the one to find out.
    """
    t, m = config.train, config.model
    kept = 4 * trained * (1 + optimizers.NUMBERS[t.optimizer] + (t.ema > 0))
    model = 4 * trained if m.lora is not None or m.words else total * STORED[t.save_dtype].itemsize
    need = int(kept + model * (2 if t.validate_every else 1))
    if (lacking := checkpoint.shortage(config.folder, need, "a checkpoint and the model take")) is not None:
        raise ValueError(lacking)


def _loss(task: tasks.Task, count: int) -> torch.Tensor:
    return task.module(task.example(count)).mean()


def _read_shards(config: Config) -> Source:
    data, urls = config.data, find_shards(config.data.path)
    if data.buckets or data.balance is not None:
        raise ValueError("shards are read as they come: data.buckets and data.balance need a folder")
    if config.data.cache:
        raise ValueError("shards are encoded at every visit: set data.cache=false")
    if data.prior is not None:
        raise ValueError("shards are read as they come: data.prior needs a folder")
    stream = ShardFeed(
        urls=urls,
        seed=config.seed,
        batch_size=config.train.batch_size,
        refuse=partial(_refuses, data),
        held_out=lambda picture: data.hold_out > 0 and is_held_out(picture, data.hold_out),
        captioned=config.task != "autoencoder",
    )
    pictures = stream.sample(SAMPLE, held_out=False)
    if not pictures:
        raise ValueError(f"{data.path}: no picture with a caption of at least {data.size}x{data.size} in any shard")
    held_out = stream.sample(config.train.validate_pictures, held_out=True) if data.hold_out > 0 else []
    return Source(pictures=pictures, held_out=held_out, shards=stream)


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
