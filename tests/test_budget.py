"""Budgets: what may be written, and what it comes to."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.budget import Budget
from embsearch_plugin.errors import BudgetError


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        ("10%", 100),
        (" 12.5 % ", 125),
        ("100%", 1000),
        ("0.1%", 1),
        ("2.9%", 29),  # 0.029 * 1000 is 28.999999999999996 in floating point
        ("2GiB", 2 * 2**30),
        ("300 MB", 300 * 10**6),
        ("1.5kib", 1536),
        ("1TB", 10**12),
        ("0.5 TiB", 2**39),
        ("7", 7),
        ("7 b", 7),
        ("9007199254740993", 2**53 + 1),  # no float holds it
        (Budget(bytes=12), 12),
        (Budget(bytes=np.int64(12)), 12),
        (Budget(bytes="1KiB"), 1024),
        (Budget(params=390_000), 390_000),
        (" 390000 params ", 390_000),
        (Budget("50%"), 500),
    ],
)
def test_limits(budget: Budget | str, limit: int) -> None:
    assert Budget.of(budget).limit(1000) == limit


@given(st.integers(1, 10_000), st.one_of(st.integers(0, 10**15), st.integers(0, 10**11).map(lambda n: 10_000 * n)))
def test_a_share_is_kept_to_the_byte(hundredths: int, size: int) -> None:
    share = f"{hundredths // 100}.{hundredths % 100:02}%"
    assert Budget.of(share).limit(size) == hundredths * size // 10_000


def test_only_parameters_are_not_counted_in_bytes() -> None:
    assert [b.unit for b in (Budget("1%"), Budget(bytes=1), Budget(params=1))] == ["bytes", "bytes", "parameters"]
    assert Budget.of("7 params") == Budget(params=7)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget("10%"), "10%"),
        (Budget(bytes="2GiB"), "2GiB"),
        (Budget(bytes=5), "5 bytes"),
        (Budget(bytes=np.int64(5)), "5 bytes"),
        (Budget(params=7), "7 parameters"),
    ],
)
def test_a_budget_reads_as_it_was_written(budget: Budget, text: str) -> None:
    assert str(budget) == text


@pytest.mark.parametrize("budget", ["0%", "0", "-5 %", "-2GiB", "0.4", "0.0 MB", Budget])
def test_a_budget_is_above_zero(budget: Any) -> None:
    with pytest.raises(BudgetError, match="a budget must be above zero"):
        Budget(params=0) if budget is Budget else Budget.of(budget)


@pytest.mark.parametrize("share", ["100.01%", "1000%", "9" * 30 + "%"])
def test_a_share_is_at_most_the_whole(share: str) -> None:
    with pytest.raises(BudgetError, match="at most 100 %"):
        Budget.of(share)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "ten%",
        "nan%",
        "inf%",
        "1e1%",
        "10%%",
        "nan",
        "inf",
        "2 gigabytes",
        "2,5GB",
        "GiB",
        "1 2",
        "0x10",
        "1.5 params",
        "params",
        "9" * 5000,
    ],
)
def test_texts_that_are_no_budget(text: str) -> None:
    with pytest.raises(BudgetError, match=r"cannot read the budget .* Write \"10%\""):
        Budget.of(text)


@pytest.mark.parametrize("value", [True, 2.5, 10**9 + 0.0, float("nan"), [1], {}])
def test_values_that_are_no_budget(value: Any) -> None:
    for build in (Budget.of, Budget, lambda v: Budget(bytes=v), lambda v: Budget(params=v)):
        with pytest.raises(BudgetError, match='Write "10%"'):
            build(value)


@pytest.mark.parametrize("given", [{}, {"share": "1%", "bytes": 5}, {"bytes": 1, "params": 1}, {"share": "", "params": 0}])
def test_exactly_one_is_given(given: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=f"exactly one of share, bytes and params; got {len(given)}"):
        Budget(**given)
