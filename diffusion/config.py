"""A training run, read from YAML into the dataclasses of ``schema``, with every fault found at once.

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
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from diffusion.places import OTHER_FORMAT, SINGLE_FILE, word_file, word_tokens
from diffusion.schema import Config, Word


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
