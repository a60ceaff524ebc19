import csv
import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_plugin.data import csv_file
from embsearch_plugin.data.avazu import FIELDS, HASHES, INTEGERS, Avazu, write_sample
from embsearch_plugin.errors import DataError

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21\n"
)


def line(**values: str) -> str:
    defaults = {"click": "0", "hour": "14102100"} | dict.fromkeys(INTEGERS, "-1") | dict.fromkeys(HASHES, "1fbe01fe")
    return ",".join((defaults | values).get(name, "1000009418151094273") for name in HEADER.strip().split(","))


def write(path: Path, lines: list[str]) -> str:
    path.write_text(HEADER + "".join(f"{each}\n" for each in lines))
    return str(path)


def records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def value(record: dict[str, str], field: str) -> int:
    if field == "hour":
        return int(record["hour"][-2:])
    return int(record[field], 16 if field in HASHES else 10)


def test_the_fields_are_the_owners_columns_but_id_and_click() -> None:
    assert set(FIELDS) == set(HEADER.strip().split(",")) - {"id", "click"}
    assert len(FIELDS) == 22


@pytest.mark.parametrize("min_count", [1, 3, 30])
def test_ids_equal_a_slow_reference(tmp_path: Path, min_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", 5000)
    write_sample(tmp_path / "train", rows=300, seed=min_count)
    data = Avazu(str(tmp_path / "train"), min_count=min_count).load()
    lines, train = records(tmp_path / "train"), data.splits["train"].tolist()
    assert data.labels.tolist() == [float(record["click"]) for record in lines]
    for f, field in enumerate(data.schema.fields):
        assert field.name == FIELDS[f]
        values = [value(record, field.name) for record in lines]
        frequent = [v for v, n in Counter(values[at] for at in train).most_common() if n >= min_count]
        assert data.ids[:, f].tolist() == [1 + frequent.index(v) if v in frequent else 0 for v in values]
        assert field.rows == 1 + len(frequent)


def test_the_test_split_leaves_no_trace_in_the_vocabulary(tmp_path: Path) -> None:
    write_sample(tmp_path / "train", rows=300)
    config = Avazu(str(tmp_path / "train"), min_count=2)
    before = config.load()
    lines = (tmp_path / "train").read_text().splitlines()[1:]
    for at in before.splits["test"].tolist():
        lines[at] = line(site_id="ffffffff", click="1")
    write(tmp_path / "train", lines)
    after, train = config.load(), before.splits["train"]
    assert after.schema == before.schema
    assert torch.equal(after.ids[train], before.ids[train])
    assert set(after.ids[before.splits["test"], FIELDS.index("site_id")].tolist()) == {0}


def test_balanced_data_has_every_click_and_as_many_others(tmp_path: Path) -> None:
    path = write(tmp_path / "train", [line(click=str(int(n % 5 == 0)), C14=str(n)) for n in range(200)])
    got = [Avazu(path, balanced=True, min_count=1, split=(1.0, 0.0, 0.0), seed=seed).load() for seed in (0, 0, 1)]
    assert [(data.labels == 1).sum() for data in got] == [(data.labels == 0).sum() for data in got] == [40, 40, 40]
    assert got[0].fingerprint() == got[1].fingerprint()
    assert not torch.equal(got[0].labels, got[2].labels)
    clicks = Avazu(write(tmp_path / "train", [line(click="1"), line(), line(click="1")]), balanced=True).load()
    assert clicks.labels.tolist() == [1, 0, 1]


def test_splits_are_by_seed_and_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "train", [line()] * 200)
    first, again, other = (Avazu(path, seed=seed).load() for seed in (0, 0, 1))
    assert {split: len(part) for split, part in first.splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert torch.equal(first.splits["test"], again.splits["test"])
    assert not torch.equal(first.splits["test"], other.splits["test"])


def test_a_split_by_time_tests_on_the_latest_hours(tmp_path: Path) -> None:
    hours = [f"1410{day:02}{hour:02}" for day in (22, 21, 30) for hour in (5, 23, 0, 11)] * 5
    data = Avazu(write(tmp_path / "train", [line(hour=hour) for hour in hours]), split_by="time").load()
    train, validation, test = (
        [int(hours[at]) for at in data.splits[part].tolist()] for part in ("train", "validation", "test")
    )
    assert (len(train), len(validation), len(test)) == (48, 6, 6)
    assert train + validation + test == sorted(map(int, hours))


def test_values_keep_all_of_their_bits(tmp_path: Path) -> None:
    lines = [line(device_ip=ip, C20=number) for ip, number in (("ffffffff", "-1"), ("7fffffff", "100084"), ("FFFFFFFF", "0"))]
    data = Avazu(write(tmp_path / "train", lines), min_count=1, split=(1.0, 0.0, 0.0)).load()
    assert data.ids[:, FIELDS.index("device_ip")].tolist() == [1, 2, 1]
    assert data.ids[:, FIELDS.index("C20")].tolist() == [1, 2, 3]
    assert data.ids.dtype == torch.int32


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_gzip_and_the_end_of_lines_do_not_matter(tmp_path: Path, compress: type[bytes], end: bytes) -> None:
    write_sample(tmp_path / "plain", rows=50)
    (tmp_path / "other").write_bytes(compress((tmp_path / "plain").read_bytes().replace(b"\n", end)))
    plain, other = (Avazu(str(tmp_path / name)).load() for name in ("plain", "other"))
    assert plain.fingerprint() == other.fingerprint()


def test_a_sample_has_something_to_learn_and_equal_seeds_equal_lines(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample(tmp_path / name, rows=4000, seed=seed)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    assert a.startswith(HEADER)
    data = Avazu(str(tmp_path / "a")).load()
    assert 0.05 < data.labels.mean() < 0.4
    site = data.ids[:, FIELDS.index("site_id")]
    rates = [data.labels[site == i].mean().item() for i in range(1, 11)]
    assert np.ptp(rates) > 0.1


@pytest.mark.parametrize(
    ("bad", "column", "got"),
    [
        (line() + ",1", "C21", "25 values"),
        (line()[: -len(",-1")], "C21", "23 values"),
        ("", "id", "0 values"),
        (line(click="2"), "click", "2"),
        (line(click=""), "click", ""),
        (line(hour="14102124"), "hour", "14102124"),
        (line(hour="2014-10-21"), "hour", "2014-10-21"),
        (line(C1="x"), "C1", "x"),
        (line(C21=""), "C21", ""),
        (line(C14="1.5"), "C14", "1.5"),
        (line(site_id="1fbe01fg"), "site_id", "1fbe01fg"),
        (line(device_ip="1fbe01fe0"), "device_ip", "1fbe01fe0"),
        (line(app_id="-1"), "app_id", "-1"),
        (line(device_model=""), "device_model", ""),
    ],
)
@pytest.mark.parametrize("place", [0, 39])
def test_a_malformed_line_is_named(
    tmp_path: Path, bad: str, column: str, got: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_file, "BLOCK", 1000)
    lines = [line()] * 40
    lines[place] = bad
    path = write(tmp_path / "train", lines)
    with pytest.raises(DataError) as caught:
        Avazu(path).load()
    message = str(caught.value)
    assert message.startswith(f"{path}, line {place + 2}, column {column!r}: must be ")
    assert f"got {got!r}" in message


def test_files_without_lines_or_header_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold at least one line below its header"):
        Avazu(write(tmp_path / "train", [])).load()
    (tmp_path / "train").write_text(line() + "\n")
    with pytest.raises(DataError, match="line 1, column 'click': must be in the header"):
        Avazu(str(tmp_path / "train")).load()
    with pytest.raises(DataError, match="must be a file, but does not exist.*Avazu"):
        Avazu(str(tmp_path / "none")).load()
