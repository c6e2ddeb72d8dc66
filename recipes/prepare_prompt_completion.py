r"""Writes any data set as `prompt` and `completion` JSON Lines, the two columns `trl sft` looks for.

    python recipes/prepare_prompt_completion.py openai/gsm8k --config main \
        --prompt question --completion answer --template "Question: {prompt}\nAnswer:" --output data/gsm8k

TRL's recipes can choose columns but not rename them. Sources are hub ids and local folders or files, whatever
`datasets.load_dataset` takes. Several prompt columns are joined by a blank line; empty ones are left out. Rows without
a prompt or a completion are left out and counted. A source without a test split can have `--test-rows` set aside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def convert(row: Mapping[str, Any], prompt: Sequence[str], completion: str, template: str) -> dict[str, str] | None:
    """One source row as prompt and completion; None when either has no text.

    The completion starts with one space where the prompt does not end in white space: tokenizers then cut the joined
    text at the same place, which TRL checks and warns about otherwise.
    """
    parts = [str(row[name]).strip() for name in prompt if row[name] is not None]
    question = "\n\n".join(part for part in parts if part)
    answer = "" if row[completion] is None else str(row[completion]).strip()
    if not question or not answer:
        return None
    text = template.replace("{prompt}", question)
    return {"prompt": text, "completion": answer if text[-1].isspace() else " " + answer}


def write_split(rows: Iterable[Mapping[str, Any]], path: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Write one split; returns how many rows were written and how many were left out."""
    written = skipped = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            line = convert(row, args.prompt, args.completion, args.template)
            if line is None:
                skipped += 1
                continue
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
    return written, skipped


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the escapes of `--template` resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="hub id, or a local folder or file of JSON, CSV or Parquet")
    parser.add_argument("--config", help="the data set's configuration, where it has several")
    parser.add_argument("--prompt", nargs="+", required=True, help="column or columns of the question")
    parser.add_argument("--completion", required=True, help="column of the answer")
    parser.add_argument(
        "--template", default="{prompt}", help=r"text around the question; \n is a line break (%(default)s)"
    )
    parser.add_argument("--test-rows", type=int, default=0, help="rows to set aside when there is no test split")
    parser.add_argument("--seed", type=int, default=0, help="which rows are set aside (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl, test.jsonl, …")
    args = parser.parse_args(arguments)
    args.template = args.template.replace("\\n", "\n")
    if "{prompt}" not in args.template:
        parser.error(f"--template {args.template!r} does not contain {{prompt}}")
    return args


def load(args: argparse.Namespace) -> Mapping[str, Any]:
    """All splits of the source, with a test split set aside if asked for and missing."""
    from datasets import DatasetDict, load_dataset

    path = Path(args.source)
    if path.is_file():
        builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
        if builder is None:
            raise SystemExit(f"{path}: unknown ending; use .json, .jsonl, .csv or .parquet")
        splits = load_dataset(builder, data_files={"train": str(path)})
    else:
        splits = load_dataset(args.source, args.config)
    if args.test_rows and "test" not in splits:
        halves = splits["train"].train_test_split(test_size=args.test_rows, seed=args.seed)
        splits = DatasetDict({**splits, "train": halves["train"], "test": halves["test"]})
    return splits


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert every split of the source to `<output>/<split>.jsonl`."""
    args = parse(arguments)
    splits = load(args)
    for name, rows in splits.items():
        missing = [column for column in (*args.prompt, args.completion) if column not in rows.column_names]
        if missing:
            raise SystemExit(f"{args.source} [{name}] has no column {missing}; it has {sorted(rows.column_names)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        written, skipped = write_split(rows, args.output / f"{name}.jsonl", args)
        note = f", {skipped} without a prompt or a completion left out" if skipped else ""
        print(f"{args.output / f'{name}.jsonl'}: {written} rows{note}")


if __name__ == "__main__":
    main()
