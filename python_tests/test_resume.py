"""A run that is killed at any moment and resumed ends with the bits of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from piece_ops import cli
from piece_ops.training.output import OutputError, RunFolder

from helpers.killing import check_readable, events, outcome, run_to_end, run_until_event
from helpers.killing_often import MOMENTS, kill_every_kind, kill_often
from helpers.small_runs import FILES, KINDS, PAIRS, command, make_data
from helpers.tiny_lm import save_tiny, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_another_run_is_not_resumed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    start = command(data, out, "piece-f in bfloat16")
    run_until_event(start, tmp_path / "log", 12)
    one, two, words = (f"{n}={data / f}" for n, f in FILES)
    other = tmp_path / "other"
    save_tiny(other / "model", seed=1)
    write_rows(other / "one.jsonl", PAIRS[:-1])
    (other / "words.txt").write_text("other words")
    before = contents(tmp_path)

    def refused(*changes: tuple[str, str]) -> str:
        arguments = [*start, "--resume"]
        for old, new in changes:
            arguments = [new if argument == old else argument for argument in arguments]
        assert cli.main(arguments) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("piece-ops train: resume: the run was started with other settings")
        assert contents(tmp_path) == before
        return line

    line = refused(("0.02", "0.03"), ("8", "9"))
    assert "setting density was 0.02, is 0.03; setting steps was 8, is 9. Give the same" in line
    assert "task content one was" in refused((one, f"one={other / 'one.jsonl'}"))
    assert 'task names was "one, two", is "two, one"' in refused(
        (one, "swap"), (two, one), ("swap", two)
    )
    assert "general text content words was" in refused((words, f"words={other / 'words.txt'}"))
    assert "base model was" in refused((str(data / "model"), str(other / "model")))


def test_a_reference_is_known_by_its_rows_and_not_by_its_place(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = write_rows(tmp_path / "kept.jsonl", PAIRS[:5])
    start = command(data, tmp_path / "out", "piece-g")
    run_until_event([*start, "--reference", f"kept={kept}"], tmp_path / "log", 12)
    kept.rename(tmp_path / "moved.jsonl")
    write_rows(kept, PAIRS[5:])
    assert cli.main([*start, "--reference", f"kept={kept}", "--resume"]) == 2
    assert "reference content was" in capsys.readouterr().err
    moved = f"={tmp_path / 'moved.jsonl'}"
    assert cli.main([*start, "--reference", f"other{moved}", "--resume"]) == 2
    assert 'setting reference was "kept", is "other"' in capsys.readouterr().err
    assert cli.main([*start, "--reference", f"kept{moved}", "--resume"]) == 0


def test_a_run_that_works_or_is_complete(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(data, out, "lora")
    with RunFolder(out) as folder:
        assert cli.main([*arguments, "--resume"]) == 2
        assert f"process {os.getpid()} is at work on" in capsys.readouterr().err
        folder.work.joinpath("state.json").write_text('{"format": "piece_ops.run_state"}')
    assert cli.main([*arguments, "--resume"]) == 2
    assert "state.json is damaged" in capsys.readouterr().err
    assert cli.main(arguments) == 2
    assert "--resume goes on with it, --overwrite drops it" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--overwrite"]) == 2
    assert "wanted --resume or --overwrite, got both" in capsys.readouterr().err
    shutil.rmtree(folder.work)
    assert cli.main([*arguments, "--resume"]) == 0
    assert "there is no run in" in capsys.readouterr().out
    before = contents(tmp_path)
    assert cli.main([*arguments, "--resume"]) == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    assert cli.main([*arguments, "--resume", "--seed", "5"]) == 2
    assert "setting seed was 0, is 5" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_run_that_another_process_completes_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder(out) as folder:
        (folder.work / "state.json").write_text('{"format": "piece_ops.run_state"}')
        late = RunFolder(out, resume=True)
        with pytest.raises(OutputError, match=r"that process \d+ is at work on"), late:
            pass
        folder.finish()
    with pytest.raises(OutputError, match="another process has just completed it"), late:
        pass
    assert RunFolder(out, resume=True).is_complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_half_dropped_is_started_anew(data: Path, tmp_path: Path) -> None:
    log, whole, out = tmp_path / "log", tmp_path / "whole", tmp_path / "out"
    run_to_end(command(data, whole, "lora"), log)
    run_until_event([*command(data, out, "lora"), "--seed", "3"], log, 60)
    work = tmp_path / "out.unfinished"
    assert list((work / "checkpoints").iterdir())
    (work / "state.json").unlink()  # what --overwrite removes first
    run_to_end([*command(data, out, "lora"), "--resume"], log)
    assert outcome(out) == outcome(whole)


def test_an_interrupted_run_says_how_to_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = command(data, tmp_path / "out", "full")
    with monkeypatch.context() as patch:
        patch.setattr("piece_ops.training.work.train_task", interrupted)
        assert cli.main(arguments) == 130
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert "task 1 of 2, one, training" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(data, tmp_path / "out", "lora")
    run_until_event(arguments, tmp_path / "log", 40)
    path = tmp_path / "out.unfinished" / "checkpoints" / "1-one.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert cli.main([*arguments, "--resume"]) == 2
    assert "1-one.safetensors' is not a whole safetensors file" in capsys.readouterr().err
    path.write_bytes(whole.replace(b"values/base", b"values/Base"))
    assert cli.main([*arguments, "--resume"]) == 2
    assert "1-one.safetensors' is damaged" in capsys.readouterr().err
    path.write_bytes(whole)
    assert cli.main([*arguments, "--resume"]) == 0


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file's bytes, the lock's aside."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "log"))
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, kind: str) -> None:
    kill_often(data, tmp_path, kind, 1 if kind != "piece-g" else 3, seed=1)


@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    at = kill_every_kind(tmp_path)
    assert at.total() >= 50
    assert all(at[moment] for moment in MOMENTS), at


def first_task(arguments: list[str]) -> list[str]:
    """The same command with the second task left out."""
    kept = list(arguments)
    for option, value in itertools.pairwise(arguments):
        if value.startswith("two="):
            at = kept.index(value)
            assert kept[at - 1] == option
            del kept[at - 1 : at + 1]
    return kept


@pytest.mark.parametrize("kind", ["piece-g", "lora"])
def test_a_complete_run_goes_on_with_appended_tasks(data: Path, tmp_path: Path, kind: str) -> None:
    """The end is that of a run which had them from the start, killed on the way or not."""
    log, whole, out = tmp_path / "log", tmp_path / "whole", tmp_path / "out"
    run_to_end(command(data, whole, kind), log)
    longer = [*command(data, out, kind), "--resume"]
    run_to_end(first_task(command(data, out, kind)), log)
    short = outcome(out)
    for event in (1, 5, 25, 40):  # copying, then measuring the base model, then the new task
        assert run_until_event(longer, log, event)
        assert outcome(out) == short
    run_to_end(longer, log)
    assert outcome(out) == outcome(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "log"}


def test_what_cannot_be_appended_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    longer = [*command(data, out, "full"), "--resume"]
    run_to_end(first_task(command(data, out, "full")), log)
    before = contents(tmp_path)
    assert cli.main(longer) == 2
    assert "that keep what each task changed, got full" in capsys.readouterr().err
    assert cli.main([*longer, "--seed", "1"]) == 2
    assert "setting seed was 0, is 1" in capsys.readouterr().err
    one, two, _ = (f"{name}={data / file}" for name, file in FILES)
    assert cli.main([{one: two, two: one}.get(argument, argument) for argument in longer]) == 2
    assert 'task names was "one", is "two, one"' in capsys.readouterr().err
    assert contents(tmp_path) == before
    run_until_event(first_task(command(data, tmp_path / "half", "lora")), log, 30)
    assert cli.main([*command(data, tmp_path / "half", "lora"), "--resume"]) == 2
    assert "tasks can be appended to a complete run" in capsys.readouterr().err


def kill_at_events(
    data: Path, tmp_path: Path, kind: str, choose: Callable[[int], Iterable[int]]
) -> None:
    """Kill runs just before some of their flushes and renamings; they replace an earlier run."""
    whole, log = tmp_path / "whole", tmp_path / "log"
    run_to_end(command(data, whole, kind), log)
    wanted, out = outcome(whole), tmp_path / "out"
    run_to_end([*command(data, out, "piece-f in bfloat16"), "--seed", "7"], log)
    start = [*command(data, out, kind), "--overwrite"]
    run_to_end(start, log)
    for event in choose(events(log)):
        assert run_until_event(start, log, event)
        check_readable(tmp_path)
        run_to_end([*command(data, out, kind), "--resume"], log)
        assert outcome(out) == wanted, (kind, event)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", "log"}


def test_a_run_killed_while_it_writes(data: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    kill_at_events(data, tmp_path, "piece-g", lambda count: (1, draw.randrange(2, count)))


def test_a_run_killed_while_it_writes_its_report(data: Path, tmp_path: Path) -> None:
    log, whole, out = tmp_path / "log", tmp_path / "whole", tmp_path / "out"
    arguments = [option for option in command(data, out, "lora") if option != "--no-report"]
    run_to_end(command(data, whole, "lora"), log)
    assert run_until_event(arguments, log, "training.png")
    assert (tmp_path / "out.unfinished" / "report.html").exists()
    check_readable(tmp_path)
    run_to_end([*arguments, "--resume"], log)
    assert outcome(out) == outcome(whole)
    assert (out / "report.html").exists()
    names = {path.name for path in (out / "report-figures").iterdir()}
    assert names == {f"{n}.png" for n in ("scores", "stream", "training", "general", "cost")}


def test_a_run_killed_while_it_is_put_in_place(data: Path, tmp_path: Path) -> None:
    kill_at_events(data, tmp_path, "full", lambda count: (count - 12, count - 2, count - 1, count))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_before_every_write(data: Path, tmp_path: Path, kind: str) -> None:
    kill_at_events(data, tmp_path, kind, lambda count: range(1, count + 1))
