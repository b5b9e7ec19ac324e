"""Logits and greedy tokens equal those of transformers on the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.checkpoints.hf import load_dense
from readme_jax.config import ModelConfig, RopeScaling
from readme_jax.models import attention
from readme_jax.models.feed_forward import linear
from readme_jax.models.llama import Llama, head_weight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large: attention patterns are sharp and logits spread
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
OURS = {
    "vocab_size": 199,
    "embed_dim": 64,
    "ffn_dim": 96,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama3": (
        lambda: transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3),
        ModelConfig(**OURS, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    ),
    "linear": (
        lambda: transformers.LlamaConfig(
            **SHAPE,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
        ModelConfig(**OURS, norm_eps=1e-6, tie_embeddings=True, rope_scaling=RopeScaling("linear", 4.0)),
    ),
    "mistral": (
        lambda: transformers.MistralConfig(
            **SHAPE,
            rms_norm_eps=1e-5,
            sliding_window=24,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        ModelConfig(**OURS, sliding_window=24),
    ),
}


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Torch's idle threads spin and slow what jax runs next in the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_parity(theirs, config, params, prompt, tokens):
    """Logits of a whole sequence, then 32 greedy tokens: ours from a cache, theirs from `generate`."""
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
        generated = theirs.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    model = Llama(config)

    @jax.jit
    def logits(params, tokens):
        return linear(model.apply({"params": params}, tokens)[0], head_weight(params))

    assert np.abs(logits(params, jnp.asarray(tokens)) - want).max() < 1e-3

    @jax.jit
    def step(params, tokens, cache):
        hidden, cache = model.apply({"params": params}, tokens, cache=cache)
        return linear(hidden[:, -1], head_weight(params)).argmax(-1), cache

    cache = attention.empty_cache(
        config.num_layers, len(prompt), config.num_kv_heads, config.head_dim, prompt.shape[1] + 32, jnp.float32
    )
    following, cache = step(params, jnp.asarray(prompt), cache)
    greedy = [following]
    for _ in range(31):
        following, cache = step(params, following[:, None].astype(jnp.int32), cache)
        greedy.append(following)
    np.testing.assert_array_equal(np.stack(greedy, axis=1), generated[:, prompt.shape[1] :].numpy())


@pytest.mark.parametrize("case", CASES)
def test_random_model_equals_transformers(case, tmp_path):
    build, config = CASES[case]
    torch.manual_seed(0)
    cls = transformers.MistralForCausalLM if case == "mistral" else transformers.LlamaForCausalLM
    theirs = cls(build()).eval()
    theirs.save_pretrained(tmp_path / "model")
    ours = load_dense(tmp_path / "model")
    assert ours.config == config
    tokens = np.random.default_rng(0).integers(0, 199, (2, 300))  # above a block, the window and the llama3 length
    check_parity(theirs, config, ours.params, tokens[:, :40], tokens)


def test_smollm2_equals_transformers():
    ours = load_dense("smollm2-135m")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(torch.from_numpy(np.array(find(ours.params, name))))
    prompt = np.array([ours.tokenizer.encode("The capital of France is Paris, and the capital of Italy is")])
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 64))
    check_parity(theirs, ours.config, ours.params, prompt, np.concatenate([prompt, tokens], axis=1))


def find(params, name):
    """Our array of a transformers parameter, such as model.layers.3.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[1] != "layers":
        return params[{"embed_tokens": "embed", "norm": "final_norm"}[parts[1]]]
    layer, kind = params[f"layers_{parts[2]}"], parts[-2].removesuffix("_proj")
    if parts[3] == "mlp":
        return layer["ffn"][kind]
    return layer[{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.get(kind, kind)]
