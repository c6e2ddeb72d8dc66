"""The score cache is listed and pruned, and no other file is deleted."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from tests.store.test_store import OTHER, REFERENCE, fill, shard_files
from xtf_plugin.errors import XTFUserError
from xtf_plugin.store import admin
from xtf_plugin.store.store import store_table, table_name


def test_cache_list(tmp_path):
    assert admin.list_cache(tmp_path / "nowhere") == []
    fill(tmp_path, (3, 5), layers="0,1", description={"model": "tiny", "dtype": "bfloat16"})
    fill(tmp_path, (2,), layers=None)
    fill(tmp_path, (9,), layers="7", reference=OTHER)
    (tmp_path / "v2" / OTHER / f"relevance-{'a' * 32}.parquet").write_bytes(b"x" * 100)
    listed = admin.list_cache(tmp_path)
    facts = [(e.reference, e.layers, e.documents, e.tokens, e.description.get("model")) for e in listed]
    assert facts == [(REFERENCE, "0,1", 2, 8, "tiny"), (REFERENCE, None, 1, 2, "tiny"), (OTHER, "7", 1, 9, None)]
    assert sum(e.bytes for e in listed) == sum(p.stat().st_size for p in shard_files(tmp_path))
    assert all(abs(e.modified - time.time()) < 60 for e in listed)


def prune(root, older=None, reference=None, everything=False, dry_run=False):
    return admin.prune_cache(root, older_than_days=older, reference=reference, everything=everything, dry_run=dry_run)


def test_prune_by_age_and_reference(tmp_path):
    fill(tmp_path, reference=REFERENCE, description={"model": "tiny"})
    fill(tmp_path, reference=OTHER)
    (old,) = (tmp_path / "v2" / REFERENCE).rglob("*.parquet")
    os.utime(old, (time.time() - 10 * 86_400,) * 2)
    assert prune(tmp_path, older=11).removed == ()
    assert prune(tmp_path, older=9, reference="fff").removed == ()
    size = old.stat().st_size
    would = prune(tmp_path, older=9, dry_run=True)
    assert old in would.removed and would.bytes > size and old.exists()
    assert prune(tmp_path, older=9).removed == would.removed
    assert not (tmp_path / "v2" / REFERENCE).exists() and (tmp_path / "v2" / OTHER).exists()
    assert len(prune(tmp_path, reference=OTHER).removed) == 1


@pytest.mark.parametrize("kind", ["relevance", "scores"])
def test_tables_are_listed_and_pruned_as_the_store_names_them(tmp_path, kind):
    fill(tmp_path)
    table = tmp_path / "v2" / REFERENCE / table_name("ab" * 16, kind)
    store_table(table, REFERENCE, np.ones(3, dtype=np.float32))
    (entry,) = admin.list_cache(tmp_path)
    assert entry.bytes == sum(path.stat().st_size for path in (tmp_path / "v2").rglob("*.parquet"))
    assert table in prune(tmp_path, everything=True).removed and not table.exists()


def test_prune_deletes_only_our_own_files(tmp_path):
    fill(tmp_path / "cache")
    folder = tmp_path / "cache" / "v2" / REFERENCE
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
    (tmp_path / "cache" / "v2").symlink_to(tmp_path / "real" / "v2")
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
