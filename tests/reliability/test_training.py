"""The loss is stock TRL's over the kept labels, and scoring changes no state that training depends on."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

from tests import tiny
from tests.reliability import amount, record
from tests.reliability.trainers import EVERYTHING, KINDS, State, around_scoring, callback, made, ranks
from tests.training.test_callback import trainer
from xtf_plugin import XTFError, attach
from xtf_plugin import plan as planning
from xtf_plugin.report import writer
from xtf_plugin.scoring import branches, cached_scores
from xtf_plugin.scoring.kernels import dispatch, eager
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.store.store import ScoreStore
from xtf_plugin.training.callback import XTFCallback

FILLER = " Sure, happy to help!"
UNEVEN = {"preset": "none", "force_drop": [FILLER.strip()], "protect": {"special_tokens": False}}
NEVER = {
    "odd": {"drop": {"below": -1000.0}},
    "looked_at": {"drop": {"below": 0.0}},
    "new": {"drop": {"known_above": 1.0}},
    "close": {"drop": {"below": 0.0}},
}
NOTHING = {
    "reasoning_importance": {**EVERYTHING["reasoning_importance"], "drop": {"below": -1000.0}},
    "knowledge_novelty": {**EVERYTHING["knowledge_novelty"], "drop": {"below": 0.0}},
    "task_relevance": {"drop": {"below": -1000.0}},
    "selectors": {name: {**part, **NEVER[name]} for name, part in EVERYTHING["selectors"].items()},
}
PLAIN = {"max_length": 1000, "learning_rate": 0.0, "max_grad_norm": 0.0, "shuffle_dataset": False}


def uneven(n):
    """Answers of which three tokens are kept, or three hundred."""
    problems = [row["completion"].replace(FILLER, "") for row in tiny.problems(12 * n, seed=3)]
    answers = ["".join(problems[12 * i : 12 * i + 12]) if i % 3 == 0 else FILLER * (3 + i) + " No." for i in range(n)]
    return [{"prompt": f"{i}?", "completion": answer} for i, answer in enumerate(answers)]


def kept(made) -> dict[tuple[int, ...], list[int]]:
    """Positions that train, by a document's token ids; from the score table that a run leaves."""
    table = pq.read_table(Path(made.args.output_dir) / "xtf/scores.parquet").to_pydict()
    found = {}
    for row, ids in enumerate(made.train_dataset["input_ids"]):
        rows = (table["row"], table["position"], table["kept"])
        found[tuple(ids)] = [at for where, at, flag in zip(*rows, strict=True) if where == row and flag and at > 0]
    return found


def likelihoods(model, ids, positions):
    """Sum of the negative log-likelihoods of some tokens of a document that is read on its own."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return -sum(logits[at - 1].log_softmax(-1)[ids[at]] for at in positions)


def closed_form(batches, positions):
    """Loss and gradient of one update by definition, and the mean of its micro-batches' own means."""
    model = tiny.model()
    sums = [sum(likelihoods(model, ids, positions[tuple(ids)]) for ids in batch) for batch in batches]
    counts = [sum(len(positions[tuple(ids)]) for ids in batch) for batch in batches]
    loss = sum(sums) / sum(counts)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    return float(loss), gradient, float(np.mean([float(s) / c for s, c in zip(sums, counts, strict=True)]))


def agree(updates, losses, gradients, positions):
    """Compare every update with the closed form; return by how much another denominator would change the loss."""
    others, off = [], 0.0
    for batches, loss, gradient in zip(updates, losses, gradients, strict=True):
        expected, direction, otherwise = closed_form(batches, positions)
        assert loss == pytest.approx(expected, rel=1e-5)
        off = max(off, abs(loss - expected) / expected)
        np.testing.assert_allclose(gradient, direction, rtol=1e-3, atol=1e-6 * np.abs(direction).max())
        others.append(abs(otherwise - expected) / expected)
    record("loss by its definition", updates=len(losses), off=off, with_another_denominator=max(others))
    return others


class Steps(TrainerCallback):
    """What each step was given and came to: documents of every micro-batch, losses, and gradients before the update."""

    def __init__(self, watched):
        self.batches, self.losses, self.gradients = [], [], []
        self.ends = []  # how many micro-batches there were up to each update
        step = watched.training_step

        def spy(model, inputs, *args, **kwargs):
            self.batches.append([ids.tolist() for ids in _documents(inputs)])
            loss = step(model, inputs, *args, **kwargs)
            self.losses.append(float(loss))
            return loss

        watched.training_step = spy
        watched.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.ends.append(len(self.losses))
        parts = [p.grad.flatten().float() for p in model.parameters() if p.requires_grad]
        self.gradients.append(torch.cat(parts).numpy())


def _documents(inputs):
    """Token ids of the documents of a batch: padding away, packed rows cut."""
    for row, ids in enumerate(inputs["input_ids"]):
        mask = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
        places = inputs["position_ids"][row] if "position_ids" in inputs else mask.cumsum(0) - 1
        starts = torch.nonzero((places == 0) & mask).flatten().tolist()
        for low, high in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[low:high][mask[low:high]]


def run(folder, block, rows, **options):
    watched = trainer(folder, rows=rows, **{**PLAIN, **options})
    attach(watched, {"cache_dir": str(folder / "cache"), **block})
    steps = Steps(watched)
    watched.train()
    return watched, steps


def updates_of(steps):
    """Micro-batches of each update, and the loss that it is made of."""
    bounds = list(itertools.pairwise([0, *steps.ends]))
    return [steps.batches[a:b] for a, b in bounds], [sum(steps.losses[a:b]) for a, b in bounds]


PACKED = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
BY_ROW, BY_TWO = {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 2}
FLAT = {"padding_free": True, "max_length": None}
MORE = [(1, BY_ROW), (3, BY_TWO), (8, BY_ROW), (4, PACKED), (2, BY_TWO | FLAT)]
UPDATES = [(4, BY_ROW), (2, PACKED), *amount([], MORE)]


@pytest.mark.parametrize(("accumulated", "options"), UPDATES)
def test_the_denominator_is_the_kept_labels_of_the_whole_update(tmp_path, accumulated, options):
    """10 rows: the last update of the epoch has fewer micro-batches than the others."""
    rows, epoch = uneven(10), {"num_train_epochs": 1, "max_steps": -1}
    plain, _ = run(tmp_path / "plain", UNEVEN, rows, max_steps=1)
    watched, steps = run(tmp_path / "out", UNEVEN, rows, gradient_accumulation_steps=accumulated, **epoch, **options)
    updates, losses = updates_of(steps)
    assert sum(len(batch) for batches in updates for batch in batches) == 10
    others = agree(updates, losses, steps.gradients, kept(plain))
    assert accumulated == 1 or max(others) > 0.01, "masks must be uneven, or any denominator would do"
    logged = [entry["loss"] for entry in watched.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)


def on_a_rank(folder, rows, accumulated):
    """What one rank trains on, and comes to."""
    watched, steps = run(folder, UNEVEN, rows, gradient_accumulation_steps=accumulated, **BY_ROW)
    np.savez(folder / "gradients.npz", *steps.gradients)
    updates, losses = updates_of(steps)
    return {"updates": updates, "losses": losses}


@pytest.mark.parametrize("size", [2, *amount((), (3,))])
def test_the_denominator_is_the_kept_labels_of_all_ranks(tmp_path, size):
    """Stock TRL counts the labels of all ranks and DDP averages gradients: each rank's loss is `size` of its part."""
    rows = uneven(12)
    plain, _ = run(tmp_path / "plain", UNEVEN, rows, max_steps=1)
    found = ranks(on_a_rank, tmp_path / "ranks", size, rows=rows, accumulated=2)
    updates = [sum(parts, []) for parts in zip(*(one["updates"] for one in found), strict=True)]
    losses = [sum(parts) / size for parts in zip(*(one["losses"] for one in found), strict=True)]
    arrays = [np.load(tmp_path / f"ranks/rank-{rank}/gradients.npz") for rank in range(size)]
    for name in arrays[0].files:
        assert all(np.array_equal(one[name], arrays[0][name]) for one in arrays), "ranks took different steps"
    assert max(agree(updates, losses, [arrays[0][name] for name in arrays[0].files], kept(plain))) > 0.02


@pytest.mark.parametrize("floor", [1, 0])
def test_a_batch_of_which_everything_is_dropped_has_a_finite_loss(tmp_path, floor):
    """Each document keeps `min_kept` tokens; without them, one label of the batch is restored."""
    block = {
        "preset": "none",
        "knowledge_novelty": {"drop": {"unknown_below": 0.999}},
        "protect": {"special_tokens": False, "patterns": ["Zoe"]},
        "min_kept": floor,
    }
    rows = [*tiny.problems(7), {"prompt": "Who?", "completion": " Zoe"}]
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "max_steps": -1}
    watched, steps = run(tmp_path, block, rows, gradient_accumulation_steps=2, **options)
    assert len(steps.losses) == 4 and np.isfinite(steps.losses).all() and min(steps.losses) > 0.1
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3 for gradient in steps.gradients)
    if floor:
        positions = kept(watched)
        assert sorted(len(where) for where in positions.values())[:7] == [1] * 7
        updates, losses = updates_of(steps)
        agree(updates, losses, steps.gradients, positions)


def first_steps(folder, kind, block, **options):
    """Losses, gradients and weights of the first steps, as they are to the last bit."""
    settings = {"max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    watched = made(kind, folder, block, **{**settings, **options})
    steps = Steps(watched)
    watched.train()
    assert len(steps.gradients) == 3
    plan = None if block is None else callback(watched).plan
    assert plan is None or (plan.stats.documents > 0 and plan.selection.keep.all())
    weights = [p.detach().float().numpy().copy() for p in watched.model.parameters() if p.requires_grad]
    return steps.batches, steps.losses, steps.gradients, weights


NOISE, PACKING = {"neftune_noise_alpha": 5.0}, {"packing": True, "max_length": 200}
VARIANTS = [("full", {"dataloader_num_workers": 2}), ("qlora", NOISE)]
MORE = [("full", {"bf16": True}), ("qlora", {}), ("qlora", {"bf16": True}), ("lora", PACKING), ("full", NOISE)]


@pytest.mark.parametrize(("kind", "options"), [*VARIANTS, *amount((), MORE)])
def test_first_steps_with_a_block_that_drops_nothing_are_stock_ones(tmp_path, kind, options):
    """Dropout, noise on embeddings, gradient checkpointing: every random number is drawn where it would have been."""
    stock = first_steps(tmp_path / "stock", kind, None, **options)
    ours = first_steps(tmp_path / "ours", kind, NOTHING, **options)
    assert ours[0] == stock[0] and ours[1] == stock[1]
    pairs = list(zip([*ours[2], *ours[3]], [*stock[2], *stock[3]], strict=True))
    unlike = [index for index, (one, two) in enumerate(pairs) if not np.array_equal(one, two)]
    assert unlike == []
    record("first steps", runs=1, steps=len(stock[1]), gradients=sum(map(np.size, ours[2])), unlike_stock=len(unlike))


@pytest.mark.parametrize(("kind", "bf16"), [*((kind, False) for kind in KINDS), *amount((), (("qlora", True),))])
def test_scoring_leaves_no_trace(tmp_path, kind, bf16):
    watched = made(kind, tmp_path, EVERYTHING, bf16=bf16)
    found = around_scoring(watched, lambda: State(watched))
    watched.train()
    before, after = found
    assert callback(watched).plan.stats.documents == 24
    differing = before.differences(after)
    assert len(before.facts) > 1500 and differing == []
    record("state around scoring", runs=1, facts=len(before.facts), differing=len(differing))


def test_scoring_leaves_rotary_embeddings_as_they_were(tmp_path):
    """Those of type longrope are switched by every forward, and all documents here are long ones."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny.model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    watched = made("full", tmp_path, {"preset": "paper"}, model=model)
    found = around_scoring(watched, lambda: State(watched))
    watched.train()
    assert found[0].differences(found[1]) == []


# the place, and in which call of it: the self-check of a reference comes first, then the batches
FAILURES = {
    "the self-check": (Reference, "forward", 1),
    "the plain attention of the self-check": (eager, "attention_and_received", 1),
    "a forward": (Reference, "_hidden", 8),
    "attention": (dispatch, "attention_and_received", 12),
    "a layer": (LlamaMLP, "forward", 14),
    "a shared beginning": (branches, "_states", 5),
    "the head": (Reference, "predictions", 6),
    "the store": (ScoreStore, "add", 1),
    "embeddings": (cached_scores, "gather_vectors", 1),
    "selection": (planning, "select", 1),
    "the report": (writer, "write", 1),
}


def planted(patch, where, error):
    """Every call of a place fails from one on; gives how many there were."""
    owner, name, call = FAILURES[where]
    own, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) >= call:
            raise error("planted")
        return own(*args, **kwargs)

    patch.setattr(owner, name, fail)
    return calls


ERRORS = (KeyboardInterrupt, ZeroDivisionError, torch.OutOfMemoryError)


@pytest.mark.parametrize("error", amount(ERRORS[:1], ERRORS))
@pytest.mark.parametrize("kind", amount(("qlora",), KINDS))
def test_scoring_that_fails_leaves_no_trace(tmp_path, monkeypatch, kind, error):
    watched = made(kind, tmp_path, {**EVERYTHING, "batch_tokens": 200})
    places = amount(
        ("the self-check", "attention", "a layer", "a shared beginning", "the store", "embeddings"), tuple(FAILURES)
    )
    for where, (_, _, call) in ((place, FAILURES[place]) for place in places):
        attached = callback(watched)
        attached.on_train_begin = partial(XTFCallback.on_train_begin, attached)
        attached._borrowed.reference.checked = frozenset()  # so that the self-check runs again
        found = around_scoring(watched, lambda: State(watched))
        with monkeypatch.context() as patch:
            calls = planted(patch, where, error)
            with pytest.raises((error, XTFError)):
                watched.train()
        assert len(calls) >= call, f"{where}: something else failed before"
        differing = found[0].differences(found[1])
        assert differing == [], where
        record("state after failures", failures=1, differing=len(differing))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
