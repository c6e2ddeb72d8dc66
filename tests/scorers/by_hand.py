"""Units of documents for the definitions by hand of the scorers that leave text out: every document is built alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests import tiny
from tests.test_plan import Provider
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.scoring.cached_scores import ScoreSource
from xtf_plugin.selection.text_rules import segment_starts


@dataclass
class Unit:
    """A sentence or line: its document's token ids, where it begins and ends there, and where its turn begins."""

    document: int
    ids: list[int]
    completion: list[bool]
    turn: int
    start: int
    end: int


def units_of(documents: DocumentSet, starts: Any) -> list[Unit]:
    """The units of some documents, in order."""
    places = [(index, at) for index in range(len(documents)) for at in np.flatnonzero(documents.document(index)[1])]
    found = []
    for first, stop in zip(starts, [*starts[1:], len(places)], strict=True):
        (index, start), (_, last) = places[first], places[stop - 1]
        ids, completion = documents.document(index)
        turn = start
        while turn and completion[turn - 1]:
            turn -= 1
        found.append(Unit(index, ids.tolist(), completion.tolist(), turn, int(start), int(last) + 1))
    return found


def spread(values: list[float], units: list[Unit]) -> Any:
    """One value a unit as one a token."""
    return np.concatenate([np.full(unit.end - unit.start, value) for value, unit in zip(values, units, strict=True)])


class Reader:
    """The tiny model in float32, one document at a time."""

    def __init__(self, model: Any = None) -> None:
        self.model = model or tiny.model()

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Any:
        """Log-probability of every token, NaN for the first."""
        given = torch.tensor(ids)[None]
        rates = self.model(input_ids=given, use_cache=False).logits[0, :-1].log_softmax(-1)
        return np.concatenate([[np.nan], rates.gather(-1, given[0, 1:, None])[:, 0].double().numpy()])

    def surprise(self, past: list[int], own: list[int]) -> float:
        """Minus the log-probability of some tokens after others, in nats."""
        return -float(self.logprobs([*past, *own])[len(past) :].sum())


def chat(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def several_turns(n: int = 8, system: str = "You count.\n", mark: str = "\nAnswer:") -> DocumentSet:
    """Answers of several sentences in one to three turns, whose prompts begin and end alike; one document occurs often.

    Some have noise between good sentences. The last two are text without a prompt and an answer of a single unit.
    """
    rows = []
    for index in range(n):
        ids, labels = chat(system), [-100] * len(chat(system))
        for turn in range(index % 3 + 1):
            pair = tiny.problems(1, seed=10 * index + turn)[0]
            prompt = chat(pair["prompt"] + mark)
            own = chat(pair["completion"] + (" My cat likes fish. It is 9 past 7." if index % 2 else ""))
            ids, labels = [*ids, *prompt, *own], [*labels, *[-100] * len(prompt), *own]
        rows.append({"input_ids": ids, "labels": labels})
    text = chat("Ben buys 3 pens. He has 4 pens. The answer is 7. So it is.")
    one = chat(system) + chat("How many?" + mark)
    rows.append({"input_ids": text, "labels": text})
    rows.append({"input_ids": one + chat(" 12"), "labels": [-100] * len(one) + chat(" 12")})
    return collect([*rows, *[rows[2]] * 5])


def context_of(
    documents: DocumentSet, tmp_path: Any, model: Any = None, protected: Any = None
) -> Iterator[ScoringContext]:
    """What a scorer is given in a run with the tiny model; to be used by a fixture or `next`."""
    config = XTFConfig.parse({"cache_dir": str(tmp_path)})
    provider = Provider(model)
    with ScoreSource(config, documents, tiny.tokenizer(), provider) as source:
        yield ScoringContext(documents, tiny.tokenizer(), source, protected)


def sentences(documents: DocumentSet, unit: str = "sentence") -> Any:
    """First tokens of the units."""
    return segment_starts(documents, tiny.tokenizer(), unit)
