"""What is compared: each arm says what a run trains on, as an `xtf:` block or as labels that the laboratory sets.

Selections that a user can write are blocks and go through the product. Three are not the product's: the oracle, which
knows the planted kinds; the control that drops spans of the same lengths at random places; and plain SFT for another
number of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Row
from .noise import is_noise

OFF = {"reasoning_importance": False, "knowledge_novelty": False, "task_relevance": False}
_PAPER = {
    "reasoning_importance": {"layers": "last", "drop": {"fence": 1.0}},
    "knowledge_novelty": {"drop": {"known_above": 0.95}},
    "task_relevance": {"drop": {"cluster": 2, "of": 5}},
}
_QUANTILE = {"reasoning_importance": {"layers": "all", "drop": {"quantile": 0.05}}}


@dataclass(frozen=True)
class Arm:
    """One way to choose what is trained on.

    Args:
        block: an `xtf:` block; None: no block.
        keep: `oracle` or `random_spans`; None: all labels.
        loss: TRL's loss type.
        steps: `kept` (as many trained tokens as the default keeps) or `wall_clock` (as long as the default takes).
        reference: name of the fine-tuned reference that the block's selectors need, see references.py.
    """

    block: Mapping[str, Any] | None = None
    keep: str | None = None
    loss: str = "nll"
    steps: str | None = None
    reference: str | None = None


def _only(*attributes: str, rules: Mapping[str, Any] = _PAPER) -> Arm:
    return Arm({"preset": "paper", **OFF, **{name: rules[name] for name in attributes}})


# Peers protect special tokens as the default does: what they lose by dropping EOS is not what they are compared for.
PEER = {"preset": "paper", **OFF, "protect": {"special_tokens": True}, "min_kept": 1}


def _peer(scorer: str, reference: str | None, share: float = 0.4, **keys: Any) -> Arm:
    return Arm(
        {**PEER, "selectors": {"peer": {"scorer": scorer, "drop": {"quantile": share}, **keys}}}, reference=reference
    )


RI, KN, TR = tuple(OFF)
ARMS: dict[str, Arm] = {
    "plain": Arm(),
    "plain_kept_tokens": Arm(steps="kept"),
    "plain_wall_clock": Arm(steps="wall_clock"),
    "oracle": Arm(keep="oracle"),
    "default": Arm({"preset": "default"}),
    "default, first look": Arm({"selectors": {"out_of_place": {"context": "document"}}}),
    "openings and tokens": Arm(
        {
            "selectors": {
                "out_of_place": {"drop": {"below": -4.5}},
                "odd_tokens": {"scorer": "typicality", "drop": {"below": -10.0}},
            }
        }
    ),
    "random_tokens": Arm({"preset": "default", "control": "random"}),
    "random_spans": Arm(keep="random_spans"),
    "paper": Arm({"preset": "paper"}),
    "official": Arm({"preset": "official"}),
    "RI": _only(RI),
    "KN": _only(KN),
    "TR": _only(TR),
    "RI+KN": _only(RI, KN),
    "RI+TR": _only(RI, TR),
    "KN+TR": _only(KN, TR),
    "RI quantile": _only(RI, rules=_QUANTILE),
    "drop unknown": Arm({**PEER, KN: {"drop": {"unknown_below": 0.05}}}),
    "drop both ends": Arm({**PEER, KN: {"drop": {"unknown_below": 0.05, "known_above": 0.95}}}),
    "DFT loss": Arm(loss="dft"),
    "excess loss (Rho-1)": _peer("excess_loss", "clean"),
    "token cleaning, fixed": _peer("token_cleaning", "warm_up"),
}


def random_spans(keep: NDArray[np.bool_], rows: Sequence[Row], seed: int) -> NDArray[np.bool_]:
    """As many dropped runs of the same lengths in each document as in `keep`, at random places."""
    rng, result, at = np.random.default_rng(seed), np.ones(len(keep), dtype=bool), 0
    for row in rows:
        size = len(row.completion)
        dropped = np.concatenate([[0], ~keep[at : at + size], [0]]).astype(int)
        edges = np.flatnonzero(np.diff(dropped))
        lengths = (edges[1::2] - edges[::2]).tolist()
        if dropped[-2]:  # EOS is protected in every arm; a run that ends there is none of the default's
            raise ValueError("a dropped run holds EOS")
        free = size - 1 - sum(lengths)
        cuts = np.sort(rng.choice(free + len(lengths), len(lengths), replace=False))  # every placement equally likely
        gaps = np.diff(cuts, prepend=-1) - 1  # kept tokens before each run
        place = at
        for gap, length in zip(gaps, rng.permutation(lengths), strict=True):
            place += int(gap)
            result[place : place + int(length)] = False
            place += int(length)
        at += size
    return result


def oracle(rows: Sequence[Row]) -> NDArray[np.bool_]:
    """Keep exactly what was not planted, (M,)."""
    return np.asarray([not is_noise(kind) for row in rows for kind in row.kinds])


def definition(name: str) -> str:
    """What an arm is, in full: a result is only as good as the rules it was got with, and presets change."""
    from xtf_plugin import XTFConfig

    def block_of(arm: Arm) -> Any:
        if arm.block is None:
            return None
        config = XTFConfig.parse(with_reference(arm, "reference").block if arm.reference else arm.block)
        return None if config is None else config.to_dict()

    arm = ARMS[name]
    relative = arm.keep == "random_spans" or arm.steps is not None  # they are made to match the default
    parts = [
        block_of(arm),
        arm.keep,
        arm.loss,
        arm.steps,
        arm.reference,
        block_of(ARMS["default"]) if relative else None,
    ]
    return hashlib.sha1(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def with_reference(arm: Arm, path: str) -> Arm:
    """The arm with the path of its reference model in every selector that asks for one."""
    assert arm.block is not None
    selectors = {
        name: {**options, "reference": {"model": path, "quantization": "none"}}
        for name, options in arm.block.get("selectors", {}).items()
    }
    return replace(arm, block={**arm.block, "selectors": selectors})
