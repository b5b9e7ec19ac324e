"""Named tensors to parameter trees and back: one table of names, one place that checks what a file holds.

Everything is checked on names and shapes before the first tensor is read; then tensors are read one at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import CheckpointError
from readme_jax.models.weights import Table, Weight, block_table, outer_table

Shape = tuple[int, ...]

# our path, Hugging Face's name, llama.cpp's name; {l} is the layer
NAMES = (
    ("embed", "model.embed_tokens.weight", "token_embd.weight"),
    ("layers_{l}.attn_norm", "model.layers.{l}.input_layernorm.weight", "blk.{l}.attn_norm.weight"),
    ("layers_{l}.q", "model.layers.{l}.self_attn.q_proj.weight", "blk.{l}.attn_q.weight"),
    ("layers_{l}.k", "model.layers.{l}.self_attn.k_proj.weight", "blk.{l}.attn_k.weight"),
    ("layers_{l}.v", "model.layers.{l}.self_attn.v_proj.weight", "blk.{l}.attn_v.weight"),
    ("layers_{l}.o", "model.layers.{l}.self_attn.o_proj.weight", "blk.{l}.attn_output.weight"),
    ("layers_{l}.ffn_norm", "model.layers.{l}.post_attention_layernorm.weight", "blk.{l}.ffn_norm.weight"),
    ("layers_{l}.ffn.gate", "model.layers.{l}.mlp.gate_proj.weight", "blk.{l}.ffn_gate.weight"),
    ("layers_{l}.ffn.up", "model.layers.{l}.mlp.up_proj.weight", "blk.{l}.ffn_up.weight"),
    ("layers_{l}.ffn.down", "model.layers.{l}.mlp.down_proj.weight", "blk.{l}.ffn_down.weight"),
    ("final_norm", "model.norm.weight", "output_norm.weight"),
    ("lm_head", "lm_head.weight", "output.weight"),
)
TYPES = {"F64", "F32", "F16", "BF16", "I32"}  # I32: the channels of a mixture; quantised weights come in others
# buffers that older exporters saved; they follow from the config
IGNORED = ("model.layers.{l}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape, and how to read it, whole or in parts.

    `slices` reads no more than the part that it is indexed by; without it a part is cut from the whole.
    """

    name: str
    shape: Shape
    read: Callable[[], np.ndarray]
    slices: Any = None

    @property
    def view(self) -> Any:
        """What gives parts by index."""
        return self.read() if self.slices is None else self.slices


def hf_names(layers: int) -> dict[str, str]:
    """Hugging Face's tensor name -> our path."""
    return {hf.format(l=i): ours.format(l=i) for ours, hf, _ in NAMES for i in range(layers)}


def gguf_names(layers: int) -> dict[str, str]:
    """llama.cpp's tensor name -> our path."""
    return {gguf.format(l=i): ours.format(l=i) for ours, _, gguf in NAMES for i in range(layers)}


def ignored_names(layers: int) -> set[str]:
    return {name.format(l=i) for name in IGNORED for i in range(layers)}


def backbone_shapes(config: ModelConfig, mixture: MixtureConfig | None = None) -> dict[str, Shape]:
    """Path -> shape of every parameter of a dense backbone or, given a mixture's shape, of the mixture."""
    shapes = table_shapes(outer_table(config))
    block = table_shapes(block_table(config, mixture, False))
    for i in range(config.num_layers):
        shapes |= {f"layers_{i}.{path}": shape for path, shape in block.items()}
    return shapes


def table_shapes(table: Table) -> dict[str, Shape]:
    """Dotted path -> shape of a (nested) table of weights."""
    shapes: dict[str, Shape] = {}
    for name, entry in table.items():
        if isinstance(entry, Weight):
            shapes[name] = entry.shape
        else:
            shapes |= {f"{name}.{path}": shape for path, shape in table_shapes(entry).items()}
    return shapes


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def match(
    where: Path, stored: Iterable[Stored], names: Mapping[str, str], shapes: Mapping[str, Shape]
) -> dict[str, Stored]:
    """Path -> stored tensor, each expected one exactly once and well shaped; `names` maps stored names to paths.

    Raises CheckpointError naming the first unknown, duplicate, misshapen or missing tensor.
    """
    found: dict[str, Stored] = {}
    for tensor in stored:
        path = names.get(tensor.name)
        if path is None or path not in shapes:
            raise CheckpointError(f"{where}: unknown tensor {tensor.name} {list(tensor.shape)}")
        if path in found:
            raise CheckpointError(f"{where}: duplicate tensor {tensor.name}")
        if tensor.shape != shapes[path]:
            raise CheckpointError(
                f"{where}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shapes[path])}"
            )
        found[path] = tensor
    inverse = {path: name for name, path in names.items()}
    for path in shapes:
        if path not in found:
            raise CheckpointError(f"{where}: tensor {inverse[path]} is missing")
    return found


def read_all(found: Mapping[str, Stored], dtype: Any = None) -> dict[str, Any]:
    """Read matched tensors into a tree, one at a time, each in its own type where `dtype` is None."""
    flat: dict[str, Any] = {}
    for path, tensor in found.items():
        array = tensor.read()
        flat[path] = array if dtype is None else array.astype(dtype, copy=False)
    return unflatten(flat)


def check_tree(tree: Mapping[str, Any], shapes: Mapping[str, Shape], what: str) -> dict[str, Any]:
    """A tree about to be saved as {path: leaf}. Raises CheckpointError where it is not what its config says."""
    flat = flatten(tree)
    stored = [Stored(path, tuple(leaf.shape), partial(np.asarray, leaf)) for path, leaf in flat.items()]
    match(Path(what), stored, {path: path for path in shapes}, shapes)
    return flat


def open_safetensors(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, unread. Raises CheckpointError when it is cut short or no such file."""
    try:
        file = safe_open(str(path), framework="numpy")
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (SafetensorError, OSError) as e:
        for name in repeated_names(path):
            raise CheckpointError(f"{path}: duplicate tensor {name}") from e
        raise CheckpointError(f"{path}: cut short or not a safetensors file ({e}); fetch it again") from e
    for name, part in slices.items():
        if part.get_dtype() not in TYPES:
            raise CheckpointError(f"{path}: tensor {name} has the unsupported type {part.get_dtype()}")
    return [
        Stored(name, tuple(part.get_shape()), partial(file.get_tensor, name), part) for name, part in slices.items()
    ]


def repeated_names(path: Path) -> list[str]:
    """Names that stand more than once in a safetensors header, of which its library says that an offset is wrong."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size <= path.stat().st_size else b""
        entries = json.loads(header, object_pairs_hook=lambda pairs: Counter(name for name, _ in pairs))
    except (OSError, ValueError):
        return []
    return [name for name, count in entries.items() if count > 1] if isinstance(entries, Counter) else []
