"""Decode steps of transformers' Llama of the same shape, in a process of its own: reads a JSON line a measurement from
standard input ({"batch", "length", "position", "compiled"}), writes its milliseconds a step, or {"error"}
where memory does not suffice."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

STEPS, ROUNDS = 20, 3


def llama_config(shape: dict[str, Any]) -> LlamaConfig:
    """transformers' form of a `ModelConfig` as a dict."""
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}
    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_position"],
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        tie_word_embeddings=shape["tie_embeddings"],
        **attention,
    )


def model_of(shape: dict[str, Any], device: str) -> Any:
    """Random bf16 weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        return LlamaForCausalLM(llama_config(shape)).eval()


@torch.inference_mode()
def decode(model: Any, forward: Any, batch: int, length: int, position: int) -> float:
    """Seconds of a step that feeds its best token to the next, the cache filled up to `position`."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=length)
    tokens = torch.randint(0, model.config.vocab_size, (batch, position), device=device)
    for rows in range(0, position, 128):  # in parts: a prompt's attention takes little memory
        at = torch.arange(rows, min(rows + 128, position), device=device)
        model(tokens[:, at], past_key_values=cache, position_ids=at[None], cache_position=at, logits_to_keep=1)
    token, at = tokens[:, :1], torch.tensor([position], device=device)

    def run(steps: int) -> None:
        nonlocal token
        for _ in range(steps):
            if forward is not model.forward:
                torch.compiler.cudagraph_mark_step_begin()
            out = forward(token, past_key_values=cache, position_ids=at[None], cache_position=at)
            token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(3)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run(STEPS)
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times)


def main() -> None:
    """Serve measurements."""
    shape = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(shape, device)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    for line in sys.stdin:
        ask = json.loads(line)
        forward = compiled if ask["compiled"] else model.forward
        try:
            ms = 1e3 * decode(model, forward, ask["batch"], ask["length"], ask["position"])
            answer = {"ms": ms, "torch": torch.__version__}
        except torch.OutOfMemoryError as error:
            answer = {"error": str(error).splitlines()[0]}
        print(json.dumps(answer), flush=True)
        if ask["compiled"]:
            torch.compiler.reset()  # its graphs hold the cache
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
