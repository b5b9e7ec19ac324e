"""Mixtures in and out: backbone and experts, channels, router, tokenizer and configs, as one safetensors folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file

from readme_jax.checkpoints import tensors
from readme_jax.checkpoints.folder import model_folder
from readme_jax.checkpoints.tensors import Shape, Stored, open_safetensors
from readme_jax.checkpoints.tokenizer import Tokenizer, read_json
from readme_jax.config import MixtureConfig, ModelConfig, RopeScaling, RouterConfig
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.files import write_text
from readme_jax.models.weights import router_table

MODEL_TYPE = "read_me"
MODEL, CHANNELS, ROUTER = "model.safetensors", "channels.safetensors", "router.safetensors"

C = TypeVar("C")


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: unrolled parameters and channels (docs/architecture.md), its router, and its tokenizer.

    `meta` is a JSON object of whatever describes it, for instance {"domains": [...]}.
    """

    config: ModelConfig
    mixture: MixtureConfig
    params: dict[str, Any] = field(repr=False)
    channels: dict[str, Any] = field(repr=False)
    router_config: RouterConfig | None = None
    router: dict[str, Any] | None = field(default=None, repr=False)
    tokenizer: Tokenizer | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def save_mixture(folder: str | Path, mixture: Mixture) -> None:
    """Write a mixture's folder; `load_mixture` returns it bit for bit.

    Raises CheckpointError, leaving nothing behind, when a tensor is not what the configs say, when router and experts
    disagree, when `folder` holds something else than a checkpoint, or when writing fails.
    """
    folder = Path(folder)
    _check_router(folder, mixture.config, mixture.mixture, mixture.router_config)
    if (mixture.router is None) != (mixture.router_config is None):
        raise CheckpointError(f"{folder}: a router needs both its config and its parameters")
    parts = {MODEL: mixture.params, CHANNELS: mixture.channels}
    if mixture.router is not None:
        parts[ROUTER] = mixture.router
    shapes = _shapes(mixture.config, mixture.mixture, mixture.router_config)
    flat = {name: tensors.check_tree(tree, shapes[name], str(folder / name)) for name, tree in parts.items()}
    about = {
        "model_type": MODEL_TYPE,
        "architectures": ["ReadMeForCausalLM"],
        "config": dataclasses.asdict(mixture.config),
        "mixture": dataclasses.asdict(mixture.mixture),
        "router": None if mixture.router_config is None else dataclasses.asdict(mixture.router_config),
        "meta": mixture.meta,
    }
    with model_folder(folder) as beside:
        write_text(beside / "config.json", json.dumps(about, indent=2))
        for name, leaves in flat.items():
            save_file({path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}, beside / name)
        if mixture.tokenizer is not None:
            mixture.tokenizer.save(beside)


def load_mixture(folder: str | Path) -> Mixture:
    """Read a mixture's folder into NumPy arrays, each in the type it was saved in: see `open_mixture`."""
    mixture, backbone = open_mixture(folder)
    return dataclasses.replace(mixture, params=tensors.read_all(backbone))


def open_mixture(folder: str | Path) -> tuple[Mixture, dict[str, Stored]]:
    """A mixture without its backbone's parameters, and those by path, unread.

    Raises CheckpointError: no mixture there, router and experts that disagree, broken files, and unknown, missing or
    misshapen tensors, by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no such model: {str(folder)!r} does not exist")
    path = folder / "config.json"
    about = read_json(path)
    if about.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{folder}: not a mixture (config.json with model_type {MODEL_TYPE!r})")
    config = _config(path, about, "config", ModelConfig)
    shape = _config(path, about, "mixture", MixtureConfig)
    router = None if about.get("router") is None else _config(path, about, "router", RouterConfig)
    _check_router(folder, config, shape, router)
    found = {
        name: tensors.match(folder / name, open_safetensors(folder / name), {p: p for p in shapes}, shapes)
        for name, shapes in _shapes(config, shape, router).items()
    }
    mixture = Mixture(
        config,
        shape,
        {},
        tensors.read_all(found[CHANNELS]),
        router,
        None if router is None else tensors.read_all(found[ROUTER]),
        Tokenizer.load(folder),
        about.get("meta", {}),
    )
    return mixture, found[MODEL]


def is_mixture(folder: str | Path) -> bool:
    """Whether a path is a mixture's folder, not a dense model."""
    return read_json(Path(folder) / "config.json").get("model_type") == MODEL_TYPE


def _shapes(config: ModelConfig, mixture: MixtureConfig, router: RouterConfig | None) -> dict[str, dict[str, Shape]]:
    """File -> path -> shape of everything a mixture holds."""
    channels: dict[str, Shape] = {}
    for i in range(config.num_layers):
        channels[f"layers_{i}.permanent"] = (mixture.permanent,)
        channels[f"layers_{i}.experts"] = (mixture.num_experts, mixture.expert)
    shapes = {MODEL: tensors.backbone_shapes(config, mixture), CHANNELS: channels}
    return shapes if router is None else shapes | {ROUTER: tensors.table_shapes(router_table(router))}


def _check_router(where: Path, config: ModelConfig, mixture: MixtureConfig, router: RouterConfig | None) -> None:
    if router is None:
        return
    if router.num_experts != mixture.num_experts:
        raise CheckpointError(
            f"{where}: the router chooses among {router.num_experts} experts, but the mixture has {mixture.num_experts}"
        )
    if router.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{where}: the router knows {router.vocab_size} tokens, but the backbone {config.vocab_size}"
        )


def _config(where: Path, about: Mapping[str, Any], key: str, kind: type[C]) -> C:
    """One config of config.json. Raises CheckpointError when it is missing or not valid."""
    values = about.get(key)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: {key} is missing")
    values = dict(values)
    try:
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return kind(**values)
    except (TypeError, ConfigError) as e:
        raise CheckpointError(f"{where}: {key} is not valid ({e})") from e
