"""From prompts to tokens to the context that conditions a U-Net."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions, for the CLIP tokenizer. The same captions give the same vocabulary.

    The layout is CLIP's: 256 bytes, the same 256 as word ends, the merges, then the two markers. Every text can be
    spelled, since every byte is a token.
    """
    alphabet = _byte_alphabet()
    # The trainer numbers characters in order, but word ends as it meets them, in an order that changes from run to run,
    # and breaks ties between merges by number. So each word end is a character of its own while it learns.
    ends = {char: chr(0xE000 + index) for index, char in enumerate(alphabet)}
    split = CLIPTokenizer().backend_tokenizer  # CLIP's own normalisation and word splitting
    lines = (
        " ".join(word[:-1] + ends[word[-1]] for word, _ in split.pre_tokenizer.pre_tokenize_str(text))
        for text in map(split.normalizer.normalize_str, sorted(captions))
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[*alphabet, *ends.values()],
    )
    learner.train_from_iterator(lines, trainer)
    spelled = str.maketrans({end: char + "</w>" for char, end in ends.items()})
    pairs = json.loads(learner.to_str())["model"]["merges"]
    merges = [(first.translate(spelled), second.translate(spelled)) for first, second in pairs]
    tokens = [
        *alphabet,
        *(char + "</w>" for char in alphabet),
        *(first + second for first, second in merges),
        START,
        END,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt``, CLIP's own files, next to the one file that newer releases read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a model folder; never looks at the network."""
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@dataclass
class Tokenizers:
    """The tokenizers of a model folder alone, to check prompts with before any weights are read."""

    tokenizers: list[CLIPTokenizer]
    text_encoders: Sequence[Any] = ()
    zero_empty: bool = False


def read_tokenizers(folder: Path) -> Tokenizers:
    """Those of a model folder; never looks at the network."""
    return Tokenizers(
        [load_tokenizer(path) for path in (folder / "tokenizer", folder / "tokenizer_2") if path.is_dir()]
    )


class TextParts(Protocol):
    """What turns prompts into conditions: one tokenizer and encoder, or two (Stable Diffusion XL)."""

    @property
    def tokenizers(self) -> Sequence[CLIPTokenizer]: ...

    @property
    def text_encoders(self) -> Sequence[Any]: ...

    zero_empty: bool  # the empty prompt is zeros, and not what the encoders make of it


def tokenize(parts: TextParts, prompts: Sequence[str]) -> dict[str, Tensor]:
    """``tokens`` ``(B, L)``, padded to the encoder's length; of a second tokenizer ``tokens_2``; which are ``blank``.

    A prompt that does not fit is a ``ValueError``.
    """
    found = {f"tokens{tail}": _tokens(t, prompts) for tail, t in zip(("", "_2"), parts.tokenizers, strict=False)}
    return found | ({"blank": torch.tensor([prompt == "" for prompt in prompts])} if parts.zero_empty else {})


def encode(parts: TextParts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``context`` ``(B, L, D)``: the last hidden state, as Stable Diffusion 1.x and 2.x take it.

    Of two encoders the last hidden states but one, side by side, and ``pooled`` ``(B, E)`` of the second (SDXL,
    2307.01952, section 2.1).
    """
    encoders = parts.text_encoders
    ids = [tokens[f"tokens{tail}"].to(e.device) for tail, e in zip(("", "_2"), encoders, strict=False)]
    if len(encoders) == 1:
        found = {"context": encoders[0](ids[0]).last_hidden_state}
    else:
        outputs = [e(i, output_hidden_states=True) for e, i in zip(encoders, ids, strict=True)]
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        found = {"context": context, "pooled": outputs[1].text_embeds}
    if "blank" not in tokens:
        return found
    blank = tokens["blank"].to(ids[0].device)
    return {name: value.masked_fill(blank.view(-1, *[1] * (value.ndim - 1)), 0.0) for name, value in found.items()}


def fits(tokenizer: CLIPTokenizer, prompt: str) -> bool:
    """Whether the encoder reads it whole."""
    return len(tokenizer(expand(tokenizer, prompt), verbose=False).input_ids) <= tokenizer.model_max_length


def expand(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """A learnt word of several vectors as its tokens: ``<cat>`` as ``<cat> <cat>_1`` where there is a ``<cat>_1``."""
    words = tokenizer.get_added_vocab()
    for word in words:
        if f"{word}_1" in words and word in prompt:
            parts = [word]
            while f"{word}_{len(parts)}" in words:
                parts.append(f"{word}_{len(parts)}")
            prompt = prompt.replace(word, " ".join(parts))
    return prompt


def _tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    full = [expand(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokenizer(full, verbose=False).input_ids, strict=True):
        if len(ids) > length:
            kept = tokenizer.decode(ids[1 : length - 1])
            raise ValueError(
                f"the prompt is {len(ids) - 2} tokens long, but this text encoder reads {length - 2}: "
                f"shorten {prompt!r}; it would end after {kept!r}"
            )
    return tokenizer(full, padding="max_length", return_tensors="pt").input_ids


def _byte_alphabet() -> list[str]:
    """One printable character a byte, in the order of GPT-2's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
