"""Sentences and lines inside strings of JSON: the same as those of the text that the string stands for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import real, tiny
from tests.data.test_sentences import cut, starts_of
from xtf_plugin.data import json_strings, sentences
from xtf_plugin.data.token_text import token_bytes
from xtf_plugin.selection.text_rules import special_ids

SOLUTION = "He buys 3 apples.\nThen he eats 2. I hope this helps!\n\nSo 1 is left."


def segments(tokenizer, text, unit="sentence"):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = sentences.segment_starts(unit, tokenizer, ids, [0, len(ids)], special_ids(tokenizer))
    pieces = token_bytes(tokenizer, ids)
    return [b"".join(pieces[a:b]).decode() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def letters(unit, text):
    """The segments of a text whose tokens are single characters."""
    edges = [*starts_of(unit, list(text)).tolist(), len(text)]
    return [text[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]


@pytest.mark.parametrize(
    "expected",
    [
        r'{"|a|": "//He| left|.|\n//She| stayed|.// Why|?|\n|\n//Ok//"|, "|b|": "|2|"}',
        r'{"a|.\n|b|": "//He| left|.// She| stayed|.//"|, "|n|": |3|.|5|}',  # a key is never cut
        r'{"|a|": [|{"|b|": "//x|\r\n//y//"}|, "|z|"]|}',
        r'{"|a|": "//好|。|\n//是|。//"| }|, ',  # a mark that needs no white space, before white space that is written
        r'{"|a|": "//x|.|\n|  |\t//y//"}',  # indentation goes with the line before
        r'{"|a|": "//x|.\//ny//"}',  # where a token holds the n and what follows, the next sentence begins with it
        r'{"|a|": "//x|.|\n//y| \"|z|\"//"}',
        r'Sure|.⏎//{"|a|": "//x|\n//y//"}⏎//{"|b|": |1|}',
        r'<call>|{"|a|": "//x|\n//y//"}|</call>',
        r'{"|a|": "//x|\n//y',  # cut off: the text ends in the midst of the object
        r'{"|a|": "//x|\n//y//"|, "',
        r'{"|a|": "|Dr|.| No|, e|.|g|.| him|"}',  # no sentence ends inside
    ],
)
def test_by_hand(expected):
    expected = expected.replace("⏎", "\n")
    assert cut("sentence", expected.replace("//", "|")) == expected.replace("//", " // ")


@pytest.mark.parametrize(
    "text",
    [
        r"The speed \nu is \neq 0, so \nabla f is small.",
        r"Copy it to C:\new\readme.txt and open it.",
        r"""re.findall("[^\n]+\n", text)""",
        r"""print({"a": "x\ny"}["a"])""",  # an object within a line of code
        r'{"a": "x\ny", b: 1}',  # no JSON
        r'{"path": "C:\\new\\next", "tex": "\\nu \\neq 0", "pattern": "\\d+\\n"}',  # backslashes that are meant
        r'{"at": "3 p.m.", "costs": 3.5, "ends": "He left."}',  # no sentence ends inside
        r'{"a": "\\\\n", "b": "\u00e9\"n"}',
        r'{"separator": "\n", "end": "x\n"}',  # nothing follows the line break
        "[[[[",
        '{"a": ' + "[" * 100_000,
        '{"a": ' + "1" * 5_000 + r', "b": "x\ny"}',
    ],
)
@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_what_is_not_cut(text, unit):
    assert letters(unit, text) == [text]


WORDS = ["He left.", "She stayed", " Why? ", "\n", "\r\n", "\n  \n", "好。", "3.5", 'a "b"', "\\n", "é", "{"]


def made_up(rng, depth=0):
    kind = rng.integers(0, 4 if depth < 3 else 2)
    if kind < 2:
        return "".join(rng.choice(WORDS, rng.integers(1, 9))) if kind else int(rng.integers(9))
    values = [made_up(rng, depth + 1) for _ in range(rng.integers(1, 4))]
    return values if kind == 2 else {f"k{at}": value for at, value in enumerate(values)}


def texts_in(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("unit", ["sentence", "line"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_string_has_the_sentences_and_lines_of_its_text(unit, indent):
    """Whichever token white space between two of them belongs to."""
    rng, cut_strings = np.random.default_rng(4), 0
    for _ in range(60):
        value = {"k": made_up(rng)}
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        found = letters(unit, text)
        assert "".join(found) == text
        for inside in texts_in(value):
            expected = [part.strip() for part in letters(unit, inside) if part.strip()]
            if len(expected) < 2 or inside != inside.strip():
                continue
            written = json.dumps(inside, ensure_ascii=False)[1:-1]
            run = next(run for run in runs_of(found) if "".join(run) == written)
            read = [json.loads(f'"{part}"').strip() for part in run]
            assert [part for part in read if part] == expected
            cut_strings += 1
    assert cut_strings > 15


def runs_of(parts):
    return (parts[a:b] for a in range(len(parts)) for b in range(a + 1, min(a + 60, len(parts)) + 1))


@pytest.mark.parametrize("name", ["bytes", *(pytest.param(each, marks=real.needs(each)) for each in real.NAMES)])
def test_structure_is_apart_from_text_whatever_the_tokens(name):
    """No token with a quote or a brace is in a segment of the text between."""
    tokenizer = tiny.tokenizer() if name == "bytes" else real.tokenizer(name)
    text = json.dumps({"reasoning": SOLUTION, "answer": "1"})
    before, *inside, behind = segments(tokenizer, text)
    assert before == '{"reasoning": "' and behind.endswith('", "answer": "1"}')
    parts = [part.replace("\\n", "").strip() for part in inside]
    assert parts[:3] == ["He buys 3 apples.", "Then he eats 2.", "I hope this helps!"]
    assert parts[3].removesuffix(".") == "So 1 is left"


def test_no_segment_begins_inside_a_character():
    """Tokens of bytes that hold a quote and the first byte of a character."""
    pieces = ['{"a": "é.'.encode()[:8], '"é. '.encode()[2:] + b"B", b'."}']
    (first, last), _ = next(json_strings.strings([b'{"a": "', *pieces[1:]]))
    assert (first, last) == (1, 2)
    tokens = [piece.decode("utf-8", "surrogateescape") for piece in pieces]
    assert tokens[1][0] > "\x7f" and 1 not in starts_of("sentence", tokens).tolist()


def test_many_objects_that_do_not_parse_take_no_time():
    text = '{"a": {"b":\n' * 20_000
    assert list(json_strings.strings([text.encode()])) == []
