"""Mixture folders: exact round trips of every kind of mixture, and folders that do not add up."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from readme_jax.checkpoints import mixture as module
from readme_jax.checkpoints.hf import Dense, load_dense, save_dense
from readme_jax.checkpoints.mixture import Mixture, is_mixture, load_mixture, open_mixture, save_mixture
from readme_jax.checkpoints.tensors import backbone_shapes, table_shapes, unflatten
from readme_jax.config import MixtureConfig, ModelConfig, RopeScaling, RouterConfig
from readme_jax.errors import CheckpointError
from readme_jax.models.weights import router_table

E, F = 3, 12
CONFIG = ModelConfig(
    vocab_size=20,
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_dim=F,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position=64),
)
ROUTER = RouterConfig(vocab_size=20, num_experts=E, dim=8, num_heads=2, head_dim=4, mlp_dim=8, logit_divisor=1.0)
KINDS = {
    "permanent": MixtureConfig(E, expert=4, permanent=3, top_k=2),
    "own rows": MixtureConfig(E, expert=6),
    "tied": MixtureConfig(E, expert=4, permanent=2, tied=True),
}


def build(kind: str = "permanent", dtype: Any = np.float32, router: bool = True, tokenizer: Any = None) -> Mixture:
    rng, shape = np.random.default_rng(0), KINDS[kind]

    def random(shapes: dict[str, tuple[int, ...]]) -> Any:
        return unflatten({path: rng.normal(size=s).astype(dtype) for path, s in shapes.items()})

    channels = {
        f"layers_{i}": {
            "permanent": rng.integers(0, F + 1, shape.permanent, np.int32),
            "experts": rng.integers(0, F + 1, (E, shape.expert), np.int32),
        }
        for i in range(CONFIG.num_layers)
    }
    return Mixture(
        CONFIG,
        shape,
        random(backbone_shapes(CONFIG, shape)),
        channels,
        ROUTER if router else None,
        random(table_shapes(router_table(ROUTER))) if router else None,
        tokenizer,
        {"domains": ["arxiv", "github", "wikipedia"], "note": "é", "loss": 0.1},
    )


def assert_same(a: Mixture, b: Mixture) -> None:
    """Bit for bit, types included."""
    for name in ("config", "mixture", "router_config", "meta"):
        assert getattr(a, name) == getattr(b, name)

    def same(x: Any, y: Any) -> None:
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())

    for name in ("params", "channels", "router"):
        jax.tree.map(same, getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("router", [True, False])
def test_round_trip(tmp_path: Path, kind: str, dtype: Any, router: bool) -> None:
    mixture = build(kind, dtype, router)
    save_mixture(tmp_path / "m", mixture)
    assert_same(load_mixture(tmp_path / "m"), mixture)
    assert is_mixture(tmp_path / "m")
    save_mixture(tmp_path / "m", load_mixture(tmp_path / "m"))  # in place
    assert_same(load_mixture(tmp_path / "m"), mixture)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_round_trip_of_device_arrays_special_values_and_tokenizer(tmp_path: Path, smollm2: Dense) -> None:
    mixture = build(tokenizer=smollm2.tokenizer)
    odd = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45, 3.0, 1.0, 2.0], np.float32)
    params = jax.tree.map(jnp.asarray, mixture.params) | {"final_norm": jnp.asarray(odd)}
    mixture = dataclasses.replace(mixture, params=params)
    save_mixture(tmp_path / "m", mixture)
    again = load_mixture(tmp_path / "m")
    assert_same(again, mixture)
    unread, backbone = open_mixture(tmp_path / "m")
    assert unread.params == {} and set(backbone) == set(backbone_shapes(CONFIG, mixture.mixture))
    assert again.tokenizer is not None and smollm2.tokenizer is not None
    assert again.tokenizer.fingerprint == smollm2.tokenizer.fingerprint
    assert again.tokenizer.chat_template == smollm2.tokenizer.chat_template


def test_router_and_experts_that_disagree(tmp_path: Path) -> None:
    mixture = build()
    wrong = dataclasses.replace(mixture, router_config=dataclasses.replace(ROUTER, num_experts=7))
    message = "the router chooses among 7 experts, but the mixture has 3"
    with pytest.raises(CheckpointError, match=message):
        save_mixture(tmp_path / "m", wrong)
    assert not (tmp_path / "m").exists()
    save_mixture(tmp_path / "m", mixture)
    edit_config(tmp_path / "m", lambda about: about["router"].update(num_experts=7))
    with pytest.raises(CheckpointError, match=message):
        load_mixture(tmp_path / "m")
    edit_config(tmp_path / "m", lambda about: about["router"].update(num_experts=3, vocab_size=21))
    with pytest.raises(CheckpointError, match="the router knows 21 tokens, but the backbone 20"):
        load_mixture(tmp_path / "m")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(model_type="llama"), "not a mixture"),
        (lambda about: about.pop("mixture"), "mixture is missing"),
        (lambda about: about["mixture"].update(num_experts=0), "mixture is not valid"),
        (lambda about: about["mixture"].update(colour="red"), "mixture is not valid"),
        (lambda about: about["config"]["rope_scaling"].update(kind="yarn"), "config is not valid"),
        (lambda about: about["mixture"].update(expert=5), "has shape [8, 4], expected [8, 5]"),
        (lambda about: about["config"].update(num_layers=3), "tensor layers_2.attn_norm is missing"),
        (lambda about: about["config"].update(num_layers=1), "unknown tensor layers_1."),
    ],
)
def test_configs_that_do_not_add_up(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    save_mixture(tmp_path / "m", build())
    edit_config(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_mixture(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "channels.safetensors", "router.safetensors"])
def test_broken_files(tmp_path: Path, name: str) -> None:
    save_mixture(tmp_path / "m", build())
    path = tmp_path / "m" / name
    held, whole = load_file(path), path.read_bytes()
    first = sorted(held)[0]
    save_file({k: v for k, v in held.items() if k != first}, path)
    with pytest.raises(CheckpointError, match=f"{name}: tensor {first} is missing"):
        load_mixture(tmp_path / "m")
    save_file(held | {"extra": np.ones(1, np.float32)}, path)
    with pytest.raises(CheckpointError, match=f"{name}: unknown tensor extra"):
        load_mixture(tmp_path / "m")
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{name}: cut short"):
        load_mixture(tmp_path / "m")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        load_mixture(tmp_path / "m")


def test_dense_and_mixture_folders_are_told_apart(tmp_path: Path) -> None:
    mixture = build()
    save_mixture(tmp_path / "m", mixture)
    with pytest.raises(CheckpointError, match="unsupported architecture 'ReadMeForCausalLM'"):
        load_dense(tmp_path / "m")
    rng = np.random.default_rng(0)
    params = unflatten({p: rng.normal(size=s).astype(np.float32) for p, s in backbone_shapes(CONFIG).items()})
    save_dense(tmp_path / "d", Dense(CONFIG, params, None))
    assert not is_mixture(tmp_path / "d") and not is_mixture(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a mixture"):
        load_mixture(tmp_path / "d")
    with pytest.raises(CheckpointError, match="^no such model"):
        load_mixture(tmp_path / "nowhere")


def test_half_a_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="both its config and its parameters"):
        save_mixture(tmp_path / "m", dataclasses.replace(build(), router=None))


def test_disk_full_leaves_the_older_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = build()
    save_mixture(tmp_path / "m", mixture)
    writes: list[Path] = []

    def full(arrays: Any, path: Path) -> None:
        writes.append(path)
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        save_file(arrays, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        save_mixture(tmp_path / "m", build("tied"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(load_mixture(tmp_path / "m"), mixture)
