"""Streamed data: thresholds from a calibration sample, then every stretch of rows is scored before it is trained on.

Thresholds over a dataset need a dataset, and a stream never is one. So the first documents of the stream stand for it:
they make an ordinary plan, whose thresholds, domain and scale are kept for all that follows.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .config import XTFConfig
from .config_selectors import check_streamed
from .documents import IGNORE_INDEX, DocumentSet, collect, document_key, split_row
from .errors import XTFError, XTFUserError
from .fingerprint import base_tensors
from .frozen import FrozenPlan
from .held import HeldReference, random_state_kept
from .live_masks import LiveMasks, Tally
from .pipeline import NOTHING_DROPPED, Plan, ReferenceProvider, make_plan
from .segments import Layout
from .selection import Selection, rule_bits
from .stream_dataset import Passed, ScoredAhead

logger = logging.getLogger(__name__)

LOOKAHEAD_BATCHES = 4  # scoring batches read ahead: enough to sort documents by length, little enough to wait for
LOOKAHEAD_ROWS = 1_024  # however short they are


class Stream:
    """The documents of a streamed dataset, scored and decided on as they come.

    Args:
        config: the block.
        tokenizer: the training tokenizer.

    Attributes:
        masks: what the collator looks documents up in; None before `begin`.
        seconds: how long scoring and deciding has taken since `begin`.

    Raises:
        XTFUserError: see `config_selectors.check_streamed`.
    """

    def __init__(self, config: XTFConfig, tokenizer: Any) -> None:
        check_streamed(config.selectors)
        self.config, self.tokenizer = config, tokenizer
        self._visible: Callable[[Any], dict[str, Any]] = dict
        self.masks: LiveMasks | None = None
        self.seconds = 0.0
        self._frozen: FrozenPlan | None = None
        self._held: HeldReference | None = None
        self._counts: Tally = np.zeros(2 + len(config.voters), dtype=np.int64)
        self._rows = self._documents = self._sampled = 0
        self._told: set[str] = set()

    def calibrate(
        self,
        dataset: Any,
        visible: Callable[[Any], dict[str, Any]],
        provider: Callable[[DocumentSet], ReferenceProvider],
        *,
        progress: bool,
    ) -> Plan:
        """The plan of the first documents of the stream, `calibration` of them, or all if there are fewer.

        Args:
            dataset: is iterated over once, from its beginning.
            visible: gives what of a row reaches the collator, or refuses the row.
            provider: of the run's own reference, given the sample.
            progress: show a bar.
        """
        self.close()
        self._visible = visible
        with random_state_kept():
            sample, whole = self._sample(dataset)
        self._held = HeldReference(provider(sample), trained=not self.config.reference.model)
        plan = make_plan(self.config, sample, self._held, self.tokenizer, progress=progress)
        facts = {
            "calibration": self.config.calibration,
            "documents": int(sample.counts.sum()),
            "rows": len(sample.row_offsets) - 1,
            "whole_stream": whole,
        }
        return replace(plan, streaming=facts, warnings=plan.warnings if whole else _of_the_sample(plan.warnings))

    def begin(self, plan: Plan, retained: int, *, resumed: bool) -> list[str]:
        """Keep the plan's thresholds from here on; the reference stays open until `close`.

        Args:
            plan: from `calibrate`.
            retained: how many rows after its last row a document may still be asked for.
            resumed: whether training goes on somewhere behind the stream's beginning.

        Returns:
            what to tell about it.
        """
        assert self._held is not None
        reference = self._held.reference()
        with random_state_kept(reference.device):
            self._frozen = FrozenPlan(plan, reference, self.tokenizer)
        self.masks = LiveMasks(
            plan.documents, plan.selection, tallies(plan.documents, plan.selection, self.config), retained
        )
        self._counts[:] = self._rows = self._documents = 0
        self._sampled = 0 if resumed else len(plan.documents.row_offsets) - 1
        self.seconds = 0.0
        self._told.clear()
        if not self.config.reference.model:
            return []
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in base_tensors(reference.model))
        return [f"the reference {reference.name} stays loaded while the stream is trained on: {size / 2**20:,.0f} MiB"]

    def close(self) -> None:
        """Free a separate reference."""
        self._frozen = self.masks = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def around(self, dataset: Any) -> ScoredAhead:
        """The dataset with every row scored before it is yielded."""
        return ScoredAhead.around(dataset, self._prepare, self._tokens, LOOKAHEAD_ROWS)

    def metrics(self) -> dict[str, float]:
        """As `summary.metrics`, of the rows read so far."""
        tokens, kept, *dropped = self._counts.tolist()
        names = ("kept_fraction", *(f"dropped_by/{name}" for name in rule_bits(self.config)))
        counts = (kept, *dropped)
        return {f"xtf/{name}": count / tokens for name, count in zip(names, counts, strict=True)} if tokens else {}

    @property
    def dropped(self) -> int:
        """How many completion tokens of the rows read so far are dropped."""
        return int(self._counts[0] - self._counts[1])

    def summary(self) -> str:
        """What was done, for the end of training."""
        tokens, kept, *_ = self._counts.tolist()
        scored = 0 if self._frozen is None else self._frozen.stats.documents
        share = (tokens - kept) / max(tokens, 1)
        return (
            f"streamed {self._documents:,} documents in {self._rows:,} rows and scored {scored:,} of them ahead of "
            f"training, in {self.seconds:.1f} s; {share:.1%} of {tokens:,} completion tokens were "
            "dropped"
        )

    def _tokens(self) -> int:
        return LOOKAHEAD_BATCHES * self._ready()[0].batch_tokens

    def _ready(self) -> tuple[FrozenPlan, LiveMasks]:
        if self._frozen is None or self.masks is None:
            raise XTFError("xtf is attached but scored nothing: XTFCallback was removed from the trainer's callbacks.")
        return self._frozen, self.masks

    def _sample(self, dataset: Any) -> tuple[DocumentSet, bool]:
        """The first documents, and whether the stream ends with them."""
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)  # the same sample in every training run, also in a second one in this process
        found, ended = 0, False
        rows = iter(dataset)
        if rows is dataset:
            raise XTFUserError(
                f"xtf: the streamed train_dataset ({type(dataset).__name__}) is its own iterator: what is read of it "
                "for the calibration sample would be gone for training. Let its __iter__ give a new iterator each "
                "time, from the stream's beginning (a method that yields does)."
            )

        def first() -> Iterator[Mapping[str, Any]]:
            nonlocal found, ended
            while found < self.config.calibration:
                row = next(rows, None)
                if row is None:
                    ended = True
                    return
                seen = self._visible(row)
                found += len(split_row(seen))
                yield seen

        sample = collect(first())
        if hasattr(rows, "close"):
            rows.close()
        return sample, ended

    def _prepare(self, rows: list[Any]) -> Passed:
        """Decide on every document of the rows that is not known; see `ScoredAhead`."""
        frozen, masks = self._ready()
        start, before = time.perf_counter(), self._rows
        self._rows += len(rows)
        documents = [piece for row in rows for piece in split_row(self._visible(row))]
        keyed = [(document_key(ids, completion), ids, completion) for _, ids, completion in documents]
        self._compare({key for key, _, _ in keyed}, masks)
        new = {}
        for key, ids, completion in keyed:
            if masks.seen(key, self._rows) is None:
                if completion.any():
                    new[key] = {"input_ids": ids, "labels": np.where(completion, ids, IGNORE_INDEX)}
                else:
                    masks.add_unlabelled(key, ids, len(self._counts), self._rows)
        if new:
            self._decide(frozen, masks, collect(new.values()))
        for key, _, _ in keyed:
            tally = masks.seen(key, self._rows)
            assert tally is not None
            self._counts += tally
        self._documents += len(keyed)
        self.seconds += time.perf_counter() - start
        return lambda place: masks.forget(before + place)

    def _compare(self, keys: set[bytes], masks: LiveMasks) -> None:
        """Tell if what a training reads first is nothing of what the sample read first. No reason to stop: a stream may
        draw its rows in another order each time.
        """
        if self._sampled and all(masks.seen(key, self._rows) is None for key in keys):
            logger.warning(
                "xtf: none of the first %d rows that training reads from the stream is among the %d rows that were "
                "read for the calibration sample. If the stream can be read only once (an iterator or a connection "
                "that its iterations share), the sample's rows are not trained on: let every iteration begin anew. If "
                "it draws its rows in another order each time, all is well.",
                self._rows,
                self._sampled,
            )
        self._sampled = 0

    def _decide(self, frozen: FrozenPlan, masks: LiveMasks, documents: DocumentSet) -> None:
        assert self._held is not None
        self._held.check()
        with random_state_kept(frozen.reference.device):
            selection = frozen.select(documents)
        for told in frozen.warnings:
            kind = re.sub(r"\d+", "", told)  # one telling of each; the next stretch would bring other numbers
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("xtf: in a stretch of the stream (and perhaps in others): %s", told)
        masks.add(documents, selection, tallies(documents, selection, self.config), self._rows)


def _of_the_sample(warnings: list[str]) -> list[str]:
    """What a plan of the whole dataset would tell, of a sample of it."""
    told = ["nothing at all is dropped in the calibration sample" if w == NOTHING_DROPPED else w for w in warnings]
    return [warning.replace("in the whole dataset", "in the calibration sample") for warning in told]


def tallies(documents: DocumentSet, selection: Selection, config: XTFConfig) -> Tally:
    """Counts of each document's completion tokens, (N, 2 + voters): all, kept, and dropped by each voter."""
    layout = Layout(documents.completion_offsets, documents.counts)
    dropped = [((selection.reasons & bit) > 0) & ~selection.keep for bit in rule_bits(config).values()]
    counts = [layout.lengths, layout.count(selection.keep), *(layout.count(flags) for flags in dropped)]
    return np.stack(counts, axis=1).astype(np.int64)
