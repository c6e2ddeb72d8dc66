"""What is measured: the settings of detection and the runs of each table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .arms import ARMS
from .data import SMALL
from .runs import Job

MAIN = "facts"  # all arms run here: its runs are short, and its training data holds facts that the base does not know
OTHERS = ("sums", "programs")
MAIN_RATE = 0.25

# (world, base model, noise rate) of the detection tables.
SETTINGS: tuple[tuple[str, str, float], ...] = (
    ("sums", "sums", 0.25),
    ("programs", "programs", 0.25),
    ("facts", "facts", 0.25),
    ("sums", "both", 0.25),
    ("sums", "programs", 0.25),
    ("sums", "no_chatter", 0.25),
    ("sums", SMALL, 0.25),
    *((world, world, rate) for world in (MAIN, *OTHERS) for rate in (0.0, 0.1, 0.4)),
)

_CORE = (
    *("plain", "default", "default, first look", "openings and tokens", "random_tokens", "oracle"),
    *("paper", "DFT loss", "drop unknown", "excess loss (Rho-1)"),
)
_BRIEF = ("plain", "default", "openings and tokens", "oracle")


def _group(name: str) -> list[Job]:
    """The runs of one table at seed 0."""
    if name == "arms":
        return [Job(name, MAIN, arm, 0, MAIN_RATE, MAIN) for arm in ARMS]
    if name == "rates":
        # without noise the oracle is plain SFT, and so is the control of a rule that drops nothing
        arms_of = {0.0: _BRIEF[:-1], 0.1: ("plain", "default", "oracle"), 0.4: (*_BRIEF, "random_tokens")}
        return [Job(name, MAIN, arm, 0, rate, MAIN) for rate, arms in arms_of.items() for arm in arms]
    if name == "worlds":
        noisy = [Job(name, world, arm, 0, MAIN_RATE, world) for world in OTHERS for arm in _CORE]
        return noisy + [Job(name, world, arm, 0, 0.0, world) for world in OTHERS for arm in _BRIEF[:-1]]
    if name == "repeating":
        arms = ("plain", "default", "oracle")
        return [Job(name, MAIN, arm, 0, MAIN_RATE, MAIN, forms=("repeating",)) for arm in arms]
    if name == "qlora":
        return [Job(name, MAIN, arm, 0, MAIN_RATE, MAIN, method="qlora") for arm in _BRIEF]
    assert name == "bases", name
    # with a base of another world nothing is learnt from so few rows: detection shows enough of it
    return [Job(name, "sums", arm, 0, MAIN_RATE, "both") for arm in _BRIEF]


GROUPS = ("arms", "worlds", "rates", "repeating", "qlora", "bases")


def jobs(groups: Sequence[str], seeds: int) -> list[Job]:
    """All runs of some groups, seed by seed, so that what is done first is a whole table."""
    found = [job for name in groups for job in _group(name)]
    return [replace(job, seed=seed) for seed in range(seeds) for job in found]
