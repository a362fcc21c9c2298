"""From prompts to tokens to the context that conditions a U-Net."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

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
