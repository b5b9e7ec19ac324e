"""The roll call before a job and the watch over it: each process a thread or a process of this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from readme_jax.errors import ConfigError
from readme_jax.parallel.distributed import Seat
from readme_jax.parallel.preflight import roll_call

ABOUT = {"jax": "0.10.2", "expert_stage.lr": 5e-5, "data.domains": ("code", "news")}


def free_ports() -> int:
    """A port below one that is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("", port + 1))
                return port
            except OSError:
                continue


def hold(processes: int, abouts: dict[int, dict[str, Any]], timeout: float = 20.0) -> dict[int, Any]:
    """A roll call of the processes that `abouts` names: what each got, its line or the error's text."""
    port = free_ports()

    def one(process: int, about: dict[str, Any]) -> Any:
        seat = Seat(f"127.0.0.1:{port}", processes, process, hosts=("first", "second", "third"))
        try:
            lines = roll_call(seat, about, timeout)
        except ConfigError as e:
            return str(e)
        for _, line in lines.values():
            line.close()
        return sorted(lines)

    with ThreadPoolExecutor(len(abouts)) as pool:
        calls = {process: pool.submit(one, process, about) for process, about in abouts.items()}
    return {process: call.result() for process, call in calls.items()}


def test_all_present_and_equal():
    assert hold(3, {0: ABOUT, 1: ABOUT, 2: ABOUT}) == {0: [1, 2], 1: [0], 2: [0]}


def test_late_process_zero_is_waited_for():
    port = free_ports()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(roll_call, Seat(f"127.0.0.1:{port}", 2, 1), ABOUT, 20.0)
        time.sleep(1.2)
        lines = roll_call(Seat(f"127.0.0.1:{port}", 2, 0), ABOUT, 20.0)
        assert sorted(lines) == [1] and lines[1][0] == socket.gethostname()
        early.result()[0][1].close()


def test_the_missing_are_named_everywhere_within_the_time_out():
    began = time.monotonic()
    said = hold(3, {0: ABOUT, 2: ABOUT}, timeout=1.5)
    assert 1.4 < time.monotonic() - began < 10
    assert said[0] == said[2]
    assert "1 of 3 processes did not report" in said[0] and "within 1.5 s" in said[0]
    assert said[0].endswith("process 1 (second)") and "\n" not in said[0]


def test_process_zero_missing():
    said = hold(2, {1: ABOUT}, timeout=1.0)[1]
    assert "process 0 (first) did not answer at 127.0.0.1:" in said and "within 1 s" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jax": "0.12.0"}, "jax is '0.12.0' there and '0.10.2' on process 0"),
        ({"expert_stage.lr": 1e-4}, "expert_stage.lr is 0.0001 there and 5e-05 on process 0"),
        ({"data.domains": ("code",)}, "data.domains is ['code'] there and ['code', 'news'] on process 0"),
        ({"more": 1}, "more is 1 there and None on process 0"),
        ({str(i): i for i in range(6)}, "and 2 more"),
    ],
)
def test_what_differs_is_named_everywhere(change, said):
    answers = hold(2, {0: ABOUT, 1: ABOUT | change})
    assert answers[0] == answers[1] and said in answers[0] and "process 1 (" in answers[0]
    assert "\n" not in answers[0]


def test_two_processes_with_one_number():
    port = free_ports()

    def one(process: int) -> str:
        with pytest.raises(ConfigError) as caught:
            roll_call(Seat(f"127.0.0.1:{port}", 3, process), ABOUT, 2.0)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(one, (0, 1, 1)))
    assert "two processes call themselves 1" in said[0] and "process 2" in said[0]


def test_strangers_do_not_disturb():
    """A port scanner, or a health check, that connects, sends something and leaves."""
    port = free_ports()

    def disturb() -> None:
        for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\n" * 3, b"[1]\n"):
            with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
                stranger.sendall(sent)

    def late() -> Any:
        time.sleep(0.3)
        disturb()
        return roll_call(Seat(f"127.0.0.1:{port}", 2, 1), ABOUT, 20.0)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(late)
        assert sorted(roll_call(Seat(f"127.0.0.1:{port}", 2, 0), ABOUT, 20.0)) == [1]
        other.result()[0][1].close()


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1] - 1
        with pytest.raises(ConfigError, match=f"cannot listen on port {port + 1}"):
            roll_call(Seat(f"127.0.0.1:{port}", 2, 0), ABOUT, 1.0)


# --- the watch ----------------------------------------------------------------------------------------------------

MEMBER = """
import sys, time
from pathlib import Path
from readme_jax.parallel.distributed import Seat
from readme_jax.parallel.preflight import roll_call
from readme_jax.parallel.watch import Watch
process, port, timeout, folder = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])
seat = Seat("127.0.0.1:" + port, 3, process)
watch = Watch(seat, roll_call(seat, {}, 30), timeout, (folder / str(process)).write_text)
print("up", flush=True)
said = sys.stdin.readline().strip()
if said == "finish":
    watch.finished()
if said.startswith("fail"):
    watch.failed(said)
    sys.exit(7)
"""
Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path):
    members: list[subprocess.Popen[str]] = []

    def begin(timeout: float = 60.0) -> list[subprocess.Popen[str]]:
        port = free_ports()
        for process in range(3):
            command = [sys.executable, "-c", MEMBER, str(process), str(port), str(timeout), str(tmp_path)]
            pipe = subprocess.PIPE
            members.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        for member in members:
            assert member.stdout is not None and member.stdout.readline() == "up\n"
        return members

    yield begin
    for member in members:
        member.kill()
        member.communicate()


def tell(member: subprocess.Popen[str], word: str) -> None:
    assert member.stdin is not None
    member.stdin.write(word + "\n")
    member.stdin.flush()


def endings(members: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(m.wait(30), m.stderr.read() if m.stderr else "") for m in members]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_with_the_reason(start, tmp_path, victim):
    members = start()
    members[victim].kill()
    left = [m for i, m in enumerate(members) if i != victim]
    for code, said in endings(left):
        assert code == 1 and f"process {victim} (" in said and "was killed" in said
    written = {p.name for p in tmp_path.iterdir()}
    assert written == ({"0"} if victim else {"1", "2"}), "someone writes down why"
    assert "was killed" in next(tmp_path.iterdir()).read_text()


def test_the_reason_of_a_failure_reaches_all(start):
    members = start()
    tell(members[2], "fail: the disk is full")
    codes = endings(members)
    assert [code for code, _ in codes] == [1, 1, 7]
    for _, said in codes[:2]:
        assert "process 2 (" in said and "fail: the disk is full" in said


def test_a_silent_process_is_given_up(start):
    members = start(timeout=2.0)
    members[1].send_signal(19)  # SIGSTOP: it hangs, its connection stays open
    for code, said in endings([members[0], members[2]]):
        assert code == 1 and "no sign of life for 2 s" in said


def test_processes_that_finish_disturb_nobody(start):
    members = start()
    for member in reversed(members):
        tell(member, "finish")
    assert endings(members) == [(0, "")] * 3


def test_a_quiet_job_is_left_alone(start):
    members = start(timeout=1.0)
    time.sleep(2.5)
    assert all(member.poll() is None for member in members), "signs of life are exchanged"
