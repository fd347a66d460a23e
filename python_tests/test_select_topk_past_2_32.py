"""select_topk on one array of more than 2^32 scores. Slow: about 9 GB and a few minutes."""

from __future__ import annotations

import pytest
import torch

from piece_ops.functional import select_topk
from piece_ops.reference import check_topk

from helpers.cases import BF16

N = 2**32 + 2**20 + 77
CHUNK = 2**26


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["auto", "radix"])
def test_more_than_2_to_the_32_scores(algorithm: str) -> None:
    """Planted: 1000 known largest on both sides of 2^32, and a tie class across the border.

    The check is independent of the op: counting in chunks, never a sort, and the positions of
    what was planted.
    """
    scores = torch.empty(N, dtype=BF16)  # 8.6 GB
    g = torch.Generator().manual_seed(1)
    block = torch.rand(CHUNK, generator=g).to(BF16)  # values in [0, 1], thousands of ties each
    for start in range(0, N, CHUNK):
        part = scores[start : start + CHUNK]
        part.copy_(block[: part.numel()])
    border = 2**32
    largest = torch.cat([torch.arange(500) * 7_654_321, border + 7 + torch.arange(500) * 2003])
    scores[largest] = 100.0
    ties = torch.cat([border - 3000 + 3 * torch.arange(1000), border + 5000 + torch.arange(1000)])
    scores[ties] = 50.0

    # 1. Only planted values, the threshold inside the tie class and past the border.
    top = select_topk(scores, 1000 + 1500, algorithm=algorithm)
    assert top.threshold == 50.0 and top.ties_kept == 1500
    want = torch.cat([largest, ties[:1500]]).sort().values
    assert torch.equal(top.indices, want)

    # 2. 0.1 %: the threshold lies among millions of natural ties.
    k = N // 1000
    top = select_topk(scores, k, algorithm=algorithm)
    wrong = check_topk([scores], [top.indices], k, chunk=CHUNK)
    assert wrong is None, wrong
    print(
        f"n = {N}, k = {k}: threshold {top.threshold}, {top.ties_kept} ties kept, "
        f"last position {int(top.indices[-1])} ({algorithm})"
    )
