"""The training floor: tasks, encoding, measuring, training one task, the continual run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import piece_ops.training.continual as run_module
from piece_ops._files import write_json, write_text
from piece_ops.importance import METHODS
from piece_ops.selection import Selection
from piece_ops.training import Encoder, Row, Settings, Task, evaluate, load_model, load_task, run
from piece_ops.training.choose import Chooser, sample_rows, shuffled_batches
from piece_ops.training.encoding import EncodedRow
from piece_ops.training.extra import require
from piece_ops.training.measure import Text, answer_loss, greedy_answers, perplexity
from piece_ops.training.models import ModelError, load_tokenizer
from piece_ops.training.output import OutputError, RunFolder, is_run
from piece_ops.training.report import format_results, format_table
from piece_ops.training.results import Results, TaskRecord
from piece_ops.training.tasks import TaskError, read_rows, split_argument
from piece_ops.training.train import TrainingError, rate_factor, train_task

from helpers.tiny_lm import save_tiny, tiny_model, tiny_tokenizer, write_rows

COLOURS = [(f"{name}?", kind) for name in "abcdefghij" for kind in ("red", "blue")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), "plain", 64)


def quick(**more: Any) -> Settings:
    """Settings of a run that takes a second."""
    base: dict[str, Any] = {
        "method": "piece-f",
        "density": 0.01,
        "lr": 1e-2,
        "steps": 3,
        "batch_size": 4,
        "importance_rows": 4,
        "reference_rows": 2,
        "reference_tokens": 6,
        "window": 16,
    }
    return Settings(**{**base, **more})


# ------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "wanted one JSON object, got {"),
        ("[1, 2]", "wanted an object"),
        ('{"prompt": "a"}', "wanted the keys 'prompt' and 'answer', got 'prompt'"),
        ("{}", "got no keys"),
        ('{"prompt": "a", "answer": 3}', "'answer' must be a string, got int 3"),
        ('{"prompt": null, "answer": "b"}', "'prompt' must be a string, got NoneType None"),
        ('{"prompt": "a", "answer": " "}', "'answer' must not be empty, got ' '"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n' + line + "\n")
    with pytest.raises(TaskError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nothing\.jsonl: there is no such file"):
        read_rows(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(TaskError, match="wanted at least one row, got an empty file"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="wanted UTF-8 text"):
        read_rows(tmp_path / "bytes.jsonl")
    with pytest.raises(TaskError, match="cannot be read"):
        read_rows(tmp_path)


def test_a_single_file_is_split_by_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", COLOURS)
    task = load_task("t", path, seed=1)
    assert (len(task.train), len(task.held_out), task.held_out_split) == (16, 4, "test")
    assert {*task.train, *task.held_out} == {Row(*pair) for pair in COLOURS}
    assert load_task("t", path, seed=1) == task
    assert load_task("t", path, seed=2) != task
    with pytest.raises(TaskError, match="wanted at least 2 rows"):
        load_task("t", write_rows(tmp_path / "one.jsonl", COLOURS[:1]))


def test_a_folder_brings_its_own_splits(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"must hold train\.jsonl, got an empty folder"):
        load_task("t", tmp_path)
    write_rows(tmp_path / "train.jsonl", COLOURS[:10])
    assert len(load_task("t", tmp_path).held_out) == 2  # split like a single file
    write_rows(tmp_path / "eval.jsonl", COLOURS[10:13])
    assert load_task("t", tmp_path).held_out_split == "eval"
    write_rows(tmp_path / "test.jsonl", COLOURS[13:])
    assert len(load_task("t", tmp_path).train) == 10
    assert load_task("t", tmp_path).held_out == tuple(Row(*pair) for pair in COLOURS[13:])
    assert len(load_task("t", tmp_path, prefer="eval").held_out) == 3
    with pytest.raises(TaskError, match="there is no file or folder"):
        load_task("t", tmp_path / "no")
    with pytest.raises(TaskError, match="prefer must be"):
        load_task("t", tmp_path, prefer="train")


@pytest.mark.parametrize("argument", ["zones", "zones=", "=a.jsonl", "a b=c", "a/b=c"])
def test_a_task_argument_must_be_name_and_path(argument: str) -> None:
    with pytest.raises(TaskError, match=r"--task: .*got"):
        split_argument(argument, "--task")


# --------------------------------------------------------------------------------------- encoding


def test_plain_rows_mask_all_but_answer_and_end(encoder: Encoder) -> None:
    batch = encoder.training_batch(encoder.encode_all([Row("ab", "c"), Row("a ", "cd")]))
    text = encoder.tokenizer
    ids = [text("ab c")["input_ids"] + [1], text("a cd")["input_ids"] + [1]]
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == [
        [-100, -100, *ids[0][2:]],
        [-100, -100, *ids[1][2:]],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5]


def test_padding_is_right_for_training_and_left_for_generation(encoder: Encoder) -> None:
    rows = encoder.encode_all([Row("abc", "d"), Row("a", "d")])
    batch = encoder.training_batch(rows)
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch["labels"][1, 4:].tolist() == [-100, -100]
    prompts = encoder.generation_batch(rows)
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts["input_ids"][1].tolist() == [encoder.pad_id, encoder.pad_id, *rows[1].prompt]


def test_the_chat_template_gives_prompt_and_end() -> None:
    encoder = Encoder(tiny_tokenizer(chat=True))
    assert encoder.form == "chat"
    row = encoder.encode(Row("hi", "yo"))
    assert encoder.tokenizer.decode(row.prompt) == "<|user|>hi<|end|>\n<|assistant|>"
    assert encoder.tokenizer.decode(row.answer) == "yo<|end|>"
    assert encoder.end_id == encoder.tokenizer.convert_tokens_to_ids("<|end|>")
    assert Encoder(tiny_tokenizer(chat=True), "plain").end_id == 1
    assert Encoder(tiny_tokenizer()).form == "plain"


def test_a_template_without_end_token_falls_to_eos() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert Encoder(tokenizer).end_id == tokenizer.eos_token_id


def test_long_prompts_lose_their_start() -> None:
    encoder = Encoder(tiny_tokenizer(), "plain", 8)
    row = encoder.encode(Row("abcdefghij", "xy"))
    assert encoder.tokenizer.decode(row.prompt) == "ghij"
    assert len(row) == 8 and encoder.truncated == 1
    with pytest.raises(ValueError, match=r"must take at most 7 tokens .* got 10"):
        encoder.encode(Row("a", "12345678"))


def test_bad_encoder_settings() -> None:
    with pytest.raises(ValueError, match="form must be one of auto, chat, plain, got 'x'"):
        Encoder(tiny_tokenizer(), "x")
    with pytest.raises(ValueError, match="needs a chat template"):
        Encoder(tiny_tokenizer(), "chat")
    with pytest.raises(ValueError, match="max_tokens must be at least 8, got 7"):
        Encoder(tiny_tokenizer(), "plain", 7)
    encoder = Encoder(tiny_tokenizer(), "plain")
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        encoder.text_windows("abc", 1)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        encoder.text_windows("a", 4)


def test_windows_cover_a_text_without_overlap(encoder: Encoder) -> None:
    windows = encoder.text_windows("abcdefghi", 4)
    assert [encoder.tokenizer.decode(window) for window in windows] == ["abcd", "efgh"]
    assert [len(w) for w in encoder.text_windows("abcdefghij", 4)] == [4, 4, 2]
    assert [len(w) for w in encoder.text_windows("abcdefghij", 4, 5)] == [4]


# -------------------------------------------------------------------------------------- measuring


def test_answer_loss_is_the_mean_over_tokens(encoder: Encoder) -> None:
    model = tiny_model()
    rows = encoder.encode_all([Row("a", "b"), Row("abcde", "fghij"), Row("abc", "de")])
    losses = []
    for row in rows:  # each by itself, without padding
        ids = torch.tensor([[*row.prompt, *row.answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(row.answer), reduction="none"))
    wanted = torch.cat(losses).mean().item()
    for size in (1, 2, 3):
        assert answer_loss(model, encoder, rows, size) == pytest.approx(wanted, rel=1e-5)


def test_greedy_answers_equal_a_plain_argmax_loop(encoder: Encoder) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.3  # must not matter
    rows = encoder.encode_all([Row("hello", "xy"), Row("a", "b"), Row("what", "z")])
    most = max(len(row.answer) for row in rows) + 4
    wanted = []
    for row in rows:
        ids = list(row.prompt)
        for _ in range(most):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == encoder.end_id:
                break
        text = encoder.tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
        wanted.append(text.strip())
    assert greedy_answers(model, encoder, rows, 3) == wanted
    assert greedy_answers(model, encoder, rows, 1) == wanted


def test_a_learned_task_is_answered_exactly(encoder: Encoder) -> None:
    model = tiny_model()
    rows = [Row("a", "red"), Row("b", "blue")]
    assert evaluate(model, encoder, rows).accuracy == 0
    settings = quick(method="full", lr=1e-2, steps=60, batch_size=2)
    trained = train_task(model, encoder, encoder.encode_all(rows), "t", settings, None)
    score = evaluate(model, encoder, [*rows, Row("a", " red "), Row("a", "green")])
    assert score.accuracy == 0.75
    assert score.rows == 4
    assert trained.losses[-1] < 0.5 < trained.losses[0]
    assert not model.training
    with pytest.raises(ValueError, match="wanted at least one row, got none"):
        evaluate(model, encoder, [])


def test_perplexity_is_weighted_by_tokens(encoder: Encoder) -> None:
    model = tiny_model()
    windows = tuple(tuple(w) for w in encoder.text_windows("the quick brown fox", 8))
    sums, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        sums += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    found = perplexity(model, encoder, Text("t", windows), 2)
    assert found == pytest.approx(math.exp(sums / count), rel=1e-5)


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "best"}, "method must be one of .*, got 'best'"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density must be above 0"),
        ({"lr": -1.0}, "lr must be a finite number above 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": None, "epochs": 0.0}, "epochs must be"),
        ({"epochs": 1.0}, "wanted steps or epochs, got both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": 0}, "accumulation must be"),
        ({"warmup": 1.1}, "warmup must be between 0 and 1"),
        ({"clip": -1.0}, "clip must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"importance_rows": 0}, "importance_rows must be"),
        ({"window": 1}, "window must be at least 2"),
        ({"prompt_format": "x"}, "prompt_format must be one of"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, got 'float64'"),
        ({"method": "full", "dtype": "bfloat16"}, "full needs dtype float32, got bfloat16"),
        ({"method": "piece-f", "keep_statistics": True}, "belongs to piece-g, got method piece-f"),
        ({"method": "piece-f", "reference": "a=b"}, "reference belongs to piece-g"),
        ({"method": "piece-f", "xi": 0.1}, "xi belongs to piece-s"),
        ({"method": "piece-s", "xi": 0.0}, "xi must be"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**bad)


def test_epochs_become_whole_steps() -> None:
    assert quick(steps=7).step_count(1000) == 7
    assert quick(steps=None).step_count(10) == 8  # 3 passes over 10 rows by 4
    assert quick(steps=None, epochs=0.1, accumulation=2).step_count(10) == 1


# --------------------------------------------------------------------------------------- training


def test_every_pass_takes_every_row_once() -> None:
    rows = [EncodedRow((i,), (1,)) for i in range(5)]
    batches = itertools.islice(shuffled_batches(rows, 2, 0, "t"), 5)
    order = [row.prompt[0] for batch in batches for row in batch]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5] != order[5:]
    assert sample_rows(rows, 3, 0, "t") == sample_rows(rows, 3, 0, "t")
    assert len({row.prompt for row in sample_rows(rows, 99, 0, "t")}) == 5


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert [rate_factor(step, 2, 1.0) for step in range(2)] == [0.5, 1.0]
    assert rate_factor(0, 1, 0.0) == 1.0


def test_full_training_is_adamw_on_everything(encoder: Encoder) -> None:
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    settings = quick(method="full", accumulation=2, weight_decay=0.1)
    model, wanted = tiny_model(), tiny_model()
    trained = train_task(model, encoder, rows, "t", settings, None)
    assert trained.trained == sum(p.numel() for p in wanted.parameters())

    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1.0, weight_decay=0.1)
    batches = shuffled_batches(rows, 4, 0, "t")
    wanted.train()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate_factor(step, 3, 0.1)
        optimizer.zero_grad()
        for _ in range(2):
            (wanted(**encoder.training_batch(next(batches))).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sparse_training_moves_the_selection_only(
    encoder: Encoder, dtype: torch.dtype, checkpointing: bool
) -> None:
    model = tiny_model().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    settings = quick(gradient_checkpointing=checkpointing, dtype=name, lr=5e-2)
    selection = Chooser(encoder, settings).select(model, rows, "t", 0)
    trained = train_task(model, encoder, rows, "t", settings, selection)
    assert trained.trained == selection.k
    moved = 0
    for name, parameter in model.named_parameters():
        changed = (parameter.detach() != before[name]).flatten()
        moved += int(changed.sum())
        if name in selection.indices:
            changed[selection.indices[name]] = False
        assert not changed.any(), name
        assert parameter.requires_grad and parameter.grad is None
    assert moved > selection.k / 2


def test_a_loss_that_is_not_finite_stops_the_training(encoder: Encoder) -> None:
    model = tiny_model()
    rows = encoder.encode_all([Row(*pair) for pair in COLOURS])
    selection = Chooser(encoder, quick()).select(model, rows, "t", 0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="task t: the loss must be finite, got nan at step 1"):
        train_task(model, encoder, rows, "t", quick(), selection)
    assert all(p.requires_grad for p in model.parameters())  # unwrapped


# -------------------------------------------------------------------------------------------- run


def tasks_in(folder: Path) -> list[tuple[Task, Path]]:
    """Two small tasks."""
    pairs = []
    for name, rows in (("one", COLOURS), ("two", [(p, p.upper()) for p, _ in COLOURS])):
        path = write_rows(folder / f"{name}.jsonl", rows)
        pairs.append((load_task(name, path), path))
    return pairs


def texts_in(folder: Path) -> list[tuple[str, Path]]:
    (folder / "english.txt").write_text("the quick brown fox jumps over the lazy dog")
    return [("english", folder / "english.txt")]


@pytest.mark.parametrize("method", [*METHODS, "full"])
def test_a_run_measures_trains_and_saves(folder: Path, tmp_path: Path, method: str) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    settings = quick(method=method, keep_statistics=method == "piece-g")
    results = run(
        str(folder), tasks_in(tmp_path), settings, out, texts=texts_in(tmp_path), say=said.append
    )
    value = json.loads((out / "results.json").read_text())
    assert value["complete"] and value == {**results.as_dict(), "written": value["written"]}
    assert [[x is None for x in row] for row in value["accuracy"]] == [
        [False, False],
        [False, True],
        [False, False],
    ]
    assert len(value["general_loss"]) == 3 and value["texts"][0]["tokens"] == 43
    assert len(said) == 2 and "task 1 of 2, one" in said[0]
    assert not (tmp_path / "out.unfinished").exists()
    total = sum(p.numel() for p in tiny_model().parameters())
    k = total if method == "full" else int(0.01 * total)
    assert [task["trained"] for task in value["tasks"]] == [k, k]
    assert len(value["tasks"][0]["losses"]) == 3

    model = load_model(str(out / "model"))
    load_tokenizer(str(out / "model"))
    base = dict(tiny_model().named_parameters())
    changed = {n: (p != base[n]).flatten().nonzero()[:, 0] for n, p in model.named_parameters()}
    if method == "full":
        assert not (out / "selections").exists()
        return
    chosen: dict[str, set[int]] = {}
    for i, name in enumerate(("one", "two"), start=1):
        selection = Selection.load(out / "selections" / f"{i}-{name}.safetensors")
        assert selection.k == k and selection.method == method
        for tensor, indices in selection.indices.items():
            chosen.setdefault(tensor, set()).update(indices.tolist())
    for name, positions in changed.items():
        assert set(positions.tolist()) <= chosen.get(name, set())
    assert (out / "statistics" / "one.safetensors").exists() == (method == "piece-g")
    text = format_results(results)
    assert f"{method}, {k:,} of {total:,} parameters a task" in text
    assert "after one" in text and "one" in text


def test_the_same_seed_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        results = run(str(folder), tasks_in(tmp_path), quick(method="piece-g"), tmp_path / name)
        found.append((results.loss, [task.losses for task in results.tasks]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["rows.jsonl", "words.txt"])
def test_a_reference_may_be_rows_or_text(folder: Path, tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "rows.jsonl", COLOURS)
    (tmp_path / "words.txt").write_text("some words that must be kept as they are")
    settings = quick(method="piece-g", reference=f"keep={tmp_path / name}")
    results = run(str(folder), tasks_in(tmp_path)[:1], settings, tmp_path / "out", save=False)
    assert results.complete
    assert not (tmp_path / "out" / "model").exists()
    for reference in ("words", f"keep={tmp_path}/none.txt"):
        settings = quick(method="piece-g", reference=reference)
        with pytest.raises(TaskError):
            run(str(folder), tasks_in(tmp_path), settings, tmp_path / "new")
    assert not (tmp_path / "new.unfinished").exists()


def test_bad_runs_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    with pytest.raises(TaskError, match="wanted at least one task, got none"):
        run(str(folder), [], quick(), out)
    with pytest.raises(TaskError, match="a name of its own, got 'one' twice"):
        run(str(folder), [tasks[0], tasks[0]], quick(), out)
    with pytest.raises(ModelError, match="wanted a folder or a hub id, got no such folder"):
        run(str(tmp_path / "no"), tasks, quick(), out)
    with pytest.raises(TaskError, match=r"none\.txt: there is no such file"):
        run(str(folder), tasks, quick(), out, texts=[("t", tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="must take at most 7 tokens"):
        long = Task("t", (Row("a", "b" * 20),), (Row("a", "b"),), "test")
        run(str(folder), [(long, tmp_path)], quick(max_tokens=8), out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_is_replaced_only_by_a_complete_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, out = tasks_in(tmp_path), tmp_path / "out"
    run(str(folder), tasks[:1], quick(), out, save=False)
    first = (out / "results.json").read_text()
    with pytest.raises(OutputError, match="already holds a run; choose another folder, or --over"):
        run(str(folder), tasks, quick(), out)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(str(folder), tasks, quick(), out, overwrite=True)
    assert (out / "results.json").read_text() == first
    left = json.loads((tmp_path / "out.unfinished" / "results.json").read_text())
    assert not left["complete"] and len(left["accuracy"]) == 1

    with pytest.raises(OutputError, match="already holds a run"):
        run(str(folder), tasks, quick(), out)
    run(str(folder), tasks, quick(), out, overwrite=True, save=False)
    assert len(json.loads((out / "results.json").read_text())["tasks"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "out", "two.jsonl"]


def test_output_folders_that_are_no_runs_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files"):
        RunFolder(tmp_path / "mine", overwrite=True)
    with pytest.raises(OutputError, match="got a file of that name"):
        RunFolder(tmp_path / "mine" / "thesis.txt", overwrite=True)
    (tmp_path / "new.unfinished").mkdir()
    with pytest.raises(OutputError, match="an unfinished run is in"):
        RunFolder(tmp_path / "new", overwrite=False)
    RunFolder(tmp_path / "new", overwrite=True).start()
    (tmp_path / "new.unfinished" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is in the way and is not an unfinished run"):
        RunFolder(tmp_path / "new", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        RunFolder(tmp_path / "mine" / "thesis.txt" / "run", overwrite=False).start()
    with pytest.raises(OutputError, match="a folder of its own"):
        RunFolder(Path("/"), overwrite=True)
    (tmp_path / "empty").mkdir()
    target = RunFolder(tmp_path / "empty", overwrite=False)
    target.start()
    (target.work / "results.json").write_text('{"format": "piece_ops.run"}')
    target.finish()
    assert is_run(tmp_path / "empty") and not is_run(tmp_path / "mine")


# ----------------------------------------------------------------------------------- models, rest


def test_models_that_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json, got none"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="got the folder of a run, whose model is"):
        save_tiny(tmp_path / "model")
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        load_model(str(folder), dtype="int8")
    broken = save_tiny(tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(ModelError, match=r"broken: cannot be loaded: SafetensorError"):
        load_model(str(broken))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(broken))
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*model\.norm\.weight"):
        load_model(str(tmp_path))


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"a run needs .*: pip install piece_ops\[train\]"
    ):
        require("piece_ops_no_such_package", "a run")
    assert require("json", "a run") is json


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_summary_and_the_table_follow_the_matrices() -> None:
    records = [TaskRecord(name, name, "test", 8, 10, 0, trained=5) for name in "ab"]
    results = Results("m", quick(), 1000, records, [])
    results.accuracy = [[0.0, 0.1], [0.8, None], [0.5, 0.9]]
    results.loss = [[9.0, 8.0], [1.0, None], [2.0, math.nan]]
    summary = results.summary()
    assert summary["accuracy_base"] == pytest.approx(0.05)
    assert summary["accuracy_learned"] == pytest.approx(0.85)
    assert summary["accuracy_final"] == pytest.approx(0.7)
    assert summary["accuracy_backward_transfer"] == pytest.approx(-0.3)
    assert summary["loss_backward_transfer"] == pytest.approx(1.0)
    assert summary["log_perplexity_drift"] is None
    assert results.as_dict()["loss"][2] == [2.0, None]
    lines = format_results(results).splitlines()
    assert next(line for line in lines if line.startswith("a ")).split()[1:6] == [
        *("10", "0.0", "80.0", "50.0", "-30.0"),
    ]
    assert format_table(["a", "b"], [["x", "10"]]) == "a   b\n-----\nx  10"
