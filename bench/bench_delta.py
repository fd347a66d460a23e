"""Two tasks on a live SmolLM2-135M (random weights), 0.1 % each: switching, against loading again.

A model's folder is of the model's dtype, or of float32 and loaded as bfloat16 ("cast"): many
models are published so, and then loading converts every weight.

Bytes of a switch: 8 (index) + 1 value read + 1 weight written, for the k coordinates of the task
that leaves and those of the one that comes; each weight lies alone in a cache line of 64. The files
come from the page cache. transformers maps a file of the wanted dtype and reads nothing: "and read"
reads one element of each cache line, as the first forward pass must.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import piece_ops
from bench.bench_gather import chosen_positions
from bench.harness import Case, Peer, Target, time_ratio
from piece_ops import Delta, PieceModel, Selection, TaskSwitch

OURS, CHECKED = "TaskSwitch.switch_", "Delta.revert_ + apply_"
LOAD, READ = "from_pretrained", "from_pretrained and read"


def _model(quick: bool, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000 if quick else 49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def _task(model: Any, seed: int) -> Delta:
    """A random change of 0.1 % of the weights; the model is as it was afterwards."""
    torch.manual_seed(seed)
    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(weight.shape) for weight in model.parameters()]
    n = sum(weight.numel() for weight in model.parameters())
    chosen = dict(zip(names, chosen_positions(shapes, n, n // 1000), strict=True))
    indices = {name: positions for name, positions in chosen.items() if positions.numel()}
    wrapped = PieceModel(model, Selection(indices, dict(zip(names, shapes, strict=True)), n))
    with torch.no_grad():
        for values in wrapped.values.parameters():
            values.add_(torch.randn(values.shape))
    delta: Delta = wrapped.delta()
    delta.revert_(wrapped.unload())
    return delta


class _Switching:
    """Switches to the other task at every call, in one of two ways."""

    def __init__(self, model: Any, deltas: list[Delta], bound: bool) -> None:
        self.model, self.deltas, self.now = model, deltas, 0
        self.tasks = TaskSwitch(model, dict(zip("01", deltas, strict=True))) if bound else None
        self.start()

    def start(self) -> None:
        if self.tasks:
            self.tasks.switch_("0")
        else:
            self.deltas[0].apply_(self.model)

    def run(self) -> None:
        before, self.now = self.now, 1 - self.now
        if self.tasks:
            self.tasks.switch_(str(self.now))
        else:
            self.deltas[before].revert_(self.model)
            self.deltas[self.now].apply_(self.model)

    def check(self, _result: Any) -> str | None:
        delta, weights = self.deltas[self.now], dict(self.model.named_parameters())
        held = piece_ops.gather({name: weights[name] for name in delta.indices}, delta.indices)
        right = all(torch.equal(held[name], delta.values[name]) for name in held)
        return None if right else "other weights"


def _bytes_on_disk(delta: Delta) -> tuple[float, float]:
    """Bytes a coordinate of the delta's file: of its content, and with the header."""
    content = 4 + 2 * next(iter(delta.values.values())).element_size()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        delta.save(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
    assert size - header == content * delta.k
    return (size - header) / delta.k, size / delta.k


def switch(quick: bool, dtype: torch.dtype, stored: torch.dtype) -> Case:
    from transformers import AutoModelForCausalLM

    folder = tempfile.TemporaryDirectory()
    _model(quick, stored).save_pretrained(folder.name)
    load = partial(AutoModelForCausalLM.from_pretrained, folder.name, dtype=dtype)

    def load_and_read(_keep: Any = folder) -> Any:
        model = load()
        for weight in model.parameters():
            weight.detach().view(-1)[:: 64 // weight.element_size()].sum()
        return model

    models = [load(), load()]
    deltas = [_task(models[0], seed) for seed in (1, 2)]
    bound, checked = _Switching(models[0], deltas, True), _Switching(models[1], deltas, False)
    n_bytes = sum(delta.k for delta in deltas) * (8 + 2 * dtype.itemsize)
    content, whole = _bytes_on_disk(deltas[0])
    allowed = 4 + 2 * dtype.itemsize
    return Case(
        "delta",
        str(dtype).removeprefix("torch."),
        deltas[0].total,
        n_bytes,
        [
            Peer(OURS, bound.run, bound.check, "ours"),
            Peer(CHECKED, checked.run, checked.check, "ours"),
            Peer(LOAD, load),
            Peer(READ, load_and_read),
        ],
        [
            Target("faster than loading again", time_ratio(LOAD, OURS), 50, at_most=False),
            Target("faster than loading and reading", time_ratio(READ, OURS), 50, at_most=False),
            Target("content on disk, a coordinate", lambda _: content, allowed, True, "B"),
            Target("file on disk, a coordinate", lambda _: whole, allowed, True, "B"),
        ],
        peer_seconds=1,
    )


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, dtype, stored in (
        ("bfloat16", bf16, bf16),
        ("bfloat16, cast", bf16, fp32),
        ("float32", fp32, fp32),
    ):
        yield f"two tasks of 0.1 % of SmolLM2-135M, {name}", partial(switch, quick, dtype, stored)
