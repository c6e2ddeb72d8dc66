"""Every score and every rule whose detection of planted noise is measured, each as an `xtf:` block."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .arms import OFF

RI, KN, TR = tuple(OFF)
EXPERT_WORDS = str(Path(__file__).parents[3] / "recipes" / "domains" / "math.txt")
ANY = {"quantile": 0.5}  # a rule is needed, the score alone is looked at


def attribute(name: str, **keys: Any) -> dict[str, Any]:
    """A block with one attribute."""
    return {"preset": "paper", **OFF, name: keys or True}


def selector(**keys: Any) -> dict[str, Any]:
    """A block with one selector, called `score`."""
    return {"preset": "paper", **OFF, "selectors": {"score": {"drop": ANY, **keys}}}


def over(span: int | str) -> dict[str, Any]:
    """The key that averages scores over so many tokens, or over a unit."""
    return {"window": span} if isinstance(span, int) else {"unit": span}


def _scores() -> dict[str, dict[str, Any]]:
    """Every score of the comparison, as a block with one score; low scores count as noise."""
    found: dict[str, dict[str, Any]] = {}
    for layers in ("first", "middle", "last", "all"):
        found[f"attention received, {layers}"] = attribute(RI, layers=layers)
    for span in (5, 9, 15, "sentence", "line"):
        found[f"attention received, all, {span}"] = attribute(RI, layers="all", **over(span))
    found["relevance to the dataset"] = attribute(TR)
    found["relevance to the dataset, output"] = attribute(TR, embedding="output")
    found["relevance to expert words, mathematics"] = attribute(TR, domain=EXPERT_WORDS)
    for span in (9, "sentence", "line"):
        found[f"relevance to the dataset, {span}"] = attribute(TR, **over(span))
    for span in (1, 5, 9, 15, "sentence", "line"):
        found[f"log-probability, {span}"] = selector(scorer="log_probability", **over(span))
    for span in (1, 9, "sentence", "line"):
        found[f"typicality, {span}"] = selector(scorer="typicality", **over(span))
    for unit in ("sentence", "line"):
        for clip in (2.0, 4.0, 8.0, 16.0):
            found[f"opening, {unit}, clip {clip:g}"] = selector(scorer="opening", unit=unit, clip=clip)
    found["opening, both, clip 8"] = selector(scorer="opening", unit="both")
    found[DEFAULT] = {"preset": "default"}
    return found


DEFAULT = "the default's: opening, both, behind what is kept"
SCORES = _scores()


def _rules() -> dict[str, dict[str, Any]]:
    """Rules to compare, each a whole block; special tokens are protected in all of them."""
    paper = {"preset": "paper", "protect": {"special_tokens": True}, "min_kept": 1}
    none = {**paper, **OFF}
    found: dict[str, dict[str, Any]] = {
        "paper, Eq. (1)": paper,
        "official": {"preset": "official", "protect": {"special_tokens": True}, "min_kept": 1},
        "default": {"preset": "default"},
    }
    for layers in ("first", "middle", "last", "all"):
        found[f"RI, Eq. (5), {layers}"] = {**none, RI: {"layers": layers, "drop": {"fence": 1.0}}}
    found["RI, Eq. (5), all, log scale"] = {**none, RI: {"layers": "all", "scale": "log", "drop": {"fence": 1.0}}}
    found["RI, lowest 5%, all, of the dataset"] = {
        **none,
        RI: {"layers": "all", "drop": {"quantile": 0.05}, "scope": "dataset"},
    }
    for share in (0.05, 0.2):
        found[f"RI, lowest {share:.0%}, all"] = {**none, RI: {"layers": "all", "drop": {"quantile": share}}}
    found["KN, Eq. (6), P > 0.95"] = {**none, KN: {"drop": {"known_above": 0.95}}}
    for bound in (0.05, 0.01):
        found[f"KN, P < {bound}"] = {**none, KN: {"drop": {"unknown_below": bound}}}
    for of in (2, 3, 4, 5, 6):
        for cluster in (1, 2):
            found[f"TR, class {cluster} of {of}"] = {**none, TR: {"drop": {"cluster": cluster, "of": of}}}
    found["TR, lowest 20%, line"] = {**none, TR: {"drop": {"quantile": 0.2}, "unit": "line"}}

    def one(**keys: Any) -> dict[str, Any]:
        return {**none, "selectors": {"score": keys}}

    for unit in ("sentence", "line"):
        found[f"log-probability, lowest 20%, {unit}"] = one(scorer="log_probability", unit=unit, drop={"quantile": 0.2})
    for limit in (-4.0, -6.0, -8.0, -10.0, -12.0):
        found[f"typicality below {limit:g}"] = one(scorer="typicality", drop={"below": limit})
    for limit in (-3.0, -3.5, -4.0, -4.5, -5.0):
        drop = {"below": limit}
        for unit in ("sentence", "line", "both"):
            found[f"opening, {unit}, below {limit:g}"] = one(scorer="opening", unit=unit, drop=drop)
        kept = one(scorer="opening", unit="both", context="kept", drop=drop)
        found[f"opening, both, behind what is kept, below {limit:g}"] = kept
    return found


RULES = _rules()


def digest() -> str:
    """Of all blocks in full: what was measured with other ones is measured again, also when a preset has changed."""
    from xtf_plugin import XTFConfig

    blocks = []
    for block in (*SCORES.values(), *RULES.values()):
        config = XTFConfig.parse(block)
        assert config is not None
        blocks.append(json.dumps(config.to_dict()).replace(EXPERT_WORDS, "expert words"))
    return hashlib.sha1("\n".join([*SCORES, *RULES, *blocks]).encode()).hexdigest()[:12]
