"""The demo's data: right answers, noise where it is said to be, the same bytes each time, and a judge that counts."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import tiny

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
sys.path.insert(0, str(DEMO))  # the demo is a folder of scripts, not a package

import compare  # noqa: E402
import judge  # noqa: E402
import noise  # noqa: E402
import phrases  # noqa: E402
import prepare  # noqa: E402

PAIRS = [json.loads(line) for line in (DEMO / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
NUMBER = r"\d+(?:\.\d+)?"
SUM = re.compile(rf"(?<![\w.])({NUMBER}(?: [-+*/] {NUMBER})+) = ({NUMBER})")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RETURNS = re.compile(r"`(\w+\([^`]*\))` returns `([^`]+)`")


@pytest.fixture(scope="module")
def rows():
    train, test = prepare.make_rows(0)
    return train + test


def of_kind(kind):
    return [pair for pair in PAIRS if pair["kind"] == kind]


def test_pairs_are_distinct_and_complete():
    assert len(PAIRS) == len({p["prompt"] for p in PAIRS}) == len({p["completion"] for p in PAIRS}) >= 108
    for pair in PAIRS:
        assert set(pair) == {"prompt", "completion", "kind"}
        assert all(value and value == value.strip() for value in pair.values())
        assert 20 <= len(pair["completion"].split()) <= 130
    assert len({pair["kind"] for pair in PAIRS}) >= 12


def value(expression):
    """What an expression of numbers and the four operators comes to."""
    tree = ast.parse(expression, mode="eval")
    allowed = (ast.Expression, ast.BinOp, ast.Constant, ast.operator)
    assert all(isinstance(node, allowed) for node in ast.walk(tree))
    return eval(compile(tree, "sum", "eval"))


def test_sums_are_right():
    found = [(pair["kind"], *match) for pair in PAIRS for match in SUM.findall(FENCE.sub("", pair["completion"]))]
    assert Counter(kind for kind, *_ in found)["maths"] > 40
    assert [(left, right) for _, left, right in found if value(left) != pytest.approx(float(right))] == []


def test_problems_of_maths_end_in_an_answer_that_a_sum_gives():
    for pair in of_kind("maths"):
        *steps, last = pair["completion"].splitlines()
        answer = re.fullmatch(rf"Answer: ({NUMBER})", last)
        assert answer, last
        assert float(answer[1]) in {float(right) for _, right in SUM.findall("\n".join(steps))}


def test_fences_are_closed_and_hold_code_that_runs():
    for pair in PAIRS:
        assert pair["completion"].count("```") == 2 * len(FENCE.findall(pair["completion"]))
    for pair in of_kind("code"):
        (language, code) = FENCE.findall(pair["completion"])[0]
        assert language == "python"
        names: dict[str, object] = {}
        exec(compile(code, pair["prompt"], "exec"), names)
        for call, result in RETURNS.findall(pair["completion"]):
            assert repr(eval(call, names)) == result, call
    for pair in of_kind("extraction"):
        for language, code in FENCE.findall(pair["completion"]):
            assert language == "json" and json.loads(code)


def test_every_row_is_a_pair_of_its_own(rows):
    train, test = prepare.make_rows(0)
    assert len(train) >= 96 and len(test) == prepare.TEST_ROWS
    assert sorted(row.prompt for row in rows) == sorted(pair["prompt"] for pair in PAIRS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_its_noise_a_completion_is_the_clean_answer(seed):
    clean = {pair["prompt"]: pair["completion"] for pair in PAIRS}
    for row in sum(prepare.make_rows(seed), []):
        position = 0
        for start, end, kind in row.noise:
            assert kind in noise.KINDS and position <= start < end <= len(row.completion)
            position = end
        assert row.clean == clean[row.prompt]


def test_spans_hold_texts_of_their_kind(rows):
    pools = {
        noise.STOCK: phrases.OPENINGS + phrases.CLOSINGS,
        noise.PAGE: phrases.PAGE_REMAINS,
        noise.DIGRESSION: phrases.DIGRESSIONS,
    }
    for row in rows:
        for start, end, kind in row.noise:
            text = row.completion[start:end].strip()
            if kind == noise.COPY:
                assert row.prompt in text
            elif kind == noise.REPEAT:
                assert row.completion[:start].endswith(text)
            else:
                assert text in {planted.strip() for planted in pools[kind]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_how_much_is_noise(seed):
    rows = sum(prepare.make_rows(seed), [])
    planted = Counter()
    for row in rows:
        for start, end, kind in row.noise:
            planted[kind] += end - start
    assert 0.15 < planted.total() / sum(len(row.completion) for row in rows) < 0.2
    assert 0.55 < sum(bool(row.noise) for row in rows) / len(rows) < 0.65
    assert set(planted) == set(noise.KINDS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_noise_in_code_nor_behind_the_number_of_a_list(seed):
    for row in sum(prepare.make_rows(seed), []):
        assert [m.group() for m in FENCE.finditer(row.completion)] == [m.group() for m in FENCE.finditer(row.clean)]
        for start, _, _ in row.noise:
            assert not re.search(r"(^|\n)\s*(\d+\.|-)\s*$", row.completion[:start])


def test_there_are_many_different_texts():
    assert len(set(phrases.OPENINGS + phrases.CLOSINGS)) >= 25
    assert len(set(phrases.PAGE_REMAINS)) >= 30
    assert len(set(phrases.DIGRESSIONS)) >= 25


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    words = [sys.executable, str(DEMO / "prepare.py"), "--output"]
    subprocess.run([*words, str(tmp_path / "a")], check=True, env={"PYTHONHASHSEED": "7"})
    for name, text in prepare.products(0).items():
        assert (tmp_path / "a" / name).read_bytes() == text.encode()
    assert prepare.products(0) != prepare.products(1)


def test_both_hosts_are_given_the_same_conversations():
    texts = {name: [json.loads(line) for line in text.splitlines()] for name, text in prepare.products(0).items()}
    for ours, theirs in zip(texts["data/train.jsonl"], texts["messages/train.jsonl"], strict=True):
        assert set(ours) == {"prompt", "completion"} and set(theirs) == {"messages"}
        assert ours["prompt"] + ours["completion"] == theirs["messages"]
        assert [message["role"] for message in theirs["messages"]] == ["user", "assistant"]
    for name in ("train", "test"):
        assert len(texts[f"data/{name}.jsonl"]) == len(texts[f"noise.{name}.jsonl"])


def test_a_second_run_does_nothing_until_something_changes(tmp_path):
    assert prepare.prepare(tmp_path)
    assert not prepare.prepare(tmp_path)
    assert not prepare.is_current(tmp_path, seed=1)
    train = tmp_path / "data/train.jsonl"
    for damage in (lambda: train.write_text("{}\n"), train.unlink):
        before = train.read_bytes()
        damage()
        assert prepare.prepare(tmp_path)
        assert train.read_bytes() == before


@pytest.mark.parametrize("name", ["clean.jsonl", "noise.py", "phrases.py"])
def test_a_changed_source_is_noticed(tmp_path, monkeypatch, name):
    copy = tmp_path / "demo"
    copy.mkdir()
    for source in (*DEMO.glob("*.py"), DEMO / "clean.jsonl"):
        (copy / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(prepare, "HERE", copy)
    assert prepare.prepare(tmp_path / "out") and prepare.is_current(tmp_path / "out", 0)
    with (copy / name).open("a", encoding="utf-8") as handle:
        handle.write("\n")
    assert not prepare.is_current(tmp_path / "out", 0)


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    assert prepare.prepare(tmp_path)
    write = Path.write_bytes

    def stop_at_the_second_file(path, data):
        if path.name == "test.jsonl":
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", stop_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path, seed=1)
    monkeypatch.undo()
    assert (tmp_path / "data/train.jsonl").exists()
    assert not prepare.is_current(tmp_path, 0) and not prepare.is_current(tmp_path, 1)
    (tmp_path / prepare.STAMP).write_text("[")
    assert not prepare.is_current(tmp_path, 0)


@pytest.fixture
def planted(tmp_path):
    """Two rows, the second with noise at its end, and their table in which chosen tokens are dropped."""
    texts = ["Two and two are four.", "Ana has 3 coins. Great question!"]
    spans = [[], [[16, 32, noise.STOCK]]]
    for name, records in {
        "data/train.jsonl": [{"prompt": [], "completion": [{"role": "assistant", "content": text}]} for text in texts],
        "noise.train.jsonl": [{"kind": "maths", "noise": noise_} for noise_ in spans],
    }.items():
        tiny.save_rows(tmp_path / name, records)
    fast = tiny.tokenizer()
    ids = [[*fast(text)["input_ids"], *fast("<|im_end|>\n")["input_ids"]] for text in texts]
    starts = [start for start, _ in fast(texts[1], return_offsets_mapping=True)["offset_mapping"]]

    def table(dropped):
        """The table, the rows in another order than the data's; `dropped` says which offsets of the second text go."""
        columns = {"row": [], "position": [], "token_id": [], "kept": []}
        for row, tokens in enumerate(reversed(ids)):
            for index, token in reversed(list(enumerate(tokens))):
                kept = row != 0 or index >= len(starts) or not dropped(starts[index])
                for name, item in zip(columns, (row, index + 9, token, kept), strict=True):
                    columns[name].append(item)
        path = tmp_path / "scores.parquet"
        pq.write_table(pa.table(columns), path)
        return judge.judge(fast, judge.read_rows(tmp_path), judge.read_documents(path))

    return table, sum(map(len, ids)), sum(start >= 16 for start in starts), sum(start < 16 for start in starts)


def test_the_judge_counts_noise_that_is_dropped_and_good_tokens_that_are_lost(planted):
    table, all_, noisy, before = planted
    counts = table(lambda start: start >= 16)
    assert counts.tokens == {noise.STOCK: noisy, judge.GOOD: all_ - noisy}
    assert counts.dropped == {noise.STOCK: noisy}
    assert table(lambda start: start < 16).dropped == {judge.GOOD: before}
    both = table(lambda start: True)
    assert both.dropped == {noise.STOCK: noisy, judge.GOOD: before}
    assert f"Of the {noisy + before} dropped tokens {noisy} are noise" in both.report()


def test_the_judge_prints_a_dropped_text_of_each_kind_and_lines_that_are_kept():
    noise_of = {"stock phrase": ["'Sure!'", "'Certainly, my friend!'"], "digression": ["'It rained.'"]}
    tokens = {"good": 9, "stock phrase": 2, "digression": 1}
    counts = judge.Counts(judge.Counter(tokens), judge.Counter(noise_of.keys()), noise_of, ["'Two is even.'"])
    lines = counts.report().splitlines()
    assert [line for line in lines if ": '" in line] == [
        "dropped, digression: 'It rained.'",
        "dropped, stock phrase: 'Certainly, my friend!'",
        "kept: 'Two is even.'",
    ]


def test_the_comparison_tells_the_loss_of_noise_from_that_of_good_text(monkeypatch):
    """A model that is sure of the noise has a low loss on it, and writes it."""
    fast, text = tiny.tokenizer(), "Sure, happy to help! Two and two are four."
    rows = [{"prompt": [{"content": "How many?"}], "completion": text, "noise": [(0, 20, "stock phrase")]}]
    monkeypatch.setattr(compare, "asked", lambda tokenizer, prompt: tokenizer("How many?")["input_ids"])
    ids = fast("How many?" + text)["input_ids"]
    part = len(fast("How many?")["input_ids"] + fast(text[:20])["input_ids"])

    class Sure:
        def __call__(self, input_ids, use_cache):
            logits = torch.zeros(1, len(input_ids[0]), len(fast))
            for place, token in enumerate(input_ids[0, 1:part]):
                logits[0, place, token] = 50.0
            return SimpleNamespace(logits=logits)

    good, bad = compare.losses(Sure(), fast, rows)
    assert bad < 0.01 and good == pytest.approx(math.log(len(fast)), abs=0.01) and len(ids) > part
    texts = compare.report(rows, {"plain": ((good, bad), ["Sure! Four."]), "ours": ((good, 9.0), ["Four."])})
    assert "plain: 'Sure! Four.'" in texts and "ours: 'Four.'" in texts and "9.000" in texts


def test_the_judge_says_when_nothing_is_dropped(planted):
    assert "Nothing was dropped" in planted[0](lambda start: False).report()


def test_the_judge_refuses_a_table_of_other_data():
    fast = tiny.tokenizer()
    rows = [{"completion": "Two and two are four.", "noise": []}]
    other = {
        "token_id": fast("Something else.")["input_ids"],
        "kept": [True] * len(fast("Something else.")["input_ids"]),
    }
    with pytest.raises(judge.JudgeError, match="Something"):
        judge.judge(fast, rows, [other])


def test_a_token_is_noise_if_more_than_half_of_its_characters_are():
    spans = [(4, 8, noise.PAGE)]
    assert [judge.kind_of(token, spans) for token in ((0, 4), (2, 6), (3, 6), (5, 7), (7, 10))] == [
        judge.GOOD,
        judge.GOOD,
        noise.PAGE,
        noise.PAGE,
        judge.GOOD,
    ]
