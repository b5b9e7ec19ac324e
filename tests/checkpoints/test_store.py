"""Run checkpoints: exact round trips, saves killed half-way, full disks, and states of another shape."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from readme_jax import config
from readme_jax.checkpoints.store import Store
from readme_jax.errors import CheckpointError
from readme_jax.parallel.mesh import make_mesh

META = {"config": {"lr": 5e-5, "domains": ["arxiv"]}, "stage": "experts", "position": 7}


def state(step: int) -> dict[str, Any]:
    """Everything a run holds: parameters of two types, optimizer, counters and a typed random key."""
    rng = np.random.default_rng(step)
    params = {
        "embed": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
        "layers_0": {"q": jnp.asarray(rng.normal(size=(4, 4)), jnp.bfloat16), "none": jnp.zeros((0, 4))},
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(step), "key": jax.random.key(step)}


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def same(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, a, b)


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", keep=2)
    assert store.latest() is None
    assert not (tmp_path / "run").exists()
    for step in (10, 20, 30):
        store.save(step, state(step), META | {"position": step})
    assert store.latest() == 30
    store.close()
    again = Store(tmp_path / "run")
    loaded, meta = again.load(30, state(0))
    assert_same(loaded, state(30))
    assert meta == META | {"position": 30} == again.meta(30)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), jax.tree.map(jnp.asarray, state(0))
    )
    assert_same(again.load(20, abstract)[0], state(20))
    with pytest.raises(CheckpointError, match="no checkpoint of step 10"):
        again.load(10, state(0))


def test_state_may_be_donated_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    held = {"w": jnp.arange(2**20, dtype=jnp.float32)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    store.save(1, held, {})
    held = step(step(held))
    np.testing.assert_array_equal(store.load(1, held)[0]["w"], np.arange(2**20, dtype=np.float32))


def test_saving_a_step_again_keeps_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(5, state(5), META)
    store.save(5, state(6), META)
    assert_same(store.load(5, state(0))[0], state(5))


def test_restores_in_the_sharding_asked_for(tmp_path: Path) -> None:
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    store = Store(tmp_path)
    store.save(1, state(1), META)
    sharding = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0))
    loaded, _ = store.load(1, like)
    assert_same(loaded, state(1))
    assert {x.sharding for x in jax.tree.leaves(loaded["params"])} == {sharding}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": jnp.zeros(2, jnp.int32)}, "state['step'] is int32[], this run needs int32[2]"),
        ({"step": jnp.float32(0)}, "state['step'] is int32[], this run needs float32[]"),
        ({"extra": jnp.zeros(3)}, "state['extra'] is nothing, this run needs float32[3]"),
        ({"optimizer": ()}, "this run needs nothing"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "state['key'] is key<fry>[], this run needs uint32[2]"),
    ],
)
def test_states_of_another_shape(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store = Store(tmp_path)
    store.save(1, state(1), META)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        store.load(1, state(0) | change)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(1, state(1), META)
    store.close()
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"1: cannot be restored") as caught:
        store.load(1, state(0))
    assert "\n" not in str(caught.value)


def test_disk_full_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file system refuses in the thread that saves: one clear error, nothing half-written, and saving goes on."""
    import orbax.checkpoint as ocp

    store = Store(tmp_path)
    store.save(1, state(1), META)
    store.wait()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "save", full)
        patch.setattr(ocp.JsonCheckpointHandler, "async_save", full)
        with pytest.raises(CheckpointError, match="disk full") as caught:
            store.save(2, state(2), META)
            store.wait()
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert store.latest() == 1
    assert_same(store.load(1, state(0))[0], state(1))
    store.save(3, state(3), META)
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


SAVER = """
import sys
import jax.numpy as jnp
from readme_jax.checkpoints.store import Store
store = Store(sys.argv[1])
for step in range(1, 10_000):
    store.save(step, {"w": jnp.full((64, 2**14), step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 0.02, 0.05])
def test_a_save_killed_half_way_leaves_the_last_good_one(tmp_path: Path, after: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "4":  # three saves have ended, the fourth is under way
            break
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    latest = store.latest()
    assert latest is not None and latest >= 3
    like = {"w": jnp.zeros((64, 2**14))}
    loaded, meta = store.load(latest, like)
    assert meta == {"step": latest}
    np.testing.assert_array_equal(loaded["w"], np.full((64, 2**14), latest, np.float32))
    store.save(latest + 1, loaded, {})
    store.close()
    assert all(p.name.isdigit() for p in tmp_path.iterdir())  # what the killed save left is gone
    assert store.latest() == latest + 1
