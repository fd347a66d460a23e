"""``make bench-cuda``: every op on a GPU beside its peers; DRY=1 lists the cases without one.

Each case names the bytes that the op must move and those that ours moves, what both take on one
H200 (4.3 TB/s read, 4.0 TB/s read and write), and what it is held to. With a GPU, peers are timed
as ``bench.cuda_timing`` says; ends with 0 unless an answer was wrong or a call of ours failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import cuda_lists, cuda_others, cuda_select_topk, cuda_step, cuda_sweep
from bench.cuda_timing import Plan, run_plans


def plans() -> Iterator[Plan]:
    """All cases: those that the backend is held to first, in case the time ends."""
    yield from cuda_lists.plans()
    yield from cuda_select_topk.plans()
    yield from cuda_others.plans()
    yield from cuda_step.plans()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument("--sweep", action="store_true", help="constants to choose, not the cases")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose first line contains this text")
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no case after these")
    parser.add_argument("--out", type=Path, help="JSON lines are written here")
    args = parser.parse_args(argv)
    chosen = [
        plan
        for plan in (cuda_sweep.plans if args.sweep else plans)()
        if args.only in f"{plan.op}: {plan.name}"
    ]
    if args.dry:
        print(*chosen, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print(
            "bench.cuda: wanted a CUDA device, got none; --dry (make bench-cuda DRY=1) lists cases"
        )
        return 2
    return run_plans(chosen, repeats=args.repeats, out=args.out, seconds=args.seconds)


if __name__ == "__main__":
    sys.exit(main())
