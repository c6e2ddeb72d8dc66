"""Streamed data: thresholds from a calibration sample, then every stretch of rows is scored before it is trained on.

Thresholds over a dataset need a dataset, and a stream is none. So the first documents of the stream stand for it: they
make an ordinary plan, whose thresholds, domain and scale are kept for all that follows. Scores are not stored: a stream
may have no end, and looking a few documents up among millions takes longer than scoring them.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from .batches import ScoringStats, default_batch_tokens
from .cached_scores import ReferenceProvider, ScoreSource, frozen_scorers, run_scorers
from .config.block import XTFConfig
from .config.scores import check_streamed
from .data.documents import IGNORE_INDEX, DocumentSet, collect, document_key, split_row
from .data.ragged import Layout
from .errors import XTFError, XTFUserError
from .fingerprint import base_tensors
from .live_masks import Entry, LiveMasks, Tally
from .plan import NOTHING_DROPPED, Plan, make_plan, scores_of
from .records import Lookup, StoredScores, column_names
from .reference import Reference
from .scorer import score
from .selection.select import Selection, rule_bits, select
from .selection.text_rules import TextRules
from .stream_dataset import Passed, ScoredAhead

logger = logging.getLogger(__name__)

LOOKAHEAD_BATCHES = 4  # scoring batches read ahead: enough to sort documents by length, little enough to wait for
LOOKAHEAD_ROWS = 1_024  # however short they are
MAX_HALVINGS = 4  # of the batches; if memory is shorter than that, each stretch finds out again


class Stream:
    """The documents of a streamed dataset, scored and decided on as they come.

    The collator looks documents up in `masks`, which is None before `begin`. `seconds`: how long scoring and deciding
    has taken. Raises XTFUserError for selectors that cannot be streamed, see `config.scores.check_streamed`.
    """

    def __init__(self, config: XTFConfig, tokenizer: Any) -> None:
        check_streamed(config.scores)
        self.config, self.tokenizer = config, tokenizer
        self.masks: LiveMasks | None = None
        self._visible: Callable[[Any], dict[str, Any]] = dict
        self._stack, self._reference = ExitStack(), _nothing_scored
        self._clear()

    def _clear(self) -> None:
        self._counts: Tally = np.zeros(2 + len(self.config.scores), dtype=np.int64)
        self._rows = self._documents = self._scored = self._halvings = self._sampled = 0
        self.seconds = 0.0
        self._warned: set[str] = set()

    def calibrate(
        self,
        dataset: Any,
        visible: Callable[[Any], dict[str, Any]],
        provider: Callable[[DocumentSet], ReferenceProvider],
        *,
        progress: bool,
    ) -> Plan:
        """The plan of the first documents of the stream, `calibration` of them, or all if there are fewer.

        `visible` gives what of a row reaches the collator, or refuses the row; `provider` that of the run's own
        reference, for the sample.
        """
        self.close()
        self._visible = visible
        with random_state_kept():
            sample, whole = self._sample(dataset)
        own = provider(sample)
        opened: Any = SimpleNamespace(fingerprint=own.fingerprint, description=own.description)
        opened.text_config, opened.open = own.text_config, lambda: nullcontext(self._reference())  # it stays open
        self._reference = cache(lambda: self._stack.enter_context(own.open()))
        self._provider = opened
        plan = make_plan(self.config, sample, opened, self.tokenizer, progress=progress)
        facts = {"calibration": self.config.calibration, "documents": int(sample.counts.sum())}
        facts |= {"rows": len(sample.row_offsets) - 1, "whole_stream": whole}
        if not whole:
            nothing = "nothing at all is dropped in the whole dataset"
            warnings = [warning.replace(NOTHING_DROPPED, nothing) for warning in plan.warnings]
            here = "in the calibration sample"
            plan = replace(plan, warnings=[w.replace("in the whole dataset", here) for w in warnings])
        return replace(plan, streaming=facts)

    def begin(self, plan: Plan, retained: int, *, resumed: bool) -> list[str]:
        """Keep the thresholds and frozen scorers of `calibrate`'s plan, and the reference open until `close`.

        `retained`: see `LiveMasks`; `resumed`: whether training goes on somewhere behind the stream's beginning.
        Returns notes for the user.
        """
        self._clear()
        reference = self._reference()
        self._rules = plan.selection.rules
        source = ScoreSource(self.config, plan.documents, self.tokenizer, self._provider)
        with random_state_kept(reference.device), source:
            self._frozen = frozen_scorers(self.config, source)
        self.masks = LiveMasks(retained)
        self._add(plan.documents, plan.selection, sample=True)
        self._sampled = 0 if resumed else len(plan.documents.row_offsets) - 1
        if not self.config.reference.model:
            return []
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in base_tensors(reference.model))
        return [f"the reference {reference.name} stays loaded while the stream is trained on: {size / 2**20:,.0f} MiB"]

    def close(self) -> None:
        """Free a separate reference."""
        self.masks, self._reference = None, _nothing_scored
        self._stack.close()

    def around(self, dataset: Any) -> ScoredAhead:
        """The dataset with every row scored before it is yielded."""
        return ScoredAhead.around(
            dataset, self._prepare, lambda: LOOKAHEAD_BATCHES * self.batch_tokens, LOOKAHEAD_ROWS
        )

    def metrics(self) -> dict[str, float]:
        """As `report.metrics`, of the rows read so far."""
        tokens, *counts = self._counts.tolist()
        names = ("kept_fraction", *(f"dropped_by/{name}" for name in rule_bits(self.config)))
        return {f"xtf/{name}": count / tokens for name, count in zip(names, counts, strict=True)} if tokens else {}

    @property
    def dropped(self) -> int:
        """How many completion tokens of the rows read so far are dropped."""
        return int(self._counts[0] - self._counts[1])

    def summary(self) -> str:
        """What was done, for the end of training."""
        tokens = int(self._counts[0])
        return (
            f"streamed {self._documents:,} documents in {self._rows:,} rows and scored {self._scored:,} of them ahead "
            f"of training, in {self.seconds:.1f} s; {self.dropped / max(tokens, 1):.1%} of {tokens:,} completion "
            "tokens were dropped"
        )

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per scoring batch: halved each time that memory ran out, up to `MAX_HALVINGS` times."""
        chosen, device = self.config.batch_tokens, self._reference().device
        whole = default_batch_tokens(device) if chosen == "auto" else int(chosen)
        return max(1, whole >> min(self._halvings, MAX_HALVINGS))

    def _sample(self, dataset: Any) -> tuple[DocumentSet, bool]:
        """The first documents, and whether the stream ends with them."""
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)  # the same sample in every training run, also in a second one in this process
        rows, ended = iter(dataset), False
        if rows is dataset:
            raise XTFUserError(
                f"xtf: the streamed train_dataset ({type(dataset).__name__}) is its own iterator: what is read of it "
                "for the calibration sample would be gone for training. Let its __iter__ give a new iterator each "
                "time, from the stream's beginning (a method that yields does)."
            )

        def first() -> Iterator[Mapping[str, Any]]:
            nonlocal ended
            found = 0
            for row in rows:
                yield (seen := self._visible(row))
                found += len(split_row(seen))
                if found >= self.config.calibration:
                    return
            ended = True

        sample = collect(first())
        if hasattr(rows, "close"):
            rows.close()
        return sample, ended

    def _prepare(self, rows: list[Any]) -> Passed:
        """Decide on every document of the rows that is not known; see `ScoredAhead`."""
        masks = self.masks
        assert masks is not None
        start, before = time.perf_counter(), self._rows
        self._rows += len(rows)
        pieces = [piece for row in rows for piece in split_row(self._visible(row))]
        keys = [document_key(ids, completion) for _, ids, completion in pieces]
        new = {key: piece[1:] for key, piece in zip(keys, pieces, strict=True) if masks.seen(key, self._rows) is None}
        if self._sampled and new.keys() == set(keys):  # no error: a stream may draw its rows in another order
            logger.warning(
                "xtf: none of the first %d rows that training reads from the stream is among the %d rows that were "
                "read for the calibration sample. If the stream can be read only once (an iterator or a connection "
                "that its iterations share), the sample's rows are not trained on: let every iteration begin anew. If "
                "it draws its rows in another order each time, all is well.",
                self._rows,
                self._sampled,
            )
        self._sampled = 0
        labelled = []
        for key, (ids, completion) in new.items():
            if completion.any():
                labelled.append({"input_ids": ids, "labels": np.where(completion, ids, IGNORE_INDEX)})
            else:  # nothing to decide
                parts = ids.astype(np.int32), completion.copy(), np.zeros(0, dtype=bool)
                masks.add(key, Entry(*parts, -1, np.zeros_like(self._counts)))
        if labelled:
            self._decide(collect(labelled))
        for key in keys:
            if (tally := masks.seen(key, self._rows)) is not None:
                self._counts += tally
        self._documents += len(keys)
        self.seconds += time.perf_counter() - start
        return lambda place: masks.forget(before + place)

    def _decide(self, documents: DocumentSet) -> None:
        reference = self._reference()
        if not self.config.reference.model:
            check_base(reference.model)
        with random_state_kept(reference.device):
            selection, warnings = self._select(documents, reference)
        for warning in warnings:
            kind = re.sub(r"\d+", "", warning)  # each once; the next stretch would bring other numbers
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("xtf: in a stretch of the stream (and perhaps in others): %s", warning)
        self._add(documents, selection)

    def _select(self, documents: DocumentSet, reference: Reference) -> tuple[Selection, list[str]]:
        """Equals the selection of `make_plan`, with thresholds and frozen scorers of the calibration sample."""
        text = TextRules.find(self.config, documents, self.tokenizer)
        source = _StreamSource(self.config, documents, self.tokenizer, reference, self.batch_tokens)
        values = run_scorers(self.config, source, text, self._frozen)
        scores = scores_of(documents, source.known, values)
        selection = select(scores, self.config, text.protected, text.forced, text.segments, self._rules)
        self._scored += source.stats.documents
        self._halvings += source.stats.halvings + source.excerpts.halvings
        return selection, source.warnings + selection.warnings

    def _add(self, documents: DocumentSet, selection: Selection, *, sample: bool = False) -> None:
        """Keep masks of the documents, with a tally of each one's tokens (2 + voters,): all, kept, dropped by each."""
        assert self.masks is not None
        layout = Layout(documents.completion_offsets, documents.counts)
        dropped = [((selection.reasons & bit) > 0) & ~selection.keep for bit in rule_bits(self.config).values()]
        counts = [layout.lengths, layout.count(selection.keep), *(layout.count(flags) for flags in dropped)]
        self.masks.add_all(documents, selection, np.stack(counts, axis=1).astype(np.int64), sample=sample)


class _StreamSource(ScoreSource):
    """The run's own reference on a few documents; nothing is looked up or kept."""

    whole = False

    def __init__(
        self, config: XTFConfig, documents: DocumentSet, tokenizer: Any, reference: Reference, budget: int
    ) -> None:
        provider: Any = SimpleNamespace(text_config=lambda: reference.text_config)
        super().__init__(config, documents, tokenizer, provider)
        self.reference, self.budget = reference, budget

    def _scored(
        self, provider: Any, documents: DocumentSet, layers: tuple[int, ...]
    ) -> tuple[StoredScores, dict[str, Any], ScoringStats, int]:
        sizes = np.diff(documents.completion_offsets)
        lookup = Lookup(documents.keys, sizes, column_names(attention=bool(layers)))
        wanted = np.flatnonzero(sizes > 0)
        stats = score(documents, wanted, self.reference, layers, lookup.take, batch_tokens=self.budget, progress=False)
        return lookup.scores, {}, stats, 0

    def _check(self, scores: StoredScores, about: dict[str, Any], prefix: str = "") -> None:
        """The sample was checked; in a few documents all scores may well be undefined."""


def check_base(model: nn.Module) -> None:
    """Refuse a model whose base weights are trained (XTFUserError): it is the reference throughout a streamed run."""
    trained = [name for name, tensor in base_tensors(model) if tensor.requires_grad]
    if trained:
        raise XTFUserError(
            f"xtf: the training data is streamed, so scoring goes on while the model is trained, but training changes "
            f"its base weights ({trained[0]} and {len(trained) - 1} more): scores would drift. Name the base model "
            "under xtf `reference.model`, train adapters alone (use_peft, no `bias`), or do not stream."
        )


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put all random states back at the end, so that training draws the same numbers as without XTF."""
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
