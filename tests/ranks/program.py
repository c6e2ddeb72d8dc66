"""Started on every rank by torchrun: runs the cases and writes what this rank found, for tests/scoring/test_distributed.py to judge.

One launch for all cases: importing torch and transformers twice costs more than the cases do.
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
