"""Marks of text become flags of tokens: which tokens, where a text is found again, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from xtf_plugin.data.column_marks import (
    Marks,
    Misfit,
    Part,
    RowTexts,
    Speller,
    line_spans,
    spans_of,
    texts_of,
    token_flags,
)
from xtf_plugin.data.documents import IGNORE_INDEX, collect
from xtf_plugin.errors import XTFUserError

PLAIN = RowTexts([Part("0123456789", True)], chat=False)


def chat(*contents, prompt=()):
    """A chat row that begins with a user; every second message is the assistant's."""
    names = ("user", "assistant")
    messages = [{"role": names[place % 2], "content": text} for place, text in enumerate([*prompt, *contents])]
    return (
        {"prompt": messages[: len(prompt)], "completion": messages[len(prompt) :]} if prompt else {"messages": messages}
    )


@pytest.fixture(scope="module")
def speller():
    return Speller(tiny.tokenizer())


def spelled(speller, text, trained=None):
    """What a text's tokens spell; `trained`: pieces of the text whose tokens carry labels, all of it by default."""
    found = tiny.tokenizer()(text, return_offsets_mapping=True)
    completion = np.ones(len(found["input_ids"]), dtype=bool)
    if trained is not None:
        spans = [(text.index(piece), text.index(piece) + len(piece)) for piece in trained]
        completion[:] = [any(a >= low and b <= high for low, high in spans) for a, b in found["offset_mapping"]]
    return np.asarray(found["input_ids"]), speller.spelled(np.asarray(found["input_ids"]), completion)


def marked(speller, row, value, text, trained=None, form="spans", cut=False):
    """The text of the tokens that a value marks."""
    ids, own = spelled(speller, text, trained)
    names = ["completion", "messages", "text"]
    flags = token_flags(value, texts_of(row, names, "<|endoftext|>"), own, form, cut=cut)
    return "" if flags is None else tiny.tokenizer().decode(ids[flags])


def rendered(row):
    return tiny.tokenizer().apply_chat_template(
        [*row.get("prompt", []), *row.get("completion", row.get("messages", []))], tokenize=False
    )


class TestValues:
    @pytest.mark.parametrize("value", [None, [], np.zeros(0)])
    def test_no_mark(self, value):
        assert spans_of(value, PLAIN, "spans") == [[]]

    def test_spans_lines_and_messages(self):
        assert spans_of([[0, 1], [4, 10]], PLAIN, "spans") == [[(0, 1), (4, 10)]]
        assert spans_of(np.asarray([[2, 3]]), PLAIN, "spans") == [[(2, 3)]]
        row = texts_of(chat("q", "one\n\ntwo", "r", "three"), ["messages"], None)
        assert spans_of([[1], None], row, "lines") == [[(5, 8)], []]
        assert spans_of([[[0, 2]], []], row, "spans") == [[(0, 2)], []]
        assert spans_of([1], row, "messages") == [[], [(0, 5)]]

    def test_lines_that_are_not_blank_hold_what_follows_them(self):
        text = "\n a\n\n  \nb\r\nc"
        assert [text[a:b] for a, b in line_spans(text)] == [" a\n\n  \n", "b\r\n", "c"]
        assert line_spans(" \n") == []

    @pytest.mark.parametrize(
        ("value", "form", "message"),
        [
            ([[0, 11]], "spans", r"span \[0, 11\].*10 characters: 0 <= start < end <= 10"),
            ([[-1, 2]], "spans", r"span \[-1, 2\]"),
            ([[3, 3]], "spans", r"span \[3, 3\]"),
            ([[4, 3]], "spans", r"span \[4, 3\]"),
            ([[0, 1, 2]], "spans", "is not a span"),
            ([[0.0, 2.0]], "spans", "is not a span"),
            ([[False, True]], "spans", "is not a span"),
            ([3], "spans", "3 is not a span"),
            ("[[0, 1]]", "spans", "is not a list"),
            ([1], "lines", "the row has 1 lines that are not blank, so 0 to 0 are legal"),
            ([-1], "lines", "index -1"),
            ([True], "lines", "True is not an index"),
            ([0], "messages", "needs a chat"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, value, form, message):
        with pytest.raises(Misfit, match=message):
            spans_of(value, PLAIN, form)

    @pytest.mark.parametrize(
        ("value", "form", "message"),
        [
            ([[[0, 1]]], "spans", "1 lists, and the row has 2 assistant messages"),
            ([[[0, 1]], [[0, 9]]], "spans", "5 characters"),
            ([[0, 1], []], "spans", "0 is not a span"),
            ([2], "messages", "2 assistant messages, so 0 to 1 are legal"),
            ([[0], 1], "lines", "1 is not a list"),
        ],
    )
    def test_what_does_not_fit_a_chat_is_refused(self, value, form, message):
        with pytest.raises(Misfit, match=message):
            spans_of(value, texts_of(chat("q", "one\n\ntwo", "r", "three"), ["messages"], None), form)


class TestTexts:
    def test_the_first_column_that_the_row_has(self):
        row = {"prompt": "p", "completion": "c<eos>", "text": "t"}
        assert texts_of(row, ["completion", "text"], "<eos>") == RowTexts([("p", False), ("c", True)], chat=False)
        assert texts_of(row, ["text"], "<eos>").own == ["t"]

    def test_messages_of_every_shape(self):
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
        assert texts_of(row, ["conversations"], None).parts == [("q", False), ("a", True)]
        parts = [
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None},
        ]
        assert texts_of({"messages": parts}, ["messages"], None).own == ["a", ""]
        assert texts_of(chat("a", prompt=["q"]), ["completion"], None).parts == [("q", False), ("a", True)]

    @pytest.mark.parametrize(
        ("names", "message"), [(["text"], "no text in text"), ([], "cannot tell"), (["n"], "holds 3")]
    )
    def test_a_row_without_text(self, names, message):
        with pytest.raises(Misfit, match=message):
            texts_of({"completion": "c", "n": 3}, names, None)


class TestTokens:
    def test_tokens_of_which_half_is_held(self, speller):
        ids, own = spelled(speller, "héllo 日本")
        for start in range(len(own.text)):
            for end in range(start + 1, len(own.text) + 1):
                inside = np.zeros(int(own.bytes_at[-1]), dtype=bool)
                inside[own.bytes_at[start] : own.bytes_at[end]] = True
                wanted, at = [], 0
                for size in own.sizes:
                    wanted.append(inside[at : at + size].mean() >= 0.5)
                    at += size
                assert own.tokens([(start, end)]).tolist() == wanted

    def test_only_tokens_that_are_trained_on(self, speller):
        assert marked(speller, {"text": "Ana has 3. Ben"}, [[0, 14]], "Ana has 3. Ben", trained=[" Ben"]) == " Ben"

    def test_spans_of_a_completion(self, speller):
        row = {"prompt": "Ana has 3 apples.", "completion": " Ana has 3 apples. Sure, happy to help!"}
        text = row["prompt"] + row["completion"] + "<|endoftext|>"
        trained = [row["completion"] + "<|endoftext|>"]
        assert marked(speller, row, [[18, 39]], text, trained) == " Sure, happy to help!"
        assert marked(speller, row, [[0, 18]], text, trained) == " Ana has 3 apples."
        everything = marked(speller, row, [[0, 18]], text)  # also the prompt is trained on, and holds almost the same
        assert everything == " Ana has 3 apples."

    def test_a_text_that_could_be_at_two_places_is_refused(self, speller):
        row = {"text": "ab"}
        with pytest.raises(Misfit, match="stands there twice"):
            marked(speller, row, [[0, 1]], "ab ab")

    def test_a_text_is_searched_in_what_is_trained_on(self, speller):
        for text, trained in (("ab: ab", ": ab"), ("ab ab:", "ab ")):  # the same text stands behind it, or before it
            found = marked(speller, {"text": "ab"}, [[0, 2]], text, [trained])
            assert found.strip() == "ab"

    def test_a_text_that_the_tokens_do_not_spell_is_refused(self, speller):
        with pytest.raises(Misfit, match="the text .'ABC'. does not occur"):
            marked(speller, {"text": "ABC"}, [[0, 1]], "abc")


class TestChats:
    ROW = chat("a", "ok", "a", "ok", "one", "a")

    @pytest.mark.parametrize(("number", "before"), [(0, 1), (1, 2)])
    def test_equal_messages_are_told_apart(self, speller, number, before):
        value = [[[0, 2]] if place == number else [] for place in range(3)]
        ids, own = spelled(speller, rendered(self.ROW))
        flags = token_flags(value, texts_of(self.ROW, ["messages"], None), own, "spans")
        first = int(np.flatnonzero(flags)[0])
        assert tiny.tokenizer().decode(ids[flags]) == "ok"
        assert tiny.tokenizer().decode(ids[:first]).count("<|im_start|>assistant\n") == before

    def test_a_short_message_is_not_found_in_the_template(self, speller):
        text = rendered(self.ROW)
        with pytest.raises(Misfit, match="assistant message 2"):  # "a" is also in "assistant", which is trained on
            marked(speller, self.ROW, [[], [], [[0, 1]]], text)
        ids, own = spelled(speller, text)
        own.completion[:] = False
        starts = np.flatnonzero(ids == tiny.tokenizer().convert_tokens_to_ids("<|im_start|>"))
        ends = np.flatnonzero(ids == tiny.tokenizer().convert_tokens_to_ids("<|im_end|>"))
        for start, end in list(zip(starts, ends, strict=True))[1::2]:
            header = len(tiny.tokenizer()("<|im_start|>assistant\n")["input_ids"])
            own.completion[start + header : end + 1] = True
        flags = token_flags([[], [], [[0, 1]]], texts_of(self.ROW, ["messages"], None), own, "spans")
        assert np.flatnonzero(flags).tolist() == [ends[-1] - 1]

    def test_a_message_that_stands_in_the_text_of_a_special_token(self, speller):
        row = chat("q", "im")
        assert marked(speller, row, [[[0, 2]]], rendered(row)) == "im"

    def test_a_message_is_searched_in_its_own_turn(self, speller):
        row, answers = chat("q", "one", "r", "one two"), ["two<|im_end|>", "one two<|im_end|>"]
        text = rendered(chat("q", "two", "r", "one two"))  # the first one is changed by the template
        assert marked(speller, row, [[], [[0, 3]]], text, answers) == "one"
        for trained in (answers, None):
            with pytest.raises(Misfit, match="assistant message 0"):
                marked(speller, row, [[[0, 3]], []], text, trained)

    def test_a_template_may_strip_a_message(self, speller):
        row = chat("q", "  three lines \n")
        text = rendered(chat("q", "three lines"))
        assert marked(speller, row, [[[0, 7]]], text) == "three"
        assert marked(speller, row, [[[0, 1]]], text) == ""

    def test_the_text_of_a_special_token_in_a_message(self, speller):
        row = chat("q", "one <|im_end|> two")
        assert marked(speller, row, [[[4, 14]]], rendered(row)) == "<|im_end|>"

    def test_messages(self, speller):
        row = chat("q", "one", "r", "two")
        text = rendered(row)
        assert marked(speller, row, [1], text, form="messages") == "two"
        turns = ["one<|im_end|>", "two<|im_end|>"]  # one run of labels for each message: all of it counts
        assert marked(speller, row, [1], text, turns, "messages") == "two<|im_end|>"

    def test_an_unmarked_message_may_be_changed_by_the_template(self, speller):
        row = chat("q", "<think>x</think>one", "r", "two")
        text = rendered(chat("q", "one", "r", "two"))
        assert marked(speller, row, [[], [[0, 3]]], text) == "two"
        with pytest.raises(Misfit, match="assistant message 0"):
            marked(speller, row, [[[0, 1]], []], text)


class TestCutRows:
    ROW = chat("q", "one two three", "r", "four five six")

    def test_what_is_left_of_a_message_counts(self, speller):
        text = rendered(self.ROW)
        left = text[: text.index("five") + 2]
        value = [[[0, 3]], [[0, 4], [5, 13]]]
        assert marked(speller, self.ROW, value, left, cut=True) == "onefourfi"
        with pytest.raises(Misfit, match="assistant message 1"):
            marked(speller, self.ROW, value, left)

    @pytest.mark.parametrize("end", ["two", "r<|im_end|>", "<|im_start|>assistant"])
    def test_marks_behind_the_end_are_gone(self, speller, end):
        text = rendered(self.ROW)
        left = text[: text.rindex(end) + len(end)] if end != "two" else text[: text.index("two") + 3]
        assert marked(speller, self.ROW, [[], [[0, 4]]], left, cut=True) == ""

    def test_a_text_behind_the_end_may_begin_as_the_row_ends(self, speller):
        assert marked(speller, {"prompt": "one two", "completion": "own"}, [[0, 3]], "one two", cut=True) == ""

    def test_a_text_that_could_be_at_two_places_is_refused_all_the_same(self, speller):
        with pytest.raises(Misfit, match="stands there twice"):
            marked(speller, {"text": "ab"}, [[0, 1]], "ab ab", cut=True)

    def test_a_text_that_is_not_there_is_not_taken_for_cut_off(self, speller):
        """Where more is trained on than a template writes before a message."""
        for length in (4, 40):
            with pytest.raises(Misfit, match="the text .'Ben'. does not occur"):
                marked(speller, {"text": "Ben"}, [[0, 1]], "Ana has 3 apples. " * length, cut=True)

    def test_a_changed_message_before_others_is_not_taken_for_cut_off(self, speller):
        row = chat("q", "<think>one", "r", "four five six <")
        text = rendered(chat("q", "one", "r", "four five six <"))
        text = text[: text.rindex("six <") + len("six <")]  # which is also how the changed message begins
        with pytest.raises(Misfit, match="assistant message 0"):
            marked(speller, row, [[[0, 1]], []], text, cut=True)


class TestTable:
    @staticmethod
    def row(ids, first=1):
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * first + ids[first:]}

    def table(self, *rows):
        marks = Marks("noise")
        for ids, flags in rows:
            completion = np.arange(len(ids)) > 0
            marks.add(np.asarray(ids), completion, None if flags is None else np.asarray(flags, dtype=bool))
        return marks

    def test_flags_of_documents_in_any_order(self):
        marks = self.table(([1, 2, 3], [0, 0, 1]), ([4, 5], None), ([6, 7], [1, 1]))
        documents = collect([self.row([6, 7]), self.row([4, 5]), self.row([1, 2, 3]), self.row([9], first=1)])
        assert marks.of(documents).tolist() == [True, False, False, True] and marks.notes() == []

    def test_rows_of_one_document_add_their_marks(self):
        marks = self.table(
            ([1, 2, 3], [0, 0, 1]), ([1, 2, 3], None), ([1, 2, 3], [0, 1, 0]), ([4, 5], None), ([4, 5], None)
        )
        assert marks.of(collect([self.row([1, 2, 3])])).tolist() == [True, True]
        assert marks.notes() == [
            "1 documents occur in several rows with different marks in the column noise; what is marked in any of them "
            "counts"
        ]
        assert self.table(([1, 2], [0, 1]), ([1, 2], [1, 1])).notes() == []  # the prompt's flags are no marks

    def test_several_datasets(self):
        one, two = self.table(([1, 2], [0, 1])), self.table(([3, 4], [0, 1]), ([1, 2], None))
        one.join(two)
        assert one.of(collect([self.row([1, 2]), self.row([3, 4])])).tolist() == [True, True]
        assert len(one.notes()) == 1

    def test_a_document_that_was_not_read_is_refused(self):
        with pytest.raises(XTFUserError, match="do not hold 1 of the 2 documents"):
            self.table(([1, 2], [0, 1])).of(collect([self.row([1, 2]), self.row([1, 2, 3])]))
