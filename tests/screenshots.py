"""Pictures of a report for the documentation: `make screenshots`, after `make demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH = 1100


def main(report: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 620})
        page.goto(Path(report).resolve().as_uri())
        page.screenshot(path=out / "report.png")
        page.evaluate("document.getElementById('what-if').scrollIntoView()")
        page.screenshot(path=out / "what-if.png")
        page.select_option("#reason", "dropped")
        page.evaluate("document.getElementById('texts').scrollIntoView()")
        page.hover(".token.dropped >> nth=3")
        page.screenshot(path=out / "document.png")
        browser.close()
    print(*sorted(out.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
