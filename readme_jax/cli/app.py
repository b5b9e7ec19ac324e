"""The commands of `readme-jax`. Each imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(
    name="readme-jax",
    help="Refactor a pretrained dense LLM into a router-decoupled mixture of experts, and use it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str, typer.Option("--checkpoint", help="A mixture's or run's folder, a dense model's folder, .gguf file or hub id.")
]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw to continue.")],
    checkpoint: Checkpoint,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
) -> None:
    """Answer a prompt; in a terminal each token has the colour of its expert."""
    from rich.console import Console

    from readme_jax.cli.answer import pieces, prompt_ids, show
    from readme_jax.cli.sources import expert_names, open_model, tokenizer_of
    from readme_jax.generate import Generator, Sampling

    sampling = Sampling(temperature, top_p, seed)
    model: Any = open_model(checkpoint)
    tokenizer = tokenizer_of(model, checkpoint)
    ids = prompt_ids(tokenizer, prompt, raw)
    names = expert_names(model) if hasattr(model, "mixture") else []
    show(pieces(Generator(model), tokenizer, ids, max_tokens, sampling), Console(highlight=False), names)


@app.command()
def perplexity(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="A folder of <domain>/validation.jsonl, or `starter`.")] = "starter",
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Validation tokens a domain.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 4,
) -> None:
    """Perplexity of a model on each domain's validation text, a mixture routed by its own router."""
    from rich.console import Console

    from readme_jax.cli.measure import measure
    from readme_jax.cli.tables import perplexity_table

    losses, names = measure(checkpoint, data, tuple(domain or ()), tokens, window, batch)
    Console().print(perplexity_table(losses, names))


@app.command()
def refactor(
    gin_file: Annotated[list[str], typer.Option("--gin_file", help="Settings; repeatable, later ones win.")],
    gin_param: Annotated[list[str] | None, typer.Option("--gin_param", help="One binding; repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="The run's folder, in place of Run.output.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped, or begin anew.")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Also tune a dense slice on the same tokens.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Answered at the end, beside the dense model.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="Print config, parameters, tokens and FLOPs; run nothing.")
    ] = False,
    devices: Annotated[int | None, typer.Option(help="With --dry_run: check the mesh against so many.", min=1)] = None,
) -> None:
    """Refactor a dense model: slice it, tune it, measure it, export it, and write a report."""
    if devices is not None and not dry_run:
        raise typer.BadParameter("--devices belongs to --dry_run")
    if dry_run:
        from readme_jax.cli.dry_run import dry_run as tell
        from readme_jax.cli.settings import load_run

        tell(load_run(gin_file, gin_param or ()), devices)
        return
    from readme_jax.cli.refactor import refactor as run

    run(gin_file, gin_param or (), output, resume, compare, prompt)


@app.command()
def export(
    out: Annotated[str, typer.Option("--out", help="The folder to write.")],
    run: Annotated[str | None, typer.Option("--run", help="A run's folder: its newest checkpoint.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Any other model: a folder, .gguf file or hub id.")] = None,
) -> None:
    """Write a model as safetensors, from which it loads back exactly."""
    from readme_jax.cli.export import export as write

    if (run is None) == (checkpoint is None):
        raise typer.BadParameter("give either --run or --checkpoint")
    write(run, checkpoint, out)
    typer.echo(out)


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the interface.")] = None,
    gin_file: Annotated[list[str] | None, typer.Option("--gin_file", help="Settings; repeatable.")] = None,
    gin_param: Annotated[list[str] | None, typer.Option("--gin_param", help="One binding, `Serving.rows=8`.")] = None,
) -> None:
    """Serve a model over HTTP to OpenAI's clients, until SIGTERM; requests under way are then finished."""
    from readme_jax.cli.serve import serve as run

    run(checkpoint, host, port, name, gin_file or (), gin_param or ())


@app.command()
def batch(
    prompts: Annotated[str, typer.Argument(help='A file of requests, one {"prompt": ...} a line.')],
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Option("--out", help="Answers are appended here; those it holds are not asked again.")],
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    gin_file: Annotated[list[str] | None, typer.Option("--gin_file", help="Settings; repeatable.")] = None,
    gin_param: Annotated[list[str] | None, typer.Option("--gin_param", help="One binding, `Serving.rows=8`.")] = None,
) -> None:
    """Answer a file of prompts with the serving engine; interrupted, it goes on where it stopped."""
    from readme_jax.cli.batch import batch as run

    run(prompts, checkpoint, out, raw, gin_file or (), gin_param or ())


@app.command()
def plan(
    topology: Annotated[str, typer.Option("--topology", help="Chips and their torus: v5p:4x4x4, v5e:16x16, v6e:8x8.")],
    gin_file: Annotated[list[str], typer.Option("--gin_file", help="Settings; repeatable, later ones win.")],
    gin_param: Annotated[list[str] | None, typer.Option("--gin_param", help="One binding; repeatable.")] = None,
    sweep: Annotated[int, typer.Option(help="Compile so many mesh shapes and recommend one; 0: the run's own.")] = 0,
    out: Annotated[str | None, typer.Option("--out", help="A JSON file to write the plans to.")] = None,
) -> None:
    """Compile a run's steps for a TPU topology, on any machine with the extra [plan], and say what they need there."""
    from rich.console import Console

    from readme_jax.cli.plan import plan as run

    run(topology, gin_file, gin_param or (), sweep, out, Console(highlight=False, soft_wrap=True))
