"""Pictures of a report for the documentation: `make screenshots`, after `make demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURES = ("report.png", "document.png", "what-if.png")
COLOURS = 128  # less than half of the size, and no difference to see
SIZE = {"width": 1280, "height": 800}


def main(report: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(Path(report).resolve().as_uri())
        page.screenshot(path=out / "report.png")
        page.evaluate("document.getElementById('texts').scrollIntoView()")
        page.click(".document >> nth=0 >> .token.dropped >> nth=5")
        page.screenshot(path=out / "document.png")
        page.keyboard.press("Escape")
        page.fill("input[type=number][data-score=knowledge_novelty]", "0.4")
        page.evaluate("document.getElementById('what-if').scrollIntoView()")
        page.screenshot(path=out / "what-if.png")
        browser.close()
    for path in map(out.joinpath, PICTURES):
        Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
