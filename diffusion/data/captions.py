"""Which words go with a picture at one visit: dropout, keywords and fillers, each a keyed draw."""

from collections.abc import Callable, Sequence

import numpy as np

from diffusion import rng
from diffusion.data.source import Picture


def choose_caption(
    picture: Picture,
    visit: int,
    seed: int,
    fits: Callable[[str], bool],
    dropout: float = 0.0,
    keywords: float = 0.0,
    fillers: Sequence[str] = (),
) -> str:
    """The caption of one visit.

    ``dropout`` is the share of empty captions, ``keywords`` that of shuffled keywords (the text itself may be among
    them); three in ten of the rest get filler words strewn in. ``fits`` tells whether the encoder can read a
    caption whole: one that grew too long loses its additions rather than its end.
    """
    draws = iter(rng.uniform(seed, "caption", picture.id, visit, size=64).tolist())
    if next(draws) < dropout:
        return ""
    words = [picture.text]
    if next(draws) < keywords and picture.keywords:
        terms = [picture.text, *picture.keywords][:24]
        shuffled = [term for _, term in sorted(zip((next(draws) for _ in terms), terms, strict=False))]
        words = shuffled[: max(2, round(next(draws) * len(terms)))]
    caption = " ".join(words)
    if fillers and next(draws) < 0.3:
        caption = _strew(caption.split(), fillers, [next(draws) for _ in range(4)])
    return caption if fits(caption) else picture.text


def _strew(words: list[str], fillers: Sequence[str], draws: Sequence[float]) -> str:
    """Put one or two fillers at drawn places."""
    for which, where in np.reshape(draws, (-1, 2))[: 1 + (draws[0] * len(fillers) % 1 < 0.5)]:
        words.insert(int(where * len(words)), fillers[int(which * len(fillers))])
    return " ".join(words)
