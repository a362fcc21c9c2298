"""CLIP's own tokenizer (Radford et al. 2103.00020), made of the merges that ship with the package: no network."""

import gzip
from pathlib import Path

from tokenizers import pre_tokenizers

from diffusion.models.stock import CLIPTokenizer
from diffusion.models.text import END, START

MERGES = Path(__file__).with_name("clip_merges.txt.gz")  # 48,894 lines, in the order in which they were learnt
LENGTH = 77


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion 1.x; with the ``pad`` token ``"!"`` that of 2.x, and the second one of XL.

    The vocabulary is 256 bytes, the same 256 as word ends, the merges, and the two markers: 49,408 tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, which is GPT-2's order
    with gzip.open(MERGES, "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in lines]
    words = ["".join(pair) for pair in merges]
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *words, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == 49408
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token=pad)
