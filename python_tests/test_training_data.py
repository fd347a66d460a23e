"""Tasks as files and as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from piece_ops.training import Encoder, Row, load_task
from piece_ops.training.tasks import TaskError, read_rows, split_argument

from helpers.tiny_lm import COLOURS, tiny_tokenizer, write_rows


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), "plain", 64)


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
    few = load_task("t", tmp_path, train_rows=4, held_out_rows=2)
    assert few.train == tuple(Row(*pair) for pair in COLOURS[:4])
    assert few.held_out == tuple(Row(*pair) for pair in COLOURS[13:15])
    with pytest.raises(TaskError, match="there is no file or folder"):
        load_task("t", tmp_path / "no")
    with pytest.raises(TaskError, match="prefer must be"):
        load_task("t", tmp_path, prefer="train")


@pytest.mark.parametrize("argument", ["zones", "zones=", "=a.jsonl", "a b=c", "a/b=c"])
def test_a_task_argument_must_be_name_and_path(argument: str) -> None:
    with pytest.raises(TaskError, match=r"--task: .*got"):
        split_argument(argument, "--task")


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


def test_long_answers_lose_their_end_if_asked() -> None:
    encoder = Encoder(tiny_tokenizer(), "plain", 8, max_answer_tokens=3)
    row = encoder.encode(Row("a", "12345678"))
    assert encoder.tokenizer.decode(row.answer) == " 12" and encoder.cut_answers == 1
    assert encoder.encode(Row("a ", "12")).answer[-1] == encoder.end_id  # fits with its end token
    assert encoder.cut_answers == 1


def test_bad_encoder_settings() -> None:
    with pytest.raises(ValueError, match="max_answer_tokens must be at least 1, got 0"):
        Encoder(tiny_tokenizer(), max_answer_tokens=0)
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
