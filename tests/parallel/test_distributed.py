"""Which process of a job this one is, by every environment that says so, and joining where some do not come."""

from __future__ import annotations

import http.server
import threading

import pytest

from readme_jax.config import Cluster
from readme_jax.errors import ConfigError
from readme_jax.parallel.distributed import Seat, expand_nodes, find_seat

SLURM = {"SLURM_JOB_ID": "70003", "SLURM_STEP_NODELIST": "gpu[08-10],big1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


def test_one_process_needs_nothing():
    assert find_seat(Cluster(), {}) is None
    assert find_seat(Cluster(processes=1), {}) is None
    assert find_seat(Cluster(), SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_seat(Cluster(), {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_explicit_addresses_win():
    cluster = Cluster(coordinator="10.0.0.1:4000", processes=3, process=2)
    assert find_seat(cluster, SLURM) == Seat("10.0.0.1:4000", 3, 2)
    variables = {"JAX_COORDINATOR_ADDRESS": "host-0.job", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    seat = find_seat(Cluster(), variables | SLURM)
    assert seat == Seat("host-0.job:8482", 2, 1) and (seat.host, seat.port) == ("host-0.job", 8482)


@pytest.mark.parametrize(
    ("cluster", "environ", "said"),
    [
        (Cluster(coordinator="a:1"), {}, "Cluster.coordinator"),
        (Cluster(coordinator="a:1", processes=2, process=2), {}, "counted from 0"),
        (Cluster(coordinator="a:none", processes=2, process=1), {}, "host:port"),
        (Cluster(coordinator="a:65535", processes=2, process=1), {}, "below 65535"),
        (Cluster(), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS"),
        (Cluster(), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = 'two'"),
        (
            Cluster(),
            {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"},
            "MEGASCALE_COORDINATOR_ADDRESS",
        ),
    ],
)
def test_half_an_address_is_one_clear_line(cluster, environ, said):
    with pytest.raises(ConfigError) as caught:
        find_seat(cluster, environ)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_slurm_one_task_a_node():
    seat = find_seat(Cluster(), SLURM | {"SLURM_LOCALID": "0"})
    assert seat is not None and (seat.processes, seat.process, seat.local) == (4, 2, None)
    assert seat.hosts == ("gpu08", "gpu09", "gpu10", "big1") and seat.host == "gpu08"
    other = find_seat(Cluster(), SLURM | {"SLURM_JOB_ID": "70004"})
    assert other is not None and abs(other.port - seat.port) > 1, "neighbouring jobs share no port"


def test_slurm_several_tasks_a_node_take_a_device_each():
    environ = SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    seat = find_seat(Cluster(), environ)
    assert seat is not None and seat.local == 1 and seat.hosts[5] == "gpu10"
    bound = find_seat(Cluster(), environ | {"CUDA_VISIBLE_DEVICES": "3"})
    assert bound is not None and bound.local is None, "SLURM has given it its device already"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("node1", ["node1"]),
        ("a,b[1-2]", ["a", "b1", "b2"]),
        ("n[009-011,3]x", ["n009x", "n010x", "n011x", "n3x"]),
        ("r[1-2]n[1,5]", ["r1n1", "r1n5", "r2n1", "r2n5"]),
    ],
)
def test_node_lists(short, long):
    assert expand_nodes(short) == long


def test_tpu_pod_on_gke():
    pod = {"TPU_WORKER_HOSTNAMES": "w-0.job,w-1.job", "TPU_WORKER_ID": "1"}
    assert find_seat(Cluster(), pod) == Seat("w-0.job:8482", 2, 1, ("w-0.job", "w-1.job"))
    addresses = {"TPU_PROCESS_ADDRESSES": "w-0.job:8476,w-1.job:8476", "TPU_WORKER_ID": "0"}
    assert find_seat(Cluster(), addresses) == Seat("w-0.job:8482", 2, 0, ("w-0.job", "w-1.job"))
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "s-0.job:8080"}
    assert find_seat(Cluster(), pod | slices) == Seat("s-0.job:8482", 6, 5)


@pytest.mark.parametrize("workers", ["10.0.0.7,10.0.0.8", "unknown:0:10.0.0.7,unknown:1:10.0.0.8"])
def test_tpu_machines_ask_their_metadata(workers):
    known = {
        "agent-worker-number": "1",
        "worker-network-endpoints": workers,
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '1'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = known.get(self.path.rpartition("/")[2])
            right = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    try:
        assert find_seat(Cluster(), environ) == Seat("10.0.0.7:8482", 2, 1, ("10.0.0.7", "10.0.0.8"))
        assert find_seat(Cluster(), environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None
        del known["agent-worker-number"]
        assert find_seat(Cluster(), environ) is None, "a machine of Google's without TPU workers"
    finally:
        server.shutdown()
        server.server_close()
