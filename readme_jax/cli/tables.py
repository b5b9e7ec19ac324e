"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from readme_jax.evaluation.perplexity import Losses, geometric_mean, perplexities
from readme_jax.evaluation.usage import expert_shares, repeat_rate
from readme_jax.palette import colour

COLUMNS = {"dense": "dense", "sliced": "sliced", "tuned": "tuned", "dense_slice": "dense slice"}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Perplexity of each domain for each model of a run's summary."""
    present = [c for c in COLUMNS if c in summary["geo_mean"]]
    table = Table(title="validation perplexity", title_justify="left")
    table.add_column("domain")
    for name in present:
        table.add_column(COLUMNS[name], justify="right")
    for domain, row in summary["domains"].items():
        table.add_row(domain, *(f"{row[c]:.2f}" for c in present))
    table.add_section()
    table.add_row("geometric mean", *(f"{summary['geo_mean'][c]:.2f}" for c in present), style="bold")
    return table


def perplexity_table(losses: Mapping[str, Losses], names: list[str]) -> Table:
    """Perplexity of each domain; for a mixture (`names` of its experts) also where its tokens went."""
    table = Table()
    for column in ("domain", "tokens", "perplexity") + (("most used expert", "repeats") if names else ()):
        table.add_column(column, justify="left" if column in ("domain", "most used expert") else "right")
    for (domain, each), value in zip(losses.items(), perplexities(losses).values(), strict=True):
        row = [domain, f"{each.nats.size:,}", f"{value:.2f}"]
        if each.experts is not None and names:
            shares = expert_shares(each.experts, len(names))
            best = int(shares.argmax())
            mark = f"[{colour(best)}]■[/]"
            row += [f"{mark} {escape(names[best])} {shares[best]:.0%}", f"{repeat_rate(each.experts):.0%}"]
        table.add_row(*row)
    table.add_section()
    total = sum(each.nats.size for each in losses.values())
    table.add_row("geometric mean", f"{total:,}", f"{geometric_mean(perplexities(losses).values()):.2f}", style="bold")
    return table


def print_summary(summary: Mapping[str, Any], report: str, console: Console) -> None:
    """The end of a run: its table, its report, and an answer beside the dense model's."""
    console.print(summary_table(summary))
    if "answer" in summary:
        console.print(f"\n[bold]prompt[/]   {escape(summary['prompt'])}")
        console.print(f"[bold]tuned[/]    {escape(summary['answer'])}")
        console.print(f"[bold]dense[/]    {escape(summary['dense_answer'])}")
    console.print(f"\nreport: {escape(report)}", soft_wrap=True)
