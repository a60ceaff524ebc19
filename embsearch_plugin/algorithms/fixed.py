"""FIXED: rows of one width for every id, the baseline of esapn.txt (3.3), in growing tables like its rivals.

An id has no row before it comes; otherwise it is an ordinary embedding table, as wide as the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from embsearch_plugin.algorithms.base import AlgorithmConfig
from embsearch_plugin.collection import Table
from embsearch_plugin.hookspecs import hookimpl
from embsearch_plugin.streaming.base import StreamConfig
from embsearch_plugin.streaming.forms import Plain, RowForm


@dataclass(frozen=True, kw_only=True)
class Fixed(StreamConfig):
    """Settings of rows of one width. It takes no search steps, so ``warm_up`` and ``every`` say nothing here."""

    name: ClassVar[str] = "fixed"

    def row_form(self, table: Table) -> RowForm:
        """Return the rows themselves."""
        return Plain(table.dim)


@hookimpl
def embsearch_register_algorithms() -> Sequence[type[AlgorithmConfig]]:
    """Register rows of one width."""
    return [Fixed]
