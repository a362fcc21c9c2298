"""The one training loop, on one process or many; the only module that knows Accelerate."""

import atexit
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn

from diffusion import checkpoint, memory, optimizers, plan, tasks, validation
from diffusion.data.feed import Share
from diffusion.ema import Ema
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.precision import compile_if_equal, fast_dtype
from diffusion.run import Run, together
from diffusion.schema import Config
from diffusion.tasks.prior import draw_missing

PRECISION = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def train(config: Config, *, quiet: bool = False) -> Path:
    """Train what the config says, or go on where the run of that name stopped. Returns the model folder.

    What it does is told on stderr, with a bar; with ``quiet`` only what it warns of is.

    Killed at any instant and started again, the run ends with the weights of a run that was never stopped: all
    randomness is a function of (seed, sample, visit), and checkpoints are whole or absent.
    """
    # what is trained, on what, and in which portions
    config = _settled(config)
    accelerator = _accelerator(config)
    if accelerator.distributed_type == DistributedType.FSDP and (config.model.lora is not None or config.model.words):
        raise ValueError("FSDP shards whole networks; adapters are small: launch with configs/accelerate/ddp.yaml")
    share = plan.share(config, accelerator.process_index, accelerator.num_processes)
    if config.data.prior is not None:
        together(lambda: draw_missing(config, quiet=quiet) if accelerator.is_main_process else None, _gather)
    source = together(lambda: plan.read_source(config), _gather)
    if (note := source.note()) is not None and accelerator.is_main_process:
        print(note, file=sys.stderr)
    task = together(lambda: _task(config, source, accelerator.device, quiet), _gather)
    frozen = checkpoint.fingerprint({n: p for n, p in task.module.named_parameters() if not p.requires_grad})
    feed = plan.feed(config, source, task)
    # what is encoded once, by networks that no process has only a part of yet
    dataset, probes = together(lambda: (task.dataset, _probes(config, source, task)), _gather)
    if config.train.auto_batch:
        share = _fitting(config, task, accelerator, share, quiet)
    if config.train.compile:
        _compile(task, accelerator, partial(_example_loss, task, accelerator, share.micro_batch))
    module, optimizer = prepare(accelerator, task.module, partial(optimizers.build, train=config.train))
    ema = Ema(task.module, config.train.ema, config.train.ema_every)
    pictures = len(source.pictures) if source.shards is None else None
    run = Run(config, task, accelerator, _gather, optimizer, ema, feed, pictures, probes, frozen, quiet)
    first = run.resume()
    run.say(f"{plan.portions(share)}; steps {first:,} to {config.train.steps:,} of {config.name}")
    if config.train.log_with:
        accelerator.init_trackers(config.name)
    batches = feed.batches(dataset, first, config.train.steps, share)
    trainable = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    module.train()
    optimizer.train()

    for step in run.steps(first):
        # learning rate, in optimizer steps whatever the number of processes
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(config.train, step)

        # gradients: the mean over the whole batch, however it is split
        loss, seen = torch.zeros((), device=accelerator.device), []
        for micro in range(share.accumulation):
            batch = {name: tensor.to(accelerator.device) for name, tensor in run.next(batches, step).items()}
            batch["step"] = torch.tensor(step, device=accelerator.device)
            last = micro == share.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(module), accelerator.autocast():
                losses = module(batch)
                part = losses.mean() / share.accumulation
            accelerator.backward(part)
            loss += part.detach()
            seen.append((batch["id"], losses.detach()))

        # update, unless it would spread a NaN over the weights
        norm = accelerator.clip_grad_norm_(trainable, config.train.clip if config.train.clip > 0 else math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        run.check_finite(step, loss, norm, seen)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.train.ema > 0:
            ema.update(task.module, step + 1)
        run.finish_step(step, loss, norm)

    run.export(config.train.steps)
    for tracker in accelerator.trackers:
        tracker.finish()
    return run.folder / "model"


def describe(config: Config) -> str:
    """What ``train`` would do, without doing any of it: a few lines of text."""
    return plan.describe(config, _processes().num_processes)


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer_of: Callable[[nn.Module], Any]
) -> tuple[nn.Module, Any]:
    """The module and its optimizer, wrapped for as many processes as there are."""
    if accelerator.distributed_type == DistributedType.FSDP:
        module = module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # the only one to shard
    return accelerator.prepare(module, optimizer_of(module))


# --- small print ------------------------------------------------------------------------------------------------------


def _settled(config: Config) -> Config:
    """The config with the precision that the run has: ``auto`` is decided once, by one process, for as long as it goes.

    ValueError if the run of that name cannot go on as this one.
    """
    first, device = _processes().is_main_process, _processes().device
    before = checkpoint.newest_state(config.folder / "checkpoints") if first else {}
    together(lambda: plan.check(config), _gather)
    together(lambda: plan.check_same(config, before) if before else None, _gather)
    precision: Any = config.train.precision
    if precision == "auto" and first:
        precision = before.get("precision") or PRECISION[fast_dtype(device)]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=_gather(precision)[0]))


def _task(config: Config, source: plan.Source, device: torch.device, quiet: bool) -> tasks.Task:
    """The task of a run, whose state will fit on the disk."""
    task = tasks.build(config, source.pictures, device, quiet)
    _, trained, total = plan.state_bytes(task, config.train)
    plan.refuse_full_disk(config, trained, total)
    return task


def _probes(config: Config, source: plan.Source, task: tasks.Task) -> dict[str, validation.Probe]:
    if not config.train.validate_every:
        return {}
    return validation.sets(task, source.pictures, source.held_out, config.train.validate_pictures)


def _example_loss(task: tasks.Task, accelerator: Accelerator, count: int) -> Tensor:
    batch = {name: tensor.to(accelerator.device) for name, tensor in task.example(count).items()}
    with accelerator.autocast():
        return task.module(batch).mean()


def _fitting(config: Config, task: tasks.Task, accelerator: Accelerator, share: Share, quiet: bool) -> Share:
    """The same share in the largest micro-batches that fit in memory on every process."""
    reserve = plan.state_bytes(task, config.train)[0]
    loss = partial(_example_loss, task, accelerator)
    most = memory.largest_micro_batch(share.batch_size // share.processes, loss, accelerator.device, reserve)
    task.module.zero_grad(set_to_none=True)
    micro = min(_gather(most))
    if accelerator.is_main_process and not quiet:
        print(f"auto_batch: {micro} pictures at a time of {share.batch_size} a step", file=sys.stderr)
    return dataclasses.replace(share, micro_batch=micro)


def _processes() -> PartialState:
    """The processes of this run; on a machine without a GPU those of a launcher are only found if one says so."""
    found = PartialState(cpu=not torch.accelerator.is_available())
    if found.num_processes > 1:
        _part_at_exit()
    return found


@cache
def _part_at_exit() -> None:
    """Leave the other processes when this one ends, and not before: it may train more than one run."""
    atexit.register(_part)


def _part() -> None:
    # gloo's threads need the interpreter's lock to let go of what they sent last. Asleep, this one does not hold it;
    # going on, it could wait for them with the lock in its hand, or end under them: for ever the one, SIGABRT the other
    # (pytorch/pytorch issue 190489).
    time.sleep(0.1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _gather(value: Any) -> list[Any]:
    """What each process has, on all of them."""
    return list(gather_object([value]))


def _compile(task: tasks.Task, accelerator: Accelerator, loss: Callable[[], Tensor]) -> None:
    """Compile the network for the ``loss`` of a batch of the size it will meet, if it proves equal; takes minutes."""
    task.module.train()
    refused = compile_if_equal(task.network, loss)
    if refused is not None:
        speed_up_group_norm(task.network)  # left out for the compiler, which does as well
        if accelerator.is_main_process:
            print(refused, file=sys.stderr)


def _accelerator(config: Config) -> Accelerator:
    train, device = config.train, _processes().device
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    AcceleratorState._reset_state()  # it keeps the first run's precision for the life of the process
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=train.precision.replace("fp32", "no"),
        kwargs_handlers=handlers,
        log_with=[str(name) for name in train.log_with] or None,
        project_dir=config.folder,
    )
