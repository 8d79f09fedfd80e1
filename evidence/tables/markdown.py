"""Tables in Markdown, and the numbers in them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def spread(values: Iterable[tuple[int, float]], digits: int) -> str:
    """Format the mean over seeds and its standard deviation, from (seed, value)."""
    of_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if not math.isnan(value):
            of_seed.setdefault(seed, []).append(value)
    means = [sum(some) / len(some) for some in of_seed.values()]
    if not means:
        return "-"
    if len(means) < 2:
        return f"{means[0]:.{digits}f}"
    return f"{statistics.mean(means):.{digits}f} ± {statistics.stdev(means):.{digits}f}"


def mean(values: Iterable[float]) -> float:
    """Return the mean, ignoring NaNs."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))
