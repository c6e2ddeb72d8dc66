"""Scoring that runs out of memory is retried with smaller batches, and leaves training its memory."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.made_scores import ALL_OFF
from tests.reliability import amount, record
from tests.reliability.trainers import BAND, EVERYTHING, alone, callback, made, model, moved
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from xtf_plugin import XTFConfig, XTFError
from xtf_plugin.data.documents import collect
from xtf_plugin.plan import make_plan
from xtf_plugin.scoring.reference import Reference

SELECTOR = {"selectors": {"odd": {"scorer": "typicality", "unit": "sentence", "drop": {"below": -1.8}}}}
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is limited and measured by Linux")
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": amount(2, 4)}
# bytes: heaps of two runs of the same training are cut otherwise, and the masks' own tables take room
CLOSE = 48 << 20


def cuda(tokens):
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} MiB.")


def allocator(tokens):
    torch.empty(1 << 60, dtype=torch.uint8)  # what no machine has: the error is the CPU allocator's own


@pytest.fixture
def room(monkeypatch):
    """Makes room for so many tokens at a time, in the decoder or after it; gives what each call asked for."""

    def for_tokens(limit, fail, where="_hidden"):
        own, asked = getattr(Reference, where), []

        def greedy(self, given, *args, **kwargs):
            asked.append(given.numel() if where == "_hidden" else len(given))
            if asked[-1] > limit:
                fail(asked[-1])
            return own(self, given, *args, **kwargs)

        monkeypatch.setattr(Reference, where, greedy)
        return asked

    return for_tokens


def plan(folder, documents, reference=None, **block):
    config = XTFConfig.parse({**ATTRIBUTES_ON, **SELECTOR, "cache_dir": str(folder), "batch_tokens": 4096, **block})
    return make_plan(config, documents, Provider(reference), tiny.tokenizer(), progress=False)


DATA = [{name: part * (1 + i % 5) for name, part in row.items()} for i, row in enumerate(rows(60))]


@pytest.fixture(scope="module")
def documents():
    return collect(DATA)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, documents):
    return plan(tmp_path_factory.mktemp("undisturbed"), documents)


@pytest.mark.parametrize("fail", [cuda, allocator])
@pytest.mark.parametrize(("limit", "halvings"), amount([(900, 2), (210, 4)], [(2000, 1), (900, 2), (500, 3), (210, 4)]))
def test_batches_are_halved_and_masks_are_as_without(tmp_path, documents, undisturbed, room, fail, limit, halvings):
    """In the end one document at a time: the longest has 200 tokens."""
    assert 180 < int(documents.lengths.max()) <= 210 and undisturbed.stats.halvings == 0
    asked = room(limit, fail)
    found = plan(tmp_path, documents)
    assert found.stats.documents == len(documents) and found.stats.halvings >= halvings and max(asked) > limit
    largest, changed, unexplained = moved(undisturbed, found)
    assert not unexplained and max(largest.values()) <= BAND
    record("out of memory", runs=1, halvings=found.stats.halvings, changed=changed)


def test_memory_may_run_out_in_the_head_alone(tmp_path, documents, undisturbed, room):
    room(130, cuda, "predictions")
    found = plan(tmp_path, documents)
    assert found.stats.halvings >= 3 and not moved(undisturbed, found)[2]


def test_memory_may_run_out_on_embeddings_alone(tmp_path, documents, room):
    """Those of `embedding: output` are forwards too: thousands of tokens, each alone."""
    block = {**ALL_OFF, "selectors": {}, "task_relevance": {"embedding": "output"}}
    expected = plan(tmp_path / "one", documents, **block)
    room(130, cuda)
    found = plan(tmp_path / "two", documents, **block)
    assert not moved(expected, found)[2]


@pytest.mark.parametrize("fail", [cuda, allocator])
@pytest.mark.parametrize("limit", [170, 20], ids=["a document", "the trial"])
def test_what_does_not_fit_at_all_ends_with_the_setting_to_change(
    tmp_path, documents, undisturbed, room, monkeypatch, fail, limit
):
    """What was scored before is kept: once there is room, the short documents of the first run are not scored again."""
    short = collect([row for row in DATA if len(row["input_ids"]) < 100])
    assert plan(tmp_path, short).stats.documents == len(short) > 20
    room(limit, fail)
    with pytest.raises(XTFError, match=r"out of memory.*reference\.model"):
        plan(tmp_path, documents)
    monkeypatch.undo()
    found = plan(tmp_path, documents)
    assert 0 < found.stats.documents <= len(documents) - len(short)
    assert found.stats.documents + found.stats.stored_documents == len(documents) and not moved(undisturbed, found)[2]
    record("out of memory for good", runs=1, scored=found.stats.documents, kept=found.stats.stored_documents)


def cramped(folder):
    """Scored where the operating system itself refuses memory: what it came to, against a run that has enough."""
    import resource

    data = collect([{name: part * 6 for name, part in row.items()} for row in rows(amount(40, 300))])
    block = {"reference": tiny.model(**LARGE), "reasoning_importance": False}
    roomy = plan(folder / "roomy", data, **block)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (16 << 20), resource.RLIM_INFINITY))
    found = plan(folder / "cramped", data, **block, batch_tokens=65_536)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    largest, changed, unexplained = moved(roomy, found)
    return {"halvings": found.stats.halvings, "largest": largest, "changed": changed, "unexplained": unexplained}


@LINUX
def test_a_process_whose_memory_is_limited(tmp_path):
    found = alone(cramped, tmp_path)
    assert found["halvings"] >= 1 and not found["unexplained"] and max(found["largest"].values()) <= BAND
    record("memory refused by the system", runs=1, halvings=found["halvings"], changed=found["changed"])


def status(name):
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def live():
    """Number and bytes of what PyTorch holds here."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}
    return [len(storages), sum(storages.values())]


class Memory(TrainerCallback):
    """What a process holds when the first step is due, and at most from there on."""

    def __init__(self):
        self.found = {}

    def on_train_begin(self, *args, **kwargs):
        self.found |= {"tensors": live(), "highest before": status("VmHWM"), "before": status("VmRSS")}
        Path("/proc/self/clear_refs").write_text("5")  # the highest is counted again

    def on_train_end(self, *args, **kwargs):
        self.found |= {"tensors afterwards": live(), "highest": status("VmHWM")}


def trained(folder, kind, block):
    data = tiny.problems(amount(45, 60))
    for index, row in enumerate(data):
        row["completion"] *= random.Random(index).randint(4, 12)
    options = {"max_steps": amount(3, 15), "max_length": 512, "save_strategy": "no", "rows": data}
    watched, memory = made(kind, folder, block, model=model(kind, folder, **LARGE), **options), Memory()
    watched.add_callback(memory)
    watched.train()
    own = 0
    if block is not None:
        attached = callback(watched)
        own = attached.collator.counters.nbytes + attached._labels.nbytes
        assert attached.plan.stats.documents == len(data)
    return {**memory.found, "own": own}


@LINUX
@pytest.mark.parametrize("kind", amount(("full",), ("full", "lora", "qlora")))
def test_training_has_the_memory_that_it_has_without(tmp_path, kind):
    block = {**amount({**ATTRIBUTES_ON, "task_relevance": {"embedding": "output"}}, EVERYTHING), "batch_tokens": 16_384}
    stock, ours = (
        alone(trained, tmp_path / name, kind=kind, block=b) for name, b in (("stock", None), ("ours", block))
    )
    for when in ("tensors", "tensors afterwards"):
        assert ours[when] == [stock[when][0] + 2, stock[when][1] + ours["own"]], when
    assert ours["own"] < 10_000
    scoring = ours["highest before"] - stock["highest before"]
    assert scoring > 2 * CLOSE, "scoring takes too little for it to be missed"
    growth = {name: found["highest"] - found["before"] for name, found in (("stock", stock), ("ours", ours))}
    more = ours["highest"] - stock["highest"]
    figures = {"scoring_took": scoring, "training_grew_by": growth["ours"], "stock_training_grew_by": growth["stock"]}
    record(f"memory, {kind}", **{name: f"{value >> 20} MB" for name, value in figures.items()}, more=f"{more >> 20} MB")
    assert growth["ours"] <= growth["stock"] + CLOSE
    assert more <= CLOSE
