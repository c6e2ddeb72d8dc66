"""The figures of docs/reliability.md are what the tests recorded: counts add up, of differences the worst stays."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import reliability
from tests.reliability.figures import gathered


def test_counts_add_up_and_the_worst_difference_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "FIGURES", str(tmp_path / "figures"))
    for kills, gap in ((3, 1e-6), (4, 5e-7)):
        reliability.record("kills", kills=kills, largest=gap)
    reliability.record("other", text="none")
    lines = (tmp_path / "figures").read_text().splitlines()
    assert gathered(lines) == {"kills": {"kills": 7, "largest": 1e-6}, "other": {"text": "none"}}


def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "FIGURES", None)
    reliability.record("kills", kills=1)
    assert not list(tmp_path.iterdir())


def test_the_table_goes_into_the_page(tmp_path):
    (tmp_path / "figures").write_text(json.dumps({"name": "kills", "kills": 1200, "lost": 0}) + "\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    words = [sys.executable, "-m", "tests.reliability.figures", str(tmp_path / "figures"), "--write", str(page)]
    words += ["--minutes", "43.4"]
    assert "| kills | kills 1,200; lost 0 |" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "1,200" in text and "old" not in text
    assert "`make test-long`, 43 minutes." in text and "commit " in text and "torch " in text and "threads of " in text
