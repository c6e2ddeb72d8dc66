"""The score store: scores are found by document and reference."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from xtf_plugin.store import shard_format
from xtf_plugin.store.records import COLUMNS, Records
from xtf_plugin.store.store import ScoreStore, layers_tag

REFERENCE = "0123456789abcdef" * 2
OTHER = "f" * 32


def records(lengths, seed=0, attention=True):
    """Scores of documents of these lengths; what is predicted of the first token of each is undefined."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    scores = {name: rng.exponential(1.0, offsets[-1]).astype(np.float32) for name in COLUMNS}
    for name in COLUMNS[:3]:
        scores[name][offsets[:-1][np.asarray(lengths) > 0]] = np.nan
    if not attention:
        del scores["attention"]
    return Records(keys=rng.integers(0, 256, (len(lengths), 16), dtype=np.uint8), offsets=offsets, **scores)


def bare(keys, offsets, logprobs):
    """Records of which only the log-probabilities matter."""
    return Records(logprobs, np.zeros_like(logprobs), np.zeros_like(logprobs), keys=keys, offsets=offsets)


def fill(root, lengths=(3, 5, 1), layers="0,1", reference=REFERENCE, seed=0, **options):
    added = records(lengths, seed, layers is not None)
    with ScoreStore(root, reference, layers, **options) as store:
        store.add(added)
    return added


def shard_files(root):
    return sorted(root.rglob("*.parquet"))


def test_what_was_added_is_found_in_any_order(tmp_path):
    added = fill(tmp_path, (3, 5, 0, 1, 7))
    order = [4, 2, 0, 3, 1]
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(added.keys[order], added.lengths[order])
    expected = np.concatenate([np.arange(added.offsets[i], added.offsets[i + 1]) for i in order])
    assert found.found.all()
    for name, values in added.columns.items():
        np.testing.assert_array_equal(found.columns[name], values[expected])


@pytest.mark.parametrize("attention", [True, False])
def test_records_are_serialised_without_loss(attention):
    sent = records((3, 0, 5), attention=attention)
    received = Records.from_bytes(sent.to_bytes())
    assert list(received.columns) == list(sent.columns)
    for name in ("keys", "offsets", *sent.columns):
        np.testing.assert_array_equal(getattr(received, name), getattr(sent, name))
        assert getattr(received, name).dtype == getattr(sent, name).dtype


def test_unknown_documents_and_other_lengths_are_not_found(tmp_path):
    added = fill(tmp_path, (3, 5, 1))
    keys, logprobs = added.keys, added.logprobs
    near = keys[1].copy()
    near[15] ^= 1  # half of the key is not enough
    asked = np.stack([keys[0], near, keys[1], keys[2]])
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(asked, np.array([3, 5, 4, 1]))
    assert found.found.tolist() == [True, False, False, True]
    assert all(np.isnan(found.columns[name][3:12]).all() for name in COLUMNS)
    np.testing.assert_array_equal(found.columns["logprobs"][:3], logprobs[:3])


def test_keys_that_differ_only_in_zero_bytes_are_different_documents(tmp_path):
    keys = np.zeros((3, 16), dtype=np.uint8)
    keys[1, 0], keys[2, 15] = 1, 1
    with ScoreStore(tmp_path, REFERENCE, None) as store:
        store.add(bare(keys, np.arange(4), np.array([-1, -2, -3], dtype=np.float32)))
    found = ScoreStore(tmp_path, REFERENCE, None).lookup(keys[[2, 0, 1]], np.ones(3, dtype=np.int64))
    assert found.columns["logprobs"].tolist() == [-3, -1, -2]


def test_a_document_asked_for_twice_is_found_twice(tmp_path):
    added = fill(tmp_path, (3, 5))
    found = ScoreStore(tmp_path, REFERENCE, "0,1").lookup(added.keys[[1, 0, 1]], np.array([5, 3, 5]))
    for name, values in added.columns.items():
        np.testing.assert_array_equal(found.columns[name], values[[3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]])


def test_the_first_record_in_file_order_wins(tmp_path):
    added = records((4,), attention=False)
    keys = added.keys
    for shift in (0, 1):
        with ScoreStore(tmp_path, REFERENCE, None) as store:
            store.add(bare(keys, added.offsets, added.logprobs - shift))
    first = pq.read_table(shard_files(tmp_path)[0]).column("logprobs")[0].as_py()
    unknown = np.zeros((1, 16), dtype=np.uint8)  # one is missing to the end, so every file is read
    found = ScoreStore(tmp_path, REFERENCE, None).lookup(np.concatenate([keys, unknown]), np.array([4, 1]))
    np.testing.assert_array_equal(found.columns["logprobs"][:4], np.asarray(first, dtype=np.float32))


def test_scores_count_for_one_reference_and_one_choice_of_layers(tmp_path):
    added = fill(tmp_path, layers="0,1")
    keys, lengths = added.keys, added.lengths
    assert not ScoreStore(tmp_path, OTHER, "0,1").lookup(keys, lengths).found.any()
    assert not ScoreStore(tmp_path, REFERENCE, "0").lookup(keys, lengths).found.any()


def test_log_probabilities_are_shared_by_all_layers(tmp_path):
    """Switching reasoning importance off must never score again."""
    added = fill(tmp_path, layers="0,1")
    found = ScoreStore(tmp_path, REFERENCE, None).lookup(added.keys, added.lengths)
    assert found.found.all() and "attention" not in found.columns
    for name in COLUMNS[:3]:
        np.testing.assert_array_equal(found.columns[name], added.columns[name])


def test_scores_without_attention_do_not_serve_a_run_that_asks_for_it(tmp_path):
    added = fill(tmp_path, layers=None)
    assert not ScoreStore(tmp_path, REFERENCE, "0").lookup(added.keys, added.lengths).found.any()


def test_what_is_not_written_yet_is_found_and_copied(tmp_path):
    added, reused = records((3, 5)), records((3, 5))
    store = ScoreStore(tmp_path, REFERENCE, "0")
    store.add(reused)
    for values in reused.columns.values():
        values[:] = 0
    assert not shard_files(tmp_path)
    found = store.lookup(added.keys, added.lengths)
    for name, values in added.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)


def test_shards_are_written_by_size_and_by_time(tmp_path):
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=10)
    store.add(records((6,), seed=1))
    assert len(shard_files(tmp_path)) == 0
    store.add(records((6,), seed=2))
    assert len(shard_files(tmp_path)) == 1
    store.add(records((20, 20, 20), seed=3))
    assert len(shard_files(tmp_path)) == 2
    impatient = ScoreStore(tmp_path, REFERENCE, "0", shard_seconds=0.0)
    impatient.add(records((1,), seed=4))
    assert len(shard_files(tmp_path)) == 3


def test_a_full_shard_leaves_no_small_remainder(tmp_path):
    """A batch slightly larger than a shard is one shard."""
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=100)
    for seed in range(11):
        store.add(records((10, 1), seed=seed))
    assert len(shard_files(tmp_path)) == 1


def test_shards_are_cut_between_additions(tmp_path):
    """A scoring batch is stored whole or not at all, whenever the process is killed."""
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=10)
    store.persistent = False  # nothing is written until the next flush
    batches = [records((4, 3), seed=seed) for seed in range(9)]
    for batch in batches:
        store.add(batch)
    store.flush()
    shards_of = [set(map(bytes, store.read(path).keys)) for path in shard_files(tmp_path)]
    assert len(shards_of) > 3
    for batch in batches:
        assert sum(set(map(bytes, batch.keys)) <= keys for keys in shards_of) == 1


def test_an_error_in_the_block_still_writes(tmp_path):
    added = records((3,))
    with pytest.raises(KeyboardInterrupt), ScoreStore(tmp_path, REFERENCE, "0") as store:
        store.add(added)
        raise KeyboardInterrupt
    assert ScoreStore(tmp_path, REFERENCE, "0").lookup(added.keys, added.lengths).found.all()


def test_a_shard_is_named_after_its_bytes_and_written_once(tmp_path):
    for _ in range(2):
        fill(tmp_path)
    (path,) = shard_files(tmp_path)
    assert shard_format.xxhash.xxh3_128_hexdigest(path.read_bytes()) == path.stem
    assert path.parent == tmp_path / "v2" / REFERENCE / "layers-0_1"


def test_opening_and_reading_leave_no_folder(tmp_path):
    ScoreStore(tmp_path / "cache", REFERENCE, "0", description={"model": "tiny"}).lookup(
        *(np.zeros((0, 16), np.uint8), [])
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "layers, tag",
    [
        (None, "none"),
        ("5", "layers-5"),
        ("0,1,2,3", "layers-0_3"),
        ("3,0,1", "layers-3,0_1"),
        (",".join(map(str, range(126))), "layers-0_125"),
    ],
)
def test_layer_folders(layers, tag):
    assert layers_tag(layers) == tag


def test_layer_folders_fit_a_file_system_and_stay_apart():
    tags = {layers_tag(",".join(map(str, range(start, 400, 2)))) for start in range(10)}
    assert len(tags) == 10 and max(map(len, tags)) < 200


@pytest.mark.parametrize(
    "reference, layers", [("../../x", "0"), ("ABCDEF12", "0"), ("", "0"), (REFERENCE, "0/.."), (REFERENCE, "")]
)
def test_what_becomes_a_path_is_checked(tmp_path, reference, layers):
    with pytest.raises(ValueError):
        ScoreStore(tmp_path, reference, layers)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: {"offsets": r.offsets + 1},
        lambda r: {"keys": r.keys[:, :8]},
        lambda r: {"attention": r.attention[:-1]},
        lambda r: {"entropy": r.entropy[:-1]},
        lambda r: {"attention": None},
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, damage):
    good = records((3, 5))
    with pytest.raises(ValueError):
        ScoreStore(tmp_path, REFERENCE, "0").add(replace(good, **damage(good)))


def test_description_is_written_and_holds_what_was_given(tmp_path):
    fill(tmp_path, description={"model": "tiny"})
    assert json.loads((tmp_path / "v2" / REFERENCE / "reference.json").read_text()) == {"model": "tiny"}
