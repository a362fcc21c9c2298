"""Shared fixtures: a model folder small enough to draw with in a blink."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from commands import Command, Said

if TYPE_CHECKING:
    from diffusion import TextToImage

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read once, when transformers is imported

CAPTIONS = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("apple", "boat", "cat", "house")]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model folder: 600 tokens, 24 to a prompt, 16x16 pixels natively, 8x8 latents, 4 steps of DDIM."""
    from diffusion.models.folder import Forward, Model, Recipe, save_model
    from diffusion.models.networks import build_autoencoder, build_text_encoder, build_unet
    from diffusion.models.text import train_tokenizer

    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, max_length=24)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(text, tokenizer),
            unet=build_unet(blocks | unet),
            vae=build_autoencoder(vae),
            forward=Forward(prediction="v_prediction", zero_terminal_snr=True),
            recipe=Recipe(width=16, height=16, steps=4, guidance_scale=3.0),
        )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> "TextToImage":
    """The tiny model, loaded once for all tests of a file: they leave it as it was."""
    from diffusion import TextToImage

    return TextToImage.load(tiny_model, "cpu", "fp32")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten coloured squares, and in ``runs/ae`` an autoencoder that was trained on them."""
    from runs import make_home

    return make_home(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def straight(home: Path) -> Path:
    """The folder of a run that nothing interrupts."""
    from diffusion import trainer
    from runs import denoiser

    run = denoiser(home, "straight")
    trainer.train(run, quiet=True)
    return run.folder


@pytest.fixture
def draw(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    """The command in this process, on the tiny model, in an empty folder."""
    from diffusion.cli.generate import run

    monkeypatch.chdir(tmp_path)

    def command(*words: str, model: Path = tiny_model) -> Said:
        code = run([*(["--model", str(model)] if model else []), *words], prog="generate.py")
        return Said(code, *capsys.readouterr())

    return command


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture of odd sides, and a mask that opens its right half."""
    noise = np.random.default_rng(0).integers(0, 256, (19, 21, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    mask = Image.new("L", (21, 19), 0)
    ImageDraw.Draw(mask).rectangle((10, 0, 20, 18), fill=255)
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


@pytest.fixture
def red(tiny_model: Path, tmp_path: Path) -> Path:
    """A LoRA that changes the tiny model a lot."""
    from diffusion.models import lora
    from diffusion.models.folder import load_model

    model = load_model(tiny_model)
    torch.manual_seed(0)
    lora.add(model.unet, lora.TARGETS["attention"], 2, 2.0)
    for name, weight in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    lora.save({"unet": model.unet}, tmp_path / "loras" / "red", kohya=False)
    (tmp_path / "loras/red/pytorch_lora_weights.safetensors").rename(tmp_path / "loras/red.safetensors")
    (tmp_path / "loras/red").rmdir()
    return tmp_path / "loras/red.safetensors"


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the layout of Stable Diffusion 1.x."""
    from families import save

    return save("sd1", tmp_path_factory.mktemp("controls") / "sd1")


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock ControlNet whose branches say something, beside its tiny model, whose latents are an eighth in size."""
    from diffusers import ControlNetModel

    from diffusion.models.folder import load_model
    from families import save

    sd1 = save("sd1", tmp_path_factory.mktemp("control") / "sd1", vae_blocks=4)
    torch.manual_seed(0)
    made = ControlNetModel.from_unet(load_model(sd1).unet, conditioning_channels=3)
    for layer in [*made.controlnet_down_blocks, made.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.5)
    for layer in made.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        made.controlnet_cond_embedding.conv_out.weight *= 4
    made.save_pretrained(sd1.parent / "net")
    return sd1.parent / "net"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight plain pictures, listed with captions, groups and a split."""
    rows = []
    for n in range(8):
        Image.new("RGB", (16, 16), (n * 30, 0, 255 - n * 30)).save(tmp_path / f"{n}.png")
        base, split = ("pair" if n < 2 else f"base {n}"), ("held_out" if n == 7 else "train")
        rows.append(
            {"file_name": f"{n}.png", "text": f"thing {n}", "keywords": ["k", f"w{n}"], "base": base, "split": split}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path
