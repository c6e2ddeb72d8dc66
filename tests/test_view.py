"""The terminal view: what was dropped reads without colour, and no token's text can act on the terminal."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from rich.console import Console

from xtf_plugin import view
from xtf_plugin.errors import XTFUserError

# row, document, position, token, kept, reason
ROWS = [
    (0, "aa", 3, "The", True, ""),
    (0, "aa", 4, " cat", False, "knowledge_novelty"),
    (0, "aa", 5, " sat", False, "knowledge_novelty"),
    (0, "aa", 6, ".\n", True, "knowledge_novelty,protected"),
    (0, "bb", 9, " two", False, "reasoning_importance,task_relevance"),
    (0, "bb", 2, "again", True, ""),  # the same document again, packed into the same row
    (2, "cc", 1, "x", False, "forced"),
    (2, "cc", 2, "y", True, "reasoning_importance,floor"),
]


def table(rows=ROWS):
    names = ("row", "document", "position", "token", "kept", "reason")
    return pa.table({name: [row[index] for row in rows] for index, name in enumerate(names)})


def printed(rows=ROWS, **console):
    stream = io.StringIO()
    view.render_documents(view.documents(table(rows)), "", Console(file=stream, width=200, **console))
    return stream.getvalue()


def test_drops_and_reasons_read_without_colour():
    text = printed()
    assert "\x1b" not in text
    assert "The[-·cat·sat|KN-]{+.↵" in text
    assert "|KN protected+}" in text
    assert "[-·two|RI TR-]" in text
    assert "[-x|forced-]{+y|RI floor+}" in text


def test_documents_are_cut_at_rows_keys_and_positions():
    found = [(document.row, document.key, len(document.tokens)) for document in view.documents(table())]
    assert found == [(0, "aa", 4), (0, "bb", 1), (0, "bb", 1), (2, "cc", 2)]
    assert "kept 2 of 4" in printed()


def test_nothing_found_is_an_error_only_if_something_was_wanted():
    console = Console(file=io.StringIO())
    assert view.render_documents([], "", console) == 0
    with pytest.raises(XTFUserError, match="no document of the score table has row 1;"):
        view.render_documents([], "row 1", console)


def test_colour_on_a_terminal():
    assert "\x1b[" in printed(force_terminal=True, color_system="standard")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a b", "a·b"),
        ("\t\n", "⇥↵\n"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("z\u200bw\ufeff", "z\\u200bw\\ufeff"),
        ("no\xa0break\r", "no\\xa0break\\x0d"),
        ("\U000e0041tag", "\\U000e0041tag"),
        ("\u3164\u115f\u1160\uffa0", "\\u3164\\u115f\\u1160\\uffa0"),
        ("\u2800\u180e\u034f\u17b4", "\\u2800\\u180e\\u034f\\u17b4"),
        ("a\ufe0f\U000e0100", "a\\ufe0f\\U000e0100"),
        ("naïve 漢字 🙂", "naïve·漢字·🙂"),
        ("한국어 ខ្មែរ ⠿", "한국어·ខ្មែរ·⠿"),
    ],
)
def test_invisible_characters_are_visible(text, shown):
    assert view.visible(text) == shown


def test_markup_is_text():
    assert "[bold]hi[/bold][link=x]" in printed([(0, "a", 0, "[bold]hi[/bold][link=x]", True, "")])


def test_summary_counts():
    summary = view.summarize([table()])
    assert (summary.documents, summary.tokens, summary.kept) == (4, 8, 4)
    assert summary.fired == {"reasoning_importance": 2, "knowledge_novelty": 3, "task_relevance": 1}
    assert summary.dropped == {"reasoning_importance": 1, "knowledge_novelty": 2, "task_relevance": 1}
    assert summary.alone == {"reasoning_importance": 0, "knowledge_novelty": 2, "task_relevance": 0}
    assert summary.decided == {"protected": 1, "floor": 1, "forced": 1, "control": 0}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_summary_does_not_depend_on_the_pieces(size):
    pieces = [table(ROWS[start : start + size]) for start in range(0, len(ROWS), size)]
    assert view.summarize([table([]), *pieces]) == view.summarize([table()])


def test_summary_table_prints_shares():
    stream = io.StringIO()
    Console(file=stream, width=120).print(view.summary_table(table()))
    text = stream.getvalue()
    assert "4 documents, 8 completion tokens" in text
    assert "50.00 %" in text and "37.50 %" in text
    Console(file=io.StringIO()).print(view.summary_table(table([])))
