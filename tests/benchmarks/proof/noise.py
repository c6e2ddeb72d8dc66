"""Plants noise between the sentences and lines of clean completions, and knows to the character where it is.

Stock phrases, digressions and page remains come in two lists that share no text: `known` are the demo's, with which
the default was chosen, `new` are used to confirm it.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from .texts import GOOD, ROOT, Example

SPANS = ("stock phrase", "digression", "page remains", "copied prompt", "repeated line", "other answer")
TOKENS = ("typo", "wrong number")
SHORTEST = 15  # characters of a line that is copied, repeated or taken from another answer
NEW = {
    "stock phrase": (
        "Happy to walk you through it!",
        "That is an excellent thing to ask.",
        "Alright, here we go.",
        "Thanks so much for trusting me with this.",
        "I would love to assist you with that today.",
        "Below you will find everything you need.",
        "Hopefully that clears things up.",
        "Just shout if you want more detail.",
        "As a virtual assistant I have no feelings about this, but I am glad to explain.",
        "Remember, every expert was once a beginner.",
        "Wishing you all the best on your learning journey!",
        "It is always a good idea to consult a qualified specialist.",
        "Do let me know how it goes.",
        "Together we will get this done in no time.",
    ),
    "digression": (
        "Lighthouse keepers used to wind their lamps by hand every two hours.",
        "My neighbour's cat has learned to open the fridge.",
        "The ferry to the island was cancelled again because of fog.",
        "Saffron is made from the stigmas of a crocus flower.",
        "Our choir rehearses on Thursdays in the old fire station.",
        "It rained for eleven days in a row last spring.",
        "The tallest dunes in the region move about four metres a year.",
        "Somebody left a red umbrella in the waiting room.",
        "Vinyl records have been selling better than compact discs lately.",
        "The baker on the corner closes at noon on Mondays.",
        "A violin has about seventy parts.",
        "They repainted the tram stop in a cheerful yellow.",
    ),
    "page remains": (
        "Follow us on Instagram | YouTube | RSS",
        "This site uses cookies. OK | Learn more",
        "You may also like: 7 kitchen hacks that will surprise you",
        "« Older posts    Newer posts »",
        '<span class="share-count">128</span>',
        "</article></main><footer>",
        "Filed under: Uncategorized",
        "Rate this page: 1 2 3 4 5",
        "[caption id=attachment_4411 align=alignnone]",
        "Copyright 2021 Example Media Group. Imprint - Contact",
        "Print this page",
        "View 34 more replies",
        "function toggleMenu(){document.body.classList.toggle('open')}",
    ),
}


@cache
def _known() -> dict[str, tuple[str, ...]]:
    sys.path.insert(0, str(ROOT / "recipes/demo"))
    try:
        from phrases import CLOSINGS, DIGRESSIONS, OPENINGS, PAGE_REMAINS
    finally:
        sys.path.pop(0)
    return {"stock phrase": OPENINGS + CLOSINGS, "digression": DIGRESSIONS, "page remains": PAGE_REMAINS}


def pieces(text: str) -> list[str]:
    """Lines and sentences with the white space behind them; together they are the text."""
    return [part for part in re.findall(r".*?(?:\n+|(?<=[.!?])\s+|\Z)", text, re.DOTALL) if part]


def plant(
    example: Example, others: Sequence[Example], rate: float, rng: random.Random, *, phrases: str = "known"
) -> Example:
    """The example with lines that do not belong, of about `rate` of its characters.

    Args:
        example: clean; its pieces are one good text.
        others: examples that lines are taken from.
        rate: share of the characters of the result.
        rng: of all chances.
        phrases: `known` or `new`.
    """
    pools = NEW if phrases == "new" else _known()
    parts = [(text, GOOD) for text in pieces(example.completion)]
    left = len(example.completion) * rate / (1 - rate)
    tries = 0
    while left > 0 and tries < 200:
        tries += 1
        kind, place = rng.choice(SPANS), rng.randrange(len(parts) + 1)
        text = _text(kind, example, others, [part for part, own in parts[:place] if own == GOOD], pools, rng)
        if not text:
            continue
        if rng.random() < left / len(text):  # the last one may be too long; on average the rate is met
            _insert(parts, place, text, kind, lines="\n" in example.completion)
        left -= len(text)
    return replace(example, pieces=tuple(parts))


def _text(
    kind: str,
    example: Example,
    others: Sequence[Example],
    before: Sequence[str],
    pools: dict[str, tuple[str, ...]],
    rng: random.Random,
) -> str:
    """A text of one kind; empty if there is none here."""
    if kind in pools:
        return rng.choice(pools[kind])
    if kind == "copied prompt":
        bare = re.sub(r"^Question: |\nAnswer:\n$", "", example.prompt)
        found = [part for part in pieces(bare) if SHORTEST < len(part) < 200]
    elif kind == "repeated line":
        found = list(before)
    else:
        found = [
            part for part in pieces(rng.choice(others).completion) if "####" not in part and "Decision" not in part
        ]
    found = [part.strip("\n").rstrip() for part in found if len(part.strip()) > SHORTEST]
    return rng.choice(found) if found else ""


def _insert(parts: list[tuple[str, str]], place: int, text: str, kind: str, *, lines: bool) -> None:
    """Put a text before a place, on a line of its own where the lines around it are."""
    if place == len(parts):
        last, own = parts[-1]
        if not last[-1].isspace():
            parts[-1] = (last + ("\n" if lines else " "), own)
        parts.append((text, kind))
        return
    whole_line = lines and (place == 0 or parts[place - 1][0].endswith("\n"))
    parts.insert(place, (text if whole_line else text.lstrip(), kind))
    parts[place] = (parts[place][0] + ("\n" if whole_line else " "), kind)


def spoil(example: Example, rate: float, rng: random.Random) -> Example:
    """The example with single wrong numbers and mistyped words in about `rate` of its words."""
    result: list[tuple[str, str]] = []
    for word in re.findall(r"\s*\S+|\s+\Z", example.completion):
        kind, changed = GOOD, word
        if rng.random() < rate:
            kind, changed = _spoilt(word, rng)
        result.append((changed, kind))
    return replace(example, pieces=tuple(result))


def _spoilt(word: str, rng: random.Random) -> tuple[str, str]:
    digits = [place for place, letter in enumerate(word) if letter.isdigit()]
    if digits:
        place = rng.choice(digits)
        other = rng.choice([digit for digit in "123456789" if digit != word[place]])
        return "wrong number", word[:place] + other + word[place + 1 :]
    swaps = range(1, len(word) - 1)
    letters = [at for at in swaps if word[at : at + 2].isalpha() and word[at] != word[at + 1]]
    if len(letters) < 3:
        return GOOD, word
    place = rng.choice(letters)
    return "typo", word[:place] + word[place + 1] + word[place] + word[place + 2 :]
