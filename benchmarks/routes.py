"""Routes of real text by tuned routers, for serving experiments: `python benchmarks/routes.py`.

For finished runs (table5.py and train.py leave them) and every domain of the text they read: the expert of each token
of its validation text, in windows of 4096 tokens, so that what a token sees is as long as a long prompt. Traffic is
then cut from these streams: prompt and continuation of a request are neighbouring tokens of one text.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _report import RESULTS, write_results

from readme_jax import config
from readme_jax.checkpoints.mixture import load_mixture
from readme_jax.data.corpus import open_corpus
from readme_jax.evaluation.usage import repeat_rate
from readme_jax.parallel.mesh import make_mesh
from readme_jax.runner import EXPORT
from readme_jax.tuning.routes import RouterRoutes

WINDOW, WINDOWS = 4096, 16  # tokens, and windows a domain at most


def routes_of(folder: Path) -> dict[str, np.ndarray]:
    """Expert of every token, uint8 [n, WINDOW] a domain, by the router of the run in `folder`."""
    saved = json.loads((folder / "config.json").read_text())
    mixture = load_mixture(folder / EXPORT)
    assert mixture.router is not None and mixture.router_config is not None and mixture.tokenizer is not None
    corpus = open_corpus(config.Data(**saved["data"]), mixture.tokenizer)
    corpus.config = replace(corpus.config, validation_tokens=WINDOW * WINDOWS)
    routes = RouterRoutes(jax.device_put(mixture.router), mixture.router_config)
    route = jax.jit(lambda routes, tokens: routes(tokens)[0])
    found = {}
    for domain in corpus.domains:
        windows = corpus.validation(domain, WINDOW)
        experts = [np.asarray(route(routes, window[None]))[0, :, 0] for window in windows]
        found[domain] = np.stack(experts).astype(np.uint8)
    return found


def main() -> None:
    """Write results/routes.npz, `<run>/<domain>` -> [n, WINDOW], and what it holds to results/routes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path("runs/table5/best"), Path("runs/table5/eq4")])
    args = parser.parse_args()
    streams: dict[str, Any] = {}
    rows = []
    with jax.set_mesh(make_mesh(config.Mesh())):
        for folder in args.run:
            for domain, experts in routes_of(folder).items():
                streams[f"{folder.name}/{domain}"] = experts
                repeats = repeat_rate(experts[..., None])
                rows.append({"run": folder.name, "domain": domain, "tokens": experts.size, "repeats": repeats})
    beside = RESULTS / "routes.part.npz"
    np.savez_compressed(beside, **streams)
    os.replace(beside, RESULTS / "routes.npz")
    write_results("routes", rows=rows)


if __name__ == "__main__":
    main()
