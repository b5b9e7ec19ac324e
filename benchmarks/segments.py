"""Grouped feed-forward back ends against one dense FFN of the same arithmetic: `python benchmarks/segments.py`.

1024 tokens sorted by expert, SmolLM2's shapes at half width, fp32, seven experts, one a token. Cases: `even`; `skewed`,
each expert half of the rows that are left (512, 256, ... 16, 16); `one`, all rows to one expert. `segments` is the back
end that the model uses on this platform. With huge pages, as `readme-jax` runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax.config import Model
from readme_jax.memory import use_huge_pages
from readme_jax.models.feed_forward import feed_forward
from readme_jax.models.runtime import runtime_for
from readme_jax.models.segments import Expert, grouped_ffn, plan_routes

N, D, WIDTH, E = 1024, 576, 768, 7
SIZES = {"even": [N // E + (e < N % E) for e in range(E)], "skewed": [512, 256, 128, 64, 32, 16, 16], "one": [N]}
SLOW = 4  # a back end this many times slower than the dense FFN is timed in every fourth round only


def with_gradients(ffn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Gradients for x and weights, written where the last call's were, as accumulating steps do: no fresh pages."""

    def step(old: Any, x: jax.Array, weights: Any, *plan: Any) -> Any:
        return jax.grad(lambda x, w: jnp.square(ffn(x, w, *plan)).sum(), argnums=(0, 1))(x, weights)

    return jax.jit(step, donate_argnums=0, keep_unused=True)


class Timed:
    """A compiled function with its arguments, called and timed to the end."""

    def __init__(self, ffn: Callable[..., jax.Array], backward: bool, *args: Any) -> None:
        self.args = args
        self.call = with_gradients(ffn) if backward else jax.jit(ffn)
        self.result = jax.tree.map(jnp.copy, args[:2]) if backward else None
        self.backward = backward
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        if self.backward:
            self.result = jax.block_until_ready(self.call(self.result, *self.args))
        else:
            jax.block_until_ready(self.call(*self.args))
        return time.perf_counter() - start


def measure(case: str, backward: bool, rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of the dense FFN, and each back end's time over that of a dense run just before it (medians)."""
    rng = np.random.default_rng(0)

    def weights() -> Expert:
        shapes = ((WIDTH, D), (WIDTH, D), (D, WIDTH))
        return Expert(*(jnp.asarray(rng.normal(0, 0.04, s), jnp.float32) for s in shapes))

    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    routes = jnp.asarray(np.repeat(np.arange(len(SIZES[case])), SIZES[case])[:, None], jnp.int32)
    plan, experts = plan_routes(routes, E), [weights() for _ in range(E)]
    backends = {"segments": runtime_for(Model()).segments, "masked": "masked", "ragged_dot": "ragged"}
    dense = Timed(lambda x, w: feed_forward(w._asdict(), x), backward, x, weights())

    def grouped(backend: Any, x: jax.Array, experts: Any, plan: Any) -> jax.Array:
        return grouped_ffn(x, plan, experts, backend)

    timed = {name: Timed(partial(grouped, b), backward, x, experts, plan) for name, b in backends.items()}
    ratios: dict[str, list[float]] = {"dense": [], **{name: [] for name in timed}}
    base = []
    for i in range(rounds):
        base.append(dense.seconds())
        ratios["dense"].append(dense.seconds() / base[-1])
        for name, f in timed.items():
            if i % SLOW == 0 or np.median(ratios[name]) < SLOW:
                before = dense.seconds()
                ratios[name].append(f.seconds() / before)
    return float(np.median(base)), {name: float(np.median(r)) for name, r in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    rows = []
    table = Table(title=f"time over one dense FFN's: {N} rows, {D} x {WIDTH}, {E} experts, fp32")
    for column in ("case", "pass", "dense, ms", "segments", "dense", "masked", "ragged_dot"):
        table.add_column(column, justify="left" if column in ("case", "pass") else "right")
    for case in SIZES:
        for name, backward in (("forward", False), ("forward_backward", True)):
            seconds, ratios = measure(case, backward, rounds)
            rows += [{"case": case, "pass": name, "backend": b, "ratio": round(r, 3)} for b, r in ratios.items()]
            order = [ratios[b] for b in ("segments", "dense", "masked", "ragged_dot")]
            table.add_row(case, name, f"{seconds * 1e3:.1f}", *(f"{r:.2f}" for r in order))
    Console().print(table)
    write_results("segments", rows=rows)


if __name__ == "__main__":
    use_huge_pages()
    main()
