"""The demo's generators: same seed same bytes, right arithmetic, noise where it is said to be, and an honest stamp."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
sys.path.insert(0, str(DEMO))  # the demo is a folder of scripts, not a package

import base_model  # noqa: E402
import prepare  # noqa: E402
from boilerplate import KINDS, RULES, boilerplate  # noqa: E402
from demo_data import CLEAN_SHARE, make_corpus, make_rows, write_rows  # noqa: E402
from general import GENERAL, SCENES  # noqa: E402
from grammar import expand  # noqa: E402
from problems import ANSWER_HEAD, Draft  # noqa: E402
from settings import BaseSettings, DemoSettings  # noqa: E402
from stories import STORIES  # noqa: E402

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TINY = BaseSettings(
    vocabulary=400,
    hidden=64,
    intermediate=64,
    layers=1,
    heads=2,
    length=64,
    batch=4,
    steps=12,
    warmup=2,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def rows():
    return make_rows(seed=0, count=1000)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        write_rows(make_rows(seed, 50), path)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other
    assert make_corpus(3, 50) == make_corpus(3, 50) != make_corpus(4, 50)


def test_rows_are_different_and_complete(rows, tmp_path):
    write_rows(rows, tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len({line["prompt"] for line in lines}) == 1000
    assert all(set(line) == {"prompt", "completion"} for line in lines)
    assert all(line["prompt"].strip() and line["completion"].strip() for line in lines)
    assert {row.problem.kind for row in rows} == {story.__name__ for story in STORIES}


def test_every_step_and_every_answer_is_right(rows):
    for row in rows:
        found = EQUATION.findall(" ".join(row.problem.steps))
        assert 2 <= len(found) == len(row.problem.steps) <= 4
        for left, operator, right, value in found:
            exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert (int(value) * int(right) == int(left)) if operator == "/" else (exact[operator] == int(value))
        assert row.problem.answer == int(found[-1][-1]) > 0
        answer_line = row.completion[row.completion.index(ANSWER_HEAD) + len(ANSWER_HEAD) :].splitlines()[0]
        assert answer_line == f"{row.problem.answer} {row.problem.unit}"


def test_every_number_of_the_first_step_is_in_the_story(rows):
    for row in rows:
        left, _, right, _ = EQUATION.findall(row.problem.steps[0])[0]
        known = set(re.findall(r"\d+", row.problem.question)) | {"100"}  # 100 centimetres in a metre
        assert {left, right} <= known


def test_without_its_noise_a_completion_is_the_clean_solution(rows):
    for row in rows:
        clean, position = "", 0
        for start, end, kind in row.noise:
            assert kind in KINDS and position <= start < end
            clean, position = clean + row.completion[position:start], end
        clean += row.completion[position:]
        assert row.problem.prompt + clean == row.problem.text


def test_share_of_noise_and_of_clean_rows(rows):
    share = sum(row.noise_characters for row in rows) / sum(len(row.completion) for row in rows)
    clean = sum(not row.noise for row in rows) / len(rows)
    assert 0.2 < share < 0.4
    assert CLEAN_SHARE <= clean < CLEAN_SHARE + 0.12  # chance leaves a few of the others clean too


def test_noise_rarely_repeats_and_reads_like_sentences():
    rng = random.Random(0)
    for kind in KINDS:
        texts = [boilerplate(kind, rng) for _ in range(300)]
        assert len(set(texts)) > 100
        assert all(text[0].isupper() and text[-1] in ".!?" and "[" not in text for text in texts)


@pytest.mark.parametrize("rules", [RULES, SCENES], ids=["boilerplate", "scenes"])
def test_every_slot_has_a_rule(rules):
    slots = {slot for options in rules.values() for option in options for slot in re.findall(r"\[(\w+)\]", option)}
    assert slots <= set(rules)
    with pytest.raises(KeyError):
        expand("[no_such_rule]", rules, random.Random(0))


def test_general_texts_are_sentences_and_their_sums_are_right():
    rng = random.Random(0)
    for write, _ in GENERAL:
        for _ in range(100):
            text = write(rng)
            assert text[0].isupper() and text[-1] in ".!?" and "[" not in text
            assert all(int(a) * int(b) == int(c) for a, _, b, c in EQUATION.findall(text))


def test_corpus_leaves_out_the_prompts_of_the_rows(rows):
    prompts = {row.problem.prompt for row in rows}
    corpus = make_corpus(0, 3000, prompts)
    assert len(corpus) == 3000
    assert not any(text.startswith(tuple(prompts)) for text in corpus)
    noisy = sum("Problem:" in text and not text.splitlines()[-1].startswith("Answer:") for text in corpus)
    assert 0 < noisy < 0.1 * len(corpus)


def test_a_story_with_bad_numbers_is_refused():
    draft = Draft(random.Random(0), "bad")
    for left, operator, right in ((3, "-", 3), (3, "-", 5), (7, "/", 2)):
        with pytest.raises(ValueError, match="not a positive whole number"):
            draft.step("it", left, operator, right, "dollars")


def test_packed_positions_restart_with_every_text():
    texts = ["one two three", "four five"] * 40
    tokenizer = base_model.train_tokenizer(texts, TINY)
    ids, positions = base_model.pack(texts, tokenizer, 16)
    assert ids.shape == positions.shape and ids.shape[1] == 16
    starts = ids == tokenizer.bos_token_id
    assert starts.sum() > 20
    assert (positions[starts] == 0).all() and (positions[:, 0] == 0).all()
    later = ~starts[:, 1:]
    assert (positions[:, 1:][later] == positions[:, :-1][later] + 1).all()


def test_tokenizer_reads_digits_one_by_one_and_gives_back_the_text(rows):
    tokenizer = base_model.train_tokenizer([row.problem.text for row in rows[:100]], TINY)
    text = rows[0].problem.text
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not any(re.search(r"\d.*\d", token) for token in tokenizer.convert_ids_to_tokens(ids))
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "4"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>Problem: How many?\nSolution: 4</s>"


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / ".demo"
    settings = DemoSettings(train_rows=20, test_rows=5, corpus_documents=120, held_out=5, base=TINY)
    assert prepare.prepare(output, settings)
    return output, settings


def test_prepare_makes_a_model_that_has_learnt_something(tiny_demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = tiny_demo
    model = AutoModelForCausalLM.from_pretrained(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    texts = [row.problem.text for row in make_rows(9, 5)]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
    assert math.isfinite(base_model.perplexity(model, tokenizer, texts))
    assert base_model.perplexity(model, tokenizer, texts) < len(tokenizer) / 2
    assert len((output / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 20
    assert len((output / "noise.test.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def test_a_second_run_does_nothing_until_something_changes(tiny_demo):
    output, settings = tiny_demo
    before = (output / "base" / "model.safetensors").stat().st_mtime_ns
    assert not prepare.prepare(output, settings)
    assert (output / "base" / "model.safetensors").stat().st_mtime_ns == before
    assert not prepare.is_current(output, replace(settings, seed=1))
    assert not prepare.is_current(output, replace(settings, base=replace(TINY, steps=13)))
    (output / "data" / "test.jsonl").rename(output / "data" / "gone")
    assert not prepare.is_current(output, settings)
    (output / "data" / "gone").rename(output / "data" / "test.jsonl")
    assert prepare.is_current(output, settings)


def test_stamp_follows_the_sources(tmp_path, monkeypatch):
    for source in DEMO.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    before = prepare.stamp(DemoSettings())
    assert before == prepare.stamp(DemoSettings())
    (tmp_path / "stories.py").write_bytes((tmp_path / "stories.py").read_bytes() + b"\n")
    assert before != prepare.stamp(DemoSettings())


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    settings = DemoSettings(train_rows=3, test_rows=2, corpus_documents=5, held_out=1, base=TINY)
    monkeypatch.setattr(base_model, "make_base", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path, settings)
    assert (tmp_path / "data" / "train.jsonl").exists()
    assert not (tmp_path / prepare.STAMP).exists()
