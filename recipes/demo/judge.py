"""Counts how much of the demo's planted noise a run dropped, and how many good tokens it lost.

    python recipes/demo/judge.py .demo .demo/run/xtf/scores.parquet

The demo knows where its noise is (noise.train.jsonl) and the score table knows what was dropped. Documents are matched
by their token ids, so the order of the rows does not matter. A token is noise if more than half of its characters are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOOD = "good"
EXAMPLES = 5  # pieces of good text that are printed, kept and lost
LINE = range(40, 110)  # characters of a kept line that is printed
MOST_AFTER = 4  # tokens of a completion behind its text: the end of the turn, and what the template puts behind it


class JudgeError(Exception):
    """The table cannot be judged; the message says why."""


@dataclass
class Counts:
    """Completion tokens by kind (`good` or a kind of noise): all of them, those that were dropped, and their text.

    `kept` are lines of good text that are trained on.
    """

    tokens: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    texts: dict[str, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def report(self) -> str:
        """The counts as a table for people."""
        kinds = sorted(set(self.tokens) - {GOOD})
        noise = sum(self.tokens[kind] for kind in kinds), sum(self.dropped[kind] for kind in kinds)
        rows = [(kind, self.tokens[kind], self.dropped[kind]) for kind in kinds]
        rows += [("all noise", *noise), ("good tokens", self.tokens[GOOD], self.dropped[GOOD])]
        text = [f"{'':15}{'tokens':>8}{'dropped':>9}{'share':>8}"]
        text += [f"{kind:15}{all_:8,}{gone:9,}{gone / all_ if all_ else 0.0:8.1%}" for kind, all_, gone in rows]
        total = noise[1] + self.dropped[GOOD]
        for kind in kinds:  # one of each
            text += [f"dropped, {kind}: {one}" for one in longest(self.texts.get(kind, []), 1)]
        text += [f"kept: {one}" for one in longest(self.kept, EXAMPLES)]
        text += [f"good, and lost: {one}" for one in longest(self.texts.get(GOOD, []), EXAMPLES)]
        if total:
            text.append(f"Of the {total:,} dropped tokens {noise[1]:,} are noise ({noise[1] / total:.1%}).")
        else:
            text.append("Nothing was dropped: this run trained on all of the noise, as plain SFT does.")
        return "\n".join(text)


def longest(texts: Iterable[str], number: int) -> list[str]:
    """The longest of some texts, each once."""
    return sorted(dict.fromkeys(texts), key=len, reverse=True)[:number]


def judge(tokenizer: Any, rows: Iterable[dict[str, Any]], documents: Iterable[dict[str, Sequence[Any]]]) -> Counts:
    """Count the tokens of all documents by kind.

    Args:
        tokenizer: the one of the run; it must give offsets.
        rows: `completion` (text) and `noise` (its spans) of each row of the data.
        documents: `token_id` and `kept` of the completion tokens of each row of the score table.

    Raises:
        JudgeError: a document is not a row of the data.
    """
    known = {}
    for row in rows:
        encoded = tokenizer(row["completion"], add_special_tokens=False, return_offsets_mapping=True)
        known[tuple(encoded["input_ids"])] = [kind_of(span, row["noise"]) for span in encoded["offset_mapping"]]
    counts = Counts()
    for document in documents:
        ids = tuple(document["token_id"])
        lengths = range(len(ids), max(0, len(ids) - MOST_AFTER) - 1, -1)
        kinds = next((known[ids[:length]] for length in lengths if ids[:length] in known), None)
        if kinds is None:
            raise JudgeError(f"no row of the data has this completion: {tokenizer.decode(ids[:30])!r} ...")
        kinds = kinds + [GOOD] * (len(ids) - len(kinds))
        counts.tokens.update(kinds)
        counts.dropped.update(kind for kind, kept in zip(kinds, document["kept"], strict=True) if not kept)
        places = list(zip(kinds, document["kept"], strict=True))
        for (kind, kept), run in itertools.groupby(range(len(ids)), key=places.__getitem__):
            text = tokenizer.decode([ids[at] for at in run], skip_special_tokens=kept).strip()
            if not kept:
                counts.texts.setdefault(kind, []).append(repr(text))
            elif kind == GOOD:
                counts.kept += [repr(line) for line in text.splitlines() if len(line) in LINE]
    return counts


def kind_of(token: tuple[int, int], noise: Iterable[tuple[int, int, str]]) -> str:
    """The kind of noise that most characters of a token belong to, or `good`."""
    start, end = token
    for first, last, kind in noise:
        if 2 * (min(end, last) - max(start, first)) > end - start:
            return kind
    return GOOD


def read_rows(demo: Path) -> list[dict[str, Any]]:
    """`completion` and `noise` of the train rows that prepare.py wrote."""
    data, noise = (
        [json.loads(line) for line in (demo / name).read_text(encoding="utf-8").splitlines()]
        for name in ("data/train.jsonl", "noise.train.jsonl")
    )
    pairs = zip(data, noise, strict=True)
    return [{"completion": row["completion"][0]["content"], "noise": spans["noise"]} for row, spans in pairs]


def read_documents(path: Path) -> list[dict[str, Sequence[Any]]]:
    """`token_id` and `kept` of every row of a score table, in the order of the tokens."""
    import pyarrow.parquet as pq

    columns = pq.read_table(path, columns=["row", "position", "token_id", "kept"]).to_pydict()
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for row, *token in zip(*(columns[name] for name in ("row", "position", "token_id", "kept")), strict=True):
        found.setdefault(row, []).append(tuple(token))
    tokens = [sorted(found[row]) for row in sorted(found)]
    return [{"token_id": [t[1] for t in row], "kept": [t[2] for t in row]} for row in tokens]


def main(given: Sequence[str] | None = None) -> int:
    """Parse the command line and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demo", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("scores", type=Path, help="the score table of the run")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct", help="its tokenizer is used (%(default)s)")
    options = parser.parse_args(given)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        print(judge(tokenizer, read_rows(options.demo), read_documents(options.scores)).report())
    except (JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
