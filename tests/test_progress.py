"""What a run shows of its progress: tokens a second and the time left, in a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from readme_jax import progress
from readme_jax.progress import Meter, clock


@pytest.fixture
def time(monkeypatch):
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_a_bar(time):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    meter = Meter("experts", 1000, console=console)
    meter(250, "loss 3.21", left=3725.0, rate=512.4)
    meter.close()
    shown = console.file.getvalue()
    for said in ("experts", "loss 3.21", "512 tokens/s", "1:02:05 left"):
        assert said in shown


def test_a_log_gets_a_plain_line_now_and_then(time, capsys):
    meter = Meter("calibrate", 1000, done=200, console=Console(file=io.StringIO()))
    time[0] += 1
    meter(100)
    assert capsys.readouterr().err == ""
    time[0] += progress.PLAIN_EVERY + 9
    meter(300)  # 400 tokens in 40 seconds, 400 to go
    assert capsys.readouterr().err == "calibrate: 60% · 10 tokens/s · 0:40 left\n"
    meter.close()
    assert capsys.readouterr().err == "calibrate: 600 tokens in 0:40\n"


def test_a_silent_meter_says_nothing(time, capsys):
    meter = Meter("router", 10, console=Console(file=io.StringIO()), silent=True)
    time[0] += 100
    meter(10)
    meter.close()
    assert capsys.readouterr().err == ""


def test_clock():
    assert [clock(s) for s in (0.4, 59.6, 3599, 3600, float("nan"), float("inf"))] == [
        "0:00", "1:00", "59:59", "1:00:00", "?", "?"
    ]  # fmt: skip
