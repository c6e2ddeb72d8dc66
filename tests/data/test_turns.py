"""Ends of turns: what the template writes is protected however it is tokenised, and what is never trained is said."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import real, tiny
from tests.pages import ROOT
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.data.token_text import token_bytes
from xtf_plugin.data.turns import Turns, TurnTexts
from xtf_plugin.errors import XTFUserError
from xtf_plugin.selection.text_rules import TextRules, special_ids

FIELD = ROOT / "tests/data/field"
LOOP = "{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }}\n{% else %}"
ENDS = {  # what is written after an answer, and what is protected of it
    "<|im_end|>\n": "<|im_end|>",
    "<end_of_turn>\n": "<end_of_turn>",
    "\n### End\n\n": "### End",
    " [/ANSWER]": "[/ANSWER]",
    "\n---\n": "---",
    "<STOP>": "<STOP>",
}


@cache
def plain():
    """A byte-level tokenizer that knows no mark: it cuts every one into pieces."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((row["prompt"] + row["completion"] for row in tiny.problems(100)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def rules_of(tokenizer, rows, **protect):
    config = XTFConfig.parse({"preset": "none", "knowledge_novelty": True, "protect": {"formats": None, **protect}})
    return TextRules.find(config, collect(rows), tokenizer)


def row(tokenizer, before, after):
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    return {"input_ids": [*first, *second], "labels": [-100] * len(first) + second}


def spelt(tokenizer, rows, marks):
    ids = [label for each in rows for label in each["labels"] if label != -100]
    return b"".join(token_bytes(tokenizer, np.asarray(ids)[marks].tolist())).decode()


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_is_cut_into_pieces_is_protected(end):
    tokenizer = plain()
    tokenizer.chat_template = LOOP + "A: {{ m['content'] }}" + end + "{% endif %}{% endfor %}"
    rows = [row(tokenizer, "U: Hi\nA: ", f"Answer {number}.{end}") for number in range(3)]
    text = rules_of(tokenizer, rows)
    kept = spelt(tokenizer, rows, text.protected).split()
    assert "".join(kept) == 3 * ENDS[end].replace(" ", "")
    assert text.turns.ended.all() and text.turns.unended(np.ones(3, dtype=np.int64)) == 0
    assert not rules_of(tokenizer, rows, special_tokens=False).protected.any()


def test_the_ends_of_turns_within_one_run_are_protected():
    """The whole conversation is trained on."""
    tokenizer = plain()
    tokenizer.chat_template = LOOP + "A: {{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    rows = [row(tokenizer, "", "U: Hi\nA: One.<|im_end|>\nU: More\nA: Two.<|im_end|>\n")]
    assert spelt(tokenizer, rows, rules_of(tokenizer, rows).protected) == 2 * "<|im_end|>"


def test_an_end_of_words_is_protected_at_the_end_alone():
    tokenizer = plain()
    tokenizer.chat_template = LOOP + "A: {{ m['content'] }} over\n{% endif %}{% endfor %}"
    rows = [row(tokenizer, "U: Hi\nA: ", "It is over now. over\n")]
    assert spelt(tokenizer, rows, rules_of(tokenizer, rows).protected).strip() == "over"


def test_a_separator_between_turns_is_no_end():
    """The end is what follows every answer; after the last one also what else is written there."""
    tokenizer = plain()
    tokenizer.chat_template = LOOP + "A: {{ m['content'] }}{% if loop.last %}</s>{% endif %}\n\n{% endif %}{% endfor %}"
    assert TurnTexts.of(tokenizer).ends == ("</s>",)
    assert rules_of(tokenizer, [row(tokenizer, "U: Hi\nA: ", "One.</s>\n\n")]).turns.ended.tolist() == [True]


ALIKE = {  # what ends an answer, what begins the next turn, what ends all; the marks
    ("<|end|>\n", "<|user|>", "<|endoftext|>"): {"<|end|>", "<|end|>\n<|endoftext|>"},
    ("[/A]", "[Q]", "[END]"): {"[/A]", "[/A][END]"},
    ("</s>", "<s>", "<eos>"): {"</s>", "</s><eos>"},
    ("<|im_end|>\n", "<|im_start|>", ""): {"<|im_end|>"},
    ("{end}", "{user}", "{unk}"): {"{end}", "{end}{unk}"},
}


@pytest.mark.parametrize("marks", ALIKE)
def test_marks_that_begin_alike_are_told_apart(marks):
    tokenizer, (end, begin, last) = plain(), marks
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}" + begin + "{{ m['content'] }}\n{% else %}A: "
        "{{ m['content'] }}" + end + "{% endif %}{% endfor %}" + last
    )
    assert set(TurnTexts.of(tokenizer).ends) == ALIKE[marks]


SAYS_NOTHING = [
    None,
    "{{ raise_exception('no') }}",
    "{{ messages[0]['content'] }}",
    "{% if",
    "{{ 1 // 0 }}",
    "{{ messages[9]['content'] + 1 }}",
    "{{ messages | join(5) | int('a') + [] }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__.__base__.__subclasses__() }}",
    "{{ '%d' | format('a') }}",
    "{{ 2 ** 9999999999999999999.0 }}",
]


@pytest.mark.parametrize("template", SAYS_NOTHING)
def test_templates_that_say_nothing(template):
    tokenizer = plain()
    tokenizer.chat_template = template
    assert TurnTexts.of(tokenizer) == TurnTexts()


def test_an_error_of_ours_in_a_template_is_not_hidden():
    class Ours:
        def apply_chat_template(self, *_, **__):
            raise XTFUserError("xtf: ours")

    with pytest.raises(XTFUserError, match="ours"):
        TurnTexts.of(Ours())


def warnings_of(tokenizer, rows, keep=None):
    documents = collect(rows)
    turns = Turns.find(documents, tokenizer, special_ids(tokenizer))
    keep = np.ones(int(documents.completion.sum()), dtype=bool) if keep is None else keep
    return turns.warnings(keep, documents.counts)


def test_an_end_that_is_never_trained_is_warned_of():
    tokenizer = tiny.tokenizer()
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (warning,) = warnings_of(tokenizer, [row(tokenizer, asked, f"One{number}.") for number in range(3)])
    assert (
        warning.startswith("none of 3 answers ends with") and "'<|im_end|>' after an answer, but it has no" in warning
    )
    some = [row(tokenizer, asked, "One."), row(tokenizer, asked, "Two.<|im_end|>")]
    assert warnings_of(tokenizer, some) == []
    assert Turns.find(collect(some), tokenizer, special_ids(tokenizer)).unended(np.ones(2, dtype=np.int64)) == 1
    (warning,) = warnings_of(plain(), [row(plain(), "a", "b")])
    assert "the chat template writes no end mark" in warning


def test_ends_that_the_rules_drop_are_warned_of():
    tokenizer, rows = tiny.tokenizer(), [row(tiny.tokenizer(), "Hi", "One.<|im_end|>\n")]
    keep = np.asarray(
        [label != tokenizer.convert_tokens_to_ids("<|im_end|>") for label in rows[0]["labels"] if label >= 0]
    )
    (warning,) = warnings_of(tokenizer, rows, keep)
    assert warning.startswith("the rules drop the end of turn of 1 of 1 answers")


def test_what_the_template_inserts_is_warned_of_where_it_is_trained():
    tokenizer = plain()
    think = "<think>\n\n</think>\n\n"
    tokenizer.chat_template = (
        LOOP
        + f"A: {think}{{{{ m['content'] }}}}</s>{{% endif %}}{{% endfor %}}"
        + "{% if add_generation_prompt %}A: {% endif %}"
    )
    assert TurnTexts.of(tokenizer).inserted == think.strip()
    trained = [row(tokenizer, "U: Hi\nA: ", f"{think}One{number}.</s>") for number in range(2)]
    outside = [row(tokenizer, f"U: Hi\nA: {think}", "One.</s>")]
    (warning,) = warnings_of(tokenizer, trained + outside)
    assert warning.startswith(
        "2 of 3 answers train on '<think>\\n\\n</think>', which the chat template writes by itself"
    )
    assert warnings_of(tokenizer, outside) == []


def chat_rows(tokenizer, template, file):
    """The rows that a host with assistant-only loss makes of a file."""
    tokenizer.chat_template = (FIELD / template).read_text()
    rows = []
    for line in (FIELD / file).read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
        rows.append({"input_ids": made["input_ids"], "labels": [i if own else -100 for i, own in pairs]})
    return rows


@pytest.mark.parametrize("name", ["plain", *(pytest.param(each, marks=real.needs(each)) for each in real.NAMES)])
def test_handed_templates(name):
    """A base model's tokenizer knows no `<|im_end|>`; a template may write no end at all."""
    tokenizer = plain() if name == "plain" else real.tokenizer(name)
    rows = chat_rows(tokenizer, "end-of-turn-chatml.jinja", "end-of-turn-text.jsonl")
    text = rules_of(tokenizer, rows)
    marked = spelt(tokenizer, rows, text.protected).replace(".", "")  # one tokenizer joins the dot and the mark's `<`
    assert marked == len(rows) * "<|im_end|>"
    assert text.turns.ended.all() and not warnings_of(tokenizer, rows)
    rows = chat_rows(tokenizer, "ending-no-mark.jinja", "end-of-turn-text.jsonl")
    counts = np.ones(len(rows), dtype=np.int64)
    assert rules_of(tokenizer, rows).turns.unended(counts) == len(rows)
    (warning,) = warnings_of(tokenizer, rows)
    assert "the chat template writes no end mark" in warning
