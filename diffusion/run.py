"""A run's folder: what is read when it starts, and what is written while it goes."""

import copy
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from diffusion import checkpoint, optimizers, report, tasks, validation
from diffusion import config as configs
from diffusion.checkpoint import Checkpoint
from diffusion.data.dataset import Batch
from diffusion.data.feed import Feed
from diffusion.ema import Ema
from diffusion.images import sheet_texts
from diffusion.plan import STORED, check_same, learning_rate
from diffusion.schema import Config
from diffusion.sheets import make_grid, save_sheet

PATIENCE = 100  # steps in a row that fp16 may pass over: its scale has then shrunk to nothing
FAULTS = (ValueError, OSError, FloatingPointError)  # what a person is told in one line
T = TypeVar("T")


def together(work: Callable[[], T], gather: Callable[[Any], Sequence[Any]]) -> T:
    """What ``work`` gives. If it fails on any process all of them raise, each its own fault or else the first other.

    So none waits for one that has gone, and the first process, which speaks, knows what happened.
    """
    fault: Exception | None = None
    try:
        result = work()
    except FAULTS as error:
        fault = error
    kind = next((number for number, one in enumerate(FAULTS) if isinstance(fault, one)), 0)
    told = [one for one in gather(None if fault is None else (kind, str(fault))) if one is not None]
    if fault is not None:
        raise fault
    if told:
        raise FAULTS[told[0][0]](told[0][1])
    return result


@dataclass
class Run:
    """All processes call all of it in step; one of them, ``accelerator.is_main_process``, writes and speaks."""

    config: Config
    task: tasks.Task
    accelerator: Any  # accelerate.Accelerator, whose only home is the loop
    gather: Callable[[Any], list[Any]]  # one plain value a process -> all of them, on each
    optimizer: Any
    ema: Ema
    feed: Feed
    pictures: int | None  # how many are trained on, where that is known
    probes: dict[str, validation.Probe]
    frozen: str = ""  # the fingerprint of the weights that are not trained, which no checkpoint holds
    quiet: bool = False  # no bar, and nothing said but warnings

    def __post_init__(self) -> None:
        self.folder = self.config.folder
        self.main = bool(self.accelerator.is_main_process)
        self.stop = False
        self.saved_at = self.logged_at = time.monotonic()
        self.losses: list[Tensor] = []
        self.warned = False
        self.passed_over = 0  # steps in a row that fp16 left out
        self.checkpointed = -1
        self.history = validation.History(self.folder / "validation.jsonl")
        self.fed = _copy(self.feed.state())  # where the feed stood after the last update
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)

    # --- beginning and end

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one. Returns the step to go on with.

        ValueError, with nothing changed, if the checkpoint is of another run: of other data, networks or draws.
        """
        path = checkpoint.latest(self.folder / "checkpoints")
        found = checkpoint.read(path, self._alike) if path is not None else None
        if found is not None:
            check_same(self.config, found.state)
            self._refuse_other_weights(found)
        if self.main:
            (self.folder / "config.yaml").write_text(configs.dump(self.config), encoding="utf-8")
        if found is None:
            self._forget_after(0)  # a run that was killed before its first checkpoint has left its metrics
            return 0
        self.task.module.load_state_dict(dict(found.tensors["weights"]), strict=False)
        for name, weight in self.ema.weights.items():
            weight.copy_(found.tensors["ema"].get(name, self._parameters[name].detach()))
        optimizers.load_state(
            self.optimizer, self.task.module, found.tensors["optimizer"], found.state.get("optimizer", ())
        )
        if self.accelerator.scaler is not None and "scaler" in found.state:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.feed.load(found.state.get("feeds", ()))
        self.fed = _copy(self.feed.state())
        self.checkpointed = found.state["step"]
        self._forget_after(self.checkpointed)
        before, now = found.state.get("precision"), self.config.train.precision
        changed = f", from here on in {now} and not in {before}" if before not in (None, now) else ""
        self.say(f"resuming {self.folder} at step {self.checkpointed}{changed}")
        return self.checkpointed

    def _refuse_other_weights(self, found: Checkpoint) -> None:
        """ValueError if the networks are not those that the checkpoint is of, or what they are put on has changed."""
        here, there, learning = self.task.module.state_dict(), found.tensors["weights"], self._learning()
        missing = [name for name in learning if name not in there]
        strange = [name for name, weight in there.items() if name not in here or weight.shape != here[name].shape]
        if missing or strange:
            name = (missing + strange)[0]
            sides = [list(side[name].shape) if name in side else "absent" for side in (there, here)]
            raise ValueError(
                f"{self.folder} holds other networks than these: {name} is {sides[0]} there and {sides[1]} here; "
                "set model.base back, or give the run another name"
            )
        held = {name: weight for name, weight in there.items() if name in self._parameters.keys() - learning.keys()}
        before = checkpoint.fingerprint(held) if held else found.state.get("frozen", self.frozen)
        if before != self.frozen:
            raise ValueError(
                f"{self.folder} was begun on other weights than those that model.base has now: "
                "set it back, or give the run another name"
            )

    def steps(self, first: int) -> Iterator[int]:
        """The steps to do, with a progress bar; ends early, at a step's end, on SIGTERM or Ctrl-C."""
        total, hidden = self.config.train.steps, self.quiet or not self.main
        with (
            _signals(self._interrupt),
            tqdm(total=total, initial=first, unit="step", disable=hidden, smoothing=0.02) as self.bar,
        ):
            for step in range(first, total):
                yield step
                self.bar.update()
                if self._any(self.stop):
                    self.save(step + 1)
                    self.accelerator.wait_for_everyone()
                    self.say(f"stopped after step {step + 1}; the same command goes on from there")
                    raise KeyboardInterrupt
        self.save(total)

    def next(self, batches: Iterator[Batch], step: int) -> Batch:
        """The next batch. OSError on all processes, with the state saved, if a file cannot be read on one of them."""
        try:
            return self._together(lambda: next(batches))
        except FAULTS as error:
            self.save(step)
            raise OSError(str(error)) from None

    # --- after each step

    def check_finite(self, step: int, loss: Tensor, norm: Tensor | None, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Stop before the update if the loss or the gradient is not finite on any process; the state is saved.

        ``seen`` holds the ids and losses, shape ``(B,)``, of the step's micro-batches, to name the pictures. Gradients
        of fp16 overflow now and then: the scaler then passes over the step by itself, but not for ever.
        """
        broken = norm is not None and not bool(torch.isfinite(norm))
        self.passed_over = self.passed_over + 1 if broken else 0
        bearable = self.accelerator.scaler is not None and self.passed_over < PATIENCE
        if not self._any(not bool(torch.isfinite(loss)) or (broken and not bearable)):
            return
        self.save(step)
        ids, losses = (torch.cat(parts).tolist() for parts in zip(*seen, strict=True))
        own = self.feed.files({i for i, one in zip(ids, losses, strict=True) if not math.isfinite(one)})
        files = sorted({file for some in self.gather(own) for file in some})
        look = f", or look at {', '.join(files[:8])}" if files else ""
        often = f" for {self.passed_over} steps in a row" if self.passed_over > 1 else ""
        raise FloatingPointError(
            f"step {step}: the {'loss' if files else 'gradient'} is not finite{often}; nothing was updated, and "
            f"{self.folder} holds the state before it. Lower train.lr, set train.precision=fp32{look}"
            + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        )

    def finish_step(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Whatever is due after an update: metrics, validation, samples, a checkpoint."""
        t, done = self.config.train, step + 1
        self.fed = _copy(self.feed.state())
        self.losses.append(loss)
        if done % t.log_every == 0:
            self._log(done, norm)
        if t.validate_every and (done % t.validate_every == 0 or done == t.steps):
            self.validate(done)
        if t.sample_every and done % t.sample_every == 0 and done < t.steps:
            self.export(done)
        for_good = t.keep_every > 0 and done % t.keep_every == 0
        if self._any(for_good or time.monotonic() - self.saved_at > 60 * t.checkpoint_minutes):
            self.save(done)

    def save(self, step: int) -> None:
        """A checkpoint of the state after ``step`` optimizer steps, and the report up to there."""
        if step == self.checkpointed:
            return
        weights, learning = self.task.module.state_dict(), self._learning()
        groups = {  # what is frozen comes from model.base again; what is neither trained nor frozen is a buffer
            "weights": {name: w for name, w in weights.items() if name in learning or name not in self._parameters},
            "ema": self.ema.weights,
            "optimizer": optimizers.state_tensors(self.optimizer, self.task.module),
        }
        feeds = self.gather(self.fed)
        state = {"step": step, "optimizer": optimizers.state_numbers(self.optimizer), "feeds": feeds}
        state["made_by"], state["frozen"] = configs.identity(self.config), self.frozen
        state["precision"] = self.config.train.precision
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        folder, keep = self.folder / "checkpoints", (self.config.train.keep_last, self.config.train.keep_every)
        if checkpoint.is_sharded(groups):
            checkpoint.write(folder, step, Checkpoint(groups, state), *keep)
        else:
            self._first(lambda: checkpoint.write(folder, step, Checkpoint(groups, state), *keep))
        self._first(lambda: self._tell(step, feeds))
        self.saved_at, self.checkpointed = time.monotonic(), step

    def _tell(self, step: int, feeds: Sequence[Mapping[str, Any]]) -> None:
        """The coverage and the report of a checkpoint."""
        self.feed.write_coverage(self.folder / "coverage.jsonl", step * self.config.train.batch_size, feeds)
        self.report()

    def export(self, step: int) -> None:
        """The model folder and a sample grid, from the averaged weights."""
        with self._shipped():
            finished = self.task.gathered()
            self._first(lambda: self._deliver(step, finished))

    def _deliver(self, step: int, finished: tasks.Task | None) -> None:
        assert finished is not None, "it is gathered on the first process"
        self._replace("model", finished)
        samples = finished.samples()
        grid = make_grid(samples, columns=8)
        grid.info.update(sheet_texts(samples))
        self._show(step, grid)

    def _replace(self, name: str, finished: tasks.Task | None) -> None:
        """Write a model folder aside and put it in its place: whoever reads it finds it whole."""
        assert finished is not None, "it is gathered on the first process"
        stage, final, old = (self.folder / path for path in (f".{name}.part", name, f".{name}.old"))
        for left in (stage, old):
            shutil.rmtree(left, ignore_errors=True)
        finished.save(stage, STORED[self.config.train.save_dtype])
        if final.exists():
            final.rename(old)
        stage.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _show(self, step: int, grid: Image.Image) -> None:
        """Samples, the model's card and the report."""
        save_sheet(grid, self.folder / "samples" / f"step-{step:08d}.png")
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
            "pictures": "read as a stream" if self.pictures is None else f"{self.pictures:,}",
            "trained weights": f"{trained:,}",
            "hardware": f"{self.accelerator.num_processes} x {name}",
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "torch": torch.__version__,
        }
        report.write(self.folder, facts)

    def validate(self, step: int) -> None:
        """Losses on the probes, of the weights as they are and as they are shipped; the best model is kept."""
        raw = self._measure()
        with self._shipped():
            shipped = self._measure() if self.config.train.ema > 0 else raw
            losses = {name: {"raw": raw[name], "shipped": shipped[name]} for name in self.probes}
            best = self.history.add(step, losses) if self.main else False
            if self._any(best):
                finished = self.task.gathered()
                self._first(lambda: self._replace("best", finished))
        if self.main and (verdict := self.history.verdict()) is not None and not self.warned:
            self.warned = True
            print(verdict, file=sys.stderr)

    def _measure(self) -> dict[str, list[float]]:
        module, size = self.task.module, self.config.train.batch_size
        module.eval()
        measured = {
            name: probe.measure(module, self.accelerator.device, self.accelerator.autocast, size)
            for name, probe in self.probes.items()
        }
        module.train()
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a backward pass does so, and there was none
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
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=done)

    def _forget_after(self, step: int) -> None:
        """Drop the lines written after the checkpoint: those steps are done again."""
        file = self.folder / "metrics.jsonl"
        if self.main and self.history.rows:
            self.history.forget_after(step)
        if self.main and file.is_file():
            rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in rows if json.loads(line)["step"] <= step]
            file.write_text("".join(kept), encoding="utf-8")

    def _interrupt(self) -> None:
        self.stop = True

    def _together(self, work: Callable[[], T]) -> T:
        """``together``, at the price of one number where nothing fails."""
        return together(work, lambda fault: self.gather(fault) if self._any(fault is not None) else ())

    def _first(self, work: Callable[[], Any]) -> None:
        """Let the first process do something, and the others wait for it; if it fails all of them stop."""
        self._together(lambda: work() if self.main else None)
        self.accelerator.wait_for_everyone()

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all of them then act alike."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _alike(self, name: str) -> Tensor | None:
        """The parameter that a weight, an average or a piece of optimizer state of this name belongs to."""
        return self._parameters.get(name, self._parameters.get(name.rpartition(".")[0]))

    def _learning(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self._parameters.items() if weight.requires_grad}

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.task.module.named_parameters())

    def say(self, text: str) -> None:
        """One line for a person, once, unless nothing is to be said."""
        if self.main and not self.quiet:
            print(text, file=sys.stderr)


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a feed remembers, so that its going on does not change it."""
    return {key: {k: copy.copy(v) for k, v in one.items()} for key, one in state.items()}


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
