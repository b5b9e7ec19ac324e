"""A request while the engine holds it: what policies see, its tokens, and what its user is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from readme_jax.serving.flight import Flying
from readme_jax.serving.pages import page_names
from readme_jax.serving.request import Event, FinishReason, SamplingParams, TokenLogprob, Usage
from readme_jax.serving.text import Transcript
from readme_jax.serving.work import Route

Listener = Callable[[Event], None]


class Emitted(NamedTuple):
    """A token on its way to the user."""

    token: int
    experts: Route
    logprob: TokenLogprob | None


class Live(Flying):
    """A sequence of the engine.

    Attributes, beside those of `Flying`:
        tokens: those that are known: the prompt and what was sampled and read.
        row: of the cache, while running.
        weights: [known tokens, K] of the routes, while a prefill needs them.
        wants_prompt: the prompt's log-probabilities are asked for and not yet told.
        echoed: log-probabilities of the prompt's tokens so far.
    """

    __slots__ = (
        "cached", "echoed", "listener", "names", "params", "row", "sampling", "stops", "tokens", "transcript",
        "wants_prompt", "weights",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        arrival: float,
        tokens: list[int],
        params: SamplingParams,
        limit: int,
        stops: frozenset[int],
        transcript: Transcript[Emitted],
        listener: Listener,
        seed: int,
    ) -> None:
        """`limit`: most new tokens; `stops`: tokens that end the answer."""
        super().__init__(id, arrival, len(tokens), (), limit)
        self.tokens, self.params, self.stops = tokens, params, stops
        self.transcript, self.listener = transcript, listener
        self.sampling = (params.temperature, params.top_k, params.top_p, params.min_p, seed)
        self.row = -1
        self.cached = 0
        self.names: list[bytes] = []
        self.weights: np.ndarray | None = None
        self.echoed: list[TokenLogprob] = []
        self.wants_prompt = params.echo

    def route_prompt(self, experts: np.ndarray, weights: np.ndarray) -> None:
        """Experts and weights [known, K] of all known tokens. Routes that are known already stay."""
        self.routes.extend(tuple(int(e) for e in row) for row in experts[len(self.routes) :])
        self.weights = weights

    def page_names(self, size: int, tokens: int) -> list[bytes]:
        """Names of the full pages among the first `tokens` known tokens."""
        if len(self.names) < tokens // size:
            self.names = page_names(self.tokens[:tokens], size, self.names)
        return self.names[: tokens // size]

    def take(self, token: int, route: Route) -> None:
        """The oldest step in flight was read: it sampled `token`, whose experts are `route`."""
        self.tokens.append(token)
        self.settle(route)

    def preempted(self) -> None:
        """See `Flying.preempted`."""
        super().preempted()
        self.row, self.weights, self.echoed = -1, None, []

    # --- what the user is told -----------------------------------------------------------------------------------

    def emit(self, emitted: Emitted) -> bool:
        """A new token that is no stop token; whether it completed a stop string."""
        shown = self.transcript.push(emitted.token, emitted)
        if shown.stopped:
            self._tell(shown.text, shown.items, "stop")
        elif shown.text or shown.items:
            self._tell(shown.text, shown.items, None)
        return shown.stopped

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """The last event, with what was held back."""
        shown = self.transcript.finish()
        self._tell(shown.text, shown.items, "stop" if shown.stopped and reason == "length" else reason, error)

    def tell_prompt(self) -> None:
        """The log-probabilities of the prompt, which are complete."""
        self.listener(Event(prompt_logprobs=tuple(self.echoed)))
        self.echoed, self.wants_prompt = [], False

    def _tell(self, text: str, items: list[Emitted], reason: FinishReason | None, error: str | None = None) -> None:
        usage = Usage(self.prompt, self.cached, self.generated) if reason else None
        self.listener(
            Event(
                text=text,
                tokens=tuple(i.token for i in items),
                experts=tuple(i.experts for i in items),
                logprobs=tuple(i.logprob for i in items if i.logprob is not None),
                finish_reason=reason,
                usage=usage,
                error=error,
            )
        )
