"""Recipes, ablations and gin at the edge. Regenerate the golden files with `python tests/test_configs.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from readme_jax import config
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


@pytest.mark.parametrize("part", ABLATIONS + MODELS, ids=lambda p: p.stem)
def test_part_composes_with_a_recipe_and_changes_it(part):
    undoes_best = part.stem in {"refit_none", "eq4_router"}  # what the paper does
    recipe = ROOT / "configs" / "recipes" / ("best.gin" if undoes_best else "paper.gin")
    alone, composed = settings.load_run([recipe]), settings.load_run([recipe, part])
    assert composed.data == alone.data
    if part.stem not in {"llama2_7b", "tied"}:  # the recipe's own model; tied is checked below
        assert composed != alone


def test_paper_recipe_is_table_2():
    run = settings.load_run([ROOT / "configs" / "recipes" / "paper.gin"])
    assert run.slice == config.Slice(align=128)
    assert (run.tuning.rounds, run.tuning.round_decay) == (8, 0.8)
    assert (run.router_stage.steps, run.router_stage.batch, run.router_stage.lr) == (100, 64, 5e-4)
    assert (run.expert_stage.steps, run.expert_stage.batch, run.expert_stage.lr) == (200, 128, 5e-5)
    tokens = run.data.sequence_length * run.expert_stage.batch * run.expert_stage.steps
    assert round(tokens / 1e6) == 105


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
