"""Memory, files and threads do not grow over many epochs, plans and trainings in one process."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.reliability import amount, record
from tests.reliability.trainers import EVERYTHING, alone, made
from tests.test_plan import Provider, rows
from xtf_plugin import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.report import writer

# bytes for each round after the warm-up, and for all of them together: a heap is fragmented, and a page is returned
# to the system only when nothing on it is in use
EACH, ALL = 16 << 10, 8 << 20

libc = ctypes.CDLL(None)

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted as Linux lists them")


class Held:
    """What this process holds, round after round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[int]] = {}

    def look(self) -> None:
        gc.collect()
        if hasattr(libc, "malloc_trim"):  # what is free but kept for the next one would come and go by itself
            libc.malloc_trim(0)
        found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        now = {
            "memory": psutil.Process().memory_info().rss,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "processes": len(psutil.Process().children(recursive=True)),
            "tensors": len(found),
            "bytes of tensors": sum(one.nbytes for one in found),
        }
        for name, value in now.items():
            self.rounds.setdefault(name, []).append(value)


class EachEpoch(TrainerCallback):
    """Looks when an epoch begins: its masks are made, its workers are not there yet, those of the last are gone."""

    def __init__(self) -> None:
        self.held = Held()

    def on_epoch_begin(self, *args, **kwargs):
        self.held.look()


def epochs(folder, number, workers):
    """Training whose workers are started again in every epoch."""
    block = {"preset": "default"}
    options = {"max_steps": -1, "num_train_epochs": number, "save_strategy": "no", "logging_strategy": "epoch"}
    watched = made("lora", folder, block, rows=tiny.problems(12), dataloader_num_workers=workers, **options)
    each = EachEpoch()
    watched.add_callback(each)
    watched.train()
    return each.held.rounds


def plans(folder, number):
    """Plans in one process: every other one scores all documents again, the others find their scores."""
    held, data, provider = Held(), rows(8), Provider()
    for index in range(number):
        block = {**EVERYTHING, "knowledge_novelty": {"drop": {"quantile": 0.1 + index % 7 / 100}}}
        config = XTFConfig.parse({**block, "cache_dir": str(folder / f"cache-{index // 2}")})
        plan = make_plan(config, collect(data), provider, tiny.tokenizer(), progress=False)
        assert plan.stats.documents == (0 if index % 2 else 8)
        (folder / "xtf").mkdir(exist_ok=True)
        writer.write(plan, tiny.tokenizer(), folder / "xtf")
        plan.masks()
        del plan
        held.look()
    return held.rounds


def trainings(folder, number):
    """Trainers one after the other, as in a sweep; the hooks of xtf must keep none of them alive."""
    held = Held()
    for index in range(number):
        watched = made("full", folder / str(index % 2), EVERYTHING, rows=tiny.problems(8), max_steps=1)
        watched.train()
        gone = [weakref.ref(watched), weakref.ref(watched.model), weakref.ref(watched._xtf_hooks.collator)]
        del watched
        held.look()
        assert [one() for one in gone] == [None] * 3, "a trainer is held after it has gone"
    return held.rounds


def leaking(folder, number):
    """Rounds that each keep a file, a tensor and as much memory as makes the short form fail."""
    held, kept = Held(), []
    for index in range(number):
        kept.append((open(folder / "file", "w"), torch.zeros(1), b"x" * (ALL + EACH * number)))
        held.look()
        assert len(kept) == index + 1
    return held.rounds


SOAKS = {
    "epochs": (epochs, {"number": amount(6, 200), "workers": 2}),
    "plans": (plans, {"number": amount(8, 250)}),
    "trainings": (trainings, {"number": amount(6, 60)}),
}


def growth(rounds, number):
    """By how much everything grew after the first third, which warms up: allocators, caches of compiled expressions,
    lazy imports; and by how much memory may.
    """
    after = number // 3
    return {what: _later(values[after:]) for what, values in rounds.items()}, ALL + EACH * (number - after)


@pytest.mark.parametrize("name", SOAKS)
def test_nothing_grows(tmp_path, name):
    """The short form, of a few rounds, finds a leak by the exact counts, and in memory one of megabytes a round. The
    long form finds one of some 100 kB in memory.
    """
    function, options = SOAKS[name]
    rounds, number = alone(function, tmp_path, **options), options["number"]
    grown, allowed = growth(rounds, number)
    first = {what: values[number // 3] for what, values in rounds.items()}
    figures = {what: f"{first[what]} and {value:+.0f}" for what, value in grown.items() if what != "memory"}
    memory = f"{first['memory'] >> 20} MB and {grown['memory'] / 2**20:+.1f} MB"
    record(f"soak of {name}", rounds=number, memory=memory, **figures)
    assert grown.pop("memory") <= allowed
    assert grown == dict.fromkeys(grown, 0)


def test_what_grows_is_seen(tmp_path):
    grown, allowed = growth(alone(leaking, tmp_path, number=6), 6)
    assert grown["memory"] > allowed and min(grown[what] for what in ("files", "tensors", "bytes of tensors")) > 0
    assert grown["threads"] == grown["processes"] == 0


def _later(values: list[int]) -> float:
    """By how much the second half lies above the first."""
    half = len(values) // 2
    return statistics.median(values[-half:]) - statistics.median(values[:half])
