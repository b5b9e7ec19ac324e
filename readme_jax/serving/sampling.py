"""Choosing tokens on the device: greedy, or drawn by a key that is a function of (seed, position) alone.

A sort of the vocabulary, or a random number for each of its tokens, costs more than the model on CPU. So the kept set
of a draw is read off the LIKELY best tokens where it ends among them, and else found by bisection on the bits of the
probabilities; and a draw takes two random numbers: one chooses a group of tokens, one a token of it. Where the
probability at the border occurs several times all of them are kept.

# B rows, V vocabulary, TOP alternatives
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOP = 20  # alternatives returned with each token
GROUP = 256  # tokens whose largest logit stands for them while the best are sought
LIKELY = 256  # best tokens among which the border of the kept ones is looked for first
FEW = 16  # tokens of a group while those are sought
DRAWN = 128  # tokens of a group that is drawn as one


class Samplings(NamedTuple):
    """How each of B rows draws its next token; arrays [B]. Rows at temperature 0 are greedy.

    top_k 0 and top_p 1 and min_p 0 keep all tokens; seed is uint32.
    """

    temperature: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    seed: np.ndarray | jax.Array

    @classmethod
    def greedy(cls, rows: int) -> Samplings:
        """All rows greedy."""
        return cls.of([(0.0, 0, 1.0, 0.0, 0)] * rows)

    @classmethod
    def of(cls, rows: Sequence[tuple[float, int, float, float, int]]) -> Samplings:
        """From (temperature, top_k, top_p, min_p, seed) of each row; a seed is taken modulo 2**32."""
        temperature, top_k, top_p, min_p, seed = zip(*rows, strict=True)
        return cls(
            np.asarray(temperature, np.float32),
            np.asarray(top_k, np.int32),
            np.asarray(top_p, np.float32),
            np.asarray(min_p, np.float32),
            np.asarray([s % 2**32 for s in seed], np.uint32),
        )

    def padded(self, rows: int) -> Samplings:
        """With greedy rows added up to `rows`."""
        more = Samplings.greedy(rows - len(self.seed)) if rows > len(self.seed) else None
        return self if more is None else Samplings(*(np.concatenate(x) for x in zip(self, more, strict=True)))


class Chosen(NamedTuple):
    """New tokens [B] with their log-probability [B] under the model (at temperature 1, nothing left out), and the
    best alternatives [B, TOP], best first. A greedy row's token and number are those of its first alternative."""

    tokens: jax.Array
    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def choose_tokens(logits: jax.Array, sampling: Samplings, positions: jax.Array) -> Chosen:
    """The next token of each row: logits [B, V] float32; positions [B] are those the new tokens will have."""
    top_logits, top_tokens = best(logits)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top_logprobs = top_logits - total
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: draw(logits, sampling, positions),
        lambda: top_tokens[:, 0],
    )
    greedy = sampling.temperature <= 0
    tokens = jnp.where(greedy, top_tokens[:, 0], drawn)
    logprob = (jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0]
    return Chosen(tokens, jnp.where(greedy, top_logprobs[:, 0], logprob), top_tokens, top_logprobs)


def best(logits: jax.Array, top: int = TOP, group: int = GROUP) -> tuple[jax.Array, jax.Array]:
    """The `top` largest logits of each row and their tokens, [B, top], best first; of equal ones the lower token first.

    Only the groups, of `group` >= `top` / groups tokens, with the largest maxima are searched. Of a vocabulary smaller
    than `top` the rest are -inf.
    """
    padded = _grouped(logits, max(group, -(-top // -(-logits.shape[1] // group))), -jnp.inf)
    rows, groups, group = padded.shape
    _, likely = jax.lax.top_k(padded.max(axis=-1), min(top, groups))
    likely = jnp.sort(likely, axis=-1)  # so that equal logits come by token
    candidates = jnp.take_along_axis(padded, likely[:, :, None], axis=1).reshape(rows, -1)
    values, where = jax.lax.top_k(candidates, top)
    return values, jnp.take_along_axis(likely, where // group, axis=1) * group + where % group


def _grouped(values: jax.Array, size: int, fill: float) -> jax.Array:
    """[B, V] -> [B, groups, size], padded with `fill`."""
    rows, vocab = values.shape
    groups = -(-vocab // size)
    padded = jnp.pad(values, ((0, 0), (0, groups * size - vocab)), constant_values=fill)
    return padded.reshape(rows, groups, size)


def draw(logits: jax.Array, sampling: Samplings, positions: jax.Array) -> jax.Array:
    """Tokens [B] drawn from softmax(logits / temperature) of the kept tokens.

    Kept are the `top_k` most likely; of these the fewest that reach `top_p` of their probability; of these the ones
    with at least `min_p` of the most likely one's probability.
    """
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    odds = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))  # of the most likely one, in [0, 1]
    floor = jax.lax.cond(
        jnp.any((sampling.top_k > 0) | (sampling.top_p < 1)), lambda: _floor(odds, sampling), lambda: sampling.min_p
    )
    kept = jnp.where(odds >= jnp.maximum(floor, sampling.min_p)[:, None], odds, 0)

    def numbers(seed: Any, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position), (2,))

    first, second = jax.vmap(numbers)(sampling.seed, positions).T
    groups = _grouped(kept, DRAWN, 0.0)
    group = _by_share(groups.sum(axis=-1), first)
    within = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return group * DRAWN + _by_share(within, second)


def _by_share(shares: jax.Array, number: jax.Array) -> jax.Array:
    """The index [B], of [B, N] shares, that the number [B] in [0, 1) falls on: one with a share above 0."""
    up_to = jnp.cumsum(shares, axis=-1)
    return jnp.argmax(up_to > number[:, None] * up_to[:, -1:], axis=-1).astype(jnp.int32)


def _floor(odds: jax.Array, sampling: Samplings) -> jax.Array:
    """Smallest odds [B] that top_k and top_p keep."""
    floor, found = _floor_of_best(odds, sampling)
    return jax.lax.cond(found.all(), lambda: floor, lambda: jnp.where(found, floor, _floor_of_all(odds, sampling)))


def _floor_of_best(odds: jax.Array, sampling: Samplings) -> tuple[jax.Array, jax.Array]:
    """`_floor` read off the largest odds, and in which rows [B] it can be."""
    count = min(LIKELY, odds.shape[1])
    _, tokens = best(odds, count, FEW)
    values = jnp.take_along_axis(odds, tokens, axis=1)  # of values alone XLA would make a sort of all candidates
    limited = jnp.asarray(sampling.top_k) > 0
    border = jnp.take_along_axis(values, jnp.clip(sampling.top_k, 1, count)[:, None] - 1, axis=1)
    mass = jnp.cumsum(values, axis=-1)
    among = jnp.sum(jnp.where(values >= border, values, 0), axis=-1)
    wanted = sampling.top_p * jnp.where(limited, among, odds.sum(axis=-1))
    reached = jnp.take_along_axis(values, jnp.argmax(mass >= wanted[:, None], axis=-1)[:, None], axis=1)[:, 0]
    by_count = jnp.where(limited, border[:, 0], 0)
    # A border as low as the last one may go on among the others: then what top_k keeps is not known here.
    known = ~limited | (border[:, 0] > values[:, -1]) | (border[:, 0] == 0) | (count == odds.shape[1])
    enough = (mass[:, -1] >= wanted) | (jnp.asarray(sampling.top_p) >= 1)
    found = known & enough | (jnp.asarray(sampling.temperature) <= 0)
    return jnp.where(sampling.top_p < 1, jnp.maximum(by_count, reached), by_count), found


def _floor_of_all(odds: jax.Array, sampling: Samplings) -> jax.Array:
    """`_floor` by bisection, whatever is kept."""
    limited = sampling.top_k > 0
    likely = jnp.where(limited, jnp.minimum(sampling.top_k, odds.shape[1]), odds.shape[1])
    floor = jax.lax.cond(
        limited.any(),
        lambda: _largest(odds, lambda t: jnp.sum(odds >= t, axis=-1) >= likely),
        lambda: jnp.zeros(odds.shape[0]),
    )
    of_these = jnp.where(odds >= floor[:, None], odds, 0)
    wanted = sampling.top_p * of_these.sum(axis=-1)
    reached = _largest(odds, lambda t: jnp.sum(jnp.where(of_these >= t, of_these, 0), axis=-1) >= wanted)
    return jnp.where(sampling.top_p < 1, jnp.maximum(floor, reached), floor)


def _largest(odds: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold [B] in [0, 1] that is low enough, one that some of the odds [B, V] equal.

    Positive floats are ordered as their bits are: 31 halvings find it exactly.
    """
    low = jnp.zeros(odds.shape[0], jnp.int32)
    high = jnp.full_like(low, 0x3F800001)  # just above 1.0, never enough

    def halve(_: int, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = span
        middle = low + (high - low) // 2
        ok = enough(jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, (low, high))[0], jnp.float32)
