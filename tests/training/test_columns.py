"""The scorer `column` in a real SFTTrainer: the marked text is not trained on, and what does not fit is refused by row.

Trainers with `args.xtf` go through TRL's patched preparation; others are attached when their rows are prepared.
"""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from tests import hooks, tiny
from xtf_plugin import XTFConfig, XTFDryRun, XTFUserError, attach
from xtf_plugin.data.documents import collect
from xtf_plugin.hosts import boot
from xtf_plugin.hosts import trl as hook
from xtf_plugin.training import columns

NOISE = "Sure, happy to help!"
CRITIC = {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "noise"}}}
CHAT = {"assistant_only_loss": True}


@pytest.fixture
def patched():
    hooks.uninstall()
    hook.patch_trainer(sft_trainer)
    yield
    hooks.uninstall()
    boot.install()


def span(text, piece=NOISE):
    return [text.index(piece), text.index(piece) + len(piece)]


def problems(n=12):
    """Every second row marks its noise; of the others, half are null and half empty."""
    rows = tiny.problems(n)
    for place, row in enumerate(rows):
        row["noise"] = [span(row["completion"])] if place % 2 else [None, []][place // 2 % 2]
    return rows


def chats(n=8):
    """The second of three answers is marked, and in every fourth row nothing."""
    rows = tiny.conversations(n, turns=3)
    for place, row in enumerate(rows):
        row["noise"] = [[], [span(row["messages"][3]["content"])], None] if place % 4 else None
    return rows


def block(form="spans", **more):
    return {
        **CRITIC,
        "dry_run": True,
        "selectors": {"critic": {"scorer": "column", "column": "noise", "format": form, **more}},
    }


def sft(tmp_path, rows, given=None, eval_rows=None, **options):
    settings = {"max_steps": 1, "max_length": 256, "bf16": False, **options}
    args = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, **settings)
    if given is not None:
        args.xtf = {"cache_dir": str(tmp_path / "cache"), **given}
    data = {"train_dataset": Dataset.from_list(rows)}
    data |= {} if eval_rows is None else {"eval_dataset": Dataset.from_list(eval_rows)}
    return SFTTrainer(tiny.model(), args=args, processing_class=tiny.tokenizer(), **data)


def dropped(tmp_path, made, given=None):
    """The text that is dropped, by the text of its document; everything is dropped by `critic`."""
    if given is not None:
        attach(made, {"cache_dir": str(tmp_path / "cache"), **given})
    with pytest.raises(XTFDryRun):
        made.train()
    table = pq.read_table(tmp_path / "out/xtf/scores.parquet").to_pandas()
    assert set(table[~table.kept].reason) <= {"critic"}
    found = {}
    for _, group in table.groupby(["row", "document"], sort=False):
        found["".join(group.token)] = "".join(group[~group.kept].token)
    return found


EOS = "<|endoftext|>"


def expected(rows):
    return {row["completion"] + EOS: NOISE if row["noise"] else "" for row in rows}


SHAPES = {
    "rows": {},
    "packed": {"packing": True, "max_length": 160},
    "packed, split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 160},
    "padding-free": {"padding_free": True, "max_length": None},
    "shuffled": {"shuffle_dataset": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_marked_text_is_dropped(tmp_path, patched, shape):
    rows = problems()
    made = sft(tmp_path, rows, block(), **SHAPES[shape])
    stripped = {text: noise.strip() for text, noise in dropped(tmp_path, made).items()}
    assert stripped == expected(rows)
    assert ("seq_lengths" in made.train_dataset.column_names) == ("packed" in shape)


def test_the_rows_of_evaluation_need_no_marks(tmp_path, patched):
    rows = problems()
    made = sft(tmp_path, rows, block(), eval_rows=tiny.problems(4, seed=5))
    assert {text: noise.strip() for text, noise in dropped(tmp_path, made).items()} == expected(rows)
    assert len(made.eval_dataset) == 4


def test_preparation_gives_the_same_rows(tmp_path, patched):
    for options in (SHAPES["packed"], {"max_length": 40}, {"shuffle_dataset": True}):
        with_column = sft(tmp_path, problems(), block(), **options).train_dataset
        plain = sft(tmp_path, problems(), {"preset": "none", "knowledge_novelty": True}, **options).train_dataset
        assert with_column.column_names == plain.column_names
        assert with_column["input_ids"][:] == plain["input_ids"][:] and with_column["labels"][:] == plain["labels"][:]


CUTS = {
    "start": ({"max_length": 36}, [slice(0, 36)]),
    "end": ({"max_length": 14, "truncation_mode": "keep_end"}, [slice(-14, None)]),
    "packed": ({"max_length": 36, "packing": True}, [slice(0, 36)]),
    "packed, end": ({"max_length": 36, "packing": True, "truncation_mode": "keep_end"}, [slice(0, 36)]),
    "split": (
        {"max_length": 20, "packing": True, "packing_strategy": "bfd_split"},
        [slice(start, start + 20) for start in range(0, 200, 20)],
    ),
}


def left_of(rows, slices):
    """What is left of rows that are cut into these pieces of their tokens, and what of it is marked: by characters."""
    wanted, shortened = {}, 0
    for row in rows:
        whole, begin = row["prompt"] + row["completion"] + EOS, len(row["prompt"])
        tokens = tiny.tokenizer()(whole, return_offsets_mapping=True)["offset_mapping"]
        low, high = [begin + place for place in (row["noise"] or [[0, 0]])[0]]
        marked = [2 * (min(b, high) - max(a, low)) >= b - a for a, b in tokens]  # all of the text is ASCII
        for piece in slices:
            left = [(whole[a:b], flag) for (a, b), flag in zip(tokens[piece], marked[piece], strict=True) if a >= begin]
            if left:
                wanted["".join(text for text, _ in left)] = "".join(text for text, flag in left if flag)
                shortened += len(left) < sum(a >= begin for a, _ in tokens)
    assert shortened and any(wanted.values())
    return wanted


@pytest.mark.parametrize("cut", CUTS)
def test_cut_rows_keep_the_marks_of_what_is_left(tmp_path, patched, cut):
    rows, (options, slices) = problems(), CUTS[cut]
    assert dropped(tmp_path, sft(tmp_path, rows, block(), **options)) == left_of(rows, slices)


def test_rows_that_were_cut_before_keep_the_marks_of_what_is_left(tmp_path):
    rows, (options, slices) = problems(), CUTS["start"]
    assert dropped(tmp_path, sft(tmp_path, rows, **options), block()) == left_of(rows, slices)


def test_the_column_of_plain_text_has_the_name_that_the_trainer_gives_it(tmp_path):
    rows = [{"body": row["prompt"] + row["completion"], "noise": row["noise"]} for row in problems()]
    for row in rows:
        row["noise"] = [span(row["body"])] if row["noise"] else None
    found = dropped(tmp_path, sft(tmp_path, rows, dataset_text_field="body"), block())
    assert [noise.strip() for noise in found.values()] == [NOISE if row["noise"] else "" for row in rows]


@pytest.mark.parametrize("options", [CHAT, {}, {**CHAT, "packing": True}], ids=["answers", "everything", "packed"])
def test_marks_of_each_answer(tmp_path, patched, options):
    rows = chats()
    found = dropped(tmp_path, sft(tmp_path, rows, block(), max_length=400, **options))
    assert len(found) == len(rows)
    for row, (text, noise) in zip(rows, found.items(), strict=True) if "packing" not in options else ():
        assert row["messages"][3]["content"] in text and noise == (f" {NOISE}" if row["noise"] else "")
    assert sorted(noise.strip() for noise in found.values()) == sorted(NOISE if row["noise"] else "" for row in rows)
    assert all(text.count(NOISE) == 3 for text in found)


@pytest.mark.parametrize("form, value, wanted", [("messages", [1], 1), ("lines", [None, [0], []], 1)])
def test_whole_messages_and_lines_of_messages(tmp_path, patched, form, value, wanted):
    rows = [{**row, "noise": value} for row in chats(4)]
    found = dropped(tmp_path, sft(tmp_path, rows, block(form), max_length=400, **CHAT))
    answers = [row["messages"][2 * wanted + 1]["content"] for row in rows]
    assert list(found.values()) == answers  # the end of the turn is protected


def test_a_prompt_of_messages_and_a_column_of_steps(tmp_path, patched):
    rows = []
    for row in tiny.problems(4):
        steps = row["completion"].strip().replace(". ", ".\n\n")
        user, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": steps}
        rows.append({"prompt": [user], "completion": [answer], "noise": [[1]]})
    found = dropped(tmp_path, sft(tmp_path, rows, block("lines")))
    assert [noise.strip() for noise in found.values()] == [
        row["completion"][0]["content"].split("\n\n")[1] for row in rows
    ]


def test_attached_after_the_rows_are_prepared(tmp_path):
    rows = problems()
    stripped = {text: noise.strip() for text, noise in dropped(tmp_path, sft(tmp_path, rows), block()).items()}
    assert stripped == expected(rows)


def test_attached_to_a_trainer_that_cut_its_rows(tmp_path):
    found = dropped(tmp_path, sft(tmp_path, chats(), max_length=120, **CHAT), block())
    assert any(found.values()) and all(noise in f" {NOISE}" for noise in found.values())


@pytest.mark.parametrize("text", [None, "answer"])
def test_transformers_trainer(tmp_path, text):
    rows, name = problems(), text or "completion"

    def labelled(row):
        prompt, completion = (tiny.tokenizer()(part)["input_ids"] for part in (row["prompt"], row["completion"]))
        made = {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        return {**made, name: row["completion"], "noise": row["noise"]}

    args = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True)
    made = Trainer(
        model=tiny.model(),
        args=args,
        train_dataset=Dataset.from_list([labelled(row) for row in rows]),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    found = dropped(tmp_path, made, block(**({"text": text} if text else {})))
    wanted = {row["completion"]: NOISE if row["noise"] else "" for row in rows}
    assert {whole: noise.strip() for whole, noise in found.items()} == wanted


def test_a_dataset_that_is_no_table(tmp_path):
    """Rows are read one by one, and each must have the column."""
    made = sft(tmp_path, problems())
    rows = list(made.train_dataset)
    made.train_dataset = rows
    assert NOISE in {noise.strip() for noise in dropped(tmp_path, made, block()).values()}
    made = sft(tmp_path, problems())
    made.train_dataset = [*rows[:3], {key: value for key, value in rows[3].items() if key != "noise"}]
    attach(made, block())
    with pytest.raises(XTFUserError, match="no column 'noise'"):
        made.train()


def test_a_column_that_is_computed_when_rows_are_read():
    """By `set_transform`: the table behind the dataset has no such column."""
    fast, text = tiny.tokenizer(), f"It is 3. {NOISE}"
    ids = fast(text)["input_ids"]
    dataset = Dataset.from_list([{"input_ids": ids, "labels": ids, "completion": text}])
    dataset.set_transform(lambda batch: {**batch, "noise": [[span(one)] for one in batch["completion"]]})
    (marks,) = columns.read(dataset, XTFConfig.parse(CRITIC), fast).marks.values()
    flags = marks.of(collect([{"input_ids": ids, "labels": ids}]))
    assert fast.decode([token for token, flag in zip(ids, flags, strict=True) if flag]).strip() == NOISE


class TestRefusals:
    @staticmethod
    def refusal(capsys, tmp_path, rows, given=None, **options):
        with pytest.raises(SystemExit) as ended:
            sft(tmp_path, rows, given or block(), **options)
        assert ended.value.code == 2
        return capsys.readouterr().err

    def test_a_span_that_does_not_fit(self, tmp_path, patched, capsys):
        rows = problems()
        rows[7]["noise"] = [[3, 400]]
        length = len(rows[7]["completion"])
        message = self.refusal(capsys, tmp_path, rows)
        assert "row 7 of the training data, column noise: the span [3, 400]" in message
        assert f"0 <= start < end <= {length} is needed" in message

    def test_a_text_that_is_not_in_the_tokens(self, tmp_path):
        rows = problems()
        made = sft(tmp_path, rows)
        texts = list(made.train_dataset["completion"])
        texts[3] = texts[3].replace("answer", "result")
        made.train_dataset = made.train_dataset.remove_columns("completion").add_column("completion", texts)
        attach(made, block())
        with pytest.raises(XTFUserError, match="row 3 of the training data.*does not occur exactly once"):
            made.train()

    @pytest.mark.parametrize("value", [3, "[[0, 4]]"])
    def test_a_column_that_holds_no_lists(self, tmp_path, patched, capsys, value):
        message = self.refusal(capsys, tmp_path, [{**row, "noise": value} for row in tiny.problems(4)])
        assert "row 0 of the training data, column noise" in message and "is not a list" in message

    @pytest.mark.parametrize("packing", [False, True])
    def test_no_such_column(self, tmp_path, patched, capsys, packing):
        given = {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "noises"}}}
        message = self.refusal(capsys, tmp_path, problems(), given, packing=packing)
        assert "has no column 'noises'" in message and "Did you mean noise?" in message

    def test_packing_that_cuts_anywhere(self, tmp_path, patched, capsys):
        message = self.refusal(capsys, tmp_path, problems(), packing=True, packing_strategy="wrapped")
        assert "packing_strategy: wrapped" in message and "bfd" in message

    def test_rows_that_were_packed_before(self, tmp_path):
        made = attach(sft(tmp_path, problems(), packing=True), block())
        with pytest.raises(XTFUserError, match="no column 'noise'.*packed"):
            made.train()

    def test_packed_rows_that_still_have_the_column(self, tmp_path):
        made = sft(tmp_path, problems())
        lengths = [[4, len(ids) - 4] for ids in made.train_dataset["input_ids"]]
        made.train_dataset = made.train_dataset.add_column("seq_lengths", lengths)
        attach(made, block())
        with pytest.raises(XTFUserError, match="These rows are packed"):
            made.train()

    def test_rows_changed_after_they_were_read(self, tmp_path, patched):
        made = sft(tmp_path, problems(), block())
        made.train_dataset = made.train_dataset.map(lambda row: {"input_ids": [7, *row["input_ids"][1:]]})
        with pytest.raises(SystemExit):
            made.train()

    def test_streams(self, tmp_path):
        made = sft(tmp_path, problems())
        made.train_dataset = IterableDataset.from_generator(lambda: iter([{"input_ids": [1, 2], "labels": [1, 2]}]))
        with pytest.raises(XTFUserError, match="streamed, and critic"):
            attach(made, CRITIC)

    def test_streams_of_a_recipe(self, tmp_path, patched, capsys):
        args = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, max_steps=1, bf16=False)
        args.xtf = block()
        stream = Dataset.from_list(problems()).to_iterable_dataset()
        with pytest.raises(SystemExit) as ended:
            SFTTrainer(tiny.model(), args=args, processing_class=tiny.tokenizer(), train_dataset=stream)
        assert ended.value.code == 2 and "the training data is streamed, and critic" in capsys.readouterr().err


def test_a_column_without_marks_is_warned_of(tmp_path, patched, capsys):
    rows = [{**row, "noise": [[0, 1]] if place else None} for place, row in enumerate(problems(2))]
    made = sft(tmp_path, rows, block())
    dropped(tmp_path, made)
    warnings = json.loads((tmp_path / "out/xtf/summary.json").read_text())["warnings"]
    assert any("the marks of 1 rows in the column noise hold less than half" in text for text in warnings)
    (warning,) = [text for text in warnings if text.startswith("critic: ")]  # not also that its rule fires on nothing
    assert "critic: the column noise marks nothing" in warning


def test_scores_of_earlier_runs_are_still_found(tmp_path, patched):
    low = {"low": {"scorer": "log_probability", "drop": {"below": -1e9}}}
    with pytest.raises(XTFDryRun):
        sft(tmp_path, problems(), {"preset": "none", "dry_run": True, "selectors": low}).train()
    stored = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    both = {**CRITIC["selectors"], **low}
    found = dropped(tmp_path, sft(tmp_path, problems(), {**block(), "selectors": both}))
    assert any(found.values())
    assert json.loads((tmp_path / "out/xtf/summary.json").read_text())["scoring"]["scored_documents"] == 0
    after = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {path: after[path] for path in stored if path.suffix != ".lock"} == {
        path: data for path, data in stored.items() if path.suffix != ".lock"
    }


def test_the_column_is_required():
    with pytest.raises(XTFUserError, match="selectors.critic.column: missing"):
        XTFConfig.parse({"preset": "none", "selectors": {"critic": {"scorer": "column"}}})
    part = XTFConfig.parse(CRITIC).selectors["critic"]
    assert part.drop.below == 0.5 and part.format == "spans"
