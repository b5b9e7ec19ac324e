"""The cache part of replay.py: hit ratios of eviction policies on one sequence of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _replay import ROUTERS, STAGING, TRACES, Case, finish, model_of, requests_of, serve

from readme_jax.serving.expert_cache import ExpertCache, Plan, replay
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.simulate import Outcome, Setup, simulate

CAPACITIES = (2, 3, 4, 5)
BUDGET = 64
POLICIES = ("random", "lru", "queue", "rollout", "optimum")
TABLE4 = {  # the paper's, capacity 2 to 5; its `Belady` row is what an offline optimum reaches
    "random": (0.3419, 0.5014, 0.6752, 0.8291),
    "lru": (0.3390, 0.5242, 0.6695, 0.8348),
    "optimum": (0.4416, 0.6182, 0.7721, 0.8803),
}
REPEATS = 2921 / 4096  # of the paper's router on arXiv text


class Memo:
    """A future that several caches read, each from its start, and that is worked out once."""

    def __init__(self, future: Iterable[int]) -> None:
        self.source, self.seen = iter(future), []  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[int]:
        index = 0
        while True:
            if index == len(self.seen):
                mask = next(self.source, None)
                if mask is None:
                    return
                self.seen.append(mask)
            yield self.seen[index]
            index += 1


class Bank(ExpertCache):
    """A cache that shows what it sees to others of every capacity."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts, CAPACITIES[1], STAGING)
        self.others = {k: ExpertCache(experts, k, STAGING) for k in CAPACITIES}

    def step(self, needed: frozenset[int], future: Iterable[int] = ()) -> Plan:
        """See `ExpertCache.step`."""
        memo = Memo(future)
        for cache in self.others.values():
            cache.step(needed, memo)
        return super().step(needed, memo)


def cache_rows(base: Case, limits: dict[tuple[str, str], float], load: float) -> list[dict[str, Any]]:
    """Rows of cache.json: both traces, both routers, decode-first and Algorithm 1 at 64 tokens a batch."""
    rows = []
    for router in ROUTERS:
        for trace in TRACES:
            for scheduler in ("decode_first", "algorithm1"):
                rate = load * limits[trace, router]
                case = replace(base, trace=trace, router=router, scheduler=scheduler, budget=BUDGET, rate=rate)
                found, masks = online(case)
                expert = model_of(case).shape.expert_bytes * model_of(case).shape.num_layers
                for policy, capacity, cache in [*found, *offline(masks, model_of(case).shape.num_experts)]:
                    rows.append({
                        "trace": trace, "scheduler": scheduler, "router": router, "budget": BUDGET, "load": load,
                        "policy": policy, "capacity": capacity, "hit_ratio": cache.hit_ratio,
                        "bytes": cache.misses * expert,
                    })  # fmt: skip
    return rows


def online(case: Case) -> tuple[list[tuple[str, int, ExpertCache]], list[int]]:
    """Belady with roll-out and on the queue, at every capacity, on the batches of one run; and those batches."""
    rollout, first = _banked(case, "rollout", None)
    queue, second = _banked(case, "queue", first)
    assert first.masks == second.masks, "the batches must be the same for every policy"
    banks = {"rollout": rollout, "queue": queue}
    return [(name, k, cache) for name, bank in banks.items() for k, cache in bank.others.items()], first.masks


def _banked(case: Case, future: str, times: Outcome | None) -> tuple[Bank, Outcome]:
    model = model_of(case)
    bank = Bank(model.shape.num_experts)
    scheduler = make_scheduler(case.scheduler, case.budget)
    setup = Setup(future=future, swaps=False)  # type: ignore[arg-type]
    return bank, simulate(requests_of(case), scheduler, bank, model, setup, None if times is None else times.log)


def offline(masks: list[int], experts: int) -> list[tuple[str, int, ExpertCache]]:
    """Random, LRU and the optimum on a sequence of batches."""
    found = []
    for policy in ("random", "lru", "optimum"):
        for capacity in CAPACITIES:
            cache = ExpertCache(experts, capacity, STAGING, "belady" if policy == "optimum" else policy)  # type: ignore[arg-type]
            replay(cache, masks, offline=policy == "optimum")
            found.append((policy, capacity, cache))
    return found


def table4_batches(steps: int = 4000, experts: int = 7, mean: float = 8.0, seed: int = 0) -> list[int]:
    """Decode batches whose sequences repeat their expert at the paper's rate, else take any other alike.

    The number of sequences is Poisson around `mean` and drawn anew every 3 steps, which gives 4.7 experts a batch: the
    paper prints neither; these come near all twelve of its figures.
    """
    rng = np.random.default_rng(seed)
    current, masks = rng.integers(0, experts, 1), []
    for step in range(steps):
        if step % 3 == 0:
            size = max(1, int(rng.poisson(mean)))
            current = np.concatenate([current, rng.integers(0, experts, size)])[:size]
        moves = rng.random(len(current)) >= REPEATS
        current = (current + moves * rng.integers(1, experts, len(current))) % experts
        masks.append(int(np.bitwise_or.reduce(1 << current)))
    return masks


def table4_rows() -> list[dict[str, Any]]:
    """Random, LRU and the optimum beside the paper's Table 4."""
    return [
        {"policy": policy, "capacity": k, "hit_ratio": cache.hit_ratio, "paper": TABLE4[policy][CAPACITIES.index(k)]}
        for policy, k, cache in offline(table4_batches(), 7)
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sequence of batches and capacity: misses of LRU removed by roll-out, and its regret in points."""
    ratios: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = (row["trace"], row["scheduler"], row["router"], row["load"], row["capacity"])
        ratios.setdefault(key, {})[row["policy"]] = row["hit_ratio"]
    names = ("trace", "scheduler", "router", "load", "capacity")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "removed": 1 - (1 - hits["rollout"]) / max(1 - hits["lru"], 1e-12),
            "regret_points": 100 * (hits["optimum"] - hits["rollout"]),
        }
        for key, hits in ratios.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Hit ratio against capacity for Algorithm 1, a panel a trace and router."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey=True)
    colours = dict(zip(POLICIES, ("#cbd5e1", "#94a3b8", "#b45309", "#0f766e", "#0f172a"), strict=True))
    for axis, (trace, router) in zip(axes.flat, [(t, r) for r in ROUTERS for t in TRACES], strict=True):
        for policy, colour in colours.items():
            wanted = {"trace": trace, "router": router, "scheduler": "algorithm1", "policy": policy}
            same = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
            axis.plot(CAPACITIES, [r["hit_ratio"] for r in sorted(same, key=lambda r: r["capacity"])], "o-",
                      color=colour, label=policy)  # fmt: skip
        axis.set_title(f"{trace}, {router} router")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xticks(CAPACITIES)
    finish(figure, axes, path, "experts resident, of 7", "hit ratio, Algorithm 1")


def saturated(base: Case, trace: str, router: str) -> float:
    """Requests a second that Algorithm 1, the best baseline at 64 tokens a batch, serves of a queue that never ends."""
    case = replace(base, trace=trace, router=router, scheduler="algorithm1", budget=BUDGET, rate=None)
    return serve(case).throughput()
