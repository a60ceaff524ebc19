"""Budgets: how large all tables together may be, in bytes or parameters."""

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral

from embsearch_plugin.costs import Unit
from embsearch_plugin.errors import BudgetError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)
}
_NUMBER = r"([+-]?\d{1,30}(?:\.\d{1,30})?)"
_HELP = (
    'Write "10%" (of the original tables\' weight bytes), "2GiB" or "390000 params"; or es.Budget(bytes=...) or '
    "es.Budget(params=...)."
)


@dataclass(frozen=True)
class Budget:
    """How large all embedding tables together may be.

    Args:
        share: ``"10%"``: share of the original tables' weight bytes.
        bytes: bytes as a number or as text with a unit (``"2GiB"``, ``"300 MB"``).
        params: number of weights, projections included, as the papers count.

    Exactly one of the three is given.

    Raises:
        BudgetError: where a budget cannot be read, is not positive, or is over 100 %.
    """

    share: str | None = None
    bytes: int | str | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.share, self.bytes, self.params) if value is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget takes exactly one of share, bytes and params; got {len(given)}. {_HELP}")
        if self.amount <= 0:
            raise BudgetError(f"a budget must be above zero; got {self}. {_HELP}")
        if self.share is not None and self.amount > 1:
            raise BudgetError(f"a budget is at most 100 % of the original tables; got {self}. {_HELP}")

    @classmethod
    def of(cls, budget: "Budget | str") -> "Budget":
        """Return ``budget`` itself, or the one that a text such as ``"10%"``, ``"2GiB"`` or ``"390000 params"`` stands for."""
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, str):
            raise BudgetError(f"a budget is a text or an es.Budget; got {budget!r}. {_HELP}")
        if counted := re.fullmatch(r"\s*(\d{1,30})\s*params\s*", budget):
            return cls(params=int(counted[1]))
        return cls(share=budget) if budget.strip().endswith("%") else cls(bytes=budget)

    @property
    def amount(self) -> Fraction | int:
        """The budget as an exact number: a share between 0 and 1, bytes, or parameters."""
        if self.share is not None:
            return _percent(self.share)
        if self.bytes is not None:
            return _bytes(self.bytes)
        return _whole(self.params)

    def limit(self, original_bytes: int) -> int:
        """Return the ceiling for tables of ``original_bytes``: bytes, or parameters where those are budgeted."""
        return int(self.amount * original_bytes) if self.share is not None else int(self.amount)

    @property
    def unit(self) -> Unit:
        """What :meth:`limit` counts."""
        return Unit.BYTES if self.params is None else Unit.PARAMETERS

    def __str__(self) -> str:
        if self.params is not None:
            return f"{self.params} parameters"
        return self.share or (self.bytes if isinstance(self.bytes, str) else f"{self.bytes} bytes")


def _percent(text: str) -> Fraction:
    match = re.fullmatch(rf"\s*{_NUMBER}\s*%\s*", text) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f"cannot read the budget {text!r} as a percentage. {_HELP}")
    return Fraction(match[1]) / 100


def _bytes(value: int | str) -> int:
    if not isinstance(value, str):
        return _whole(value)
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise BudgetError(f"cannot read the budget {value!r} as bytes. {_HELP}")
    return int(Fraction(match[1]) * _UNITS[match[2]])


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise BudgetError(f"bytes and params are whole numbers; got {value!r}. {_HELP}")
    return int(value)
