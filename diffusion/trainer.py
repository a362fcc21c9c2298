"""The one training loop, on one process or many; the only module that knows Accelerate."""

import importlib.util
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion import checkpoint, optimizers, report, tasks, validation
from diffusion import config as configs
from diffusion.checkpoint import Checkpoint
from diffusion.config import Config, Train
from diffusion.data.buckets import BucketOrder, nearest
from diffusion.data.coverage import Ledger
from diffusion.data.order import Order, Visits, batches
from diffusion.data.pixels import read_size
from diffusion.data.source import Picture, group_weights, hold_out, leave_out_small, read_folder
from diffusion.ema import Ema
from diffusion.images import make_grid
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.precision import compile_if_equal, fast_dtype

PRECISION = {torch.bfloat16: "bf16", torch.float32: "no"}


def train(config: Config, *, quiet: bool = False) -> Path:
    """Train what the config says, or go on where the run of that name stopped. Returns the model folder.

    Killed at any instant and started again, the run ends with the weights of a run that was never stopped: all
    randomness is a function of (seed, sample, visit), and checkpoints are whole or absent.
    """
    accelerator = _accelerator(config)
    micro_batch = _micro_batch(config.train, accelerator.num_processes)
    pictures, held_out, left_out = _pictures(config)
    if left_out and accelerator.is_main_process:
        print(_left_out(left_out, len(pictures) + len(left_out)), file=sys.stderr)
    task = tasks.build(config, pictures, accelerator.device)
    if config.train.compile:
        _compile(task, accelerator, micro_batch)
    module, optimizer = accelerator.prepare(task.module, optimizers.build(task.module, config.train))
    ema = Ema(task.module, config.train.ema, config.train.ema_every)
    order = _order(config, pictures)
    ledger = Ledger(order, pictures, left_out)
    probes = {}
    if config.train.validate_every and accelerator.is_main_process:
        probes = validation.sets(task, pictures, held_out, config.train.validate_pictures)
    run = Run(config, task, accelerator, optimizer, ema, ledger, probes)
    first = run.resume()
    if config.train.log_with:
        accelerator.init_trackers(config.name)

    plan = (config.train.batch_size, micro_batch, accelerator.process_index, accelerator.num_processes)
    visits = batches(order, first, config.train.steps, *plan)
    loader = iter(DataLoader(task.dataset, batch_sampler=visits, collate_fn=dict, num_workers=config.train.workers))
    accumulation = config.train.batch_size // (micro_batch * accelerator.num_processes)
    trainable = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    module.train()
    optimizer.train()

    for step in run.steps(first, quiet or not accelerator.is_main_process):
        # learning rate, in optimizer steps whatever the number of processes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)

        # gradients: the mean over the whole batch, however it is split
        loss, seen = torch.zeros((), device=accelerator.device), []
        for micro in range(accumulation):
            batch = {name: tensor.to(accelerator.device) for name, tensor in next(loader).items()}
            last = micro == accumulation - 1
            with nullcontext() if last else accelerator.no_sync(module), accelerator.autocast():
                losses = module(batch)
                share = losses.mean() / accumulation
            accelerator.backward(share)
            loss += share.detach()
            seen.append((batch["id"], losses.detach()))

        # update, unless it would spread a NaN over the weights
        norm = accelerator.clip_grad_norm_(trainable, config.train.clip if config.train.clip > 0 else math.inf)
        run.check_finite(step, loss, norm, seen)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.train.ema > 0:
            ema.update(task.module, step + 1)
        run.finish_step(step, loss, norm)

    return run.finish()


def plan(config: Config) -> str:
    """What ``train`` would do, without doing any of it: a few lines of text."""
    processes, t = PartialState().num_processes, config.train
    micro_batch = _micro_batch(t, processes)
    pictures, held_out, left_out = _pictures(config)
    task = tasks.build(config, pictures, torch.device("cpu"))
    weights = [(p.numel(), p.requires_grad) for p in task.parameters()]
    trained = sum(count for count, trains in weights if trains)
    stored = sum(count for count, _ in weights) + trained * (1 + optimizers.NUMBERS[t.optimizer] + (t.ema > 0))
    newest = checkpoint.latest(config.folder / "checkpoints")
    folder = f"{config.folder}/" + (f", going on from {newest.name}" if newest is not None else "")
    rows = {
        "pictures": f"{len(pictures):,} to train on, {len(held_out):,} held out",
        "left out": _left_out(left_out, len(pictures) + len(held_out) + len(left_out)) if left_out else "none",
        "steps": f"{t.steps:,} of {t.batch_size} pictures, {t.steps * t.batch_size / len(pictures):,.1f} epochs",
        "batch": f"{processes} processes x {micro_batch} pictures x {t.batch_size // micro_batch // processes} "
        "accumulated",
        "weights": f"{trained:,} trained of {sum(count for count, _ in weights):,}",
        "memory": f"{4 * stored / 2**30:.2f} GiB a process for weights, gradients, {t.optimizer} and averages; "
        "activations come on top",
        "checkpoints": f"{4 * (stored - trained) / 2**30:.2f} GiB each",
        "latents": task.cache_note(),
        **({"buckets": _buckets(config, pictures)} if config.data.buckets else {}),
        "writes": folder,
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


def learning_rate(train: Train, step: int) -> float:
    """Linear warm-up to the peak, then constant, a half cosine or a line to zero at the last step."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    shape = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return train.lr * shape[train.lr_schedule]


@dataclass
class Run:
    """A run's folder: what is read when it starts, and written while it goes."""

    config: Config
    task: tasks.Task
    accelerator: Accelerator
    optimizer: Any
    ema: Ema
    ledger: Ledger
    probes: dict[str, validation.Probe]

    def __post_init__(self) -> None:
        self.folder = self.config.folder
        self.stop = False
        self.saved_at = self.logged_at = time.monotonic()
        self.losses: list[Tensor] = []
        self.warned = False
        self.checkpointed = -1
        self.history = validation.History(self.folder / "validation.jsonl")
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(configs.dump(self.config), encoding="utf-8")

    # --- beginning and end

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one. Returns the step to go on with."""
        path = checkpoint.latest(self.folder / "checkpoints")
        if path is None:
            self._forget_after(0)  # a run that was killed before its first checkpoint has left its metrics
            return 0
        found = checkpoint.read(path)
        self.task.module.load_state_dict(dict(found.tensors["weights"]))
        for name, weight in self.ema.weights.items():
            weight.copy_(found.tensors["ema"][name])
        optimizers.load_state(
            self.optimizer, self.task.module, found.tensors["optimizer"], found.state.get("optimizer", ())
        )
        self.checkpointed = found.state["step"]
        self._forget_after(self.checkpointed)
        self._say(f"resuming {self.folder} at step {self.checkpointed}")
        return self.checkpointed

    def steps(self, first: int, quiet: bool) -> Iterator[int]:
        """The steps to do, with a progress bar; ends early, at a step's end, on SIGTERM or Ctrl-C."""
        total = self.config.train.steps
        with (
            _signals(self._interrupt),
            tqdm(total=total, initial=first, unit="step", disable=quiet, smoothing=0.02) as self.bar,
        ):
            for step in range(first, total):
                yield step
                self.bar.update()
                if self._any(self.stop):
                    self.save(step + 1)
                    self._say(f"stopped after step {step + 1}; the same command goes on from there")
                    raise KeyboardInterrupt
        self.save(total)

    def finish(self) -> Path:
        """Write the model folder and its last samples."""
        if self.accelerator.is_main_process:
            self.export(self.config.train.steps)
        self.accelerator.end_training()  # closes what metrics are logged with
        self.accelerator.wait_for_everyone()
        return self.folder / "model"

    # --- after each step

    def check_finite(self, step: int, loss: Tensor, norm: Tensor | None, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Stop before the update if the loss or the gradient is not finite on any process; the state is saved.

        ``seen`` holds the ids and losses, shape ``(B,)``, of the step's micro-batches, to name the pictures.
        """
        finite = bool(torch.isfinite(loss)) and (norm is None or bool(torch.isfinite(norm)))
        if self._any(not finite):
            self.save(step)
            ids, losses = (torch.cat(parts).tolist() for parts in zip(*seen, strict=True))
            culprits = {i for i, one in zip(ids, losses, strict=True) if not math.isfinite(one)} or set(ids)
            files = [str(picture.file) for picture in self.ledger.pictures if picture.id in culprits]
            raise FloatingPointError(
                f"step {step}: the loss or its gradient is not finite; nothing was updated, and {self.folder} holds "
                f"the state before it. Lower train.lr, set train.precision=fp32, or look at {', '.join(files[:8])}"
                + (f" and {len(files) - 8} more" if len(files) > 8 else "")
            )

    def finish_step(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        t, done = self.config.train, step + 1
        self.losses.append(loss)
        if done % t.log_every == 0:
            self._log(done, norm)
        if t.validate_every and (done % t.validate_every == 0 or done == t.steps):
            self.validate(done)
        if t.sample_every and done % t.sample_every == 0 and done < t.steps and self.accelerator.is_main_process:
            self.export(done)
        if self._any(time.monotonic() - self.saved_at > 60 * t.checkpoint_minutes):
            self.save(done)

    def save(self, step: int) -> None:
        """A checkpoint of the state after ``step`` optimizer steps."""
        if step == self.checkpointed:
            return
        if self.accelerator.is_main_process:
            groups = {
                "weights": self.task.module.state_dict(),
                "ema": self.ema.weights,
                "optimizer": optimizers.state_tensors(self.optimizer, self.task.module),
            }
            state = Checkpoint(groups, {"step": step, "optimizer": optimizers.state_numbers(self.optimizer)})
            keep = (self.config.train.keep_last, self.config.train.keep_every)
            checkpoint.write(self.folder / "checkpoints", step, state, *keep)
            self.ledger.write(self.folder / "coverage.jsonl", step * self.config.train.batch_size)
        self.accelerator.wait_for_everyone()
        self.saved_at, self.checkpointed = time.monotonic(), step

    def export(self, step: int) -> None:
        """The model folder and a sample grid, from the averaged weights."""
        with self._shipped():
            self.task.save(self.folder / "model", torch.bfloat16)
            images = self.task.samples()
        (self.folder / "samples").mkdir(exist_ok=True)
        grid = make_grid(images, columns=8)
        grid.save(self.folder / "samples" / f"step-{step:08d}.png")
        recipe = self.folder / "model" / "recipe.json"
        if recipe.is_file():
            facts = json.loads(recipe.read_text(encoding="utf-8"))
            report.write_card(recipe.parent, self.config.name, facts, configs.dump(self.config), grid)
        self.report()

    def report(self) -> None:
        """``report.html``, from what has been written so far."""
        trained = sum(p.numel() for p in self.task.module.parameters() if p.requires_grad)
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        facts = {
            "of steps": f"{self.config.train.steps:,}",
            "pictures": f"{len(self.ledger.pictures):,}",
            "trained weights": f"{trained:,}",
            "hardware": f"{self.accelerator.num_processes} x {name}",
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "torch": torch.__version__,
        }
        report.write(self.folder, facts)

    def validate(self, step: int) -> None:
        """Losses on the probes, of the weights as they are and as they are shipped; the best model is kept."""
        if self.accelerator.is_main_process:
            raw = self._measure()
            with self._shipped():
                shipped = self._measure() if self.config.train.ema > 0 else raw
                losses = {name: {"raw": raw[name], "shipped": shipped[name]} for name in self.probes}
                if self.history.add(step, losses):
                    self.task.save(self.folder / "best", torch.bfloat16)
            if (verdict := self.history.verdict()) is not None and not self.warned:
                self.warned = True
                self._say(verdict)
        self.accelerator.wait_for_everyone()

    def _measure(self) -> dict[str, list[float]]:
        module, size = self.task.module, self.config.train.batch_size
        module.eval()
        measured = {
            name: probe.measure(module, self.accelerator.device, self.accelerator.autocast, size)
            for name, probe in self.probes.items()
        }
        module.train()
        return measured

    @contextmanager
    def _shipped(self) -> Iterator[None]:
        """Within the block the module holds the weights that are shipped: the averaged ones, if there are."""
        self.optimizer.eval()  # schedule-free averages in place; to others this is nothing
        with self.ema.applied(self.task.module) if self.config.train.ema > 0 else nullcontext():
            yield
        self.optimizer.train()

    # --- small print

    def _log(self, done: int, norm: Tensor | None) -> None:
        now, t = time.monotonic(), self.config.train
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        rate = len(self.losses) * t.batch_size / (now - self.logged_at)
        self.losses, self.logged_at = [], now
        row = {"step": done, "loss": loss, "lr": learning_rate(t, done - 1), "images_per_second": round(rate, 2)}
        row |= {"grad_norm": norm.item()} if norm is not None else {}
        self.bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{rate:.1f}")
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=done)

    def _forget_after(self, step: int) -> None:
        """Drop the lines written after the checkpoint: those steps are done again."""
        file = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and self.history.rows:
            self.history.forget_after(step)
        if self.accelerator.is_main_process and file.is_file():
            rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in rows if json.loads(line)["step"] <= step]
            file.write_text("".join(kept), encoding="utf-8")

    def _interrupt(self) -> None:
        self.stop = True

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all of them then act alike."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)


def _pictures(config: Config) -> tuple[list[Picture], list[Picture], dict[str, str]]:
    """What is trained on, what is held out, and what is left out for which reason."""
    data = config.data
    pictures = read_folder(data.path, "train", data.balance, data.captions.source)
    held_out = read_folder(data.path, "held_out", data.balance, data.captions.source, may_be_empty=True)
    pictures, more = hold_out(pictures, data.hold_out)
    held_out += more
    if data.upscale:
        return pictures, held_out, {}
    shape_of = partial(nearest, among=tasks.bucket_shapes(data)) if data.buckets else None
    kept, left_out = leave_out_small(pictures, data.size, shape_of)
    held_out, unseen = leave_out_small(held_out, data.size, shape_of)
    return kept, held_out, left_out | unseen


def _order(config: Config, pictures: list[Picture]) -> Visits:
    weights = group_weights(pictures, config.data.balance_power if config.data.balance else 0.0)
    if not config.data.buckets:
        return Order(config.seed, weights)
    among = tasks.bucket_shapes(config.data)
    shape_of = [nearest(read_size(picture.file), among) for picture in pictures]
    return BucketOrder(config.seed, weights, shape_of, config.train.batch_size)


def _buckets(config: Config, pictures: list[Picture]) -> str:
    among = tasks.bucket_shapes(config.data)
    counts = Counter(nearest(read_size(picture.file), among) for picture in pictures)
    return ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in sorted(counts.items()))


def _left_out(left_out: dict[str, str], of: int) -> str:
    file, reason = next(iter(left_out.items()))
    return (
        f"{len(left_out)} of {of} pictures are left out, first {file}: {reason}; "
        "data.upscale=true takes them, coverage.jsonl names all"
    )


def _compile(task: tasks.Task, accelerator: Accelerator, micro_batch: int) -> None:
    """Compile the network on a batch of the size it will meet, if it proves equal; that takes a minute or two."""
    visits = [(index % len(task.dataset), 0) for index in range(micro_batch)]
    batch = {name: tensor.to(accelerator.device) for name, tensor in task.dataset.__getitems__(visits).items()}

    def loss() -> Tensor:
        with accelerator.autocast():
            return task.module(batch).mean()

    task.module.train()
    refused = compile_if_equal(task.network, loss)
    if refused is not None:
        speed_up_group_norm(task.network)  # left out for the compiler, which does as well
        if accelerator.is_main_process:
            print(refused, file=sys.stderr)


def _accelerator(config: Config) -> Accelerator:
    train, device = config.train, PartialState().device
    for name in train.log_with:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"train.log_with {name} is not installed: pip install {name}, or leave it out")
    precision = PRECISION[fast_dtype(device)] if train.precision == "auto" else train.precision.replace("fp32", "no")
    if device.type == "cpu" and precision == "fp16":
        raise ValueError("train.precision fp16 is slow and wrong on the CPU: use auto, bf16 or fp32")
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    AcceleratorState._reset_state()  # it keeps the first run's precision for the life of the process
    return Accelerator(
        mixed_precision=precision,
        kwargs_handlers=handlers,
        log_with=[str(name) for name in train.log_with] or None,
        project_dir=config.folder,
    )


def _micro_batch(train: Train, processes: int) -> int:
    micro = train.batch_size // processes if train.micro_batch is None else train.micro_batch
    if micro < 1 or train.batch_size % (micro * processes):
        raise ValueError(
            f"train.batch_size {train.batch_size} does not split into {processes} processes x micro-batches of "
            f"{micro}: choose a multiple of {max(1, micro) * processes}"
        )
    return micro


@contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call the handler instead of ending the process; a second Ctrl-C ends it at once."""

    def handle(number: int, _frame: Any) -> None:
        handler()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
