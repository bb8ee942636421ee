"""Which cases a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping


def choose_cases(ranking: Mapping[str, float]) -> dict[str, str]:
    """Worst, median and best case, with these words; fewer where there are fewer."""
    defined = {case: value for case, value in ranking.items() if not math.isnan(value)} or dict(ranking)
    ordered = sorted(defined, key=lambda case: (defined[case], case))
    chosen = {ordered[0]: "Worst case"}
    if len(ordered) > 2:
        chosen[ordered[len(ordered) // 2]] = "Median case"
    if len(ordered) > 1:
        chosen[ordered[-1]] = "Best case"
    return chosen if len(ordered) > 1 else {ordered[0]: "Only case"}
