"""The report of blocks with selectors: what is switched off gives a block that a run takes, or it says why not."""

from __future__ import annotations

import pytest
import yaml

from tests import tiny
from tests.browsing import browser, put, selected, shown, weigh  # noqa: F401 (a fixture)
from tests.test_callback import trainer
from xtf_plugin import attach
from xtf_plugin.config import XTFConfig

OWN = {"scorer": "typicality", "drop": {"below": -1.5}}
BLOCKS = {
    "the preset's alone": {"selectors": {"out_of_place": {"drop": {"below": -2}, "context": "document"}}},
    "one's own beside it": {"selectors": {"out_of_place": {"drop": {"below": -2}, "context": "document"}, "mine": OWN}},
    "one's own alone": {"preset": "none", "selectors": {"mine": OWN, "other": {**OWN, "drop": {"quantile": 0.1}}}},
    "at least two": {"preset": "none", "selectors": {"mine": OWN, "other": OWN}, "combine": {"at_least": 2}},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stop_gives_the_block_that_is_counted(browser, tmp_path, name):
    made = trainer(tmp_path, rows=tiny.problems(40), max_steps=1)
    attach(made, {"cache_dir": str(tmp_path / "cache"), **BLOCKS[name]})
    made.train()
    plan = made._xtf_hooks.on_batch.__self__.plan
    opened = browser.new_page()
    opened.goto((tmp_path / "out/xtf/report.html").as_uri())
    legal = set()
    for voter in plan.config.voters:
        (key,) = plan.config.part(voter).drop.model_dump(mode="json", exclude_none=True)
        stops = int(opened.get_attribute(f"input[data-voter={voter}][data-key={key}]", "max")) + 1
        for place in range(stops):
            put(opened, voter, key, place)
            block = yaml.safe_load(opened.text_content("#yaml"))["xtf"]
            if opened.is_visible("#illegal"):
                with pytest.raises(ValueError):
                    XTFConfig.parse(block)
                continue
            config = XTFConfig.parse(block)
            assert shown(opened) == weigh(plan, selected(plan, config).keep), block
            legal.add(len(config.voters))
        opened.click("#reset")
    assert len(legal) == (2 if name in ("one's own beside it", "one's own alone") else 1)
    opened.close()
