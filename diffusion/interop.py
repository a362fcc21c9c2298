"""One file instead of a folder: Stable Diffusion 1.x, 2.x and XL as a single ``.safetensors`` in the original format.

Files from elsewhere are read with the stock networks of their family, which ``models/original.py`` knows; nothing is
looked up on the network. Files that are written here say in their header what they hold (``diffusion_configs``), so
that a model of any width comes back whole, with its tokenizers, its recipe and its forward process.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion.models import adapters, original
from diffusion.models.clip_tokenizer import LENGTH, clip_tokenizer
from diffusion.models.folder import TEXT_MODELS, Forward, Model, Recipe, check_channels, read_recipe
from diffusion.models.stock import CLIPTokenizer, no_bar
from diffusion.models.text import load_tokenizer
from diffusion.places import base_of

FACTS = "diffusion_configs"  # the key in the header
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # ours -> ModelSpec's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BASE_STEPS = 875000  # ``global_step`` of Stable Diffusion 2 base, by which the stock library tells that it is that


def load_single_file(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: str | None = None,
) -> Model:
    """Read a model from one ``.safetensors`` file in the original format. ValueError says in one line what it is else.

    Weights do not tell what they predict. It is what the file says: ``modelspec.prediction_type`` in its header, or a
    tensor named ``v_pred`` (and ``ztsnr`` for zero terminal SNR). A file of 2.x that says nothing predicts epsilon if
    its ``global_step`` is that of 2 base, as the stock library has it, and else v: right for 2.x at 768 pixels, wrong
    for a 2.x at 512 without that number. ``prediction`` (``epsilon`` or ``v_prediction``) overrules all of it.
    ``model_ema.`` keys are left alone: the weights beside them are the ones that are meant for drawing.
    """
    path = Path(path)
    header, shapes = _head(path)
    try:
        facts = _facts(header, shapes, _value(path, "global_step") if "global_step" in shapes else None, prediction)
        networks = original.outline(facts["networks"])
        weights = original.from_original(_read(path, shapes), facts["family"], networks)
        model = _assembled(facts, networks, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_said(error)}") from None
    for name, network in networks.items():
        setattr(model, name, _filled(network, weights.pop(name), dtype).to(device))
    return model


def _assembled(facts: Mapping[str, Any], networks: Mapping[str, Any], path: Path) -> Model:
    """A model of what is known of a file, with the networks that are given."""
    tokenizers = [_unpack(files) for files in facts["tokenizers"]]
    known = {item.name for item in fields(Recipe)}
    return Model(
        **networks,
        **dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False)),
        zero_empty=facts["zero_empty"],
        forward=Forward.from_diffusers(facts["scheduler"]),
        recipe=Recipe(**{key: value for key, value in facts["recipe"].items() if key in known}),
        path=path,
    )


def save_single_file(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as one file in the original format; ``dtype`` is that of the stored weights (None: as they are).

    ``StableDiffusionPipeline.from_single_file`` reads it, and so do the programs that read checkpoints of the family.
    ValueError for a model that the format has no place for, such as the toolkit's own.
    """
    path = Path(path)
    if model.prediction not in PREDICTIONS:
        raise ValueError(f"Stable Diffusion's original format has no name for the prediction {model.prediction!r}")
    family = original.family_of(model.networks)
    tensors = original.to_original(model.networks)
    stored = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    stored |= {key: torch.zeros(0) for key in _marks(model.forward)}
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(stored, part, metadata=_header(model, family, path.stem))
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def outline(path: str | Path) -> dict[str, Any]:
    """The networks of a model (a file, a folder, a folder of adapters) without weights, for their names and shapes."""
    path = base_of(Path(path)) or Path(path)
    if path.is_file():
        header, shapes = _head(path)
        try:
            return original.outline(_facts(header, shapes)["networks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {_said(error)}") from None
    files = {name: path / name / "config.json" for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return original.outline({name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()})


def outline_model(path: str | Path, prediction: str | None = None) -> Model:
    """A model that knows all but its weights: networks on the meta device, which LoRAs and words are put on as on any.

    It answers whether a request can be met, in a fraction of the time that reading takes. ValueError as for reading.
    """
    path = Path(path)
    base = base_of(path)
    if base is not None:
        return adapters.become(outline_model(base, prediction), path)
    model = _outlined_file(path, prediction) if path.is_file() else _outlined_folder(path, prediction)
    check_channels(model, path)
    return model


def _outlined_file(path: Path, prediction: str | None) -> Model:
    header, shapes = _head(path)
    try:
        step = _value(path, "global_step") if "global_step" in shapes else None
        facts = _facts(header, shapes, step, prediction)
        return _assembled(facts, original.outline(facts["networks"]), path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_said(error)}") from None


def _outlined_folder(path: Path, prediction: str | None) -> Model:
    index, scheduler = path / "model_index.json", path / "scheduler" / "scheduler_config.json"
    facts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    forward = Forward.from_diffusers(json.loads(scheduler.read_text(encoding="utf-8")))
    second = (path / "text_encoder_2").is_dir()
    return Model(
        **outline(path),
        tokenizer=load_tokenizer(path / "tokenizer"),
        tokenizer_2=load_tokenizer(path / "tokenizer_2") if second else None,
        zero_empty=second and facts.get("force_zeros_for_empty_prompt", True),
        forward=forward if prediction is None else replace(forward, prediction=prediction),
        recipe=read_recipe(path),
        path=path,
    )


def describe(path: str | Path) -> dict[str, Any]:
    """What a single file is and what its network puts out, without reading its weights. ValueError as for reading."""
    path = Path(path)
    header, shapes = _head(path)
    try:
        facts = _facts(header, shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {_said(error)}") from None
    kept = {name: facts[name] for name in ("family", "scheduler", "recipe")}
    return {"path": str(path), **kept, "tensors": len(shapes), "configs": "its own" if FACTS in header else "stock"}


# --- reading ----------------------------------------------------------------------------------------------------------


def _head(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The header's own words, and the shapes of the tensors; told by content, whatever the name of the file."""
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            return header, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file{_pickled(path)} ({_said(error)})") from None


def _pickled(path: Path) -> str:
    """A pickle can run anything when it is opened, so none is: it is known by its first bytes, bare or in a zip."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) in (b"PK", b"\x80\x02"):
                return " but a pickled checkpoint (.ckpt), which could run code: convert it where you trust it"
    return ""


def _said(error: Exception) -> str:
    return f"its {FACTS} lack {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]


def _read(path: Path, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in shapes if key.startswith(original.PARTS)}


def _value(path: Path, key: str) -> float:
    with safe_open(path, "pt") as file:
        return float(file.get_tensor(key))


def _facts(
    header: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    step: float | None = None,
    prediction: str | None = None,
) -> dict[str, Any]:
    """What is known of a file besides its weights: what it says of itself, or what is stock in its family."""
    if FACTS in header:
        facts = json.loads(header[FACTS])
        if prediction is not None:
            facts["scheduler"]["prediction_type"] = prediction
        return facts
    family = original.identify(shapes)
    forward = _stock_forward(family, header, shapes, step)
    forward = forward if prediction is None else replace(forward, prediction=prediction)
    networks, side = dict(original.FAMILIES[family].configs), original.FAMILIES[family].side
    if family == "sd2" and forward.prediction == "epsilon":
        side = 512
        networks["unet"] = {**networks["unet"], "sample_size": 64}
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}
    return {
        "family": family,
        "networks": networks,
        "scheduler": forward.to_diffusers(),
        "tokenizers": [{"pad": pad} for pad in pads[family]],
        "recipe": {"width": side, "height": side},
        "zero_empty": family == "sdxl",
    }


def _stock_forward(
    family: str, header: Mapping[str, str], shapes: Mapping[str, Any], step: float | None = None
) -> Forward:
    """The scaled linear betas of all three families, and the prediction as ``load_single_file`` tells."""
    names = {theirs: ours for ours, theirs in PREDICTIONS.items()} | {"v_prediction": "v_prediction"}
    said = header.get("modelspec.prediction_type")
    if said is not None and said not in names:
        raise ValueError(f"unknown modelspec.prediction_type {said!r} (known: {', '.join(names)})")
    v = "v_pred" in shapes or "v_pred" in header or (family == "sd2" and step != BASE_STEPS)
    return Forward(
        prediction=names[said] if said is not None else "v_prediction" if v else "epsilon",
        zero_terminal_snr="ztsnr" in shapes or "ztsnr" in header,
    )


def _filled(network: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A network of the outline with its weights."""
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    if isinstance(network, TEXT_MODELS):  # it has a buffer that no file holds
        with no_bar():
            return type(network).from_pretrained(None, config=network.config, state_dict=weights, dtype=dtype).eval()
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _unpack(files: Mapping[str, str]) -> CLIPTokenizer:
    """The tokenizer that ``_pack`` took apart."""
    if "pad" in files:
        return clip_tokenizer(files["pad"])
    with TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            (Path(folder) / name).write_text(files[name], encoding="utf-8")
        return load_tokenizer(Path(folder))


# --- writing ----------------------------------------------------------------------------------------------------------


def _header(model: Model, family: str, title: str) -> dict[str, str]:
    """What other programs read (Stability's ModelSpec 1.0.0), and what we do."""
    recipe, forward = model.recipe, model.forward
    facts = {
        "family": family,
        "networks": {name: _config(network) for name, network in model.networks.items()},
        "scheduler": forward.to_diffusers(),
        "tokenizers": [_pack(tokenizer) for tokenizer in model.tokenizers],
        "recipe": asdict(replace(recipe, base="")),
        "zero_empty": model.zero_empty,
    }
    architecture = original.FAMILIES[family].architecture
    if family == "sd2" and forward.prediction == "epsilon":
        architecture = "stable-diffusion-v2-512"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{recipe.width}x{recipe.height}",
        "modelspec.prediction_type": PREDICTIONS[forward.prediction],
        FACTS: json.dumps(facts, ensure_ascii=False),
    }


def _marks(forward: Forward) -> list[str]:
    """The empty tensors by which other programs know what a network predicts."""
    return ["v_pred"] * (forward.prediction == "v_prediction") + ["ztsnr"] * forward.zero_terminal_snr


def _config(network: Any) -> dict[str, Any]:
    text = isinstance(network, TEXT_MODELS)
    found = json.loads(network.config.to_json_string(use_diff=False)) if text else dict(network.config)
    return {key: value for key, value in found.items() if not key.startswith("_") and key != "dtype"}


def _pack(tokenizer: CLIPTokenizer) -> dict[str, str]:
    """The files of a tokenizer; of CLIP's own, which ships with the package, only the token that it pads with."""
    if tokenizer.model_max_length == LENGTH and tokenizer.get_vocab() == clip_tokenizer().get_vocab():
        return {"pad": tokenizer.pad_token}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: (Path(folder) / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES}
