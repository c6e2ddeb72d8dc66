"""Task relevance on vectors made by hand."""

from __future__ import annotations

import torch

from xtf_plugin.data.documents import collect
from xtf_plugin.scorers import ScoringContext
from xtf_plugin.scorers.embedding_similarity import EmbeddingSimilarityConfig, _Domain, task_relevance


def test_closest_is_one_and_farthest_zero():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    scores = task_relevance(vectors, torch.tensor([2.0, 0.0]))
    assert torch.allclose(scores, torch.tensor([1.0, (2**-0.5 + 1) / 2, 0.0]))


def test_zero_vector_is_undefined_and_does_not_spoil_the_others():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    scores = task_relevance(vectors, torch.tensor([1.0, 0.0]))
    assert scores[1].isnan() and scores[0] == 1 and scores[2] == 0


def test_all_alike_is_undefined():
    assert task_relevance(torch.ones(3, 2), torch.ones(2)).isnan().all()


def test_a_document_weighs_in_the_domain_as_often_as_it_occurs():
    often, once = ({"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([3, 5, 5], [3, 9]))
    config = EmbeddingSimilarityConfig(scorer="embedding_similarity")
    domain = _Domain(ScoringContext(collect([often, once, often, often]), None, None), config)
    assert dict(zip(domain.ids.tolist(), domain.weights.tolist(), strict=True)) == {3: 4, 5: 6, 9: 1}
