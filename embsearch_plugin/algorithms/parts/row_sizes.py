"""What the algorithms on streams share: the sizes that rows may have, and how wide a frequency is embedded."""

from collections.abc import Sequence
from itertools import pairwise

from embsearch_plugin.errors import SettingsError

FREQUENCY_WIDTH = 32


def check_candidates(candidates: Sequence[int]) -> None:
    """Raise a SettingsError unless candidates ascend from 1 or more."""
    if not candidates or candidates[0] < 1 or any(b <= a for a, b in pairwise(candidates)):
        raise SettingsError(f"candidates must be positive, ascending and differ; got {list(candidates)}")


def widths_within(candidates: Sequence[int], dim: int) -> list[int]:
    """Return the candidates below a table's width, and that width."""
    return [*(width for width in candidates if width < dim), dim]
