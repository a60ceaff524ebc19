"""Settings of data sets that make no sense, whatever is in the files."""

from typing import Any

import pytest

import embsearch_plugin as es
from embsearch_plugin.data.avazu import Avazu
from embsearch_plugin.data.kkbox import KkBox
from embsearch_plugin.data.movielens import MovieLens1M
from embsearch_plugin.data.movielens_csv import MovieLensCsv
from embsearch_plugin.data.planted import Planted


@pytest.mark.parametrize("config", [Avazu, KkBox, MovieLens1M, MovieLensCsv])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"split": (0.9, 0.1)}, r"split must be three fractions.*got \(0.9, 0.1\)"),
        ({"split": (0.9, 0.2, -0.1)}, "split must be three fractions that add up to 1"),
        ({"split": (float("nan"), 0.5, 0.5)}, "split must be three fractions that add up to 1"),
    ],
)
def test_a_split_that_cannot_be_made(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(es.EmbsearchError, match=message):
        config(path="", **settings)


@pytest.mark.parametrize("config", [Avazu, MovieLens1M, MovieLensCsv])
def test_a_split_by_something_else(config: Any) -> None:
    with pytest.raises(es.EmbsearchError, match="split_by must be one of random, time; got 'Time'"):
        config(path="", split_by="Time")


@pytest.mark.parametrize(
    "settings",
    [
        {"examples": -5},
        {"fields": 0},
        {"n_dense": -1},
        {"rows": ()},
        {"ranks": (-1,)},
        {"seed": -1},
        {"signal": float("nan")},
        {"zipf": -1.0},
    ],
)
def test_data_that_cannot_be_planted(settings: dict[str, Any]) -> None:
    with pytest.raises(es.EmbsearchError, match="must be"):
        Planted(**settings)
