"""Recipes: read as a whole, every problem at once, and back again."""

import itertools
import re
from pathlib import Path

import pytest

from embsearch_plugin.algorithms.base import SearchConfig
from embsearch_plugin.errors import RecipeError
from embsearch_plugin.plain import to_plain
from embsearch_plugin.plugins import algorithms
from embsearch_plugin.recipes import Train, Tune, load_recipe, parse_recipe, to_yaml

RECIPES = sorted(path for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml") if not path.stem.startswith("stream_"))
MINIMAL = {"data": "planted", "model": "dlrm", "search": {"algorithm": "dnis"}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_says_what_it_shows(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(to_plain(recipe), "itself") == recipe
    comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert re.search(r"\b(hours?|minutes?|seconds?|days?)\b", comment), "how long does it take?"


def test_every_search_has_a_recipe_on_movielens() -> None:
    """But ``given``, whose dims a study chooses."""
    loaded = [load_recipe(path) for path in RECIPES if path.stem.startswith(("ml1m_", "study_ml1m_"))]
    used = {method.name for recipe in loaded for method in recipe.search.methods.values()}
    ours = {name: config for name, config in algorithms().items() if config.__module__.startswith("embsearch_plugin.")}
    assert used | {"given"} == {name for name, config in ours.items() if issubclass(config, SearchConfig)}


def test_resolved_recipes_spell_out_every_default(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text(to_yaml(parse_recipe(MINIMAL, "minimal")))
    assert load_recipe(tmp_path / "resolved.yaml") == parse_recipe(MINIMAL, "minimal")
    assert "patience: 2" in to_yaml(parse_recipe(MINIMAL, "minimal"))


def test_overrides_reach_every_field() -> None:
    recipe = load_recipe(
        RECIPES[0],
        ["train.epochs=3", "search.algorithm.lr=0.5", "search.space.row_blocks=[0.5, 0.5]", "search.budgets=[2MiB]"],
    )
    assert recipe.train.epochs == 3
    assert (recipe.search.algorithm.lr, recipe.search.space.row_blocks) == (0.5, (0.5, 0.5))
    assert recipe.search.budgets == ("2MiB",)
    study = load_recipe(
        RECIPES[0].parent / "study_planted_dlrm_layout.yaml", ["study.fields.dnis.lr=[0.1]", "study.layout.groups={}"]
    )
    assert study.study is not None and study.study.fields["dnis.lr"] == (0.1,)


def test_all_problems_are_listed_at_once() -> None:
    bad = {
        "data": {"name": "planted", "exmples": 3},
        "model": "dlrmm",
        "search": {"algorithm": {"name": "dnis", "lr": "x"}, "space": {"row_blocks": "x", "blcks": 3}},
        "train": {"epochs": "x", "lr": True, "fused": 3},
        "sed": 1,
    }
    with pytest.raises(RecipeError) as error:
        parse_recipe(bad, "bad.yaml")
    for part in (
        "9 problems in bad.yaml",
        "extra field 'exmples'. Did you mean 'examples'?",
        "@ recipe.data",
        "unknown name 'dlrmm'. Did you mean 'dlrm'?",
        "expected float, got 'x' @ recipe.search.algorithm.lr",
        "expected int, got 'x' @ recipe.search.space.row_blocks",
        "extra field 'blcks'. Did you mean 'row_blocks'?",
        "expected int, got 'x' @ recipe.train.epochs",
        "expected float, got True @ recipe.train.lr",
        "@ recipe.train.fused",
        "extra field 'sed'. Did you mean 'seeds'?",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"algorithm": "dniss"}, "unknown name 'dniss'. Did you mean 'dnis'?"),
        ({"algorithm": {"name": "nis", "mode": "sse"}}, "unknown value 'sse'. Did you mean 'se'? Available: me, se"),
        ({"algorithm": "dnis", "budgets": ["200%"]}, "at most 100 %"),
        ({"algorithm": "dnis", "budgets": ["0%"]}, "above zero"),
        ({"algorithm": "dnis", "budgets": ["-3%"]}, "above zero"),
        ({"algorithm": "dnis", "budgets": ["lots"]}, "cannot read the budget 'lots'"),
        ({"algorithm": {"name": "dnis", "warm_up": -1}}, "warm_up must be at least 0"),
        ({"algorithm": "dnis", "space": {"row_blocks": [0.1]}}, "positive shares that sum to 1"),
        ({}, "required field 'algorithm' is missing"),
        ({"algorithm": "dnis", "budgets": "10%"}, "expected a list, got '10%' @ recipe.search.budgets"),
        ({"algorithm": "dnis", "budgets": []}, "budgets must hold at least one"),
        ({"algorithm": "dnis", "budgets": ["10%", "+10.0%"]}, "budgets must differ"),
        ({"algorithm": "dnis", "budgets": ["1KiB", "1024 b"]}, "budgets must differ"),
        ({"algorithm": "dnis", "budgets": ["100 params", "0100 params"]}, "budgets must differ"),
        ({"algorithm": "dnis", "budgets": ["0 params"]}, "above zero"),
        ({"algorithm": "dnis", "budgets": ["1.5 params"]}, "cannot read the budget '1.5 params'"),
        ({"algorithm": {"name": "uniform", "dim": 0}}, "dim must be at least 1; got 0"),
        ({"algorithm": "dnis", "baselines": ["unifrm"]}, "unknown name 'unifrm'. Did you mean 'uniform'?"),
    ],
)
def test_values_that_make_no_sense_are_named(search: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match="problem in r.yaml") as error:
        parse_recipe({**MINIMAL, "search": search}, "r.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("!!python/object:os.x {}", "is not YAML"),
    ],
)
def test_files_that_are_no_recipe(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe .*: No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.epochs=[", "seeds.x=3"])
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        load_recipe(RECIPES[0], [override])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": []}, "seeds must hold at least one"),
        ({"train": {"fused": {"optimizer": "EXACT_SGDD"}}}, "unknown optimizer 'EXACT_SGDD'. Did you mean 'EXACT_SGD'"),
        ({"train": {"optimizer": "adagard"}}, "unknown optimizer 'adagard'. Did you mean 'adagrad'"),
        ({"train": {"clip_norm": 0}}, "clip_norm must be above 0.*; got 0.0"),
        ({"train": {"clip_norm": 1, "fused": {}}}, "null with fused, .*; got 1.0"),
        ({"data": {"name": "movielens-1m", "path": "x", "task": "topk"}}, "topk.* @ recipe.data.task"),
        ({"seeds": [1, 1]}, "no one twice"),
        ({"seeds": [-1]}, "each 0 or more"),
        ({"tune": {"l2": [0.1, -1.0]}}, "l2 must be at least 0"),
        ({"tune": {"epochs": [3]}}, "extra field 'epochs'"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**MINIMAL, **more}, "r.yaml")


def test_every_combination_is_tried_once_and_nothing_where_nothing_is_tuned() -> None:
    assert Tune().trials() == [{}]
    assert Tune(l2=(0.1, 0.2)).trials() == [{"l2": 0.1}, {"l2": 0.2}]
    assert Tune(l2=(0.1, 0.2), lr=(1.0,)).trials() == [{"l2": 0.1, "lr": 1.0}, {"l2": 0.2, "lr": 1.0}]


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    recipe = load_recipe(RECIPES[0], ["train.lr=1e-3", "tune.l2=[5E-4, 1]"])
    assert recipe.train.lr == 1e-3
    assert recipe.tune.l2 == (5e-4, 1.0)
    with pytest.raises(RecipeError, match="expected float, got '1e'"):
        load_recipe(RECIPES[0], ["train.lr='1e'"])


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "data: planted\nmodel: {name: dlrm, embedding_dim: 16}\ntune: {lr: [0.1]}\ntrain: {lr: 0.5, epochs: 7}\n"
        "search: {algorithm: {name: dnis, every: 2}, budgets: [5%]}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nmodel: {embedding_dim: 8}\ntune: null\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "last.yaml").write_text("extends: ../middle.yaml\nsearch: {algorithm: {name: nis}}\ntrain: {lr: null}\n")
    recipe = load_recipe(tmp_path / "in" / "last.yaml", ["train.epochs=3"])
    assert (recipe.model.name, recipe.model.embedding_dim, recipe.search.budgets) == ("dlrm", 8, ("5%",))
    assert (recipe.train.epochs, recipe.train.lr) == (3, Train().lr)
    assert recipe.search.algorithm == algorithms()["nis"]()  # settings of another algorithm are not merged
    assert recipe.tune == Tune()


def test_a_study_that_extends_another_keeps_its_nulls_and_the_order_of_groups(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "data: planted\nmodel: dlrm\nsearch: {algorithm: dnis}\n"
        "study: {fields: {train.l2: null, dnis.every: [1]}, layout: {groups: {large: [t_0], rest: ['*']}}}\n"
    )
    (tmp_path / "other.yaml").write_text(
        "extends: base.yaml\n"
        "study: {fields: {train.lr: null, dnis.every: null}, layout: {column_chunks: null, groups: {large: [t_1]}}}\n"
    )
    study = load_recipe(tmp_path / "other.yaml").study
    assert study is not None and study.layout is not None
    assert study.fields == {"train.l2": None, "train.lr": None}  # the range that is declared; what the other one said is gone
    assert study.layout.column_chunks is None
    assert list(study.layout.groups.items()) == [("large", ("t_1",)), ("rest", ("*",))]


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("a.yaml", "a.yaml extends itself, by way of a.yaml"),
        ("3", "extends must be the path of a recipe; got 3"),
        ("b.yaml", "cannot read the recipe .*b.yaml"),
    ],
)
def test_a_recipe_that_cannot_be_extended(extends: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {extends}\nmodel: dlrm\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "a.yaml")
