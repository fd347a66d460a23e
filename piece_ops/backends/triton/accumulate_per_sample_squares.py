"""accumulate_per_sample_squares_ on CUDA tensors: one kernel, whose epilogue squares in registers.

What         square_sums += sum_n (scale_n G_n^T X_n)^2, sums += sum_n scale_n G_n^T X_n, where the
             samples are segments of the token axis of G [T, out] and X [T, in].
Algorithm    1. `finite.look` reads G and X: NaN or infinity in one raises; the host waits for that
             while 2. runs, which reads the same answer on the device and adds nothing then. 2. The
             token axis is cut into steps of BLOCK_TOKENS, none of which crosses a sample's end. A
             program owns a tile of BLOCK_OUT x BLOCK_IN and walks over all steps in one loop, so
             loads are pipelined across samples too; tensor cores add a step's products to a float32
             accumulator in registers. On a sample's last step that is scaled, squared into a second
             one (added to a third one if sums are wanted) and set to 0. 3. One read and one write
             of the tile.
Loads        By TMA descriptors where the GPU has them (sm_90, sm_100), factors have 2 bytes, rows
             are aligned to 16 and samples are as long as each other (padded batches): 3-D, so that
             what lies past a sample's end is read as 0. No addresses, masks or table: 142 registers
             a thread instead of 188, and 128 x 128 fits with sums, too. By pointers otherwise.
Why          A sample's gradient as a matrix would be written and read once more each: 8 bytes an
             element and sample, where tensor cores need 2 L flops an element: at 4 TB/s and 700
             Tflop/s that is L = 700 tokens' worth of time. Here it costs 2 multiply-adds.
Maxima       On request (in a multiple of 32 features, so that a chunk of 32 elements lies in one
             tile) the tile's new scores leave the largest of each chunk, for `ChunkMaxima`. Of
             piece-s a little more, since the root and the quotient may be rounded otherwise here;
             of NaN infinity. 0.125 bytes an element.
Traffic      G and X twice, their tiles again from L2; 8 (16) out in bytes of accumulators. A tile
             of 128 x 128 has 64 flops a byte from L2, of 128 x 64 43; torch.mm, with 128 x 256 and
             two blocks sharing loads, 128. Two float32 accumulators of 128 x 256 are all registers
             of an SM, and this Triton cannot share loads: what L2 gives is the limit.
Predicted    H200, Llama-8B, 8192 tokens in 8 samples, bfloat16; all 224 Linear layers, 7.0e9
             weights: the products, at 530 Tflop/s (8.3 TB/s from L2), 216 ms (4096 x 4096 0.52,
             14336 x 4096 1.8), accumulators 56 GB in 14, the look at G and X 43 GB in 10: 240 ms.
             An ordinary backward of these layers, at 780 Tflop/s, is 294 ms; with this op for the
             weight gradients 387: 1.3 x (target 1.15), 1.2 x of forward and backward.
             At 64 tokens a sample every step has an epilogue: the products' time 1.6 to 1.7 times.
Scratch      24 bytes a step, kept for the next calls with the same offsets (not with TMA).
Determinism  each tile has one owner and one order: the same bits for the same tiling. With TMA that
             is a matter of the sample length; otherwise the autotuner chooses it for a shape once
             in a process.
Limits       not captured by CUDA graphs (the offsets come from the host with every call); the
             tokens of a step lie within 2^31 elements of each other.

Measured     H200, 2026-11-28, bfloat16, 8 samples of 1024 tokens, ms (torch.mm of the batch):
             4096 x 4096 0.95 (0.34), 14336 x 4096 2.56 (1.19), 1024 x 4096 0.54 (0.09); 128 samples
             of 64 tokens 1.65 (0.36). That was by pointers (450 Tflop/s: 7 TB/s from L2), with 0.3
             to 0.4 ms of looking and waiting in front. TMA and `finite` have not run on a GPU yet.

Emulated (Triton's interpreter) and compiled for sm_80, 90, 100 and 120.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from piece_ops import _schema
from piece_ops.backends.triton.finite import Answer, look


@triton.jit  # type: ignore[untyped-decorator]
def accumulate_per_sample_squares_kernel(  # type: ignore[no-untyped-def]
    square_sums,  # with TMA a descriptor [out, in], like sums
    sums,
    grad_output,  # with TMA a descriptor [samples, length, out]
    input,
    steps,  # int64 [n_steps, 3]: first token, tokens, sample if it ends here, else -1; not with TMA
    length,  # tokens of every sample, with TMA
    scales,
    flags,  # int32: not 0 where `look_kernel` saw NaN or infinity; then nothing is added
    maxima,  # float32 [out_features, in_features / 32]
    constant,  # of piece-s
    n_steps,
    out_features,
    in_features,
    grad_stride,
    input_stride,
    HAS_SQUARE_SUMS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    FLAGS: tl.constexpr,  # how many, 0: the caller looks
    TMA: tl.constexpr,
    MAXIMA: tl.constexpr,  # of which score, or "": none
    UPCAST: tl.constexpr,  # to float32: factors of two dtypes; bfloat16 when interpreted
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    # Eight rows of tiles at a time: the tiles that run together share their G and X in L2.
    tiles_out, tiles_in = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    tile = tl.program_id(0)
    band = tile // (8 * tiles_in)
    band_rows = tl.minimum(tiles_out - band * 8, 8)
    tile_out = band * 8 + (tile % (8 * tiles_in)) % band_rows
    tile_in = (tile % (8 * tiles_in)) // band_rows

    row, column = tile_out * BLOCK_OUT, tile_in * BLOCK_IN
    rows, columns = row + tl.arange(0, BLOCK_OUT), column + tl.arange(0, BLOCK_IN)
    is_row, is_column = rows < out_features, columns < in_features
    tokens = tl.arange(0, BLOCK_TOKENS)
    # 32-bit positions inside a step, the same for all; the step's own address is a 64-bit number.
    grad_at = tokens[None, :] * grad_stride + rows[:, None]
    input_at = tokens[:, None] * input_stride + columns[None, :]
    if FLAGS:
        bad = tl.max(tl.load(flags + tl.arange(0, FLAGS)), axis=0)
        n_steps = tl.where(bad != 0, 0, n_steps)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    squares = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    next_sample, next_token = 0, 0
    for step in range(n_steps):
        if TMA:
            # The next step's place must not wait for the branch below: loads run ahead of it.
            sample, token = next_sample, next_token
            ends = token + BLOCK_TOKENS >= length
            next_sample = tl.where(ends, sample + 1, sample)
            next_token = tl.where(ends, 0, token + BLOCK_TOKENS)
            # What lies past the sample's last token is read as 0.
            g = grad_output.load([sample, token, row]).reshape(BLOCK_TOKENS, BLOCK_OUT).T
            x = input.load([sample, token, column]).reshape(BLOCK_TOKENS, BLOCK_IN)
        else:
            first = tl.load(steps + 3 * step)
            count = tl.load(steps + 3 * step + 1)
            sample = tl.load(steps + 3 * step + 2)
            ends = sample >= 0
            is_token = tokens < count
            g = tl.load(
                grad_output + first * grad_stride + grad_at,
                mask=is_row[:, None] & is_token[None, :],
                other=0.0,
            )
            x = tl.load(
                input + first * input_stride + input_at,
                mask=is_token[:, None] & is_column[None, :],
                other=0.0,
            )
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        gradient = tl.dot(g, x, gradient, input_precision=PRECISION)
        if ends:
            if HAS_SCALES:
                gradient *= tl.load(scales + sample)
            if HAS_SQUARE_SUMS:
                squares += gradient * gradient
            if HAS_SUMS:
                total += gradient
            gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)

    flat = rows.to(tl.int64)[:, None] * in_features + columns[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if HAS_SQUARE_SUMS:
        if TMA:
            squares += square_sums.load([row, column])
            square_sums.store([row, column], squares)
        else:
            at = square_sums + flat
            squares += tl.load(at, mask=inside, other=0.0)
            tl.store(at, squares, mask=inside)
    if HAS_SUMS:
        if TMA:
            total += sums.load([row, column])
            sums.store([row, column], total)
        else:
            at = sums + flat
            total += tl.load(at, mask=inside, other=0.0)
            tl.store(at, total, mask=inside)
    if MAXIMA != "":
        if MAXIMA == "plain":
            score = squares
        elif MAXIMA == "magnitude":
            score = tl.abs(total)
        else:  # 2^-20: more than the roundings of a root and a quotient; and no zero of a subnormal
            score = tl.abs(total) / tl.sqrt(squares + constant) * (1.0 + 1e-6) + 1e-37
        score = tl.where(score == score, score, float("inf"))
        chunks = tl.max(tl.reshape(score, (BLOCK_OUT, BLOCK_IN // 32, 32)), axis=2)
        places = tile_in * (BLOCK_IN // 32) + tl.arange(0, BLOCK_IN // 32)
        at = maxima + rows.to(tl.int64)[:, None] * (in_features // 32) + places[None, :]
        tl.store(at, chunks, mask=is_row[:, None] & (places < in_features // 32)[None, :])


@dataclass(frozen=True)
class Tiling:
    """What the autotuner chooses among; BLOCK_TOKENS is 64 for 2-byte factors, 32 for 4-byte."""

    block_out: int
    block_in: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        return {"BLOCK_OUT": self.block_out, "BLOCK_IN": self.block_in}


# With TMA, whose addresses take no registers: all three accumulators of 128 x 128 fit, in some 210
# registers a thread of 8 warps. Four stages are 128 KiB; the half tiles' 96 KiB let two blocks into
# an SM, so that one multiplies while the other squares.
TMA_TILING = Tiling(128, 128, 8, 4)
TMA_TILING_HALF = Tiling(128, 64, 4, 4)
# A sample of up to so many tokens has few steps between its squares: then half tiles.
FEW_TOKENS = 128
# Without: two accumulators of 128 x 128 are 128 registers a thread of 8 warps; three spill. The
# smaller ones are for matrices with few tiles, and for short samples: two blocks of 128 x 64 fit in
# an SM, as above. 128 x 256 spills. Stages count the loads of the table too: 7 hold four steps in
# shared memory, 64 (64 x 64 with float32) to 128 KiB, 5 three.
TILINGS = (
    Tiling(128, 128, 8, 7),
    Tiling(128, 128, 8, 5),
    Tiling(128, 64, 8, 7),
    Tiling(128, 64, 4, 7),
    Tiling(64, 64, 4, 7),
)
TILINGS_WITH_BOTH = (Tiling(128, 64, 8, 7), Tiling(64, 128, 8, 7), Tiling(64, 64, 4, 7))


@dataclass(frozen=True)
class Maxima:
    """Where the largest score of every 32 elements goes, and of which score (see `MAXIMA_OF`)."""

    to: Tensor  # float32 [out * in / 32]
    kind: str
    constant: float


MAXIMA_OF = ("plain", "piece-s", "magnitude")


def block_tokens(grad_output: Tensor, input: Tensor) -> int:
    return 32 if max(grad_output.element_size(), input.element_size()) == 4 else 64


@lru_cache(maxsize=16)
def _steps(offsets: tuple[int, ...], block: int, device: torch.device, stream: int) -> Tensor:
    """The kernel's table. The stream is part of the key: a copy is ordered on its own only."""
    table = [
        (token, min(block, end - token), n if token + block >= end else -1)
        for n, (begin, end) in enumerate(itertools.pairwise(offsets))
        for token in range(begin, end, block)
    ]
    return torch.tensor(table, dtype=torch.int64).reshape(-1, 3).to(device)


@lru_cache(maxsize=16)
def _scales(scales: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32).to(device)


@lru_cache(maxsize=2)
def _tuned(with_both: bool) -> Any:
    """The kernel with its autotuner; what a trial run adds is taken back."""
    configs = [
        triton.Config(tiling.meta(), num_warps=tiling.warps, num_stages=tiling.stages)
        for tiling in (TILINGS_WITH_BOTH if with_both else TILINGS)
    ]
    names = ["out_features", "in_features", "HAS_SUMS", "HAS_SQUARE_SUMS", "MAXIMA", "PRECISION"]
    tuner = triton.autotune(configs, key=names, restore_value=["square_sums", "sums"])
    return tuner(accumulate_per_sample_squares_kernel)


@lru_cache(maxsize=8)
def _has_tma(device: torch.device) -> bool:
    """Hopper and the large Blackwells; interpreted always. Others have no room for these tiles."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def sample_length(
    grad_output: Tensor, input: Tensor, accumulators: Sequence[Tensor], offsets: Sequence[int]
) -> int:
    """Tokens of every sample, where descriptors can say where samples and tiles lie; else 0."""
    length = offsets[1] - offsets[0]
    tensors = (grad_output, input, *accumulators)
    serves = (
        length > 0
        and all(end - begin == length for begin, end in itertools.pairwise(offsets))
        and all(x.data_ptr() % 16 == 0 for x in tensors)
        and all(x.stride(0) * x.element_size() % 16 == 0 for x in tensors)
        and _has_tma(grad_output.device)
    )
    if grad_output.is_cuda:  # tensor cores transpose 2-byte factors on their way only
        serves = serves and grad_output.dtype == input.dtype and input.element_size() == 2
    return length if serves else 0


def launch(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Sequence[int],
    sums: Tensor | None,
    scales: Sequence[float] | None,
    tiling: Tiling | None = None,
    maxima: Maxima | None = None,
    flags: Tensor | None = None,
) -> None:
    """Run the kernel on checked arguments, with one tiling, or the one for the case.

    Under TRITON_INTERPRET=1 tensors lie on the CPU and a tiling must be given.
    """
    out, features = grad_output.shape[1], input.shape[1]
    device = grad_output.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    block = block_tokens(grad_output, input)
    if not out * features or offsets[0] == offsets[-1]:
        return
    if max(grad_output.stride(0), input.stride(0)) * block >= 2**30:
        raise ValueError(
            "piece_ops.accumulate_per_sample_squares_: rows must be less than "
            f"{2**30 // block} elements apart on CUDA, got "
            f"strides {grad_output.stride()} and {input.stride()}"
        )
    # What is left out is a number that nothing reads: the autotuner copies accumulators.
    none = torch.empty(1, dtype=torch.float32, device=device)
    is_mixed = grad_output.dtype != input.dtype
    is_float = torch.float32 in (grad_output.dtype, input.dtype)
    is_ieee = is_float and torch.get_float32_matmul_precision() == "highest"
    held = [x for x in (square_sums, sums) if x is not None]
    length = sample_length(grad_output, input, held, offsets)
    arguments = {
        "square_sums": none if square_sums is None else square_sums,
        "sums": none if sums is None else sums,
        "grad_output": grad_output,
        "input": input,
        "length": length,
        "scales": none if scales is None else _scales(tuple(scales), device, stream),
        "flags": none if flags is None else flags,
        "maxima": none if maxima is None else maxima.to,
        "constant": 0.0 if maxima is None else maxima.constant,
        "out_features": out,
        "in_features": features,
        "grad_stride": grad_output.stride(0),
        "input_stride": input.stride(0),
        "HAS_SQUARE_SUMS": square_sums is not None,
        "HAS_SUMS": sums is not None,
        "HAS_SCALES": scales is not None,
        "FLAGS": 0 if flags is None else flags.numel(),
        "TMA": length > 0,
        "MAXIMA": "" if maxima is None else maxima.kind,
        "UPCAST": is_mixed or triton.knobs.runtime.interpret,
        "PRECISION": "ieee" if is_ieee else "tf32",
        "BLOCK_TOKENS": block,
    }

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(out, meta["BLOCK_OUT"]) * triton.cdiv(features, meta["BLOCK_IN"]),)

    if length:
        tiling = tiling or (TMA_TILING if length > FEW_TOKENS else TMA_TILING_HALF)
        tile = [tiling.block_out, tiling.block_in]
        for name, factor, width in zip(
            ("grad_output", "input"), (grad_output, input), tile, strict=True
        ):
            shape, apart = [len(offsets) - 1, length, factor.shape[1]], factor.stride(0)
            strides = [length * apart, apart, 1]
            arguments[name] = TensorDescriptor(factor, shape, strides, [1, block, width])
        for name, held_one in (("square_sums", square_sums), ("sums", sums)):
            if held_one is not None:
                arguments[name] = TensorDescriptor.from_tensor(held_one, tile)
        arguments |= {"steps": none, "n_steps": (len(offsets) - 1) * triton.cdiv(length, block)}
    else:
        steps = _steps(tuple(offsets), block, device, stream)
        arguments |= {"steps": steps, "n_steps": len(steps)}
    if tiling is not None:
        accumulate_per_sample_squares_kernel[grid](
            **arguments, **tiling.meta(), num_warps=tiling.warps, num_stages=tiling.stages
        )
    else:
        _tuned(square_sums is not None and sums is not None)[grid](**arguments)


def accumulate_per_sample_squares_(
    square_sums: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    scales: Tensor | None = None,
    tiling: Tiling | None = None,
    maxima: Maxima | None = None,
    *,
    is_finite: bool = False,
) -> None:
    """The op for CUDA tensors; see ``piece_ops.functional`` for its arguments.

    `is_finite`: the caller looks at the factors, before or after; then nothing waits.
    """
    tensors = (square_sums, grad_output, input, offsets, sums, scales)
    _schema.check_accumulate_per_sample_squares_(*tensors)
    _schema.check_offsets(offsets, grad_output.shape[0], scales)
    flags = None
    if not is_finite and all(map(Tensor.numel, (grad_output, input))):
        flags = look(grad_output, input)
        answer = Answer(flags)
    numbers = None if scales is None else scales.tolist()
    launch(square_sums, grad_output, input, offsets.tolist(), sums, numbers, tiling, maxima, flags)
    if flags is not None:
        answer.raise_for(grad_output, input)
    _schema.bump_versions([x for x in (square_sums, sums) if x is not None])
