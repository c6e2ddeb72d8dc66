"""Task relevance on vectors made by hand."""

from __future__ import annotations

import torch

from xtf_plugin.scorers.embedding_similarity import task_relevance


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
