"""The dataset that replaces a stream: the same rows, prepared in chunks; its state counts the yielded rows."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from xtf_plugin.training import streaming
from xtf_plugin.training.streaming import ScoredAhead


class TestScoredAhead:
    def made(self, inner):
        self.log = []

        def prepare(chunk):
            self.log.append([row["input_ids"][0] for row in chunk])
            return lambda place: self.log.append(place)

        return ScoredAhead.around(inner, prepare, lambda: 10)

    def stream(self, **options):
        ids = [{"input_ids": [index] * 3} for index in range(11)]
        return Dataset.from_list(ids).to_iterable_dataset(**options)

    def test_rows_are_prepared_in_chunks_before_they_are_yielded(self):
        ahead = iter(self.made(self.stream()))
        assert next(ahead)["input_ids"] == [0, 0, 0] and self.log == [[0, 1, 2, 3], 0]
        assert [row["input_ids"][0] for row in ahead] == list(range(1, 11))
        assert [entry for entry in self.log if isinstance(entry, list)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]

    def test_a_chunk_of_short_rows_ends_by_their_number(self, monkeypatch):
        monkeypatch.setattr(streaming, "CHUNK_ROWS", 2)
        assert next(iter(self.made(self.stream())))["input_ids"] == [0, 0, 0] and self.log == [[0, 1], 0]

    @pytest.mark.parametrize("read", [0, 1, 4, 6, 9, 11])
    def test_a_state_names_the_next_row_whatever_was_read_ahead(self, read):
        first = self.made(self.stream(num_shards=3))
        rows_left = iter(first)
        for _ in range(read):
            next(rows_left)
        state = json.loads(json.dumps(first.state_dict()))
        second = self.made(self.stream(num_shards=3))
        second.load_state_dict(state)
        assert [row["input_ids"][0] for row in second] == [row["input_ids"][0] for row in rows_left]

    def test_everything_else_is_the_inner_datasets(self):
        inner = self.stream(num_shards=3).shuffle(seed=2, buffer_size=4)
        ahead = self.made(inner)
        assert ahead.n_shards == 3 and ahead.column_names == ["input_ids"]
        epochs = []
        for epoch in (0, 1, 0):
            ahead.set_epoch(epoch)
            epochs.append([row["input_ids"][0] for row in ahead])
        assert inner.epoch == 0 and epochs[0] == epochs[2] != epochs[1]
        assert not hasattr(ahead, "__len__") and not hasattr(ahead, "no_such_thing")

    def test_a_length_passes_through(self):
        class Sized(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield {"input_ids": [1]}

            def __len__(self):
                return 1

        ahead = self.made(Sized())
        assert len(ahead) == 1 and not hasattr(ahead, "state_dict") and len(list(ahead)) == 1
