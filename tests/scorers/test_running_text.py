"""How much running text a line and the lines around it have, against a loop over all pairs of lines of a turn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.made_scores import ALL_OFF
from tests.test_plan import plan  # noqa: F401, a fixture
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.config.scores import PRESETS
from xtf_plugin.data.documents import collect
from xtf_plugin.scorers import running_text
from xtf_plugin.scorers.base import ScoringContext
from xtf_plugin.selection.text_rules import segment_starts

LETTERS = SimpleNamespace(  # a token is a character, and its id is its code
    decode=lambda ids, **_: chr(int(ids[0])), all_special_ids=[], added_tokens_decoder={}
)
SENTENCE = "The river rose after two days of rain."
PARAGRAPH = f"{SENTENCE} Boats were moved to the upper harbour, and the market stayed closed until Monday. " * 2
MENU = "Home | News | Weather"
CODE = "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2))\n"
TABLE = "| Town | Rain |\n| --- | --- |\n| Porto | 31 mm |\n| Vigo | 18 mm |\n"


def row(*turns):
    """A row of turns: (prompt, answer) each."""
    ids, labels = [], []
    for prompt, answer in turns:
        ids += [*map(ord, prompt), *map(ord, answer)]
        labels += [*[-100] * len(prompt), *map(ord, answer)]
    return {"input_ids": ids, "labels": labels}


def score(documents):
    source = SimpleNamespace(segments=lambda unit: segment_starts(documents, LETTERS, unit))
    context = ScoringContext(documents, LETTERS, source)
    return running_text.running_text.score(context, running_text.RunningTextConfig(scorer="running_text"))


def by_line(text):
    """The score of each line of an answer."""
    found = score(collect([row(("Read.\n", text))]))
    lines = text.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    return [(line.strip(), float(found[end - 1])) for line, end in zip(lines, ends, strict=True)]


def naive(text):
    """Every line of a turn with every other one; ASCII alone."""
    lines = text.splitlines(keepends=True)
    filled = [at for at, line in enumerate(lines) if line.strip()]
    own = []
    for at in filled:
        bare = lines[at].strip()
        whole = bare.rstrip("\"')").endswith((".", "!", "?"))
        own.append(min(len(bare), 200) if len(bare) >= 100 or (whole and len(bare) >= 20) else 0)
    found = [np.nan] * len(lines)
    for i, at in enumerate(filled):
        found[at] = sum(own[j] * 0.5 ** abs(i - j) for j in range(len(own)))
    return [value for line, value in zip(lines, found, strict=True) for _ in line]


def test_it_equals_the_definition():
    rng = np.random.default_rng(0)
    parts = [SENTENCE, PARAGRAPH, MENU, "", "  ", "Yes.", '"It was late, and dark."', "x" * 99, "x" * 100, "1. two"]

    def answer():
        lines = [parts[i] + "\n" for i in rng.integers(0, len(parts), rng.integers(1, 14))]
        return "".join(lines)[: None if rng.random() < 0.5 else -1] or "."

    turns = [[(MENU, answer()) for _ in range(1 + index % 3)] for index in range(25)]
    expected = [value for row in turns for _, text in row for value in naive(text)]
    found = score(collect([row(*one) for one in turns]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.nanmax(found) <= 600 and np.nanmin(found) == 0


def test_numbers_by_hand():
    assert by_line(f"{MENU}\nSearch\n") == [(MENU, 0.0), ("Search", 0.0)]
    page = f"{MENU}\n\n{PARAGRAPH}\nThe harbour\n\n{PARAGRAPH}\nMore\nShare\n"
    scores = [value for _, value in by_line(page)]
    expected = [125.0, np.nan, 250.0, 200.0, np.nan, 250.0, 125.0, 62.5]  # 200 / 2 + 200 / 8 for the menu
    np.testing.assert_equal(scores, expected)


def test_no_turn_and_no_document_takes_from_another():
    one = score(collect([row(("Hi\n", f"{MENU}\n")), row((PARAGRAPH, f"{MENU}\n"), ("Go\n", PARAGRAPH))]))
    assert set(one[: 2 * len(MENU) + 2]) == {0.0} and set(one[2 * len(MENU) + 2 :]) == {200.0}


SCRIPTS = {
    "English": "The river rose after two days of rain.",
    "Russian": "После двух дней дождя вода в реке поднялась.",
    "Greek": "Το ποτάμι ανέβηκε μετά από δύο μέρες βροχής.",
    "Arabic": "هل ارتفع منسوب النهر بعد يومين من المطر؟",
    "Urdu": "دو دن کی بارش کے بعد دریا کی سطح بلند ہو گئی۔",
    "Hebrew": "הנהר עלה על גדותיו אחרי יומיים של גשם.",
    "Hindi": "दो दिन की बारिश के बाद नदी का जलस्तर बढ़ गया।",
    "Chinese": "下了两天雨之后，河水涨得很高。",
    "Japanese": "二日間の雨のあと、川の水位が上がった。",
    "Korean": "이틀 동안 비가 내린 뒤 강물이 불어났다.",
    "Armenian": "Երկու օր անձրևից հետո գետը բարձրացավ։",
    "Amharic": "ከሁለት ቀን ዝናብ በኋላ የወንዙ ውሃ ከፍ አለ።",
    "Burmese": "နှစ်ရက်ကြာ မိုးရွာပြီးနောက် မြစ်ရေ မြင့်တက်လာသည်။",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_sentences_of_scripts(name):
    """With its mark a sentence is running text; a link of the same length without a mark is none."""
    text = SCRIPTS[name]
    wide = len(text) if name in ("Chinese", "Japanese") else sum("가" <= char <= "힣" for char in text)
    assert by_line(f"{text}\n") == [(text, len(text) + wide)]
    assert by_line(f"{text[:-1]}\n") == [(text[:-1], 0.0)]


def test_a_script_without_marks_is_known_by_its_length():
    thai = "หลังจากฝนตกติดต่อกันสองวัน ระดับน้ำในแม่น้ำก็สูงขึ้นอย่างรวดเร็ว และตลาดริมน้ำต้องปิดไปจนถึงวันจันทร์หน้า"
    assert by_line(f"{thai}\n") == [(thai, len(thai))] and len(thai) >= 100


def test_its_rule_drops_a_menu_and_keeps_an_article_and_the_lines_beside_it():
    menus = f"{MENU}\nLog in\nSubscribe\nContact\n", "Terms\nPrivacy\nJobs\n"
    found = by_line(f"{menus[0]}\nHigh water\n{PARAGRAPH}\n\n{PARAGRAPH}\nRead more\n{menus[1]}")
    limit = running_text.RunningTextConfig(scorer="running_text").drop.below
    assert [line for line, value in found if value < limit] == [line for menu in menus for line in menu.splitlines()]
    assert [value for line, value in found if line in ("High water", "Read more")] == [150.0, 150.0]


def test_a_plan_drops_by_it_without_a_pass_of_the_model(plan):  # noqa: F811
    part = {"page": {"scorer": "running_text"}}  # the documents are sums in short lines
    made = plan({**ALL_OFF, "min_kept": 0, "selectors": part})
    assert not made.selection.keep.all() and made.selection.thresholds["page"]["drops"] == {"below": 150.0}
    assert made.stats.tokens == 0


@pytest.mark.parametrize("text", [CODE, TABLE], ids=["code", "table"])
def test_what_is_no_text_scores_nothing_so_no_preset_asks_for_it(text):
    assert {value for line, value in by_line(text) if line} == {0.0}
    named = [preset for preset in PRESETS if preset != "none"]
    scores = [part for preset in named for part in XTFConfig.parse({"preset": preset}).scores.values()]
    assert len(scores) == 9 and "running_text" not in {part.scorer for part in scores}
