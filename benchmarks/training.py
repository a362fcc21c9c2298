"""P4: training against the well-known ``train_text_to_image.py`` recipe: same model, data, batch, optimizer and EMA.

The recipe's loop is retold here from its description: accelerate, float32, every picture and caption encoded at every
step, AdamW, an EMA of the U-Net, gradients clipped to 1. ``--peer-script`` times the real one instead.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.measure import contest
from benchmarks.table import Row

ROOT = Path(__file__).parents[1]
MODEL, DATA = ROOT / "assets" / "emoji", ROOT / "assets" / "delft"
STEPS, WARM, BATCH = 24, 8, 16


def rows(rounds: int, peer_script: Path | None = None) -> list[Row]:
    """The recipe as it runs, and both on cached latents and captions."""
    with TemporaryDirectory() as scratch:
        numbers = iter(range(10**6))
        peer: Callable[[], Any] = partial(recipe, cached=False)
        if peer_script is not None:
            peer = partial(real, peer_script, Path(scratch))
        found = contest(
            {
                "recipe": peer,
                "recipe, cached": partial(recipe, cached=True),
                "ours": lambda: ours(Path(scratch), next(numbers)),
            },
            rounds,
            "training",
        )
    pictures = (STEPS - WARM) * BATCH
    rate = {f"{name}, pictures a second": round(pictures / t.median, 1) for name, t in found.timings.items()}
    limit = "forward and backward of the U-Net alone"
    return [
        Row.of("P4a", "training: recipe as it runs / ours", found, "recipe", "ours", 4.0, limit=limit, **rate),
        Row.of("P4b", "training: recipe on cached latents / ours", found, "recipe, cached", "ours", 1.5, limit=limit),
    ]


def ours(scratch: Path, number: int) -> float:
    """Seconds of the steps after the warm-up, of a fine-tune by our loop."""
    from diffusion import config, trainer

    made = config.load(ROOT / "configs/finetune.yaml", [f"data.path={DATA}", f"output={scratch}"])
    train = replace(
        made.train, steps=STEPS, batch_size=BATCH, log_every=WARM, sample_every=0, validate_every=0, ema=0.999
    )
    trainer.train(replace(made, name=f"run{number}", train=train, data=replace(made.data, hold_out=0.0)), quiet=True)
    lines = (scratch / f"run{number}" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines]
    return sum(WARM * BATCH / rate for rate in rates[1:])


def recipe(cached: bool) -> float:
    """Seconds of the same steps by the recipe's loop."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    unet, vae, encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    vae.requires_grad_(False)
    encoder.requires_grad_(False)
    unet.train()
    ema = EMAModel(unet.parameters(), decay=0.999, model_cls=type(unet), model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    pictures, captions = read()
    loader = torch.utils.data.DataLoader(range(len(pictures)), batch_size=BATCH, shuffle=True, drop_last=True)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    known = prepared(pictures, captions, vae, encoder, tokenizer) if cached else None
    started, step = 0.0, 0
    while step < STEPS:
        for places in loader:
            if step == WARM:
                started = time.perf_counter()
            with accelerator.accumulate(unet):
                latents, context = (
                    prepared([pictures[i] for i in places], [captions[i] for i in places], vae, encoder, tokenizer)
                    if known is None
                    else (known[0][places], known[1][places])
                )
                noise = torch.randn_like(latents)
                times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
                target = scheduler.get_velocity(latents, noise, times)
                output = unet(scheduler.add_noise(latents, noise, times), times, context, return_dict=False)[0]
                loss = F.mse_loss(output.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(BATCH)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            ema.step(unet.parameters())
            step += 1
            if step == STEPS:
                break
    return time.perf_counter() - started


def read() -> tuple[list[Path], list[str]]:
    """Files and captions of the set."""
    lines = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [DATA / line["file_name"] for line in lines], [line["text"] for line in lines]


@torch.no_grad()
def prepared(files: list[Path], captions: list[str], vae: Any, encoder: Any, tokenizer: Any) -> Any:
    """Latents and contexts of pictures, decoded, resized and encoded as the recipe does at every step."""
    decoded = [Image.open(file).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in decoded])).permute(0, 3, 1, 2)
    latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.sample() * vae.config.scaling_factor
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents, encoder(tokens, return_dict=False)[0]


def real(script: Path, scratch: Path) -> float:
    """Seconds of the whole run of the real script, less those of one that stops after the warm-up."""
    return _run(script, scratch, STEPS) - _run(script, scratch, WARM)


def _run(script: Path, scratch: Path, steps: int) -> float:
    words = ["--pretrained_model_name_or_path", str(MODEL), "--train_data_dir", str(DATA), "--resolution", "128"]
    words += ["--train_batch_size", str(BATCH), "--max_train_steps", str(steps), "--use_ema", "--learning_rate", "1e-4"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *words, "--output_dir", str(scratch / "peer")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - started
