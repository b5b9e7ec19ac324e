"""PyTorch's training steps of the same shape, in a process of its own: reads one JSON object as its argument (the
model's shape, `batch`, `length`, `steps`, `experts`, `expert`, `cases`, `modes`), writes a JSON line a case.

`dense` is transformers' Llama. `seven` is the same with its feed-forward layers replaced by experts, each computed on
all rows and multiplied by zero where a row is not its own, as there are no grouped kernels. Both in bf16 autocast over
float32 masters, with sdpa attention and fused AdamW. The fastest of the modes counts: `eager`; `layers`, which compiles
a layer, for all of them, and the loss; `whole`, one graph of forward pass and loss, which compiles for minutes.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _torch_peer import llama_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

WARM, ROUNDS = 3, 3


class MaskedExperts(nn.Module):
    """Experts that all compute every row; a row keeps its own expert's output."""

    masks: torch.Tensor  # [E, B, 1, 1]

    def __init__(self, config: LlamaConfig, width: int, experts: int, routes: torch.Tensor) -> None:
        """`routes` [B]: the expert of each sequence."""
        super().__init__()
        wide, config.intermediate_size = config.intermediate_size, width
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(experts))
        config.intermediate_size = wide
        masks = routes == torch.arange(experts, device=routes.device)[:, None]
        self.register_buffer("masks", masks[..., None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not in every product
        out = self.masks[0] * self.experts[0](x)
        for mask, expert in zip(self.masks[1:], self.experts[1:], strict=True):
            out = out + mask * expert(x)
        return out


def model_of(ask: dict[str, Any], case: str, device: str) -> Any:
    """Random float32 weights."""
    config = llama_config(ask)
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
        if case == "seven":
            routes = torch.arange(ask["batch"]) % ask["experts"]
            for layer in model.model.layers:
                layer.mlp = MaskedExperts(config, ask["expert"], ask["experts"], routes)
    return model


def step_of(model: Any, tokens: torch.Tensor, mode: str) -> Callable[[], torch.Tensor]:
    """A training step; returns its loss."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    if mode == "layers":
        model.loss_function = torch.compile(model.loss_function, dynamic=False)
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    forward = torch.compile(loss_of, dynamic=False) if mode == "whole" else loss_of

    def step() -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = forward(tokens)
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(ask: dict[str, Any], case: str, mode: str, device: str) -> dict[str, float]:
    """Milliseconds of a step, seconds that the first took, and the most memory held."""
    tokens = torch.randint(ask["vocab_size"], (ask["batch"], ask["length"]), device=device)
    step = step_of(model_of(ask, case, device), tokens, mode)

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        loss.item()  # waits for all of it
        return time.perf_counter() - began

    found = {"start_s": run(1)}
    run(WARM)
    found["ms"] = 1e3 * statistics.median(run(ask["steps"]) / ask["steps"] for _ in range(ROUNDS))
    if device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def answer(ask: dict[str, Any], case: str, device: str) -> dict[str, Any]:
    """The fastest mode of a case, with milliseconds of each that ran and the error of each that did not; `error` where
    none did."""
    about: dict[str, Any] = {"case": case, "torch": torch.__version__}
    ran: list[dict[str, Any]] = []
    for mode in ask["modes"]:
        try:
            found = measure(ask, case, mode, device)
        except Exception as error:  # memory, or whatever a compiler raises
            about[f"{mode}_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            about |= {f"{mode}_ms": found["ms"], f"{mode}_start_s": found.pop("start_s")}
            ran.append(found | {"mode": mode})
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if not ran:
        return about | {"error": about[f"{ask['modes'][0]}_error"]}
    return about | min(ran, key=lambda each: each["ms"])


def main() -> None:
    """Measure every case."""
    ask = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in ask["cases"]:
        print(json.dumps(answer(ask, case, device)), flush=True)


if __name__ == "__main__":
    main()
