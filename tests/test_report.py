"""The report is one well-formed, self-contained file that says what the run's files say."""

from __future__ import annotations

import html.parser
import json
import re
from xml.etree import ElementTree

import pytest

from readme_jax import config
from readme_jax.cli.settings import resolved
from readme_jax.errors import CheckpointError
from readme_jax.report import write_report

NAMES = ["arxiv", "github", "<b>&amp;"]
DENSE = {"arxiv": 12.0, "github": 6.0, "<b>&amp;": 24.0}


def summary() -> dict:
    models = {"dense": 1.0, "sliced": 2.0, "tuned": 1.5, "dense_slice": 3.0}
    return {
        "domains": {n: {m: DENSE[n] * f for m, f in models.items()} for n in NAMES},
        "geo_mean": {m: 12.0 * f for m, f in models.items()},
        "experts": NAMES,
        "matrix": [[20.0 + i + j for j in range(3)] for i in range(3)],
        "usage": {n: [0.7, 0.2, 0.1] for n in NAMES},
        "repeats": 0.925,
        "oracle": 17.25,
        "tokens": {"calibration": 49152, "router": 100000, "expert": 98304},
        "seconds": 930.0,
        "peak_memory_gb": 5.25,
        "prompt": "Who <is> there?",
        "answer": "It is & I",
        "dense_answer": "<script>alert(1)</script>",
    }


def metrics() -> list[dict]:
    out, step = [], 0
    for round_ in range(2):
        for stage, steps in (("router", 3), ("experts", 2)):
            for i in range(steps):
                step += 1
                out.append({"kind": "train", "step": step, "round": round_, "stage": stage, "loss": 3.0 - i})
            out.append({"kind": "evaluation", "step": step, "round": round_, "stage": stage, "perplexity": DENSE})
    return out


@pytest.fixture
def run(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    facts = {"experts": NAMES, "overlap": [[1.0, 0.5, 0.6]] * 3, "permanent_share": [0.25, 0.5]}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics()))
    (tmp_path / "config.json").write_text(resolved(config.Run(output="runs/test", seed=7)))
    return tmp_path


def figures(page: str) -> dict[str, str]:
    """Label of each inline SVG -> its source, which must parse as XML."""
    found = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    for each in found:
        ElementTree.fromstring(each)
    return {re.search('aria-label="([^"]*)"', each)[1]: each for each in found}


def test_page_holds_every_part(run):
    page = write_report(run).read_text()
    drawn = figures(page)
    for label in (
        "Validation perplexity of each domain", "Perplexity of each domain's text when forced", "Training curves",
        "Share of channels that each pair", "Share of channels kept by every expert", "Experts used by",
    ):  # fmt: skip
        assert sum(found.startswith(label) for found in drawn) == 1, label
    assert len(drawn) == 6
    for said in ("18.00", "1.50×", "0.50×", "92%", "98,304", "17.25", "15.5 minutes", "5.2 GB", "runs/test", "seed 7"):
        assert said in page, said
    assert "temperature" in page  # the resolved config is there


def test_training_figure_shades_every_stage(run):
    svg = next(s for label, s in figures(write_report(run).read_text()).items() if label.startswith("Training"))
    for face in ("#009e73", "#0072b2"):
        assert len(re.findall(rf"fill: {face}; (?:fill-)?opacity: 0.12", svg)) == 2 * 3  # rounds x panels


def test_text_of_the_run_cannot_become_markup(run):
    page = write_report(run).read_text()
    assert "<script" not in page and "<b>&amp;" not in page
    assert "&lt;script&gt;" in page and "Who &lt;is&gt; there?" in page


def test_page_loads_nothing_from_elsewhere_and_closes_its_tags(run):
    class Tags(html.parser.HTMLParser):
        open: list[str] = []
        loads: list[str] = []

        def handle_starttag(self, tag, attributes):
            if tag not in {"meta", "link", "br", "img", "use", "path", "rect"}:
                self.open.append(tag)
            self.loads += [v for k, v in attributes if k in {"src", "href", "xlink:href"} and not v.startswith("#")]

        def handle_endtag(self, tag):
            if tag in self.open:
                assert self.open.pop() == tag

    tags = Tags()
    page = write_report(run).read_text()
    tags.feed(page)
    assert tags.open == [] and tags.loads == []
    assert "@import" not in page and "url(http" not in page


def test_colours_come_from_the_page(run):
    svg = "".join(figures(write_report(run).read_text()).values())
    assert "currentColor" in svg and "var(--line)" in svg
    assert not re.search("#0[1-9]0[1-9]0[1-9]", svg)


def test_report_is_a_function_of_the_run(run):
    assert write_report(run).read_text() == write_report(run).read_text()


def test_parts_without_data_are_left_out(run):
    for name in ("facts.json", "metrics.jsonl", "config.json"):
        (run / name).unlink()
    least = {k: v for k, v in summary().items() if k in {"domains", "geo_mean"}}
    for row in (*least["domains"].values(), least["geo_mean"]):
        del row["dense_slice"]
    (run / "summary.json").write_text(json.dumps(least))
    page = write_report(run).read_text()
    assert len(figures(page)) == 1
    assert "Dense slice, tuned" not in page and "Training" not in page


def test_folder_of_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no summary\.json"):
        write_report(tmp_path)
