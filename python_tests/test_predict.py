"""Predictions: shapes, the byte model against the kernels' headers and against measured rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import predicted, report
from bench.inputs import count_elements, smollm2_shapes
from piece_ops import cli
from piece_ops.predict import CONFIGS, Plan, Prediction, costs, device, devices, read_model
from piece_ops.predict.costs import Work
from piece_ops.predict.models import llama_like

from helpers.tolerances import (
    PREDICTED_HEADERS,
    PREDICTED_PHASES,
    PREDICTED_SCATTERED,
    PREDICTED_STREAMS,
)

ROOT = Path(__file__).parents[1]
H200 = device("h200", torch.bfloat16)
CPU = devices.cpu(24e9, 50e9, 1e11, "a test")


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "tensors"),
    [
        ("llama-3-8b", 8_030_261_248, 291),
        ("llama-3-70b", 70_553_706_496, 723),
        ("llama-3.1-405b", 405_853_388_800, 1137),
        ("mixtral-8x7b", 46_702_792_704, 32 * 9 + 3),
    ],
)
def test_named_models_have_their_published_sizes(name: str, n: int, tensors: int) -> None:
    model = read_model(name)
    assert (model.n, model.tensors) == (n, tensors)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_formulas_agree_with_transformers(tmp_path: Path, model_type: str, is_tied: bool) -> None:
    pytest.importorskip("transformers")
    config = {
        **CONFIGS["mixtral-8x7b" if model_type == "mixtral" else "llama-3-8b"],
        "num_hidden_layers": 2,
        "model_type": model_type,
        "tie_word_embeddings": is_tied,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    built = read_model(str(tmp_path))
    assert built.source.startswith("built by transformers")
    found: Counter[Any] = Counter()
    for weight in llama_like(config):
        found[weight.shape, weight.kind, weight.active] += weight.count
    assert found == Counter((w.shape, w.kind, w.active) for w in built.weights)


def test_a_configuration_that_transformers_cannot_build_goes_by_formulas(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["llama-3-8b"] | {"model_type": "no such thing"}))
    model = read_model(str(path))
    assert model.n == read_model("llama-3-8b").n and "formulas" in model.source


# ---- the byte model -----------------------------------------------------------------------------


def byte(work: Work) -> str:
    """Bytes of one element or slot, as a header says them."""
    return f"{work.read + work.moved:g} bytes"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("cuda/accumulate_squares.cu", byte(costs.accumulate_squares(1, 2, 1))),
        ("cpu/accumulate_squares.cpp", byte(costs.accumulate_squares(1, 2, 1))),
        ("cuda/sparse_adamw.cu", byte(costs.sparse_adamw(1, H200))),
        (
            "cuda/sparse_adamw.cu",
            f"(dense gradients: {costs.sparse_adamw(1, H200, 1, True).moved})",
        ),
        ("cpu/sparse_adamw.cpp", byte(costs.sparse_adamw(1, CPU))),
        ("cuda/select_topk.cu", f"{costs.select_topk(1, 0, 4, H200).read:.2f}   reads"),
        ("cpu/select_topk.cpp", "+ 0.4 % for the sample, + 24 bytes"),
    ],
)
def test_bytes_are_those_of_the_headers(file: str, words: str) -> None:
    assert words in (ROOT / "csrc" / file).read_text(encoding="utf-8")


LLAMA_LINEARS = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]


def of_layers(one: Any) -> Work:
    """A work of each of Llama-8B's 224 linear layers."""
    return sum((one(out, width) for out, width in LLAMA_LINEARS), Work()) * 32


def squares_of_layer(out: int, width: int) -> Work:
    return costs.accumulate_per_sample_squares(8192, out, width, 2, 1, H200)


def sampled_of_layer(out: int, width: int) -> Work:
    return costs.sampled_weight_grad(8192, out, width, 2, out * width / 1000, H200)


def test_times_are_those_of_the_headers() -> None:
    head = sampled_of_layer(128256, 4096)
    predicted = {
        "accumulate_squares, 1e9": (costs.accumulate_squares(1e9, 2, 1), 3.0),
        "accumulate_squares, Llama-8B": (costs.accumulate_squares(8.03e9, 2, 1), 24),
        "select_topk, 1e9": (costs.select_topk(1e9, 1e6, 4, H200), 1.08),
        "select_topk, 8e9": (costs.select_topk(8e9, 8e6, 4, H200), 7.8),
        "sparse_adamw": (costs.sparse_adamw(8e6, H200), 0.2),
        "gather": (costs.gather(8e6, 2, H200), 0.09),
        "scatter": (costs.scatter(8e6, 4, H200), 0.15),
        "accumulate_per_sample_squares": (of_layers(squares_of_layer), 240),
        "sampled_weight_grad": (of_layers(sampled_of_layer) + head, 45),
    }
    for name, (work, wanted_ms) in predicted.items():
        on_device = Work(**{**vars(work), "tensors": 0}).seconds(H200) * 1e3
        ratio = on_device / wanted_ms
        assert 1 / PREDICTED_HEADERS < ratio < PREDICTED_HEADERS, f"{name}: {on_device} ms"


SCATTERED = ("sparse_adamw_", "gather", "scatter_")


def compared() -> list[tuple[str, float, float]]:
    """What was measured on a CPU: (row, predicted over measured time, allowed).

    Where memory is the limit: not what lies in a cache, nor where the selected are the most work.
    """
    found = []
    for (op, case), lines in report.load([ROOT / "bench" / "results" / "cpu.jsonl"]).items():
        for row, ratio in predicted.ratios(lines):
            if op != "scaling" and row["n"] >= 1e8 and row["k"] <= row["n"] / 100:
                scattered = op in SCATTERED and row["role"] == "ours"
                allowed = PREDICTED_SCATTERED if scattered else PREDICTED_STREAMS
                found.append((f"{op}, {case}: {row['peer']}", ratio, allowed))
    return found


def test_predictions_agree_with_what_was_measured() -> None:
    rows = compared()
    assert {name.split(",")[0] for name, _, _ in rows} == {
        "select_topk",
        "accumulate_squares_",
        "total",
        *SCATTERED,
    }
    wrong = [row for row in rows if not 1 / row[2] < row[1] < row[2]]
    assert not wrong


def test_the_prediction_of_a_pipeline_agrees_with_what_was_measured() -> None:
    found = predicted.pipeline(report.load([ROOT / "bench" / "results" / "cpu.jsonl"]))
    if not found:
        pytest.skip("bench/results/cpu.jsonl holds no pipeline of ours")
    for name, (guess, measured) in found.items():
        assert 1 / PREDICTED_PHASES < guess / measured < PREDICTED_PHASES, (name, guess, measured)


def test_the_pipeline_of_made_up_rows_is_predicted() -> None:
    """Rows of a machine of 10 GB/s and 100 GFLOP/s: what the parts say by hand."""
    figures = {"importance_ms": 1.0, "select_ms": 1.0, "state_bytes": 1.0}
    ours = {"kind": "row", "op": "pipeline", "role": "ours", "status": "ok", "quick": False}
    ours |= {"figures": figures, "p50_ms": 1.0, "gflop_per_s": 100.0}
    floor = {"kind": "row", "op": "total", "role": "floor", "gb_per_s": 10.0, "n": 10**8}
    found = predicted.pipeline({1: [floor], 2: [ours]})
    n = count_elements(smollm2_shapes())
    candidates = n - 49152 * 576
    assert found["selection"][0] == pytest.approx(8 * candidates / 10e9 * 1e3, rel=0.1)
    # Forward and gradients of the inputs; the tied embedding is the output head.
    products_ms = 4 * 512 * n / 100e9 * 1e3
    assert products_ms < found["a step"][0] < 2 * products_ms
    squares_ms = 2 * 512 * candidates / 100e9 * 1e3
    assert 1 < found["importance"][0] / (4 * (products_ms + squares_ms)) < 1.2
    assert found["bytes of state"][0] < 60 * (n // 1000)
    assert predicted.pipeline({1: [floor]}) == predicted.pipeline({1: [ours]}) == {}


# ---- whole predictions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["piece-s", "piece-g", "random"])
def test_more_of_anything_never_takes_less(name: str, method: str) -> None:
    model = read_model(name)
    few = Prediction(model, H200, Plan(method=method))
    more = Prediction(
        model, H200, Plan(method=method, density=0.01, samples=32, tokens=16384, gpus=8)
    )
    for a, b in zip(few.phases, more.phases, strict=True):
        assert 0 <= a.ours.seconds(H200) <= b.ours.seconds(H200)
        assert a.ours_bytes <= b.ours_bytes and a.ours_bytes <= a.dense_bytes
    assert few.reduced_bytes == (4 * few.k, 2 * model.n) and few.k == model.n // 1000


def test_the_ratios_of_the_table_are_those_of_its_phases() -> None:
    found = Prediction(read_model("llama-3-8b"), device("h200", torch.bfloat16), Plan("piece-f"))
    importance, _, step = found.phases
    forward = 2 * found.model.active * 8192 / device("h200", torch.bfloat16).products
    whole, backward = found.fisher_ratios()  # 16 samples of 512 tokens are one batch
    assert whole == pytest.approx(importance.ours.seconds(found.on) / (3 * forward), rel=1e-6)
    assert 1.0 < whole < backward
    least, mixed = found.saved_bytes()
    assert least == step.dense_bytes - step.ours_bytes
    assert mixed - least == 4 * found.model.n  # two moments, 2 bytes more each


def test_the_command_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--predict", "--model-config", "llama-3-70b", "--gpu", "b200"]
    assert cli.main([*command, "--gpus", "8", "--bandwidth", "7000"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Predicted, not measured")
    for words in ("70,553,706,496", "7000 GB/s as given", "training step", "282 MB a step"):
        assert words in printed


def test_this_cpu_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--predict", "--model-config", "llama-3-8b", "--gpu", "cpu"]) == 0
    assert "read and products measured now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model-config", "llama-5"], "CONFIG must be one of llama-3-8b"),
        (["--model-config", "llama-3-8b", "--density", "2"], "density must be in (0, 1], got 2"),
        (["--model-config", "llama-3-8b", "--samples", "0"], "samples must be at least 1, got 0"),
        (["--model-config", "llama-3-8b", "--bandwidth", "-1"], "bandwidth must be positive"),
    ],
)
def test_bad_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert cli.main(["bench", "--predict", *more]) == 2
    assert words in capsys.readouterr().err


def test_bad_configurations_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (("{", "must be JSON"), ("[]", "must hold an object"), ("{}", "must have")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_model(str(path))


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("piece-ops bench"))
    assert cli.main(command.split()[1:]) == 0
    example = text.split("<!-- predict:begin -->\n```\n")[1].split("```\n<!-- predict:end -->")[0]
    assert capsys.readouterr().out == example
