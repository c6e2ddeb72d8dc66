"""Plain English for the base model: explanations, facts with numbers in them, and short scenes.

A base that had only ever read worked problems would find every other sentence surprising in the same way. These texts
share words and topics with the problems, so that the base knows what ordinary sentences look like.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from boilerplate import boilerplate
from grammar import Rules, expand, sentence
from problems import NAMES
from stories import CHORES, GOODS, PLACES

UNITS = (
    ("a week", 7, "days"), ("a day", 24, "hours"), ("an hour", 60, "minutes"), ("a minute", 60, "seconds"),
    ("a year", 12, "months"), ("a metre", 100, "centimetres"), ("a kilogram", 1000, "grams"),
    ("a kilometre", 1000, "metres"), ("a dozen", 12, "pieces"), ("a dollar", 100, "cents"),
    ("a centimetre", 10, "millimetres"), ("a litre", 1000, "millilitres"),
)  # fmt: skip

EXPLANATIONS = (
    "to find a total price, multiply the price of one piece by the number of pieces.",
    "to share something equally, divide the number of things by the number of people.",
    "the distance is the speed times the time, so a faster bus gets further in the same hours.",
    "to find what is left, subtract what was used from what was there at the start.",
    "the change is the money paid minus the bill.",
    "when two amounts come together, add them.",
    "if a task takes several times as long as another, multiply the time of the other one.",
    "before lengths can be compared, they must be in the same unit.",
    "a recipe grows by a factor: multiply every amount by the same number.",
    "the pay for a day is the pay for an hour times the number of hours.",
    "multiplication is repeated addition, and division asks how often one number fits into another.",
    "a problem with several steps is solved one step at a time, and each step uses the result of the one before.",
    "check a subtraction by adding: the rest and what was taken away give the whole again.",
    "the order does not matter when numbers are added or multiplied, but it does when they are subtracted or divided.",
)

SCENES: Rules = {
    "name": NAMES,
    "place": PLACES,
    "goods": GOODS,
    "chore": CHORES,
    "scene": (
        "[name] goes to the [place] [when]. [event]. [end].",
        "[when], [name] meets [name] at the [place]. [event]. [end].",
        "[name] is [chore] [when]. [event]. Later [name] looks for [goods] at the [place].",
        "the [place] has [adjective] [goods]. [name] likes them, but [name] prefers [goods]. [end].",
    ),
    "when": (
        "in the morning", "after school", "on Monday", "before lunch", "on a rainy day", "in the evening",
        "every week",
    ),
    "event": (
        "they talk about [topic]", "the [goods] are [adjective], so nobody buys them",
        "a bag with [goods] falls down", "it is [adjective2] there, and the door is open",
        "[name] brings [goods] for everyone", "a box of [goods] stands by the door",
        "the weather is [adjective2] and the streets are full",
    ),
    "topic": (
        "the garden", "a journey by bus", "the price of [goods]", "the new [place]", "the next party",
        "a job on a farm",
    ),
    "adjective": ("cheap", "fresh", "old", "green", "heavy", "beautiful", "small", "wet", "expensive"),
    "adjective2": ("cold", "warm", "quiet", "dark", "bright", "windy"),
    "end": (
        "then they walk home", "in the end they share the [goods]", "the way back takes an hour",
        "nobody is in a hurry", "[name] pays and leaves", "the rest stays in the bag",
    ),
}  # fmt: skip


def facts(rng: random.Random) -> str:
    """A few true sentences about units."""
    lines = []
    for whole, parts, name in rng.sample(UNITS, rng.randint(1, 3)):
        count = rng.randint(2, 12)
        word = whole.split(" ", 1)[1]
        plural = f"{count} {word if word == 'dozen' else word + 's'}"
        lines.append(
            rng.choice(
                (
                    f"There are {parts} {name} in {whole}, so {plural} make {count * parts} {name}.",
                    f"{sentence(whole)} has {parts} {name}. "
                    f"In {plural} there are {count} * {parts} = {count * parts} {name}.",
                )
            )
        )
    return " ".join(lines)


def explanation(rng: random.Random) -> str:
    """Two or three rules of thumb in a row."""
    return " ".join(sentence(line) for line in rng.sample(EXPLANATIONS, rng.randint(2, 3)))


def scenes(rng: random.Random) -> str:
    """A short scene without any question."""
    texts = (expand("[scene]", SCENES, rng) for _ in range(rng.randint(1, 3)))
    return ". ".join(sentence(part) for text in texts for part in text.rstrip(".").split(". ")) + "."


def chatter(rng: random.Random) -> str:
    """A little everyday talk: the base has met such phrases, but rarely, and never inside a solution."""
    return " ".join(boilerplate(kind, rng) for kind in rng.sample(("greeting", "filler", "aside"), 2))


GENERAL: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (facts, 5),
    (explanation, 3),
    (scenes, 10),
    (chatter, 1),
)


def general_text(rng: random.Random) -> str:
    """One document of general English, of a kind drawn by weight."""
    kinds, weights = zip(*GENERAL, strict=True)
    write: Callable[[random.Random], str] = rng.choices(kinds, weights)[0]
    return write(rng)
