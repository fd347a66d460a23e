"""Builds the demo's tasks and texts from data that comes with Python.

=======  =========================================  =========================================
task     prompt (two lines)                         answer
=======  =========================================  =========================================
zones    Place: Bamako / Region:                    Africa, America, Asia, Europe or Oceania
names    Character: combining grave accent / Kind:  letter, mark, number, punctuation, symbol
scripts  Letter: <one character> / Script:          one of 12, Arabic to Thai
=======  =========================================  =========================================

The base model writes sentences where one word is wanted, so it starts at 0 %. The answers are about
equally frequent; always giving the same one would be right in 24 % (zones), 20 % (names) and 9 %
(scripts) of the test rows.

Sources: ``tzdata`` (zone.tab and iso3166.tab: cities and countries), ``unicodedata.ucd_3_2_0`` (the
Unicode 3.2 database that every Python carries unchanged), ``pydoc_data.topics`` (English text) and
the source of a few library modules (code). The three tasks are the same on every Python for the
same tzdata; the two texts differ a little between Python versions, so compare their perplexities
within one machine only.

Rows are drawn by the SHA-256 of their text, so nothing depends on a random generator. Train, eval
and test rows share no prompt and, for zones, no country.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import inspect
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from piece_ops._files import write_text

T = TypeVar("T")

SIZES = {"test": 100, "eval": 60, "train": 240}
"""Rows of each split; the order is that of filling."""

AREAS = {
    "Africa": "Africa",
    "America": "America",
    "Asia": "Asia",
    "Europe": "Europe",
    "Pacific": "Oceania",
    "Australia": "Oceania",
}
"""Area of a zone's name -> answer. Antarctica and the other oceans are left out: too few."""

KINDS = {"L": "letter", "M": "mark", "N": "number", "P": "punctuation", "S": "symbol"}
"""Major class of a Unicode category -> answer."""

SCRIPTS = (
    *("Arabic", "Armenian", "Cyrillic", "Devanagari", "Ethiopic", "Georgian"),
    *("Greek", "Hebrew", "Hiragana", "Katakana", "Latin", "Thai"),
)

CODE_MODULES = ("textwrap", "fnmatch", "shlex", "bisect", "heapq", "colorsys", "csv", "queue")
"""Library modules whose source is the code text; long-lived files that change little."""


@dataclass(frozen=True)
class Candidate:
    """A possible row; rows of one group stay on one side of the split."""

    prompt: str
    answer: str
    group: str


def zones() -> list[Candidate]:
    """Cities and countries with the part of the world they lie in."""
    folder = importlib.resources.files("tzdata").joinpath("zoneinfo")
    found: list[Candidate] = []
    areas: dict[str, set[str]] = defaultdict(set)
    for country, _, zone, *_ in _table(folder.joinpath("zone.tab").read_text(encoding="utf-8")):
        area, _, city = zone.partition("/")
        areas[country].add(area)
        if area in AREAS:
            # America/Argentina/Ushuaia: the last part is the city.
            city = city.rpartition("/")[2].replace("_", " ")
            found.append(Candidate(f"Place: {city}\nRegion:", AREAS[area], country))
    for country, name in _table(folder.joinpath("iso3166.tab").read_text(encoding="utf-8")):
        answers = {AREAS.get(area) for area in areas[country]}
        answer = answers.pop() if len(answers) == 1 else None
        if answer is not None:
            found.append(Candidate(f"Place: {name}\nRegion:", answer, country))
    return found


def _table(text: str) -> list[list[str]]:
    """Split a table of the time-zone database into its rows and columns."""
    return [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]


def names() -> list[Candidate]:
    """Names of characters with the kind of character they are."""
    found = []
    for code in range(0x20, 0x30000):
        character = chr(code)
        name = unicodedata.ucd_3_2_0.name(character, "")
        kind = KINDS.get(unicodedata.ucd_3_2_0.category(character)[0])
        # The tens of thousands of Chinese and Korean names differ by a number only; long names cost
        # time.
        if name and kind and len(name) < 32 and not name.startswith(("CJK", "HANGUL")):
            found.append(Candidate(f"Character: {name.lower()}\nKind:", kind, name))
    return found


def scripts() -> list[Candidate]:
    """Letters with the script they belong to."""
    found = []
    for code in range(0x80, 0x3100):
        character = chr(code)
        script = unicodedata.ucd_3_2_0.name(character, "").partition(" ")[0].capitalize()
        if script in SCRIPTS and unicodedata.ucd_3_2_0.category(character)[0] == "L":
            found.append(Candidate(f"Letter: {character}\nScript:", script, character))
    return found


BUILDERS = {"zones": (zones, 90), "names": (names, 80), "scripts": (scripts, 36)}
"""Task -> its candidates, and the most rows that one answer may have (so that no class rules)."""


def build_task(name: str) -> dict[str, list[Candidate]]:
    """Draw the rows of one task.

    Parameters
    ----------
    name : str
        A key of `BUILDERS`.

    Returns
    -------
    dict
        Split -> rows, of the sizes in `SIZES`.

    Raises
    ------
    ValueError
        If the sources hold too few rows (another tzdata, for instance).

    Examples
    --------
    >>> len(build_task("scripts")["test"])
    100
    """
    source, most = BUILDERS[name]
    per_answer: Counter[str] = Counter()
    groups: dict[str, list[Candidate]] = defaultdict(list)
    seen = set()
    for row in _drawn(source(), lambda row: row.prompt):
        if row.prompt not in seen and per_answer[row.answer] < most:
            seen.add(row.prompt)
            per_answer[row.answer] += 1
            groups[row.group].append(row)
    order = iter(_in_turn(groups))
    splits: dict[str, list[Candidate]] = {}
    for split, size in SIZES.items():
        rows: list[Candidate] = []
        while len(rows) < size:
            group = next(order, None)
            if group is None:
                raise ValueError(
                    f"demo: task {name} must have {size} {split} rows, got {len(rows)}"
                )
            rows += groups[group]
        splits[split] = rows[:size]  # the rest of the last group is dropped, not put elsewhere
    return splits


def _drawn(items: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """Order items by the SHA-256 of their text: a shuffle that is the same everywhere."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def _in_turn(groups: dict[str, list[Candidate]]) -> list[str]:
    """Order the groups so that the answers take turns: every split then has all of them."""
    by_answer: dict[str, list[str]] = defaultdict(list)
    for group in _drawn(groups, lambda group: group):
        by_answer[groups[group][0].answer].append(group)
    lists = [by_answer[answer] for answer in sorted(by_answer)]
    return [group for turn in zip_longest(*lists) for group in turn if group is not None]


def english_text() -> str:
    """Return the prose of Python's language reference, as pydoc carries it."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Underlines and grammar blocks are not English.
    lines = [line for line in text.splitlines() if not re.fullmatch(r"[*=~^\-\s]+", line)]
    return "\n".join(line for line in lines if "::=" not in line)


def code_text() -> str:
    """Return the source of a few library modules."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES)


def spread(text: str, characters: int, pieces: int) -> str:
    """Take `pieces` parts of a text at equal distances, `characters` in all.

    Examples
    --------
    >>> spread("abcdefgh", 4, 2)
    'ab\\nef'
    """
    length = characters // pieces
    starts = [i * len(text) // pieces for i in range(pieces)]
    return "\n".join(text[start : start + length] for start in starts)


def write_data(folder: Path) -> None:
    """Write a folder for each task (train, eval, test) and ``english.txt``, ``code.txt``.

    Parameters
    ----------
    folder : Path
        Made if it is not there; files of the same names are replaced.
    """
    for name in BUILDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in build_task(name).items():
            write_text(folder / name / f"{split}.jsonl", to_jsonl(rows))
    write_text(folder / "english.txt", spread(english_text(), 16_000, 8))
    write_text(folder / "code.txt", spread(code_text(), 14_000, 8))


def to_jsonl(rows: Sequence[Candidate]) -> str:
    """Write rows as JSON lines."""
    lines = [
        json.dumps({"prompt": row.prompt, "answer": row.answer}, ensure_ascii=False) for row in rows
    ]
    return "\n".join(lines) + "\n"
