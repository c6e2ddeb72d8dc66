"""The dataset that stands in for a streamed one while it is trained on: the same rows, prepared some way ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from .environment import WORKERS_REFUSED
from .errors import XTFUserError

Passed = Callable[[int], None]


class ScoredAhead(torch.utils.data.IterableDataset[Any]):
    """Equals iterating over `inner`, with `prepare` called on every stretch of rows before its first row is yielded.

    It lives in the main process, beside the model. `set_epoch`, `n_shards`, `column_names` and all else are the inner
    dataset's. The state (`state_dict`) is the inner dataset's where a stretch begins, and how many rows of it were
    yielded: rows that are only read ahead come again.

    Args:
        inner: an iterable dataset of rows with `input_ids`.
        prepare: takes a stretch of rows; gives what is to be called with the place of each row as it is yielded.
        tokens: gives the number of tokens with which a stretch is long enough.
        most: the number of rows with which it is, however short they are.
    """

    def __init__(
        self, inner: Any, prepare: Callable[[list[Any]], Passed], tokens: Callable[[], int], most: int
    ) -> None:
        self.inner, self.prepare, self.tokens, self.most = inner, prepare, tokens, most
        # what the next iteration begins with: a state (None: the dataset's own), and rows after it
        self._start: tuple[Any, int] = (None, 0)
        self._at = self._start

    @classmethod
    def around(cls, inner: Any, *how: Any) -> ScoredAhead:
        """With a length exactly if the inner dataset has one: trainers treat a stream with a length otherwise."""
        return (_Sized if hasattr(inner, "__len__") else cls)(inner, *how)

    def __iter__(self) -> Iterator[Any]:
        """The inner dataset's rows, unchanged and in order.

        Raises:
            XTFUserError: in a dataloader's worker, whoever started it.
        """
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            raise XTFUserError(WORKERS_REFUSED.format(workers=worker.num_workers))
        (state, skipped), self._start = self._start, (None, 0)
        self._at = (state, skipped)
        source = islice(iter(self.inner), skipped, None)
        while stretch := self._stretch(source):
            passed = self.prepare(stretch)
            for place, row in enumerate(stretch):
                passed(place)
                self._at = (self._at[0], self._at[1] + 1)
                yield row
            self._at = (self.inner.state_dict() if hasattr(self.inner, "state_dict") else None, 0)

    def _stretch(self, source: Iterator[Any]) -> list[Any]:
        rows, tokens, enough = list[Any](), 0, self.tokens()
        for row in islice(source, self.most):
            rows.append(row)
            tokens += len(row["input_ids"]) if "input_ids" in row else 0  # `prepare` refuses rows without
            if tokens >= enough:
                break
        return rows

    def __getattr__(self, name: str) -> Any:
        """What the inner dataset has; its state in terms of rows that were yielded."""
        if name.startswith("__") or "inner" not in self.__dict__:  # a copy under way has no inner dataset yet
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
