"""A call that runs span by span: its layers with other arrays of one program, then its end.

Steps whose experts stream run this way, all calls of a step through one span before the next; so do prefill chunks
where nothing streams, because one program for a few layers compiles in a fraction of the time of one for all. A decode
call where nothing streams is one program (`Programs.by_span` says where not).

# B rows of a decode call, C tokens of a chunk, D model width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from readme_jax.models.segments import Expert
from readme_jax.serving.decode import Sampled
from readme_jax.serving.prefill import Chunk, Scores
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.state import Cache, State

if TYPE_CHECKING:
    from readme_jax.serving.programs import Programs

Given = Sequence[Sequence[Expert]]  # an entry a layer: the arrays of the experts present


class Pass(ABC):
    """Run each span in turn, then `finish`; or `whole`. `done` of a span, or of all, is there when it and all before it
    has run; the results are there after `finish`."""

    def __init__(self, programs: Programs, experts: Sequence[int]) -> None:
        self.programs = programs
        self.present: np.ndarray | jax.Array = programs.present(experts)
        self.each = len(self.present) // programs.store.ways  # on every device
        self.done: jax.Array | None = None
        self.sampled: Sampled | None = None
        self.scores: Scores | None = None

    def run(self, state: State, span: int, weights: Given) -> State:
        """The layers of a span, with what `store.present(experts, span)` gave. Uses `state` up."""
        layers = self.programs.store.spans[span]
        caches, self.done = self._layers(state, span, weights)
        return replace(state, layers=(*state.layers[: layers.start], *caches, *state.layers[layers.stop :]))

    def finish(self, state: State) -> State:
        """What comes after the layers. Uses `state` up."""
        rest = self._end(replace(state, layers=()))
        return replace(rest, layers=state.layers)

    def whole(self, state: State, weights: Given) -> State:
        """All of it, with what `store.present(experts)` gave. Uses `state` up."""
        for span, layers in enumerate(self.programs.store.spans):
            state = self.run(state, span, weights[layers])
        return self.finish(state)

    @abstractmethod
    def _layers(self, state: State, span: int, weights: Given) -> tuple[tuple[Cache, ...], jax.Array]:
        """A span's caches, and a scalar that is there when it has run."""

    @abstractmethod
    def _end(self, rest: State) -> State:
        """The state but for its layers, after them."""

    def _keep(self, sampled: Sampled) -> None:
        """Results to be read: what every reader wants starts for the host as soon as it is there, because each copy
        that is waited for alone takes the whole way. On CPU there is no way, and starting costs more than reading."""
        self.sampled = sampled
        if self.programs.platform != "cpu":
            for array in (sampled.tokens, sampled.experts, sampled.missing):
                array.copy_to_host_async()

    def _arguments(self, state: State, span: int, weights: Given) -> tuple[Any, ...]:
        """What the layers of all kinds begin with."""
        layers = self.programs.store.spans[span]
        return self.programs.weights.span(layers), weights, state.layers[layers]


class DecodePass(Pass):
    """One token of each of B rows."""

    def __init__(self, programs: Programs, active: np.ndarray, experts: Sequence[int], sampling: Samplings) -> None:
        super().__init__(programs, experts)
        self.experts = experts
        self.rows = programs.decode_rows(len(active), self.each)
        mask = np.zeros(self.rows, bool)
        mask[: len(active)] = active
        self.active, self.present = programs.kept(mask), programs.kept(self.present)
        self.sampling = Samplings(*map(programs.kept, sampling.padded(self.rows)))
        self.x = programs.blank(programs.config.embed_dim, self.rows)

    def whole(self, state: State, weights: Given) -> State:
        """See `Pass.whole`."""
        if self.programs.by_span:
            return super().whole(state, weights)
        program = self.programs.program("decode", self.rows, self.each)
        arguments = (self.programs.weights, weights, state, self.active, self.present, self.sampling)
        state, sampled = program(*arguments)
        self.done = sampled.missing
        self._keep(sampled)
        return state

    def _layers(self, state: State, span: int, weights: Given) -> tuple[tuple[Cache, ...], jax.Array]:
        program = self.programs.program("decode_span", self.rows, self.each)
        first = self.programs.kept(np.asarray(span == 0))
        rest = replace(state, layers=(), router=None)
        begun = self._arguments(state, span, weights)
        caches, self.x, done = program(*begun, rest, self.active, self.present, first, self.x)
        return caches, done

    def _end(self, rest: State) -> State:
        program = self.programs.program("decode_end", self.rows)
        named = self.programs.kept(self.programs.present(self.experts, self.programs.store.num_experts))
        arguments = (self.programs.weights.end, rest, self.active, named, self.x, self.sampling)
        rest, sampled = program(*arguments)
        self._keep(sampled)
        return rest


class PrefillPass(Pass):
    """A chunk of one row's prompt. `scored`: whether the model's opinion of the chunk's targets is wanted."""

    def __init__(self, programs: Programs, chunk: Chunk, experts: Sequence[int], sampling: Samplings) -> None:
        super().__init__(programs, experts)
        self.chunk, self.sampling = chunk, sampling
        self.longest = programs.limits.chunks[-1]
        self.x = programs.blank(self.longest, programs.config.embed_dim)

    def _layers(self, state: State, span: int, weights: Given) -> tuple[tuple[Cache, ...], jax.Array]:
        program = self.programs.program("prefill_span", len(self.chunk.tokens), self.each, self.longest)
        first = self.programs.kept(np.asarray(span == 0))
        begun = self._arguments(state, span, weights)
        caches, self.x, done = program(*begun, self.chunk, self.present, first, self.x)
        return caches, done

    def _end(self, rest: State) -> State:
        program = self.programs.program("prefill_end", self.longest)
        chunk = self.chunk._replace(tokens=None, experts=None, weights=None)
        arguments = (self.programs.weights.end, rest, chunk, self.sampling, self.x)
        rest, sampled, scores = program(*arguments)
        if self.chunk.last:
            self._keep(sampled)
        self.scores = scores if self.chunk.scored else None
        return rest
