"""What the fuzz tests share: how many inputs, scores that nobody would expect, rows, and what must hold of any mask.

`check_selection` and `Reading` are written from docs/config.md and docs/method.md, value by value and with none of the
code that they judge: were they to share it, both could be wrong together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.reliability import LONG, amount
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.distinct import TOKEN_IDS
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.data.keys import document_key
from xtf_plugin.selection.masks import MaskTable
from xtf_plugin.selection.select import CONTROL, FLOOR, FORCED, PROTECTED, Scores, Selection, rule_bits, select
from xtf_plugin.training.collator import XTFDataCollator

IGNORED = -100
FLOAT32 = float(np.finfo(np.float32).max)
ODD_NUMBERS = [0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45, FLOAT32, -FLOAT32, np.nan, np.inf, -np.inf, 1.0, 0.5, -4.0]


def inputs(short: int, long: int) -> Callable[[Any], Any]:
    """How many inputs a test is given: the same ones in every short run, new ones in every long run."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=amount(short, long),
        derandomize=not LONG,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=quiet,
    )


@st.composite
def score_arrays(draw: Any, size: int) -> np.ndarray[Any, Any]:
    """Numbers of one score: all equal, few values, odd ones, or as a model gives them."""
    kind = draw(st.sampled_from(["equal", "few", "zeros", "odd", "spread", "usual", "usual"]))
    if kind == "equal":
        return np.full(size, draw(st.sampled_from(ODD_NUMBERS)), dtype=np.float32)
    if kind == "usual":
        return np.random.default_rng(draw(st.integers(0, 9))).normal(0, 3, size).astype(np.float32)
    if kind == "spread":
        return np.asarray(draw(st.lists(st.floats(width=32), min_size=size, max_size=size)), np.float32)
    few = draw(st.lists(st.sampled_from(ODD_NUMBERS), min_size=1, max_size=2))
    some = {"few": few, "zeros": [0.0, -0.0, 0.0, 1.0]}.get(kind, ODD_NUMBERS)
    chosen = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    return np.asarray([some[i % len(some)] for i in chosen], np.float32)


def keys_of(number: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (number, 16)).astype(np.uint8)


@st.composite
def layouts(draw: Any) -> dict[str, Any]:
    """Documents without scores: among them empty ones, ones of one token, ones that begin with a completion token."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 12, 40]), min_size=1, max_size=5))
    size = sum(lengths)
    firsts = draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    counts = draw(st.lists(st.sampled_from([1, 1, 2, 1000]), min_size=len(lengths), max_size=len(lengths)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(size) - np.repeat(offsets[:-1], lengths) + np.repeat(firsts, lengths)
    return {
        "keys": keys_of(len(lengths)),
        "offsets": offsets,
        "counts": np.asarray(counts, dtype=np.int64),
        "token_ids": np.arange(size, dtype=np.int32) % 7,
        "positions": places.astype(np.int32),
    }


def segments_of(layout: Mapping[str, Any], marks: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Sentences and lines: every document that is not empty begins one, and so does each marked token."""
    begins = np.asarray(marks, dtype=bool).copy()
    offsets = layout["offsets"]
    begins[offsets[:-1][np.diff(offsets) > 0]] = True
    return {"sentence": np.flatnonzero(begins), "line": np.flatnonzero(begins)}


def check_selection(scores: Scores, config: XTFConfig, protected: Any, forced: Any, segments: Any = None) -> Selection:
    """Select twice, and hold the result against what is documented; return it."""
    known = [a for a in (scores.positions, scores.logprobs, *scores.values.values()) if a is not None]
    before = [np.copy(a) for a in known]
    made, again = (select(scores, config, protected, forced, segments) for _ in range(2))
    for name in ("keep", "reasons", "best"):
        np.testing.assert_array_equal(getattr(made, name), getattr(again, name))
    for name in config.scores:
        np.testing.assert_array_equal(made.seen[name], again.seen[name])
    assert json.dumps(made.thresholds, allow_nan=False) == json.dumps(again.thresholds, allow_nan=False)
    for one, other in zip(before, known, strict=True):
        np.testing.assert_array_equal(one, other, "scores were changed")
    assert made.keep.dtype == bool and made.keep.shape == made.reasons.shape == scores.token_ids.shape
    assert made.keep[protected].all(), "a protected token is dropped"
    for low, high in zip(scores.offsets[:-1].tolist(), scores.offsets[1:].tolist(), strict=True):
        _check_document(scores, config, made, protected, forced, slice(low, high))
    _check_rules(scores, config, made)
    _check_best(scores, made)
    return made


def _check_document(scores: Any, config: XTFConfig, made: Selection, protected: Any, forced: Any, here: slice) -> None:
    """One document: fired rules, `combine`, protection, the floor and the control."""
    trains, keep, reasons = scores.positions[here] > 0, made.keep[here], made.reasons[here]
    shielded, pushed = protected[here], forced[here]
    bits = list(rule_bits(config).values())
    votes = sum(((reasons & bit > 0).astype(int) for bit in bits), np.zeros(len(keep), dtype=int))
    needed = {"union": 1, "intersection": len(bits), "majority": len(bits) // 2 + 1}
    at_least = needed[config.combine] if isinstance(config.combine, str) else config.combine.at_least
    asked = (votes >= max(1, at_least)) | pushed
    going = asked & ~shielded
    stay = min(config.min_kept, int(trains.sum()))
    brought_back = max(0, stay - int((trains & ~going).sum()))
    assert int((keep & trains).sum()) >= stay, "the floor does not hold"
    assert ((reasons & PROTECTED > 0) == (asked & shielded)).all()
    planned = int((going & trains).sum()) - brought_back
    if config.control is None:
        rescued = reasons & FLOOR > 0
        assert int(rescued.sum()) == brought_back and not (rescued & ~(going & trains)).any()
        assert (keep == (~going | rescued)).all()
        assert ((reasons & FORCED > 0) == (going & ~rescued & (votes < max(1, at_least)))).all()
    else:
        assert int((~keep & trains).sum()) == planned, "the control drops another number than the rules"
        assert (keep[~trains] == ~going[~trains]).all()
        assert (reasons[~keep] & CONTROL > 0).all() and not (reasons & FORCED).any()


def _check_rules(scores: Scores, config: XTFConfig, made: Selection) -> None:
    """Undefined scores fire no rule, caps hold, and what fired is counted as often as its document occurs."""
    lengths = np.diff(scores.offsets)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for name, bit in rule_bits(config).items():
        fired, values = made.reasons & bit > 0, scores.values[name]
        assert made.fired[name] == int(scores.counts[document][fired].sum())
        assert not (fired & ~np.isfinite(values)).any(), f"an undefined score fires {name}"
        cap = config.scores[name].max_fraction
        if cap is not None:
            most = np.floor(cap * lengths)
            assert (np.bincount(document[fired], minlength=len(lengths)) <= most).all(), f"{name} fires beyond its cap"
    known = sum(rule_bits(config).values()) | PROTECTED | FLOOR | FORCED | CONTROL
    assert not (made.reasons & ~np.asarray(known, dtype=made.reasons.dtype)).any()


def _check_best(scores: Scores, made: Selection) -> None:
    for index, best in enumerate(made.best.tolist()):
        trains = scores.positions[scores.offsets[index] : scores.offsets[index + 1]] > 0
        assert trains[best] if best >= 0 else not trains.any()


def flat_labels(features: list[Any]) -> dict[str, Any]:
    """The simplest inner collator: the labels of all rows, one after the other; what it was given comes with them."""
    rows = [row for group in features for row in (group if isinstance(group, list) else [group])]
    labels = [torch.tensor(list(plain(row["labels"])), dtype=torch.int64) for row in rows]
    return {"labels": torch.cat([torch.zeros(0, dtype=torch.int64), *labels]), "rows": rows}


def collated(rows: list[Any], masks: MaskTable, *, nested: bool = False) -> list[Any]:
    """Rows as they come out of the collator, after everything but their labels was found unchanged."""
    before = [plain(row["labels"]) for row in rows]
    made = XTFDataCollator(flat_labels, masks)([rows[:1], rows[1:]] if nested else rows)["rows"]
    for row, labels, after in zip(rows, before, made, strict=True):
        assert after.keys() == row.keys() and all(after[name] is row[name] for name in row if name != "labels")
        assert plain(row["labels"]) == labels, "the data set's own row was changed"
        new = plain(after["labels"])
        assert len(new) == len(labels)
        assert all(b in (a, IGNORED) for a, b in zip(labels, new, strict=True)), (labels, new)
    return made


def plain(column: Any) -> Any:
    """A column of a row as Python's own numbers in lists."""
    return column.tolist() if isinstance(column, (np.ndarray, np.generic, torch.Tensor)) else column


Piece = tuple[tuple[int, ...], tuple[bool, ...]]


class Refused(Exception):
    """What a row must be refused for."""


class Reading:
    """A row read one value at a time; `doubtful` once something was seen that may be refused or taken at its value."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row, self.doubtful = row, False

    def numbers(self, name: str) -> list[float]:
        column = plain(self.row.get(name))
        self.doubtful |= isinstance(column, range)
        if not isinstance(column, (list, tuple, range)):
            raise Refused(name)
        return [self.number(name, plain(item)) for item in column]

    def number(self, name: str, item: Any) -> float:
        if isinstance(item, int) and not isinstance(item, bool):
            if name in ("input_ids", "labels") and not -(2**63) <= item < 2**63:
                raise Refused(name)
            self.doubtful |= not -(2**63) <= item < 2**63
            return item
        self.doubtful |= name != "attention_mask" or not isinstance(item, bool)
        if isinstance(item, str) and item.isdigit() and name != "attention_mask":
            return int(item)
        if name in ("position_ids", "attention_mask") and isinstance(item, float):
            return item  # what is not 0, however little, is no restart and no padding
        if isinstance(item, bool) or (isinstance(item, float) and item.is_integer()):
            return int(item) if abs(item) < 2**63 else 1
        raise Refused(name)

    def documents(self) -> list[Piece]:
        """The documents of the row, in order."""
        tokens, kept = self.numbers("input_ids"), self.numbers("labels")
        if len(tokens) != len(kept):
            raise Refused("input_ids")
        start, end = self.inside([label != IGNORED for label in kept])
        if any(not 0 <= token < TOKEN_IDS for token in tokens[start:end]):
            raise Refused("input_ids")
        cuts = [start + cut for cut in self.cuts(start, end)]
        spans = zip(cuts[:-1], cuts[1:], strict=True)
        return [(tuple(map(int, tokens[a:b])), tuple(label != IGNORED for label in kept[a:b])) for a, b in spans]

    def inside(self, completion: list[bool]) -> tuple[int, int]:
        if self.row.get("attention_mask") is None:
            return 0, len(completion)
        real = [value != 0 for value in self.numbers("attention_mask")]
        first, last = (real.index(True), len(real) - real[::-1].index(True)) if any(real) else (0, 0)
        trained = any(flag and not here for flag, here in zip(completion, real, strict=False))
        if len(real) != len(completion) or not all(real[first:last]) or trained:
            raise Refused("attention_mask")
        return first, last

    def cuts(self, start: int, end: int) -> list[int]:
        if self.row.get("seq_lengths") is not None:
            lengths = [int(value) for value in self.numbers("seq_lengths")]
            if any(value < 1 for value in lengths) or sum(lengths) != end - start:
                raise Refused("seq_lengths")
            return [sum(lengths[:k]) for k in range(len(lengths) + 1)]
        if self.row.get("position_ids") is not None:
            places = self.numbers("position_ids")
            if len(places) != len(plain(self.row["labels"])):
                raise Refused("position_ids")
            return [0, *(k for k in range(1, end - start) if places[start + k] == 0), end - start]
        return [0, end - start]


def naive(data: list[dict[str, Any]]) -> tuple[list[list[Piece]] | None, bool]:
    """Documents by row, None if they must be refused; and whether they may be."""
    readings = [Reading(row) for row in data]
    try:
        found = [reading.documents() for reading in readings]
    except Refused:
        return None, True
    labelled = any(any(mask[1:]) for row in found for _, mask in row)  # a first token is never predicted
    return (found if labelled else None), not labelled or any(reading.doubtful for reading in readings)


def agree(made: DocumentSet, expected: list[list[Piece]]) -> None:
    """A set of documents is what a loop with a dictionary makes of the rows."""
    flat = [piece for row in expected for piece in row]
    index = {piece: at for at, piece in enumerate(dict.fromkeys(flat))}
    assert [tuple(map(tuple, map(plain, made.document(i)))) for i in range(len(made))] == list(index)
    assert made.counts.tolist() == [flat.count(piece) for piece in index]
    assert made.row_documents.tolist() == [index[piece] for piece in flat]
    assert np.diff(made.row_offsets).tolist() == [len(row) for row in expected]
    keys = [document_key(np.asarray(tokens, dtype=np.int64), np.asarray(mask, dtype=bool)) for tokens, mask in index]
    assert [key.tobytes() for key in made.keys] == keys and len(set(keys)) == len(keys)


class Elements(HTMLParser):
    """The elements of a page in order, and the text of its title and of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.inside: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", []))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", [("text", data)]))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", [])
        name = dict(attributes).get("id", tag)
        self.inside[name] = self.inside.get(name, "") + data
