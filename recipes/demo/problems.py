"""Worked word problems with known answers: the useful part of the demo's data.

Every problem is a short story with two to four arithmetic steps. `Draft.step` computes what it writes, so a step can
never be wrong, and `Problem.answer` is the value of the last one. Numbers are drawn so that every result is a
positive whole number. The stories themselves are in `stories.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grammar import expand, sentence

PROMPT_HEAD, SOLUTION_HEAD, ANSWER_HEAD = "Problem: ", "\nSolution:", "\nAnswer: "

NAMES = (
    "Ada Amir Anya Ben Bruno Carla Chidi Clara Dana Diego Elif Emil Esra Farah Felix Gita Hana Hugo Ines Ivan "
    "Jana Jonas Kaya Kofi Lena Liam Lucia Malik Marta Mei Milo Nadia Nora Omar Otto Paula Priya Quinn Rafael Rosa "
    "Ravi Sana Selma Sofia Tariq Tess Theo Uma Vera Viktor Wanda Yara Yusuf Zoe"
).split()

STEP_FORMS = (
    "[Lead]{subject} is {equation} {unit}.",
    "[Lead]{subject} is {equation} {unit}.",
    "{equation}, so {subject} is {value} {unit}.",
    "[lead]to find {subject}, we compute {equation} {unit}.",
    "[lead]for {subject} we get {equation} {unit}.",
    "[lead]we work out {subject}: {equation} {unit}.",
    "[means]{subject} is {equation} {unit}.",
)
LEADS = {
    "first": {"Lead": ("", "", "first, "), "lead": ("", "first, ", "at first, "), "means": ("we see that ",)},
    "later": {
        "Lead": ("", "", "so ", "then "),
        "lead": ("", "next, ", "then ", "after that, ", "now "),
        "means": ("this means that ",),
    },
    "last": {
        "Lead": ("", "so ", "finally, ", "in the end, "),
        "lead": ("finally, ", "last, ", "now "),
        "means": ("this means that ",),
    },
}

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


@dataclass(frozen=True)
class Problem:
    """A question, the sentences that solve it, and the number they arrive at."""

    kind: str
    question: str
    steps: tuple[str, ...]
    answer: int
    unit: str

    @property
    def prompt(self) -> str:
        """The text up to where the solution starts, as the base model reads it too."""
        return PROMPT_HEAD + self.question + SOLUTION_HEAD

    @property
    def answer_line(self) -> str:
        """The last line of every completion."""
        return f"{ANSWER_HEAD}{self.answer} {self.unit}"

    @property
    def text(self) -> str:
        """Prompt, steps and answer in a row, without any noise."""
        return self.prompt + " " + " ".join(self.steps) + self.answer_line


class Draft:
    """A problem while it is written: collects story sentences and computed steps."""

    def __init__(self, rng: random.Random, kind: str) -> None:
        """Start an empty problem of the given kind."""
        self.rng = rng
        self.kind = kind
        self._story: list[str] = []
        self._steps: list[tuple[str, str, int, str]] = []

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def pick(self, *options: str) -> str:
        """One of the wordings."""
        return self.rng.choice(options)

    def maybe(self, chance: float) -> bool:
        """True with probability `chance`: for the optional parts of a story."""
        return self.rng.random() < chance

    def tell(self, *wordings: str) -> None:
        """Add one story sentence (or the question itself), in one of several wordings."""
        self._story.append(self.rng.choice(wordings))

    def step(self, subject: str, left: int, operator: str, right: int, unit: str) -> int:
        """Add the step `subject = left operator right` and return its value; `unit` may be empty.

        Raises:
            ValueError: the result is not a positive whole number, so the story drew its numbers badly.
        """
        value = _OPERATIONS[operator](left, right)
        if value <= 0 or (operator == "/" and left % right):
            raise ValueError(f"{self.kind}: {left} {operator} {right} is not a positive whole number")
        self._steps.append((subject, f"{left} {operator} {right} = {value}", value, unit))
        return value

    def finish(self) -> Problem:
        """The finished problem; its answer is the value of the last step."""
        last = len(self._steps) - 1
        steps = []
        for index, (subject, equation, value, unit) in enumerate(self._steps):
            leads = LEADS["first" if index == 0 else "last" if index == last else "later"]
            form = expand(self.rng.choice(STEP_FORMS), leads, self.rng)
            step = form.format(subject=subject, equation=equation, value=value, unit=unit)
            steps.append(sentence(step.replace(" .", ".")))  # a step without a unit
        _, _, answer, unit = self._steps[-1]
        return Problem(self.kind, " ".join(self._story), tuple(steps), answer, unit)
