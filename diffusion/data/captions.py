"""Which words go with a picture at one visit: each choice a keyed draw."""

from collections.abc import Callable, Sequence

import numpy as np

from diffusion import rng
from diffusion.data.source import Picture


def choose_caption(
    picture: Picture,
    visit: int,
    seed: int,
    fits: Callable[[str], bool] = lambda caption: True,
    *,
    dropout: float = 0.0,
    keywords: float = 0.0,
    fillers: Sequence[str] = (),
    shuffle_tags: bool = False,
    keep_tags: int = 0,
    templates: Sequence[str] = (),
    trigger: str = "",
) -> str:
    """The caption of one visit.

    ``dropout`` is the share of empty captions, ``keywords`` that of shuffled keywords (the text itself may be among
    them). Otherwise one of the picture's texts is taken; its comma-separated tags are shuffled but for the first
    ``keep_tags``, and one of the ``templates`` is filled. Three in ten get filler words strewn in. ``trigger`` leads
    every caption that is not empty. ``fits`` tells whether the encoder can read a caption whole: one that grew too
    long loses its additions rather than its end.
    """
    draws = iter(rng.uniform(seed, "caption", picture.id, visit, size=64).tolist())
    if next(draws) < dropout:
        return ""
    if picture.plain:
        return picture.text
    text = picture.text
    if len(picture.texts) > 1:
        text = picture.texts[int(rng.uniform(seed, "caption.text", picture.id, visit, size=1)[0] * len(picture.texts))]
    words = [_shuffle_tags(text, picture, visit, seed, keep_tags) if shuffle_tags else text]
    if next(draws) < keywords and picture.keywords:
        terms = [text, *picture.keywords][:24]
        shuffled = [term for _, term in sorted(zip((next(draws) for _ in terms), terms, strict=False))]
        words = shuffled[: max(2, round(next(draws) * len(terms)))]
    caption = " ".join(words)
    if templates:
        choice = rng.uniform(seed, "caption.template", picture.id, visit, size=1)[0]
        caption = templates[int(choice * len(templates))].replace("{}", caption)
    if fillers and next(draws) < 0.3:
        caption = _strew(caption.split(), fillers, [next(draws) for _ in range(4)])
    caption, plain = lead(trigger, caption), lead(trigger, text)
    return caption if fits(caption) else plain


def lead(trigger: str, caption: str) -> str:
    """The trigger word, then the caption."""
    return ", ".join(part for part in (trigger, caption) if part)


def variants(picture: Picture, templates: Sequence[str] = (), trigger: str = "") -> list[str]:
    """Every caption that ``choose_caption`` may give without keywords, fillers and shuffled tags."""
    if picture.plain:
        return ["", picture.text]
    framed = [template.replace("{}", text) for template in templates for text in picture.texts]
    return ["", *(lead(trigger, text) for text in [*picture.texts, *framed])]


def _shuffle_tags(text: str, picture: Picture, visit: int, seed: int, keep: int) -> str:
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    draws = rng.uniform(seed, "caption.tags", picture.id, visit, size=max(1, len(tags)))
    return ", ".join(tags[:keep] + [tags[i] for i in np.argsort(draws[: len(tags)]) if i >= keep])


def _strew(words: list[str], fillers: Sequence[str], draws: Sequence[float]) -> str:
    """Put one or two fillers at drawn places."""
    for which, where in np.reshape(draws, (-1, 2))[: 1 + (draws[0] * len(fillers) % 1 < 0.5)]:
        words.insert(int(where * len(words)), fillers[int(which * len(fillers))])
    return " ".join(words)
