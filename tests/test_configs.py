"""Recipes, ablations and gin at the edge. Regenerate the golden files with `python tests/test_configs.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from readme_jax import config
from readme_jax.checkpoints.known import SHAPES
from readme_jax.cli import settings
from readme_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.gin"))
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.gin"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.gin"))


def golden(recipe: Path) -> Path:
    return GOLDEN / f"{recipe.stem}.json"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_to_its_committed_config(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # includes are found from anywhere
    wanted = golden(recipe).read_text()
    assert settings.resolved(settings.load_run([recipe])) == wanted, f"run python {Path(__file__).name} to accept it"


def test_every_golden_file_has_its_recipe():
    assert {p.stem for p in GOLDEN.glob("*.json")} == {p.stem for p in RECIPES}


def flat(run: config.Run) -> dict[str, object]:
    out: dict[str, object] = {}
    for section, values in config.to_dict(run).items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            out[f"{section}.{name}".rstrip(".")] = value
    return out


def effect(part: Path) -> dict[str, dict[str, object]]:
    """What a part sets, resolved, and over which recipes that is a change: {field: [value, recipes it changes]}."""
    bound = {flat_name(line) for line in part.read_text().splitlines() if "=" in line.split("#")[0]}
    out: dict[str, dict[str, object]] = {name: {} for name in sorted(bound)}
    for recipe in ("paper", "best"):
        path = ROOT / "configs" / "recipes" / f"{recipe}.gin"
        alone, composed = flat(settings.load_run([path])), flat(settings.load_run([path, part]))
        changed = {name for name in composed if composed[name] != alone[name]}
        assert changed <= bound, f"{part.stem} changes more than it binds: {changed - bound}"
        for name in bound:
            out[name] |= {"value": composed[name], f"over_{recipe}": alone[name]}
    return out


def flat_name(line: str) -> str:
    section, name = line.split("=")[0].strip().split(".")
    classes = {c.__name__: field for field, c in settings.SECTIONS.items()}
    return f"{classes[section]}.{name}"


def ablation_effects() -> str:
    return json.dumps({part.stem: effect(part) for part in ABLATIONS}, indent=1) + "\n"


def test_effect_of_every_ablation_is_the_committed_one():
    wanted = (GOLDEN / "ablations" / "effects.json").read_text()
    assert ablation_effects() == wanted, f"run python {Path(__file__).name} to accept it"


@pytest.mark.parametrize("part", ABLATIONS, ids=lambda p: p.stem)
def test_every_ablation_changes_a_recipe_or_undoes_another_ablation(part):
    bases = [[ROOT / "configs" / "recipes" / f"{recipe}.gin"] for recipe in ("paper", "best")]
    bases += [[*base, other] for base in bases for other in ABLATIONS if other.stem.split("_")[0] in part.stem]
    assert any(settings.load_run(base) != settings.load_run([*base, part]) for base in bases)


@pytest.mark.parametrize("part", MODELS, ids=lambda p: p.stem)
def test_every_model_composes_and_its_shape_is_known(part):
    recipe = ROOT / "configs" / "recipes" / "paper.gin"
    run = settings.load_run([recipe, part])
    shape = SHAPES[run.model.checkpoint]
    assert run.data.sequence_length <= shape.max_position
    assert (run.slice.align == 128) == (run.model.layout == "scanned") or "smollm2" in part.stem
    assert run.router_stage == settings.load_run([recipe]).router_stage


def test_paper_recipe_is_table_2():
    run = settings.load_run([ROOT / "configs" / "recipes" / "paper.gin"])
    assert run.slice == config.Slice(align=128)
    assert (run.tuning.rounds, run.tuning.round_decay) == (8, 0.8)
    assert (run.router_stage.steps, run.router_stage.batch, run.router_stage.lr) == (100, 64, 5e-4)
    assert (run.expert_stage.steps, run.expert_stage.batch, run.expert_stage.lr) == (200, 128, 5e-5)
    router, experts = (s.batch * s.steps * run.data.sequence_length for s in (run.router_stage, run.expert_stage))
    assert (round(router / 1e6), round(experts / 1e6)) == (26, 105)
    assert round(run.tuning.rounds * (router + experts) / 1e7) == 105  # 1.05B; the paper says 1.04B of 26M + 105M


@pytest.mark.parametrize("name, checkpoint", [("llama2", "Llama-2-7b-chat-hf"), ("mistral", "Mistral-7B-v0.1")])
def test_readme_recipes_are_the_papers_run_on_redpajama(name, checkpoint):
    run, paper = (
        settings.load_run([ROOT / "configs" / "recipes" / f"{r}.gin"]) for r in (f"readme_{name}_7b", "paper")
    )
    assert run.model.checkpoint.endswith(checkpoint) and run.data.source == "redpajama"
    assert len(run.data.domains) == 7 and run.data.sequence_length == 4096 and run.data.mixture == "natural"
    for section in ("slice", "router", "router_stage", "expert_stage", "tuning"):
        same = {"accumulate": 1} if section == "expert_stage" else {}  # micro-batches do not change a step
        assert replace(getattr(run, section), **same) == replace(getattr(paper, section), **same), section


def test_parameters_win_over_files_and_resolve_back():
    recipe = ROOT / "configs" / "recipes" / "best_small.gin"
    loaded = settings.load([recipe], ["Slice.width = 0.25", "Data.domains = ['a', 'b']", "Run.seed = 3"])
    assert (loaded.run.slice.width, loaded.run.data.domains, loaded.run.seed) == (0.25, ("a", "b"), 3)
    assert settings.from_json(settings.resolved(loaded.run)) == loaded.run
    assert type(loaded.run.slice) is config.Slice
    assert "Slice.width = 0.25" in loaded.parsed and "Slice.ridge" not in loaded.parsed
    assert "Slice.ridge = " in loaded.operative
    assert settings.load_run() == config.Run()  # nothing is left over


def test_settings_saved_with_a_run_load_back(tmp_path):
    loaded = settings.load([ROOT / "configs" / "recipes" / "demo.gin"])
    settings.save_settings(loaded, tmp_path / "run")
    for name in ("config.gin", "operative_config.gin"):
        assert settings.load_run([tmp_path / "run" / name]) == loaded.run
    assert settings.from_json((tmp_path / "run" / "config.json").read_text()) == loaded.run


BAD = {
    "misspelt parameter": ("Slice.widht = 0.3", "bad.gin:2:", "widht"),
    "misspelt section": ("Slcie.width = 0.3", "bad.gin:2:", "Slcie"),
    "wrong type": ("Slice.width = 'half'", "bad.gin:2:", "expected float"),
    "bool for int": ("Tuning.rounds = True", "bad.gin:2:", "expected int"),
    "string for a tuple": ("Data.domains = 'arxiv'", "bad.gin:2:", "Data.domains"),
    "out of range": ("Slice.width = 1.5", "bad.gin:2:", "in (0, 1]"),
    "zero width": ("Slice.width = 0.0", "bad.gin:2:", "in (0, 1]"),
    "unknown choice": ("Slice.score = 'magic'", "bad.gin:2:", "'magic'"),
    "not a number": ("ExpertStage.lr = 1e999", "bad.gin:2:", "expected float"),
    "no value": ("Slice.width =", "bad.gin:2:", "parse"),
    "missing include": ("include 'nope.gin'", "bad.gin:2:", "nope.gin"),
    "section as a value": ("Run.model = 3", "bad.gin:2:", "model"),
    "scope": ("router/Slice.width = 0.3", "", "scope"),
    "unbound macro": ("Slice.width = %NOPE", "", "plain values"),
    "reference": ("Slice.tied = @Slice()", "", "plain values"),
}


@pytest.mark.parametrize("line, place, said", BAD.values(), ids=BAD.keys())
def test_bad_line_is_one_clear_line(line, place, said, tmp_path):
    path = tmp_path / "bad.gin"
    path.write_text(f"Slice.score = 'obs'\n{line}\n")
    with pytest.raises(ConfigError) as error:
        settings.load_run([path])
    assert place in str(error.value) and said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bad_parameter_names_the_parameter():
    for param, said in {"Slice.widht = 1": "widht", "Slice.width = 2": "in (0, 1]", "Slice.width": "parse"}.items():
        with pytest.raises(ConfigError, match="--gin_param") as error:
            settings.load_run([], [param])
        assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_place_of_a_bad_value_in_an_included_file(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base.gin").write_text("\nSlice.ridge = 'no'\n")
    (tmp_path / "recipes" / "r.gin").write_text("include 'base.gin'\n")
    with pytest.raises(ConfigError, match=r"base\.gin:2: Slice\.ridge"):
        settings.load_run([tmp_path / "recipes" / "r.gin"])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for recipe in RECIPES:
        golden(recipe).write_text(settings.resolved(settings.load_run([recipe])))
        print(golden(recipe).relative_to(ROOT))
    (GOLDEN / "ablations").mkdir(exist_ok=True)
    (GOLDEN / "ablations" / "effects.json").write_text(ablation_effects())
