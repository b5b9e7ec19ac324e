"""The exact part of several.py: greedy tokens of a checkpoint in float32, all devices against one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _model import model_of, shape

from readme_jax.checkpoints.mixture import Mixture
from readme_jax.cli.sources import open_model, tokenizer_of
from readme_jax.config import Mesh
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import mesh_of
from readme_jax.serving.programs import Programs
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.store import ExpertStore

LENGTH, CHUNK, NEW = 128, 64, 48
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Theorem. Every finite integral domain is a field. Proof.",
    "Dear committee, I am writing to",
    "In 1969, the first people to walk on the Moon",
    "SELECT name, count(*) FROM",
    "The recipe needs three eggs, a cup of flour and",
    "Abstract. We study the convergence of stochastic gradient descent",
)


def greedy(programs: Programs, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """New tokens [prompts, NEW] and the gap between the two best log-probabilities at each; all experts present."""
    store, rows = programs.store, len(prompts)
    experts = list(range(store.num_experts))
    present, state = store.present(experts), programs.new_state()
    firsts = []
    for row, prompt in enumerate(prompts):
        routed = programs.route(prompt)
        state = programs.insert(state, row, routed)
        state, sampled, _ = programs.prefill(
            state, row, np.asarray(prompt), 0, routed.experts, routed.weights, experts, present, last=True
        )
        firsts.append(sampled)
    found = [tuple(np.concatenate([np.asarray(getattr(s, n)) for s in firsts]) for n in ("tokens", "top_logprobs"))]
    for _ in range(NEW - 1):
        state, sampled = programs.decode(state, np.ones(rows, bool), experts, present, Samplings.greedy(rows))
        found.append((np.asarray(sampled.tokens), np.asarray(sampled.top_logprobs)))
    tokens, top = (np.stack(x, axis=1) for x in zip(*found, strict=True))
    return tokens, top[..., 0] - top[..., 1]


def tiny_model() -> Any:
    """Random float32 weights, large enough that tokens differ."""
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        model = model_of(shape(2, tiny=True), 3)
    return replace(model, params=jax.tree.map(lambda w: 5 * w.astype(jnp.float32), model.params))


def measure(args: argparse.Namespace, add: Callable[..., None]) -> None:
    """A row a mesh: how many prompts get one device's tokens, and where one does not, how close the choice was."""
    if not args.checkpoint and not args.tiny:
        add(case="skipped", why="no --checkpoint was given")
        return
    model: Any = tiny_model() if args.tiny else open_model(args.checkpoint)
    encode = (lambda text: [ord(c) % 512 for c in text]) if args.tiny else tokenizer_of(model, args.checkpoint).encode
    prompts = [encode(text)[:CHUNK] for text in TEXTS]
    count = len(jax.devices())
    meshes = {"one": Mesh(), "tensor": Mesh(tensor=count)}
    if isinstance(model, Mixture):
        meshes["expert"] = Mesh(expert=count)
    limits = Limits(len(TEXTS), LENGTH, (CHUNK,), (len(TEXTS),), (CHUNK, LENGTH), (LENGTH,))
    each = {name: Programs(model, ExpertStore(model, mesh=mesh_of(mesh)), limits) for name, mesh in meshes.items()}
    # A GPU's float32 products are rounded to TF32 otherwise. For all threads: a context holds for one.
    jax.config.update("jax_default_matmul_precision", "highest")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(each, pool.map(lambda p: greedy(p, prompts), each.values()), strict=True))
    jax.config.update("jax_default_matmul_precision", None)
    wanted, gaps = found["one"]
    for name, (tokens, _) in found.items():
        first = [(i, int(np.argmax(row))) for i, row in enumerate(tokens != wanted) if row.any()]
        closest = [float(gaps[i, at]) for i, at in first]
        about = {"case": "greedy", "mesh": f"{name} {each[name].mesh.size}", "prompts": len(prompts), "new_tokens": NEW}
        add(**about, equal=len(prompts) - len(first), gaps_where_not=closest)
