"""How written answers are scored against the wanted ones: one number from 0 to 1 for a task.

========  ==========================================================================================
metric    score
========  ==========================================================================================
exact     share of answers that are equal, white space at both ends aside
letter    share with the right choice: the first of A to E that stands alone
number    share with the right first number, by value (1,000 = 1000.0); where the wanted answer has
          none, exact
edit      mean similarity 1 - d / (a + b), d the fewest insertions and deletions, a and b lengths
rouge-l   mean ROUGE-L: F1 of the longest common subsequence of words (lower case, a-z and 0-9)
bleu      corpus BLEU-4 of sacrebleu, with its own tokenization (13a), divided by 100
========  ==========================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from piece_ops.training.extra import require

SHORT_ANSWER = 16
"""Tokens that are written where only the first letter or number counts."""

_LETTER = re.compile(r"\b[A-E]\b")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def _mean(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], float]:
    """Make a score of rows from the score of one answer."""

    def score_all(answers: Sequence[str], wanted: Sequence[str]) -> float:
        return sum(map(score, answers, wanted)) / len(wanted)

    return score_all


def exact(answer: str, wanted: str) -> float:
    """Return 1 if the texts are equal, white space at both ends aside."""
    return float(answer.strip() == wanted.strip())


def letter(answer: str, wanted: str) -> float:
    """Return 1 if the first choices are equal.

    Examples
    --------
    >>> letter("The answer is B.", "B\\nA letter starts with a greeting.")
    1.0
    """
    found, right = _LETTER.search(answer), _LETTER.search(wanted)
    return float(found is not None and right is not None and found[0] == right[0])


def number(answer: str, wanted: str) -> float:
    """Return 1 if the first numbers are equal; without a wanted number, see `exact`.

    Examples
    --------
    >>> number("1,000 apples", "1000.0"), number("11.", "12"), number(" June", "June")
    (1.0, 0.0, 1.0)
    """
    found, right = _NUMBER.search(answer), _NUMBER.search(wanted)
    if right is None:
        return exact(answer, wanted)
    return float(found is not None and _value(found[0]) == _value(right[0]))


def _value(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def edit(answer: str, wanted: str) -> float:
    """Return how similar two texts are, 1 when equal; needs rapidfuzz."""
    ratio = require("rapidfuzz.fuzz", "the metric edit").ratio
    return float(ratio(answer.strip(), wanted.strip())) / 100


def rouge_l(answer: str, wanted: str) -> float:
    """Return the ROUGE-L F1 of two texts, as the package rouge-score without stemming; rapidfuzz.

    Examples
    --------
    >>> round(rouge_l("the cat sat", "The cat sat down."), 3)
    0.857
    """
    common = require("rapidfuzz.distance.LCSseq", "the metric rouge-l").similarity
    found, right = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, wanted))
    # 2 P R / (P + R) with P = common / found and R = common / right.
    return 2 * float(common(found, right)) / max(1, len(found) + len(right))


def bleu(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the corpus BLEU of answers, 0 to 1; needs sacrebleu."""
    corpus_bleu = require("sacrebleu", "the metric bleu").corpus_bleu
    return float(corpus_bleu(list(answers), [list(wanted)]).score) / 100


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes
    ----------
    score : callable
        ``score(answers, wanted)``, 0 to 1.
    most_tokens : int or None
        What an answer needs at most; None: as much as the longest wanted one.
    package : str or None
        What must be installed.
    """

    score: Callable[[Sequence[str], Sequence[str]], float]
    most_tokens: int | None = None
    package: str | None = None


METRICS = {
    "exact": Metric(_mean(exact)),
    "letter": Metric(_mean(letter), SHORT_ANSWER),
    "number": Metric(_mean(number), SHORT_ANSWER),
    "edit": Metric(_mean(edit), package="rapidfuzz"),
    "rouge-l": Metric(_mean(rouge_l), package="rapidfuzz"),
    "bleu": Metric(bleu, package="sacrebleu"),
}


def check_metric(name: str, where: str) -> None:
    """Raise ValueError for an unknown metric, ModuleNotFoundError when its package is missing."""
    if name not in METRICS:
        raise ValueError(f"{where}: a metric must be one of {', '.join(METRICS)}, got {name!r}")
    package = METRICS[name].package
    if package:
        require(package, f"the metric {name}")
