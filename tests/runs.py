"""Runs small enough to train in a second, shared by the tests of the loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from diffusion import checkpoint, config, trainer
from diffusion import run as run_module

ROOT = Path(__file__).parents[1]
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 16,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [16],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_home(home):
    """A folder of pictures and a trained autoencoder."""
    colours = ["red", "green", "blue", "yellow", "black", "white", "cyan", "magenta", "orange", "gray"]
    rows = []
    for colour in colours:
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste(colour, (4, 4, 12, 12))
        picture.save(home / f"{colour}.png")
        rows.append({"file_name": f"{colour}.png", "text": f"{colour} square", "keywords": [colour]})
    (home / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer.train(autoencoder(home), quiet=True)
    return home


def autoencoder(home):
    return config.validate(
        {
            "task": "autoencoder",
            "name": "ae",
            "output": str(home / "runs"),
            "data": {"path": str(home), "size": 16, "crop": 8},
            "model": {"vae": VAE},
            "train": {"steps": 60, "batch_size": 8, "lr": 1e-2, "precision": "fp32", "log_every": 10, "ema": 0.9},
        }
    )


def denoiser(home, name, **train):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-3, "lr_schedule": "linear", "precision": "fp32", "log_every": 1}
    return config.validate(
        {
            "task": "text_to_image",
            "name": name,
            "output": str(home / "runs"),
            "data": {"path": str(home), "size": 16, "captions": {"keywords": 0.3, "dropout": 0.2, "fillers": ["a"]}},
            "model": {
                "autoencoder": str(home / "runs/ae/model"),
                "tokenizer": {"vocab_size": 600, "max_length": 12},
                "text_encoder": TEXT,
                "unet": UNET,
                "prediction": "v_prediction",
                "zero_terminal_snr": True,
                "beta_schedule": "cosine",
            },
            "train": settings | train,
            "recipe": {"steps": 2, "prompts": ["red square"]},
        }
    )


def frozen(home, name, **data):
    """A run that trains the U-Net of a finished model, with captions that can be counted."""
    run = denoiser(home, name)
    run.model.base = str(home / "runs/straight/model")
    run.model = type(run.model)(base=run.model.base)
    run.data.captions.keywords, run.data.captions.fillers = 0.0, []
    run.data.captions.templates = ["{}", "a {}"]
    for field, value in data.items():
        setattr(run.data, field, value)
    return run


def weights(folder):
    path = checkpoint.latest(folder / "checkpoints")
    return {name: load_file(path / f"{name}.safetensors") for name in ("weights", "ema", "optimizer")}


def metrics(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(one, other):
    return max(
        ((one[g][k] - other[g][k]).abs().max() / (1e-6 + one[g][k].abs().max())).item() for g in one for k in one[g]
    )


def stop_and_go_on(run, monkeypatch, stop_after):
    finish_step = run_module.Run.finish_step

    def finish_and_stop(self, step, loss, norm):
        finish_step(self, step, loss, norm)
        self.stop = step + 1 == stop_after

    monkeypatch.setattr(run_module.Run, "finish_step", finish_and_stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(run, quiet=True)
    monkeypatch.undo()
    trainer.train(run, quiet=True)


def command(home, *runs, processes=1, script=ROOT / "train.py"):
    """The command line that trains a run, or several one after the other, and its environment."""
    files = [home / f"{run.name}.yaml" for run in runs]
    for file, run in zip(files, runs, strict=True):
        file.write_text(config.dump(run))
    words = [str(script), *map(str, files)]
    if processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
        words = [*launch, "--main_process_port", "0", "--num_processes", str(processes), *words]
    return [sys.executable, *words], os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train_with(home, *runs, processes, script=ROOT / "train.py"):
    words, environment = command(home, *runs, processes=processes, script=script)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{processes} process{'es' if processes > 1 else ''} x {8 // processes} pictures" in done.stderr
