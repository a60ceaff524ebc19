from collections import Counter
from itertools import pairwise

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from embsearch_plugin.data.vocabulary import Numbering, by_count, encode, encode_frequent, encode_parts

VALUES = st.lists(st.sampled_from("abcdefg"), max_size=40)


def ranked(values: list[str], at_least: int = 1) -> list[str]:
    """By falling count; Counter keeps the order of first occurrence, and sorting does too."""
    return [value for value, count in Counter(values).most_common() if count >= at_least]


@given(st.lists(VALUES, max_size=4))
def test_numbers_are_given_in_the_order_of_first_occurrence_over_all_chunks(chunks: list[list[str]]) -> None:
    numbering = Numbering()
    got = [number for chunk in chunks for number in numbering(pl.Series(chunk, dtype=pl.String))]
    everything = [value for chunk in chunks for value in chunk]
    order = list(dict.fromkeys(everything))
    assert got == [order.index(value) for value in everything]
    assert list(numbering.numbers) == order


@given(values=VALUES, at_least=st.integers(1, 4))
def test_values_are_ranked_by_count(values: list[str], at_least: int) -> None:
    assert by_count(pl.Series(values, dtype=pl.String), at_least=at_least).to_list() == ranked(values, at_least)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=20))
def test_values_may_come_with_counts(pairs: list[tuple[str, int]]) -> None:
    values, counts = pl.Series([v for v, _ in pairs], dtype=pl.String), pl.Series([n for _, n in pairs], dtype=pl.Int64)
    totals = {v: sum(n for other, n in pairs if other == v) for v, _ in pairs}
    assert by_count(values, counts).to_list() == sorted([v for v, n in totals.items() if n], key=lambda v: -totals[v])


@given(values=VALUES, known=st.sets(st.sampled_from("abcxyz")))
def test_what_is_not_known_is_zero(values: list[str], known: set[str]) -> None:
    order = sorted(known)
    got = encode(pl.Series(values, dtype=pl.String), pl.Series(order, dtype=pl.String), first=1)
    assert got.tolist() == [1 + order.index(value) if value in known else 0 for value in values]
    assert got.dtype == np.int32


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), min_count=st.integers(1, 4), data=st.data())
def test_what_is_rare_in_training_shares_a_row(values: list[int], min_count: int, data: st.DataObject) -> None:
    train = data.draw(st.sets(st.integers(0, len(values) - 1)).map(sorted))
    got, rows = encode_frequent(pl.Series(values), np.array(train, dtype=np.int64), min_count)
    known = ranked([values[at] for at in train], min_count)
    assert got.tolist() == [1 + known.index(value) if value in known else 0 for value in values]
    assert rows == 1 + len(known)


@given(st.lists(st.tuples(st.none() | st.text("ab |/", max_size=6), st.integers(1, 3)), max_size=12))
def test_parts_of_texts_become_bags(pairs: list[tuple[str | None, int]]) -> None:
    texts, counts = pl.Series([t for t, _ in pairs], dtype=pl.String), pl.Series([n for _, n in pairs], dtype=pl.Int64)
    split = [dict.fromkeys(p.strip() for p in (t or "").replace("/", "|").split("|") if p.strip()) for t, _ in pairs]
    known = ranked([part for parts, (_, n) in zip(split, pairs, strict=True) for part in parts for _ in range(n)])
    bags, rows = encode_parts(texts, "/|", counts)
    ends = bags.offsets.tolist()
    got = [bags.values[start:end].tolist() for start, end in pairwise(ends)]
    assert got == [[known.index(part) for part in parts] for parts in split]
    assert rows == max(len(known), 1)
