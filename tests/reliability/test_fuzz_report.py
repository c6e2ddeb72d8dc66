"""Tokens, blocks and score tables full of markup, control characters, bytes that are no text: in report and terminal.

The page's elements are always the same, its data reads back as it was put in, and what `xtf show` and `xtf report`
print holds nothing that a terminal would act on; also when the table comes from a stranger.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.browsing import browser  # noqa: F401 (a fixture)
from tests.cli.test_cli import score_table as table_like
from tests.reliability import record
from tests.reliability.strategies import Elements, inputs
from tests.reliability.test_fuzz_blocks import spots
from tests.report.tables import page_of
from xtf_plugin import cli
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.data.token_text import byte_alphabet
from xtf_plugin.plan import Plan, scores_of
from xtf_plugin.report import score_table, terminal
from xtf_plugin.report.page import render as page
from xtf_plugin.report.summary import described
from xtf_plugin.scoring.batching import ScoringStats
from xtf_plugin.selection.select import select
from xtf_plugin.selection.text_rules import TextRules

NASTY = """</script> <script>owned=1</script> <!-- --> <img/src=x/onerror=owned=1> &lt; &#x1b; ]]> </SCRIPT $data
$script $ ${owned} " ' \\ \\x1b \\u202e · ◌ [bold] [/bold] [link=x]a javascript:owned=1 __proto__ constructor ⟨ff⟩
{+a|b+} é 漢字 😀 𝔘""".split()
NASTY += ["\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "<b onclick=owned>", "a" * 401, *"\0\b\t\n\r \x1b\x7f\x85\xa0\xad"]
NASTY += [*"\u0301\u034f\u200b\u200d\u2028\u2029\u202e\u2066\u2800\u3164\ufe0f\ufeff\U000e0041\uffff\ue000\u0378"]
LONG = ["x" * 100_000, "</script>" * 11_112, "\x1b[" * 50_000]
BYTES = [b"\xff", b"\xc3", b"\xf0\x9f", b"\x98\x80", b"\xed\xa0\x80", b"\xc0\xbc", b"</script>\xff", b"\xff" * 999]
texts = st.sampled_from(NASTY) | st.text(max_size=6) | st.lists(st.sampled_from(NASTY), max_size=4).map("".join)
surrogates = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2) | st.just("a\ud83dz")
pieces = st.sampled_from(BYTES) | st.binary(max_size=5) | texts.map(str.encode)
MARKS = {"·": " ", "↵\n": "\n", "⇥": "\t"}


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For speed alone: hundreds of small files are written here, and no machine stops."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Spelled:
    """A tokenizer that says whatever text it is given, half surrogate pairs included."""

    all_special_ids: list[int] = []
    added_tokens_decoder: dict[int, Any] = {}

    def __init__(self, vocabulary: list[str]) -> None:
        self.decode = lambda ids, **_: vocabulary[ids[0]]


def byte_level(vocabulary: list[bytes]) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens are any bytes."""
    spell = {byte: char for char, byte in byte_alphabet().items()}
    names = {"".join(spell[byte] for byte in piece): index for index, piece in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(names, unk_token=next(iter(names))))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def plan_of(number: int, tokenizer: Any, block: dict[str, Any], name: str) -> Plan:
    """A plan of documents that hold every token of a vocabulary, with made-up scores."""
    rng = np.random.default_rng(number)
    held = [list(range(number)), rng.integers(0, number, 12).tolist()]
    documents = collect([{"input_ids": [0, *tokens], "labels": [-100, *tokens]} for tokens in held])
    config = XTFConfig.parse(block)
    assert config is not None
    size = int(documents.completion_offsets[-1])
    noise = rng.exponential(size=(4, size)).astype(np.float32)
    values = {"knowledge_novelty": -noise[0], "reasoning_importance": noise[3]}
    values |= {selector: -noise[1] for selector in config.selectors}
    scores = scores_of(documents, -noise[0], values)
    text = TextRules.find(config, documents, tokenizer)
    selection = select(scores, config, text.protected, text.forced, text.segments)
    about = {"scores": {}, "references": []}
    parts = (documents, text, scores, selection, {"name": name, "source": name}, ScoringStats(), [name], about)
    return Plan(config, *parts)


RULES = {"preset": "none", "knowledge_novelty": {"drop": {"known_above": 0.5}}, "reasoning_importance": True}


@st.composite
def plans(draw: Any) -> tuple[Plan, Any, list[bytes]]:
    """A plan, its tokenizer, and the bytes of each token; patterns of the block and names are as hostile as tokens."""
    if draw(st.booleans()):
        spelled = draw(st.lists(texts | surrogates | st.sampled_from(LONG), min_size=1, max_size=8))
        tokenizer, known = Spelled(spelled), [text.encode("utf-8", "surrogatepass") for text in spelled]
    else:
        known = list(dict.fromkeys(draw(st.lists(pieces, min_size=1, max_size=8))))
        tokenizer = byte_level(known)
    name = "".join(draw(st.lists(st.sampled_from(NASTY) | surrogates, max_size=9)))
    patterns = [re.escape(text) for text in draw(st.lists(texts, max_size=2)) if text]
    block = {**RULES, "force_drop": patterns, "protect": {"patterns": patterns[1:]}}
    if draw(st.integers(0, 3)) == 3:
        block["selectors"] = {"constructor": {"scorer": "log_probability", "drop": {"quantile": 0.2}, "unit": "line"}}
    return plan_of(len(known), tokenizer, block, name), tokenizer, known


def replaced(value: Any) -> Any:
    """JSON data with what no file can hold: half surrogate pairs become question marks."""
    return json.loads(re.sub(r"[\ud800-\udfff]", "?", json.dumps(value, ensure_ascii=False)))


@cache
def report_of_a_run() -> dict[str, Any]:
    tokenizer = Spelled(["a", "b", " c", "."])
    return page.page_data(described(plan_of(4, tokenizer, RULES, "tiny"), tokenizer)[0])


def check_page(text: str, data: Any, title: str) -> None:
    """Same elements as any report, the same data, and nothing in it that could end the element it stands in."""
    text.encode()
    found = Elements(text)
    assert found.tags == Elements(page.render(report_of_a_run(), "x")).tags
    assert json.loads(found.inside["data"]) == replaced(data)
    assert not set(found.inside["data"]) & set("<>&\u2028\u2029")
    assert found.inside.get("title", "") == re.sub(r"[\ud800-\udfff]", "?", title)
    assert text.count("<script") == text.count("</script") == 2 and "<!--" not in text


def acts(text: str) -> list[str]:
    """What a terminal would act on, or not show: control, bidirectional and invisible characters, but line breaks."""
    return [ascii(char) for char in text if char != "\n" and re.match("C|Zl|Zp", unicodedata.category(char))]


def run(*words: str) -> tuple[int, str]:
    """What a command prints to both streams, and its exit code."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0), stream.getvalue()


def check_token(shown: str, piece: bytes) -> None:
    """A token of the page reads back as what it was; too long ones begin so."""
    assert not acts(shown), shown
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        assert shown.startswith("⟨" + piece[: terminal.LONGEST_TEXT].hex(" "))
        return
    beginning = text[: terminal.LONGEST_TEXT]
    assert (len(text) > terminal.LONGEST_TEXT) == shown.endswith(f"…⟨{len(text):,}·characters⟩")
    if not set(text) & set("\\·↵⇥"):
        for mark, meant in MARKS.items():
            shown = shown.replace(mark, meant)
        code = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
        assert code.sub(lambda found: chr(int(found[found.lastindex or 0], 16)), shown).startswith(beginning)


def test_what_tokens_hold_is_text_in_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @inputs(50, 500)
    @given(plans(), texts | surrogates)
    def holds(made: tuple[Plan, Any, list[bytes]], title: str) -> None:
        plan, tokenizer, known = made
        table = described(plan, tokenizer)[0]
        data = json.loads(json.dumps(page.page_data(table)))
        check_page(page.render(data, title), data, title)
        for shown, piece in zip(data["tokens"], known, strict=True):
            check_token(shown, piece)
        path = score_table.write(table, plan.documents, tmp_path / "xtf/scores.parquet")
        code, printed = run("show", str(path))
        assert code == 0 and not acts(printed), acts(printed)
        found, offsets = terminal.find(score_table.open_file(path), terminal.Wanted(), 9, path), plan.scores.offsets
        texts_by_key = {document.key: document.text for document in found}
        assert len(texts_by_key) == len(found) == len(plan.documents)
        for at in plan.documents.row_documents:
            whole = b"".join(known[token] for token in plan.scores.token_ids[offsets[at] : offsets[at + 1]])
            assert texts_by_key[plan.scores.keys[at].tobytes().hex()] == whole.decode(errors="replace")
        code, printed = run("report", str(path))
        assert code == 0 and not acts(printed.replace(str(path.parent), "")), acts(printed)
        again = (path.parent / "report.html").read_text(encoding="utf-8")
        check_page(again, data, page.title(path))
        seen.update(inputs=1, tokens=len(known))

    holds()
    record("fuzzed reports", **seen)


@st.composite
def tables(draw: Any) -> Any:
    """A score table of other tools: the right columns, any content."""
    size = draw(st.integers(1, 4))

    def column(values: Any) -> Any:
        return draw(st.lists(values, min_size=size, max_size=size))

    reasons = texts | st.sampled_from(["", "knowledge_novelty", "floor", "a,b"])
    table = table_like(
        row=column(st.sampled_from([0, 0, 1, -1, 2**63 - 1])),
        document=column(texts | st.just("aa")),
        position=column(st.sampled_from([0, 1, 2, -1, 2**31 - 1])),
        token=column(texts | st.none()),
        token_id=column(st.sampled_from([0, 1, 7, -1])),
        kept=column(st.booleans()),
        reason=column(reasons | st.none()),
    )
    names = texts.filter(lambda name: name not in score_table.SCHEMA.names)
    for name in draw(st.lists(names, max_size=2, unique=True)):
        table = table.append_column(name, pa.array([1.0] * size, pa.float32()))
    about = st.sampled_from([b"", b"\xff", b"[]", b"[" * 9_999, b'{"bytes": {"7": "zz"}}', b'{"bytes": {"7": "ff"}}'])
    return table.replace_schema_metadata({b"xtf": draw(about)})


def test_a_table_of_other_tools_does_not_act_on_the_terminal(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @inputs(60, 500)
    @given(tables(), texts)
    def holds(table: Any, word: str) -> None:
        path = tmp_path / "scores.parquet"
        pq.write_table(table, path)
        for words in (["show"], ["show", "--reason", f"x{word}"], ["show", "--grep", f"(?{word}"], ["report"]):
            code, printed = run(words[0], str(path), *words[1:])
            assert code in (0, 2) and not acts(printed), (words, acts(printed))
            assert code == 0 or printed.startswith(("xtf: error: ", "Usage")), printed
            seen.update(inputs=1, refused=code == 2, shown=words == ["show"] and code == 0)

    holds()
    assert seen["shown"] > 0.2 * seen["inputs"]  # of all four commands
    record("fuzzed tables", **seen)


@cache
def metadata_of_a_run() -> dict[str, Any]:
    tokenizer = Spelled(["a", "b", " c", "."])
    table = described(plan_of(4, tokenizer, RULES, "tiny"), tokenizer)[0]
    return {**score_table.plain(table.about), "format": score_table.FORMAT, "bytes": {"1": "ff"}}


@st.composite
def strange_metadata(draw: Any) -> str:
    """The JSON of a score table in which some things are not what a run writes."""
    data = copy.deepcopy(metadata_of_a_run())
    for path in draw(st.lists(st.sampled_from(spots(data)), min_size=1, max_size=3)):
        home: Any = data
        with contextlib.suppress(KeyError, IndexError, TypeError):  # what an earlier change took away
            for key in path[:-1]:
                home = home[key]
            junk = [None, True, -1, 0.5, 10**30, float("inf"), [], {}, [{}], [[]], {"key": 1}, [1, "a"], [{"key": "a"}]]
            home[path[-1]] = draw(st.sampled_from(junk) | texts | surrogates)
    return json.dumps(data).replace("Infinity", "1e999")


def test_a_table_with_strange_metadata_is_reported_or_refused_and_runs_nothing(tmp_path: Path) -> None:
    path, seen = tmp_path / "scores.parquet", Counter[str]()
    columns = {"row": [0], "document": ["ab" * 16], "position": [1], "token": ["a"], "kept": [True], "reason": [""]}
    table = table_like(**columns)

    @inputs(80, 1_000)
    @given(strange_metadata())
    def holds(text: str) -> None:
        pq.write_table(table.replace_schema_metadata({score_table.METADATA: text.encode()}), path)
        code, printed = run("report", str(path))
        assert code in (0, 2) and not acts(printed.replace(str(tmp_path), "")), printed
        assert code == 0 or "score table" in printed or "not what this" in printed, printed
        if code == 0:
            written = path.with_name("report.html").read_text(encoding="utf-8")
            check_page(written, json.loads(Elements(written).inside["data"]), page.title(path))
        seen.update(inputs=1, refused=code == 2)

    holds()
    assert 0 < seen["refused"] < seen["inputs"]
    record("fuzzed metadata of tables", **seen)


def test_a_browser_shows_the_same_texts_and_runs_nothing(browser, tmp_path: Path) -> None:  # noqa: F811
    known = [text.encode() for text in NASTY] + BYTES
    tokenizer = byte_level(known)
    plan = plan_of(len(known), tokenizer, {**RULES, "force_drop": ["</script>"]}, NASTY[1])
    table = described(plan, tokenizer)[0]
    data = page.page_data(table)
    opened, noise = browser.new_page(), []
    opened.on("console", lambda message: noise.append(message.text))
    opened.on("pageerror", lambda error: noise.append(str(error)))
    opened.goto(page_of(table, tmp_path / "xtf/report.html").as_uri())
    assert opened.evaluate("D.tokens") == data["tokens"] and opened.evaluate("D.summary.reference") == plan.reference
    drawn = opened.eval_on_selector_all(".document .token", "all => all.map((e) => e.textContent)")
    assert not noise and not acts("".join(drawn).replace("\t", "")) and opened.evaluate("typeof owned") == "undefined"
    assert {"</script>", "<!--", "\\x1b[2J", "\\u202e", "⟨ed a0 80⟩"} <= set(drawn)
    opened.close()
