"""piece_ops under accelerate: the same script on one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader

import piece_ops

from shared import ACCUMULATE, BATCH, CLIP, encode, latest, load, options, report, stack


def main(argv: Sequence[str] | None = None) -> piece_ops.PieceModel:
    """Run it; returns the trained model."""
    args = options("Train 0.1 % of a model's weights under accelerate.").parse_args(argv)
    # A step is ACCUMULATE batches, also where the data begin anew: by default accelerate would end
    # it there, and a resumed run, which begins elsewhere, would step on other batches.
    accumulation = GradientAccumulationPlugin(ACCUMULATE, sync_with_dataloader=False)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_plugin=accumulation)
    base, tokenizer = load(args.model)
    rows, held_out = encode(tokenizer)[:-4], encode(tokenizer)[-4:]
    loader: Any = DataLoader(rows, BATCH, collate_fn=stack)  # type: ignore[arg-type]

    # Every process selects the same coordinates: the estimate repeats bit for bit.
    selection = piece_ops.estimate(base, loader, method="piece-f", density=args.density)
    unwrapped = piece_ops.PieceModel(base, selection)
    if accelerator.is_main_process:
        unwrapped.print_trainable_parameters()
    optimizer = piece_ops.SparseAdamW(unwrapped.parameters(), lr=args.lr)
    model, optimizer, loader = accelerator.prepare(unwrapped, optimizer, loader)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        batch = {key: part.to(accelerator.device) for key, part in stack(held_out).items()}
        return float(model(**batch).loss)

    before, done = evaluate(), 0
    if args.resume:
        accelerator.load_state(str(latest(args.out)))
        done = int(latest(args.out).name.split("-")[1])

    first = accelerator.skip_first_batches(loader, done * ACCUMULATE % len(loader))
    batches = chain(first, chain.from_iterable(repeat(loader)))
    for step in range(done, args.steps):
        model.train()
        for _ in range(ACCUMULATE):
            with accelerator.accumulate(model):
                accelerator.backward(model(**next(batches)).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unwrapped.values.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        if (step + 1) % 2 == 0:
            accelerator.save_state(str(args.out / f"checkpoint-{step + 1}"))

    after = evaluate()
    if accelerator.is_main_process:
        report(before, after, args.out)
        unwrapped.save_pretrained(args.out, task="colours")
    return unwrapped


if __name__ == "__main__":
    main()
