"""From prompts to tokens to the context that conditions a U-Net."""

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from diffusion.models.stock import CLIPTokenizer
from diffusion.prompts import Prompt, Span

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77  # of CLIP's encoders, with both markers: everybody gives them longer prompts in chunks
LEAST_MEAN = 0.01  # of a standard deviation: CLIP's contexts have about 0.1
BACKTRACK = 20  # a comma among so many last tokens of a full chunk ends it: AUTOMATIC1111's comma_padding_backtrack


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
    """Tokenizers alone, which are all that reading a prompt needs."""

    tokenizers: list[CLIPTokenizer]
    text_encoders: Sequence[Any] = ()
    zero_empty: bool = False


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


def idle_layers(parts: TextParts) -> list[Any]:
    """Layers that take no part in what ``encode`` gives: of two encoders the end of the first one."""
    if len(parts.text_encoders) == 1:
        return []
    first = getattr(parts.text_encoders[0], "text_model", parts.text_encoders[0])
    return [first.encoder.layers[-1], first.final_layer_norm]


@dataclass(frozen=True)
class Tokens:
    """A prompt as each encoder reads it: of each tokenizer its chunks, and of each chunk its tokens without markers."""

    ids: list[list[list[int]]]
    weights: list[list[list[float]]]  # of each token
    blank: bool  # whether the prompt as a whole is the empty one

    @property
    def chunks(self) -> int:
        """Of every tokenizer the same number, at least one."""
        return len(self.ids[0])


def read(parts: TextParts, prompt: Prompt, *, long: bool = False) -> Tokens:
    """The tokens of a prompt in chunks of what an encoder reads at once. BREAK starts a new one.

    A part that is longer than a chunk is split if ``long``, or if the encoder is CLIP's, of 77 tokens; otherwise it is
    a ``ValueError``. It is split where AUTOMATIC1111 splits it: a chunk is full, but ends after its last comma where
    that is among its last 20 tokens, and before a learnt word that would not fit in whole. Where the tokenizers of a
    model disagree, a part has as many chunks as the one that needs most, and the missing ones are empty.
    """
    found = [[_chunks(t, _pairs(t, part), prompt.written, long) for part in prompt.parts] for t in parts.tokenizers]
    needed = [max(len(chunks) for chunks in same) for same in zip(*found, strict=True)]
    even = [
        [chunk for chunks, n in zip(own, needed, strict=True) for chunk in chunks + [[]] * (n - len(chunks))]
        for own in found
    ]
    return Tokens(
        ids=[[[index for index, _ in chunk] for chunk in chunks] for chunks in even],
        weights=[[[weight for _, weight in chunk] for chunk in chunks] for chunks in even],
        blank=not any(span.text for part in prompt.parts for span in part),
    )


def condition(parts: TextParts, tokens: Tokens, *, chunks: int | None = None, clip_skip: int = 1) -> dict[str, Tensor]:
    """``context`` ``(1, chunks * L, D)`` and of two encoders ``pooled`` ``(1, E)``: what ``encode`` gives, by chunks.

    Each chunk is encoded alone, with markers and padding of its own; ``chunks`` adds empty ones up to that number. SDXL
    is pooled from the first chunk, and all zeros for the empty prompt if ``zero_empty``.

    ``clip_skip`` counts as AUTOMATIC1111 does: 1 is the layer that ``encode`` takes and n the one n - 1 before it, to
    which a lone encoder's final layer norm is applied (diffusers' own ``clip_skip`` is one less). ``ValueError`` if an
    encoder has fewer layers.
    """
    assert chunks is None or chunks >= tokens.chunks, "chunks are added, never taken away"
    check_layers(parts.text_encoders, clip_skip)
    empty: list[list[Any]] = [[]] * (0 if chunks is None else chunks - tokens.chunks)
    alone = len(parts.text_encoders) == 1
    contexts, pooled = list[Tensor](), list[Tensor]()
    each = zip(parts.tokenizers, parts.text_encoders, tokens.ids, tokens.weights, strict=True)
    for tokenizer, encoder, ids, weights in each:
        marked = [_marked(tokenizer, chunk).to(encoder.device) for chunk in ids + empty]
        states = [_hidden(encoder, chunk, clip_skip, alone) for chunk in marked]
        weighed = [_weigh(z, chunk) for (z, _), chunk in zip(states, weights + empty, strict=True)]
        contexts.append(torch.cat(weighed, dim=1))
        pooled += states[0][1]
    found = {"context": torch.cat(contexts, dim=-1)} | ({} if alone else {"pooled": pooled[-1]})
    blank = tokens.blank and parts.zero_empty
    return {name: torch.zeros_like(value) for name, value in found.items()} if blank else found


def count_line(parts: TextParts, prompt: Prompt, *, long: bool = False) -> str:
    """For a dry run: how many tokens each chunk holds, and the words it ends with. Raises as ``read`` does."""
    tokenizer, chunks = parts.tokenizers[0], read(parts, prompt, long=long).ids[0]
    room = tokenizer.model_max_length - 2
    if len(chunks) == 1:
        return f"{len(chunks[0])} of {room} tokens"
    ends = [" ".join(tokenizer.decode(chunk).split()[-3:]) for chunk in chunks]
    told = [f"{len(chunk)} to {end!r}" if chunk else "0" for chunk, end in zip(chunks, ends, strict=True)]
    return f"{sum(map(len, chunks))} tokens in {len(chunks)} chunks of {room}: {', '.join(told)}"


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
            raise _too_long(tokenizer, prompt, ids[1:-1])
    return tokenizer(full, padding="max_length", return_tensors="pt").input_ids


def _too_long(tokenizer: CLIPTokenizer, prompt: str, ids: Sequence[int]) -> ValueError:
    """The error for tokens, without markers, that are more than the encoder reads."""
    room = tokenizer.model_max_length - 2
    return ValueError(
        f"the prompt is {len(ids)} tokens long, but this text encoder reads {room}: "
        f"shorten {prompt!r}; it would end after {tokenizer.decode(ids[:room])!r}"
    )


def _pairs(tokenizer: CLIPTokenizer, part: Sequence[Span]) -> list[tuple[int, float]]:
    """Token and weight; spans are read one by one, as AUTOMATIC1111 reads them."""
    texts = [expand(tokenizer, span.text) for span in part]
    found = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return [(index, span.weight) for ids, span in zip(found, part, strict=True) for index in ids]


def _chunks(
    tokenizer: CLIPTokenizer, pairs: list[tuple[int, float]], written: str, long: bool
) -> list[list[tuple[int, float]]]:
    """Pairs in chunks that the encoder has room for; at least one."""
    room, words = tokenizer.model_max_length - 2, tokenizer.get_added_vocab()
    ids = [index for index, _ in pairs]
    if len(ids) > room and not long and tokenizer.model_max_length < CLIP_LENGTH:
        raise _too_long(tokenizer, written, ids)
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    tails = {index for word, index in words.items() if (first := re.sub(r"_\d+$", "", word)) != word and first in words}
    borders = [0]
    while len(ids) - borders[-1] > room:
        borders.append(_border(ids, borders[-1], borders[-1] + room, comma, tails))
    return [pairs[start:end] for start, end in zip(borders, [*borders[1:], len(ids)], strict=True)]


def _border(ids: Sequence[int], start: int, full: int, comma: int, tails: Container[int]) -> int:
    """Where a chunk of more tokens than ``full`` ends; ``tails`` are learnt words' tokens after their first."""
    word = full
    while word > start and ids[word] in tails:
        word -= 1
    if start < word < full:
        return word
    commas = [at for at in range(max(start, full - BACKTRACK), full) if ids[at] == comma]
    return commas[-1] + 1 if commas and ids[full] != comma else full


def _marked(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> Tensor:
    """``(1, L)``: a chunk between its markers and padded, as ``tokenize`` has it."""
    marked = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor([marked + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(marked))])


def _hidden(encoder: Any, ids: Tensor, clip_skip: int, alone: bool) -> tuple[Tensor, list[Tensor]]:
    """A layer's state ``(1, L, D)``, and the pooled text ``(1, E)`` of an encoder that has it."""
    if alone and clip_skip == 1:
        return encoder(ids).last_hidden_state, []
    output = encoder(ids, output_hidden_states=True)
    if alone:
        return getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-clip_skip]), []
    pooled = getattr(output, "text_embeds", None)
    return output.hidden_states[-(clip_skip + 1)], [] if pooled is None else [pooled]


def _weigh(z: Tensor, weights: Sequence[float]) -> Tensor:
    """Emphasis on one chunk ``(1, L, D)``: its tokens are multiplied, and its mean is made what it was.

    AUTOMATIC1111's "original" emphasis: z' = w z, then z' mean(z) / mean(z'). Markers and padding weigh 1. Of contexts
    that have hardly a mean, unlike CLIP's, a quotient of means would be chance: there it stays at z' = w z.
    """
    if all(weight == 1 for weight in weights):
        return z
    w = torch.ones(z.shape[1], 1, device=z.device)
    w[1 : len(weights) + 1, 0] = torch.tensor(weights, device=z.device)
    before, after = z.float(), z.float() * w
    means = before.mean(), after.mean()
    if min(means[0].abs() / before.std(), means[1].abs() / after.std()) < LEAST_MEAN:
        return after.to(z.dtype)
    return (after * (means[0] / means[1])).to(z.dtype)


def check_layers(encoders: Sequence[Any], clip_skip: int) -> None:
    """ValueError if an encoder has fewer layers."""
    layers = min(encoder.config.num_hidden_layers for encoder in encoders)
    if not 1 <= clip_skip <= layers:
        raise ValueError(
            f"clip_skip {clip_skip} is not possible: this text encoder has {layers} layers, of which 1 is the last"
        )


def _byte_alphabet() -> list[str]:
    """One printable character a byte, in the order of GPT-2's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
