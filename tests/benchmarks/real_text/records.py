"""Three public fine-tuning sets become prompts and completions with known parts, split once and for all by content.

A record knows where its final answer and its calculator annotations are, so that losses and drops can be separated
by what a token is for. Which part a record belongs to follows from its prompt alone: never from its place in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = {"pretrain": 0.60, "train": 0.25, "held-out": 0.15}
CALCULATOR = re.compile(r"<<[^>]*>>")
GSM8K_ANSWER = re.compile(r"^#### *", re.MULTILINE)
DECISION = "\nDecision: "
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Record:
    """One example as text.

    Args:
        head: the prompt, of which the end may be cut to fit the context.
        tail: what ends the prompt and is never cut.
        completion: what is trained on.
        line: where in the completion the line with the final answer begins; answer: where the answer itself does.
            Both are the completion's length if it has none.
    """

    head: str
    tail: str
    completion: str
    line: int
    answer: int

    @property
    def calculator(self) -> list[tuple[int, int]]:
        """Where the calculator annotations are, as (begin, end) in the completion."""
        return [match.span() for match in CALCULATOR.finditer(self.completion)]


def gsm8k(fields: Mapping[str, Any]) -> Record:
    """A word problem; the answer stands behind `####` in the last line."""
    text = fields["answer"]
    found = GSM8K_ANSWER.search(text)
    line, answer = found.span() if found else (len(text), len(text))
    return Record(f"Question: {fields['question']}", "\nAnswer:\n", text, line, answer)


def pubmedqa(fields: Mapping[str, Any]) -> Record:
    """A research question with an abstract; first the conclusion as it was published, then yes, no or maybe."""
    text = fields["long_answer"] + DECISION + fields["final_decision"]
    line = len(fields["long_answer"]) + 1
    head = f"Question: {fields['question']}\nContext: {fields['context']}"
    return Record(head, "\nAnswer:\n", text, line, line + len(DECISION) - 1)


def humaneval(fields: Mapping[str, Any]) -> Record:
    """A function to complete; code has no final answer."""
    text = fields["canonical_solution"]
    return Record(fields["prompt"], "", text, len(text), len(text))


Reader = Callable[[Mapping[str, Any]], Record]
DATASETS: dict[str, tuple[str, Reader]] = {
    "GSM8K": ("gsm8k_train.jsonl", gsm8k),
    "PubMedQA": ("pubmedqa.jsonl", pubmedqa),
    "HumanEval": ("humaneval.jsonl", humaneval),
}


def part_of(record: Record) -> str:
    """The part a record belongs to: equal prompts, equal parts."""
    digest = hashlib.sha256((record.head + record.tail).encode()).digest()
    place, reached = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name, share in PARTS.items():
        reached += share
        if place < reached:
            return name
    return name


def read(folder: Path) -> dict[str, dict[str, list[Record]]]:
    """All records by data set and part, in the order of the files."""
    found: dict[str, dict[str, list[Record]]] = {}
    for dataset, (name, reader) in DATASETS.items():
        parts: dict[str, list[Record]] = {part: [] for part in PARTS}
        with (folder / name).open(encoding="utf-8") as lines:
            for line in lines:
                record = reader(json.loads(line))
                parts[part_of(record)].append(record)
        found[dataset] = parts
    return found


def digest(parts: Mapping[str, Mapping[str, list[Record]]]) -> str:
    """What all records are; a result holds for these and no others."""
    state = hashlib.sha256()
    for by_part in parts.values():
        for records in by_part.values():
            for one in records:
                state.update(repr(one).encode())
    return state.hexdigest()[:12]
