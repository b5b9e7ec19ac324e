"""Few combinations of settings in which every two values of different settings meet."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

TRIED = 50  # candidates a row, of which the one that covers most is taken


def pairs_of(row: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    """The pairs of values that meet in a row."""
    return {(a, row[a], b, row[b]) for a, b in combinations(sorted(row), 2)}


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[tuple[Any, ...]]:
    """The pairs that are to be covered."""
    return {(a, x, b, y) for a, b in combinations(sorted(factors), 2) for x in factors[a] for y in factors[b]}


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows {setting: value} that cover all pairs, found greedily; the same ones for a seed."""
    rng, left, rows = random.Random(seed), all_pairs(factors), []
    while left:
        best: dict[str, Any] = {}
        a, x, b, y = rng.choice(sorted(left, key=repr))  # so that every row covers a pair at least
        for _ in range(TRIED):
            row = {name: rng.choice(values) for name, values in factors.items()} | {a: x, b: y}
            if not best or len(pairs_of(row) & left) > len(pairs_of(best) & left):
                best = row
        left -= pairs_of(best)
        rows.append(best)
    return rows
