"""Streamed data: thresholds come from a calibration sample; every chunk of rows is scored before it is trained on.

The first documents of the stream are the sample; the thresholds, domain and scale of its plan apply to all later rows.
Scores of later rows are not stored, since scoring a few documents is faster than finding them among millions.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..config.block import XTFConfig
from ..config.scores import check_streamed
from ..data.documents import IGNORE_INDEX, DocumentSet, collect, split_row
from ..data.keys import document_key
from ..data.ragged import Bools, Floats, Ints, Layout
from ..data.splices import Splices
from ..environment import WORKERS_REFUSED
from ..errors import XTFError, XTFUserError
from ..plan import UNFILTERED, Plan, make_plan, scores_of
from ..scoring.batching import ScoringStats, default_batch_tokens
from ..scoring.cached_scores import ReferenceProvider, ScoreSource, frozen_scorers, run_scorers
from ..scoring.engine import score
from ..scoring.fingerprint import base_tensors
from ..scoring.reference import Reference
from ..selection.select import Selection, rule_bits, select
from ..selection.text_rules import TextRules
from ..store.records import Lookup, StoredScores
from .verification import Candidate, Ids, token_hash

logger = logging.getLogger(__name__)

OnYield = Callable[[int], None]
Visible = Callable[[Any], dict[str, Any]]
Providers = Callable[[DocumentSet], ReferenceProvider]

CHUNK_BATCHES = 4  # scoring batches per chunk: enough to sort documents by length, with a short wait
CHUNK_ROWS = 1_024  # rows per chunk at most, however short they are
MAX_HALVINGS = 4  # of the batch size that later chunks start with, after memory ran out


class Stream:
    """Scores the documents of a streamed dataset and selects their tokens as they are read.

    `masks` is what the collator uses; None before `begin`. `seconds` is the time spent so far. Counts of tokens are
    arrays (2 + scores,): all completion tokens, kept ones, and those dropped by the rule of each score.

    Raises XTFUserError for scores that cannot be streamed, see `config.scores.check_streamed`.
    """

    def __init__(self, config: XTFConfig, tokenizer: Any) -> None:
        check_streamed(config.scores, config.report_columns)
        self.config, self.tokenizer = config, tokenizer
        self.masks: LiveMasks | None = None
        self._visible: Visible = dict
        self._stack, self._reference = ExitStack(), _nothing_scored
        self._clear()

    def _clear(self) -> None:
        self._counts: Ints = np.zeros(2 + len(self.config.scores), dtype=np.int64)
        self._rows = self._documents = self._scored = self._halvings = self._sampled = 0
        self.seconds = 0.0
        self._warned: set[str] = set()

    def calibrate(self, dataset: Any, visible: Visible, provider: Providers, *, progress: bool) -> Plan:
        """The plan of the calibration sample: the stream's first `calibration` documents, or all if there are fewer.

        `visible` returns the columns of a row that reach the collator, or refuses the row; `provider` returns the
        provider of the run's reference, given the sample.
        """
        self.close()
        self._visible = visible
        with random_state_kept():
            sample, complete = self._sample(dataset)
        own = provider(sample)
        self._reference = cache(lambda: self._stack.enter_context(own.open()))  # it stays open until `close`
        self._provider = cast(Any, copy(own))
        self._provider.open = lambda: nullcontext(self._reference())
        plan = make_plan(self.config, sample, self._provider, self.tokenizer, progress=progress)
        facts = {"calibration": self.config.calibration, "documents": int(sample.counts.sum())}
        facts |= {"rows": len(sample.row_offsets) - 1, "whole_stream": complete}
        warnings = plan.warnings
        if not complete:
            here = "in the calibration sample"
            warnings = [text.replace(UNFILTERED, f" {here}") for text in warnings]
            warnings = [text.replace("in the whole dataset", here) for text in warnings]
        return replace(plan, warnings=warnings, streaming=facts)

    def begin(self, plan: Plan, retained: int, *, resumed: bool) -> list[str]:
        """Take thresholds, formats and frozen scorers from `calibrate`'s plan; return lines to print.

        `retained`: see `LiveMasks`. `resumed`: whether training starts after the stream's beginning.
        """
        self._clear()
        reference = self._reference()
        self._rules, self._text = plan.selection.rules, plan.text
        source = ScoreSource(self.config, plan.documents, self.tokenizer, self._provider)
        with random_state_kept(reference.device), source:
            self._frozen = frozen_scorers(self.config, source, plan.text, plan.scores.values)
        self.masks = LiveMasks(retained)
        self._add(plan.documents, plan.selection, sample=True)
        self._sampled = 0 if resumed else len(plan.documents.row_offsets) - 1
        if not self.config.reference.model:
            return []
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in base_tensors(reference.model))
        return [f"the reference {reference.name} stays loaded while the stream is trained on: {size / 2**20:,.0f} MiB"]

    def close(self) -> None:
        """Drop the masks and close the reference; a separate one is freed."""
        self.masks, self._reference = None, _nothing_scored
        self._stack.close()

    def around(self, dataset: Any) -> ScoredAhead:
        """The dataset, with every row scored before it is yielded."""
        return ScoredAhead.around(dataset, self._prepare, lambda: CHUNK_BATCHES * self.batch_tokens)

    def metrics(self) -> dict[str, float]:
        """As `report.summary.metrics`, of the rows read so far."""
        tokens, *counts = self._counts.tolist()
        names = ("kept_fraction", *(f"dropped_by/{name}" for name in rule_bits(self.config)))
        return {f"xtf/{name}": count / tokens for name, count in zip(names, counts, strict=True)} if tokens else {}

    @property
    def dropped(self) -> int:
        """The number of dropped completion tokens in the rows read so far."""
        return int(self._counts[0] - self._counts[1])

    def summary(self) -> str:
        """A line to print when training ends."""
        tokens = int(self._counts[0])
        return (
            f"streamed {self._documents:,} documents in {self._rows:,} rows and scored {self._scored:,} of them ahead "
            f"of training, in {self.seconds:.1f} s; {self.dropped / max(tokens, 1):.1%} of {tokens:,} completion "
            "tokens were dropped"
        )

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per scoring batch: halved whenever memory ran out, up to `MAX_HALVINGS` times."""
        chosen, device = self.config.batch_tokens, self._reference().device
        largest = default_batch_tokens(device) if chosen == "auto" else int(chosen)
        return max(1, largest >> min(self._halvings, MAX_HALVINGS))

    def _sample(self, dataset: Any) -> tuple[DocumentSet, bool]:
        """The calibration sample, and whether the stream ends with it."""
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)  # the same sample in every training run, also in a second one in this process
        rows = iter(dataset)
        if rows is dataset:
            raise XTFUserError(
                f"xtf: the streamed train_dataset ({type(dataset).__name__}) is its own iterator, so training would "
                "miss the rows of the calibration sample. Let its __iter__ return a new iterator from the beginning."
            )
        sample, documents = list[dict[str, Any]](), 0
        for row in rows:
            sample.append(self._visible(row))
            documents += len(split_row(sample[-1]))
            if documents >= self.config.calibration:
                break
        if hasattr(rows, "close"):
            rows.close()
        return collect(sample), documents < self.config.calibration

    def _prepare(self, rows: list[Any]) -> OnYield:
        """Score and select the new documents of a chunk; see `ScoredAhead`."""
        masks = self.masks
        assert masks is not None
        start, before = time.perf_counter(), self._rows
        self._rows += len(rows)
        pieces = [piece for row in rows for piece in split_row(self._visible(row))]
        keys = [document_key(ids, completion) for _, ids, completion in pieces]
        new = {key: piece[1:] for key, piece in zip(keys, pieces, strict=True) if masks.touch(key, self._rows) is None}
        if self._sampled and new.keys() == set(keys):  # no error: a stream may shuffle its rows in every iteration
            logger.warning(
                "xtf: none of the first %d rows that training reads from the stream is among the %d rows of the "
                "calibration sample. If the stream can be read only once, the sample's rows are not trained on: let "
                "every iteration start from the beginning. If it shuffles in every iteration, ignore this warning.",
                self._rows,
                self._sampled,
            )
        self._sampled = 0
        labelled = []
        for key, (ids, completion) in new.items():
            if completion.any():
                labelled.append({"input_ids": ids, "labels": np.where(completion, ids, IGNORE_INDEX)})
            else:  # nothing to select
                parts = ids.astype(np.int32), completion.copy(), np.zeros(0, dtype=bool)
                masks.add(key, Entry(*parts, -1, np.zeros_like(self._counts)))
        if labelled:
            self._score_and_select(collect(labelled))
        for key in keys:
            if (counts := masks.touch(key, self._rows)) is not None:
                self._counts += counts
        self._documents += len(keys)
        self.seconds += time.perf_counter() - start
        return lambda index: masks.forget(before + index)

    def _score_and_select(self, documents: DocumentSet) -> None:
        """Add documents, selected as in `make_plan` by thresholds and frozen scorers of the calibration sample."""
        reference = self._reference()
        if not self.config.reference.model:
            check_base(reference.model)
        with random_state_kept(reference.device):
            text = TextRules.find(self.config, documents, self.tokenizer, self._text)
            source = _ChunkSource(self.config, documents, self.tokenizer, reference, self.batch_tokens)
            values = run_scorers(self.config, source, text, self._frozen)
            scores = scores_of(documents, source.logprobs, values)
            selection = select(
                scores, self.config, text.protected, text.forced, text.segments, self._rules, inside=text.inside
            )
        self._scored += source.stats.documents
        self._halvings += source.stats.halvings + source.excerpts.halvings
        for warning in source.warnings + selection.warnings:
            kind = re.sub(r"\d+", "", warning)  # once: other chunks give the same warning with other numbers
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("xtf: in a part of the stream, and perhaps in others: %s", warning)
        self._add(documents, selection)

    def _add(self, documents: DocumentSet, selection: Selection, *, sample: bool = False) -> None:
        """Add keep flags and token counts of documents to `masks`."""
        assert self.masks is not None
        layout = Layout(documents.completion_offsets, documents.counts)
        dropped = [((selection.reasons & bit) > 0) & ~selection.keep for bit in rule_bits(self.config).values()]
        columns = [layout.lengths, layout.count(selection.keep), *(layout.count(flags) for flags in dropped)]
        counts, offsets = np.stack(columns, axis=1).astype(np.int64), documents.completion_offsets
        for index, key in enumerate(documents.keys):
            parts = (*documents.document(index), selection.keep[offsets[index] : offsets[index + 1]])
            ids, completion, keep = (part.copy() for part in parts)  # a view would keep the entire chunk in memory
            entry = Entry(ids, completion, keep, int(selection.best[index]), counts[index].copy())
            self.masks.add(key.tobytes(), entry, sample=sample)


class ScoredAhead(torch.utils.data.IterableDataset[Any]):
    """Replaces a streamed dataset: yields its rows, and calls `prepare` on each chunk before its first row.

    It runs in the main process, which has the model. All other attributes are those of `inner`. Its state
    (`state_dict`) is that of `inner` at the beginning of a chunk and the number of rows yielded since, so that a
    resumed iteration reads again what was only read ahead.

    Args:
        inner: an iterable dataset of rows with `input_ids`.
        prepare: takes a chunk of rows; returns a function that is called with the index of each row before its yield.
        tokens: returns the number of tokens that end a chunk.
    """

    def __init__(self, inner: Any, prepare: Callable[[list[Any]], OnYield], tokens: Callable[[], int]) -> None:
        self.inner, self.prepare, self.tokens = inner, prepare, tokens
        # where the next iteration starts: a state of `inner` (None: its own), and a number of rows to skip
        self._start: tuple[Any, int] = (None, 0)
        self._at = self._start

    @classmethod
    def around(cls, inner: Any, *args: Any) -> ScoredAhead:
        """A `ScoredAhead` with a length if `inner` has one, since trainers treat a stream with a length differently."""
        return (_Sized if hasattr(inner, "__len__") else cls)(inner, *args)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of `inner`, unchanged and in order. Raises XTFUserError in a dataloader worker."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            raise XTFUserError(WORKERS_REFUSED.format(workers=worker.num_workers))
        (state, skipped), self._start = self._start, (None, 0)
        self._at = (state, skipped)
        source = islice(iter(self.inner), skipped, None)
        while chunk := self._chunk(source):
            on_yield = self.prepare(chunk)
            for index, row in enumerate(chunk):
                on_yield(index)
                self._at = (self._at[0], self._at[1] + 1)
                yield row
            self._at = (self.inner.state_dict() if hasattr(self.inner, "state_dict") else None, 0)

    def _chunk(self, source: Iterator[Any]) -> list[Any]:
        rows, tokens, enough = list[Any](), 0, self.tokens()
        for row in islice(source, CHUNK_ROWS):
            rows.append(row)
            tokens += len(row["input_ids"]) if "input_ids" in row else 0  # `prepare` refuses rows without
            if tokens >= enough:
                break
        return rows

    def __getattr__(self, name: str) -> Any:
        """An attribute of `inner`; the methods for its state are replaced by ours, if it has them."""
        if name.startswith("__") or "inner" not in self.__dict__:  # no `inner` yet while this is being copied
            raise AttributeError(name)
        found = getattr(self.inner, name)
        return {"state_dict": self._state, "load_state_dict": self._load}.get(name, found)

    def _state(self) -> dict[str, Any]:
        return dict(zip(("dataset", "rows"), self._at, strict=True))

    def _load(self, state: dict[str, Any]) -> None:
        if state["dataset"] is not None:
            self.inner.load_state_dict(state["dataset"])
        self._start = self._at = (state["dataset"], state["rows"])


class _Sized(ScoredAhead):
    def __len__(self) -> int:
        return len(self.inner)


@dataclass
class Entry:
    """A document with its keep flags."""

    ids: NDArray[np.int32]  # (T,)
    completion: Bools  # (T,)
    keep: Bools  # one flag per completion token
    best: int  # see `MaskTable`
    counts: Ints  # token counts, see `Stream`
    row: int = 0  # index of the last row that held it


class LiveMasks:
    """Keep flags by document key: the sample's documents for the entire run, others for some rows.

    A stream may have no end, so a document is removed `retained` rows after the last row that held it. Looking it up
    later is an error, since it could only be left unmasked.
    """

    def __init__(self, retained: int) -> None:
        self.retained = retained
        self._sample: dict[bytes, Entry] = {}
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # by last row, oldest first
        self._by_tokens: defaultdict[int, dict[bytes, Entry]] = defaultdict(dict)

    def lookup(self, key: bytes) -> tuple[Bools, int]:
        """See `MaskTable.lookup`. Raises XTFError for a document that was not read from the stream, or was removed."""
        entry = self._entries.get(key) or self._sample.get(key)
        if entry is None:
            raise XTFError(
                "a training row holds a document that xtf did not read from the stream, or read more than "
                f"{self.retained} rows earlier. Attach xtf after the last change to trainer.train_dataset, and let no "
                "dataloader of your own buffer or rebuild its rows."
            )
        return entry.keep, entry.best

    def touch(self, key: bytes, row: int) -> Ints | None:
        """Record that a row holds a document; its counts, or None if it has to be added first."""
        entry = self._entries.get(key) or self._sample.get(key)
        if entry is None:
            return None
        entry.row = row
        if key in self._entries:
            self._entries.move_to_end(key)
        return entry.counts

    def add(self, key: bytes, entry: Entry, *, sample: bool = False) -> None:
        """Add a document; documents of the sample are never removed."""
        (self._sample if sample else self._entries)[key] = entry
        self._by_tokens[token_hash(entry.ids)][key] = entry

    def forget(self, row: int) -> None:
        """Remove documents whose last row is more than `retained` rows before `row`."""
        while self._entries and next(iter(self._entries.values())).row < row - self.retained:
            key, entry = self._entries.popitem(last=False)
            same_tokens = self._by_tokens[token_hash(entry.ids)]
            del same_tokens[key]
            if not same_tokens:
                del self._by_tokens[token_hash(entry.ids)]

    def find(self, ids: Ids) -> Iterator[Candidate]:
        """See `verification.Planned`."""
        for entry in self._by_tokens.get(token_hash(ids), {}).values():
            if np.array_equal(entry.ids, ids):
                yield entry.completion, entry.keep


class _ChunkSource(ScoreSource):
    """Scores a few documents with the open reference; nothing is stored."""

    whole = False

    def __init__(
        self, config: XTFConfig, documents: DocumentSet, tokenizer: Any, reference: Reference, batch_tokens: int
    ) -> None:
        provider: Any = SimpleNamespace(text_config=lambda: reference.text_config)
        super().__init__(config, documents, tokenizer, provider)
        self.reference, self.batch_tokens = reference, batch_tokens

    def _scored(
        self, provider: Any, documents: DocumentSet, layers: tuple[int, ...]
    ) -> tuple[StoredScores, dict[str, Any], ScoringStats, Ints]:
        sizes = np.diff(documents.completion_offsets)
        lookup = Lookup(documents.keys, sizes, attention=bool(layers))
        wanted, take, budget = np.flatnonzero(sizes > 0), lookup.take, self.batch_tokens
        stats = score(documents, wanted, self.reference, layers, take, batch_tokens=budget, progress=False)
        self.warnings += self.reference.take_warnings()
        return StoredScores(**lookup.columns), {}, stats, wanted

    def _stored(self, provider: Any, splices: Splices) -> None:
        """Nothing is."""

    def _check(self, logprobs: Floats, about: dict[str, Any], prefix: str = "") -> None:
        """Do not raise if all scores are undefined, as for a dataset: a chunk can be a single document."""


def check_base(model: nn.Module) -> None:
    """Raise XTFUserError if base weights are trained: the base model is the reference throughout a streamed run."""
    trained = [name for name, tensor in base_tensors(model) if tensor.requires_grad]
    if trained:
        raise XTFUserError(
            "xtf: the training data is streamed, so it is scored while the model is trained, and training changes base "
            f"weights ({trained[0]} and {len(trained) - 1} more), so scores would drift. Name the base model under xtf "
            "`reference.model`, train only adapters (use_peft, no `bias`), or do not stream."
        )


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore all random states on exit, so that training draws the same numbers as without XTF."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _nothing_scored() -> Reference:
    raise XTFError("xtf is attached but scored nothing: XTFCallback was removed from the trainer's callbacks.")
