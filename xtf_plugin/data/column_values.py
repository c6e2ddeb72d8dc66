"""What a column of the dataset, such as its source, says of each document: a report counts drops for each value.

Hosts drop columns when they tokenise or pack rows, so values are read before that, and found again by document key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .documents import DocumentSet
from .keys import document_key
from .ragged import Bools, Ints

NONE, UNKNOWN = "(no value)", "(not known)"
LONGEST = 100  # characters of a value


class Grouping(NamedTuple):
    """The values of a column by document: `names[codes[i]]` is that of document `i`; codes are (N,)."""

    names: list[str]
    codes: Ints


@dataclass
class Values:
    """The values of a column by document.

    Args:
        column: its name.
        found: the value by the document's key, as text; of a document that stands in rows with different values all of
            these, joined by " + ".
    """

    column: str
    found: dict[bytes, str] = field(default_factory=dict)
    _several: dict[bytes, set[str]] = field(default_factory=dict)

    def add(self, ids: Ints, completion: Bools, value: Any) -> None:
        """Add a document's value; null is `NONE`."""
        self._add(document_key(ids, completion), NONE if value is None else str(value)[:LONGEST])

    def _add(self, key: bytes, *values: str) -> None:
        known = self.found.setdefault(key, values[0])
        several = self._several.get(key, {known}) | set(values)
        if len(several) > 1:
            self._several[key] = several
            self.found[key] = " + ".join(sorted(several))

    def join(self, other: Values) -> None:
        """Add the documents of another dataset."""
        for key, value in other.found.items():
            self._add(key, *other._several.get(key, (value,)))

    def of(self, documents: DocumentSet) -> Grouping:
        """The values of N documents; `UNKNOWN` for one that is not among those that were read."""
        names: dict[str, int] = {}
        labels = (self.found.get(key.tobytes(), UNKNOWN) for key in documents.keys)
        codes = [names.setdefault(label, len(names)) for label in labels]
        return Grouping(list(names), np.asarray(codes, dtype=np.int64))
