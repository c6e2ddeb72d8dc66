"""When beginnings are shared: not by models whose ranks run in step, and only if scores are those of one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.scoring.test_branches import alike
from xtf_plugin.scoring import branches
from xtf_plugin.scoring.reference import Reference


def test_a_model_whose_ranks_run_in_step_reads_plainly(monkeypatch):
    """Its ranks would run other numbers of forwards, and wait for each other for ever."""
    documents, reference = alike(), Reference(tiny.model(), "tiny")
    assert branches.can_branch(reference, documents)
    monkeypatch.setattr(Reference, "lockstep", True)
    assert not branches.can_branch(reference, documents)


@pytest.mark.parametrize(
    ("dtype", "gap", "agreed"),
    [
        (torch.float32, 1e-5, True),
        (torch.float32, 0.01, False),
        (torch.bfloat16, 0.02, True),
        (torch.bfloat16, 0.3, False),
    ],
    ids=str,
)
def test_the_gap_that_is_taken_for_rounding_depends_on_the_precision(dtype, gap, agreed, monkeypatch):
    documents, reference, alone = alike(), Reference(tiny.model().to(dtype), "tiny"), branches._alone
    monkeypatch.setattr(branches, "_alone", lambda *given: alone(*given) + np.float32(gap))
    assert branches.agrees(documents, np.arange(len(documents)), reference) is agreed
