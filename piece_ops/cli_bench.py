"""``piece-ops bench --predict``: what a model of any size will take, without having it."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from piece_ops.importance import METHODS
from piece_ops.predict import CONFIGS, NAMES, Plan, Prediction, device, read_model, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``bench`` to the subparsers of ``piece-ops``; its parser."""
    plan = Plan()
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="predict memory and time for a model of any size (measuring: make bench)",
    )
    bench.add_argument(
        "--predict",
        action="store_true",
        required=True,
        help="from the bytes that the algorithms move; benchmarks that measure are run by "
        "`make bench` in the source tree",
    )
    bench.add_argument(
        "--model-config",
        required=True,
        metavar="CONFIG",
        help=f"{', '.join(CONFIGS)}, or a config.json (or its folder); nothing is downloaded",
    )
    bench.add_argument("--gpu", choices=NAMES, default="h200", help="cpu: this one, measured")
    bench.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="measured, instead of a share of the datasheet's",
    )
    bench.add_argument("--method", choices=METHODS, default=plan.method)
    bench.add_argument("--density", type=float, default=plan.density, help="share to select")
    bench.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    bench.add_argument("--samples", type=int, default=plan.samples, help="for the importance")
    bench.add_argument("--length", type=int, default=plan.length, help="tokens of a sample")
    bench.add_argument(
        "--tokens", type=int, default=plan.tokens, help="of a pass or step, on each device"
    )
    bench.add_argument("--gpus", type=int, default=plan.gpus, help="devices that train together")
    bench.set_defaults(function=_bench)
    return bench


def _bench(arguments: argparse.Namespace) -> int:
    """Run ``piece-ops bench``."""
    dtype = DTYPES[arguments.dtype]
    plan = Plan(
        method=arguments.method,
        density=arguments.density,
        dtype=dtype,
        samples=arguments.samples,
        length=arguments.length,
        tokens=arguments.tokens,
        gpus=arguments.gpus,
    )
    model = read_model(arguments.model_config)
    print(report(Prediction(model, device(arguments.gpu, dtype, arguments.bandwidth), plan)))
    return 0
