"""Traffic: arrivals and lengths are the trace's, routes are neighbouring tokens of one stream."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from readme_jax.errors import DataError
from readme_jax.serving.traffic import Arrival, at_rate, load_streams, load_trace, make_traffic

ROWS = [{"arrival_s": float(i), "prompt_tokens": 5 + i, "output_tokens": 2} for i in range(6)]
STREAMS = {"a": np.arange(0, 100, dtype=np.uint8), "b": np.arange(100, 200, dtype=np.uint8)}
SHARED = Path(os.environ.get("READ_ME_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(path: Path, lines: list[str]) -> Path:
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    return path


def test_trace_is_read(tmp_path) -> None:
    path = write(tmp_path / "t.jsonl.gz", [json.dumps(row) for row in ROWS])
    assert load_trace(path)[2] == Arrival(2.0, 7, 2)


@pytest.mark.parametrize("line", ['{"arrival_s": 1}', "{", "3"])
def test_broken_trace_names_its_line(tmp_path, line) -> None:
    with pytest.raises(DataError, match="line 2"):
        load_trace(write(tmp_path / "t.jsonl.gz", [json.dumps(ROWS[0]), line]))
    with pytest.raises(DataError, match="cannot read"):
        load_trace(tmp_path / "missing.jsonl.gz")


def test_requests_are_cut_from_one_stream() -> None:
    trace = [Arrival(float(i), 5 + i, 2) for i in range(6)]
    requests = make_traffic(trace, STREAMS, 4, rate=2.0, seed=3)
    assert [r.id for r in requests] == [0, 1, 2, 3]
    for request in requests:
        experts = np.array([e for (e,) in request.routes])
        assert len(experts) == request.prompt + request.output and (np.diff(experts) == 1).all()
    assert requests[-1].arrival == pytest.approx(4 / 2.0)
    assert at_rate(requests, 1.0)[-1].arrival == pytest.approx(4.0)
    assert make_traffic(trace, STREAMS, 4, rate=2.0, seed=3) == requests
    assert all(r.arrival == 0 for r in make_traffic(trace, STREAMS, 4))


def test_requests_longer_than_a_stream_are_cut() -> None:
    (request,) = make_traffic([Arrival(0.0, 500, 20)], STREAMS, 1)
    assert (request.prompt, request.output) == (80, 20)


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(DataError, match="cannot take 3"):
        make_traffic([Arrival(0.0, 1, 1)], STREAMS, 3)


def test_streams_of_a_run(tmp_path) -> None:
    np.savez(tmp_path / "routes.npz", **{"best/a": STREAMS["a"].reshape(2, 50), "eq4/a": STREAMS["b"].reshape(2, 50)})
    assert (load_streams(tmp_path / "routes.npz", "best")["a"] == STREAMS["a"]).all()
    with pytest.raises(DataError, match="'none'"):
        load_streams(tmp_path / "routes.npz", "none")
    with pytest.raises(DataError, match="routes.py"):
        load_streams(tmp_path / "missing.npz", "best")


@pytest.mark.parametrize(("name", "count"), [("conv", 19366), ("code", 8819)])
def test_azure_traces(name, count) -> None:
    path = SHARED / "traces" / f"azure_2023_{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name}: the shared traces are not here")
    trace = load_trace(path)
    assert len(trace) == count and all(a.arrival <= b.arrival for a, b in zip(trace, trace[1:], strict=False))
