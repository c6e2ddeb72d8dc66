"""Typicality and openings: what is noise beyond the surprise that was to be expected."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.test_pipeline import Provider, rows
from tests.test_selectors import OFF
from xtf_plugin import attributes
from xtf_plugin.config import XTFConfig
from xtf_plugin.documents import collect
from xtf_plugin.errors import XTFUserError
from xtf_plugin.pipeline import make_plan, segment_starts
from xtf_plugin.scorers import typical
from xtf_plugin.testing import check_scorer

OTHER = {"reference": {"model": "other"}}


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        (typical.Typicality, OTHER),
        (typical.Opening, OTHER),
        (typical.Opening, {"unit": "line", "clip": 0.5}),
    ],
)
def test_they_conform(scorer, options):
    check_scorer(scorer, options)


def context(logprobs, entropy, starts):
    arrays = {"logprobs": np.float32(logprobs), "entropy": np.float32(entropy)}
    return SimpleNamespace(predictions=lambda _: SimpleNamespace(**arrays), segments=lambda _: np.asarray(starts))


def opening(given, **keys):
    config = typical.OpeningConfig(scorer="opening", drop={"quantile": 0.1}, **keys)
    return typical.Opening(config).score(given)


def test_typicality_of_what_the_reference_itself_would_write_is_zero_on_average():
    torch.manual_seed(0)
    logits = torch.randn(7, 50) * torch.tensor([0.0, 0.5, 1, 2, 4, 8, 16])[:, None]  # from uniform to sure
    p = logits.softmax(-1)
    for row in range(7):
        every = torch.arange(50)
        found = attributes.predictions(logits[row].expand(50, 50), lambda x: x, every)
        assert abs(float((p[row] * (found[0] + found[1])).sum())) < 1e-4


def test_opening_equals_its_definition_on_random_units():
    rng = np.random.default_rng(0)
    for trial in range(30):
        size = int(rng.integers(1, 60))
        starts = np.union1d([0], rng.integers(0, size, rng.integers(0, 9)))
        logprobs, entropy = -rng.exponential(4, size), rng.exponential(1, size)
        logprobs[rng.random(size) < 0.2] = np.nan
        for clip in (0.0, 2.0, 100.0):
            got = opening(context(logprobs, entropy, starts), clip=clip)
            for low, high in zip(starts, [*starts[1:], size], strict=True):
                total = weight = 0.0
                for i, one in enumerate((np.float32(logprobs) + np.float32(entropy))[low:high]):
                    if not np.isnan(one):
                        total += max(float(one), -clip) / (i + 1)
                        weight += 1 / (i + 1)
                expected = total / weight if weight else np.nan
                np.testing.assert_allclose(got[low:high], np.float32(expected), rtol=1e-5, err_msg=str(trial))


def test_an_opening_that_the_clip_keeps_from_firing_is_refused():
    with pytest.raises(XTFUserError, match="odd_lines.clip: 4.0 keeps every score"):
        XTFConfig.parse({"selectors": {"odd_lines": {"clip": 4}}})


def test_no_token_no_score():
    assert opening(context([], [], [])).shape == (0,)


def test_fluent_filler_is_found_by_its_beginning_and_not_by_its_average():
    """Five likely tokens; a digression whose first token is a surprise and whose rest follows; an uncertain start."""
    logprobs = [-0.1, -0.1, -0.1, -0.1, -0.1, -9.0, -0.05, -0.05, -0.05, -0.05, -0.05, -0.05, -3.0, -0.1, -0.1]
    entropy = [0.1] * 12 + [3.0, 0.1, 0.1]  # where many words may begin a sentence, an improbable one is no noise
    starts = [0, 5, 12]
    given = context(logprobs, entropy, starts)
    scores = opening(given)
    assert (scores < -3).tolist() == [False] * 5 + [True] * 7 + [False] * 3
    means = np.repeat(np.add.reduceat(np.float64(logprobs), starts) / np.diff([*starts, 15]), np.diff([*starts, 15]))
    assert means[5] > -2 and (means < -1).sum() == 10  # the average cannot tell the digression from the good sentence


def test_both_select_in_a_plan_and_the_knobs_change_it(tmp_path):
    documents = collect(rows(12))
    provider = Provider()
    base = {**OFF, "min_kept": 0, "cache_dir": str(tmp_path)}

    def kept(**selector):
        config = XTFConfig.parse({**base, "selectors": {"odd": {"drop": {"quantile": 0.3}, **selector}}})
        return make_plan(config, documents, provider, tiny.tokenizer(), progress=False)

    plan = kept(scorer="typicality")
    scores = plan.scores.selectors["odd"]
    defined = ~np.isnan(scores)
    assert not plan.selection.keep.all()
    assert scores[~plan.selection.keep].max() <= scores[plan.selection.keep & defined].min()
    lines = kept(scorer="opening", unit="line").scores.selectors["odd"]
    starts = segment_starts(documents, tiny.tokenizer(), "line")
    for low, high in zip(starts, [*starts[1:], len(scores)], strict=True):
        assert len(set(lines[low:high].tolist())) == 1
    assert not np.array_equal(lines, kept(scorer="opening").scores.selectors["odd"])
    assert not np.array_equal(lines, kept(scorer="opening", unit="line", clip=0.1).scores.selectors["odd"])


def test_one_odd_token_condemns_no_sentence():
    """A typo far down costs its sentence little, whatever its own score, and less still behind the clip."""
    logprobs = [-0.1, -0.1, -0.1, -0.1, -30.0, -0.1, -0.1]
    given = context(logprobs, [0.1] * 7, [0])
    assert opening(given)[0] > -1 and opening(given, clip=100.0)[0] < -2


def test_a_reference_that_does_not_know_the_text_is_told(tmp_path):
    """To a reference that is sure and wrong everything is odd; silence would hide that nearly all is dropped."""
    documents, model = collect(rows(12)), tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # sure of itself everywhere, for no reason
    rule = {"odd_tokens": {"scorer": "typicality", "drop": {"below": -10}}}
    config = XTFConfig.parse({"cache_dir": str(tmp_path), "selectors": rule})
    plan = make_plan(config, documents, Provider(model), tiny.tokenizer(), progress=False)
    assert plan.selection.keep.mean() < 0.5
    assert any("odd_tokens: fires on" in told and "may not know" in told for told in plan.warnings)
    calm = make_plan(config, documents, Provider(), tiny.tokenizer(), progress=False)
    assert not any("may not know" in told for told in calm.warnings)
