"""From prompts to tokens to the context that conditions a U-Net."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions, for the CLIP tokenizer.

    The layout is CLIP's: 256 bytes, the same 256 as word ends, the merges, then the two markers. Every text can be
    spelled, since every byte is a token.
    """
    blank = CLIPTokenizer()  # brings CLIP's own normalisation and word splitting to the trainer
    word_counts = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    word_counts.normalizer = blank.backend_tokenizer.normalizer
    word_counts.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, end_of_word_suffix="</w>", min_frequency=2, show_progress=False, initial_alphabet=[]
    )
    word_counts.train_from_iterator(sorted(captions), trainer)
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet)]
    merges = [tuple(pair) for pair in json.loads(word_counts.to_str())["model"]["merges"]][
        : vocab_size - 2 - len(tokens)
    ]
    tokens += [first + second for first, second in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt``, CLIP's own files, next to the one file that newer releases read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a model folder; never looks at the network."""
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids, shape ``(B, L)``, padded to the encoder's length; a prompt that does not fit is a ``ValueError``."""
    length = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(ids) > length:
            kept = tokenizer.decode(ids[1 : length - 1])
            raise ValueError(
                f"the prompt is {len(ids) - 2} tokens long, but this text encoder reads {length - 2}: "
                f"shorten {prompt!r}; it would end after {kept!r}"
            )
    return tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids


def encode(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Context ``(B, L, D)`` from token ids ``(B, L)``: the last hidden state, as Stable Diffusion 1.x takes it."""
    return text_encoder(ids.to(text_encoder.device)).last_hidden_state


def _byte_alphabet() -> list[str]:
    """One printable character a byte, in the order of GPT-2's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
