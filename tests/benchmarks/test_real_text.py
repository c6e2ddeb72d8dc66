"""The benchmark on real text, on a handful of made-up records: parts never mix, losses count the tokens they name."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch

from tests.benchmarks.real_text import audit, base, encode, examples, pages, planted, records, runs, stages
from tests.benchmarks.real_text.__main__ import main
from tests.reliability import LONG


def sums(rng: random.Random) -> dict[str, str]:
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    name = rng.choice(("Ada", "Bo", "Cy", "Di"))
    question = f"{name} has {a} pears and finds {b} more. How many pears has {name}?"
    return {"question": question, "answer": f"{name} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pears.\n#### {a + b}"}


def studies(rng: random.Random) -> dict[str, str]:
    herb, pain, decision = rng.choice("abcdefgh"), rng.choice("rstuvwxyz"), rng.choice(records.DECISIONS)
    return {
        "question": f"Does herb {herb} help against pain {pain}?",
        "context": f"{rng.randint(10, 99)} people took herb {herb}. Pain {pain} was asked for every day.",
        "long_answer": f"Herb {herb} was taken well. More studies of pain {pain} are needed.",
        "final_decision": decision,
    }


def programs(rng: random.Random) -> dict[str, str]:
    name, number = rng.choice(("add", "sub", "top")), rng.randint(1, 99)
    return {
        "prompt": f'def {name}_{number}(x):\n    """Return x and {number}."""\n',
        "canonical_solution": f"    y = x + {number}\n    return y\n",
    }


@pytest.fixture(scope="module", autouse=True)
def not_quiet():
    with pytest.MonkeyPatch.context() as patched:  # it would silence other tests' warnings
        patched.setattr("tests.benchmarks.real_text.__main__.quiet", lambda: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, make in (("gsm8k_train", sums), ("pubmedqa", studies), ("humaneval", programs)):
        rows = [make(rng) for _ in range(50)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    if not LONG:
        pytest.skip("a laboratory; `make test-long` runs it")
    target = tmp_path_factory.mktemp("out")
    page = target / "page.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    main(["--data", str(data), "--folder", str(target), "--scale", "smoke", "--write", str(page)])
    return target


class TestCommand:
    def test_the_page_has_every_table_and_keeps_what_is_around_it(self, folder):
        text = (folder / "page.md").read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        for title in (
            "Data and base",
            "dropped from",
            "Kinds of",
            "Overlap",
            "most often",
            "on PubMedQA",
            "Foreign lines",
            "foreign lines: loss",
        ):
            assert len(re.findall(f"^### .*{title}", text, re.MULTILINE)) == 1, title
        assert all(f"| {arm} | 2 |" in text for arm in (*runs.ARMS, *planted.ARMS))

    def test_examples_are_printed_and_stay_out_of_the_page(self, folder, data, capsys):
        command = ["--data", str(data), "--folder", str(folder), "--scale", "smoke", "--minutes", "0"]
        main(command)
        assert "### Examples" in capsys.readouterr().out and "### Examples" not in (folder / "page.md").read_text()

    def test_a_second_run_does_nothing_again(self, folder, data, monkeypatch):
        before = (folder / "page.md").read_text()
        for module, name in ((base, "make_base"), (runs, "run"), (audit, "audit_block")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("done already"))
        page = str(folder / "page.md")
        main(["--data", str(data), "--folder", str(folder), "--scale", "smoke", "--minutes", "0", "--write", page])
        assert (folder / "page.md").read_text() == before

    def test_held_out_losses_are_not_those_of_the_base(self, folder):
        one, other = (
            json.loads((folder / "runs" / f"GSM8K {name}.json").read_text())["result"] for name in ("base", "plain 0")
        )
        assert one["all"] != other["all"] and 0 < other["all"] < 2 * math.log(512)


class TestParts:
    def test_no_prompt_is_in_two_parts(self, data):
        for parts in records.read(data).values():
            prompts = [{one.head + one.tail for one in parts[name]} for name in records.PARTS]
            assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts))

    def test_a_part_does_not_hang_on_the_order(self, data, tmp_path):
        for name, _ in records.DATASETS.values():
            lines = (data / name).read_text().splitlines(keepends=True)
            (tmp_path / name).write_text("".join(lines[::-1]))
        for one, other in zip(records.read(data).values(), records.read(tmp_path).values(), strict=True):
            assert all(sorted(map(repr, one[part])) == sorted(map(repr, other[part])) for part in records.PARTS)

    def test_shares_are_those_asked_for(self):
        parts = [records.part_of(records.Record(f"question {i}", "", "", 0, 0)) for i in range(4_000)]
        for name, share in records.PARTS.items():
            assert abs(parts.count(name) / len(parts) - share) < 0.03

    def test_training_reads_no_held_out_row(self, data, monkeypatch, tmp_path):
        """Neither the tokenizer, nor the base model, nor a run sees a held-out text."""
        parts, seen = records.read(data), list[str]()
        scale = stages.SCALES["smoke"]
        real = encode.train_tokenizer

        def tokenizer(texts, vocabulary, context):
            seen.extend(texts)
            return real(texts, vocabulary, context)

        monkeypatch.setattr(base, "train_tokenizer", tokenizer)
        monkeypatch.setattr(
            base, "train_base", lambda documents, t, *_: seen.extend(map(t.decode, documents)) or _stop()
        )
        with pytest.raises(KeyboardInterrupt):
            base.make_base(parts, tmp_path, scale)
        for by_part in parts.values():
            assert all(any(one.head in text for text in seen) for one in by_part["pretrain"])
            assert not any(one.head in text for one in (*by_part["train"], *by_part["held-out"]) for text in seen)


def _stop():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tokenizer(data):
    parts = records.read(data).values()
    texts = [one.head + one.tail + one.completion for by_part in parts for one in by_part["pretrain"]]
    return encode.train_tokenizer(texts, 512, 192)


class TestTokens:
    def _by_kind(self, row, tokenizer):
        found: dict[str, str] = {}
        for token, kind in zip(row.completion, row.kinds, strict=True):
            found[kind] = found.get(kind, "") + tokenizer.decode([token])
        return found

    def test_kinds_of_a_word_problem(self, tokenizer):
        record = records.gsm8k({"question": "How many?", "answer": "It is 2+3=<<2+3=5>>5 pears.\n#### 1,5"})
        found = self._by_kind(encode.encode(record, tokenizer, 192), tokenizer)
        assert found["answer"] == "1,5" and found["answer mark"].strip() == "####"
        assert found["calculator"].strip("=>") == "<<2+3=5" and found["number"] == "235"
        assert found["line break"] == "\n" and found["end of text"] == encode.EOS_TOKEN

    def test_kinds_of_a_decision(self, tokenizer):
        fields = {"question": "Is 1?", "context": "No 2.", "long_answer": "Yes, maybe no.", "final_decision": "maybe"}
        found = self._by_kind(encode.encode(records.pubmedqa(fields), tokenizer, 192), tokenizer)
        assert found["answer"].strip() == "maybe" and found["answer mark"].strip() == "Decision:"

    def test_a_long_prompt_is_cut_and_the_completion_is_not(self, tokenizer):
        record = records.Record("many words " * 300, "\nAnswer:\n", "It is 4.\n#### 4", 9, 14)
        row = encode.encode(record, tokenizer, 100)
        assert len(row.prompt) + len(row.completion) == 100
        assert tokenizer.decode(row.prompt).endswith("\nAnswer:\n")
        assert tokenizer.decode(row.completion[:-1]) == record.completion
        short = encode.encode(record, tokenizer, 100, prompt=30)
        assert len(short.prompt) == 30 and short.prompt[:20] == row.prompt[:20] and short.completion == row.completion

    def test_losses_are_those_of_a_pass_row_by_row(self, folder, data):
        model, tokenizer = base.load(folder / "base")
        rows = encode.encode_all(records.read(data)["GSM8K"]["held-out"][:4], tokenizer, 192)
        wanted = []
        for row in rows:
            ids = torch.tensor([row.prompt + row.completion])
            logprobs = model(ids).logits[0].log_softmax(-1)
            for place in range(len(row.prompt), ids.shape[1]):
                wanted.append(-float(logprobs[place - 1, ids[0, place]].detach()))
        assert np.allclose(base.examine(model, rows), wanted, atol=1e-4)

    def test_answer_loss_counts_answer_tokens_alone(self, tokenizer):
        problems = [{"question": "How many?", "answer": f"It is 7 or {n}.\n#### {n}"} for n in (12, 345)]
        rows = encode.encode_all([records.gsm8k(one) for one in problems], tokenizer, 192)
        answers, digits = runs.answer_tokens(rows), encode.numbers(rows, tokenizer)
        ids = encode.completion_ids(rows)
        assert tokenizer.decode(ids[answers]).replace(" ", "") == "12345"
        assert tokenizer.decode(ids[digits]).replace(" ", "") == "712127345345"
        losses = np.where(answers, 3.0, np.where(digits, 1.0, 0.0))
        found = runs.means(losses, {"numbers": digits, "answer": answers, "none": np.zeros_like(digits)})
        assert found["answer"] == 3.0 and math.isclose(found["numbers"], (5 * 3 + 7) / 12)
        assert math.isclose(found["all"], losses.sum() / len(losses)) and math.isnan(found["none"])


class TestPlanted:
    def _planted(self, data, number=200):
        parts, rng = records.read(data), random.Random(1)
        solutions = [record for by_part in parts["GSM8K"].values() for record in by_part]
        chosen = (4 * solutions)[:number]
        return [(one, *planted.plant(one, solutions, ["Take two pills of herb a."], rng)) for one in chosen]

    def test_foreign_lines_are_where_they_are_said_to_be(self, data):
        kinds, noise, total = set(), 0, 0
        for before, after, places in self._planted(data):
            rest = after.completion
            for begin, end, kind in reversed(places):
                noise += end - begin
                kinds.add(kind)
                rest = rest[:begin] + rest[end:]
            total += len(after.completion)
            assert rest == before.completion and after.completion[after.answer :] == before.completion[before.answer :]
        assert kinds == set(planted.KINDS) and 0.15 < noise / total < 0.4

    def test_a_token_has_the_kind_of_its_line(self, data, tokenizer):
        for _, after, places in self._planted(data, 8):
            row = planted.noisy_row(after, places, tokenizer, stages.SCALES["smoke"])
            assert len(row.kinds) == len(row.completion) and row.kinds[-1] == planted.GOOD
            for kind in planted.KINDS:
                text = tokenizer.decode([i for i, k in zip(row.completion, row.kinds, strict=True) if k == kind])
                expected = "".join(after.completion[begin:end] for begin, end, own in places if own == kind)
                assert text.replace("\n", "").replace(" ", "") == expected.replace("\n", "").replace(" ", "")

    def test_shares_of_a_hand_made_selection(self):
        kinds = np.asarray(["good", "medicine", "medicine", "good", "symbols"])
        found = planted.found_by(np.asarray([True, True, False, False, True]), kinds)
        assert found["medicine"] == 0.5 and found["symbols"] == 1 and found["good"] == 0.5
        assert found["all"] == 2 / 3 and found["precision"] == 2 / 3


class TestFigures:
    def test_little_is_not_shown_as_nothing(self):
        shares = [pages.percent(share) for share in (0.0, 0.0001, 0.0005, 0.123, math.nan)]
        assert shares == ["0.0%", "< 0.05%", "0.1%", "12.3%", "–"]

    def test_overlap_of_a_hand_made_selection(self):
        flags = {
            "a": np.asarray([1, 1, 1, 0, 0, 0, 0, 0], dtype=bool),
            "b": np.asarray([0, 1, 1, 1, 0, 0, 0, 0], dtype=bool),
            "c": np.asarray([0, 0, 1, 0, 1, 0, 0, 0], dtype=bool),
        }
        found = audit.overlap(flags)
        assert found["union"] == 5 / 8 and found["exactly"] == {"1": 3 / 5, "2": 1 / 5, "3": 1 / 5}
        assert found["pairs"]["a and b"] == {"shared": 2 / 4, "of_smaller": 2 / 3}
        assert found["pairs"]["a and c"] == {"shared": 1 / 4, "of_smaller": 1 / 2}

    def test_overlap_figures_of_a_run_add_up(self, folder):
        for name in records.DATASETS:
            one = json.loads((folder / "audit" / f"{name} paper.json").read_text())["result"]
            assert (
                math.isclose(sum(one["overlap"]["exactly"].values()), 1) and one["overlap"]["union"] == one["dropped"]
            )
            assert math.isclose(sum(kind["of_dropped"] for kind in one["kinds"].values()), 1)
            assert math.isclose(sum(kind["tokens"] for kind in one["kinds"].values()), 1)

    def test_tokens_dropped_most_often(self, folder):
        _, tokenizer = base.load(folder / "base")
        ids = np.asarray([40, 41, 40, 40, 42])
        found = audit.top(np.asarray([True, True, True, False, False]), ids, tokenizer)
        assert [(number, share) for _, number, share in found] == [(2, 2 / 3), (1, 1.0)]


class TestExamples:
    class Letters:
        """A token is a letter."""

        def decode(self, ids):
            return "".join(map(chr, ids))

    def _marked(self, text, gone, **options):
        ids = list(map(ord, text))
        return examples.excerpt(ids, [mark == "x" for mark in gone], self.Letters(), **options)

    def test_dropped_text_is_struck_and_markdown_is_escaped(self):
        assert self._marked("a *b c", "  xxx ") == r"a ~~\*b~~ c"
        assert self._marked("a b\nc", "  xx ") == "a ~~b⏎~~c"
        assert self._marked("ab c", " xx ") == "a~~b~~ c"
        assert self._marked("#### 7\n", "     xx") == r"\#\#\#\# ~~7⏎~~"
        assert self._marked("a b", " x ") == "a~~␣~~b"

    def test_long_text_is_cut_around_the_first_drop(self):
        text = self._marked("k" * 300 + "d" * 300, " " * 300 + "x" * 300, longest=100)
        assert len(text) <= 100 and text.startswith("… " + "k" * examples.BEFORE + "~~d") and text.endswith("d~~ …")
