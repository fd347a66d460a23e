"""The emulation itself: planted mistakes are noticed, by it or by the sanitizer in charge."""

from __future__ import annotations

import os
import platform
import re
import subprocess

import pytest

from helpers.emulated import ROOT, build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks in x86-64 assembler"
)

# Mistake -> what finds it, and words of its report.
PLANTED = {
    "divergent_barrier": ("plain", r"deadlock in block \(0, 0, 0\): 32 of 64 .* __syncthreads at"),
    "absent_lane": ("plain", r"deadlock .* wait in __shfl_sync at planted\.cpp:\d+"),
    "not_in_mask": ("plain", r"lane \d+ is not in its own mask; __ballot_sync at"),
    "uninitialised": ("plain", ""),
    "shared_overrun": ("address", r"out of bounds|global-buffer-overflow"),
    "dynamic_overrun": ("address", r"heap-buffer-overflow"),
    "global_overrun": ("address", r"heap-buffer-overflow"),
    "misaligned_vector": ("address", r"misaligned address"),
    "race": ("thread", r"data race"),
    "no_wait": ("plain", r"the ring's sums are wrong"),
    "wait_for_one_too_few": ("plain", r"the ring's sums are wrong"),
    "overwritten_too_early": ("plain", r"the ring's sums are wrong"),
    "not_committed": ("plain", r"the ring's sums are wrong"),
    "foreign_bytes": ("thread", r"data race"),
    "misaligned_copy": ("plain", r"misaligned asynchronous copy of 16 bytes"),
    "odd_copy": ("plain", r"asynchronous copy of 12 bytes; it must be 4, 8 or 16"),
    "copy_overrun": ("address", r"heap-buffer-overflow"),
    "ticket_barrier": ("plain", r"a ticket is drawn when \d+ of 64 threads have come to it"),
    "ticket_release": ("plain", r"a ticket is drawn without a fence since the last barrier"),
    "ticket_acquire": ("plain", r"no fence after a ticket, before __syncthreads at planted\.cpp"),
}


def run(kind: str, name: str) -> tuple[int, str]:
    build(kind)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    done = subprocess.run(
        [str(ROOT / "build" / f"emulation-{kind}" / "planted"), name],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_noticed(name: str) -> None:
    kind, words = PLANTED[name]
    code, text = run(kind, name)
    if name == "uninitialised":
        assert code == 0, f"dynamic shared memory is not filled: {code} {text}"
        return
    assert code not in (0, 4), f"{name} went unnoticed: {text}"
    assert re.search(words, text), text


@pytest.mark.parametrize("name", ["none", "ring", "copies"])
@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
def test_a_right_kernel_passes(kind: str, name: str) -> None:
    """Barriers; a ring of asynchronous copies; and which copies have arrived after which wait."""
    code, text = run(kind, name)
    assert code == 0, text
