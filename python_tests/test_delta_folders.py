"""Deltas on model folders: bit for bit, all or nothing, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from piece_ops import Delta, PieceModel, Selection
from piece_ops.cli import main
from piece_ops.delta import rewrite
from piece_ops.delta.folder import INDEX, mark

from helpers.deltas import same, snapshot, train
from helpers.tiny_models import MODELS, llama


class Case:
    """A model folder and a delta of it."""

    def __init__(self, folder: Path, model: nn.Module, *, shards: bool) -> None:
        self.folder, self.model = folder / "model", model
        model.save_pretrained(self.folder, max_shard_size="10KB" if shards else "1GB")  # type: ignore[operator]
        (self.folder / "notes.txt").write_text("kept")
        self.base = self.files()
        self.delta = train(model, task="mail")
        self.trained = snapshot(model)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def loaded(self, folder: Path) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return model


@pytest.fixture(params=["one file", "shards"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    found = Case(tmp_path, llama(), shards=request.param == "shards")
    assert ((found.folder / INDEX).exists()) == (request.param == "shards")
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_changed_in_place_and_back(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, MODELS[kind](), shards=False)
    assert rewrite(case.delta, case.folder) == 1
    assert same(case.loaded(case.folder), case.trained)
    with pytest.raises(ValueError, match=r"^piece_ops\.delta\.apply: .*applied already"):
        rewrite(case.delta, case.folder)
    assert rewrite(case.delta, case.folder, revert=True) == 1
    assert case.files() == case.base
    with pytest.raises(ValueError, match=r"^piece_ops\.delta\.revert: .*not applied"):
        rewrite(case.delta, case.folder, revert=True)


def test_a_new_folder_holds_everything_and_the_old_one_stays(case: Case, tmp_path: Path) -> None:
    (case.folder / "pytorch_model.bin").write_text("other weights")
    kept, out = case.files(), tmp_path / "out"
    rewrite(case.delta, case.folder, out)
    assert case.files() == kept
    names = {path.name for path in out.iterdir()}
    assert names == set(kept) - {"pytorch_model.bin"}
    assert same(case.loaded(out), case.trained)
    with pytest.raises(ValueError, match="the output must not exist yet"):
        rewrite(case.delta, case.folder, out)
    rewrite(case.delta, out, tmp_path / "back", revert=True)
    assert all((tmp_path / "back" / name).read_bytes() == case.base[name] for name in case.base)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "back"}


def test_shards_in_place(case: Case) -> None:
    count = rewrite(case.delta, case.folder)
    assert count == len([name for name in case.base if name.endswith(".safetensors")])
    assert same(case.loaded(case.folder), case.trained)
    assert case.files().keys() == case.base.keys()
    rewrite(case.delta, case.folder, revert=True)
    assert case.files() == case.base


def test_only_files_with_changed_tensors_are_written(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    shape = tuple(model.lm_head.weight.shape)
    wrapped = PieceModel(
        model, Selection({"lm_head.weight": torch.tensor([3])}, {"lm_head.weight": shape}, 10**6)
    )
    with torch.no_grad():
        wrapped.values.lm_head.weight += 1
    delta = wrapped.delta()
    before = {path.name: path.stat().st_ino for path in (tmp_path / "a").iterdir()}
    assert rewrite(delta, tmp_path / "a") == 1
    after = {path.name: path.stat().st_ino for path in (tmp_path / "a").iterdir()}
    assert len([name for name in before if before[name] != after[name]]) <= 2  # it, and the index


def test_links_into_a_cache_are_replaced_not_followed(case: Case, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    shutil.move(case.folder, blobs)
    case.folder.mkdir()
    for path in blobs.iterdir():
        (case.folder / path.name).symlink_to(path)
    rewrite(case.delta, case.folder)
    assert same(case.loaded(case.folder), case.trained)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == case.base


def elsewhere(case: Case) -> Delta:
    """A delta of one coordinate that the case's delta leaves alone, and of its base values."""
    name = "lm_head.weight"
    taken = set(case.delta.indices[name].tolist())
    at = torch.tensor([next(i for i in range(len(taken) + 1) if i not in taken)])
    held = case.trained[name].reshape(-1)[at]
    shapes, dtypes = case.delta.shapes, case.delta.dtypes
    return Delta({name: at}, {name: held + 1}, {name: held}, shapes, dtypes, fingerprint="any")


@pytest.mark.parametrize("moment", range(9))
@pytest.mark.parametrize("revert", [False, True])
def test_a_crash_at_any_moment_is_noticed_and_mended(
    moment: int, revert: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at each rename in turn: the folder is old, new, or cannot be loaded."""
    case = Case(tmp_path, llama(), shards=True)
    if revert:
        rewrite(case.delta, case.folder)
    old = case.files()
    calls = 0

    class Killed(BaseException):
        pass

    def stop(real: Any) -> Any:
        def call(*paths: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            real(*paths)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop(os.rename))
        patched.setattr(os, "replace", stop(os.replace))
        patched.setattr(Path, "unlink", lambda *_args, **_more: None)  # nothing is tidied up
        shards = len(list(case.folder.glob("model-*.safetensors")))
        assert shards > 3
        if moment < shards + 2:
            with pytest.raises(Killed):
                rewrite(case.delta, case.folder, revert=revert)
        else:
            rewrite(case.delta, case.folder, revert=revert)
    if 1 <= moment < shards + 2:
        assert (case.folder / (INDEX + mark(case.delta.digest))).exists()
        with pytest.raises(OSError):
            case.loaded(case.folder)
        with pytest.raises(ValueError, match="interrupted apply or revert"):
            rewrite(case.delta, case.folder, tmp_path / "out", revert=revert)
        assert main(["delta", "diff", str(case.folder), str(case.folder)]) == 2
        other = elsewhere(case)
        half = case.files()
        with pytest.raises(ValueError, match=r"of the delta \w{12}, which must be called again"):
            rewrite(other, case.folder, strict=False)
        assert case.files() == half
        rewrite(case.delta, case.folder, revert=revert)
    elif moment == 0:
        assert {n: b for n, b in case.files().items() if n in old} == old
        rewrite(case.delta, case.folder, revert=revert)
    done = {name: data for name, data in case.files().items() if not name.endswith(".tmp")}
    if revert:
        assert done == case.base
    else:
        assert same(case.loaded(case.folder), case.trained)
    assert done.keys() == case.base.keys()


def test_the_wrong_folder_is_refused_and_untouched(case: Case, tmp_path: Path) -> None:
    other = llama(seed=1)
    other.save_pretrained(tmp_path / "other")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    for out in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"must hold the base values .* other bits at \d+ of"):
            rewrite(case.delta, tmp_path / "other", out)
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == kept
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is missing"):
        llama(tied=True).save_pretrained(tmp_path / "tied")
        rewrite(case.delta, tmp_path / "tied")


def test_extra_tensors_need_no_strict(case: Case) -> None:
    path = next(iter(sorted(case.folder.glob("*.safetensors"))))
    if (case.folder / INDEX).exists():
        index = json.loads((case.folder / INDEX).read_text())
        index["weight_map"]["extra"] = path.name
        (case.folder / INDEX).write_text(json.dumps(index))
    save_file(
        {**load_file(path), "extra": torch.zeros(2, dtype=torch.int64)}, path, {"format": "pt"}
    )
    with pytest.raises(ValueError, match="'extra' is unknown"):
        rewrite(case.delta, case.folder)
    rewrite(case.delta, case.folder, strict=False)
    assert same(case.loaded(case.folder), case.trained)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / INDEX).write_text("{"), "must be an index"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../x"}}'), "must lie beside"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "gone"}}'), "gone"),
        (
            lambda f: (f / INDEX).write_text(
                '{"weight_map": {"a": "model-00001-of-00006.safetensors"}}'
            ),
            r"got 1 tensors that it lacks: \['a'\]",
        ),
        (
            lambda f: os.truncate(f / "model-00002-of-00006.safetensors", 1000),
            "not a whole safetensors file",
        ),
        (lambda f: os.remove(f / INDEX), r"must hold model.safetensors, or"),
    ],
)
def test_damaged_folders_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    case = Case(tmp_path, llama(), shards=True)
    assert (case.folder / "model-00006-of-00006.safetensors").exists()
    spoil(case.folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rewrite(case.delta, case.folder)


def test_a_file_of_another_program(tmp_path: Path) -> None:
    """One safetensors file whose tensors do not lie on multiples of their size."""
    model = nn.Linear(3, 2).to(torch.bfloat16)
    delta = train(model)
    delta.revert_(model)
    save_file(dict(model.state_dict()), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    size = int.from_bytes(data[:8], "little")
    odd = data[8 : 8 + size].rstrip(b" ")
    odd += b" " * (1 - len(odd) % 2)
    (tmp_path / "a").write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + size :])
    assert len(odd) % 2 == 1
    rewrite(delta, tmp_path / "a", tmp_path / "b")
    with delta.applied(model):
        for name, weight in load_file(tmp_path / "b").items():
            assert torch.equal(weight, model.get_parameter(name))


# ----------------------------------------------------------------------------------- command line


def test_command_line(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, found = str(tmp_path / "mail.safetensors"), str(tmp_path / "found.safetensors")
    case.delta.save(file)
    assert main(["delta", "apply", file, str(case.folder), "--out", str(tmp_path / "new")]) == 0
    assert f"apply: {case.delta.k:,} weights in" in capsys.readouterr().out
    folders = [str(case.folder), str(tmp_path / "new")]
    assert main(["delta", "diff", *folders, "--out", found, "--task", "t"]) == 0
    shown = capsys.readouterr().out
    assert "lm_head.weight" in shown and f"base: {case.folder}" in shown
    assert Delta.load(found).overlap(case.delta).shared == case.delta.k == Delta.load(found).k
    assert main(["delta", "show", file, found]) == 0
    shown = capsys.readouterr().out
    assert "task='mail'" in shown and f"{case.delta.k:,} coordinates in both (100.00 % of" in shown
    assert main(["delta", "revert", file, folders[1]]) == 0
    assert main(["delta", "revert", file, folders[1]]) == 2
    assert "piece-ops delta: piece_ops.delta.revert:" in capsys.readouterr().err
    assert main(["delta", "apply", file, folders[1], "--no-strict"]) == 0
    assert main(["delta", "show", str(tmp_path / "none")]) == 2
    assert "wanted a file" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        main(["delta", "show", str(tmp_path / "none"), "--debug"])


def test_the_command_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from piece_ops.cli import main; main(['delta', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "diff" in done.stdout
