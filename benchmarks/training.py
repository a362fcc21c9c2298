"""P4 and P5: training against the well-known ``train_text_to_image.py`` recipe, in speed and in seconds to a result.

The recipe's loop is retold here from its description: accelerate, float32, every picture and caption encoded at every
step, AdamW, an EMA of the U-Net, gradients clipped to 1. ``--peer-script`` times the real one instead.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.measure import Timing, contest
from benchmarks.table import Row
from diffusion import TextToImage

ROOT = Path(__file__).parents[1]
DATA = ROOT / "assets" / "delft"
RATE, OUR_RATE, DECAY = 1e-4, 3e-4, 0.999  # the recipe's own learning rate, and that of configs/finetune.yaml
EVERY, MOST, WANTED, SEEDS = 10, 200, 0.8, (0, 1, 2)  # P5: steps between looks, share of pictures in the style


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long: the steps after the warm-up count."""

    title: str
    model: Path
    side: int
    batch: int
    steps: int
    warm: int
    rate: float = RATE  # of the recipe


def rows(rounds: int, peer_script: Path | None = None) -> list[Row]:
    """The recipe as it runs, both on cached latents and captions, and the seconds to a style."""
    shipped = Case("shipped model, 128x128", ROOT / "assets" / "emoji", 128, 64, 8, 2)
    found = speed(shipped, rounds, peer_script)
    with TemporaryDirectory() as scratch:
        from benchmarks.drawing import random_sd15

        folder = random_sd15(Path(scratch) / "quarter", widths=(128, 256, 512, 512))
        found += speed(Case("a fifth of SD 1.5, 256x256", folder, 256, 4, 5, 1), rounds, peer_script)
    return [*found, *shares(replace(shipped, steps=shipped.warm + 2 * rounds)), *reached(replace(shipped, batch=16))]


def speed(case: Case, rounds: int, peer_script: Path | None = None) -> list[Row]:
    """P4 on one model."""
    with TemporaryDirectory() as scratch:
        numbers = iter(range(10**6))
        peer: Callable[[], Any] = partial(recipe, case, cached=False)
        if peer_script is not None:
            peer = partial(real, case, peer_script, Path(scratch))
        found = contest(
            {
                "recipe": peer,
                "recipe, cached": partial(recipe, case, cached=True),
                "ours": lambda: ours(case, Path(scratch), next(numbers)),
            },
            rounds,
            f"training, {case.title}",
        )
    pictures = (case.steps - case.warm) * case.batch
    rate = {f"{name}, pictures a second": round(pictures / t.median, 2) for name, t in found.timings.items()}
    limit = "forward and backward of the U-Net alone"
    return [
        Row.of("P4a", f"training, {case.title}: recipe as it runs / ours", found, "recipe", "ours", 4.0, limit, **rate),
        Row.of("P4b", "the same: recipe on cached latents / ours", found, "recipe, cached", "ours", 1.5, limit),
    ]


def ours(case: Case, scratch: Path, number: int) -> float:
    """Seconds of the steps after the warm-up, of a fine-tune by our loop."""
    given = {"steps": case.steps, "batch_size": case.batch, "log_every": case.warm, "ema": DECAY, "lr": RATE}
    run = trained(case, scratch, f"run{number}", 0, **given)
    return sum(seconds for _, seconds in timed(run, case.batch)[1:])


def shares(case: Case) -> list[Row]:
    """P4c: how many times as long a step is as what it does besides forward and backward."""
    from accelerate.optimizer import AcceleratedOptimizer

    from diffusion.ema import Ema
    from diffusion.run import Run

    parts = {"data": (Run, "next"), "optimizer": (AcceleratedOptimizer, "step"), "averages": (Ema, "update")}
    with TemporaryDirectory() as scratch, ExitStack() as clocks:
        spent = {name: clocks.enter_context(clocked(*place)) for name, place in parts.items()}
        run = trained(case, Path(scratch), "run", 0, steps=case.steps, batch_size=case.batch, log_every=1, ema=DECAY)
        step = Timing([seconds for _, seconds in timed(run, case.batch)][case.warm :])
    middle = {name: float(np.median(seconds[case.warm :])) for name, seconds in spent.items()}
    what = f"training, {case.title}, batch {case.batch}: a step / its optimizer, averages and data"
    told, own = {f"{name}, ms": round(1e3 * seconds, 1) for name, seconds in middle.items()}, sum(middle.values())
    return [Row("P4c", what, step.median / own, 1 / 0.08, step.median, own, step.spread, more=told)]


@contextmanager
def clocked(kind: type, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method within the block."""
    spent: list[float] = []
    plain = getattr(kind, name)

    def method(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = plain(*given, **named)
        spent.append(time.perf_counter() - started)
        return found

    with patch.object(kind, name, method):
        yield spent


def trained(case: Case, scratch: Path, name: str, seed: int, **train: Any) -> Path:
    """The folder of a run of ``configs/finetune.yaml`` with some of its fields changed."""
    from diffusion import config, trainer

    afresh()
    given = [f"data.path={DATA}", f"output={scratch}", f"model.base={case.model}", f"data.size={case.side}"]
    made = config.load(ROOT / "configs/finetune.yaml", given)
    loop = replace(made.train, **({"sample_every": 0, "validate_every": 0} | train))
    trainer.train(replace(made, name=name, seed=seed, train=loop, data=replace(made.data, hold_out=0.0)), quiet=True)
    gc.collect()
    return scratch / name


def timed(run: Path, batch: int) -> list[tuple[int, float]]:
    """Steps and seconds of each line of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [0, *(line["step"] for line in lines)]
    spans = zip(ends, lines, strict=False)
    return [(line["step"], (line["step"] - start) * batch / line["images_per_second"]) for start, line in spans]


def recipe(case: Case, cached: bool) -> float:
    """Seconds of the same steps by the recipe's loop."""
    seconds = [spent for spent, _ in recipe_steps(case, cached, 0)]
    return sum(seconds[case.warm :])


def recipe_steps(case: Case, cached: bool, seed: int) -> Iterator[tuple[float, Any]]:
    """Seconds of each step of the recipe's loop, and its average of the weights."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.training_utils import EMAModel

    afresh()
    set_seed(seed)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    pipeline = StableDiffusionPipeline.from_pretrained(case.model, safety_checker=None)
    unet, vae, encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    vae.requires_grad_(False)
    encoder.requires_grad_(False)
    unet.train()
    ema = EMAModel(unet.parameters(), decay=DECAY, model_cls=type(unet), model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=case.rate, betas=(0.9, 0.999), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    pictures, captions = read(case.batch)
    numbers: Any = range(len(pictures))
    loader = torch.utils.data.DataLoader(numbers, batch_size=case.batch, shuffle=True, drop_last=True)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    encode = partial(prepared, vae=vae, encoder=encoder, tokenizer=tokenizer, side=case.side)
    known = encode(pictures, captions) if cached else None
    for _ in range(case.steps):
        started = time.perf_counter()
        places = next(iter(loader))
        with accelerator.accumulate(unet):
            if known is None:
                latents, context = encode([pictures[i] for i in places], [captions[i] for i in places])
            else:
                latents, context = known[0][places], known[1][places]
            noise = torch.randn_like(latents)
            times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
            noisy = scheduler.add_noise(latents, noise, times)
            v = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, times) if v else noise
            output = unet(noisy, times, context, return_dict=False)[0]
            loss = F.mse_loss(output.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(case.batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        ema.step(unet.parameters())
        yield time.perf_counter() - started, ema


def afresh() -> None:
    """Accelerate keeps one state a process, and each candidate wants its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def read(least: int) -> tuple[list[Path], list[str]]:
    """Files and captions of the set, over and over until they fill a batch."""
    lines = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines *= -(-least // len(lines))
    return [DATA / line["file_name"] for line in lines], [line["text"] for line in lines]


@torch.no_grad()
def prepared(files: list[Path], captions: list[str], vae: Any, encoder: Any, tokenizer: Any, side: int) -> Any:
    """Latents and contexts of pictures, decoded, resized, flipped and encoded as the recipe does at every step."""
    decoded = [Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in decoded])).permute(0, 3, 1, 2)
    latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.sample() * vae.config.scaling_factor
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents, encoder(tokens, return_dict=False)[0]


def real(case: Case, script: Path, scratch: Path) -> float:
    """Seconds of the whole run of the real script, less those of one that stops after the warm-up."""
    return _run(case, script, scratch, case.steps) - _run(case, script, scratch, case.warm)


def _run(case: Case, script: Path, scratch: Path, steps: int) -> float:
    words = ["--pretrained_model_name_or_path", case.model, "--train_data_dir", DATA, "--resolution", case.side]
    words += ["--train_batch_size", case.batch, "--max_train_steps", steps, "--use_ema", "--learning_rate", case.rate]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words), "--output_dir", str(scratch / "peer")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - started


# --- P5


def reached(case: Case) -> list[Row]:
    """P5: seconds of training until things that were not trained on come out in the style.

    Each by its own defaults, and the recipe again at the learning rate of our config.
    """
    told: dict[str, dict[str, tuple[int, float]]] = {}
    for seed in SEEDS:
        with TemporaryDirectory() as scratch:
            told[f"seed {seed}"] = {
                "recipe": recipe_reaches(case, seed),
                "recipe, our rate": recipe_reaches(replace(case, rate=OUR_RATE), seed),
                "ours": ours_reaches(case, Path(scratch), seed),
            }
    what = f"seconds until {WANTED:.0%} of unseen prompts are in a style"
    return [
        _reached(f"{what}: recipe / ours, each by its defaults", told, "recipe"),
        _reached("the same, the recipe at our learning rate", told, "recipe, our rate"),
    ]


def _reached(what: str, told: dict[str, dict[str, tuple[int, float]]], peer: str) -> Row:
    ratios = [seed[peer][1] / seed["ours"][1] for seed in told.values()]
    middle = float(np.median(ratios))
    spread = (max(ratios) - min(ratios)) / 2 / middle
    return Row("P5", what, middle, 3.0, spread=spread, limit="that of P4", more=dict(told))


def recipe_reaches(case: Case, seed: int) -> tuple[int, float]:
    """Steps and seconds of the recipe."""
    judge, spent = Judge(case.model), 0.0
    for step, (seconds, ema) in enumerate(recipe_steps(replace(case, steps=MOST), False, seed), start=1):
        spent += seconds
        if step % EVERY == 0 and judge.share(ema.shadow_params) >= WANTED:
            break
    return step, round(spent, 2)


def ours_reaches(case: Case, scratch: Path, seed: int) -> tuple[int, float]:
    """Steps and seconds of ``configs/finetune.yaml``."""
    from safetensors.torch import load_file

    judge = Judge(case.model)
    run = trained(case, scratch, "run", seed, steps=MOST, log_every=2, keep_every=EVERY, keep_last=1)
    each = float(np.median([seconds / 2 for _, seconds in timed(run, case.batch)]))  # some lines hold a checkpoint
    for step in range(EVERY, MOST + 1, EVERY):
        kept = load_file(run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
        if judge.share([kept[f"unet.{name}"] for name in judge.names]) >= WANTED:
            break
    return step, round(step * each, 2)


class Judge:
    """How many of fifty unseen things come out in the style."""

    def __init__(self, model: Path) -> None:
        sys.path.insert(0, str(ROOT / "assets"))
        from demos import UNSEEN, is_delft  # type: ignore[import-not-found]

        self.prompts, self.is_right = " ".join(UNSEEN.split()).split(", "), is_delft
        self.model = TextToImage.load(model, "cpu", "fp32")
        self.names = [name for name, _ in self.model.model.unet.named_parameters()]

    @torch.no_grad()
    def share(self, weights: list[torch.Tensor]) -> float:
        """Of a U-Net with these weights."""
        for own, weight in zip(self.model.model.unet.parameters(), weights, strict=True):
            own.copy_(weight)
        drawn = (self.model(prompt, seed=seed)[0] for seed, prompt in enumerate(self.prompts))
        return sum(map(self.is_right, drawn)) / len(self.prompts)
