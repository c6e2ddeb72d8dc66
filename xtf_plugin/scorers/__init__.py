"""What a package needs to bring a token-selection method of its own; imports no torch. See docs/selectors.md."""

from __future__ import annotations

from ..config_rules import ReferenceConfig
from .base import Scorer, ScoringContext, SelectorConfig, SelectorDrop

__all__ = ["ReferenceConfig", "Scorer", "ScoringContext", "SelectorConfig", "SelectorDrop"]
