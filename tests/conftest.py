"""Shared fixtures: a model folder small enough to draw with in a blink."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

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
