"""One model folder: the diffusers layout plus ``recipe.json``, read and written here.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/  recipe.json

What train writes, generate reads with no flags, and ``StableDiffusionPipeline.from_pretrained`` reads too.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffusion import schedules
from diffusion.models.networks import first_weight, spatial_factor
from diffusion.models.offload import Offload
from diffusion.models.stock import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
    no_advice,
    no_bar,
)
from diffusion.models.text import load_tokenizer, save_tokenizer
from diffusion.places import base_of
from diffusion.schedules import DiscreteSchedule, FlowSchedule

TEXT_MODELS = (CLIPTextModel, CLIPTextModelWithProjection)
FLOW = "FlowMatchEulerDiscreteScheduler"
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # ours -> diffusers'


@dataclass(kw_only=True)
class Recipe:
    """``recipe.json``: how a model likes to be sampled, and what it was made of."""

    width: int = 512
    height: int = 512
    steps: int = 30
    guidance_scale: float = 7.5
    guidance_interval: list[float | None] | None = None  # sigma / alpha at which that guides: low, high
    sampler: str = "ddim"
    schedule: str = "trailing"
    trained_on: str = ""
    base: str = ""  # of a folder of adapters: the model that they belong to
    prompts: list[str] = field(default_factory=list)
    latent_rgb: list[list[float]] | None = None  # from latents and a one to colours, for cheap previews

    def too_far(self, width: int, height: int) -> str | None:
        """What to know of a size that is far from the model's own: of such pictures it has seen none."""
        ratios = width / self.width, height / self.height
        if all(0.5 < ratio < 2 for ratio in ratios):
            return None
        remedy = "; --hires enlarges what it draws there" if max(ratios) >= 2 else ""
        return f"{width}x{height} is far from the model's own {self.width}x{self.height}: shapes may break{remedy}"


@dataclass(kw_only=True)
class Forward:
    """The forward process and the prediction type, in the words of ``scheduler_config.json``."""

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: str = "epsilon"  # with ``flow`` the path is straight, and there are no betas
    shift: float = 1.0  # of a flow: above 1 more steps are spent in noise

    def schedule(self) -> DiscreteSchedule | FlowSchedule:
        """The levels that this process passes through."""
        if self.prediction == "flow":
            return FlowSchedule(self.num_train_timesteps, self.shift)
        if self.beta_schedule == "cosine":
            betas = schedules.cosine_betas(self.num_train_timesteps)
        else:
            make = schedules.linear_betas if self.beta_schedule == "linear" else schedules.scaled_linear_betas
            betas = make(self.num_train_timesteps, self.beta_start, self.beta_end)
        return DiscreteSchedule(schedules.rescale_zero_terminal_snr(betas) if self.zero_terminal_snr else betas)

    def to_diffusers(self) -> dict[str, Any]:
        """A ``scheduler_config.json`` that walks our ``trailing`` grid, by DDIM, or of a flow our ``discrete`` one."""
        if self.prediction == "flow":
            return {
                "_class_name": FLOW,
                "num_train_timesteps": self.num_train_timesteps,
                "shift": self.shift,
                "init_noise_sigma": 1.0,  # not of this class, but StableDiffusionPipeline asks every scheduler for it
            }
        return {
            "_class_name": "DDIMScheduler",
            "beta_schedule": _BETAS[self.beta_schedule],
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_train_timesteps": self.num_train_timesteps,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "prediction_type": self.prediction,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 1,
        }

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> "Forward":
        """Read a ``scheduler_config.json``; a key that is absent has the meaning diffusers gives to its absence."""
        kind = config.get("_class_name", "DDIMScheduler")
        if kind == FLOW:
            return cls._from_flow(config)
        if kind.startswith(("FlowMatch", "EDM", "ScoreSde", "Karras", "VQ", "UnCLIP")):
            raise ValueError(f"scheduler_config.json: {kind} describes another forward process than Stable Diffusion's")
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"scheduler_config.json: unknown prediction_type {config['prediction_type']!r}")
        if config.get("trained_betas") is not None:
            raise ValueError("scheduler_config.json: trained_betas are not supported, only the named beta schedules")
        names = {theirs: ours for ours, theirs in _BETAS.items()}
        beta_schedule = config.get("beta_schedule", "linear")
        if beta_schedule not in names:
            raise ValueError(f"scheduler_config.json: beta_schedule {beta_schedule!r} is not one of {', '.join(names)}")
        return cls(
            beta_schedule=names[beta_schedule],
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
            prediction=config.get("prediction_type", "epsilon"),
        )

    @classmethod
    def _from_flow(cls, config: dict[str, Any]) -> "Forward":
        for name in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal"):
            if config.get(name):
                raise ValueError(f"scheduler_config.json: {name} is not supported, only a fixed shift")
        steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        return cls(prediction="flow", num_train_timesteps=steps, shift=shift)


@dataclass(kw_only=True)
class Model:
    """The parts of a loaded model."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    forward: Forward
    recipe: Recipe
    path: Path | None = None
    tokenizer_2: CLIPTokenizer | None = None  # SDXL has two text encoders
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_empty: bool = False
    compiled: Any = None  # what the U-Net's forward has become, if it was compiled
    offload: Offload | None = None  # what brings its networks to the device, if they wait elsewhere
    adapters: dict[str, float] = field(default_factory=dict)  # what was merged into the weights, and how strongly
    reports: dict[str, str] = field(default_factory=dict)  # what a person may want to know of each LoRA

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        return [self.tokenizer, *([self.tokenizer_2] if self.tokenizer_2 is not None else [])]

    @property
    def text_encoders(self) -> list[Any]:
        return [self.text_encoder, *([self.text_encoder_2] if self.text_encoder_2 is not None else [])]

    @property
    def networks(self) -> dict[str, Any]:
        """The networks by the names of their folders."""
        second = {"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 is not None else {}
        return {"vae": self.vae, "unet": self.unet, "text_encoder": self.text_encoder, **second}

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return spatial_factor(self.vae)

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return first_weight(self.unet).device if self.offload is None else self.offload.device

    @property
    def dtype(self) -> torch.dtype:
        """What its U-Net computes in."""
        return first_weight(self.unet).dtype

    @property
    def prediction(self) -> str:
        return self.forward.prediction

    @property
    def schedule(self) -> DiscreteSchedule | FlowSchedule:
        return self.forward.schedule()


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Read a model folder, or a folder of adapters with the model that they belong to.

    ``ValueError`` names the part that is missing.
    """
    path = Path(path)
    base = base_of(path)
    if base is not None:
        from diffusion.models import adapters  # which knows this room

        return adapters.become(load_model(base, device, dtype), path)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (path / part).is_dir():
            raise ValueError(f"{path} is not a model folder: it has no {part}/")
    recipe = read_recipe(path)
    second = {}
    if (path / "text_encoder_2").is_dir():
        second = {
            "tokenizer_2": load_tokenizer(path / "tokenizer_2"),
            "text_encoder_2": _load_text(CLIPTextModelWithProjection, path / "text_encoder_2", dtype).to(device),
            "zero_empty": _read_json(path / "model_index.json").get("force_zeros_for_empty_prompt", True),
        }
    return Model(
        tokenizer=load_tokenizer(path / "tokenizer"),
        text_encoder=_load_text(CLIPTextModel, path / "text_encoder", dtype).to(device),
        unet=_load(UNet2DConditionModel, path / "unet", dtype).to(device),
        vae=load_vae(path, dtype).to(device),
        forward=Forward.from_diffusers(json.loads((path / "scheduler" / "scheduler_config.json").read_text())),
        recipe=recipe,
        path=path,
        **second,
    )


def check_channels(model: Model, path: Path) -> None:
    """ValueError for a model whose U-Net reads more than the latents that it draws."""
    expected, found = model.vae.config.latent_channels, model.unet.config.in_channels
    if expected != found:
        raise ValueError(
            f"{path}: its U-Net reads {found} channels where {expected} are drawn; a model made for inpainting or "
            "upscaling alone cannot draw from text (any other model inpaints with --mask)"
        )


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Only the autoencoder of a model folder."""
    if not (Path(path) / "vae").is_dir():
        raise ValueError(f"{path} has no vae/: name a model folder, or train one with configs/emoji_autoencoder.yaml")
    return _load(AutoencoderKL, Path(path) / "vae", dtype)


def read_recipe(path: str | Path) -> Recipe:
    """The generation defaults of a model folder, without loading the model; a foreign folder gets plain defaults."""
    file = Path(path) / "recipe.json"
    if file.is_file():
        known = {item.name for item in fields(Recipe)}
        try:
            recipe = Recipe(**{key: value for key, value in json.loads(file.read_text()).items() if key in known})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a JSON object ({error})") from None
        for name in ("width", "height", "steps"):
            value = getattr(recipe, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{file}: {name} must be a whole number of at least 1, got {value!r}")
        return recipe
    unet = json.loads((Path(path) / "unet" / "config.json").read_text())
    vae = json.loads((Path(path) / "vae" / "config.json").read_text())
    side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return Recipe(width=side, height=side)


def save_model(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder; ``dtype`` is that of the stored weights (None: as they are). The model stays as it is."""
    path = Path(path)
    for name, network in model.networks.items():
        save_network(network, path / name, dtype)
    for tail, tokenizer in zip(("", "_2"), model.tokenizers, strict=False):
        save_tokenizer(tokenizer, path / f"tokenizer{tail}")
    scheduler = model.forward.to_diffusers()
    write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    write_json(path / "recipe.json", asdict(model.recipe))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if model.text_encoder_2 is None:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": model.zero_empty}
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    write_json(path / "model_index.json", index)


def stock_pipeline(model: Model) -> Any:
    """The same networks in diffusers' own ``StableDiffusionPipeline``, or ``StableDiffusionXLPipeline``."""
    with no_advice():
        import diffusers  # slow to import
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts, scheduler = {**model.networks, "tokenizer": model.tokenizer}, model.forward.to_diffusers()
    parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    if model.text_encoder_2 is not None:
        return StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=model.tokenizer_2,
            force_zeros_for_empty_prompt=model.zero_empty,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **parts,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_network(network: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """One network as ``config.json`` and safetensors, stored in ``dtype``."""
    config, name = (
        (network.config.save_pretrained, "model.safetensors")
        if isinstance(network, TEXT_MODELS)
        else (network.save_config, "diffusion_pytorch_model.safetensors")
    )
    if isinstance(network, TEXT_MODELS):
        network.config.dtype = "float32"  # what a stock pipeline that is given no dtype loads the other networks in
    folder.mkdir(parents=True, exist_ok=True)
    config(folder)
    weights = {key: value.detach().to("cpu", dtype).contiguous() for key, value in network.state_dict().items()}
    part = folder / f".{name}.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o666 & ~_umask())  # the library writes it for its owner alone
    part.replace(folder / name)  # never into a file that someone has mapped into memory


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _load_text(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    with no_bar():
        return cls.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    return cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True).eval()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Plain JSON, readable by a person."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
