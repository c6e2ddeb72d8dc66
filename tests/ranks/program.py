"""Runs the cases on every rank, started by torchrun, and writes the results for tests/scoring/test_distributed.py.

One launch runs all cases, since importing torch and transformers takes longer than the cases.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import plans, scoring
from tests.ranks.common import CASES, ENDING
from xtf_plugin.scoring.distributed import Ranks

assert CASES and plans and scoring  # importing them fills the list


def main() -> None:
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
    else:
        ranks = Ranks()
    torch.set_num_threads(1)
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else list(CASES)
    found = {}
    for name in names:
        found[name] = (CASES | ENDING)[name](ranks, folder / name)
        (folder / f"rank-{ranks.rank}-of-{ranks.size}.json").write_text(json.dumps(found))
    if ranks.size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
