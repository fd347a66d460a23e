"""Puts the recorded comparison into README.md: ``python -m demo.readme``.

Every number comes from ``demo/recorded.json``; a test fails when the README says something else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from demo.compare import comparison_table, read_recorded
from demo.settings import TASKS, TEXTS
from piece_ops._files import write_text

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def section(recorded: dict[str, Any]) -> str:
    """Return what stands between the markers."""
    chosen, machine = recorded["chosen"], recorded["machine"]
    before = [f"{100 * value:.0f} %" for value in chosen[0]["accuracy"][0]]
    learned = [
        f"{100 * chosen[0]['accuracy'][i + 1][i]:.0f} %"
        for i in range(len(TASKS))  # row i + 1: after task i
    ]
    return f"""Recorded on {recorded["date"]} ({machine["cpus"]} CPU cores, \
{machine["instruction_set"]}), one seed, 100 test rows a task (standard error about 4 points). Each
method at the best of its learning rates, chosen on other rows; `make demo COMPARE=1` runs all of it
again. Before training the right answers are {", ".join(before)}; right after learning each task
{chosen[0]["method"]} has {", ".join(learned)}. After the last task:

<!-- recorded -->
```
{comparison_table([(run["method"], run) for run in chosen], TASKS, TEXTS)}
```

mean, change: right answers in percent, and their change on the earlier tasks since each was
learned. d english, d code: rise of the log perplexity of general text, the price in general
ability.
"""


def put_section(readme: str, text: str) -> str:
    """Replace what stands between the markers.

    Raises
    ------
    ValueError
        If the README does not have the markers once, in order.
    """
    if len(BLOCK.findall(readme)) != 1:
        raise ValueError("demo: README.md must hold the demo markers once, in order")
    return BLOCK.sub(lambda found: found[1] + text + found[2], readme)


if __name__ == "__main__":
    found = read_recorded()
    if found is None:
        raise SystemExit("demo: there is no recorded comparison yet")
    write_text(README, put_section(README.read_text(encoding="utf-8"), section(found)))
