"""piece_ops in a training loop of your own: accumulation, clipping, checkpoints, a delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import piece_ops

from shared import ACCUMULATE, BATCH, CLIP, encode, latest, load, options, report, stack


def main(argv: Sequence[str] | None = None) -> piece_ops.PieceModel:
    """Run it; returns the trained model."""
    args = options("Train 0.1 % of a model's weights in a plain loop.").parse_args(argv)
    base, tokenizer = load(args.model)
    rows, held_out = encode(tokenizer)[:-4], encode(tokenizer)[-4:]
    batches = [stack(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]

    selection = piece_ops.estimate(base, batches, method="piece-f", density=args.density)
    model = piece_ops.PieceModel(base, selection)
    model.print_trainable_parameters()
    optimizer = piece_ops.SparseAdamW(model.parameters(), lr=args.lr)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        return float(model(**stack(held_out)).loss)

    before, done = evaluate(), 0
    if args.resume:
        state = torch.load(latest(args.out) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])  # refused on another base or selection
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    for step in range(done, args.steps):
        model.train()
        for part in range(ACCUMULATE):  # gradients add up in float32
            batch = batches[(step * ACCUMULATE + part) % len(batches)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss / ACCUMULATE
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.values.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 2 == 0:
            folder = args.out / f"checkpoint-{step + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, folder / "state.pt")

    report(before, evaluate(), args.out)
    model.save_pretrained(args.out, task="colours")  # PieceModel.from_pretrained(base, args.out)
    return model


if __name__ == "__main__":
    main()
