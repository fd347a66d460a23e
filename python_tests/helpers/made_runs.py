"""Folders of runs with made-up numbers, as a run of any length leaves them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from piece_ops.selection import Selection
from piece_ops.training.results import Results, TaskRecord, TextRecord
from piece_ops.training.settings import Settings

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    **{
        f"model.layers.{layer}.{kind}.weight": shape
        for layer in range(6)
        for kind, shape in (
            ("self_attn.q_proj", (16, 16)),
            ("self_attn.v_proj", (8, 16)),
            ("mlp.down_proj", (16, 40)),
            ("input_layernorm", (16,)),
        )
    },
}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())


def made_selection(draw: random.Random, k: int = 120) -> Selection:
    """About `k` coordinates, most of them in the values."""
    indices = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        count = min(size, round(k / 12 * draw.random() * (4 if "v_proj" in name else 0.5)))
        if count:
            indices[name] = torch.tensor(sorted(draw.sample(range(size), count)))
    return Selection(indices, SHAPES, TOTAL, "piece-g")


def made_results(names: Sequence[str], reached: int | None = None, **settings: Any) -> Results:
    """Results of a run over tasks of these names, the first `reached` of them learned."""
    given = Settings(**{"steps": 30, **settings})
    draw = random.Random(f"{given.method} {given.lr} {given.seed}")
    reached = len(names) if reached is None else reached
    tasks = []
    for i, name in enumerate(names):
        record = TaskRecord(name, f"data/{i}.jsonl", "test", 200, 100, i)
        if i < reached:
            record.trained = 120
            record.losses = [3 / (1 + 0.2 * step) + 0.2 * draw.random() for step in range(30)]
            record.seconds = {"select": 12.5, "train": 40.0, "evaluate": 7.25, "general": 2.0}
            record.memory = {phase: 10**9 + n for n, phase in enumerate(record.seconds)}
        tasks.append(record)
    texts = [TextRecord("english", "english.txt", 8192), TextRecord("code", "code.txt", 4096)]
    results = Results("a-model", given, TOTAL, tasks, texts, started="2030-01-01T00:00:00+00:00")
    drift = 0.05 * draw.random()
    top = [0.5 + 0.4 * draw.random() for _ in names]
    for t in range(reached + 1):
        row: list[float | None] = []
        for i in range(len(names)):
            known = t == 0 or i <= t
            now = 0.05 if i >= t else top[i] * (0.93 ** (t - 1 - i))
            row.append(round(now, 4) if known else None)
        results.accuracy.append(row)
        results.loss.append([None if v is None else round(-math.log(v), 4) for v in row])
        results.general.append([round(3.0 + drift * t, 4), round(2.5 + drift * t, 4)])
        results.benchmarks.append({})
    results.base_seconds = {"load": 1.5, "evaluate": 30.0, "general": 2.0}
    results.base_memory = {"load": 5 * 10**8, "evaluate": 6 * 10**8, "general": 6 * 10**8}
    results.peak_rss_bytes = 10**9 + 3
    results.complete = reached == len(names)
    return results


def write_run(folder: Path, results: Results, selections: bool = True) -> Path:
    """Write a run's folder: results, and a selection for every task that was learned."""
    draw = random.Random(str(results.settings))
    folder.mkdir(parents=True)
    results.write(folder)
    if selections:
        (folder / "selections").mkdir()
        for i, task in enumerate(results.tasks):
            if task.trained is not None:
                path = folder / "selections" / f"{i + 1}-{task.name}.safetensors"
                made_selection(draw).save(path)
    return folder
