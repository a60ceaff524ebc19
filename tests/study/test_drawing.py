"""What a study draws: valid recipes only, nothing that a choice makes meaningless, and layouts without rejection."""

from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embsearch_plugin as es
from embsearch_plugin.errors import RecipeError
from embsearch_plugin.recipes import Recipe, parse_recipe
from embsearch_plugin.space import SearchSpace
from embsearch_plugin.study.drawing import shares
from embsearch_plugin.study.parameters import check

BASE: dict[str, Any] = {"data": "planted", "model": "dlrm", "search": {"algorithm": "dnis"}}


def recipe(study: Mapping[str, Any], **more: Any) -> Recipe:
    return parse_recipe({**BASE, **more, "study": study}, "r.yaml")


def draws(given: Recipe, count: int = 40) -> list[tuple[optuna.Trial, Recipe]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [(trial, es.suggest(trial, given)) for trial in (study.ask() for _ in range(count))]


def test_every_kind_of_field_is_drawn_within_its_range() -> None:
    fields = {
        "model.embedding_dim": [16, 32],
        "train.lr": None,
        "train.batch_size": {"low": 128, "high": 512, "step": 128},
        "train.l2": {"low": 0, "high": 1},
        "search.budgets": {"low": "5%", "high": "50%", "log": True},
        "search.space.align": [1, 4],
        "dnis.lr": {"low": "1e-3", "high": "1e-2", "log": True},
        "dnis.every": None,
    }
    found = [drawn for _, drawn in draws(recipe({"fields": fields}))]
    assert {drawn.model.embedding_dim for drawn in found} == {16, 32}
    assert {drawn.train.batch_size for drawn in found} == {128, 256, 384, 512}
    assert {drawn.search.space.align for drawn in found} == {1, 4}
    assert {drawn.search.algorithm.every for drawn in found} == {1, 2, 4}
    assert all(1e-4 <= drawn.train.lr <= 1e-2 and 1e-3 <= drawn.search.algorithm.lr <= 1e-2 for drawn in found)
    assert all(type(drawn.train.l2) is float and 0 <= drawn.train.l2 <= 1 for drawn in found)
    assert len({drawn.train.l2 for drawn in found}) == len(found)  # not whole numbers alone
    (budgets,) = zip(*(drawn.search.budgets for drawn in found), strict=True)
    assert all(0.0499 <= float(es.Budget.of(budget).amount) <= 0.5001 for budget in budgets)
    assert all(drawn.study is None for drawn in found)


@pytest.mark.parametrize(
    ("low", "high", "unit"), [("1KiB", "4KiB", "bytes"), ("1000 params", "4000 params", "parameters"), ("10%", "50%", "bytes")]
)
def test_budgets_are_drawn_in_their_unit(low: str, high: str, unit: str) -> None:
    for _, drawn in draws(recipe({"fields": {"search.budgets": {"low": low, "high": high}}}), 5):
        (budget,) = map(es.Budget.of, drawn.search.budgets)
        assert budget.unit == unit
        assert es.Budget.of(low).amount <= budget.amount <= es.Budget.of(high).amount


def test_what_a_choice_makes_meaningless_is_not_asked_for() -> None:
    fields = {"search.algorithm": ["dnis", {"name": "nis", "mode": "se"}, "uniform"], "dnis": None, "nis.penalty": None}
    for trial, drawn in draws(recipe({"fields": fields, "layout": {}})):
        asked, name = set(trial.params), drawn.search.algorithm.name
        assert {parameter.split(".")[0] for parameter in asked if parameter.startswith(("dnis", "nis"))} <= {name}
        assert name != "nis" or (drawn.search.algorithm.mode == "se" and "nis.penalty" in asked)
        assert name != "dnis" or {"dnis.lr", "dnis.warm_up", "dnis.every"} <= asked
        assert (name == "uniform") == ("row_blocks" not in asked)
        if name != "uniform":
            growths = [parameter for parameter in asked if parameter.startswith("row_growth")]
            assert len(growths) == trial.params["row_blocks"] - 1 == len(drawn.search.space.row_blocks) - 1


def test_lists_are_choices_too() -> None:
    found = draws(recipe({"fields": {"search.algorithm": ["autodim"], "autodim.candidates": [[2, 4], [4, 8, 16]]}}))
    assert {drawn.search.algorithm.candidates for _, drawn in found} == {(2, 4), (4, 8, 16)}
    assert {trial.params["autodim.candidates"] for trial, _ in found} == {"[2, 4]", "[4, 8, 16]"}


@given(st.lists(st.floats(1, 16), max_size=7))
def test_shares_rise_and_sum_to_one(growths: list[float]) -> None:
    found = shares(growths)
    assert sorted(found) == found and len(found) == len(growths) + 1
    assert sum(found) == pytest.approx(1, abs=1e-6)
    assert all(right / left == pytest.approx(g, rel=1e-5) for g, left, right in zip(growths, found, found[1:], strict=False))
    assert SearchSpace(row_blocks=tuple(found)).cut_rows(100_000)


@given(st.lists(st.floats(0.25, 8), max_size=5), st.integers(1, 24))
def test_shares_of_columns_are_multiples_of_four(growths: list[float], quarter: int) -> None:
    widths = SearchSpace(column_chunks=tuple(shares(growths))).chunk_widths(4 * quarter)
    assert sum(widths) == 4 * quarter and all(width > 0 and width % 4 == 0 for width in widths)
    assert len(widths) <= len(growths) + 1


def test_each_group_of_tables_has_a_layout_of_its_own() -> None:
    layout = {"groups": {"large": ["t_user*", "t_movie*"], "small": ["*"]}, "column_chunks": None}
    trials = draws(recipe({"fields": {}, "layout": layout}))
    for trial, drawn in trials:
        large, small = drawn.search.space.groups
        assert (large.tables, small.tables) == (("t_user*", "t_movie*"), ("*",))
        assert len(large.row_blocks) == trial.params["large.row_blocks"] and large.column_chunks is None
    assert any(trial.params["large.row_blocks"] != trial.params["small.row_blocks"] for trial, _ in trials)


def test_values_that_do_not_go_together_prune_the_trial_with_the_reason() -> None:
    fields = {"train.clip_norm": [1.0], "train.fused": [{"optimizer": "EXACT_SGD"}]}
    trial = optuna.create_study().ask()
    with pytest.raises(optuna.TrialPruned, match="clip_norm must be above 0, and null with fused"):
        es.suggest(trial, recipe({"fields": fields}))
    assert "null with fused" in trial.user_attrs["reason"]


def test_all_that_cannot_be_varied_is_listed_at_once() -> None:
    fields = {
        "train.lrr": None,
        "train.epochs": None,
        "dnis.lrr": None,
        "dnis.lr": {"low": 0.1, "high": 1},
        "search.algorithm.lr": None,
        "search.baselines": [[], ["uniform"]],
        "data.examples": [3],
        "dnis": [1],
        "train.patience": {"low": 0.5, "high": 2},
        "train.optimizer": {"low": 1, "high": 2},
        "train.l2": {"low": "5%", "high": "6%"},
        "search.budgets": {"low": "50%", "high": "5%"},
        "train.batch_size": {"low": 128, "high": 512, "step": 64.5},
    }
    with pytest.raises(RecipeError) as error:
        check(recipe({"fields": fields}))
    for part in (
        "12 problems in the study",
        "there is no field 'lrr'. Did you mean 'lr'?",
        "@ recipe.study.fields.train.lrr",
        "declares no range, so the study must give one, or a list. Declared there: lr, l2 @ recipe.study.fields.train.epochs",
        "@ recipe.study.fields.dnis.lrr",
        "a trial has no baselines, so they cannot be varied @ recipe.study.fields.search.baselines",
        "an algorithm's field is written NAME.field, as dnis.lr @ recipe.study.fields.search.algorithm.lr",
        "fields of model, train and search can be varied",
        "so it takes null; got (1,) @ recipe.study.fields.dnis",
        "the ends must be whole numbers; got 0.5 and 2",
        "the field is no number, so it takes a list of choices @ recipe.study.fields.train.optimizer",
        "the ends must be numbers; got '5%' and '6%'",
        "the range is inverted: got 50% and 5% @ recipe.study.fields.search.budgets",
        "step must be a whole number; got 64.5 @ recipe.study.fields.train.batch_size",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"fields": {"train.lr": {"low": -1, "high": 1}}},
            "-1 is refused: .*lr must be above 0.*@ recipe.*train.lr",
        ),
        ({"fields": {"train.optimizer": ["adam", "adma"]}}, "'adma' is refused: unknown optimizer 'adma'. Did you mean 'adam'"),
        ({"fields": {"nis.lr": None}}, "nis is not among the algorithms that are tried .dnis. @ recipe.study.fields.nis.lr"),
        ({"fields": {"search.budgets": {"low": "5%", "high": "5.0%"}}}, "the range is empty: got 5% and 5.0%"),
        ({"fields": {"search.budgets": {"low": "5%", "high": "1MiB"}}}, "both ends must be in per cent, in bytes"),
        ({"fields": {"search.budgets": {"low": 5, "high": 50}}}, "a budget is a text"),
        ({"fields": {"search.budgets": {"low": "1KiB", "high": "2KiB", "step": 0.5}}}, "step must be a whole number; got 0.5"),
    ],
)
def test_what_a_recipe_refuses_is_found_before_the_study(study: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe(study))


@pytest.mark.parametrize(
    ("study", "search", "message"),
    [
        (
            {"fields": {}, "layout": {}},
            {"algorithm": "uniform"},
            "varies nothing: uniform does not cut .* @ recipe.study.layout",
        ),
        ({"fields": {}, "layout": {"row_blocks": None, "column_chunks": None}}, {"algorithm": "dnis"}, "varies nothing: dnis"),
        (
            {"fields": {"search.space.row_blocks": [2, 3]}, "layout": {}},
            {"algorithm": "dnis"},
            "the layout draws it, so it is no field @ recipe.study.fields.search.space.row_blocks",
        ),
        (
            {"fields": {}, "layout": {"groups": {"all": ["*"]}}},
            {"algorithm": "dnis", "space": {"scope": "global"}},
            "groups must be empty where the space's scope is global @ recipe.study.layout.groups",
        ),
    ],
)
def test_a_layout_that_does_not_go_with_the_rest_is_refused(
    study: dict[str, Any], search: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe(study, search=search))


def test_a_layout_goes_with_fields_that_it_leaves_alone() -> None:
    check(recipe({"fields": {"search.space.row_blocks": [2, 3]}, "layout": {"row_blocks": None}}))
    check(recipe({"fields": {"search.space.row_blocks": [2, 3]}, "layout": {"groups": {"some": ["t_*"]}}}))
    check(recipe({"fields": {"search.algorithm": ["uniform", "dnis"]}, "layout": {}}))
    check(recipe({"fields": {"random.by": None}, "layout": {}}, search={"algorithm": "random"}))


def test_an_unknown_algorithm_is_listed_with_all_else_that_is_refused() -> None:
    fields = {"search.algorithm": ["dnsi", "uniform"], "train.optimizer": ["adma"]}
    with pytest.raises(RecipeError, match="2 problems in the study: 'dnsi' is refused: .*'dnis'.*; 'adma' is refused") as error:
        check(recipe({"fields": fields}))
    assert "@ recipe.study.fields.search.algorithm" in str(error.value)


def test_trials_keep_their_budgets() -> None:
    with pytest.raises(RecipeError, match="strict must be true in a study"):
        check(recipe({"fields": {"train.lr": [0.1, 0.2]}}, search={"algorithm": "dnis", "strict": False}))


def test_one_budget_is_needed_where_it_does_not_vary() -> None:
    search = {"algorithm": "dnis", "budgets": ["5%", "10%"]}
    with pytest.raises(RecipeError, match="there must be one budget, or search.budgets among the fields"):
        check(recipe({"fields": {"dnis.lr": None}}, search=search))
    check(recipe({"fields": {"search.budgets": ["5%", "10%"]}}, search=search))


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"fields": {"a": {"low": 3, "high": 1}}}, "the range is inverted: low must be below high; got 3 and 1"),
        ({"fields": {"a": {"low": 1, "high": 1}}}, "the range is empty"),
        ({"fields": {"a": {"low": 0, "high": 1, "log": True}}}, "low must be above 0 with log; got 0"),
        ({"fields": {"a": {"low": 1, "high": 2, "log": True, "step": 1}}}, "step must be above 0, and null with log"),
        ({"fields": {"a": {"low": 1, "high": "5%"}}}, "both numbers or both texts"),
        ({"fields": {"a": {"low": 1, "high": float("inf")}}}, "low and high must be finite; got 1 and inf"),
        ({"fields": {"a": {"low": 1, "high": 2, "step": 5}}}, "step must be at most high - low; got 5 from 1 to 2"),
        ({"fields": {"a": {"low": True, "high": 2}}}, "must be numbers, or budgets as text; got True"),
        ({"fields": {"a": 3}}, "expected a mapping with low, high, log, step or a list, got 3 @ recipe.study.fields"),
        ({"fields": {"a": []}}, "a must hold at least one choice, none twice"),
        ({"fields": {"a": [1, 1]}}, "none twice; got .1, 1."),
        ({"fields": {}}, "there must be something to vary"),
        ({"fields": {"a": [1]}, "objectives": []}, "objectives must be one to three"),
        ({"fields": {"a": [1]}, "objectives": ["bytes"]}, "one objective, and only one, must be a metric"),
        ({"fields": {"a": [1]}, "objectives": ["auc", "log_loss"]}, "one objective, and only one, must be a metric"),
        ({"fields": {"a": [1]}, "pruner": "MedianPruner"}, "pruner must be null with 2 objectives"),
        ({"fields": {"a": [1]}, "sampler": 3}, "sampler must be the name of a class of Optuna's"),
        ({"fields": {}, "layout": {"row_blocks": {"low": 0, "high": 2}}}, "row_blocks must range over whole numbers from 1"),
        (
            {"fields": {}, "layout": {"row_blocks": {"low": 1, "high": 3, "step": 0.5}}},
            "row_blocks: step must be a whole number",
        ),
        ({"fields": {}, "layout": {"groups": {"large": [], "rest": ["*"]}}}, "at least one table each; large holds none"),
        ({"fields": {}, "layout": {"row_growth": {"low": 0, "high": 2}}}, "row_growth must range over numbers above 0"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_when_the_recipe_is_read(study: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(study)


def test_a_recipe_without_a_study_says_so() -> None:
    with pytest.raises(RecipeError, match="must have a section study"):
        es.suggest(optuna.create_study().ask(), parse_recipe(BASE, "r.yaml"))


def test_a_field_that_does_not_exist_is_an_error_and_no_pruned_trial() -> None:
    with pytest.raises(RecipeError, match="there is no field 'lrr'. Did you mean 'lr'.* @ recipe.study.fields.train.lrr"):
        es.suggest(optuna.create_study().ask(), recipe({"fields": {"train.lrr": None}}))
