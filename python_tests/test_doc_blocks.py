"""Every fenced block of the documentation: run, or compared with what it shows.

A block of a kind that nothing here runs or compares fails. Python runs as written; so do the lines
of `piece-ops`, on a tiny model and small files under the names that they use. Lines of make and pip
need a network and minutes: their targets, variables and extras must exist.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import piece_ops
from piece_ops import cli

from helpers.tiny_lm import COLOURS, save_tiny, write_rows

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"((?:<!-- .* -->\n)*)^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
INSTALLING = ("make ", "pip ", "PIECE_OPS_CUDA=ON pip ")
# Python that another test runs, with names that it prepares; the test must be there.
ELSEWHERE = {
    "docs/interop.md": "test_interop_jax.py::test_docs_interop",
    "docs/delta_format.md": "test_delta_peers.py::"
    "test_ten_lines_of_torch_and_safetensors_apply_a_delta",
}
# What a block shows: the comment before it, and the test that compares it (of docs/trace.md it is
# test_bench_trace.py).
SHOWN = {
    "<!-- predict:begin -->": "test_predict.py::test_the_example_of_the_documentation",
    "<!-- recorded -->": "test_doc_blocks.py::test_the_demo_section_is_what_was_recorded",
    "<!-- layout -->": "test_doc_blocks.py::test_the_layout_is_that_of_the_tree",
}


class Block(NamedTuple):
    file: str
    line: int
    before: list[str]
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its lines without comments."""
        lines = [re.sub(r"(^|\s+)#.*", "", line) for line in self.text.splitlines()]
        return [line for line in lines if line]

    @property
    def kind(self) -> str:
        if self.language == "python":
            return "python"
        if self.language == "" and any(comment in SHOWN for comment in self.before):
            return "shown"
        for kind, words in (("piece-ops", ("piece-ops ",)), ("installing", INSTALLING)):
            if self.language == "" and all(c.startswith(words) for c in self.commands):
                return kind
        return "unknown"


def blocks() -> list[Block]:
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        made = [
            Block(
                str(path.relative_to(ROOT)),
                text.count("\n", 0, match.start(2)) + 1,
                match[1].splitlines(),
                match[2],
                match[3],
            )
            for match in FENCE.finditer(text)
        ]
        assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(made), path
        found += made
    return found


BLOCKS = blocks()


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def has_test(name: str) -> bool:
    file, function = name.split("::")
    text = (ROOT / "python_tests" / file).read_text(encoding="utf-8")
    return f"\ndef {function}(" in text


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_compared(block: Block) -> None:
    kind = block.kind
    assert kind != "unknown", f"{block} is neither run nor marked as one of {list(SHOWN)}"
    if kind == "shown":
        assert all(has_test(SHOWN[comment]) for comment in block.before if comment in SHOWN)
    if kind == "python" and block.file in ELSEWHERE:
        assert has_test(ELSEWHERE[block.file])


@pytest.mark.parametrize(
    ("language", "text"), [("", "ls -l\n"), ("", "piece-ops info\nls\n"), ("sh", "make bench\n")]
)
def test_a_block_of_another_kind_is_unknown(language: str, text: str) -> None:
    assert Block("README.md", 1, ["<!-- a comment -->"], language, text).kind == "unknown"


@pytest.mark.parametrize(
    "file", sorted({block.file for block in of_kind("python")} - set(ELSEWHERE))
)
def test_python(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a file one after another, but for the folder of the model: a tiny one."""
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    save_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)  # they write files
    names: dict[str, Any] = {}
    for block in of_kind("python"):
        if block.file == file:
            exec(re.sub(r'folder = ".*?"', f"folder = {str(tmp_path)!r}", block.text), names)
    if file == "README.md":
        assert isinstance(names["top"], piece_ops.TopK)
        assert piece_ops.Delta.from_pretrained("run").task == "capitals"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: MODEL, tasks, and a run for those that show one."""
    folder: Path = tmp_path_factory.mktemp("commands")
    save_tiny(folder / "MODEL")
    for name in ("mail", "law"):
        write_rows(folder / f"{name}.jsonl", COLOURS)
    for name in ("RUN", "other-run"):
        train = ["train", "--model", str(folder / "MODEL"), "--out", str(folder / name)]
        train += ["--task", f"mail={folder / 'mail.jsonl'}", *FAST, "--method", "random"]
        assert cli.main(train) == 0
    return folder


# So that a training run takes seconds. Given twice, the last one counts.
FAST = (
    "--steps 2 --batch-size 4 --importance-rows 2 --reference-rows 2 --reference-tokens 5".split()
)


@pytest.mark.parametrize("block", of_kind("piece-ops"), ids=str)
def test_piece_ops(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line after another: later ones use what earlier ones wrote."""
    monkeypatch.chdir(place)
    shutil.rmtree("run", ignore_errors=True)
    for command in block.commands:
        words = [word for word in shlex.split(command)[1:] if word != "..."]
        if words[0] == "train":
            words += FAST
        if "--out" in words and Path(words[words.index("--out") + 1]).is_file():
            Path(words[words.index("--out") + 1]).unlink()
        assert cli.main(words) == 0, command


@pytest.mark.parametrize("block", of_kind("installing"), ids=str)
def test_make_and_pip(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("optional-dep")[1]
    for command in block.commands:
        words = [word for word in shlex.split(command) if "=" not in word]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        else:
            assert words[:2] == ["pip", "install"] and len(words) == 3, command
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
            assert extra, command
            assert not extra[1] or f"\n{extra[1]} = [" in extras, command


def test_targets_and_variables_of_make_in_the_text() -> None:
    """`make bench`, `make smoke TORCH=2.10.0` anywhere: the target and the variable exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [
        match for path in FILES for match in re.findall(r"`make ([^`]+)`", path.read_text("utf-8"))
    ]
    assert len(named) > 5
    for words in map(shlex.split, named):
        for word in words:
            name, _, value = word.partition("=")
            used = f"$({name})" in makefile or f"$(if $({name})" in makefile
            assert used if value else re.search(rf"^{name}:", makefile, re.MULTILINE), words


def test_the_demo_section_is_what_was_recorded() -> None:
    from demo.compare import read_recorded
    from demo.readme import section

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- demo:begin -->\n")[1].split("<!-- demo:end -->")[0]
    assert shown == section(read_recorded())


def test_the_layout_is_that_of_the_tree() -> None:
    """Every path at the start of a line of a layout exists."""
    shown = [block for block in of_kind("shown") if "<!-- layout -->" in block.before]
    assert shown
    for block in shown:
        paths = [line.split()[0] for line in block.text.splitlines() if line[:1].strip()]
        assert len(paths) > 5
        assert [path for path in paths if not (ROOT / path).exists()] == []
