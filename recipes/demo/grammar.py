"""Random text from slots: the one helper behind every template of the demo.

A template names its slots in square brackets, `"[yes] [happy]"`; each slot is filled with one of the options its rule
lists, which may hold slots themselves. A few dozen short rules therefore give thousands of different sentences, as
people's data has, where a plain list of sentences would repeat and be learnt by heart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_SLOT = re.compile(r"\[(\w+)\]")

Rules = Mapping[str, Sequence[str]]


def expand(template: str, rules: Rules, rng: random.Random) -> str:
    """Fill every `[slot]` of `template` with a random option of `rules["slot"]`, recursively.

    Raises:
        KeyError: a slot has no rule; a template with a typo must not reach the data.
    """
    while match := _SLOT.search(template):
        template = template[: match.start()] + rng.choice(rules[match[1]]) + template[match.end() :]
    return template


def sentence(text: str) -> str:
    """`text` with its first letter in upper case; the rest is left alone (`str.capitalize` would lower names)."""
    return text[:1].upper() + text[1:]
