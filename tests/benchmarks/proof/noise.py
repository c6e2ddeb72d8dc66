"""Token noise of known kinds, planted into solutions: every piece ends up with its true kind.

Six kinds, each in a varying and in a repeating form, each as spans and as single tokens. A noise kind is written
`kind/form/shape`, for instance `filler/repeating/span`; good kinds are those of worlds.py. Wrong results stand in the
place of right ones, or are lines of their own; the solution goes on with the right value either way, so a document's
answer stays true and only the noise is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .grammar import CHATTER, FILLER_WORDS, FIXED, JUNK, OFF_TOPIC_WORDS, expand
from .worlds import GOOD_KINDS, RESULT, STEP, Line, Piece, Problem, words

KINDS = ("filler", "off_topic", "wrong", "copied", "junk", "typo")
FORMS = ("varying", "repeating")
SPAN_SHARE = 0.85  # of noise words; the rest are single tokens


def is_noise(kind: str) -> bool:
    """Whether a kind is one of the planted ones."""
    return kind not in GOOD_KINDS


def plant(
    problem: Problem, rate: float, rng: random.Random, kinds: Sequence[str] = KINDS, forms: Sequence[str] = FORMS
) -> list[Line]:
    """The solution with noise among its lines.

    Args:
        rate: expected share of the solution's words that are noise, in [0, 1).
        kinds, forms: which noise; drawn with equal chances.
    """
    lines = [list(pieces) for pieces in problem.lines]
    good = sum(map(len, lines))
    budget = good * rate / (1 - rate)
    singles = _round(budget * (1 - SPAN_SHARE), rng)
    left = budget * SPAN_SHARE
    spans: list[Line] = []
    while left > 0:
        kind, form = rng.choice(kinds), rng.choice(forms)
        span = [(word, f"{kind}/{form}/span") for word in words(SPANS[kind](problem, form, rng) + "\n")]
        if rng.random() < left / len(span):  # the last one may overshoot; on average the budget is met
            spans.append(span)
        left -= len(span)
    for _ in range(singles):
        _single(lines, problem, rng.choice(kinds), rng.choice(forms), rng)
    for span in spans:
        _insert_line(lines, span, rng)
    return lines


def _round(value: float, rng: random.Random) -> int:
    return int(value) + (rng.random() < value % 1)


def _insert_line(lines: list[Line], span: Line, rng: random.Random) -> None:
    """Put a noise line before any line; behind the answer it starts with the line break that the answer lacks."""
    place = rng.randint(0, len(lines))
    if place == len(lines):
        if lines[-1][-1][0] != "\n":
            lines[-1] = [*lines[-1], ("\n", span[0][1])]
        span = span[:-1]
    lines.insert(place, span)


def _wrong_line(problem: Problem, form: str, rng: random.Random) -> str:
    if form == "repeating":
        return "So 2 + 2 = 5."
    one, two = rng.randint(2, 30), rng.randint(2, 15)
    return f"So {one} + {two} = {one + two + rng.choice((-3, -2, -1, 1, 2, 3))}."


def _copied(problem: Problem, form: str, rng: random.Random) -> str:
    return problem.prompt[-1] if form == "repeating" else rng.choice(problem.prompt)


def _junk(problem: Problem, form: str, rng: random.Random) -> str:
    return "~~ ## ~~ ## ~~" if form == "repeating" else " ".join(rng.choice(JUNK) for _ in range(rng.randint(4, 9)))


def _typos(problem: Problem, form: str, rng: random.Random) -> str:
    if form == "repeating":
        return "Heer si teh solutoin to teh probelm."
    text = "".join(word for word, _ in rng.choice(problem.lines)).strip()
    return " ".join(misspelt(word, rng) for word in text.split(" "))


SPANS: dict[str, Callable[[Problem, str, random.Random], str]] = {
    "filler": lambda p, form, rng: FIXED["filler"] if form == "repeating" else expand(CHATTER, "filler", rng),
    "off_topic": lambda p, form, rng: FIXED["off_topic"] if form == "repeating" else expand(CHATTER, "off_topic", rng),
    "wrong": _wrong_line,
    "copied": _copied,
    "junk": _junk,
    "typo": _typos,
}


def misspelt(word: str, rng: random.Random) -> str:
    """The word with two neighbouring letters swapped or one doubled; short words get a letter."""
    bare = word.strip()
    space = word[: len(word) - len(word.lstrip())]
    if len(bare) < 3:
        return space + bare + rng.choice("qxzw")
    at = rng.randrange(len(bare) - 1)
    if bare[at] == bare[at + 1]:
        return space + bare[:at] + bare[at] + bare[at:]
    return space + bare[:at] + bare[at + 1] + bare[at] + bare[at + 2 :]


def _single(lines: list[Line], problem: Problem, kind: str, form: str, rng: random.Random) -> None:
    """Insert or replace one word of a line other than the answer's."""
    name = f"{kind}/{form}/single"
    if kind in ("wrong", "typo"):
        wanted = RESULT if kind == "wrong" else STEP
        spots = [
            (row, column)
            for row, pieces in enumerate(lines[:-1])
            for column, (text, found) in enumerate(pieces)
            if found == wanted and (kind == "wrong" or text.strip().isalpha())
        ]
        if spots:
            row, column = rng.choice(spots)
            old = lines[row][column][0]
            lines[row][column] = (_wrong(old, form, rng) if kind == "wrong" else _typo(old, form, rng), name)
        return
    row = rng.randrange(max(1, len(lines) - 1))
    column = rng.randint(1, max(1, len(lines[row]) - 1))
    before = lines[row][column - 1][0]
    lines[row].insert(column, (_inserted(problem, kind, form, before, rng), name))


def _wrong(old: str, form: str, rng: random.Random) -> str:
    """Another result: a near number or another word of the same sort; in the repeating form always the same."""
    bare = old.strip()
    space = old[: len(old) - len(bare)]
    if bare.isdigit():
        if form == "repeating":
            return space + ("7" if bare != "7" else "8")
        return f"{space}{max(0, int(bare) + rng.choice((-5, -3, -2, -1, 1, 2, 3, 5)))}"
    from .worlds import CITIES, JOBS

    others = [word for word in (CITIES if bare in CITIES else JOBS) if word != bare]
    return space + (others[0] if form == "repeating" else rng.choice(others))


def _typo(old: str, form: str, rng: random.Random) -> str:
    return misspelt(old, random.Random(old) if form == "repeating" else rng)


def _inserted(problem: Problem, kind: str, form: str, before: str, rng: random.Random) -> str:
    repeating = form == "repeating"
    if kind == "filler":
        return " " + ("basically" if repeating else rng.choice(FILLER_WORDS))
    if kind == "off_topic":
        return " " + ("trumpet" if repeating else rng.choice(OFF_TOPIC_WORDS))
    if kind == "junk":
        return " " + ("#" if repeating else rng.choice(JUNK))
    if repeating and before.strip():
        return " " + before.strip()  # a stutter
    return " " + rng.choice([word.strip() for word in words(problem.text) if word.strip()])


def count(lines: Sequence[Sequence[Piece]]) -> tuple[int, int]:
    """Words that are noise, and all words."""
    kinds = [kind for pieces in lines for _, kind in pieces]
    return sum(map(is_noise, kinds)), len(kinds)
