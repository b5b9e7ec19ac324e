"""A request while the engine holds it: what policies see, its tokens, and the steps in flight that will extend it.

A step may be dispatched before the last one is read. Its sequence then counts as one token longer, with a route that
repeats the last one's; reading puts that right. Where the guess was wrong the step has reported the row as missing
without computing anything, and the token runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from readme_jax.serving.pages import page_names
from readme_jax.serving.request import Event, FinishReason, SamplingParams, TokenLogprob, Usage
from readme_jax.serving.text import Transcript
from readme_jax.serving.work import Route, Sequence

Listener = Callable[[Event], None]


class Emitted(NamedTuple):
    """A token on its way to the user."""

    token: int
    experts: Route
    logprob: TokenLogprob | None


class Live(Sequence):
    """A sequence of the engine.

    Attributes, beside those of `Sequence`, whose `routes` and `computed` include steps in flight:
        tokens: those that are known: the prompt and what was sampled and read.
        row: of the cache, while running.
        primed: whether the row's last token, position and experts are on the device, so that it can decode.
        ahead: steps in flight that will sample a token for it.
        epoch: goes up when it is preempted: what is in flight from before does not count.
        weights: [known tokens, K] of the routes, while a prefill needs them.
        wants_prompt: the prompt's log-probabilities are asked for and not yet told.
        echoed: log-probabilities of the prompt's tokens so far.
    """

    __slots__ = (
        "ahead", "cached", "echoed", "epoch", "limit", "listener", "names", "params", "primed", "row", "sampling",
        "stops", "tokens", "transcript", "wants_prompt", "weights",
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
        super().__init__(id, arrival, len(tokens), ())
        self.tokens, self.params, self.limit, self.stops = tokens, params, limit, stops
        self.transcript, self.listener = transcript, listener
        self.sampling = (params.temperature, params.top_k, params.top_p, params.min_p, seed)
        self.row = -1
        self.primed = False
        self.ahead, self.epoch, self.cached = 0, 0, 0
        self.names: list[bytes] = []
        self.weights: np.ndarray | None = None
        self.echoed: list[TokenLogprob] = []
        self.wants_prompt = params.echo

    @property
    def generated(self) -> int:
        """New tokens that are known."""
        return len(self.tokens) - self.prompt

    @property
    def written(self) -> int:
        """Tokens whose keys are known to be written, without steps in flight that may yet report the row missing."""
        return min(self.computed, len(self.tokens))

    def route_prompt(self, experts: np.ndarray, weights: np.ndarray) -> None:
        """Experts and weights [known, K] of all known tokens. Routes that are known already stay."""
        self.routes.extend(tuple(int(e) for e in row) for row in experts[len(self.routes) :])
        self.weights = weights

    def page_names(self, size: int, tokens: int) -> list[bytes]:
        """Names of the full pages among the first `tokens` known tokens."""
        if len(self.names) < tokens // size:
            self.names = page_names(self.tokens[:tokens], size, self.names)
        return self.names[: tokens // size]

    # --- steps in flight -----------------------------------------------------------------------------------------

    def dispatched(self, guess: bool) -> None:
        """A step that samples its next token is under way. With `guess` the token after that may be scheduled."""
        self.primed = True
        self.ahead += 1
        if guess and self.generated + self.ahead < self.limit:
            self.routes.append(self.routes[-1])

    def settle(self, token: int, route: Route) -> None:
        """The oldest step in flight was read: it sampled `token`, whose experts are `route`."""
        self.ahead -= 1
        at = len(self.tokens)
        self.tokens.append(token)
        guessed = max(len(self.routes) - at, 1)
        del self.routes[at:]
        self.routes.extend([route] * guessed)
        self._forget(at)

    def missed(self) -> None:
        """The step in flight after the one just read does not compute this row: its token is to run again."""
        self.ahead -= 1
        self.computed -= 1
        del self.routes[len(self.tokens) :]
        self._forget(len(self.tokens))

    def preempted(self) -> None:
        """Row and pages are gone: everything known is prefilled again, what is in flight is sampled again."""
        self.running, self.primed, self.row = False, False, -1
        self.computed, self.ahead = 0, 0
        self.epoch += 1
        self.weights = None
        self.echoed = []
        del self.routes[len(self.tokens) :]
        self._forget(0)

    def _forget(self, known: int) -> None:
        """Routes from index `known` on have changed or gone: so must what `Sequence` keeps of them."""
        self._seen = min(self._seen, known)
        self._first.clear()

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
