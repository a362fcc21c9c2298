"""Tiny randomly initialised models of each family, saved by the stock library in its own folders.

``python tests/families.py`` prints how near our pictures are to those of the stock pipelines.
"""

import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion.models.text import train_tokenizer

CAPTIONS = [f"{a} {b}" for a in ("red", "green", "blue", "a photo of") for b in ("apple", "boat", "cat", "house")]
FAMILIES = ("sd1", "sd2", "sdxl")
KINDS = (*FAMILIES, "sd2-epsilon")  # and the base of 2.x, which predicts the noise


def save(family, folder, second_width=32, vae_blocks=2):
    """A stock pipeline with random weights: 16x16 latents, of two blocks 32x32 pixels, of four 128x128."""
    torch.manual_seed(KINDS.index(family))
    xl = family == "sdxl"
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, max_length=24)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "quick_gelu" if family == "sd1" else "gelu",
        "initializer_factor": 10.0,
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + second_width if xl else 32,
        attention_head_dim=8 if family == "sd1" else (2, 4),
        use_linear_projection=family != "sd1",
        **(added if xl else {}),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * vae_blocks,
        block_out_channels=(8, 16, 16, 16)[:vae_blocks],
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
        rescale_betas_zero_snr=family == "sd2",
        timestep_spacing="trailing" if family == "sd2" else "leading",
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
    }
    final = getattr(parts["text_encoder"], "text_model", parts["text_encoder"]).final_layer_norm
    torch.nn.init.constant_(final.bias, 0.3)  # a context with a mean, as a trained one has
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**text | {"hidden_size": second_width}, projection_dim=16))
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def stock(folder, trailing=True, sampler="ddim"):
    """The stock pipeline of a folder, on the trailing grid that we draw with."""
    cls = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline = cls.from_pretrained(folder, local_files_only=True)
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True} if trailing else {}
    scheduler = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[sampler]
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def over(folder, cls, **parts):
    """Another stock pipeline over the networks of a folder."""
    pipeline = cls(**stock(folder).components, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt, seed, steps=4, guidance=5.0, side=32):
    """One picture of a stock pipeline from the noise that its seed gives."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = {"height": side, "width": side}
    return pipeline(
        prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pil", **size
    ).images[0]


def psnr(one, other):
    """Decibels between two pictures."""
    a, b = (torch.tensor(list(picture.tobytes()), dtype=torch.float64) for picture in (one, other))
    return float(10 * torch.log10(255**2 / (a - b).square().mean().clamp(min=1e-9)))


def parity(folder, sampler, steps=20):
    """Decibels between our picture of a folder and the stock pipeline's, from the same noise, in fp32."""
    from diffusion import TextToImage

    given = {"seed": 7, "steps": steps, "guidance_scale": 5.0, "width": 32, "height": 32}
    ours = TextToImage.load(folder, "cpu", "fp32")("red apple", sampler=sampler, schedule="trailing", **given)[0]
    return psnr(ours, draw(stock(folder, sampler=sampler), "red apple", 7, steps=steps))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for family in KINDS:
            folder = save(family, Path(scratch) / family)
            figures = {sampler: parity(folder, sampler) for sampler in ("ddim", "dpmpp_2m")}
            print(f"{family:<12}" + "".join(f"  {sampler} {decibels:6.1f} dB" for sampler, decibels in figures.items()))
