"""The test split of top-k: each user's last item, beside items that she has not rated."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from embsearch_plugin.cli import main
from embsearch_plugin.data.leave_one_out import FILE, NEGATIVES, write_for_movielens, write_test_split
from embsearch_plugin.data.movielens import MovieLens1M, write_sample
from embsearch_plugin.errors import DataError


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_one_would_do_by_hand(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(20 * 30)[:200]
    user, item, time = pairs // 30 + 5, pairs % 30 + 100, rng.integers(0, 12, size=200)  # with ties
    write_test_split(tmp_path / FILE, user, item, time, seed)
    frame = pl.read_parquet(tmp_path / FILE)
    assert frame["user"].to_list() == sorted(set(user.tolist()))
    fewest = min(len(set(item.tolist()) - set(item[user == one].tolist())) for one in set(user.tolist()))
    for one, positive, negatives in frame.iter_rows():
        mine = [(t, n) for n, t in enumerate(time.tolist()) if user[n] == one]
        assert positive == item[max(mine)[1]]
        assert len(negatives) == len(set(negatives)) == min(NEGATIVES, fewest)
        assert not set(negatives) & set(item[user == one].tolist())
    write_test_split(tmp_path / "again", user, item, time, seed)
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


def test_it_is_written_beside_movielens_and_never_over_another(tmp_path: Path) -> None:
    write_sample(tmp_path, users=40, movies=120, ratings=300)
    with pytest.raises(DataError, match="is there already, and was left as it is"):
        write_for_movielens(tmp_path)
    before = pl.read_parquet(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    assert pl.read_parquet(write_for_movielens(tmp_path)).equals(before)
    assert len(MovieLens1M(str(tmp_path), task="top-k").load().pairs["test"]) == len(before)


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    write_sample(tmp_path, users=40, movies=120, ratings=300)
    before = (tmp_path / FILE).read_bytes()
    refused = CliRunner().invoke(main, ["leave-one-out", str(tmp_path)])
    assert refused.exit_code == 1 and "DataError" in refused.output and "Traceback" not in refused.output
    (tmp_path / FILE).unlink()
    written = CliRunner().invoke(main, ["leave-one-out", str(tmp_path)])
    assert written.output.strip() == f"written: {tmp_path / FILE}"
    assert pl.read_parquet(tmp_path / FILE).equals(pl.read_parquet(before))
    (tmp_path / FILE).unlink()
    CliRunner().invoke(main, ["leave-one-out", str(tmp_path), "--seed", "1"])
    assert not pl.read_parquet(tmp_path / FILE).equals(pl.read_parquet(before))


@pytest.mark.parametrize("line", ["1::2::five::x", "1,2,3,4", "1::2"])
def test_ratings_that_are_no_ratings_are_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"ratings.dat must hold lines of user::movie::stars::time, in numbers; got"):
        write_for_movielens(tmp_path)
    assert not (tmp_path / FILE).exists()
