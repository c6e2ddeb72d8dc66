"""Three worlds of solvable problems: word problems with worked steps, small programs explained, questions about people.

A world writes a prompt, the lines that solve it and the answer, piece by piece: a piece is a word with its leading
space, and its kind. So the true kind of every token is known however the tokenizer cuts. Numbers are small, so that
a model of a million weights can learn to add and compare them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ANSWER, RESULT, STEP, CONNECTIVE, EOS = GOOD_KINDS = ("answer", "result", "step", "connective", "eos")
Piece = tuple[str, str]
Line = list[Piece]
_WORDS = re.compile(r" ?\w+|[^\w\s]|\n| ")
_CONNECTIVES = frozenset(
    "first to begin with next then after that so now we have that means hence in all finally this gives because is of "
    "the a".split()
)


@dataclass(frozen=True)
class Problem:
    """A prompt as sentences, the solution as lines of pieces (the last one holds the answer), and the answer."""

    prompt: Sequence[str]
    lines: Sequence[Line]
    answer: str

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        return " ".join(self.prompt) + "\n"


def words(text: str) -> list[str]:
    """Cut a text into words with their leading space, punctuation and line breaks."""
    return _WORDS.findall(text)


def line(text: str, kind: str | None = None) -> Line:
    """A line of a solution; a number in `{}` is a result. Without `kind`, function words are connectives."""
    pieces: Line = []
    for part in re.split(r"(\{[^}]*\})", text):
        if part.startswith("{"):
            pieces += [(word, RESULT) for word in words(part[1:-1])]
            continue
        for word in words(part):
            plain = word.strip().lower()
            connects = plain in _CONNECTIVES or not plain or not plain[0].isalnum()
            pieces.append((word, kind or (CONNECTIVE if connects else STEP)))
    return pieces


def _final(answer: str) -> Line:
    return [*line("Answer:", CONNECTIVE), *((word, ANSWER) for word in words(" " + answer))]


NAMES = "Ana Ben Cleo Dan Eva Finn Gus Hana Ivo Jana Karl Lea Max Nora Otto Pia".split()
GOODS = "apples pears coins cards books pens shells marbles stamps eggs".split()
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "gives away", "breaks")


def sums(rng: random.Random, base: bool = False) -> Problem:
    """A stock of goods that grows, shrinks and doubles over two to four events; base models know no doubling."""
    name, goods, total = rng.choice(NAMES), rng.choice(GOODS), rng.randint(2, 20)
    prompt, lines = [f"{name} has {total} {goods}."], []
    for number in range(rng.randint(2, 3 if base else 4)):
        lead = rng.choice(("First", "To begin with") if number == 0 else ("Then", "Next", "After that", "Now"))
        kind = rng.choice(("gain", "loss", "double") if total <= 12 and not base else ("gain", "loss"))
        if kind == "double":
            prompt.append(rng.choice((f"The number of {goods} doubles.", f"A friend doubles the {goods}.")))
            equation, total = f"{total} * 2 =", total * 2
        elif kind == "gain":
            more = rng.randint(1, 9)
            prompt.append(f"{name} {rng.choice(GAINS)} {more} {goods}.")
            equation, total = f"{total} + {more} =", total + more
        else:
            less = rng.randint(1, max(1, min(9, total - 1)))
            prompt.append(f"{name} {rng.choice(LOSSES)} {less} {goods}.")
            equation, total = f"{total} - {less} =", total - less
        lines.append(line(f"{lead} {name} has {equation}{{ {total}}} {goods}.\n"))
    prompt.append(rng.choice((f"How many {goods} does {name} have?", f"How many {goods} are there now?")))
    return Problem(prompt, [*lines, _final(str(total))], str(total))


def programs(rng: random.Random, base: bool = False) -> Problem:
    """Assignments to three variables, explained line by line; base models know no multiplication."""
    names = rng.sample(("a", "b", "c", "x", "y", "z"), 3)
    values: dict[str, int] = {}
    prompt, lines = [], []
    for number in range(rng.randint(3, 5)):
        target = names[number] if number < 2 else rng.choice(names)
        if number == 0 or rng.random() < 0.2:
            values[target] = rng.randint(1, 20)
            prompt.append(f"{target} = {values[target]};")
            lines.append(line(f"Line {number + 1} sets {target} to{{ {values[target]}}}.\n"))
            continue
        source = rng.choice(sorted(values))
        old = values[source]
        sign = rng.choice(["+", "-"] if old > 10 else ["+"] if base else ["+", "*"])
        by = 2 if sign == "*" else rng.randint(1, 9)
        values[target] = {"+": old + by, "-": old - by, "*": old * by}[sign]
        prompt.append(f"{target} = {source} {sign} {by};")
        text = rng.choice(("Line {n} sets {t} to {o} {s} {b} =", "Now {t} becomes {o} {s} {b} ="))
        text = text.format(n=number + 1, t=target, o=old, s=sign, b=by)
        lines.append(line(f"{text}{{ {values[target]}}}.\n"))
    shown = rng.choice(sorted(values))
    prompt.append(f"print({shown})")
    lines.append(line(f"So the program prints {shown}.\n"))
    return Problem(prompt, [*lines, _final(str(values[shown]))], str(values[shown]))


SURNAMES = "Berg Lund Holm Dahl Vik Strand Moe Falk".split()
CITIES = "Oslo Turku Lima Quito Bern Graz".split()  # few, so that pairs who share one do not run out
JOBS = "baker nurse pilot tailor judge farmer singer diver".split()


@dataclass(frozen=True)
class Person:
    """Somebody whom questions are about."""

    name: str
    age: int
    city: str
    job: str

    def facts(self) -> list[str]:
        """What there is to know, as sentences."""
        return [f"{self.name} is {self.age}.", f"{self.name} lives in {self.city}.", f"{self.name} is a {self.job}."]


def people(seed: int = 0) -> list[Person]:
    """Everybody in the world of facts, the same for every data set."""
    rng = random.Random(f"people {seed}")
    names = [f"{first} {last}" for first in NAMES for last in SURNAMES[:4]]
    return [Person(name, rng.randint(18, 80), rng.choice(CITIES), rng.choice(JOBS)) for name in names]


PEOPLE = people()
KNOWN = len(PEOPLE) * 3 // 4  # base models read about these alone; training data asks about the others too


def facts(rng: random.Random, base: bool = False) -> Problem:
    """Questions that need two facts and one conclusion; base models know a part of the people.

    Nothing in a question gives its answer away: either person may be asked for, and half of the pairs share a city.
    """
    kind = rng.choice(("age", "city", "job"))
    one, two = _pair(kind, PEOPLE[:KNOWN] if base else PEOPLE, rng)
    if kind == "age":
        older = rng.random() < 0.5
        prompt = [f"Who is {'older' if older else 'younger'}, {one.name} or {two.name}?"]
        high, low = (one, two) if one.age > two.age else (two, one)
        lines = [
            line(f"First, {one.name} is{{ {one.age}}}.\n"),
            line(f"Then {two.name} is{{ {two.age}}}.\n"),
            line(f"So {high.age} is{{ more}} than {low.age}.\n"),
        ]
        answer = (high if older else low).name
    elif kind == "city":
        prompt = [f"Do {one.name} and {two.name} live in the same city?"]
        lines = [
            line(f"First, {one.name} lives in{{ {one.city}}}.\n"),
            line(f"Then {two.name} lives in{{ {two.city}}}.\n"),
        ]
        answer = "yes" if one.city == two.city else "no"
    else:
        asked = rng.choice((one, two))
        prompt = [f"{one.name} and {two.name} meet. Who is the {asked.job}?"]
        lines = [
            line(f"First, {one.name} is a{{ {one.job}}}.\n"),
            line(f"Then {two.name} is a{{ {two.job}}}.\n"),
        ]
        answer = asked.name
    return Problem(prompt, [*lines, _final(answer)], answer)


def _pair(kind: str, among: Sequence[Person], rng: random.Random) -> tuple[Person, Person]:
    """Two people who differ in `kind`; for cities, in half of the cases two who do not."""
    one, same = rng.choice(among), kind == "city" and rng.random() < 0.5
    others = [p for p in among if p is not one and (getattr(p, kind) == getattr(one, kind)) == same]
    return one, rng.choice(others)


def fact_text(rng: random.Random) -> str:
    """A few facts about a few known people: what a base model has read before it meets questions."""
    chosen = [fact for person in rng.sample(PEOPLE[:KNOWN], 4) for fact in person.facts()]
    rng.shuffle(chosen)
    return " ".join(chosen)


WORLDS: dict[str, Callable[..., Problem]] = {"sums": sums, "programs": programs, "facts": facts}
