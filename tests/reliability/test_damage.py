"""Damaged cache files: a run warns, scores again what is lost, and has the same masks and scores."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.reliability import amount, record, whole
from tests.store.test_damage import forge, header
from xtf_plugin import cli
from xtf_plugin.errors import XTFUserError
from xtf_plugin.report import score_table
from xtf_plugin.store import admin, shard_format

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes as POSIX has them")


@pytest.fixture(scope="module")
def cache():
    place = Path(tempfile.mkdtemp())  # not pytest's, which nobody but its owner may enter
    place.chmod(0o755)
    with whole.unsynced():
        made = whole.Cache(place)
        yield made
    whole.remove(place)
    kinds = {kind: tried for kind, tried in made.tried.items() if kind != "afterwards"}
    record("damage", kinds=len(kinds), tried=sum(kinds.values()), wrong_scores=made.wrong)


def test_the_comparison_knows_other_scores(cache, tmp_path):
    """Otherwise the tests below would hold whatever a run believes."""
    other = whole.run(tmp_path / "cache", tmp_path / "table.parquet", model=1)
    assert other.masks != cache.expected.masks and other.table != cache.expected.table


@pytest.mark.parametrize("kind", whole.DAMAGES)
def test_a_damaged_shard_is_set_aside_and_scored_again(cache, kind):
    sources = [cache.in_source(path) for path in cache.shards]
    for source, changed in whole.damaged(kind, sources, *amount((1, 3), (30, 250))):
        cache.renew()
        path = cache.in_copy(source)
        path.write_bytes(changed)
        outcome = cache.check(f"a shard: {kind}", [path], [path])
        if "later xtf-plugin" not in outcome.warnings[0]:  # a flipped bit can turn one format into a later one
            assert path.with_name(path.name + ".damaged").read_bytes() == changed
            assert not path.exists() or path in whole.shards(cache.copy)
    cache.check_settled()


@pytest.mark.parametrize("kind", whole.DAMAGES)
def test_a_damaged_relevance_table_is_made_again(cache, kind):
    source = cache.in_source(cache.relevance)
    for _, changed in whole.damaged(kind, [source], *amount((2, 6), (40, 400))):
        cache.renew()
        cache.relevance.write_bytes(changed)
        outcome = cache.run(f"a relevance table: {kind}")
        assert not outcome.scored
        if not ("flipped" in kind or kind == "bytes added") or outcome.warnings:  # some of a Parquet file says nothing
            assert [cache.relevance.name in text for text in outcome.warnings] == [True]
            assert cache.relevance.read_bytes() == source.read_bytes()
    cache.check_settled()


def looked_through(root: Path) -> list[admin.CacheEntry]:
    """What `xtf cache list` and the search for scores of the same model made otherwise find."""
    with whole.within(20):
        admin.warn_of_unused_scores(root, "f" * 32, {"name": "tiny"})
        with contextlib.suppress(XTFUserError):  # nothing is deleted through a link
            admin.prune_cache(root, older_than_days=None, reference=None, everything=True, dry_run=True)
        return admin.list_cache(root)


@pytest.mark.parametrize("kind", [*whole.DAMAGES, "nested without end", "a number without end"])
def test_a_damaged_description_costs_a_name_at_most(cache, kind):
    texts = {"nested without end": b"[" * 200_000, "a number without end": b'{"name": ' + b"9" * 5_000 + b"}"}
    known = looked_through(cache.source)
    sources = whole.damaged(kind, [cache.in_source(cache.description)], *amount((5, 20), (40, 400)))
    cache.renew()
    for changed in [texts[kind]] if kind in texts else [changed for _, changed in sources]:
        cache.description.write_bytes(changed)
        assert [entry.documents for entry in looked_through(cache.copy)] == [entry.documents for entry in known]
        cache.tried[f"a description: {kind}"] += 1
    cache.check(f"a description: {kind}", [], [])


def test_files_change_places(cache):
    files = [*cache.shards, cache.relevance, cache.description]
    for pair in itertools.combinations(files, 2):
        cache.renew()
        first, second = (path.read_bytes() for path in pair)
        pair[0].write_bytes(second), pair[1].write_bytes(first)
        cache.check("two files swapped", set(pair) & set(cache.shards), set(pair) - {cache.description})
    cache.check_settled()


def test_all_files_are_damaged_at_once(cache):
    cache.renew()
    for path in (*cache.shards, cache.relevance, cache.description):
        path.write_bytes(path.read_bytes()[:-1])
    cache.check("every file truncated", cache.shards, [*cache.shards, cache.relevance])
    cache.check_settled()


FORGERIES = {
    "an earlier format": header(format=1),
    "a later format": header(format=9),
    "a format without end": header(format=float("inf")),
    "a header nested without end": lambda t: t.replace_schema_metadata({shard_format.HEADER: b"[" * 200_000}),
    "another reference": header(reference="f" * 32),
    "layers without end": header(layers="9" * 5_000),
    "other layers": header(layers="0"),
}
OTHERS = {
    "of another model": {"model": 1},
    "of other layers": {"reasoning_importance": {"layers": [0]}},
    "of another dataset": {"seed": 5},
}


@pytest.mark.parametrize("kind", [*FORGERIES, *OTHERS])
@pytest.mark.parametrize("named", ["by its bytes", "as what it replaces"])
def test_a_foreign_shard_is_not_believed(cache, tmp_path, kind, named):
    for victim in cache.shards:
        cache.renew()
        if kind in FORGERIES:
            foreign = forge(victim, FORGERIES[kind])
        else:
            whole.run(tmp_path / "cache", tmp_path / "table.parquet", **OTHERS[kind])
            victim.unlink()
            foreign = Path(shutil.copy(next(iter(whole.shards(tmp_path / "cache"))), victim.parent))
        if named == "as what it replaces":
            foreign = foreign.rename(victim)
        looked_through(cache.copy)
        good = kind == "of another dataset" and foreign != victim
        cache.check(f"a shard {kind}, named {named}", [victim], [] if good else [foreign])
        assert os.path.lexists(f"{foreign}.damaged") == (not good and kind != "a later format")
        assert good <= foreign.exists()


def test_a_table_that_says_how_many_tokens_without_end_is_listed(cache):
    """A listing reads no scores."""
    cache.renew()
    forge(next(iter(cache.shards)), header(tokens=float("inf")))
    looked_through(cache.copy)


def put(kind: str, path: Path) -> None:
    """Something else in the place of a file or a folder."""
    whole.remove(path)
    if "directory" in kind:
        path.mkdir()
    if kind == "a full directory":
        (path / "notes").write_text("of somebody else")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a file":
        path.write_text("not a folder")


@pytest.mark.parametrize("kind", ["a directory", "a full directory", "a pipe", "a link to nothing", "a link to itself"])
def test_something_else_in_the_place_of_a_file(cache, kind):
    for path in (*cache.shards, cache.relevance, cache.description):
        cache.renew()
        put(kind, path)
        looked_through(cache.copy)
        cache.check(f"{kind} for a file", {path} & set(cache.shards), {path} - {cache.description})
        assert not list(cache.copy.rglob(".xtf-*"))
        if "directory" not in kind or path != cache.relevance:  # which no file can replace: every run warns
            cache.check_settled()


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("kind", ["a directory", "a file", "a pipe", "a link to nothing", "a link to itself"])
def test_something_else_in_the_place_of_a_folder(cache, kind, level):
    cache.renew()
    path = [cache.layers, *cache.layers.parents][level]
    put(kind, path)
    assert not looked_through(cache.copy) or level == 0
    outcome = cache.run(f"{kind} for a folder")
    assert set(outcome.scored) == set().union(*cache.shards.values())
    count = sum("scores cannot be written" in message and str(path) in message for message in outcome.warnings)
    assert count == (kind != "a directory"), outcome.warnings


@pytest.mark.parametrize("level", range(4))
def test_a_folder_that_is_a_link_to_where_it_was_moved(cache, level):
    cache.renew()
    path = [cache.layers, *cache.layers.parents][level]
    moved = path.rename(cache.table.with_name("moved"))
    path.symlink_to(moved)
    cache.check("a link to the moved folder", [], [])
    shutil.rmtree(moved)


@contextmanager
def mode(cache: whole.Cache, path: Path, bits: int) -> Iterator[None]:
    """The copy belongs to a user who is not root, and so does the process; one path has this mode."""
    if os.geteuid() == 0:
        for each in (cache.table.parent, cache.copy, *cache.copy.rglob("*")):
            os.chown(each, whole.NOBODY, -1)
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with whole.unprivileged():
            if not os.access(cache.table.parent, os.W_OK, effective_ids=True):
                pytest.skip("no user but root may enter the folder for temporary files")
            yield
    finally:
        path.chmod(before)


def test_a_file_that_may_not_be_read(cache):
    """Nothing is known against it, so that it is not set aside."""
    for path in (*cache.shards, cache.relevance, cache.description):
        cache.renew()
        with mode(cache, path, 0):
            cache.check("a file without rights", {path} & set(cache.shards), {path} - {cache.description})
        assert path.exists() and not list(cache.copy.rglob("*.damaged"))


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("bits", [0, 0o300, 0o500], ids=["no rights", "no listing", "read-only"])
def test_a_folder_without_rights(cache, level, bits):
    cache.renew()
    path, victim = [cache.layers, *cache.layers.parents][level], next(iter(cache.shards))
    victim.unlink()
    lost = cache.shards if bits == 0 or (bits == 0o300 and level == 0) else [victim]
    with mode(cache, path, bits):
        outcome = cache.run("a folder without rights")
    assert set(outcome.scored) == set().union(*(cache.shards[shard] for shard in lost))
    if bits == 0 or level == 0:  # nothing can be written there
        assert sum("scores cannot be written" in text and str(path) in text for text in outcome.warnings) == 1
    else:
        assert all("cannot be listed" in text for text in outcome.warnings)


def looked_at(path: Path) -> list[tuple[int, str, str]]:
    """What `xtf show` and `xtf report` make of a score table: exit code, what is printed and written, errors."""
    found, page = [], path.with_name("page.html")
    for words in (["show", str(path), "-n", "999"], ["report", str(path), "--output", str(page)]):
        printed, errors, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), whole.within(60):
            try:
                cli.main(words)
            except SystemExit as end:
                code = end.code
        written = page.read_text() if page.exists() else ""
        page.unlink(missing_ok=True)
        found.append((code or 0, printed.getvalue() + written, errors.getvalue()))
    return found


def facts(table: score_table.ScoreTable) -> list[object]:
    """All that a table holds, to compare."""
    held = [getattr(table, each.name) for each in dataclasses.fields(table) if each.name != "before"]
    held.append(table.before(np.flatnonzero(table.opens)))
    return [value.tobytes() if isinstance(value, np.ndarray) else str(value) for value in held]


@pytest.fixture(scope="module")
def written(cache, tmp_path_factory):
    """A score table with its report, and what the commands make of it undamaged."""
    folder = tmp_path_factory.mktemp("table")
    whole.write(whole.plan(cache.source, []), folder)
    path = folder / "scores.parquet"
    known = looked_at(path)
    assert [code for code, _, _ in known] == [0, 0] and all(len(said) > 1_000 for _, said, _ in known)
    return path, path.read_bytes(), known, facts(score_table.read(path))


@pytest.mark.parametrize("kind", whole.DAMAGES)
def test_a_damaged_score_table_is_shown_as_it_was_or_refused(cache, written, kind, tmp_path):
    path, data, known, columns = written
    source = tmp_path / "table"
    source.write_bytes(data)
    for _, changed in whole.damaged(kind, [source], *amount((3, 10), (20, 150))):
        path.write_bytes(changed)
        for (code, said, errors), expected in zip(looked_at(path), known, strict=True):
            refused = code == 2 and path.name in errors and errors.count("xtf: error") == 1
            assert (code, said, errors) == expected or (refused and "Traceback" not in errors), errors
        with contextlib.suppress(XTFUserError):
            assert facts(score_table.read(path)) == columns, kind
        cache.tried[f"a score table: {kind}"] += 1
