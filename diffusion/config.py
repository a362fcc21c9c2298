"""What a training run is: typed dataclasses read from YAML, with every fault found at once.

    config = load("configs/emoji.yaml", ["train.lr=3e-4", "name=mine"])

Unknown keys, wrong types, duplicate keys and values out of range raise one ``ValueError`` that lists all of them, each
with its dotted path and, for a typo, the nearest known key. ``1e-4`` is a number; ``true`` is not an integer.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffusion.places import OTHER_FORMAT, SINGLE_FILE, word_file, word_tokens

STRICT = ConfigDict(extra="forbid", strict=True)
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Network = dict[str, Any]  # keyword arguments of a network class; checked against its signature when it is built


@dataclass(config=STRICT, kw_only=True)
class Captions:
    """Where captions are, and how one is chosen at each visit of a picture."""

    source: Annotated[
        Literal["auto", "metadata", "txt", "folder", "file"], "where captions are; auto: metadata, else .txt files"
    ] = "auto"
    text: Annotated[str | None, "the same caption for all pictures, whatever else there is"] = None
    dropout: Annotated[Fraction, "share of visits with the empty caption, for classifier-free guidance"] = 0.1
    keywords: Annotated[Fraction, "share of visits with a shuffled choice of keywords instead of the text"] = 0.0
    fillers: Annotated[
        list[str], "words strewn into three in ten captions, so that a prompt may hold words that name nothing"
    ] = Field(default_factory=list)
    shuffle_tags: Annotated[bool, "shuffle comma-separated tags"] = False
    keep_tags: Annotated[Count, "leading tags that shuffling leaves in place"] = 0
    templates: Annotated[
        list[Annotated[str, Field(pattern=r"\{\}")]], "sentences around a caption, which stands for {}; one is drawn"
    ] = Field(default_factory=list)
    trigger: Annotated[str, "leads every caption that is not empty"] = ""


@dataclass(config=STRICT, kw_only=True)
class Prior:
    """Pictures of what the model knows already, so that it does not forget it (DreamBooth, 2208.12242)."""

    prompt: Annotated[str, "what they show: the class of the subject, for instance a dog"]
    count: Annotated[Positive, "how many the model draws, before it is trained; of a path all are taken"] = 100
    path: Annotated[str | None, "folder of pictures that are there; null: <output>/<name>/prior, drawn"] = None
    weight: Annotated[Rate, "of their loss"] = 1.0


@dataclass(config=STRICT, kw_only=True)
class Data:
    """The pictures and their captions."""

    path: Annotated[str, "folder of pictures with captions, or WebDataset shards: set/{000..099}.tar"]
    size: Annotated[Positive, "pictures are scaled and centre-cropped to size x size pixels, or to buckets"] = 512
    crop: Annotated[Positive | None, "train on random square crops of this many pixels (autoencoder)"] = None
    buckets: Annotated[bool, "keep about the shape of each picture: shapes of at most size x size pixels"] = False
    bucket_step: Annotated[Positive, "sides of buckets are multiples of this many pixels"] = 64
    bucket_ratio: Annotated[Annotated[float, Field(ge=1)], "longest shape: long side over short side"] = 2.0
    crops: Annotated[Positive, "places along the longer side that a picture is cut at, one drawn at each visit"] = 1
    flip: Annotated[bool, "mirror pictures at half of the visits; not for captions that know left and right"] = False
    upscale: Annotated[bool, "take pictures that are too small; otherwise they are left out, and named"] = False
    background: Annotated[
        Annotated[str, Field(pattern=r"^(white|black|gray|#[0-9a-fA-F]{6})$")], "shown where a picture is transparent"
    ] = "white"
    cache: Annotated[bool, "encode pictures and captions once, into <output>/cache; false: at every visit"] = True
    hold_out: Annotated[
        Fraction, "share of pictures, chosen by their names, that is never trained on; rows of split held_out never are"
    ] = 0.0
    balance: Annotated[str | None, "metadata field that names a group; its members share one weight"] = None
    balance_power: Annotated[Fraction, "1: every group is drawn equally often; 0: every picture is"] = 1.0
    captions: Annotated[Captions, "caption choice"] = Field(default_factory=Captions)
    prior: Annotated[Prior | None, "pictures of the model's own, seen as often as those of path"] = None

    @property
    def sharded(self) -> bool:
        """Whether ``path`` names tar files, one or several in braces or with stars: compressed ones are told apart."""
        return re.search(r"\.(tar(\.\w+)?|tgz)$", self.path) is not None


@dataclass(config=STRICT, kw_only=True)
class Tokenizer:
    """A byte-pair tokenizer trained on the captions."""

    vocab_size: Annotated[int, Field(ge=514), "tokens, the 512 byte tokens and two markers included"] = 4096
    max_length: Annotated[int, Field(ge=4), "tokens that the text encoder reads, both markers included"] = 77


@dataclass(config=STRICT, kw_only=True)
class Lora:
    """Low-rank adapters (2106.09685) on the frozen networks of ``model.base``."""

    rank: Annotated[Positive, "columns of an adapter: how much it can learn, and how large it is"] = 16
    alpha: Annotated[Annotated[float, Field(gt=0)] | None, "strength: alpha / rank; null: rank, that is 1"] = None
    targets: Annotated[Literal["attention", "all"], "attention projections, or all linear layers and convolutions"] = (
        "attention"
    )
    dora: Annotated[bool, "learn the length of each row apart from its direction (DoRA, 2402.09353)"] = False
    text_encoder: Annotated[bool, "adapters in the text encoders as well"] = False
    kohya: Annotated[bool, "write the adapters in kohya's names as well"] = False


@dataclass(config=STRICT, kw_only=True)
class Word:
    """A word to learn (textual inversion, 2208.01618)."""

    word: Annotated[str, Field(pattern=r"^\S+$"), "as it is written in captions and prompts: <my-cat>"]
    start: Annotated[str, "what it means before it has learnt anything, in known words"]
    vectors: Annotated[Positive, "tokens that it takes in a prompt"] = 1


@dataclass(config=STRICT, kw_only=True)
class Model:
    """What is built or loaded. Parts that are given are built anew; the others come from ``base``."""

    base: Annotated[str | None, "model folder or name to start from"] = None
    autoencoder: Annotated[str | None, "model folder whose vae/ is used"] = None
    vae: Annotated[Network | None, "AutoencoderKL arguments"] = None
    train_encoder: Annotated[bool, "false: of an autoencoder only the decoder learns, and latents stay valid"] = True
    tokenizer: Annotated[Tokenizer | None, "tokenizer to train"] = None
    text_encoder: Annotated[Network | None, "CLIPTextConfig arguments"] = None
    unet: Annotated[Network | None, "UNet2DConditionModel arguments"] = None
    train_text_encoder: Annotated[bool, "train the text encoders of base as well"] = False
    lora: Annotated[Lora | None, "train adapters and nothing else"] = None
    words: Annotated[list[Word], "learn these words and nothing else, or beside adapters"] = Field(default_factory=list)
    beta_schedule: Annotated[Literal["linear", "scaled_linear", "cosine"], "forward process"] = "scaled_linear"
    zero_terminal_snr: Annotated[bool, "rescale the betas so that the last step is pure noise (2305.08891)"] = False
    prediction: Annotated[
        Literal["epsilon", "v_prediction", "sample", "flow"],
        "what the U-Net puts out; flow: the velocity of the straight path from data to noise (2209.03003)",
    ] = "epsilon"


@dataclass(config=STRICT, kw_only=True)
class Distill:
    """A student whose single steps go as far as several guided ones of ``model.base`` (2202.00512, 2210.03142)."""

    steps: Annotated[Positive, "steps that the student draws in, without guidance"] = 4
    teacher_steps: Annotated[Positive, "steps of the teacher that one of them stands for"] = 5
    guidance: Annotated[Rate, "the teacher's guidance scale, which the student learns"] = 5.0
    interval: Annotated[
        list[Rate] | None,
        Field(min_length=2, max_length=2),
        "guide only at these sigma / alpha: low, high (2404.07724)",
    ] = None


@dataclass(config=STRICT, kw_only=True)
class Loss:
    """Weights and densities. Those from l1 on belong to the autoencoder, the others to the denoiser."""

    weighting: Annotated[Literal["uniform", "min_snr"], "loss weight over noise levels"] = "uniform"
    gamma: Annotated[Annotated[float, Field(gt=0)], "min-SNR ceiling (2303.09556)"] = 5.0
    density: Annotated[Literal["uniform", "logit_normal"], "distribution of training times"] = "uniform"
    density_mean: Annotated[
        Annotated[float, Field(allow_inf_nan=False)], "logit-normal mean: above 0 trains more at high noise"
    ] = 0.0
    density_std: Annotated[Annotated[float, Field(gt=0)], "logit-normal width"] = 1.0
    offset_noise: Annotated[Rate, "size of noise that is one number a channel, so that brightness is learnt too"] = 0.0
    input_perturbation: Annotated[Rate, "size of noise that only the network's input gets (2301.11706)"] = 0.0
    distill: Annotated[Distill | None, "learn to draw in a few steps from model.base"] = None
    l1: Annotated[Rate, "weight of the absolute pixel error"] = 1.0
    mse: Annotated[Rate, "weight of the squared pixel error"] = 1.0
    gradient: Annotated[Rate, "weight of the absolute error of horizontal and vertical differences"] = 0.0
    kl: Annotated[Rate, "weight of the divergence from the standard normal, per latent value"] = 1e-6
    adversarial: Annotated[Rate, "weight of a patch discriminator's opinion, which learns along (1611.07004)"] = 0.0
    adversarial_after: Annotated[Count, "steps before it joins, when reconstruction has settled"] = 0


@dataclass(config=STRICT, kw_only=True)
class Train:
    """The loop. Every count of steps is in optimizer steps."""

    steps: Annotated[Positive, "optimizer steps"] = 1000
    batch_size: Annotated[Positive, "pictures an optimizer step, over all processes and micro-batches"] = 16
    micro_batch: Annotated[Positive | None, "pictures a forward pass on one process; null: the whole share"] = None
    auto_batch: Annotated[bool, "choose the largest micro_batch that fits in memory"] = False
    lr: Annotated[Rate, "peak learning rate"] = 1e-4
    lr_schedule: Annotated[Literal["constant", "cosine", "linear"], "after the warm-up"] = "constant"
    warmup: Annotated[Count, "steps of linear warm-up"] = 0
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "adafactor", "muon", "prodigy", "schedule_free"],
        "adamw8bit, prodigy and schedule_free if their packages are installed",
    ] = "adamw"
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2), "AdamW betas"] = (
        Field(default_factory=lambda: [0.9, 0.999])
    )
    weight_decay: Annotated[Rate, "AdamW weight decay"] = 0.01
    clip: Annotated[Rate, "gradient norm ceiling; 0 turns it off"] = 1.0
    ema: Annotated[
        Annotated[float, Field(ge=0, lt=1)], "decay of the averaged weights that are shipped; 0 turns it off"
    ] = 0.999
    ema_every: Annotated[Positive, "optimizer steps between updates of the averaged weights"] = 1
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass: less memory, more time"] = (
        False
    )
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "autocast precision; auto measures"] = "auto"
    compile: Annotated[bool, "torch.compile the network, if its gradients then prove equal"] = False
    workers: Annotated[Count, "data worker processes"] = 0
    save_dtype: Annotated[Literal["bf16", "fp16", "fp32"], "in which the model's weights are stored"] = "bf16"
    log_every: Annotated[Positive, "steps between lines of metrics.jsonl"] = 50
    log_with: Annotated[list[Literal["tensorboard", "wandb"]], "where metrics go as well, if it is installed"] = Field(
        default_factory=list
    )
    sample_every: Annotated[Count, "steps between sample grids; 0: only at the end"] = 1000
    validate_every: Annotated[Count, "steps between losses on fixed probes, held out and trained on; 0: never"] = 0
    validate_pictures: Annotated[Positive, "pictures of each probe"] = 64
    checkpoint_minutes: Annotated[Annotated[float, Field(gt=0)], "wall-clock minutes between checkpoints"] = 10.0
    keep_last: Annotated[Positive, "checkpoints kept"] = 2
    keep_every: Annotated[Count, "checkpoints at multiples of this many steps are kept for good; 0: none"] = 0


@dataclass(config=STRICT, kw_only=True)
class Recipe:
    """Generation defaults that the trained model carries in its recipe.json."""

    steps: Annotated[Positive | None, "denoising steps; null: as the base model, or 30"] = None
    guidance_scale: Annotated[Rate | None, "classifier-free guidance; null: as the base model, or 7.5"] = None
    guidance_interval: Annotated[
        list[Rate] | None, Field(min_length=2, max_length=2), "sigma / alpha at which that guides; null: everywhere"
    ] = None
    sampler: Annotated[str | None, "sampler name; null: as the base model, or ddim"] = None
    schedule: Annotated[str | None, "grid of noise levels; null: as the base model, or trailing"] = None
    prompts: Annotated[list[str], "prompts of the sample grids; none: a few captions of the set"] = Field(
        default_factory=list
    )


@dataclass(config=STRICT, kw_only=True)
class Config:
    """One training run."""

    task: Annotated[Literal["autoencoder", "text_to_image"], "what is trained"]
    name: Annotated[Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")], "the run writes to <output>/<name>/"]
    data: Annotated[Data, "pictures and captions"]
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**63)], "names every random draw of the run"] = 0
    output: Annotated[str, "folder of all runs"] = "runs"
    model: Annotated[Model, "networks"] = Field(default_factory=Model)
    loss: Annotated[Loss, "objective"] = Field(default_factory=Loss)
    train: Annotated[Train, "loop"] = Field(default_factory=Train)
    recipe: Annotated[Recipe, "generation defaults"] = Field(default_factory=Recipe)

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``dotted.key=value`` overrides (a leading ``--`` is allowed) and validate the whole."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file{_suggest_file(path)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(tree, dict):
            raise ValueError(f"expected a mapping of keys, got {type(tree).__name__}")
        for override in overrides:
            _apply(tree, override)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return validate(tree, str(path))


def validate(tree: dict[str, Any], source: str = "config") -> Config:
    """A nested mapping as a Config; ``ValueError`` with one line a fault."""
    try:
        config = TypeAdapter(Config).validate_json(
            json.dumps(tree, default=str)
        )  # strict, yet takes mappings for classes
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors()]
    else:
        faults = [*_idle(config), *_clashes(config.model.words)]
    if faults:
        raise ValueError("\n".join(f"{source}: {fault}" for fault in faults))
    return config


# --- what goes together -----------------------------------------------------------------------------------------------

# (when, what is then without effect, what it is about): said, instead of being passed over in silence
IDLE: tuple[tuple[Callable[[Config], bool], tuple[str, ...], str], ...] = (
    (
        lambda c: c.task == "text_to_image",
        (
            *("data.crop", "model.vae", "model.train_encoder"),
            *("loss.l1", "loss.mse", "loss.gradient", "loss.kl", "loss.adversarial", "loss.adversarial_after"),
        ),
        "task text_to_image, which trains no autoencoder",
    ),
    (
        lambda c: c.task == "autoencoder",
        (
            *("model.autoencoder", "model.tokenizer", "model.text_encoder", "model.unet", "model.train_text_encoder"),
            *("model.lora", "model.words", "model.beta_schedule", "model.zero_terminal_snr", "model.prediction"),
            *("loss.weighting", "loss.gamma", "loss.density", "loss.density_mean", "loss.density_std"),
            *("loss.offset_noise", "loss.input_perturbation", "loss.distill", "data.captions", "data.prior", "recipe"),
        ),
        "task autoencoder, which sees pictures alone",
    ),
    (
        lambda c: c.model.lora is not None or bool(c.model.words),
        ("model.train_text_encoder",),
        "model.lora or model.words, beside which the networks stay as they are (adapters: model.lora.text_encoder)",
    ),
    (
        lambda c: c.model.prediction == "flow",
        ("model.beta_schedule", "model.zero_terminal_snr"),
        "model.prediction flow, whose path is straight and ends in pure noise",
    ),
    (
        lambda c: c.data.sharded,
        ("data.captions.text", "data.captions.source", "data.prior", "data.balance", "data.buckets"),
        "shards, which bring their own captions and are read as they come",
    ),
    (
        lambda c: c.loss.distill is not None,
        (
            *("loss.weighting", "loss.gamma", "loss.density", "loss.density_mean", "loss.density_std"),
            *("loss.offset_noise", "loss.input_perturbation"),
        ),
        "loss.distill, whose times are the student's steps",
    ),
    (lambda c: c.train.auto_batch, ("train.micro_batch",), "train.auto_batch, which chooses it"),
)


def _idle(config: Config) -> Iterator[str]:
    """Fields that were set and would do nothing."""
    for applies, names, reason in IDLE:
        for name in names if applies(config) else ():
            yield from (f"{path}: has no effect with {reason}; leave it out" for path in _changed(config, name))


def _changed(config: Config, name: str) -> Iterator[str]:
    """The dotted path of a field that is not at its default, or of those in it where it is a section."""
    section: Any = config
    *parents, leaf = name.split(".")
    for parent in parents:
        section = getattr(section, parent)
    value, default = getattr(section, leaf), _default(type(section), leaf)
    if is_dataclass(value) and is_dataclass(default):
        for field in fields(value):
            yield from _changed(config, f"{name}.{field.name}")
    elif value != default:
        yield name


def _default(section: type, name: str) -> Any:
    """What a field is where nothing is said of it."""
    default = next(field.default for field in fields(section) if field.name == name)
    factory = getattr(default, "default_factory", None)  # pydantic keeps a FieldInfo where a factory is used
    return default if factory is None else factory()


def _clashes(words: Sequence[Word]) -> Iterator[str]:
    """Learnt words that would share a token or a file."""
    owners: dict[str, str] = {}
    for number, word in enumerate(words):
        if word_file(word.word)[0].removesuffix(SINGLE_FILE).endswith(OTHER_FORMAT):
            yield f"model.words.{number}.word: {word.word} ends as the second file of a word does; rename it"
        parts = [f"the token {token}" for token in word_tokens(word.word, word.vectors)]
        for part in (*parts, *(f"the file {file.casefold()}" for file in word_file(word.word))):
            if part in owners:
                yield f"model.words.{number}.word: {word.word} and {owners[part]} would share {part}; rename one"
                break
            owners[part] = word.word


def dump(config: Config) -> str:
    """The config as YAML that ``load`` reads back to an equal Config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def identity(config: Config) -> dict[str, Any]:
    """What a run cannot change when it goes on: what is drawn, learnt and kept; dotted path -> value."""
    tree = asdict(config)
    kept: dict[str, Any] = {"task": tree["task"], "seed": tree["seed"]}
    for section, free in (("data", {"path", "cache"}), ("model", {"base", "autoencoder"}), ("loss", set())):
        kept |= {f"{section}.{name}": value for name, value in tree[section].items() if name not in free}
    kept |= {f"train.{name}": tree["train"][name] for name in ("batch_size", "optimizer")}
    return json.loads(json.dumps(kept))


def documented_fields(cls: type = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field as (dotted path, default, one line of documentation)."""
    rows: list[tuple[str, str, str]] = []
    for field in fields(cls):
        kind, *notes = get_args(field.type)
        doc = next(note for note in reversed(notes) if isinstance(note, str))
        nested = next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)
        if nested is not kind:
            rows.append((f"{prefix}{field.name}", _default_text(field.default), doc))
        if nested is not None:
            rows += documented_fields(nested, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return rows


def _default_text(default: Any) -> str:
    value = getattr(default, "default", default)  # pydantic keeps a FieldInfo where a factory is used
    factory = getattr(default, "default_factory", None)
    if factory is not None:
        value = factory()
    return (
        "required"
        if "PydanticUndefined" in repr(value) or "MISSING" in repr(value)
        else yaml.safe_dump(value, default_flow_style=True).replace("\n...", "").strip()
    )


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not of the form key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {parent} is not a section")
    tree[leaf] = yaml.load(text, Loader=_Loader)


def _describe(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "json_invalid":  # what YAML may say, and UTF-8 may not
        return "a text of it holds half a character (a lone surrogate)"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [path for path, _, _ in documented_fields()] + [field.name for field in fields(Config)]
        near = difflib.get_close_matches(where, known, 1, 0.6)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{where}: required, but not given"
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _suggest_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
