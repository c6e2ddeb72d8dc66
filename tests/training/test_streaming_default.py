"""The default preset on a stream: later documents are scored with what the calibration sample has, and nothing else."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from datasets import Dataset

from tests import tiny
from tests.made_scores import read_prompts
from tests.streams import attached, rows, trained, trainer
from tests.test_plan import Provider
from tests.test_plan import rows as rows_of
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import collect
from xtf_plugin.data.ragged import Layout, dataset_quantiles
from xtf_plugin.scorers import ScoringContext
from xtf_plugin.scorers.explained import Explained, _Units, common_template
from xtf_plugin.scorers.influence import _influence
from xtf_plugin.scoring.cached_scores import ScoreSource
from xtf_plugin.selection.text_rules import TextRules
from xtf_plugin.training import streaming

SAMPLE, LATER = 16, 24
SHARE, DOUBTFUL = 0.5, 1.5
SEED = 6  # of random weights by which the median share is positive, and protected sentences would change it


def data():
    """Word problems, of which the sample's prompts alone end in the same way."""
    made = tiny.problems(SAMPLE + LATER)
    for index, row in enumerate(made[SAMPLE:]):
        row["prompt"] += f" Count to {index}."
    return made


@pytest.fixture
def chunks(monkeypatch):
    """Documents and scores of every chunk of a stream, as they are made."""
    found, run = [], streaming.run_scorers

    def watch(config, source, *others):
        values = run(config, source, *others)
        found.append((source.documents, values))
        return values

    monkeypatch.setattr(streaming, "run_scorers", watch)
    return found


def test_a_chunk_gets_the_scores_that_the_sample_s_template_limits_and_median_give(tmp_path, monkeypatch, chunks):
    read_prompts(monkeypatch)
    block = {
        "task_relevance": {"drop": {"of_median": SHARE}},
        "reasoning_importance": {"doubtful": DOUBTFUL},
        "protect": {
            "patterns": ["Sure"],
            "formats": None,
        },  # the sentences that begin so are not scored, nor in the sample's median
        "cache_dir": str(tmp_path / "oracle"),
    }
    stream = Dataset.from_list(data()).to_iterable_dataset()
    made = attached(
        tmp_path,
        trainer(tmp_path, stream, model=tiny.model(seed=SEED), max_steps=10),
        {**block, "calibration": SAMPLE, "batch_tokens": 64, "cache_dir": str(tmp_path / "cache")},
    )
    made.train()
    assert len(chunks) > 4, "no chunk is all that comes after the sample"
    config, listed = XTFConfig.parse(block), list(made.train_dataset)
    sample = context_of(config, listed[:SAMPLE])
    part = config.task_relevance
    shares, fixed = _Units(sample, part).scored(Explained())
    median = float(dataset_quantiles(shares, Layout(sample.offsets, sample.counts), [0.5])[0])
    assert median > 0 and fixed.limit > 0 and len(fixed.template) > 1
    later = context_of(config, listed[SAMPLE:])
    relevance = _Units(later, part).scored(fixed)[0]
    bare = ScoringContext(sample.documents, tiny.tokenizer(), sample.source)
    other = _Units(later, part).scored(_Units(bare, part).scored(Explained())[1])[0]
    assert np.nanmax(abs(other - relevance)) > 0.001, "what is protected makes no difference to this sample"
    later.scores["task_relevance"] = relevance
    leaning = _influence(later, config.reasoning_importance, (SHARE * median, DOUBTFUL * median))
    assert 0 < np.isfinite(leaning).mean() < 1 and (relevance < fixed.limit).any()
    assert len(common_template(later.documents, tiny.tokenizer())) != len(fixed.template)
    expected = {"task_relevance": relevance, "reasoning_importance": leaning}
    check(chunks, later, expected)


def context_of(config, listed):
    documents = collect(listed)
    text = TextRules.find(config, documents, tiny.tokenizer())
    source = ScoreSource(config, documents, tiny.tokenizer(), Provider(tiny.model(seed=SEED)))
    return ScoringContext(documents, tiny.tokenizer(), source, text.protected, text.forced)


def check(chunks, later, expected):
    """Compare every chunk's scores with those of the same documents in one set."""
    places = {key.tobytes(): index for index, key in enumerate(later.documents.keys)}
    seen = 0
    for documents, values in chunks:
        for index, key in enumerate(documents.keys):
            where = slice(*later.offsets[places[key.tobytes()] :][:2])
            here = slice(*documents.completion_offsets[index:][:2])
            for name, scores in expected.items():
                np.testing.assert_allclose(values[name][here], scores[where], atol=2e-4, err_msg=name)
            seen += 1
    assert seen == LATER


def test_formats_are_those_of_the_sample(tmp_path):
    """All but formats is dropped. A chunk holds one document or two, which do not tell what is common."""
    made = tiny.problems(24)
    for index, row in enumerate(made):
        row["completion"] += f"\n#### {index}\n## Note that {index} and what comes after it is more than twelve tokens."
    made = Dataset.from_list(made)
    part = {"scorer": "typicality", "drop": {"below": 1000.0}}
    block = {"preset": "none", "selectors": {"all": part}, "protect": {"special_tokens": False}, "min_kept": 0}
    steps = {"max_steps": 6}
    expected = trained(tmp_path / "map", trainer(tmp_path, made, **steps), block)
    stream = trainer(tmp_path, made.to_iterable_dataset(), **steps)
    assert trained(tmp_path / "stream", stream, {**block, "calibration": 8, "batch_tokens": 16}) == expected
    kept = [[token for token in labels if token != -100] for labels in expected.values()]
    texts = [tiny.tokenizer().decode(tokens) for tokens in kept]
    assert len(texts) == 24 and all("####" in text and "## N" in text for text in texts)
    assert not any("twelve" in text or "starts" in text for text in texts)


def test_prompts_that_explain_nothing_are_read_in_the_sample_alone(tmp_path, monkeypatch, chunks):
    """What the sample says holds for the whole stream: nothing is dropped, and no later document is spliced."""
    module, read = importlib.import_module("xtf_plugin.scorers.explained"), []
    surprise = module._Units._logprobs_after

    def watch(self, *args):
        read.append(len(self.documents))
        return surprise(self, *args)

    monkeypatch.setattr(module._Units, "_logprobs_after", watch)
    block = {"calibration": SAMPLE, "batch_tokens": 64}
    attached(tmp_path, trainer(tmp_path, rows().to_iterable_dataset()), block).train()
    assert len(chunks) > 3 and set(read) == {SAMPLE}
    assert all(np.isnan(values["task_relevance"]).all() for _, values in chunks)


def test_a_chunk_says_what_its_reference_warns_of(tmp_path):
    provider, given = Provider(), collect(rows_of(4))
    config = XTFConfig.parse({"cache_dir": str(tmp_path)})
    source = streaming._ChunkSource(config, given, tiny.tokenizer(), provider.reference, 100)
    provider.reference.warnings.append("it reads much again")
    source.predictions()
    assert source.warnings == ["it reads much again"] and not provider.reference.warnings
