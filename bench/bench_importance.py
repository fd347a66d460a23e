"""Per-sample importance of SmolLM2-135M: one batched pass, against a plain backward; a budget.

8 rows of 64 tokens of real text, piece-f, embeddings no candidates. Bytes: the candidates' weights,
read forward and backward, and their accumulators, read and written.

With a memory budget of a tenth of the accumulators, `estimate` (piece-s, 4 rows of 64 tokens) goes
over its batches once for each group of parameters, or once in all if there is but one batch; a pass
should cost what the one over all parameters costs, and the selection must be the same. Where the
embedding (28.3 M, also the output head) is a candidate too, it exceeds the budget and goes by rows.

Everybody gets `ROUNDS` timed calls after a first one (batches one more to warm up), but for
estimates of many passes, which take longer than `SECONDS` and are called once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piece_ops
from bench.harness import Absent, Case, Peer, Row, Target, time_ratio
from bench.smollm2 import absent_case, case_name, load, token_ids
from piece_ops.importance import Importance
from piece_ops.importance.budget import groups_within, needs_of

OURS, LOOP, PLAIN = "piece_ops, one batched pass", "loop over rows, hooks", "forward + backward"
ROUNDED = "selection by bfloat16 accumulators"
WHOLE, BOUNDED = "estimate, all accumulators", "estimate, a tenth of them"
SECONDS, ROUNDS = 2.5, 2  # with one, the first and cold call would be the result
COLD = 10.0  # of a batch's first call, which may take twice as long as the others


def importance(quick: bool, dtype: torch.dtype, size: tuple[int, int]) -> Case:
    try:
        model = load(quick, dtype).eval()
    except Absent as error:
        return absent_case("importance", dtype, OURS, error)
    ids = token_ids(quick, *size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batched = Importance(model, "piece-f")
    loop = Importance(model, "piece-f", per_sample="loop")
    one_pass: dict[str, float] = {}  # after the loop's first call
    n, width = batched.candidate_count, model.lm_head.weight.element_size()
    batched.update(batch)  # the first batch of a kind is also tried row by row

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def update(which: Importance) -> Importance:
        which.update(batch)
        return which

    def remember(which: Importance) -> None:
        one_pass.update({n: float(t.double().sum()) for n, t in which._square_sums.items()})

    def right(which: Importance) -> str | None:
        """The passes so far, each with the loop's squares but for rounding."""
        if which.looped:
            return f"{len(which.looped)} parameters went by the loop"
        passes = which.sample_count / len(ids)
        room = 1e-3 if dtype == torch.float32 else 0.1
        for parameter, wanted in one_pass.items():
            got = float(which._square_sums[parameter].double().sum()) / passes
            if abs(got - wanted) > room * wanted:
                return f"square sums of {parameter} add up to {got}, not {wanted}"
        return None

    peers = [
        Peer(PLAIN, plain, note="every parameter's gradient of the batch"),
        Peer(LOOP, lambda: update(loop), remember),
        Peer(OURS, lambda: update(batched), right, "ours"),
    ]
    targets = [
        Target("time / forward + backward", time_ratio(OURS, PLAIN), 1.25, at_most=True),
        Target("faster than the loop", time_ratio(LOOP, OURS), 1.5, at_most=False),
    ]
    name = str(dtype).removeprefix("torch.")
    limits = {"peer_seconds": SECONDS, "least_rounds": ROUNDS, "long": COLD}
    return Case("importance", name, ids.numel(), (2 * width + 8) * n, peers, targets, **limits)


def within_budget(
    quick: bool, dtype: torch.dtype, size: tuple[int, int], n_batches: int, embeddings: bool
) -> Case:
    try:
        model = load(quick, dtype).eval()
    except Absent as error:
        return absent_case("importance", dtype, BOUNDED, error)
    ids = token_ids(quick, *size)
    batches = [{"input_ids": part, "labels": part} for part in ids.chunk(n_batches)]
    whole = Importance(model, "piece-s", embeddings=embeddings)
    needs = needs_of(whole)
    total = sum(need.sums for need in needs.values())
    budget = total // 10
    passes = 1 if n_batches == 1 else len(groups_within(needs, budget))
    chosen: list[piece_ops.Selection] = []  # by the first call of the unbounded one

    def estimate(**settings: Any) -> piece_ops.Selection:
        return piece_ops.estimate(
            model, batches, "piece-s", density=1e-3, embeddings=embeddings, **settings
        )

    def same(got: piece_ops.Selection) -> str | None:
        want = chosen[0]
        is_same = got.threshold == want.threshold and got.indices.keys() == want.indices.keys()
        if is_same and all(torch.equal(got.indices[n], want.indices[n]) for n in want.indices):
            return None
        return "another selection"

    def remember(got: piece_ops.Selection) -> str | None:
        chosen.append(got)
        return None if got.k else "nothing is selected"

    def a_pass(rows: dict[str, Row]) -> float | None:
        ratio = time_ratio(BOUNDED, WHOLE)(rows)
        return None if ratio is None else ratio / passes

    note = f"{budget} bytes, {passes} passes" if passes > 1 else f"{budget} bytes, one pass"
    peers = [
        Peer(WHOLE, estimate, remember),
        Peer(BOUNDED, lambda: estimate(memory_budget=budget), same, "ours", note=note),
    ]
    targets = [Target(f"time / {passes} x that with all accumulators", a_pass, 1.2, at_most=True)]
    name, n = str(dtype).removeprefix("torch."), total // 8
    n_bytes = passes * 2 * n * dtype.itemsize
    limits = {"peer_seconds": SECONDS, "least_rounds": ROUNDS if passes == 1 else 1}
    return Case("importance", name, ids.numel(), n_bytes, peers, targets, **limits)


def rounded(quick: bool, size: tuple[int, int], n_batches: int) -> Case:
    """How much of a selection bfloat16 accumulators keep."""
    try:
        model = load(quick, torch.float32).eval()
    except Absent as error:
        return absent_case("importance", torch.bfloat16, ROUNDED, error)
    ids = token_ids(quick, *size)
    batches = [{"input_ids": part, "labels": part} for part in ids.chunk(n_batches)]

    def chosen(**settings: Any) -> dict[str, dict[str, Tensor]]:
        """By each method: piece-s adds up what piece-f needs, too."""
        held = Importance(model, "piece-s", **settings)
        for batch in batches:
            held.update(batch)
        selection = held.select(density=1e-3)
        by_squares = piece_ops.select_topk(held._square_sums, selection.k)
        return {"piece-f": by_squares.indices, "piece-s": dict(selection.indices)}

    want, got = chosen(), chosen(accumulators="bfloat16", seed=0)
    figures = {}
    for method, positions in want.items():
        common = sum(
            int(torch.isin(got[method][name], places).sum())
            for name, places in positions.items()
            if name in got[method]
        )
        k = sum(places.numel() for places in positions.values())
        figures[f"{method}_percent"] = 100 * common / k
    row = Row(ROUNDED, "ours", "ok", 0, figures=figures, note="same coordinates as float32's")
    return Case("importance", "bfloat16", ids.numel(), 0, [], measured=[row])


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    size, less = ((4, 16), (4, 16)) if quick else ((8, 64), (4, 64))
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        yield case_name(quick, *size, kind), partial(importance, quick, dtype, size)
        for n_batches, how in ((2, "two batches"), (1, "one batch")):
            embeddings = n_batches == 2 and dtype == torch.bfloat16
            how += ", embeddings too" if embeddings else ""
            name = case_name(quick, *less, f"budget of a tenth, {how}", kind)
            yield name, partial(within_budget, quick, dtype, less, n_batches, embeddings)
    name = case_name(quick, *size, "bfloat16 accumulators, 0.1 %")
    yield name, partial(rounded, quick, size, 4)
