"""Compares two adapters of the demo: what they learnt of the good text of held-out answers, and of the noise in them.

    python recipes/demo/compare.py .demo .demo/plain .demo/run

Both were trained on the same rows, the first by plain SFT. The test rows hold noise, and the demo knows where. A lower
loss on the noise means that a model is readier to write it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from judge import GOOD, kind_of

Row = dict[str, Any]
NEW_TOKENS, ANSWERED = 48, 3  # tokens of an answer, and questions


def rows_of(demo: Path) -> list[Row]:
    """`prompt` and `completion` of the test rows, and where their `noise` is."""
    data, noise = (
        [json.loads(line) for line in (demo / name).read_text(encoding="utf-8").splitlines()]
        for name in ("data/test.jsonl", "noise.test.jsonl")
    )
    return [
        {"prompt": row["prompt"], "completion": row["completion"][0]["content"], "noise": spans["noise"]}
        for row, spans in zip(data, noise, strict=True)
    ]


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss of the tokens of good text and of noise, in nats."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        prompt = asked(tokenizer, row["prompt"])
        answer = tokenizer(row["completion"], add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([prompt + answer["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        each = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").tolist()
        for span, loss in zip(answer["offset_mapping"], each, strict=True):
            found[kind_of(span, row["noise"]) == GOOD].append(loss)
    good, noise = (sum(part) / len(part) for part in (found[True], found[False]))
    return good, noise


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """How a model's most probable answers begin."""
    texts = []
    for row in rows:
        ids = torch.tensor([asked(tokenizer, row["prompt"])])
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id}
        made = model.generate(input_ids=ids, **given, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def asked(tokenizer: Any, prompt: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt."""
    given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(given["input_ids"])


def report(rows: Sequence[Row], found: dict[str, tuple[tuple[float, float], list[str]]]) -> str:
    """The comparison for people; `found` has losses and answers of each arm."""
    lines = [f"Loss on {len(rows)} held-out answers, which hold noise:", f"{'':14}{'good text':>10}{'noise':>8}"]
    lines += [f"{name:14}{good:10.3f}{noise:8.3f}" for name, ((good, noise), _) in found.items()]
    for at in range(len(next(iter(found.values()))[1])):
        lines.append(f"asked: {rows[at]['prompt'][-1]['content']!r}")
        lines += [f"  {name}: {texts[at]!r}" for name, (_, texts) in found.items()]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Parse the command line and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demo", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("plain", type=Path, help="the adapter of plain SFT")
    parser.add_argument("filtered", type=Path, help="the adapter of the run with XTF")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct", help="their base (%(default)s)")
    options = parser.parse_args(given)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, rows, found = AutoTokenizer.from_pretrained(options.model), rows_of(options.demo), {}
    for name, folder in (("plain SFT", options.plain), ("with XTF", options.filtered)):
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, folder).eval()
        found[name] = losses(model, tokenizer, rows), answers(model, tokenizer, rows[:ANSWERED])
    print(report(rows, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
