"""Hugging Face folders: what transformers saves loads here, what is saved here loads there, and bad input is named."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
import transformers

from readme_jax.checkpoints import hf
from readme_jax.checkpoints.hf import Dense, load_dense, open_dense, save_dense
from readme_jax.checkpoints.tensors import flatten, hf_names, read_all
from readme_jax.config import RopeScaling
from readme_jax.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def assert_same_weights(dense: Dense, model: Any) -> None:
    """Every parameter equals the torch model's, and none is left over on either side."""
    ours = flatten(dense.params)
    theirs = {k: v.float().numpy() for k, v in model.state_dict().items()}
    if dense.config.tie_embeddings:
        del theirs["lm_head.weight"]
    names = {path: name for name, path in hf_names(dense.config.num_layers).items()}
    assert {names[path] for path in ours} == set(theirs)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[names[path]], err_msg=path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
        ("Mistral", {"sliding_window": 8, "rms_norm_eps": 1e-5}),
    ],
)
def test_loads_what_transformers_saves_and_back(
    tiny_llama: Callable[..., Any], tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    folder, model = tiny_llama(architecture, **settings)
    dense = load_dense(folder)
    assert_same_weights(dense, model)
    save_dense(tmp_path / "ours", dense)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    ids = torch.arange(80)[None]  # beyond the original positions, so that the scaling counts, and the window
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    back = load_dense(tmp_path / "ours")
    assert back.config == dense.config
    jax.tree.map(np.testing.assert_array_equal, back.params, dense.params)


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type"])
def test_reads_rope_settings_of_every_age(tiny_llama: Callable[..., Any], style: str) -> None:
    folder, _ = tiny_llama(rope_parameters=LLAMA3)
    values = json.loads((folder / "config.json").read_text())
    if style != "rope_parameters":
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        if style == "type":
            rope["type"] = rope.pop("rope_type")
        values["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(values))
    config = load_dense(folder).config
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_linear_rope_scaling(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    dense = load_dense(folder)
    assert dense.config.rope_scaling == RopeScaling("linear", 4.0)
    save_dense(tmp_path / "ours", dense)
    assert load_dense(tmp_path / "ours").config == dense.config


def test_bfloat16_keeps_its_type_when_asked(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    _, model = tiny_llama()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_same_weights(load_dense(tmp_path / "half"), model)
    half = load_dense(tmp_path / "half", dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(ml_dtypes.bfloat16)}
    save_dense(tmp_path / "again", half)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(half, loaded)


def test_sharded_index(tiny_llama: Callable[..., Any]) -> None:
    folder, model = tiny_llama(shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_weights(load_dense(folder), model)


def test_known_buffers_are_ignored_and_a_tied_copy_is_dropped(
    tiny_llama: Callable[..., Any], edit_tensors: Callable[..., None]
) -> None:
    folder, model = tiny_llama(tie_word_embeddings=True)
    embed = model.state_dict()["model.embed_tokens.weight"].numpy()
    edit_tensors(
        folder / "model.safetensors",
        **{"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": embed},
    )
    assert_same_weights(load_dense(folder), model)
    edit_tensors(folder / "model.safetensors", **{"lm_head.weight": embed + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embeddings"):
        load_dense(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", (40, 32), "unknown tensor model.layers.2.mlp.up_proj.weight [40, 32]"),
        ("model.layers.0.self_attn.q_proj.bias", (32,), "unknown tensor model.layers.0.self_attn.q_proj.bias [32]"),
        ("model.layers.1.mlp.up_proj.weight", None, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        ("lm_head.weight", None, "tensor lm_head.weight is missing"),
        ("model.norm.weight", (31,), "tensor model.norm.weight has shape [31], expected [32]"),
    ],
)
def test_wrong_tensors_are_named(
    tiny_llama: Callable[..., Any],
    edit_tensors: Callable[..., None],
    name: str,
    value: tuple[int, ...] | None,
    message: str,
) -> None:
    folder, _ = tiny_llama()
    edit_tensors(folder / "model.safetensors", **{name: None if value is None else np.ones(value, np.float32)})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_dense(folder)


def test_a_duplicate_in_one_file_is_named(tiny_llama: Callable[..., Any]) -> None:
    folder, _ = tiny_llama()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.1.self_attn.v_proj", b"layers.1.self_attn.k_proj"))
    with pytest.raises(CheckpointError, match=r"duplicate tensor model\.layers\.1\.self_attn\.k_proj\.weight$"):
        load_dense(folder)


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
def test_reading_takes_the_model_and_one_tensor(
    tiny_llama: Callable[..., Any], smollm2_file: Path, source: str
) -> None:
    folder = smollm2_file if source == "gguf" else None
    if folder is None:  # in bfloat16, so that every tensor is converted
        folder, model = tiny_llama(vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
        model.to(torch.bfloat16).save_pretrained(folder)
    opened = open_dense(folder)
    tracemalloc.start()
    params = read_all(opened.tensors, np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sum(sizes) <= peak <= sum(sizes) + max(sizes) + (1 << 20)


def test_shards_and_index_that_disagree(tiny_llama: Callable[..., Any], edit_tensors: Callable[..., None]) -> None:
    folder, _ = tiny_llama(shard="20KB")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    name, first = "model.norm.weight", places["model.norm.weight"]
    other = next(p for p in sorted(set(places.values())) if p != first)
    before = (folder / other).read_bytes()

    edit_tensors(folder / other, **{name: np.ones(32, np.float32)})  # the same tensor in two shards
    with pytest.raises(CheckpointError, match=f"{other}: holds tensor {name}, but the index puts it in {first}"):
        load_dense(folder)
    (folder / other).write_bytes(before)

    edit_tensors(folder / other, extra=np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="holds tensor extra, but the index does not list it"):
        load_dense(folder)
    (folder / other).write_bytes(before)

    edit_tensors(folder / first, **{name: None})
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing, which the index puts there"):
        load_dense(folder)
    (folder / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first}: no such file"):
        load_dense(folder)


def test_a_file_cut_short(tiny_llama: Callable[..., Any]) -> None:
    folder, _ = tiny_llama()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut short or not a safetensors file") as caught:
            load_dense(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "unsupported architecture 'Qwen2ForCausalLM'"),
        ({"architectures": None}, "unsupported architecture None"),
        ({"attention_bias": True}, "unsupported attention_bias = True"),
        ({"mlp_bias": True}, "unsupported mlp_bias = True"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "unsupported quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "unsupported RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "RoPE scaling 'llama3' needs low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
    ],
)
def test_unsupported_configs(tiny_llama: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    folder, _ = tiny_llama()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_dense(folder)
    assert "\n" not in str(caught.value)


def test_incomplete_folders(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "hidden_size"}))
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        load_dense(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load_dense(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_dense(folder)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_dense(folder)


@pytest.mark.parametrize("source", ["/no/such/folder", "./model.gguf", "../x", "not a hub id", "a/b/c", ""])
def test_no_such_model(source: str) -> None:
    with pytest.raises(CheckpointError, match="^no such model: "):
        load_dense(source)


def test_hub_ids(tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is fetched by huggingface_hub; offline it is one clear line."""
    folder, model = tiny_llama()
    asked: dict[str, Any] = {}

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_same_weights(load_dense("some/model"), model)
    assert asked["name"] == "some/model"
    assert "*.safetensors" in asked["patterns"] and not any("bin" in p for p in asked["patterns"])

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nmore of it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"^no such model: 'some/model' .* \(no network\)$"):
        load_dense("some/model")


def test_save_checks_the_tree(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    dense = load_dense(folder)
    for params, message in [
        ({k: v for k, v in dense.params.items() if k != "lm_head"}, "tensor lm_head is missing"),
        (dense.params | {"final_norm": np.ones(3)}, "final_norm has shape [3], expected [32]"),
        (dense.params | {"extra": np.ones(3)}, "unknown tensor extra"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            save_dense(tmp_path / "out", Dense(dense.config, params, None))
        assert not (tmp_path / "out").exists()


def test_saving_replaces_a_checkpoint_and_nothing_else(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    dense = load_dense(folder)
    out = tmp_path / "out"
    save_dense(out, dense)
    doubled = Dense(dense.config, jax.tree.map(lambda x: 2 * x, dense.params), None)
    save_dense(out, doubled)
    jax.tree.map(np.testing.assert_array_equal, load_dense(out).params, doubled.params)

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files that are not a checkpoint"):
        save_dense(tmp_path / "notes", dense)
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["thesis.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        save_dense(tmp_path / "notes" / "thesis.txt", dense)
    (tmp_path / "empty").mkdir()
    save_dense(tmp_path / "empty", dense)
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "out", "notes", "empty"}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error: No space left on device")]
)
def test_disk_full_leaves_nothing_half_written(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, error: Exception
) -> None:
    folder, _ = tiny_llama()
    dense = load_dense(folder)
    out = tmp_path / "out"
    if older:
        save_dense(out, dense)

    def full(arrays: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(CheckpointError, match="disk full") as caught:
        save_dense(out, Dense(dense.config, jax.tree.map(np.zeros_like, dense.params), None))
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == ({"hf", "out"} if older else {"hf"})
    if older:
        jax.tree.map(np.testing.assert_array_equal, load_dense(out).params, dense.params)
    shutil.rmtree(folder)
