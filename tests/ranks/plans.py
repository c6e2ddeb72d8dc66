"""Cases of whole plans: the same on every rank, or refused on every rank."""

from __future__ import annotations

import copy
import time
from contextlib import contextmanager

import numpy as np
import pytest

from tests import streams, tiny
from tests.made_scores import DEFAULT, odd_sentences, read_prompts
from tests.ranks.common import case, lines
from tests.test_plan import ATTRIBUTES_ON, Provider, rows
from xtf_plugin import XTFUserError, attach
from xtf_plugin import plan as pipeline
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.column_marks import Marks
from xtf_plugin.data.documents import collect, split_row
from xtf_plugin.errors import XTFError
from xtf_plugin.plan import make_plan
from xtf_plugin.scoring import distributed
from xtf_plugin.scoring.distributed import Ranks

CRITIC = {"preset": "none", "selectors": {"critic": {"scorer": "column", "column": "noise"}}}
SLOW = 2.0  # seconds


@contextmanager
def prompts_read():
    """As `read_prompts`, where no test is that would undo it."""
    with pytest.MonkeyPatch.context() as patch:
        read_prompts(patch)
        yield


def plan_of(ranks, folder, block):
    config = XTFConfig.parse({**block, "cache_dir": str(folder / f"plan-{ranks.rank}")})
    with prompts_read():
        return make_plan(config, collect(rows(14)), Provider(), tiny.tokenizer(), progress=False, ranks=ranks)


def planned(ranks, folder, block):
    plan = plan_of(ranks, folder, block)
    about, keep = plan.scorers.get("excerpts", {}), plan.selection.keep.astype(int).tolist()
    found = {"keep": keep, "excerpts": about.get("documents", 0), "documents": plan.stats.documents}
    # what documents have in common is read by one rank
    return {**found, "tokens": plan.stats.tokens + about.get("tokens", 0)}


@case
def plans(ranks, folder):
    blocks = {
        "default": DEFAULT,
        "odd sentences": odd_sentences(),
        "attributes": ATTRIBUTES_ON,
        "paper": {"preset": "paper"},
    }
    return {name: planned(ranks, folder / name, block) for name, block in blocks.items()}


@case
def scores_of_the_default(ranks, folder):
    """Each rank scores its share of the splices, whichever documents they are of."""
    plan = plan_of(ranks, folder, DEFAULT)
    return {name: lines(values) for name, values in plan.scores.values.items()}


@case
def other_data_on_one_rank(ranks, folder):
    config = XTFConfig.parse({"cache_dir": str(folder / "other")})
    try:
        make_plan(config, collect(rows(6 + ranks.rank)), Provider(), tiny.tokenizer(), progress=False, ranks=ranks)
    except XTFError as error:
        return str(error)


@case
def slow_files_on_one_rank(ranks, folder):
    """One rank reads the files of the references slowly: no collective but heartbeats may wait for it."""
    distributed.BEAT_SECONDS, longest, gather = 0.1, [0.0], Ranks.gather

    def timed(self, mine):
        start = time.monotonic()
        found = gather(self, mine)
        longest[0] = max(longest[0], time.monotonic() - start)
        return found

    class Slow(Provider):
        def fingerprint(self):
            time.sleep(SLOW * ranks.rank)
            return super().fingerprint()

    def another(reference):
        time.sleep(SLOW * ranks.rank)
        return Slow(tiny.model(seed=1))

    own = {"scorer": "typicality", "drop": {"below": -1.0}, "reference": {"model": "another"}}
    config = XTFConfig.parse({"preset": "none", "selectors": {"odd": own}, "cache_dir": str(folder / "slow")})
    documents = collect(rows(6))
    Ranks.gather = timed
    make_plan(config, documents, Slow(), tiny.tokenizer(), references=another, progress=False, ranks=ranks)
    distributed.BEAT_SECONDS, Ranks.gather = 20.0, gather
    return longest[0]


@case
def other_blocks_on_one_rank(ranks, folder):
    """Another threshold, an attribute of one rank only, another special token, and other places for files."""
    first, second = {"preset": "none", "knowledge_novelty": True}, {"task_relevance": {"drop": {"below": 0.3}}}
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]}, replace_extra_special_tokens=False)
    other = ranks.rank == 1
    blocks = {
        "threshold": ({"selectors": {"odd": {"scorer": "typicality", "drop": {"below": -1.0 - ranks.rank}}}}, False),
        "attribute": ({**first, **second} if other else first, False),
        "tokenizer": (first, other),
        "files": ({**first, "report": not other}, False),
    }
    found = {}
    for name, (block, changed) in blocks.items():
        config = XTFConfig.parse({**block, "cache_dir": str(folder / f"{name}-{ranks.rank}")})
        used = tokenizer if changed else tiny.tokenizer()
        try:
            make_plan(config, collect(rows(6)), Provider(), used, progress=False, ranks=ranks)
            found[name] = "planned"
        except XTFError as error:
            found[name] = str(error)
    return found


@case
def marks_of_a_column(ranks, folder):
    """The same on all ranks, and on the second one others, as a critic gives that draws at random."""
    found = {}
    for name in ("same", "other"):
        table = Marks("noise")
        for index, row in enumerate(rows(6)):
            _, ids, completion = split_row(row)[0]
            flags = completion & (np.arange(len(ids)) % 5 == (index + (ranks.rank if name == "other" else 0)) % 5)
            table.add(ids, completion, flags)
        config = XTFConfig.parse({**CRITIC, "cache_dir": str(folder / f"{name}-{ranks.rank}")})
        options = {"progress": False, "ranks": ranks, "marks": {("noise", "spans", None): table}}
        try:
            plan = make_plan(config, collect(rows(6)), Provider(), tiny.tokenizer(), **options)
            found[name] = plan.selection.keep.astype(int).tolist()
        except XTFError as error:
            found[name] = str(error)
    return found


@case
def a_stream_in_two_processes(ranks, folder):
    try:
        attach(streams.trainer(folder / str(ranks.rank)), True)
    except XTFUserError as error:
        return str(error)


@case
def other_masks_on_one_rank(ranks, folder):
    """Masks may differ for any reason, such as another version of a scorer's package."""
    config = XTFConfig.parse({"preset": "none", "knowledge_novelty": True, "cache_dir": str(folder / "masks")})
    select = pipeline.select

    def otherwise(*args, **options):
        made = select(*args, **options)
        made.keep[0] ^= ranks.rank == 1
        return made

    pipeline.select = otherwise
    try:
        make_plan(config, collect(rows(6)), Provider(), tiny.tokenizer(), progress=False, ranks=ranks)
    except XTFError as error:
        return str(error)
    finally:
        pipeline.select = select
