"""The worked examples, with a base that knows nothing: every part is written to its place, marks and table agree."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.benchmarks.real_text.stages import SCALES
from tests.benchmarks.worked import pages, texts
from tests.benchmarks.worked.__main__ import main
from tests.test_real_text import data  # noqa: F401
from xtf_plugin.report import terminal

NAMES = [example.name for each in texts.EXAMPLES.values() for example in each]


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("worked")
    target = folder / "page.md"
    target.write_text(
        "".join(f"about {name}\n{'old'.join(pages.marks(name))}\n" for name in ("made", "shares", *NAMES))
    )
    with pytest.MonkeyPatch.context() as patched:  # it would silence other tests' warnings
        patched.setattr("tests.benchmarks.worked.__main__.quiet", lambda: None)
        patched.setitem(SCALES, "smoke", replace(SCALES["smoke"], context=768))  # a small vocabulary makes long texts
        main(["--data", str(data), "--folder", str(folder), "--scale", "smoke", "--write", str(target)])
    return target.read_text()


def part(page: str, name: str) -> str:
    begin, end = pages.marks(name)
    return page.partition(begin)[2].partition(end)[0]


def test_every_part_is_written_and_nothing_else_is_touched(page):
    assert "old" not in [line.strip() for line in page.splitlines()]
    for name in NAMES:
        assert f"about {name}\n" in page
        assert part(page, name).count("```text") == len(pages.BLOCKS)


@pytest.mark.parametrize("name", NAMES)
def test_marks_hold_as_many_tokens_as_the_table_says(page, name):
    """The table has a row a line, and counts drops where there are marks."""
    (example,) = (each for group in texts.EXAMPLES.values() for each in group if each.name == name)
    rows = [line for line in part(page, name).splitlines() if re.search(r"\d of \d", line)]
    assert len(rows) == len(example.record.completion.splitlines())
    shown = re.findall(r"```text\n(.*?)\n```", part(page, name), re.DOTALL)
    for column, block in enumerate(shown):
        dropped = [int(re.findall(r"(\d+) of \d+", row)[column]) for row in rows]
        assert sum(dropped) == 0 or "[-" in block
        bare = re.sub(r"\[-|\{\+|\|[\w ]+[-+][\]}]", "", block)
        assert bare.removesuffix("</s>").rstrip("\n") == terminal.visible(example.record.completion).rstrip("\n")


def test_planted_lines_are_where_the_examples_say():
    for examples in texts.EXAMPLES.values():
        assert any(not example.foreign for example in examples), "no clean example"
        for example in examples:
            for begin, end in example.foreign:
                line = example.record.completion[begin:end]
                assert line.endswith("\n") and line.count("\n") == 1 and texts.FOREIGN not in line
