"""Plants noise into clean answers, and says to the character where it is.

An answer is cut into pieces at the places where noise may stand: its beginning and end, between paragraphs, and
between the sentences of a paragraph. A fenced block is one piece, so nothing is ever planted into code. The spans are
for judging a filter; training does not read them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phrases import CLOSINGS, COPIES_BEFORE, COPIES_INSIDE, DIGRESSIONS, OPENINGS, PAGE_REMAINS

STOCK, PAGE, COPY, DIGRESSION, REPEAT = KINDS = (
    "stock phrase",
    "page remains",
    "copied prompt",
    "digression",
    "repeated line",
)
NOISY_SHARE = 0.6  # of the rows
# How often a noisy row gets each; one that gets none gets a stock phrase at its end.
CHANCES = {COPY: 0.22, "opening": 0.4, "closing": 0.4, PAGE: 0.55, DIGRESSION: 0.45, REPEAT: 0.15}
LONGEST_COPY = 160  # characters of a prompt that is copied; a longer one would be most of the row
PARAGRAPH = "\n\n"
BETWEEN_SENTENCES = r"(?<=[\w)`\"][.!?]) (?=[A-Z`\"])"


@dataclass(frozen=True)
class Row:
    """One example. `noise` lists (start, end, kind): half-open character ranges of the completion, in order."""

    prompt: str
    completion: str
    kind: str
    noise: tuple[tuple[int, int, str], ...] = ()

    @property
    def clean(self) -> str:
        """The completion without its noise."""
        parts, position = [], 0
        for start, end, _ in self.noise:
            parts.append(self.completion[position:start])
            position = end
        return "".join(parts) + self.completion[position:]


@dataclass(frozen=True)
class Gap:
    """A place in a clean answer where noise may stand.

    Args:
        position: the offset in the answer; what is planted comes before the character there.
        place: `start`, `paragraph`, `sentence` or `end`.
        before: the line or sentence that ends here, for repeating it; empty where it is code.
        prose: whether running text follows.
    """

    position: int
    place: str
    before: str = ""
    prose: bool = False


def gaps(answer: str) -> list[Gap]:
    """The places where noise may stand in `answer`, in order, with those inside fenced blocks left out."""
    fences = [match.span() for match in re.finditer(r"^```.*?^```$", answer, re.MULTILINE | re.DOTALL)]

    def in_code(position: int) -> bool:
        return any(start < position <= end for start, end in fences)

    found = [Gap(0, "start", prose=is_prose(line_at(answer, 0)))]
    for match in re.finditer(rf"\n\n|{BETWEEN_SENTENCES}", answer):
        place = "sentence" if match.group() == " " else "paragraph"
        if any(start < match.start() < end for start, end in fences):
            continue
        if place == "sentence" and not is_prose(line_at(answer, match.start())):
            continue
        before = "" if in_code(match.start()) else last_sentence(answer[: match.start()])
        found.append(Gap(match.start(), place, before))
    return [*found, Gap(len(answer), "end", "" if in_code(len(answer)) else last_sentence(answer))]


def line_at(text: str, position: int) -> str:
    """The line of `text` that holds the character at `position`."""
    return text[text.rfind("\n", 0, position) + 1 :].partition("\n")[0]


def is_prose(line: str) -> bool:
    """Whether a line is running text: no list item, table row, heading or quotation."""
    return re.match(r"[\w\"]", line) is not None and re.match(r"\d+\. |\w+: ", line) is None


def last_sentence(text: str) -> str:
    """The sentence or line with which `text` ends."""
    line = text[text.rfind("\n") + 1 :]
    return re.split(BETWEEN_SENTENCES, line)[-1]


class Deck:
    """Texts in random order, each once before any comes again."""

    def __init__(self, texts: Sequence[str], rng: random.Random) -> None:
        self._texts, self._rng, self._left = texts, rng, []

    def draw(self) -> str:
        """The next text."""
        if not self._left:
            self._left = list(self._texts)
            self._rng.shuffle(self._left)
        return self._left.pop()


class Mixer:
    """Plants noise into rows. The same seed and the same pairs give the same rows.

    Args:
        seed: of all chances.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"noise {seed}")
        texts = {
            "opening": OPENINGS,
            "closing": CLOSINGS,
            PAGE: PAGE_REMAINS,
            DIGRESSION: DIGRESSIONS,
            "before": COPIES_BEFORE,
            "inside": COPIES_INSIDE,
        }
        self._decks = {name: Deck(pool, self._rng) for name, pool in texts.items()}

    def mix(self, pairs: Iterable[dict[str, str]]) -> list[Row]:
        """Rows of all `pairs` (`prompt`, `completion`, `kind`), in their order; `NOISY_SHARE` of them with noise."""
        pairs = list(pairs)
        noisy = set(self._rng.sample(range(len(pairs)), round(NOISY_SHARE * len(pairs))))
        return [self.plant(pair) if index in noisy else Row(**pair) for index, pair in enumerate(pairs)]

    def plant(self, pair: dict[str, str]) -> Row:
        """One noisy row."""
        answer = pair["completion"]
        places = gaps(answer)
        planned: dict[int, tuple[Gap, str, str]] = {}  # at most one text at a place
        drawn = [name for name, chance in CHANCES.items() if self._rng.random() < chance] or ["closing"]
        for name in drawn:
            free = [gap for gap in places if gap.position not in planned and self._fits(name, gap, pair["prompt"])]
            if free:
                gap = self._rng.choice(free)
                planned[gap.position] = (gap, *self._text(name, gap, pair["prompt"]))
        text, noise, position = "", [], 0
        for start in sorted(planned):
            gap, planted, kind = planned[start]
            text, position = text + answer[position:start], start
            noise.append((len(text), len(text) + len(planted), kind))
            text += planted
        return Row(pair["prompt"], text + answer[position:], pair["kind"], tuple(noise))

    def _fits(self, name: str, gap: Gap, prompt: str) -> bool:
        """Whether noise of a sort may stand in a gap."""
        places = {
            "opening": ("start",),
            "closing": ("end",),
            PAGE: ("paragraph", "end"),
            DIGRESSION: ("paragraph", "sentence"),
            COPY: ("start", "paragraph"),
            REPEAT: ("paragraph", "sentence", "end"),
        }
        if name == COPY and len(prompt) > LONGEST_COPY:
            return False
        if name == REPEAT and len(gap.before) < 20:
            return False
        return gap.place in places[name]

    def _text(self, name: str, gap: Gap, prompt: str) -> tuple[str, str]:
        """What is planted in a gap, with the space around it, and its kind."""
        if name == "opening":
            return self._decks[name].draw() + (self._rng.choice((" ", PARAGRAPH)) if gap.prose else PARAGRAPH), STOCK
        if name == "closing":
            return PARAGRAPH + self._decks[name].draw(), STOCK
        if name == COPY:
            text = self._decks["before" if gap.place == "start" else "inside"].draw().format(prompt=prompt)
            return (text + PARAGRAPH if gap.place == "start" else PARAGRAPH + text), COPY
        if name == REPEAT:
            return ("\n" if gap.before.startswith(("- ", "|")) else " ") + gap.before, REPEAT
        between = " " if gap.place == "sentence" else PARAGRAPH
        return between + self._decks[name].draw(), name
