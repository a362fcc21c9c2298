"""Everything that a training run may say: typed fields with their defaults, each with a line that documents it.

Unknown fields and wrong types are refused; values out of range too. What goes together is checked in ``config``.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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
