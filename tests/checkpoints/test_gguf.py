"""GGUF files: the embedded model against transformers, and small files written here for every feature and fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf.dequant import dequantize
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from readme_jax.checkpoints.hf import Dense, load_dense, save_dense
from readme_jax.checkpoints.hf_config import to_hf
from readme_jax.checkpoints.tensors import flatten, hf_names
from readme_jax.config import RopeScaling
from readme_jax.errors import CheckpointError

D, F, V, HEADS, KV = 256, 256, 96, 8, 4
HEAD = D // HEADS
Types = gguf.GGMLQuantizationType


@pytest.fixture
def weights_file(smollm2_file: Path, tmp_path: Path) -> Path:
    """The embedded file without its tokenizer, which transformers takes half a minute to read."""
    reader = gguf.GGUFReader(smollm2_file)
    writer = gguf.GGUFWriter(tmp_path / "weights.gguf", "llama")
    add = {gguf.GGUFValueType.UINT32: writer.add_uint32, gguf.GGUFValueType.FLOAT32: writer.add_float32}
    for key, held in reader.fields.items():
        if key.startswith("llama."):
            add[held.types[0]](key, held.contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return tmp_path / "weights.gguf"


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_equals_transformers_loading_of_it(smollm2: Dense, weights_file: Path) -> None:
    values = to_hf(smollm2.config, "float32", 1, (2,))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    loaded = load_gguf_checkpoint(str(weights_file), return_tensors=True, model_to_load=model)
    shared = loaded["config"].keys() & values.keys()
    assert len(shared) >= 10
    assert {k: values[k] for k in shared} == {k: loaded["config"][k] for k in shared}
    ours, names = flatten(smollm2.params), {path: name for name, path in hf_names(30).items()}
    assert {names[path] for path in ours} == set(loaded["tensors"])
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, loaded["tensors"][names[path]].numpy(), err_msg=path)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """A one-layer Llama as a .gguf file; `tensors` and `meta` change or (None) drop entries of it."""

    def write(
        tensors: dict[str, Any] | None = None, meta: dict[str, Any] | None = None, architecture: str = "llama"
    ) -> Path:
        rng = np.random.default_rng(0)
        shapes = {
            "token_embd": (V, D),
            "output": (V, D),
            "output_norm": (D,),
            "blk.0.attn_norm": (D,),
            "blk.0.attn_q": (D, D),
            "blk.0.attn_k": (KV * HEAD, D),
            "blk.0.attn_v": (KV * HEAD, D),
            "blk.0.attn_output": (D, D),
            "blk.0.ffn_norm": (D,),
            "blk.0.ffn_gate": (F, D),
            "blk.0.ffn_up": (F, D),
            "blk.0.ffn_down": (D, F),
        }
        held: dict[str, Any] = {f"{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        values: dict[str, Any] = {
            "llama.block_count": 1,
            "llama.context_length": 512,
            "llama.embedding_length": D,
            "llama.feed_forward_length": F,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 500000.0,
            "llama.vocab_size": V,
        } | (meta or {})
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in values.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif value is not None:
                writer.add_uint32(key, value)
        for name, value in (held | (tensors or {})).items():
            if isinstance(value, tuple):
                writer.add_tensor(name, value[0], raw_dtype=value[1])
            elif value is not None:
                writer.add_tensor(name, value)
        finish(writer)
        return path

    return write


def test_reads_shape_and_undoes_the_row_permutation(write_gguf: Callable[..., Path]) -> None:
    """llama.cpp interleaves the two halves of a head's rows: its row 2i is row i, its row 2i + 1 row i + h / 2."""
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(D, D)).astype(np.float32)
    permuted = np.empty_like(plain)
    for head in range(HEADS):
        for i in range(HEAD // 2):
            permuted[head * HEAD + 2 * i] = plain[head * HEAD + i]
            permuted[head * HEAD + 2 * i + 1] = plain[head * HEAD + i + HEAD // 2]
    dense = load_dense(write_gguf({"blk.0.attn_q.weight": permuted}))
    np.testing.assert_array_equal(dense.params["layers_0"]["q"], plain)
    assert (dense.config.head_dim, dense.config.rope_theta, dense.config.tie_embeddings) == (HEAD, 500000.0, False)
    assert dense.tokenizer is None


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # random bytes hold scales that are no numbers
@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_dequantises(write_gguf: Callable[..., Path], kind: str) -> None:
    """Random blocks of every common type, against transformers' dequantiser in torch."""
    block, size = gguf.GGML_QUANT_SIZES[Types[kind]]
    raw = np.random.default_rng(2).integers(0, 256, (F, D // block * size), np.uint8)
    if kind in ("F16", "BF16"):
        expected = torch.from_numpy(raw).view(torch.float16 if kind == "F16" else torch.bfloat16).float().numpy()
    else:
        expected = dequantize(torch.from_numpy(raw.reshape(-1)), int(Types[kind])).numpy().reshape(F, D)
    loaded = load_dense(write_gguf({"blk.0.ffn_up.weight": (raw, Types[kind])})).params["layers_0"]["ffn"]["up"]
    assert loaded.dtype == np.float32
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9
    np.testing.assert_allclose(loaded[finite], expected[finite], rtol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_every_type_that_the_package_dequantises(write_gguf: Callable[..., Path], kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[Types[kind]]
    raw = np.random.default_rng(4).integers(0, 256, (F, D // block * size), np.uint8)
    loaded = load_dense(write_gguf({"blk.0.ffn_up.weight": (raw, Types[kind])})).params["layers_0"]["ffn"]["up"]
    assert loaded.shape == (F, D) and loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, gguf.quants.dequantize(raw, Types[kind]))


def test_a_type_that_nothing_dequantises_is_named(write_gguf: Callable[..., Path]) -> None:
    raw = np.zeros((F, D // 256 * gguf.GGML_QUANT_SIZES[Types.Q8_K][1]), np.uint8)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight cannot be dequantised") as caught:
        load_dense(write_gguf({"blk.0.ffn_up.weight": (raw, Types.Q8_K)}))
    assert "\n" not in str(caught.value)


def test_a_duplicate_tensor_is_named(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"))
    with pytest.raises(CheckpointError, match=r"duplicated tensor .*blk\.0\.attn_k\.weight") as caught:
        load_dense(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_dequantises_what_was_quantised(write_gguf: Callable[..., Path], kind: str) -> None:
    values = np.random.default_rng(3).normal(size=(F, D)).astype(np.float32)
    raw = gguf.quants.quantize(values, Types[kind])
    loaded = load_dense(write_gguf({"blk.0.ffn_up.weight": (raw, Types[kind])})).params["layers_0"]["ffn"]["up"]
    assert np.abs(loaded - values).max() < 0.3  # one step of 5 bits over -4.5 to 4.5


def test_round_trip_through_a_folder(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    dense = load_dense(write_gguf({"output.weight": None}))
    assert dense.config.tie_embeddings
    save_dense(tmp_path / "folder", dense)
    again = load_dense(tmp_path / "folder")
    assert again.config == dense.config
    jax.tree.map(np.testing.assert_array_equal, again.params, dense.params)


def test_rope_scalings(write_gguf: Callable[..., Path]) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert load_dense(write_gguf(meta=linear)).config.rope_scaling == RopeScaling("linear", 4.0)
    with pytest.raises(CheckpointError, match="unsupported RoPE scaling 'yarn'"):
        load_dense(write_gguf(meta={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}))
    assert load_dense(write_gguf({"rope_freqs.weight": np.ones(HEAD // 2, np.float32)})).config.rope_scaling is None

    config = transformers.LlamaConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, HEAD, 2) / HEAD)
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert len(np.unique(factors)) > 3  # 1, 32, and a blend between
    loaded = load_dense(write_gguf({"rope_freqs.weight": factors}))
    assert loaded.config.rope_scaling is not None
    assert loaded.config.rope_scaling.factor == pytest.approx(32.0, rel=1e-5)
    assert loaded.config.rope_scaling.original_max_position == 8192
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not a llama3 blend"):
        load_dense(write_gguf({"rope_freqs.weight": factors * np.linspace(1, 2, HEAD // 2, dtype=np.float32)}))


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"blk.0.ffn_up.weight": None}, {}, "tensor blk.0.ffn_up.weight is missing"),
        ({"blk.1.ffn_up.weight": np.ones((F, D), np.float32)}, {}, "unknown tensor blk.1.ffn_up.weight [256, 256]"),
        ({"output_norm.weight": np.ones(3, np.float32)}, {}, "output_norm.weight has shape [3], expected [256]"),
        ({}, {"llama.embedding_length": None}, "metadata llama.embedding_length is missing"),
        ({}, {"llama.vocab_size": None}, "metadata llama.vocab_size is missing"),
        ({}, {"llama.expert_count": 8}, "unsupported: a mixture of experts already"),
        ({}, {"llama.rope.dimension_count": 16}, "unsupported: RoPE on 16 of 32 channels"),
        ({}, {"llama.attention.head_count_kv": 3}, "num_kv_heads = 3"),
        ({}, {"tokenizer.ggml.model": "bert"}, "unsupported tokenizer 'bert'"),
    ],
)
def test_bad_files(
    write_gguf: Callable[..., Path], tensors: dict[str, Any], meta: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_dense(write_gguf(tensors, meta))
    assert "\n" not in str(caught.value)


def test_unsupported_architecture(write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="unsupported architecture 'gemma2'"):
        load_dense(write_gguf(architecture="gemma2"))


def test_a_file_cut_short(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    whole = path.read_bytes()
    for length in (len(whole) - 40, len(whole) // 2, 400, 10, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut short") as caught:
            load_dense(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"GIF89a" + bytes(200))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_dense(path)
