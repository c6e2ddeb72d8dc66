"""Several processes divide the scoring, and every rank has the masks of a run in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.scoring.distributed import Ranks, share_out
from xtf_plugin.store.records import Records

ROOT = Path(__file__).parents[2]


def launch(folder: Path, size: int, *names: str) -> subprocess.CompletedProcess[str]:
    """Launch some cases, or all that do not end the launch with an error."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(size)]
    command = [*(torchrun if size > 1 else [sys.executable]), "-m", "tests.ranks.program", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return forked.run([*command, ",".join(names)] if names else command, env=environment, timeout=300)


def launched(folder: Path, size: int, *names: str) -> list[dict]:
    """The results of every rank."""
    result = launch(folder, size, *names)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}-of-{size}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    cases = (
        *("scores_on_a_shared_disk", "caches_that_differ"),
        *("plans", "scores_of_the_default", "marks_of_a_column"),
    )
    return launched(tmp_path_factory.mktemp("alone"), 1, *cases)[0]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    cases = ("messages", "scores_without_a_shared_disk", "scores_handed_on_in_pieces", "plans", "scores_of_the_default")
    return launched(tmp_path_factory.mktemp("three"), 3, *cases)


def close(found, expected):
    for name in ("logprobs", "attention"):
        a, b = (np.asarray(side[name], dtype=np.float64) for side in (found, expected))
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_messages_are_complete_and_in_order(two):
    assert [rank["messages"] for rank in two] == [{"right": True, "column": [1, 2, 0]}] * 2


def test_a_stored_table_of_one_rank_serves_all(two):
    assert [rank["a_table_that_one_rank_has"] for rank in two] == [{"table": [1, 2, 3], "files": 1}] * 2


def test_stored_scores_of_the_first_rank_serve_all(two):
    assert [rank["scores_of_the_dataset_that_one_rank_has"] for rank in two] == [{"right": True}] * 2


def test_ranks_with_other_data_are_refused_on_every_rank(two):
    for rank in two:
        assert "do not hold the same training data: rank 1 differs from rank 0" in rank["disagreement"]
        assert "do not hold the same training data: rank 1 differs from rank 0" in rank["other_data_on_one_rank"]


@pytest.mark.parametrize(
    ("name", "what"), [("threshold", "block"), ("attribute", "block"), ("tokenizer", "special tokens"), ("files", None)]
)
def test_ranks_with_other_blocks_are_refused_on_every_rank(two, name, what):
    for rank in two:
        message = rank["other_blocks_on_one_rank"][name]
        assert f"do not hold the same {what}: rank 1 differs" in message if what else message == "planned"


def test_ranks_with_other_masks_are_refused_on_every_rank(two):
    for rank in two:
        assert "do not hold the same masks: rank 1 differs" in rank["other_masks_on_one_rank"]


def test_no_collective_waits_for_slow_files_of_one_rank(two):
    assert two[0]["slow_files_on_one_rank"] < 1.5


def test_other_ranks_send_heartbeats_while_the_main_rank_works(two):
    main, other = (rank["work_of_the_main_rank"] for rank in two)
    assert main["result"] == other["result"] == "done"
    assert main["gathers"] == other["gathers"] > 4
    assert main["error"] == "the disk is full" and other["error"].startswith("rank 0 failed")


def test_work_of_every_rank_ends_together(two):
    found = [rank["work_of_every_rank"] for rank in two]
    assert [one["result"] for one in found] == [0, 1]
    assert found[0]["error"] == "XTFError: rank 1 failed; its own message says why."
    assert found[1]["error"] == "ValueError: no such file"


def test_scores_are_those_of_one_process(two, alone):
    expected = alone["scores_on_a_shared_disk"]
    for rank in two:
        for name in ("scores_on_a_shared_disk", "scores_without_a_shared_disk", "many_rounds"):
            close(rank[name], expected)
            assert rank[name]["stats"][:2] == expected["stats"][:2]
    assert two[0]["scores_on_a_shared_disk"] == two[1]["scores_on_a_shared_disk"]


def test_no_rank_scores_what_another_has(two):
    """Without a shared disk, 13 documents are scored once, each rank stores its share, and both have all scores."""
    found = [rank["scores_without_a_shared_disk"] for rank in two]
    assert sorted(one["stored_here"] for one in found) == [6, 7]
    for one in found:
        assert one["again"]["stats"] == [0, 0, 0] and one["again"]["reused"] == 13
        assert one["again"]["logprobs"] == one["logprobs"]
        assert one["more"] == 3


def test_stored_scores_are_sent_in_pieces(two, alone):
    for rank in two:
        found = rank["scores_handed_on_in_pieces"]
        close(found, alone["scores_on_a_shared_disk"])
        assert found["reused"] == 13 and found["gathers"] >= 8


def test_three_ranks_have_the_scores_and_masks_of_one(three, alone):
    for rank in three:
        assert rank["messages"]["right"] is True
        for name in ("scores_without_a_shared_disk", "scores_handed_on_in_pieces"):
            close(rank[name], alone["scores_on_a_shared_disk"])
        assert rank["plans"] == alone["plans"]
    assert sorted(rank["scores_without_a_shared_disk"]["stored_here"] for rank in three) == [4, 4, 5]


def test_messages_of_many_ranks_take_no_more_memory_than_those_of_two(monkeypatch):
    taken = []

    def all_gather(received, sent):
        taken.append(sum(part.numel() for part in received))
        for part in received:
            part.copy_(sent)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    mine = bytes(range(256)) * 12_000
    assert Ranks(0, 64).gather(mine) == [mine] * 64
    assert max(taken) <= 4 << 20 and len(taken) == 1 + -(-len(mine) // (4 << 20 >> 6))


def test_memory_that_runs_out_on_a_rank_of_a_sharded_model_ends_the_run(tmp_path):
    result = launch(tmp_path, 2, "memory_that_runs_out_in_step")
    assert result.returncode != 0
    assert "out of memory while scoring" in result.stderr and "Set xtf `batch_tokens` below 100." in result.stderr
    assert not list(tmp_path.glob("rank-*.json")), "a rank continued"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_is_refused_on_every_rank(two, rank):
    assert "supported in one process, and this run has 2" in two[rank]["a_stream_in_two_processes"]


def test_ranks_with_other_scores_plan_with_those_of_the_first(two, alone):
    found = [rank["caches_that_differ"] for rank in two]
    assert found[0] == found[1]
    close(found[0], alone["caches_that_differ"])


def test_ranks_exchange_scores_while_they_score(two):
    gathers = [rank["many_rounds"]["gathers"] for rank in two]
    assert gathers[0] == gathers[1] > 5


UNKNOWN = (
    "tiny (LlamaForCausalLM) cannot be scored here: its forward fails with ValueError: device-side assert. "
    "Name another reference under `reference.model`."
)


@pytest.mark.parametrize(
    ("where", "here", "elsewhere"),
    [
        ("forward", "ValueError: device-side assert", "rank 1 failed while scoring: ValueError: device-side assert"),
        ("silent", "MemoryError: ", "rank 1 failed while scoring: MemoryError: "),
        ("check", f"XTFError: {UNKNOWN}", "rank 1 failed; its own message says why."),
        ("sink", "OSError: no space left", "rank 1 failed while scoring: OSError: no space left"),
    ],
)
def test_the_failure_of_a_rank_ends_the_others(two, where, here, elsewhere):
    assert two[0]["a_rank_that_fails"][where] == f"XTFError: {elsewhere}"
    assert two[1]["a_rank_that_fails"][where] == here


def test_a_reference_that_one_rank_did_not_load_is_refused(two):
    for rank in two:
        assert "do not hold the same weights of the reference: rank 1" in rank["weights_that_one_rank_did_not_load"]


def test_memory_may_run_out_on_one_rank_alone(two, alone):
    for rank in two:
        close(rank["memory_that_runs_out_on_one_rank"], alone["scores_on_a_shared_disk"])


@pytest.mark.parametrize("name", ["fsdp_full", "fsdp_adapters"])
def test_a_sharded_model_scores_in_step(two, name):
    """FSDP2 on the CPU: all ranks run equally many forwards, although one has more batches; scores are the model's."""
    from tests import tiny
    from tests.test_plan import rows
    from xtf_plugin.data.documents import collect
    from xtf_plugin.scoring.reference import Reference

    first, second = (rank[name] for rank in two)
    assert first["batches"] != second["batches"], "the case must give the ranks unequal work"
    checks = 4  # by our kernels, by the model itself, with other late tokens, by the definition of attention received
    assert first["forwards"] == second["forwards"] == checks + max(first["batches"], second["batches"])
    assert first["logprobs"] == second["logprobs"]
    assert first["vectors"] < 1e-6
    data = rows(4)
    data.append({column: data[0][column] * 5 for column in ("input_ids", "labels")})
    documents = collect(data)
    logprobs = []
    model = tiny.model()
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            all_of_them = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        picked = all_of_them[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()
        values = np.concatenate([[np.nan], picked])
        logprobs += values[completion].tolist()
    np.testing.assert_allclose(np.asarray(first["logprobs"], dtype=np.float64), logprobs, atol=2e-5)
    assert Reference(model, "tiny").lockstep is False


@pytest.mark.parametrize("name", ["fsdp_full", "fsdp_adapters"])
def test_training_continues_from_the_shards(two, name):
    """Weights gathered for scoring are sharded again, and the second step uses the result of the first."""
    for rank in two:
        assert rank[name]["split"] is True
        first, second = rank[name]["losses"]
        assert second < first - 0.1


@pytest.mark.parametrize("name", ["default", "odd sentences", "attributes", "paper"])
def test_plans_are_those_of_one_process(two, alone, name):
    expected = alone["plans"][name]
    assert 0 < sum(expected["keep"]) < len(expected["keep"])
    for rank in two:
        assert rank["plans"][name] == expected
    assert name != "default" or expected["excerpts"] > 0, "the case must score splices"


def test_the_default_s_scores_are_those_of_one_process(two, three, alone):
    expected = alone["scores_of_the_default"]
    for name, scores in expected.items():
        assert len({score for score in scores if score is not None}) > (1 if name == "knowledge_novelty" else 10)
        for rank in (*two, *three):
            found = np.asarray(rank["scores_of_the_default"][name], dtype=np.float64)
            np.testing.assert_allclose(found, np.asarray(scores, dtype=np.float64), atol=2e-5, err_msg=name)


def test_marks_of_a_column_are_those_of_one_process(two, alone):
    expected = alone["marks_of_a_column"]["same"]
    assert 0 < sum(expected) < len(expected)
    for rank in two:
        assert rank["marks_of_a_column"]["same"] == expected
        assert "do not hold the same masks: rank 1 differs" in rank["marks_of_a_column"]["other"]


class TestShareOut:
    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    def test_tokens_are_balanced_to_within_a_document(self, size):
        lengths = np.random.default_rng(0).lognormal(5, 1, 997).astype(np.int64)
        ranks = share_out(lengths, size)
        totals = np.bincount(ranks, weights=lengths, minlength=size)
        assert totals.max() - totals.min() <= lengths.max()
        assert np.ptp(np.bincount(ranks, minlength=size)) <= 1

    def test_documents_of_one_length_and_none(self):
        assert np.bincount(share_out(np.full(10, 7), 4)).tolist() == [3, 3, 2, 2]
        assert share_out(np.zeros(0, dtype=np.int64), 4).tolist() == []


def test_counts_are_summed_and_seconds_are_the_slowest_ranks():
    ranks = [asdict(ScoringStats(3, 30, 40, 2, 0, 1.5)), asdict(ScoringStats(4, 31, 41, 3, 1, 2.5))]
    assert ScoringStats.of_all(ranks) == ScoringStats(7, 61, 81, 5, 1, 2.5)


@pytest.mark.parametrize("attention", [True, False])
def test_records_are_the_same_after_transport(attention):
    values = np.float32([1, np.nan, 3])
    records = Records(
        values,
        values + 1,
        values + 2,
        values + 3 if attention else None,
        keys=np.arange(32, dtype=np.uint8).reshape(2, 16),
        offsets=np.int64([0, 1, 3]),
    )
    back = Records.from_bytes(records.to_bytes())
    assert back.keys.tolist() == records.keys.tolist() and back.offsets.tolist() == [0, 1, 3]
    assert list(back.columns) == list(records.columns)
    for name, column in back.columns.items():
        np.testing.assert_array_equal(column, records.columns[name])
