"""Data sets for recipes: MovieLens, Criteo's, Avazu's and KKBox's logs, and a planted one whose truth is known.

Each is a frozen dataclass that a recipe names by its ``name``; its ``load()`` returns a ``Dataset``. A user's own
is named as ``package.module:function``.
"""

from typing import Any

from embsearch_plugin.data.avazu import Avazu
from embsearch_plugin.data.criteo import Criteo
from embsearch_plugin.data.kkbox import KkBox
from embsearch_plugin.data.movielens import MovieLens1M
from embsearch_plugin.data.movielens_csv import MovieLensCsv
from embsearch_plugin.data.own import OwnData
from embsearch_plugin.data.planted import Planted

DataConfig = Planted | MovieLens1M | MovieLensCsv | Criteo | Avazu | KkBox | OwnData
CONFIGS: tuple[type[Any], ...] = (Planted, MovieLens1M, MovieLensCsv, Criteo, Avazu, KkBox)
