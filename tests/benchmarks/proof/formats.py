"""Answers in a format: does a model that is trained on filtered answers still write the format?

Word problems are put into three formats that recur in every row. Noise is planted in the text inside, so that a filter
that takes the format for noise, or the noise for format, shows.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import noise
from .texts import GOOD, Example, gsm8k

LONGEST = 220  # characters of a clean solution, so that a sampled answer has room to end


@dataclass(frozen=True)
class Format:
    """A way to write an answer.

    Args:
        ask: what the prompt says of it.
        around: the text before and after a solution, of its result.
        inside: how a piece of the solution is written.
        holds: whether a text is an answer in this format.
    """

    ask: str
    around: Callable[[str], tuple[str, str]]
    inside: Callable[[str], str]
    holds: Callable[[str], bool]


def _think(result: str) -> tuple[str, str]:
    return "<think>\n", f"\n</think>\n\nThe answer is {result}."


def _call(result: str) -> tuple[str, str]:
    call = json.dumps({"name": "submit_answer", "arguments": {"value": result}})
    return "", f"\n<tool_call>\n{call}\n</tool_call>"


def _object(result: str) -> tuple[str, str]:
    return '{"reasoning": "', f'", "answer": "{result}"}}'


def _holds_call(text: str) -> bool:
    found = re.search(r"\n<tool_call>\n(.*)\n</tool_call>\Z", text.rstrip())
    call = _parsed(found[1]) if found else None
    return isinstance(call, dict) and call.get("name") == "submit_answer" and "value" in call.get("arguments", ())


def _holds_object(text: str) -> bool:
    found = _parsed(text)
    return isinstance(found, dict) and found.keys() == {"reasoning", "answer"}


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


FORMATS = {
    "think": Format(
        "Think first.",
        _think,
        str,
        lambda text: bool(re.match(r"<think>\n.*\n</think>\n\nThe answer is \S+\.\s*\Z", text, re.DOTALL)),
    ),
    "tool calls": Format("Submit the answer with the tool.", _call, str, _holds_call),
    "JSON": Format("Answer in JSON.", _object, lambda text: json.dumps(text, ensure_ascii=False)[1:-1], _holds_object),
}


def split(
    name: str, data: Path, rows: int, held_out: int, rate: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Rows of a format to train on, with noise in them, and clean ones that are held out."""
    every = [one for one in map(_solved, gsm8k(data)) if len(one.completion) <= LONGEST]
    random.Random(f"{name} {seed}").shuffle(every)
    chosen, others = every[: rows + held_out], every[rows + held_out :]
    rng = random.Random(f"{name} {seed} {rate}")
    train = [noise.plant(one, others, rate, rng) if rate else one for one in map(_bare, chosen[:rows])]
    return (
        [put(one, clean, FORMATS[name]) for one, clean in zip(train, chosen[:rows], strict=True)],
        [put(_bare(one), one, FORMATS[name]) for one in chosen[rows:]],
    )


def _solved(example: Example) -> Example:
    """Without the marks of a calculator."""
    return replace(example, pieces=((re.sub(r"<<.*?>>", "", example.completion), GOOD),))


def _bare(example: Example) -> Example:
    """The solution without the line of its result."""
    return replace(example, pieces=((example.completion.split("\n####")[0], GOOD),))


def put(solution: Example, solved: Example, form: Format) -> Example:
    """A solution, which may hold noise, in a format."""
    before, behind = form.around(solved.completion.split("####")[1].strip())
    pieces: Sequence[tuple[str, str]] = [(form.inside(text), kind) for text, kind in solution.pieces]
    around = [(before, GOOD)] if before else []
    prompt = solution.prompt.replace("\nAnswer:\n", f"\n{form.ask}\nAnswer:\n")
    return Example(prompt, (*around, *pieces, (behind, GOOD)))
