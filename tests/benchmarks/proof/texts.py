"""The texts: three public sets and a chat set without noise, and public sets with labelled noise.

The public files are no part of this project; docs/evidence.md says where they come from. Text is cut into pieces with
a kind each: `good`, or what is wrong with it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = "good"
ROOT = Path(__file__).parents[3]
STOCK = re.compile(r"[^.!?\n]*AI language model[^.!?\n]*[.!?]?")
CONTEXT = 900  # characters of a medical abstract: longer ones take most of the machine's time


@dataclass(frozen=True)
class Example:
    """A prompt, and a completion in pieces: (text, kind) each.

    Args:
        prompt: the text before the completion, or what a user asks.
        pieces: of the completion.
        chat: whether the prompt goes through the tokenizer's chat template.
    """

    prompt: str
    pieces: tuple[tuple[str, str], ...]
    chat: bool = False

    @property
    def completion(self) -> str:
        """The text that is trained on."""
        return "".join(text for text, _ in self.pieces)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def _pair(prompt: str, completion: str) -> Example:
    return Example(prompt, ((completion, GOOD),))


def gsm8k(data: Path) -> list[Example]:
    """Word problems with worked solutions."""
    return [_pair(f"Question: {x['question']}\nAnswer:\n", x["answer"]) for x in _lines(data / "gsm8k_train.jsonl")]


def pubmedqa(data: Path) -> list[Example]:
    """Conclusions of medical abstracts, and a decision."""
    return [
        _pair(
            f"Question: {x['question']}\nContext: {x['context'][:CONTEXT]}\nAnswer:\n",
            f"{x['long_answer']}\nDecision: {x['final_decision']}",
        )
        for x in _lines(data / "pubmedqa.jsonl")
    ]


def humaneval(data: Path) -> list[Example]:
    """Python functions to complete."""
    return [_pair(x["prompt"], x["canonical_solution"]) for x in _lines(data / "humaneval.jsonl")]


def chat(data: Path) -> list[Example]:
    """The demo's answers to everyday questions, with lists, tables, letters and code."""
    pairs = _lines(ROOT / "recipes/demo/clean.jsonl")
    return [Example(x["prompt"], ((x["completion"], GOOD),), chat=True) for x in pairs]


def web_pages(data: Path) -> list[Example]:
    """News pages as a scraper sees them; lines outside the article are noise."""
    return [
        Example(
            f"Title: {x['title']}\n\n",
            tuple((f"{line}\n", GOOD if own else "page") for line, own in zip(x["lines"], x["article"], strict=True)),
        )
        for x in _lines(data / "noise/web_pages.jsonl")
    ]


def half_of_the_pages(first: int) -> Callable[[Path], list[Example]]:
    """Every second news page: the rule of `running_text` was chosen on the even ones, so the odd ones confirm it."""
    return lambda data: web_pages(data)[first::2]


def hallucinated(data: Path) -> list[Example]:
    """Answers of a chat model, in which people marked what is made up."""
    return [
        Example(x["prompt"], tuple(_cut(x["completion"], x["spans"], "made up")), chat=True)
        for x in _lines(data / "noise/hallucinated_spans.jsonl")
    ]


def _cut(text: str, spans: list[list[int]], kind: str) -> Iterator[tuple[str, str]]:
    marks = sorted({0, len(text), *(place for span in spans for place in span)})
    for low, high in zip(marks, marks[1:], strict=False):
        inside = any(start <= low < end for start, end in spans)
        yield text[low:high], kind if inside else GOOD


def stock_sentences(data: Path) -> list[Example]:
    """The same answers, whose noise is the sentences that speak of the model itself: nobody planted them."""
    found = []
    for x in _lines(data / "noise/hallucinated_spans.jsonl"):
        text, spans = x["completion"], [list(match.span()) for match in STOCK.finditer(x["completion"])]
        if spans:
            found.append(Example(x["prompt"], tuple(_cut(text, spans, "stock sentence")), chat=True))
    return found


def wrong_steps(data: Path) -> list[Example]:
    """Solutions in steps, of which the first wrong one is known; what follows it is left out."""
    found = []
    for name in ("multistep_arithmetic", "tracking_shuffled_objects"):
        for x in _lines(data / f"noise/wrong_steps_{name}.jsonl"):
            first = len(x["steps"]) if x["first_wrong"] is None else x["first_wrong"]
            steps = (
                (f"{step}\n", GOOD if i < first else "wrong step") for i, step in enumerate(x["steps"][: first + 1])
            )
            found.append(Example(f"Question: {x['prompt']}\nAnswer:\n", tuple(steps)))
    return found


CLEAN: dict[str, Callable[[Path], list[Example]]] = {
    "GSM8K": gsm8k,
    "PubMedQA": pubmedqa,
    "HumanEval": humaneval,
    "chat": chat,
}
LABELLED: dict[str, Callable[[Path], list[Example]]] = {
    "web pages": web_pages,
    "stock sentences": stock_sentences,
    "made-up spans": hallucinated,
    "wrong steps": wrong_steps,
}
HALVES = {"web pages, even": half_of_the_pages(0), "web pages, odd": half_of_the_pages(1)}


def sample(name: str, data: Path, number: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Some examples of a set, and the others, in random order."""
    every = (CLEAN | LABELLED | HALVES)[name](data)
    random.Random(f"{name} {seed}").shuffle(every)
    return every[:number], every[number:] or every
