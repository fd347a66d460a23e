"""What a matrix of scores says about learning a stream of tasks.

R[t][i] is the score on task i after task t, both from 1, R[0][i] that of the base model. Here row t
of a matrix is a list, and task i its element i - 1. After task t::

    OP         mean over i <= t of R[t][i]                          overall performance
    BWT        mean over i < t of R[t][i] - R[i][i]                 backward transfer
    FWT        mean over 2 <= i <= t of R[i-1][i] - R[0][i]         forward transfer
    forgetting mean over i < t of (max over i <= l < t of R[l][i]) - R[t][i]

OP, BWT: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840; their ACC is OP after the last task), and for
every t as in TRACE-based work. FWT: the same, with the base model in place of a random one.
Forgetting: Chaudhry et al. 2018 (arXiv 1801.10112), the best score counted from the task's own
training on. It equals -BWT unless a score rose after its own task.
"""

from __future__ import annotations

Matrix = list[list[float | None]]


def overall(matrix: Matrix, t: int) -> float | None:
    """Return OP after task `t`."""
    return mean(matrix[t][:t])


def backward_transfer(matrix: Matrix, t: int) -> float | None:
    """Return BWT after task `t`; None for the first task."""
    return mean([difference(matrix[t][i], matrix[i + 1][i]) for i in range(t - 1)])


def forward_transfer(matrix: Matrix, t: int) -> float | None:
    """Return FWT after task `t`; None for the first task."""
    return mean([difference(matrix[i][i], matrix[0][i]) for i in range(1, t)])


def forgetting(matrix: Matrix, t: int, sign: int = 1) -> float | None:
    """Return the forgetting after task `t`; `sign` -1 for a loss, where lower is better."""
    lost = []
    for i in range(t - 1):
        seen = [matrix[row][i] for row in range(i + 1, t)]
        best = None if None in seen else max(sign * score for score in seen if score is not None)
        now = matrix[t][i]
        lost.append(difference(best, None if now is None else sign * now))
    return mean(lost)


def curves(matrix: Matrix) -> list[dict[str, float | None]]:
    """Return ``op``, ``bwt``, ``fwt`` and ``forgetting`` after every task.

    Examples
    --------
    >>> curves([[0.0, 0.25], [0.5, 0.5], [0.25, 1.0]])[1]
    {'op': 0.625, 'bwt': -0.25, 'fwt': 0.25, 'forgetting': 0.25}
    """
    return [
        {
            "op": overall(matrix, t),
            "bwt": backward_transfer(matrix, t),
            "fwt": forward_transfer(matrix, t),
            "forgetting": forgetting(matrix, t),
        }
        for t in range(1, len(matrix))
    ]


def difference(a: float | None, b: float | None) -> float | None:
    """Return a - b, or None when one of them was not measured."""
    return None if a is None or b is None else a - b


def mean(values: list[float | None]) -> float | None:
    """Return the mean, or None when there is nothing or something was not measured."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
