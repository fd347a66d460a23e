"""Per-sample importance of a model like SmolLM2-135M: one batched pass, against a plain backward.

8 rows of 64 tokens, piece-f, embeddings no candidates; random weights of SmolLM2's shapes. Bytes:
the candidates' weights, read forward and backward, and their accumulators, read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.harness import Absent, Case, Peer, Target, time_ratio
from piece_ops.importance import Importance

ROWS, TOKENS, VOCABULARY = 8, 64, 49152
OURS, LOOP, PLAIN = "piece_ops, one batched pass", "loop over rows, hooks", "forward + backward"


def build_model(quick: bool, dtype: torch.dtype) -> Any:
    """SmolLM2-135M's architecture (two layers of it when quick)."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Absent("transformers is not installed") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def importance(quick: bool, dtype: torch.dtype) -> Case:
    name, batch, tokens = str(dtype).removeprefix("torch."), {}, ROWS * TOKENS
    try:
        model = build_model(quick, dtype)
        ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        batched = Importance(model, "piece-f")
        loop = Importance(model, "piece-f", per_sample="loop")
        loop.update(batch)
        one_pass = {n: float(t.double().sum()) for n, t in loop._square_sums.items()}
        n, size = batched.candidate_count, model.lm_head.weight.element_size()
        batched.update(batch)  # the first batch of a kind is also tried row by row
    except Absent as error:
        return Case("importance", name, 0, 0, [Peer(OURS, partial(_raise, error), role="ours")])

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def update(which: Importance) -> Importance:
        which.update(batch)
        return which

    def right(which: Importance) -> str | None:
        """The passes so far, each with the loop's squares but for rounding."""
        if which.looped:
            return f"{len(which.looped)} parameters went by the loop"
        passes = which.sample_count / ROWS
        room = 1e-3 if dtype == torch.float32 else 0.1
        for parameter, wanted in one_pass.items():
            got = float(which._square_sums[parameter].double().sum()) / passes
            if abs(got - wanted) > room * wanted:
                return f"square sums of {parameter} add up to {got}, not {wanted}"
        return None

    peers = [
        Peer(PLAIN, plain, note="every parameter's gradient of the batch"),
        Peer(LOOP, lambda: update(loop)),
        Peer(OURS, lambda: update(batched), right, "ours"),
    ]
    targets = [
        Target("time / forward + backward", time_ratio(OURS, PLAIN), 1.25, at_most=True),
        Target("faster than the loop", time_ratio(LOOP, OURS), 1.5, at_most=False),
    ]
    return Case("importance", name, tokens, (2 * size + 8) * n, peers, targets)


def _raise(error: Exception) -> None:
    raise error


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{ROWS} x {TOKENS} tokens, {'two layers' if quick else 'SmolLM2-135M'}, {dtype}"
        yield name.replace("torch.", ""), partial(importance, quick, dtype)
