"""The terminal view: drops are legible without colour, no token's text acts on the terminal, and `xtf show` finds
documents anywhere in a table.
"""

from __future__ import annotations

import io
import itertools
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests import tiny
from tests.cli.test_cli import score_table as table_like
from tests.report.tables import plan_of, saved
from xtf_plugin import cli
from xtf_plugin.config.scores import SHORT_NAMES
from xtf_plugin.errors import XTFUserError
from xtf_plugin.report import summary, terminal
from xtf_plugin.report.score_table import iter_documents, metadata, open_file
from xtf_plugin.report.terminal import Document, Wanted, find
from xtf_plugin.scorers import registry

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


def documents(rows=ROWS):
    names = ("row", "document", "position", "token", "kept", "reason", "prompt")[: len(rows[0])]
    held = table_like(**{name: [row[index] for row in rows] for index, name in enumerate(names)})
    return [Document.read(row, key, part, {}) for row, key, part in iter_documents(held)]


def printed(rows=ROWS, **console):
    stream = io.StringIO()
    terminal.render_documents(documents(rows), "", Console(file=stream, width=200, **console))
    return stream.getvalue()


def test_drops_and_reasons_read_without_colour():
    text = printed()
    assert "\x1b" not in text
    assert "The[-·cat·sat|KN-]{+.↵" in text
    assert "|KN protected+}" in text
    assert "[-·two|RI TR-]" in text
    assert "[-x|forced-]{+y|RI floor+}" in text


def test_what_is_before_an_answer_is_shown_above_it():
    """Each turn of a conversation has its own; marks do not go on over it."""
    rows = [
        (0, "aa", 3, "Yes", True, "", "Is a cat\n an animal?"),
        (0, "aa", 4, ".", False, "novelty", None),
        (0, "aa", 8, "No", False, "novelty", "And \x1b[31mso?"),
        (0, "aa", 9, ".\n", True, "", None),
    ]
    text = printed(rows)
    assert "prompt: Is a cat↵ an animal?\nYes[-.|novelty-]\nprompt: And \\x1b[31mso?\n[-No|novelty-].↵" in text


def test_documents_are_cut_at_rows_keys_and_positions():
    found = [(document.row, document.key, len(document.tokens)) for document in documents()]
    assert found == [(0, "aa", 4), (0, "bb", 1), (0, "bb", 1), (2, "cc", 2)]
    assert "kept 2 of 4" in printed()


def test_nothing_found_is_an_error_only_if_something_was_wanted():
    console = Console(file=io.StringIO())
    terminal.render_documents([], "", console)
    with pytest.raises(XTFUserError, match="no document of the score table has row 1;"):
        terminal.render_documents([], "row 1", console)


def test_documents_that_lose_nothing_are_followed_by_a_word_of_it():
    """The first documents are those that lose most, which a reader of documents without a mark cannot see."""
    whole = [document for document in documents() if not document.dropped]
    stream = io.StringIO()
    terminal.render_documents(whole, "", Console(file=stream, width=200))
    assert "\nNothing is dropped, from any document." in stream.getvalue()
    assert "Nothing is dropped" not in printed()


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
    assert terminal.visible(text) == shown


def test_markup_is_text():
    assert "[bold]hi[/bold][link=x]" in printed([(0, "a", 0, "[bold]hi[/bold][link=x]", True, "")])


def test_totals_print_as_shares():
    rule = {"fired": 3, "dropped": 2, "dropped_alone": 1}
    counts = {"documents": 4, "completion_tokens": 8, "kept_tokens": 4, "dropped_tokens": 4}
    decided = {"protected": 1, "floor": 0, "forced": 0, "control": 0}
    stream = io.StringIO()
    totals = {**counts, "scores": {"knowledge_novelty": rule, "mine": rule}, "decided_by": decided}
    Console(file=stream, width=120).print(terminal.totals_table(totals))
    text = stream.getvalue()
    assert "4 documents, 8 completion tokens" in text and "50.00 %" in text
    lines = [line.replace("│", " ").split() for line in text.splitlines()]
    assert all([name, "3", "37.50", "%", "2", "1"] in lines for name in ("knowledge_novelty", "mine"))
    assert "kept by protection" in text and "min_kept" not in text
    assert "the draw" not in text


def test_the_share_that_a_control_decided_is_explained():
    counts = {"documents": 4, "completion_tokens": 8, "kept_tokens": 4, "dropped_tokens": 4}
    decided = {"protected": 0, "floor": 0, "forced": 0, "control": 6}
    stream = io.StringIO()
    Console(file=stream, width=120).print(terminal.totals_table({**counts, "scores": {}, "decided_by": decided}))
    assert "decided by the control: dropped by the draw, or kept although a rule fired" in " ".join(
        stream.getvalue().split()
    )
    nothing = dict.fromkeys(counts, 0)
    Console(file=io.StringIO()).print(terminal.totals_table({**nothing, "scores": {}, "decided_by": {}}))


KEYS = ["aa00", "bb11", "aa22", "cc33"]
MOST_DROPPED = ["aa22", "aa00", "bb11", "cc33"]  # a token of aa22 is dropped


@pytest.fixture
def file(tmp_path):
    """Four documents of five tokens, in row groups that cut them: rows 0, 0, 1, 2."""
    tokens = [f" w{i}" for i in range(20)]
    tokens[7] = " needle"
    wide = table_like(
        row=[0] * 10 + [1] * 5 + [2] * 5,
        document=list(itertools.chain.from_iterable([key] * 5 for key in KEYS)),
        position=list(range(5)) * 4,
        token=tokens,
        kept=[i != 12 for i in range(20)],
        reason=["task_relevance" if i == 12 else "knowledge_novelty,protected" if i == 19 else "" for i in range(20)],
    )
    pq.write_table(wide, tmp_path / "scores.parquet", row_group_size=3)
    return tmp_path / "scores.parquet"


def found(path, n=9, **wanted):
    given = {"row": None, "document": None, "grep": None, "reason": None, **wanted}
    return find(open_file(path), Wanted(**given), n, path)


def keys(path, n=9, **wanted):
    return [document.key for document in found(path, n, **wanted)]


def test_documents_are_complete_across_batches(file):
    opened = open_file(file)

    class Small:
        schema_arrow = opened.schema_arrow

        def iter_batches(self, columns):
            return opened.iter_batches(batch_size=2, columns=columns)

    for source in (opened, Small()):
        shown = find(source, Wanted(), 9, file)
        assert sorted(document.key for document in shown) == sorted(KEYS)
        assert [len(document.tokens) for document in shown] == [5] * 4


def test_what_is_wanted(file):
    assert keys(file) == MOST_DROPPED and keys(file, n=2) == MOST_DROPPED[:2]
    assert keys(file, row=0) == KEYS[:2] and keys(file, row=0, n=1) == KEYS[:2]
    assert keys(file, document="AA") == ["aa00", "aa22"] and keys(file, document="bb1", n=1) == ["bb11"]
    assert keys(file, grep=r"w6 needle w8") == ["bb11"] and keys(file, grep="absent") == []
    assert keys(file, reason="task_relevance") == ["aa22"] and keys(file, reason="protected") == ["cc33"]
    assert keys(file, reason="protected", row=0) == [] and keys(file, reason="tr") == ["aa22"]
    assert keys(file, dropped=True) == ["aa22"] and keys(file, dropped=True, row=0) == []


def test_a_reason_is_one_that_drops(file):
    """The rule of knowledge novelty fires in cc33 alone, where protection keeps the token."""
    assert keys(file, reason="KN") == []


def test_what_loses_most_comes_first_and_once(tmp_path):
    """Shares decide, then lengths, then the place in the dataset; a repeated document is shown once."""
    documents = {"aa": "-+++", "bb": "--++", "cc": "--", "dd": "+", "ee": "----", "ff": "-+++"}
    order = ["aa", "bb", "cc", "dd", "ee", "ff", "cc", "ee", "aa"]
    flags = [(row, key, at, sign == "+") for row, key in enumerate(order) for at, sign in enumerate(documents[key])]
    columns = dict(zip(("row", "document", "position", "kept"), map(list, zip(*flags, strict=True)), strict=True))
    wide = table_like(**columns, token=["t"] * len(flags), reason=[""] * len(flags))
    pq.write_table(wide, path := tmp_path / "scores.parquet")
    best = ["ee", "cc", "bb", "aa", "ff", "dd"]
    assert [keys(path, n=n) for n in range(1, 7)] == [best[:n] for n in range(1, 7)]
    assert keys(path, dropped=True) == best[:-1]
    assert [document.row for document in found(path, document="cc")] == [2, 6]


def test_a_table_without_drops_has_nothing_dropped_to_show(tmp_path, capsys):
    wide = table_like(row=[0], document=["aa"], position=[0], token=["t"], kept=[True], reason=[""])
    pq.write_table(wide, path := tmp_path / "scores.parquet")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", str(path), "--dropped"])
    assert "has a dropped token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"document": "xyz"}, "not a document key"),
        ({"grep": "("}, "not a regular expression"),
        ({"reason": "novelty"}, r"Legal: RI \(reasoning_importance\), KN \(knowledge_novelty\)"),
        ({"reason": "task_relevence"}, r"Did you mean task_relevance\?"),
    ],
)
def test_what_is_refused(file, wanted, message):
    with pytest.raises(XTFUserError, match=message):
        keys(file, **wanted)


def show(path):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["show", str(path)])


class TestText:
    """Characters spread over several tokens, and long tokens."""

    @pytest.fixture
    def split(self, tmp_path):
        """Two documents of "a😀b" in five tokens, three for the emoji; in the second one of the three is dropped."""
        smile = "😀".encode()
        pieces = {11: smile[:2], 12: smile[2:3], 13: smile[3:]}
        wide = table_like(
            row=[0] * 5 + [1] * 5,
            document=["aa00"] * 5 + ["bb11"] * 5,
            position=list(range(5)) * 2,
            token_id=[10, 11, 12, 13, 14] * 2,
            token=["a", "\ufffd", "\ufffd", "\ufffd", "b"] * 2,
            kept=[True] * 5 + [True, False, True, True, True],
            reason=[""] * 5 + ["", "knowledge_novelty", "", "", ""],
        )
        about = json.dumps({"format": 1, "bytes": {str(i): piece.hex() for i, piece in pieces.items()}})
        path = tmp_path / "scores.parquet"
        pq.write_table(wide.replace_schema_metadata({b"xtf": about.encode()}), path)
        return path

    def test_characters_are_complete(self, split, capsys):
        show(split)
        printed = capsys.readouterr().out
        assert "a😀b" in printed and "a[-😀|KN-]◌b" in printed and "\ufffd" not in printed

    def test_and_are_found(self, split):
        assert keys(split, grep="^a😀b$") == ["bb11", "aa00"]

    def test_a_run_writes_the_bytes(self, tmp_path):
        """Through a plan of the tiny tokenizer, which has no token for an emoji."""
        ids = tiny.tokenizer()("Then smile: 😀 and שלום.")["input_ids"]
        plan = plan_of(tmp_path, [{"input_ids": ids, "labels": ids}], preset="paper")
        (shown,) = found(saved(plan, tmp_path / "scores.parquet"))
        assert "😀 and שלום" in shown.text and "😀" in "".join(token.text for token in shown.tokens)

    def test_a_long_token_is_cut_but_searched_completely(self, tmp_path, capsys):
        token = "x" * 100_000 + "y"
        wide = table_like(row=[0], document=["aa00"], position=[0], token=[token], kept=[True], reason=[""])
        pq.write_table(wide, tmp_path / "scores.parquet")
        assert keys(tmp_path / "scores.parquet", grep="xy$") == ["aa00"]
        show(tmp_path / "scores.parquet")
        printed = capsys.readouterr().out
        assert "100,001·characters" in printed and len(printed) < 2_000


def test_the_legend_says_what_the_scorers_of_the_table_measure(tmp_path, capsys):
    """A slot's abbreviation says nothing of its scorer."""
    own = {"scorer": "typicality", "drop": {"below": -1}}
    path = saved(plan_of(tmp_path, selectors={"mine": own}), tmp_path / "scores.parquet")
    show(path)
    printed = capsys.readouterr().out.splitlines()
    assert "TR task relevance: how much its prompt and the text before it explain of it" in printed
    assert "RI reasoning importance: how much it helps to predict the text after it" in printed
    assert "KN knowledge novelty: how much of it does not repeat earlier text" in printed
    assert any(line.startswith("mine: how probable it is, compared") for line in printed)


@pytest.mark.parametrize("about", [{}, {"scorers": 1}, {"scorers": {"scores": []}}])
def test_tables_of_other_tools_have_a_legend_of_marks_alone(about):
    assert terminal.legend(about) == terminal.LEGEND


def test_every_built_in_scorer_has_words_of_its_own():
    assert terminal.MEASURES.keys() == registry.BUILTIN.keys()
    assert terminal.measure("a\x1bb") == "by the scorer a\\x1bb"


def test_a_run_prints_its_formats_and_what_recurs(tmp_path, capsys):
    fast, made = tiny.tokenizer(), []
    for at in range(8):
        text = "".join(f"{mark}\nThe sum is {at}.\n" for mark in "#*:=|~<")
        ids = fast(text)["input_ids"]
        made.append({"input_ids": [1, *ids], "labels": [-100, *ids]})
    rule = {"scorer": "log_probability", "unit": "line", "drop": {"quantile": 0.1}}
    summary.show(plan_of(tmp_path, made, preset="none", selectors={"mine": rule}), [])
    printed = capsys.readouterr().err
    assert 'xtf: kept as format: "#" opens a line or sentence in 100% of documents\n' in printed
    assert (
        printed.count("opens a line or sentence in") == summary.FORMATS and "kept as format: 2 more openings" in printed
    )
    assert re.search(r"texts that recur: \d dropped, \d kept; the report lists them", printed)
    assert "mine: how probable the reference finds it (log_probability version 1, xtf-plugin)" in printed


def test_a_run_prints_kept_texts_that_recur_with_the_line_that_drops_them(tmp_path, capsys):
    fast, made = tiny.tokenizer(), []
    for at in range(12):
        ids = fast(f"The sum is {at}." + " I hope this helps!" * (at < 4))["input_ids"]
        made.append({"input_ids": [1, *ids], "labels": [-100, *ids]})
    rule = {"scorer": "log_probability", "unit": "sentence", "drop": {"below": -1e9}}
    summary.show(plan_of(tmp_path, made, preset="none", selectors={"mine": rule}), [])
    line = '"I hope this helps!" is kept in 4 of the 4 documents that have it. If it is noise, add to the block: '
    assert f'xtf: {line}force_drop: ["I hope this helps!"]\n' in capsys.readouterr().err


def test_a_row_beyond_the_last_one_is_refused_with_the_number_of_rows(tmp_path):
    table = saved(plan_of(tmp_path), tmp_path / "scores.parquet")
    about = metadata(open_file(table))
    rows = about["totals"]["rows"]
    terminal.check_row(rows - 1, about)
    terminal.check_row(99, {})  # of another tool
    with pytest.raises(XTFUserError, match=f"--row {rows}: the score table is of {rows} rows, so 0 to {rows - 1}"):
        terminal.check_row(rows, about)
    with pytest.raises(SystemExit):
        cli.main(["show", str(table), "--row", "999"])


def test_the_help_names_every_reason():
    shown = CliRunner().invoke(cli.app, ["show", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in (*SHORT_NAMES.values(), *terminal.DECISIONS))


@pytest.mark.parametrize(("preset", "scorer"), [("default", "new_text"), ("none", "novelty")])
def test_a_run_prints_the_scorer_of_a_slot_that_names_none(tmp_path, capsys, preset, scorer):
    """A recipe from before the default had scorers of its own says nothing of it."""
    slots = {"reasoning_importance": False, "knowledge_novelty": True, "task_relevance": False}
    summary.show(plan_of(tmp_path, preset=preset, **slots), [])
    version = registry.find(scorer).version
    line = f"xtf: knowledge_novelty: {terminal.measure(scorer)} ({scorer} version {version}, xtf-plugin)\n"
    assert line in capsys.readouterr().err


def test_reasons_as_documents_are_marked(file):
    assert keys(file, reason="TR") == keys(file, reason="task_relevance") == ["aa22"]


def test_a_table_of_format_1_is_shown_and_its_report_is_refused(file, capsys):
    held = pq.read_table(file).drop_columns(["protected", "forced", "log_probability"])
    pq.write_table(held.replace_schema_metadata({b"xtf": b'{"format": 1, "bytes": {}}'}), file)
    show(file)
    assert "needle" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(file)])
    assert "format 1; this xtf-plugin reads format 3. Make it again: xtf score RECIPE" in capsys.readouterr().err
    pq.write_table(pq.read_table(file).drop_columns(["prompt"]), file)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", str(file)])
    assert "format 1; this xtf-plugin reads format 3. Make it again: xtf score RECIPE" in capsys.readouterr().err


def test_columns_in_other_widths_are_read(file):
    """As other tools write texts and numbers back."""
    held = pq.read_table(file)
    other = {"token": pa.large_string(), "row": pa.int32(), "position": pa.int64(), "reason": pa.large_string()}
    for name, kind in other.items():
        held = held.set_column(held.schema.get_field_index(name), name, held[name].cast(kind))
    before = found(file)
    pq.write_table(held, file)
    assert found(file) == before


BROKEN = {
    "row as text": ({"row": ["a"]}, "cannot be read"),
    "no row": ({"row": pa.array([None], pa.int64())}, "rows without row"),
    "no document": ({"document": pa.array([None], pa.string())}, "rows without document"),
    "reason as list": ({"reason": pa.array([["a"]])}, "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tables_of_other_tools_are_refused_in_one_line(tmp_path, name, capsys):
    changed, message = BROKEN[name]
    columns = {"row": [0], "document": ["aa00"], "position": [0], "token": ["a"], "kept": [True], "reason": [""]}
    wide = table_like(**columns)
    for column, values in changed.items():
        wide = wide.set_column(wide.schema.get_field_index(column), column, pa.array(values))
    pq.write_table(wide, tmp_path / "scores.parquet")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", str(tmp_path / "scores.parquet")])
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
