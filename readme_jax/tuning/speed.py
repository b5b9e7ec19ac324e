"""How fast a step is against what its devices could do, and how much of a run's time went into steps that stand.

MFU = FLOPs of a step / (seconds x devices x peak FLOP/s of one device in bf16). FLOPs are those that the model needs,
not those that were run (models/sizes.py): a matmul of n parameters takes 6n a trained token and 2n a frozen one, of
experts only the channels that a token runs (padding left out), attention's two products the keys that causal masking
leaves (half), recomputation nothing. Goodput = seconds in steps that stand / seconds since the run was first started,
pauses included.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax

from readme_jax import config
from readme_jax.config import ModelConfig
from readme_jax.models.sizes import Channels
from readme_jax.tuning.estimate import flops_a_token
from readme_jax.tuning.schedule import Stage

# A pattern of `device_kind` -> peak of one device, dense bf16, by the vendor.
PEAKS = {
    r"TPU v4$": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5p?$": 459e12,
    r"TPU v6 ?(lite|e)": 918e12,
    r"A100": 312e12,
    r"H100 (PCIe|NVL)": 756e12,
    r"(H100|H200|GH200)": 989e12,
}


def peak_of(kind: str) -> float | None:
    """Peak FLOP/s of a device by its kind, None where it is not known."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, kind)), None)


class Speed:
    """Rates of a run's steps; `channels` are the real ones, padding left out."""

    def __init__(self, run: config.Run, model: ModelConfig, channels: Channels, devices: int, kind: str) -> None:
        each = flops_a_token(run, model, channels, channels.experts)
        self.flops: dict[Stage, float] = {"router": each["router"], "experts": each["expert"]}
        self.devices, self.peak = devices, peak_of(kind)

    def of(self, stage: Stage, tokens: int, seconds: float) -> dict[str, float]:
        """`seconds`, `tokens_per_second`, `tflops` a device, and where its peak is known `mfu`, of one step."""
        rate = self.flops[stage] * tokens / seconds / self.devices
        values = {"seconds": seconds, "tokens_per_second": tokens / seconds, "tflops": rate / 1e12}
        return values if self.peak is None else values | {"mfu": rate / self.peak}


class Trace:
    """An XProf trace of the first `steps` steps of each stage once it is compiled, in `<output>/trace/<stage>`."""

    def __init__(self, output: str, steps: int) -> None:
        self.folder, self.steps = Path(output) / "trace", steps
        self.left: dict[Stage, int] = {}
        self.running = False

    def before(self, stage: Stage) -> None:
        """A compiled step is about to run."""
        if self.steps and stage not in self.left:
            self.left[stage] = self.steps
            self.running = True
            jax.profiler.start_trace(self.folder / stage)

    def after(self, stage: Stage, ended: bool) -> None:
        """It has run; `ended` when the stage has."""
        if self.running:
            self.left[stage] -= 1
            if ended or not self.left[stage]:
                self.close()

    def close(self) -> None:
        """End the trace under way, if any."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
