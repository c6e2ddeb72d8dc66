"""The score store: what is added is found again, by document and reference, and by nothing else."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from xtf_plugin import cache, shards
from xtf_plugin.errors import XTFUserError
from xtf_plugin.store import ScoreStore, layers_tag

REFERENCE = "0123456789abcdef" * 2
OTHER = "f" * 32


def records(lengths, seed=0, attention=True):
    """Keys, offsets and scores of documents of these lengths; the first score of each is undefined."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    logprobs = -rng.exponential(1.0, offsets[-1]).astype(np.float32)
    logprobs[offsets[:-1][np.asarray(lengths) > 0]] = np.nan
    received = rng.exponential(1.0, offsets[-1]).astype(np.float32) if attention else None
    return rng.integers(0, 256, (len(lengths), 16), dtype=np.uint8), offsets, logprobs, received


def fill(root, lengths=(3, 5, 1), layers="0,1", reference=REFERENCE, seed=0, **options):
    added = records(lengths, seed, layers is not None)
    with ScoreStore(root, reference, layers, **options) as store:
        store.add(*added)
    return added


def shard_files(root):
    return sorted(root.rglob("*.parquet"))


def test_what_was_added_is_found_in_any_order(tmp_path):
    keys, offsets, logprobs, attention = fill(tmp_path, (3, 5, 0, 1, 7))
    order = [4, 2, 0, 3, 1]
    found = ScoreStore(tmp_path, REFERENCE, "0,1").load(keys[order], np.diff(offsets)[order])
    expected = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
    assert found.found.all()
    np.testing.assert_array_equal(found.logprobs, logprobs[expected])
    np.testing.assert_array_equal(found.attention, attention[expected])


def test_unknown_documents_and_other_lengths_are_not_found(tmp_path):
    keys, _, logprobs, _ = fill(tmp_path, (3, 5, 1))
    near = keys[1].copy()
    near[15] ^= 1  # half of the key is not enough
    asked = np.stack([keys[0], near, keys[1], keys[2]])
    found = ScoreStore(tmp_path, REFERENCE, "0,1").load(asked, np.array([3, 5, 4, 1]))
    assert found.found.tolist() == [True, False, False, True]
    assert np.isnan(found.logprobs[3:12]).all() and np.isnan(found.attention[3:12]).all()
    np.testing.assert_array_equal(found.logprobs[:3], logprobs[:3])


def test_keys_that_differ_only_in_zero_bytes_are_different_documents(tmp_path):
    keys = np.zeros((3, 16), dtype=np.uint8)
    keys[1, 0], keys[2, 15] = 1, 1
    with ScoreStore(tmp_path, REFERENCE, None) as store:
        store.add(keys, np.arange(4), np.array([-1, -2, -3], dtype=np.float32), None)
    found = ScoreStore(tmp_path, REFERENCE, None).load(keys[[2, 0, 1]], np.ones(3, dtype=np.int64))
    assert found.logprobs.tolist() == [-3, -1, -2]


def test_a_document_asked_for_twice_is_found_twice(tmp_path):
    keys, _, logprobs, _ = fill(tmp_path, (3, 5))
    found = ScoreStore(tmp_path, REFERENCE, "0,1").load(keys[[1, 0, 1]], np.array([5, 3, 5]))
    np.testing.assert_array_equal(found.logprobs, logprobs[[3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]])


def test_the_first_record_in_file_order_wins(tmp_path):
    keys, offsets, logprobs, _ = records((4,), attention=False)
    for shift in (0, 1):
        with ScoreStore(tmp_path, REFERENCE, None) as store:
            store.add(keys, offsets, logprobs - shift, None)
    first = pq.read_table(shard_files(tmp_path)[0]).column("logprobs")[0].as_py()
    unknown = np.zeros((1, 16), dtype=np.uint8)  # one is missing to the end, so every file is read
    found = ScoreStore(tmp_path, REFERENCE, None).load(np.concatenate([keys, unknown]), np.array([4, 1]))
    np.testing.assert_array_equal(found.logprobs[:4], np.asarray(first, dtype=np.float32))


def test_scores_count_for_one_reference_and_one_choice_of_layers(tmp_path):
    keys, offsets, _, _ = fill(tmp_path, layers="0,1")
    lengths = np.diff(offsets)
    assert not ScoreStore(tmp_path, OTHER, "0,1").load(keys, lengths).found.any()
    assert not ScoreStore(tmp_path, REFERENCE, "0").load(keys, lengths).found.any()


def test_log_probabilities_are_shared_by_all_layers(tmp_path):
    """Switching reasoning importance off must never score again."""
    keys, offsets, logprobs, _ = fill(tmp_path, layers="0,1")
    found = ScoreStore(tmp_path, REFERENCE, None).load(keys, np.diff(offsets))
    assert found.found.all() and found.attention is None
    np.testing.assert_array_equal(found.logprobs, logprobs)


def test_scores_without_attention_do_not_serve_a_run_that_asks_for_it(tmp_path):
    keys, offsets, _, _ = fill(tmp_path, layers=None)
    assert not ScoreStore(tmp_path, REFERENCE, "0").load(keys, np.diff(offsets)).found.any()


def test_what_is_not_written_yet_is_found_and_copied(tmp_path):
    keys, offsets, logprobs, attention = records((3, 5))
    store = ScoreStore(tmp_path, REFERENCE, "0")
    reused = logprobs.copy()
    store.add(keys, offsets, reused, attention)
    reused[:] = 0
    assert not shard_files(tmp_path)
    np.testing.assert_array_equal(store.load(keys, np.diff(offsets)).logprobs, logprobs)


def test_shards_are_written_by_size_and_by_time(tmp_path):
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=10)
    store.add(*records((6,), seed=1))
    assert len(shard_files(tmp_path)) == 0
    store.add(*records((6,), seed=2))
    assert len(shard_files(tmp_path)) == 1
    store.add(*records((20, 20, 20), seed=3))
    assert len(shard_files(tmp_path)) == 4
    impatient = ScoreStore(tmp_path, REFERENCE, "0", shard_seconds=0.0)
    impatient.add(*records((1,), seed=4))
    assert len(shard_files(tmp_path)) == 5


def test_a_full_shard_leaves_no_crumb_behind(tmp_path):
    """A batch that overshoots the size by a little is one shard, not one and a remainder of a few documents."""
    store = ScoreStore(tmp_path, REFERENCE, "0", shard_tokens=100)
    for seed in range(11):
        store.add(*records((10, 1), seed=seed))
    assert len(shard_files(tmp_path)) == 1


def test_an_error_in_the_block_still_writes(tmp_path):
    keys, offsets, *scores = records((3,))
    with pytest.raises(KeyboardInterrupt), ScoreStore(tmp_path, REFERENCE, "0") as store:
        store.add(keys, offsets, *scores)
        raise KeyboardInterrupt
    assert ScoreStore(tmp_path, REFERENCE, "0").load(keys, np.diff(offsets)).found.all()


def test_a_shard_is_named_after_its_bytes_and_written_once(tmp_path):
    for _ in range(2):
        fill(tmp_path)
    (path,) = shard_files(tmp_path)
    assert shards.xxhash.xxh3_128_hexdigest(path.read_bytes()) == path.stem
    assert path.parent == tmp_path / "v1" / REFERENCE / "layers-0_1"


def test_opening_and_reading_leave_no_folder(tmp_path):
    ScoreStore(tmp_path / "cache", REFERENCE, "0", description={"model": "tiny"}).load(
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


@pytest.mark.parametrize("damage", ["offsets", "keys", "attention", "missing attention"])
def test_arrays_that_do_not_fit_are_refused(tmp_path, damage):
    keys, offsets, logprobs, attention = records((3, 5))
    if damage == "offsets":
        offsets = offsets + 1
    elif damage == "keys":
        keys = keys[:, :8]
    else:
        attention = attention[:-1] if damage == "attention" else None
    with pytest.raises(ValueError):
        ScoreStore(tmp_path, REFERENCE, "0").add(keys, offsets, logprobs, attention)


def test_cache_list(tmp_path):
    assert cache.list_cache(tmp_path / "nowhere") == []
    fill(tmp_path, (3, 5), layers="0,1", description={"model": "tiny", "dtype": "bfloat16"})
    fill(tmp_path, (2,), layers=None)
    fill(tmp_path, (9,), layers="7", reference=OTHER)
    (tmp_path / "v1" / OTHER / f"relevance-{'a' * 32}.parquet").write_bytes(b"x" * 100)
    listed = cache.list_cache(tmp_path)
    facts = [(e.reference, e.layers, e.documents, e.tokens, e.description.get("model")) for e in listed]
    assert facts == [(REFERENCE, "0,1", 2, 8, "tiny"), (REFERENCE, None, 1, 2, "tiny"), (OTHER, "7", 1, 9, None)]
    assert sum(e.bytes for e in listed) == sum(p.stat().st_size for p in shard_files(tmp_path))
    assert all(abs(e.modified - time.time()) < 60 for e in listed)


def test_description_is_written_and_holds_what_was_given(tmp_path):
    fill(tmp_path, description={"model": "tiny"})
    assert json.loads((tmp_path / "v1" / REFERENCE / "reference.json").read_text()) == {"model": "tiny"}


def prune(root, older=None, reference=None, everything=False, dry_run=False):
    return cache.prune_cache(root, older_than_days=older, reference=reference, everything=everything, dry_run=dry_run)


def test_prune_by_age_and_reference(tmp_path):
    fill(tmp_path, reference=REFERENCE, description={"model": "tiny"})
    fill(tmp_path, reference=OTHER)
    (old,) = (tmp_path / "v1" / REFERENCE).rglob("*.parquet")
    os.utime(old, (time.time() - 10 * 86_400,) * 2)
    assert prune(tmp_path, older=11).removed == ()
    assert prune(tmp_path, older=9, reference="fff").removed == ()
    size = old.stat().st_size
    would = prune(tmp_path, older=9, dry_run=True)
    assert old in would.removed and would.bytes > size and old.exists()
    assert prune(tmp_path, older=9).removed == would.removed
    assert not (tmp_path / "v1" / REFERENCE).exists() and (tmp_path / "v1" / OTHER).exists()
    assert len(prune(tmp_path, reference=OTHER).removed) == 1


def test_prune_deletes_only_our_own_files(tmp_path):
    fill(tmp_path / "cache")
    folder = tmp_path / "cache" / "v1" / REFERENCE
    strangers = [tmp_path / "cache" / "notes.txt", folder / "thesis.parquet", folder / "layers-0_1" / "data.txt"]
    outside = tmp_path / "outside"
    outside.mkdir()
    strangers.append(outside / f"{'b' * 32}.parquet")
    for path in strangers:
        path.write_text("mine")
    (folder / "layers-9").symlink_to(outside)
    (folder.parent / OTHER).symlink_to(outside)
    (folder / "layers-0_1" / f"{'c' * 32}.parquet").symlink_to(strangers[-1])
    result = prune(tmp_path / "cache", everything=True)
    assert [path.name for path in result.removed if path.suffix == ".parquet"] == [p.name for p in result.removed]
    assert len(result.removed) == 1 and all(path.read_text() == "mine" for path in strangers)
    assert {path.name for path, _ in result.refused} == {"layers-9", OTHER, f"{'c' * 32}.parquet"}


def test_prune_refuses_a_linked_cache_and_unclear_orders(tmp_path):
    fill(tmp_path / "real")
    fill(tmp_path / "real", reference="01" + "2" * 30)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "v1").symlink_to(tmp_path / "real" / "v1")
    for root, options in [
        (tmp_path / "cache", {"everything": True}),
        (tmp_path / "real", {}),
        (tmp_path / "real", {"everything": True, "older": 1}),
        (tmp_path / "real", {"older": float("nan")}),
        (tmp_path / "real", {"reference": "01"}),  # fits both
        (tmp_path / "real", {"reference": "9"}),
        (tmp_path / "real", {"reference": ""}),
    ]:
        with pytest.raises(XTFUserError):
            prune(root, **options)
    assert len(shard_files(tmp_path / "real")) == 2
