"""A started engine has all its programs: whatever is asked of it, it compiles nothing more."""

from __future__ import annotations

import io
from contextlib import closing

import jax
import pytest
from fake_programs import COSTS
from rich.console import Console

from readme_jax import config
from readme_jax.progress import WarmUp
from readme_jax.serving.buckets import CPU_PROGRAMS
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_an_engine_compiles_nothing_after_warm_up(tiny_model) -> None:
    serving = config.Serving(
        rows=2, length=32, page_size=4, pages=10, chunk=8, budget=12, slots=2, staging=1, scheduler="lookahead"
    )
    engine = Engine.build(tiny_model("top1"), serving, costs=COSTS)
    assert 0 < engine.warm_up() == engine.stats().compilations <= CPU_PROGRAMS

    def serve(start: int) -> None:
        for number in range(8):
            plain = number % 2
            params = SamplingParams(
                max_tokens=1 + number, temperature=float(plain), top_k=number, top_p=0.9, seed=number, echo=not plain,
                logprobs=None if plain else 3, ignore_eos=True,
            )  # fmt: skip
            engine.submit(Request([start + number] * (1 + 3 * number), params))
        while engine.step():
            pass

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
    )
    serve(0)
    stats = engine.stats()
    assert stats.loads and stats.finished == 8
    assert stats.compilations == engine._caller.programs.planned and not compiled
    jax.monitoring.clear_event_listeners()


def test_the_warm_up_is_a_bar_in_a_terminal_and_a_line_at_its_end(capsys) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    for console in (terminal, Console(file=io.StringIO())):
        tell = WarmUp(console)
        for done in (1, 2, 3):
            tell(done, 3)
            assert ("ready: 3 programs compiled\n" in capsys.readouterr().err) is (done == 3)
    assert "warm-up" in terminal.file.getvalue() and "3/3" in terminal.file.getvalue()
    assert console.file.getvalue() == ""
    stopped = Console(file=io.StringIO(), force_terminal=True, width=80)
    with closing(WarmUp(stopped)) as tell:
        tell(1, 3)
    assert stopped.file.getvalue().count("\x1b[?25h") == 1, "the cursor is back"
