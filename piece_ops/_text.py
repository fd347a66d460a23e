"""Text for people: tables."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right.

    Parameters
    ----------
    header : sequence of str
    rows : sequence of sequences of str
        Each as long as the header.

    Returns
    -------
    str
        Lines without trailing spaces, a rule below the header.

    Examples
    --------
    >>> print(format_table(["task", "acc"], [["zones", "0.5"]]))
    task   acc
    ----------
    zones  0.5
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
