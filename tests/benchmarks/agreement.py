"""Compare `xtf score` on real text with an independent eager float32 computation, token by token.

    python -m tests.benchmarks.agreement [DATA.jsonl --prompt question --completion answer] [-n 200] [--model PATH]

Writes the rows as prompt-completion data (without a file, generated word problems), runs `xtf score`, recomputes
attention received from transformers' eager maps and log-probabilities from full logits (`tests/eager.py`), and prints
the largest differences. Exit code 1: a token differs by more than the limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import eager, tiny
from tests.benchmarks import reach
from tests.benchmarks.common import arguments, publish

HEAD = ["attribute", "completion tokens", "largest difference", "reach"]


def score(folder: Path, model: str, rows: list[dict[str, str]]) -> Path:
    tiny.save_rows(folder / "data/train.jsonl", rows)
    recipe = {
        "model_name_or_path": model,
        "dataset_name": str(folder / "data"),
        "max_length": 2048,
        "bf16": False,
        "dtype": "float32",
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(folder / "out"),
        "xtf": {
            "reasoning_importance": True,
            "knowledge_novelty": True,
            "cache_dir": str(folder / "cache"),
            "report": False,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    output = folder / "scores.parquet"
    command = [Path(sys.executable).parent / "xtf", "score", path, "--output", output]
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return output


def compare(output: Path, model: str, rows: list[dict[str, str]]) -> dict[str, float]:
    network = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = pq.read_table(output, columns=["row", "position", "token_id", "knowledge_novelty", "reasoning_importance"])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    worst = {"knowledge_novelty": 0.0, "reasoning_importance": 0.0}
    for index, row in enumerate(rows):
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        logprobs, received = eager.scores(network, ids, range(network.config.num_hidden_layers))
        here = columns["row"] == index
        at = columns["position"][here]
        assert columns["token_id"][here].tolist() == [ids[p] for p in at], f"row {index}: other tokens"
        truth = {"knowledge_novelty": -np.expm1(logprobs[at].numpy()), "reasoning_importance": received[at].numpy()}
        for name, values in truth.items():
            ours = columns[name][here]
            assert np.array_equal(np.isnan(ours), np.isnan(values)), f"row {index}: other tokens are undefined"
            worst[name] = max(worst[name], float(np.nanmax(np.abs(ours - values), initial=0.0)))
    return {**worst, "tokens": float(table.num_rows)}


def read(path: Path, prompt: str, completion: str, count: int) -> list[dict[str, str]]:
    """The first rows of a file with a JSON object a line."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:count])
    return [{"prompt": row[prompt] + "\n", "completion": row[completion]} for row in rows]


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("data", type=Path, nargs="?", help="default: made-up word problems")
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--model", help="default: a tiny random Llama")
    options = parser.parse_args(given)
    count = 4 if options.smoke else options.n
    rows = tiny.problems(count)
    if options.data is not None:
        rows = read(options.data, options.prompt, options.completion, count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(tiny.save_base(folder / "base", max_position_embeddings=2048))
        worst = compare(score(folder, model, rows), model, rows)
    tokens = worst.pop("tokens")
    table = [
        [name.replace("_", " "), f"{tokens:,.0f}", f"{gap:.1e}", reach.EXACT.judge(gap)] for name, gap in worst.items()
    ]
    what = "made-up word problems" if options.data is None else options.data.name
    publish("agreement", f"{len(rows)} rows of {what}, float32, all layers", HEAD, table, options.write)
    return int(max(worst.values()) > reach.EXACT.limit)


if __name__ == "__main__":
    sys.exit(main())
