"""The compiled shapes: every size that varies between calls is rounded up to one of a few, all known beforehand.

# R rows of the cache, S tokens a row, B rows of a decode call, C tokens of a prefill chunk, P experts present
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from readme_jax.config import Validated
from readme_jax.errors import ConfigError

CPU_PROGRAMS = 64  # most programs compiled for serving
GPU_PROGRAMS = 48
SPANS = 6
SHORTEST_PROMPT = 64  # tokens of the smallest compiled routing call; the next ones are four times as long
ATTENDED = 256  # keys of the shortest attention; the next ones are four times as long


def bucket(size: int, sizes: Sequence[int], what: str) -> int:
    """The smallest of the ascending `sizes` that holds `size`. Raises ConfigError where none does."""
    for each in sizes:
        if size <= each:
            return each
    raise ConfigError(f"{size} {what}: at most {sizes[-1]} are compiled for")


def doublings(largest: int, first: int, factor: int = 2) -> tuple[int, ...]:
    """first, first * factor, ... and at last `largest` itself."""
    sizes = []
    while first < largest:
        sizes.append(first)
        first *= factor
    return (*sizes, largest)


def spans_of(layers: int) -> tuple[slice, ...]:
    """Layers cut into spans of equal length, which run one after another through one program: at least six of them,
    where there are as many layers, so that few experts need to be on the device to run one."""
    length = max(n for n in range(1, max(layers // SPANS, 1) + 1) if layers % n == 0)
    return tuple(slice(start, start + length) for start in range(0, layers, length))


@cache
def present_buckets(experts: int, top_k: int = 1, ways: int = 1) -> tuple[int, ...]:
    """Numbers of experts a call is compiled for: 1, 2, 4, all of them, but no fewer than a token needs. (0,) for a
    dense model. Where `ways` devices share the experts: numbers on each, of which a token may need none."""
    experts, top_k = -(-experts // ways), top_k if ways == 1 else 1
    return (*(n for n in (1, 2, 4) if top_k <= n < experts), experts)


@lru_cache(maxsize=4096)
def padded(experts: tuple[int, ...], total: int, top_k: int, ways: int = 1) -> tuple[int, ...]:
    """Some of `total` experts, repeated from the first on, up to a number that calls are compiled for.

    Of `ways` devices each has as many: its own of the experts, and where those are fewer `total`, which no token names.
    """
    each = -(-total // ways)
    own = [[e for e in experts if e // each == device] for device in range(ways)]
    size = bucket(max(map(len, own)), present_buckets(total, top_k, ways), "experts")
    spare = experts[0] if ways == 1 else total
    return tuple(e for some in own for e in (*some, *[spare] * (size - len(some))))


@dataclass(frozen=True)
class Limits(Validated):
    """How large the cache is, and the sizes that calls are compiled for (ascending, each the bucket of smaller ones).

    `decode` rows of a decode call, `chunks` tokens of a prefill call, `prompts` tokens of a routing call. At
    `stretches` a row's tokens are cut into arrays of their own: attention reads up to one of these numbers of keys, by
    branches inside each program. Empty: chosen from rows and length.
    """

    rows: int  # R
    length: int  # S, tokens a row
    chunks: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    stretches: tuple[int, ...] = ()

    def check(self) -> None:
        self.positive("rows", "length")
        chosen = {
            "chunks": doublings(min(self.length, 256), 16, 4),
            "decode": doublings(self.rows, 1, 4),
            "prompts": doublings(self.length, SHORTEST_PROMPT, 4),
            "stretches": doublings(self.length, ATTENDED, 4),
        }
        for name, sizes in chosen.items():
            given = getattr(self, name)
            if not given:
                object.__setattr__(self, name, sizes)
            self.require(list(given) == sorted(set(given)) and all(n > 0 for n in given), name, "ascending, above zero")
        self.require(self.chunks[-1] <= self.length, "chunks", f"at most the {self.length} tokens of a row")
        self.require(self.decode[-1] == self.rows, "decode", f"sizes up to all {self.rows} rows")
        for name in ("prompts", "stretches"):
            self.require(getattr(self, name)[-1] == self.length, name, f"sizes up to all {self.length} tokens")


def limits_for(rows: int, length: int, chunk: int, platform: str) -> Limits:
    """Limits of a cache for prefill calls of at most `chunk` tokens, within a platform's bound on programs.

    On CPU a padded row or token costs as much as a real one; other platforms take fewer, coarser sizes of decode calls.
    """
    chunk = min(chunk, length)
    if platform == "cpu":
        return Limits(rows, length, chunks=doublings(chunk, min(16, chunk), 4))
    decode, prompts = ((least, most) if least < most else (most,) for least, most in ((8, rows), (512, length)))
    return Limits(rows, length, doublings(chunk, max(64, -(-chunk // 32))), decode, prompts)


@cache
def decode_shapes(
    limits: Limits, experts: int, top_k: int, ways: int = 1, held: int | None = None
) -> tuple[tuple[int, int], ...]:
    """(B, P) of every decode program, ascending in B; P on each of the `ways` devices that share the experts, where a
    call may have `held` of them at once (None: all).

    A call of B rows takes up to twice the experts its rows can name (what they name, and what they may turn to); more
    are served by the next larger B.
    """
    sizes, shapes = present_buckets(experts, top_k, ways), []
    held = sizes[-1] if held is None else min(held, sizes[-1])
    for rows in limits.decode:
        named = held if rows == limits.rows else min(2 * rows * top_k, held)
        most = bucket(named, sizes, "experts")
        shapes += [(rows, present) for present in sizes if present <= most]
    return tuple(shapes)
