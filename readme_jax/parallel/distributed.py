"""A job of several processes: which of them this one is, and how it joins the others. One process needs none of it."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from readme_jax.config import Cluster
from readme_jax.errors import ConfigError

PORT = 8482  # of jax's coordinator where nothing else says; the roll call's is the next one
SLURM_PORTS = 61440, 2048  # two a job, so that jobs that share a node seldom meet

# What each environment tells of a process.
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"

Environ = Mapping[str, str]


class Seat(NamedTuple):
    """A process's place in a job of several."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    hosts: tuple[str, ...] = ()  # by process, where the environment names them
    local: int | None = None  # the only local device it may use

    @property
    def host(self) -> str:
        """Where process 0 runs."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of jax's coordinator; the roll call's is the next one."""
        return int(self.coordinator.rpartition(":")[2])

    def name(self, process: int, host: str = "") -> str:
        """A process as messages name it."""
        host = host or (self.hosts[process] if process < len(self.hosts) else "")
        return f"process {process}" + (f" ({host})" if host else "")


def find_seat(cluster: Cluster, environ: Environ | None = None) -> Seat | None:
    """The place of this process, None where it is alone.

    By `Cluster`'s addresses, or else by the environment: JAX_COORDINATOR_ADDRESS and its companions, a TPU pod (on GKE,
    by xpk, or of plain TPU virtual machines, one slice or several), or SLURM. Raises ConfigError when one of those says
    only half of it.
    """
    environ = os.environ if environ is None else environ
    for find in (lambda env: _by_config(cluster), _by_variables, _on_tpu, _on_slurm):
        seat: Seat | None = find(environ)
        if seat is not None:
            return seat if seat.processes > 1 else None
    return None


def _by_config(cluster: Cluster) -> Seat | None:
    given = (cluster.coordinator, cluster.processes, cluster.process)
    if given == ("", 0, -1):
        return None
    return _explicit("Cluster.coordinator, Cluster.processes, Cluster.process", *given)


def _by_variables(environ: Environ) -> Seat | None:
    address, count, number = (environ.get(name, "") for name in EXPLICIT)
    if not count and not number:
        return None  # an address alone is what xpk sets beside a TPU's own variables
    processes, process = (_whole(name, text) for name, text in ((EXPLICIT[1], count), (EXPLICIT[2], number)))
    return _explicit(", ".join(EXPLICIT), address, processes, process)


def _whole(name: str, text: str) -> int:
    if text and not text.isdigit():
        raise ConfigError(f"{name} = {text!r}: must be a whole number")
    return int(text or -1)


def _explicit(names: str, address: str, processes: int, process: int) -> Seat:
    if processes == 1:
        return Seat(f":{PORT}", 1, 0)
    if not address or processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"{names} = {address!r}, {processes}, {process}: give process 0's host:port, how many processes there are "
            "and this one's number, counted from 0"
        )
    return Seat(_with_port(address, PORT), processes, process)


def _with_port(address: str, port: int) -> str:
    host, colon, given = address.rpartition(":")
    if not colon or address.endswith("]"):
        return f"{address}:{port}"
    if not host or not given.isdigit() or not 0 < int(given) < 65535:
        raise ConfigError(f"coordinator {address!r}: must be host:port with a port below 65535")
    return address


# --- SLURM --------------------------------------------------------------------------------------------------------


def _on_slurm(environ: Environ) -> Seat | None:
    """One task a node takes all of the node's devices; of several on a node each takes its own."""
    if any(name not in environ for name in SLURM):
        return None
    job, nodes, tasks, task = (environ[name] for name in SLURM)
    hosts, processes = expand_nodes(nodes), int(tasks)
    first, jobs = SLURM_PORTS
    each, rest = divmod(processes, len(hosts))
    names = tuple(hosts[i // each] for i in range(processes)) if each and not rest else ()
    alone = each == 1 or "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")
    local = None if alone else int(environ.get("SLURM_LOCALID", 0))
    return Seat(f"{hosts[0]}:{first + int(job) % jobs * 2}", processes, int(task), names, local)


def expand_nodes(nodes: str) -> list[str]:
    """SLURM's short form, `a[01-03,7],b`, written out."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        before, bracket, rest = part.partition("[")
        if not bracket:
            found.append(part)
            continue
        inside, _, after = rest.partition("]")
        for span in inside.split(","):
            low, _, high = span.partition("-")
            numbers = range(int(low), int(high or low) + 1)
            found += [host for n in numbers for host in expand_nodes(f"{before}{n:0{len(low)}}{after}")]
    return found


# --- TPU ----------------------------------------------------------------------------------------------------------


def _on_tpu(environ: Environ) -> Seat | None:
    """Workers of every slice, in order: GKE and xpk tell them by variables, plain virtual machines by metadata."""
    tell: Callable[[str], str | None] = environ.get
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names:
        worker, hosts = int(environ.get("TPU_WORKER_ID", 0)), names.split(",")
        hosts = [host.partition(":")[0] for host in hosts]
    elif _tpu_machine(environ):
        number, workers = _metadata(environ, "agent-worker-number"), _metadata(environ, "worker-network-endpoints")
        if number is None or workers is None:
            return None
        worker, hosts = int(number), [w.rpartition(":")[2] for w in workers.split(",")]
        about = dict(re.findall(r"(?m)^\s*(\w+):\s*'?(.*?)'?\s*$", _metadata(environ, "tpu-env") or ""))
        tell = lambda key: environ.get(key) or about.get(key)  # noqa: E731
    else:
        return None
    slices, slice_ = int(tell("MEGASCALE_NUM_SLICES") or 1), int(tell("MEGASCALE_SLICE_ID") or 0)
    first = hosts[0] if slices == 1 else (tell("MEGASCALE_COORDINATOR_ADDRESS") or "").partition(":")[0]
    if not first:
        raise ConfigError(f"{slices} TPU slices without MEGASCALE_COORDINATOR_ADDRESS: start the job by xpk or JobSet")
    port = environ.get("JAX_COORDINATOR_PORT") or str(PORT)
    return Seat(
        _with_port(f"{first}:{port}", PORT),
        slices * len(hosts),
        slice_ * len(hosts) + worker,
        tuple(hosts) if slices == 1 else (),
    )


def _tpu_machine(environ: Environ) -> bool:
    """A virtual machine of Google's with TPU chips: only there is its metadata asked."""
    if "TPU_SKIP_MDS_QUERY" in environ:
        return False
    return "GCE_METADATA_IP" in environ or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def _metadata(environ: Environ, key: str) -> str | None:
    url = METADATA.format(environ.get("GCE_METADATA_IP", "metadata.google.internal"), key)
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode().strip())
    except (urllib.error.URLError, TimeoutError):
        return None


# --- joining ------------------------------------------------------------------------------------------------------


def connect(seat: Seat, cluster: Cluster) -> None:
    """Join jax's processes. Raises ConfigError, one line, when that fails within the start time-out."""
    try:
        jax.distributed.initialize(
            seat.coordinator,
            seat.processes,
            seat.process,
            None if seat.local is None else [seat.local],
            cluster_detection_method="deactivate",
            initialization_timeout=cluster.start_timeout,
            heartbeat_timeout_seconds=2 * cluster.heartbeat_timeout,  # after `Watch`, which says why
            shutdown_timeout_seconds=cluster.heartbeat_timeout,
        )
    except RuntimeError as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(
            f"{seat.name(seat.process)} cannot join the job at {seat.coordinator} within {cluster.start_timeout} s "
            f"(Cluster.start_timeout): {reason}"
        ) from e


def lead() -> bool:
    """Whether this process writes what is written once: logs, records, reports."""
    return jax.process_index() == 0
