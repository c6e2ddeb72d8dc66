"""Sentences and lines as units: first tokens, means, and dropped sentences."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from tests import real, tiny
from tests.made_scores import ALL_OFF, KN, RI, TR, scores_of
from tests.selection.test_rules import layout_of
from tests.test_plan import plan  # noqa: F401, a fixture
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data import ragged, sentences
from xtf_plugin.data.ragged import segment_means
from xtf_plugin.data.token_text import token_bytes
from xtf_plugin.errors import XTFError
from xtf_plugin.selection import rules
from xtf_plugin.selection.select import reason_text, select
from xtf_plugin.selection.text_rules import special_ids

SPECIAL = "<s>"
NOTHING = {"special_tokens": False, "formats": None}


class Pieces:
    """A tokenizer whose token `i` is the text `pieces[i]`."""

    def __init__(self, pieces) -> None:
        self.pieces = list(pieces)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


def starts_of(unit, *runs):
    """Segment starts of runs that are lists of pieces."""
    pieces = sorted({piece for run in runs for piece in run} | {SPECIAL})
    ids = [pieces.index(piece) for run in runs for piece in run]
    offsets = np.concatenate([[0], np.cumsum([len(run) for run in runs])])
    tokens = np.asarray(ids, dtype=np.int32)
    return sentences.segment_starts(unit, Pieces(pieces), tokens, offsets, [pieces.index(SPECIAL)])


def cut(unit, text):
    """The segments of a run whose tokens are separated by |, joined by //."""
    run = text.split("|")
    edges = [*starts_of(unit, run).tolist(), len(run)]
    return " // ".join("|".join(run[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize(
    "expected",
    [
        "One|.// Two|!// Three|?",
        "It| costs| 3|.|50| coins|.// Then| go",
        "So| e|.|g|.| this",
        "So| e|.g|.| this| e.g.| that|.// x",
        "Ask| Dr|.| No|.// x| vs|.| y",
        "Plan| B|.// Then",
        "1|.| Heat|.// Wait|.\n//1|2|.| Mix|.// In| 1999|.// x",
        'He| said|:| "|Stop|.|"// Then|.")// x',
        "a|.|(b",
        "好|。//他|：|“|好|！|”//然|后|？！//“|好|……",
        "ठीक|।// हाँ|॥| //ठीक",
        "วันนี้| //ดี|มาก// ราคา| 8| บาท",
        "v|1.2|.3| is| out",
        "Why|?|!// Because|...// yes",
        "a|.|  | |\t//b",  # only whitespace: of the sentence before
        "a|. //b",
        "a|.|\n|\n//b|\n// c",
        "a|.||// b",  # a token without text does not hide the whitespace behind it
        "a|.||b",
        "  |a| b|.// c",
        "a|.//<s>//\n//b",
        "a| b//<s>//<s>// c",
        "a|.\nb//c",
    ],
)
def test_sentences_by_hand(expected):
    assert cut("sentence", expected.replace("//", "|")) == expected.replace("//", " // ")


@pytest.mark.parametrize("expected", ["a|.| b|\n//  |c|\r\n//\n//d", "a|\nb//c", "a//<s>//b|\n//<s>", "a| b", "|\n//"])
def test_lines_by_hand(expected):
    assert cut("line", expected.replace("//", "|")) == expected.replace("//", " // ")


POOL = ["a", " b", ".", "!", "? ", " .", "3", ".5", "\n", " \n", "  ", " ", "", "\n\n", "e.g.", ".\n", "x.y", ". c"]
POOL += ["\t", "c", "\u00e9", SPECIAL, '"', "。", "。”", " Dr", "१", "ก"]


def naive_forced(unit, run):
    """Starts of the run, of special tokens, and of lines if they are the unit."""
    broken = [SPECIAL in run[i - 1 : i + 1] or (unit == "line" and "\n" in run[i - 1]) for i in range(1, len(run))]
    return [i for i, start in enumerate([True, *broken]) if start][: len(run)]


def naive_unending(run, i, starts):
    """Whether the dot of a token belongs to an abbreviation or to a number that begins a line."""

    def before(back, pattern):
        return i >= back and run[i - back] != SPECIAL and re.fullmatch(pattern, run[i - back]) is not None

    number = any(
        all(before(back, r"\s*\d+\s*") for back in range(1, digits + 1))
        and (i - digits in starts or "\n" in run[i - digits - 1])
        for digits in (1, 2, 3)
    )
    letter = before(1, r"[^\W\d_]") and before(2, r"(?s:.*\.)")
    return run[i].endswith(".") and (number or letter or before(1, r"\s*Dr|e\.g|x\.y"))


def naive_ends(run, starts):
    """The last token of each sentence, and whether its mark needs no whitespace."""
    ends = {}
    for i, text in enumerate(run):
        if text == SPECIAL:
            continue
        if "\n" in text or "。" in text or re.search(r"[.!?]\s", text):
            ends[i] = "。" in text
        elif text == "ก" or (text[-1:] in list(".!?") and text != "e.g." and not naive_unending(run, i, starts)):
            j = i + 1
            while text != "ก" and j < len(run) and run[j] == '"' and j not in starts:
                j += 1
            rest = "".join(run[j:]) if SPECIAL not in run[j : j + 1] else ""
            if rest[:1].isspace() and (text != "ก" or rest.lstrip()[:1] > "\x7f"):
                ends[j - 1] = ends.get(j - 1, False)
    return ends


def naive_starts(unit, run):
    """The definition as loops over one run."""
    starts = naive_forced(unit, run)
    for i, wide in (naive_ends(run, starts) if unit == "sentence" else {}).items():
        j, quiet = i + 1, ('"', "。", "。”", "!") if wide else ()
        while j < len(run) and j not in starts and j not in ends_of(run) and (not run[j].strip() or run[j] in quiet):
            j += 1
        starts += [j] * (j < len(run) and bool(run[j].strip()) and run[j] not in quiet)
    return sorted(set(starts))


def ends_of(run):
    return naive_ends(run, naive_forced("sentence", run))


@pytest.mark.parametrize("unit", ["sentence", "line"])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_starts_equal_a_loop(monkeypatch, unit, chunk):
    monkeypatch.setattr(sentences, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(3)
    runs = [rng.choice(POOL, size).tolist() for size in [0, 40, 1, 0, 3, 90, 2, 200, 1, 0]]
    expected, at = [], 0
    for run in runs:
        expected += [at + i for i in naive_starts(unit, run)]
        at += len(run)
    assert starts_of(unit, *runs).tolist() == expected
    assert len(expected) > 40


SCRIPTS = {
    "Latin": 'He said "Stop." / Then he left. / It costs 3.50 coins, e.g. two (see it). / "Why?!" / she asked.',
    "list": "Steps:\n/1. Heat it. / Wait.\n/12. Mix.\n/- done! / ok\n/| 1.5 | c |\n",
    "code": "x = a.b if y else c?d:e\n/foo(a, b); // Done. / Really!\n",
    "Han": "树叶是绿色的，因为叶绿素反射绿光。/他说：“好！”/然后走了。",
    "Japanese": "これは本です。/面白いですか？/はい！/「そうです。」/と言った。",
    "Devanagari": "यह एक पुस्तक है। / क्या आप ठीक हैं? / हाँ॥ / ठीक।",
    "Thai": "วันนี้อากาศดี /ฉันไปตลาด /ราคา 8 บาท /ขอบคุณ",
    "Arabic": "كيف حالك؟ / أنا بخير. / شكرا!",
    "Urdu": "یہ کتاب ہے۔ / آپ کیسے ہیں؟ / ٹھیک۔",
    "Hangul": "안녕하세요. / 오늘은 날씨가 좋아요! / 네.",
    "Cyrillic": "Это книга. / Как дела? / Хорошо!",
    "Greek": "Αυτό είναι βιβλίο. / Καλά!",
    "Hebrew": "זה ספר. / מה שלומך? / טוב!",
    "Khmer": "នេះជាសៀវភៅ។ / តើអ្នកសុខសប្បាយទេ? / បាទ។",
    "Burmese": "ဒါက စာအုပ်ပါ။ / နေကောင်းလား။",
    "Ethiopic": "ይህ መጽሐፍ ነው። / እንዴት ነህ፧ / ደህና።",
    "Armenian": "Սա գիրք է։ / Ինչպե՞ս եք։ / Լավ։",
    "Tibetan": "འདི་དེབ་རེད། / ཁྱེད་རང་བདེ་པོ་ཡིན་པས། / ཡིན།",
    "emoji": "Great! / 👩‍👩‍👧‍👦 Nice one.😀 Ok‼️ / Done.",
}
TITLES = "It is for Dr. Smith, see Fig. 2 vs. the other. / Then go."


@cache
def tokenizer_of(name):
    return tiny.tokenizer() if name == "bytes" else real.tokenizer(name)


def found_and_expected(tokenizer, text):
    """Sentences without whitespace at their ends; where it is between two of them, it may belong to either."""
    parts = re.split(r"(?<!/)/(?!/)", text)
    ids = tokenizer("".join(parts).replace("  ", " "), add_special_tokens=False)["input_ids"]
    starts = sentences.segment_starts("sentence", tokenizer, ids, [0, len(ids)], special_ids(tokenizer))
    pieces = token_bytes(tokenizer, ids)
    found = [b"".join(pieces[a:b]).decode() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [part.strip() for part in found], [part.strip() for part in parts]


@pytest.mark.parametrize("name", ["bytes", *(pytest.param(each, marks=real.needs(each)) for each in real.NAMES)])
def test_sentences_of_scripts_whatever_their_tokens(name):
    for script, text in SCRIPTS.items():
        found, expected = found_and_expected(tokenizer_of(name), text)
        assert found == expected, script
    if name != "bytes":  # a title is found as one token
        found, expected = found_and_expected(tokenizer_of(name), TITLES)
        assert found == expected


def test_no_segment_begins_inside_a_character():
    tokenizer = tiny.tokenizer()
    text = "a.\n" + "".join(SCRIPTS.values()) + "好。 é! 😀? 👍🏽 "
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = token_bytes(tokenizer, ids.tolist())
    inside = [piece[0] & 0xC0 == 0x80 for piece in pieces]
    found = sentences.inside_characters(tokenizer, ids, [0, len(ids)])
    assert found.tolist() == inside and sum(inside) > 300
    cut = next(at for at, flag in enumerate(inside) if flag)  # where a run begins inside one
    assert not sentences.inside_characters(tokenizer, ids, [0, cut, len(ids)])[cut]
    assert sentences.inside_characters(tokenizer, ids[:3], [0, 3]) is None
    for unit in ("sentence", "line"):
        starts = sentences.segment_starts(unit, tokenizer, ids, [0, len(ids)], [])
        assert len(starts) > 8 and not np.asarray(inside)[starts].any()


def test_nothing_to_cut():
    assert starts_of("sentence").tolist() == starts_of("line", []).tolist() == []


def random_scores(rng, lengths):
    """Documents of these lengths, some scores undefined, and starts of segments that respect them."""
    layout = layout_of([np.zeros(n) for n in lengths])
    size = int(layout.offsets[-1])
    scores = rng.gamma(1.0, size=size).astype(np.float32)
    scores[rng.random(size) < 0.3] = np.nan
    begins = rng.random(size) < 0.2
    begins[layout.offsets[:-1][np.asarray(lengths) > 0]] = True
    return scores, layout, np.flatnonzero(begins)


@pytest.mark.parametrize("chunk", [1 << 17, 25])
def test_means_equal_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(ragged, "CHUNK_TOKENS", chunk)
    scores, layout, starts = random_scores(np.random.default_rng(0), [30, 0, 1, 17, 2, 640, 5, 0, 40, 3, 0])
    found = segment_means(scores, layout, starts)
    for low, high in zip(starts, [*starts[1:], len(scores)], strict=True):
        part = scores[low:high].astype(np.float64)
        expected = np.full(len(part), np.nan)
        if not np.isnan(part).all():
            expected[~np.isnan(part)] = np.nanmean(part)
        np.testing.assert_allclose(found[low:high], expected, rtol=1e-6)
    assert found.dtype == np.float32 and np.isnan(found).any() and not np.isnan(found).all()


def test_means_do_not_depend_on_the_other_documents():
    rng = np.random.default_rng(1)
    scores, layout, starts = random_scores(rng, rng.integers(1, 3_000, 200))
    together = segment_means(scores * 1e3, layout, starts)
    for i in range(0, 200, 7):
        low, high = layout.offsets[i : i + 2]
        own = starts[(starts >= low) & (starts < high)] - low
        alone = segment_means(scores[low:high] * np.float32(1e3), layout_of([np.zeros(high - low)]), own)
        np.testing.assert_array_equal(alone, together[low:high])


def odd_one_out():
    """Three sentences of four tokens; the second is improbable as a whole, though not in every token."""
    scores = scores_of([12], logprobs=[-1, -3, -1, -1, -4, -0.2, -4, -4, -1, -1, -3, -1])
    return scores, {"sentence": np.asarray([0, 4, 8])}


def novelty(unit):
    block = {"preset": "none", "min_kept": 0}
    return XTFConfig.parse({**block, KN: {"drop": {"unknown_below": 0.08}, "unit": unit}})


def test_a_sentence_as_unit_drops_the_whole_odd_sentence():
    scores, given = odd_one_out()
    by_token = select(scores, novelty("token")).keep
    by_sentence = select(scores, novelty("sentence"), segments=given)
    assert by_token.tolist() == [True, False, True, True, False, True, False, False, True, True, False, True]
    assert by_sentence.keep.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert by_sentence.thresholds[KN]["unit"] == "sentence"


def test_a_character_is_never_cut():
    """Of two pieces that one rule would tear apart, both are kept; pieces that all go, go."""
    scores = scores_of([8], logprobs=[-1, -9, -1, -9, -9, -9, -1, -9])
    inside = np.asarray([0, 0, 1, 0, 1, 1, 0, 0], dtype=bool)
    block = {"preset": "none", "min_kept": 0, KN: {"drop": {"unknown_below": 0.08}}}
    found = select(scores, XTFConfig.parse(block), inside=inside)
    assert found.keep.tolist() == [True, True, True, False, False, False, True, False]
    assert reason_text(int(found.reasons[1])) == f"{KN},protected"
    assert not select(scores, XTFConfig.parse(block)).keep[1]
    controlled = XTFConfig.parse({**block, "control": "random"})
    assert (select(scores, controlled, inside=inside).keep == select(scores, controlled).keep).all()


def test_the_plan_keeps_the_pieces_of_a_character_together(plan):  # noqa: F811
    tokenizer = tiny.tokenizer()
    ids = tokenizer("Great 👍🏽 😀 好的 é!", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": [5, *ids], "labels": [-100, *ids]}]
    made = plan({**ALL_OFF, KN: {"drop": {"quantile": 0.5}}, "protect": NOTHING, "min_kept": 0}, rows)
    inside = sentences.inside_characters(tokenizer, ids, [0, len(ids)])
    groups = np.split(made.selection.keep, np.flatnonzero(~inside)[1:])
    assert {True, False} == {bool(group[0]) for group in groups}
    assert all(group.all() or not group.any() for group in groups)


def test_segments_that_are_needed_and_not_given_are_refused():
    scores, given = odd_one_out()
    for segments_given in (None, given):
        with pytest.raises(XTFError, match="unit: line needs the first token of every line"):
            select(scores, novelty("line"), segments=segments_given)


def test_rules_see_the_means():
    scores, layout, starts = random_scores(np.random.default_rng(2), [300, 20, 0, 41])
    importance = {"drop": {"quantile": 0.3}, "max_fraction": 0.2}

    def fire(values, **settings):
        config = XTFConfig.parse({"preset": "none", RI: {**importance, **settings}}).reasoning_importance
        return rules.evaluate(RI, values, layout, config, {"line": starts}).mask

    averaged = fire(scores, unit="line")
    np.testing.assert_array_equal(averaged, fire(segment_means(scores, layout, starts)))
    assert not np.array_equal(averaged, fire(scores))


@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_the_plan_drops_complete_segments(plan, unit):  # noqa: F811
    def whole(unit_of_rule):
        part = {"drop": {"quantile": 0.4}, "unit": unit_of_rule}
        made = plan({**ALL_OFF, KN: part, "protect": NOTHING, "min_kept": 0})
        runs, fast = made.documents.completion_runs, tiny.tokenizer()
        starts = sentences.segment_starts(unit, fast, made.scores.token_ids, runs, special_ids(fast))
        assert set(made.scores.offsets[:-1]) < set(starts.tolist())
        parts = np.split(made.selection.keep, starts[1:])
        assert {True, False} == {bool(part[0]) for part in parts}
        return all(part.all() or not part.any() for part in parts)

    assert whole(unit) and not whole("token")


def test_segments_are_computed_only_if_a_unit_needs_them(plan, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sentences, "segment_starts", None)
    plan({RI: {"window": 5}, "protect": NOTHING})
    with pytest.raises(TypeError):
        plan({TR: {"unit": "line"}, "protect": NOTHING})
    with pytest.raises(TypeError):
        plan({"protect": {"formats": 0.5}})


SCORERS = ["attention_received", "novelty", "embedding_similarity", "typicality", "log_probability"]


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_may_use_lines_as_units(plan, scorer):  # noqa: F811
    part = {"scorer": scorer, "drop": {"quantile": 0.5}, "scope": "dataset", "unit": "line"}
    made = plan({**ALL_OFF, "selectors": {"it": part}, "protect": NOTHING, "min_kept": 0})
    starts = made.text.segments["line"]
    seen = segment_means(made.scores.values["it"], ragged.Layout(made.scores.offsets, made.scores.counts), starts)
    seen = -np.expm1(seen) if scorer == "novelty" else seen
    np.testing.assert_array_equal(made.selection.seen["it"], seen)
    known = [~np.isnan(each) for each in np.split(seen, starts[1:])]
    parts = [each[here] for each, here in zip(np.split(made.selection.keep, starts[1:]), known, strict=True)]
    assert all(each.all() or not each.any() for each in parts) and not made.selection.keep.all()
