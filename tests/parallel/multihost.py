"""Jobs of several processes on this machine, four CPU devices each: what test_multihost*.py start and look at."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import readme_jax

SCRIPT = Path(__file__).with_name("multihost_run.py")
STEPS = 12  # router 1-4, experts 5-12; a checkpoint every third step
GIN = """
Run.output = '{output}'
Model.checkpoint = '{folder}/dense'
Data.folder = '{folder}/text'
Data.sequence_length = 16
Data.validation_tokens = 64
Slice.calibration_tokens = 128
Slice.score = 'rmsw'
Slice.refit = 'one_shot'
Router.dim = 16
Router.num_heads = 2
Router.head_dim = 8
Router.mlp_dim = 16
RouterStage.objective = 'domain'
RouterStage.steps = 4
RouterStage.batch = 8
RouterStage.lr = 1e-2
ExpertStage.steps = 8
ExpertStage.batch = 16
ExpertStage.accumulate = 2
ExpertStage.lr = 1e-2
Tuning.rounds = 1
Tuning.checkpoint_every = 3
Cluster.start_timeout = 60
Cluster.heartbeat_timeout = 20
"""


def free_port() -> int:
    """A port below one that is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            try:
                other.bind(("", one.getsockname()[1] + 1))
                return int(one.getsockname()[1])
            except OSError:
                continue


class Job:
    """Processes of one run, started together; a process's own options by its number."""

    def __init__(
        self,
        folder: Path,
        name: str,
        processes: int = 2,
        devices: int = 4,
        options: dict[int, list[str]] | None = None,
        params: dict[int, list[str]] | None = None,
    ) -> None:
        gin, port = folder / f"{name}.gin", free_port()
        self.output = folder / name
        gin.write_text(GIN.format(output=self.output, folder=folder))
        path = os.pathsep.join([str(Path(readme_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.processes = []
        for number in range(processes):
            env = os.environ | {
                "PYTHONPATH": path,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "READ_ME_CACHE": str(folder / "cache"),
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            }
            if processes > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
                env |= {"JAX_PROCESS_ID": str(number)}
            own = (options or {}).get(number, [])
            bindings = [f"--gin_param={p}" for p in (params or {}).get(number, [])]
            command = [sys.executable, str(SCRIPT), *own, "--", f"--gin_file={gin}", *bindings]
            pipe = subprocess.PIPE
            self.processes.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))

    def end(self, seconds: float = 240) -> list[tuple[int, str]]:
        """Exit code and stderr of every process, once all have ended."""
        until = time.monotonic() + seconds
        try:
            ended = [(p, p.communicate(timeout=max(1, until - time.monotonic()))[1]) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, said) for p, said in ended]

    def succeed(self) -> Job:
        """Wait for a run that must end well."""
        for number, (code, said) in enumerate(self.end()):
            assert code == 0, f"process {number}: {said[-3000:]}"
        return self

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step."""
        lines = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in trained] == list(range(1, len(trained) + 1)), "no line twice, none missing"
        return {line["step"]: line["loss"] for line in trained}

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says."""
        return json.loads((self.output / "status.json").read_text())

    @property
    def committed(self) -> list[int]:
        """Steps of complete checkpoints."""
        return sorted(int(p.name) for p in (self.output / "checkpoints").iterdir() if p.name.isdigit())

    @property
    def exported(self) -> dict[str, np.ndarray]:
        """Every tensor of the final mixture."""
        return {k: v for p in sorted((self.output / "export").rglob("*.safetensors")) for k, v in load_file(p).items()}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Between two sets of tensors, relative to each one's largest entry."""
    assert a.keys() == b.keys() and a
    return max(float(np.abs(a[k].astype(np.float64) - b[k]).max() / max(np.abs(a[k]).max(), 1e-9)) for k in a)
