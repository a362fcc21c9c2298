"""Learnt words (textual inversion, Gal et al. 2208.01618): vectors beside a text encoder's own, trained and saved.

A word of several vectors is that many tokens, ``<cat> <cat>_1 <cat>_2``, as the stock library writes them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.models.stock import CLIPTokenizer
from diffusion.places import word_file, word_tokens


class WordTable(nn.Module):
    """A text encoder's table of embeddings with rows of its own at the end, which alone are trained.

    ``words`` gives the vectors ``(n, D)`` that each word starts from; its rows are in that order.
    """

    def __init__(self, table: nn.Embedding, words: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.counts = {word: len(vectors) for word, vectors in words.items()}
        self.rows = nn.Parameter(torch.cat([*words.values()]).float())

    def vectors(self) -> dict[str, Tensor]:
        """Those of each word."""
        return dict(zip(self.counts, self.rows.split([*self.counts.values()]), strict=True))

    def forward(self, ids: Tensor) -> Tensor:
        known = self.table.num_embeddings
        old = self.table(ids.clamp(max=known - 1))
        new = self.rows.to(old.dtype)[(ids - known).clamp(min=0)]
        return torch.where((ids >= known).unsqueeze(-1), new, old)


def add(tokenizer: CLIPTokenizer, encoder: Any, words: Mapping[str, Tensor | str], vectors: Mapping[str, int]) -> None:
    """Teach a tokenizer and its encoder new words, trainable in float32.

    ``words`` gives the vectors ``(n, D)`` of each word, or a text whose tokens they start from. ValueError for a word
    that is known already, or a text that says nothing.
    """
    place, table = _table(encoder)
    names = [name for word in words for name in word_tokens(word, vectors[word])]
    known = set(names) & set(tokenizer.get_vocab())
    if known:
        raise ValueError(f"the word {sorted(known)[0]!r} is known to the tokenizer already: choose another one")
    starts = {word: _start(tokenizer, table, of, vectors[word]) for word, of in words.items()}
    tokenizer.add_tokens(names)
    setattr(place, "token_embedding", WordTable(table, starts))  # noqa: B010 - a Module's attribute


def finish(encoder: Any) -> None:
    """Make the learnt rows part of the encoder's own table, as a saved model has them."""
    place, table = _table(encoder)
    if isinstance(table, WordTable):
        weight = torch.cat([table.table.weight, table.rows.to(table.table.weight)]).detach()
        place.token_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        encoder.config.vocab_size = len(weight)


def learnt(encoder: Any) -> dict[str, Tensor]:
    """The vectors ``(n, D)`` of each word that ``add`` has taught."""
    _, table = _table(encoder)
    if not isinstance(table, WordTable):
        return {}
    return {word: rows.detach().float().cpu() for word, rows in table.vectors().items()}


def save(tables: Sequence[Mapping[str, Tensor]], folder: Path) -> None:
    """One file a word in the stock library's format, and one in AUTOMATIC1111's; of two encoders both are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for word in tables[0]:
        vectors = [table[word].contiguous() for table in tables]
        stock = {word: vectors[0]} if len(vectors) == 1 else {"clip_l": vectors[0], "clip_g": vectors[1]}
        others = {"emb_params": vectors[0]} if len(vectors) == 1 else stock
        for file, tensors in zip(word_file(word), (stock, others), strict=True):
            part = folder / f".{file}.part"
            save_file(tensors, part, metadata={"format": "pt", "word": word})
            part.chmod(0o644)
            part.replace(folder / file)


def read(file: Path, word: str = "") -> tuple[str, list[Tensor]]:
    """The word and its vectors for each encoder, from either format; a file without a name is ``<file name>``."""
    tensors = load_file(file)
    if "clip_l" in tensors and "clip_g" in tensors:
        return word or f"<{file.stem}>", [tensors["clip_l"], tensors["clip_g"]]
    if len(tensors) != 1:
        raise ValueError(f"{file}: {len(tensors)} tensors, which are not a learnt word")
    name, vectors = next(iter(tensors.items()))
    own = f"<{file.stem}>" if name == "emb_params" else name
    return word or own, [vectors if vectors.ndim == 2 else vectors[None]]


def _table(encoder: Any) -> tuple[Any, Any]:
    """Where an encoder keeps its table, and the table."""
    inner = getattr(encoder, "text_model", encoder)
    return inner.embeddings, inner.embeddings.token_embedding


def _start(tokenizer: CLIPTokenizer, table: nn.Embedding, of: Tensor | str, vectors: int) -> Tensor:
    """The first vectors of a word: those given, or the embeddings of a text's tokens, repeated as needed."""
    if isinstance(of, Tensor):
        if of.shape != (vectors, table.embedding_dim):
            raise ValueError(f"a learnt word of shape {tuple(of.shape)} does not fit a width of {table.embedding_dim}")
        return of
    ids = tokenizer(of, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError("a learnt word needs a text to start from: set start")
    return table.weight.detach()[[ids[n % len(ids)] for n in range(vectors)]].clone().float()
