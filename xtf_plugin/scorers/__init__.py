"""Scorers: one file each; read `base.py` first, then `log_probability.py`.

What a package needs to bring a scorer of its own is named here; imports no torch. See docs/own-scorer.md.
"""

from __future__ import annotations

from ..fields import Drop, ReferenceConfig
from .base import ScoreConfig, Scorer, ScoringContext, scorer

__all__ = ["Drop", "ReferenceConfig", "ScoreConfig", "Scorer", "ScoringContext", "scorer"]
