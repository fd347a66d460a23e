"""Compile a Triton kernel for an architecture without a GPU, and read what it needs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that a block may have: CUDA C++ Programming Guide, "Technical Specifications".
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int
    ptx: str


def compile_for(
    architecture: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    tmp_path: Path,
    divisible: Collection[str],
    **options: int,
) -> Resources:
    """Types of the arguments ("*bf16", "i32") by name; which of them are multiples of 16."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert used, report
    registers, stack, local = map(int, used.groups())
    return Resources(registers, stack + local, compiled.metadata.shared, compiled.asm["ptx"])
