"""One dataset, every shape that stock Axolotl can give it: what it trains on is the same, token by token.

The column for Axolotl of docs/compatibility.md. All of it is 4-bit QLoRA on the CPU through `axolotl train`; what
counts is what a training step is given, read by a recorder that knows nothing of the package.
"""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from tests.axolotl import stock

PACKED = {
    "sample_packing": True,
    "pad_to_sequence_len": True,
    "micro_batch_size": 1,
    "attn_implementation": "sdpa",  # with one, Axolotl leaves the attention mask to position_ids
}
KINDS = {
    "chat": ("chat", {}),
    "chat, users too": ("chat", {"train_on_inputs": True}),
    "alpaca": ("alpaca", {}),
    "alpaca, inputs too": ("alpaca", {"train_on_inputs": True}),
    "text": ("text", {}),
}
SHAPES = {
    "packed": PACKED,
    "packed, no attention backend": {key: PACKED[key] for key in PACKED if key != "attn_implementation"},
    "packed, one after the other": {**PACKED, "sample_packing_sequentially": True},
    "packed, workers": {**PACKED, "dataloader_num_workers": 2},
    "workers": {"dataloader_num_workers": 2},
    "one worker, padded": {"dataloader_num_workers": 1, "pad_to_sequence_len": True},
    "accumulation": {"micro_batch_size": 1, "gradient_accumulation_steps": 3},
    "grouped by length": {"group_by_length": True},
}


def trained_on(out) -> dict[tuple, tuple]:
    """Positions with a label of every document of one epoch, by its token ids; each was trained on once."""
    found = stock.seen(out)
    assert len(found) == len(dict(found)) == stock.ROWS, "a document was trained on twice, or two differ, or one is not"
    return dict(found)


def groups(names, of=lambda name: name):
    """Params that one process runs together, since they share a plain run."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(of(name))) for name in names]


@pytest.fixture
def train(base, tmp_path):
    """Train on a kind of data in some shape; what it was trained on."""

    def run(kind, **changes):
        data, settings = KINDS[kind]
        path = stock.write(base, tmp_path / "out", data, **settings, **changes)
        stock.train(path, tmp_path / "out", tmp_path / "cache")
        return trained_on(tmp_path / "out")

    return run


@pytest.mark.parametrize("kind", groups(KINDS))
def test_labels_are_the_planned_ones(plain, train, kind):
    """Against a stock run without the block: only labels are gone, exactly those that the score table says."""
    data, settings = KINDS[kind]
    out = plain(data, **settings)
    masked, stock_labels = trained_on(out), train(kind, xtf=..., plugins=...)
    assert masked.keys() == stock_labels.keys()
    if settings:  # the setting does what its name says: more labels than without it
        assert sum(map(len, stock_labels.values())) > sum(map(len, trained_on(plain(data)).values()))
    assert all(set(masked[ids]) <= set(stock_labels[ids]) for ids in masked)
    table = pq.read_table(out / "xtf/scores.parquet").to_pylist()
    # position 0 of a document is predicted by nothing, and the recorder leaves it out
    planned = [row for row in table if row["position"] > 0]
    assert len(planned) == sum(map(len, stock_labels.values()))
    assert sum(row["kept"] for row in planned) == sum(map(len, masked.values())) < 0.9 * len(planned)
    by_document: dict[str, dict[int, int]] = {}
    for row in table:
        by_document.setdefault(row["document"], {})[row["position"]] = row["token_id"]
    kept = {name: tuple(r["position"] for r in planned if r["document"] == name and r["kept"]) for name in by_document}
    expected = {(tuple(tokens.items()), kept[name]) for name, tokens in by_document.items()}
    given = {
        one for ids, at in masked.items() for one in expected if at == one[1] and all(ids[p] == t for p, t in one[0])
    }
    assert given == expected and len(expected) == stock.ROWS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.xdist_group("chat")
def test_labels_are_those_of_the_plain_run(plain, train, shape):
    assert train("chat", **SHAPES[shape]) == trained_on(plain("chat"))


@pytest.mark.xdist_group("chat")
def test_packed_rows_two_a_batch(base, plain, tmp_path):
    """Axolotl leaves out what does not fill its last batch; the rest has the labels of the plain run."""
    out = tmp_path / "out"
    stock.train(stock.write(base, out, **{**PACKED, "micro_batch_size": 2}), out, tmp_path / "cache")
    found, expected = stock.seen(out), trained_on(plain("chat"))
    assert len(dict(found)) == len(found) >= stock.ROWS - 4
    assert all(expected[ids] == kept for ids, kept in found)


@pytest.mark.parametrize("kind", groups([kind for kind in KINDS if kind != "chat"]))
def test_packed_labels_are_those_of_the_plain_run(plain, train, kind):
    data, settings = KINDS[kind]
    assert train(kind, **PACKED) == trained_on(plain(data, **settings))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.xdist_group("chat")
def test_preprocessed_first(base, plain, tmp_path, packed):
    """`axolotl preprocess` stores the host's own labels; a changed threshold needs no new preprocessing."""
    shape = PACKED if packed else {}
    path = stock.write(base, tmp_path / "out", **shape, xtf={"preset": "paper"})
    result = stock.command(stock.BIN / "axolotl", "preprocess", path, cache=tmp_path / "cache")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    prepared = sorted((tmp_path / "prepared").rglob("*.arrow"))
    before = [file.stat().st_mtime_ns for file in prepared]
    assert prepared
    path = stock.write(base, tmp_path / "out", **shape)
    stock.train(path, tmp_path / "out", tmp_path / "cache")
    assert trained_on(tmp_path / "out") == trained_on(plain("chat"))
    assert [file.stat().st_mtime_ns for file in prepared] == before
    assert sorted((tmp_path / "prepared").rglob("*.arrow")) == prepared


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.xdist_group("chat")
def test_a_resumed_run_trains_on_the_rest_with_the_same_labels(base, plain, tmp_path, packed):
    shape = {**(PACKED if packed else {}), "save_strategy": "steps", "save_steps": 1}
    out = tmp_path / "out"
    path = stock.write(base, out, **shape, max_steps=2)
    stock.train(path, out, tmp_path / "cache")
    first = stock.seen(out)
    stock.seen_path(out).with_name("out.seen.0").unlink()
    path = stock.write(base, out, **shape, resume_from_checkpoint=str(out / "checkpoint-2"))
    stock.train(path, out, tmp_path / "cache")
    second = stock.seen(out)
    expected = trained_on(plain("chat"))
    assert first and second and all(expected[ids] == kept for ids, kept in first + second)
    if not packed:  # a resumed Axolotl packs again, so that documents come twice, with XTF or without
        assert sorted(first + second) == sorted(expected.items())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.xdist_group("alpaca")
def test_evaluation_sees_its_own_labels(base, tmp_path, packed):
    """The eval split's labels are those of a run without the block, also with a block."""
    shape = {**(PACKED if packed else {}), "val_set_size": 6, "eval_strategy": "epoch", "eval_sample_packing": packed}
    found = {}
    for name, changes in {"masked": {}, "stock": {"xtf": ..., "plugins": ...}}.items():
        out = tmp_path / name / "out"
        stock.train(stock.write(base, out, **shape, **changes), out, out.parent / "cache")
        found[name] = dict(stock.seen(out, ".eval")), dict(stock.seen(out))
    assert len(found["stock"][0]) == 6 and found["masked"][0] == found["stock"][0]
    count = {name: sum(map(len, training.values())) for name, (_, training) in found.items()}
    assert count["masked"] < 0.9 * count["stock"]
