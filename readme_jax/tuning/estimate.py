"""What a run will hold, read and compute, from its settings and the dense model's shape: no weights, nothing compiled.

FLOPs as models/sizes.py counts them; evaluation, selection and refit's solves, and recomputation by remat are left out.

# E experts, F dense FFN width, T sequence length
"""

from __future__ import annotations

from dataclasses import dataclass

from readme_jax import config
from readme_jax.config import ModelConfig
from readme_jax.models.router import config_for
from readme_jax.models.sizes import (
    TRAINING,
    Channels,
    dense_parameters,
    forward_flops,
    mixture_parameters,
    router_forward_flops,
    table_size,
)
from readme_jax.models.weights import router_table
from readme_jax.refactor.groups import expert_count
from readme_jax.tuning.schedule import schedule_of

# Share of a token's channels that every expert keeps: 23% of F at half width, the paper's seven experts. Calibration
# decides it: known only then.
PERMANENT = 0.46


@dataclass(frozen=True)
class Estimate:
    """Parameters (dense, total, active, router), tokens and FLOPs of each stage of a run.

    `total` counts a shared permanent part as large as the paper's; `total_most` none at all.
    """

    experts: int
    parameters: dict[str, int]
    tokens: dict[str, int]
    flops: dict[str, float]


def estimate(run: config.Run, model: ModelConfig, domains: int) -> Estimate:
    """The estimate of a run on text of so many domains. Raises ConfigError where experts do not fit the domains."""
    experts = expert_count(run.slice, domains)
    width = max(1, round(run.slice.width * model.ffn_dim))
    shared = PERMANENT * width if run.slice.permanent and experts > 1 else 0.0
    own = Channels(experts, width, 0.0, run.slice.top_k, run.slice.tied)
    channels = Channels(experts, width - shared, shared, run.slice.top_k, run.slice.tied)
    total, active = mixture_parameters(model, channels)
    router = config_for(run.router, model, experts)
    parameters = {
        "dense": dense_parameters(model),
        "total": total,
        "total_most": mixture_parameters(model, own)[0],
        "active": active,
        "router": table_size(router_table(router)) if experts > 1 else 0,
    }
    schedule, length = schedule_of(run, experts), run.data.sequence_length
    tokens = {
        "calibration": run.slice.calibration_tokens * domains,
        "router": schedule.rounds * schedule.router * run.router_stage.batch * length,
        "expert": schedule.rounds * schedule.experts * run.expert_stage.batch * length,
    }
    each = flops_a_token(run, model, channels, experts)
    return Estimate(experts, parameters, tokens, {name: tokens[name] * each[name] for name in tokens})


def flops_a_token(run: config.Run, model: ModelConfig, channels: Channels, experts: int) -> dict[str, float]:
    """FLOPs of one token in calibration, in a router step and in an expert step."""
    length = run.data.sequence_length
    trunk = forward_flops(model, model.ffn_dim, length, head=False)
    sliced = forward_flops(model, channels.active, length)
    route = router_forward_flops(config_for(run.router, model, experts), length) if experts > 1 else 0.0
    objective = run.router_stage.objective
    if objective == "expert_loss":
        target = experts * forward_flops(model, channels.permanent + channels.own, length)
    elif objective == "domain" and run.router.kind != "layerwise":
        target = 0.0
    else:
        target = trunk
    teacher = forward_flops(model, model.ffn_dim, length) if run.expert_stage.distill else 0.0
    sequential = run.slice.refit == "sequential"
    return {
        "calibration": trunk + (forward_flops(model, channels.active, length, head=False) if sequential else 0.0),
        "router": target + TRAINING * route,
        "expert": TRAINING * sliced + route + teacher,
    }
