"""piece_ops in transformers' Trainer: checkpoints of k values and their state, and a delta."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Trainer, TrainingArguments

import piece_ops
from piece_ops.training.callback import PieceCallback

from shared import ACCUMULATE, BATCH, CLIP, encode, load, options, report, stack


def main(argv: Sequence[str] | None = None) -> piece_ops.PieceModel:
    """Run it; returns the trained model."""
    args = options("Train 0.1 % of a model's weights in transformers' Trainer.").parse_args(argv)
    base, tokenizer = load(args.model)
    rows, held_out = encode(tokenizer)[:-4], encode(tokenizer)[-4:]
    batches = [stack(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]

    selection = piece_ops.estimate(base, batches, method="piece-f", density=args.density)
    model = piece_ops.PieceModel(base, selection)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            max_grad_norm=CLIP,
            bf16=True,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,  # leave this out on a GPU
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        optimizer_cls_and_kwargs=(piece_ops.SparseAdamW, {"lr": args.lr}),
        callbacks=[PieceCallback(task="colours")],  # writes the delta to args.out
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume)
    report(before, trainer.evaluate()["eval_loss"], args.out)
    return model


if __name__ == "__main__":
    main()
