"""P1 and P2: seconds a picture on the same weights, solver, steps and seed, and FLOP/s beside the machine's best."""

import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import contest
from benchmarks.table import Row
from diffusion import TextToImage

ROOT = Path(__file__).parents[1]
PROMPT = "a red apple"


def rows(rounds: int, quick: bool = False) -> list[Row]:
    """Stable Diffusion 1.5 with random weights at two sizes, the shipped model, and the U-Net's arithmetic.

    ``quick`` leaves out what is compiled, which takes minutes before it begins, and the larger size.
    """
    found = contested(ROOT / "assets" / "emoji", "shipped model, 128x128", 128, 20, rounds, quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_sd15(Path(scratch) / "sd15")
        for side, steps in ((256, 2), (512, 1))[: 1 if quick else 2]:
            found += contested(folder, f"SD 1.5 size, {side}x{side}", side, steps, rounds, quick)
            gc.collect()
        found += arithmetic(folder, rounds, quick)
    return found


def contested(folder: Path, title: str, side: int, steps: int, rounds: int, quick: bool) -> list[Row]:
    """All candidates on one model."""
    given = {"steps": steps, "side": side}
    draws: dict[str, Callable[[], Image.Image]] = {
        "a": partial(stock_draw, stock(folder, torch.float32), **given),
        "b": partial(stock_draw, stock(folder, torch.bfloat16, tuned=True), **given),
        "ours": partial(our_draw, TextToImage.load(folder, "cpu"), **given),
    }
    exact = our_draw(TextToImage.load(folder, "cpu", "fp32"), **given)
    reference = draws["a"]()
    parity = {"ours in fp32": psnr(exact, reference), "ours as it comes": psnr(draws["ours"](), reference)}
    found = contest(draws, rounds, title)
    told = {f"{name}, dB to stock fp32": round(value, 1) for name, value in parity.items()}
    del draws, exact
    gc.collect()
    out = [
        Row.of("P1a", f"{title}: stock fp32 / ours", found, "a", "ours", 3.0, limit=LIMIT, **told),
        Row.of("P1b", f"{title}: stock tuned by hand / ours", found, "b", "ours", 1.1, limit=LIMIT),
    ]
    return out if quick else out + compiled(folder, title, given, rounds)


def compiled(folder: Path, title: str, given: dict[str, Any], rounds: int) -> list[Row]:
    """The same, compiled by inductor with freezing on both sides."""
    fast = TextToImage.load(folder, "cpu", compile=True)
    draws: dict[str, Callable[[], Image.Image]] = {
        "c": partial(stock_draw, stock(folder, torch.bfloat16, tuned=True, compile=True), **given),
        "ours": partial(our_draw, fast, **given),
        "a": partial(stock_draw, stock(folder, torch.float32), **given),
        "b": partial(stock_draw, stock(folder, torch.bfloat16, tuned=True), **given),
    }
    asked = {"a": 4.5, "b": 1.45, "c": 1.05}
    names = {"a": "stock fp32", "b": "stock tuned by hand", "c": "stock compiled", "d": "OpenVINO"}
    other = through_openvino(folder, given["side"])
    if other is not None:
        draws["d"], asked["d"] = partial(stock_draw, other, **given), 1.0
    found = contest(draws, rounds, f"{title}, compiled")
    return [
        Row.of("P1" + key, f"{title}: {names[key]} / ours --compile", found, key, "ours", asked[key], limit=LIMIT)
        for key in asked
    ]


def through_openvino(folder: Path, side: int) -> Any:
    """The stock pipeline with its U-Net in OpenVINO, static shapes, in bfloat16. None where that is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    pipeline = stock(folder, torch.float32)
    unet, width = pipeline.unet, pipeline.unet.config.cross_attention_dim
    cells, length = side // pipeline.vae_scale_factor, pipeline.tokenizer.model_max_length
    example = (torch.zeros(2, unet.config.in_channels, cells, cells), torch.tensor(1.0), torch.zeros(2, length, width))

    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t, context, return_dict=False)[0]

    converted = openvino.convert_model(Output().eval(), example_input=example, input=[i.shape for i in example])
    network = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

    def call(x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        found = network((x.numpy(), t.float().reshape(()).numpy(), encoder_hidden_states.numpy()))[0]
        return (torch.from_numpy(found),)

    unet.forward = call
    return pipeline


LIMIT = "bf16 arithmetic: see P2"


def stock(folder: Path, dtype: torch.dtype, tuned: bool = False, compile: bool = False) -> Any:
    """The stock pipeline as its README runs it, or tuned by hand."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if tuned:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
        pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
    return pipeline


def stock_draw(pipeline: Any, steps: int, side: int) -> Image.Image:
    """One picture, seed 1, guidance 5."""
    noise = torch.Generator("cpu").manual_seed(1)
    size = {"width": side, "height": side}
    return pipeline(PROMPT, num_inference_steps=steps, guidance_scale=5.0, generator=noise, **size).images[0]


def our_draw(model: TextToImage, steps: int, side: int) -> Image.Image:
    """The same."""
    given = {"sampler": "ddim", "schedule": "trailing", "guidance_scale": 5.0, "width": side, "height": side}
    return model(PROMPT, seed=1, steps=steps, **given)[0]


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels between two pictures; 99 where they are the same."""
    a, b = (torch.tensor(list(picture.tobytes()), dtype=torch.float64) for picture in (one, other))
    return float(10 * torch.log10(255**2 / (a - b).square().mean().clamp(min=1e-5)))


def arithmetic(folder: Path, rounds: int, quick: bool) -> list[Row]:
    """P2: FLOP/s of a U-Net forward over those of the best matrix product in the same run."""
    from diffusion.models.denoiser import predict

    networks = {"as it comes": TextToImage.load(folder, "cpu", "bf16").model.unet}
    if not quick:
        networks["compiled"] = TextToImage.load(folder, "cpu", "bf16", compile=True).model.unet
    x = torch.randn(2, 4, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    condition = {"context": torch.randn(2, 77, 768, dtype=torch.bfloat16)}
    a, t = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.tensor([500.0, 500.0])
    counted = flops(networks["as it comes"], lambda unet: predict(unet, x, t, condition))

    def forward(unet: Any) -> None:
        with torch.inference_mode():
            predict(unet, x, t, condition)

    def product() -> None:
        for _ in range(20):
            a @ a

    candidates = {name: partial(forward, unet) for name, unet in networks.items()}
    found = contest({**candidates, "product": product}, rounds, "arithmetic")
    best = 20 * 2 * 2048**3 / min(found.timings["product"].seconds)
    rates = {name: counted / min(found.timings[name].seconds) for name in networks}
    more = {"GEMM GFLOP/s": round(best / 1e9)} | {f"{n}, GFLOP/s": round(rate / 1e9) for n, rate in rates.items()}
    wanted = {"as it comes": 0.5, "compiled": 0.8}
    return [
        Row("P2", f"U-Net FLOP/s over the best bf16 GEMM, {name}", rate / best, wanted[name], limit="1", more=more,
            spread=found.timings[name].spread, drift=found.drift, counts=found.counts)
        for name, rate in rates.items()
    ]  # fmt: skip


def flops(unet: Any, forward: Callable[[Any], object]) -> int:
    """How many a forward takes, by PyTorch's own operators, which are the ones that its counter knows."""
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion.models.packing import pack, unpack

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unpack(unet)
        forward(unet)
    pack(unet)
    return counter.get_total_flops()


def random_sd15(folder: Path, widths: tuple[int, ...] = (320, 640, 1280, 1280)) -> Path:
    """A model folder of Stable Diffusion 1.5's shapes with random weights, in float32; its vocabulary is small."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from diffusion.models.folder import Forward, Model, Recipe, save_model
    from diffusion.models.networks import build_text_encoder
    from diffusion.models.text import train_tokenizer

    started = time.perf_counter()
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PROMPT, "a green boat"], 600, 77)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    model = Model(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(text, tokenizer),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=widths),
        vae=vae,
        forward=Forward(),
        recipe=Recipe(),
    )
    save_model(model, folder)
    tqdm.write(f"a model of SD 1.5's size: {time.perf_counter() - started:.0f} s")
    return folder
