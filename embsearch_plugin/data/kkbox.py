"""KKBox's music recommendation log (WSDM Cup 2018), read from the owner's CSV files.

    train.csv   msno,song_id,source_system_tab,source_screen_name,source_type,target
    songs.csv   song_id,song_length,genre_ids,artist_name,composer,lyricist,language

An artist's name may be several, separated by ``|``; composers and lyricists also by ``/``, ``\\``, ``;`` or the ideographic
comma. ``AC/DC`` is one artist, so names of artists are cut at ``|`` alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
import torch

from embsearch_plugin.data.bags import Bags
from embsearch_plugin.data.csv_file import read_chunks
from embsearch_plugin.data.dataset import Field, Schema, TabularDataset, check_split, random_split
from embsearch_plugin.data.vocabulary import Numbering, by_count, encode, encode_parts
from embsearch_plugin.errors import DataError

SOURCE = "the files of KKBox's Music Recommendation Challenge from Kaggle, unpack them, and give their folder as 'path'"
SEPARATORS = {"artist_name": "|", "composer": "|/\\;、", "lyricist": "|/\\;、"}


@dataclass(frozen=True)
class KkBox:
    """Will a user listen to a song again within a month? ``path`` is the folder of train.csv and songs.csv, plain or gzip.

    Categorical, 5 fields, as in the NIS paper (Joglekar et al. 2020, section 4.1.1, table 1): user, song, artist name,
    composer and lyricist. The last three have several values, or none. Vocabularies come from all records, the most frequent
    value first (appendix A.1); how frequent one is, the training records say, where the paper counts them all. There are no
    dense numbers.

    Records whose song is not in songs.csv are left out: the paper's steps need its features. How values are separated is not
    in the paper, so the sizes of its vocabularies may differ from these.

    The records, which have no time, are split at random, as ``seed`` decides: 20 % are for testing, and 10 % of the others for
    validation, as in the paper.

    Args:
        path: the folder of the files.
        split: fractions for training, validation and test.
        seed: of the split.
    """

    name: ClassVar[str] = "kkbox"

    path: str
    split: tuple[float, float, float] = (0.72, 0.08, 0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        check_split(self.split, self.seed)

    def load(self) -> TabularDataset:
        """Read the files. A song's composers are kept once, however often it is listened to: 32 bytes per record in all.

        Raises:
            DataError: a file is missing, empty or malformed, or songs.csv has none of the songs.
        """
        songs = Numbering()
        records = _read_records(Path(self.path) / "train.csv", songs)
        features = _read_songs(Path(self.path) / "songs.csv", songs)
        records = records.filter(records["song"].is_in(features["song"].implode()))
        if records.is_empty():
            raise DataError(f"{self.path}: songs.csv must hold songs of train.csv, but has none. Try: files of one download.")
        splits = random_split(len(records), self.split, self.seed)
        in_train = pl.Series(np.zeros(len(records), np.int64))
        in_train[splits["train"].numpy()] = 1  # other splits may not decide which rows count as frequent
        user, song = (by_count(records[name], in_train, at_least=0) for name in ("user", "song"))
        user_ids, song_ids = encode(records["user"], user), encode(records["song"], song)
        features = features[np.argsort(encode(features["song"], song))]  # as the ids are
        heard = np.bincount(song_ids, weights=in_train.to_numpy()).astype(np.int64)  # per song
        columns, bags = _encode_features(features, pl.Series(heard))
        item = (Field("song", len(song)), *columns)
        return TabularDataset(
            schema=Schema((Field("user", len(user)), *item), (), tuple(field.name for field in item)),
            dense=torch.empty(len(records), 0),
            ids=torch.from_numpy(np.column_stack([user_ids, *[song_ids] * (1 + len(bags))])),
            labels=torch.from_numpy(records["target"].to_numpy(writable=True)),
            splits=splits,
            bags=bags,
        )


def _read_records(path: Path, songs: Numbering) -> pl.DataFrame:
    """Return ``user`` and ``song``, numbered as they come, and ``target``."""
    users = Numbering()
    target = pl.col("target").replace_strict({"0": 0.0, "1": 1.0}, default=None, return_dtype=pl.Float32)
    return pl.concat(
        [
            pl.DataFrame(
                {
                    "user": users(chunk.require("msno", pl.col("msno"), "a user")),
                    "song": songs(chunk.require("song_id", pl.col("song_id"), "a song")),
                    "target": chunk.require("target", target, "0 or 1"),
                }
            )
            for chunk in read_chunks(path, ("msno", "song_id", "target"), SOURCE)
        ]
    )


def _read_songs(path: Path, songs: Numbering) -> pl.DataFrame:
    """Return the number and the features, as text, of each song that is numbered already; the file has many more."""
    numbered = pl.Series(list(songs.numbers), dtype=pl.String)
    found = [pl.DataFrame(schema={"song": pl.Int32} | dict.fromkeys(SEPARATORS, pl.String))]
    for chunk in read_chunks(path, ("song_id", *SEPARATORS), SOURCE):
        song = chunk.text["song_id"].replace_strict(numbered, range(len(numbered)), default=None, return_dtype=pl.Int32)
        seen = pl.concat([frame["song"] for frame in found]).implode()
        again = song.is_not_null() & (~song.is_first_distinct() | song.is_in(seen))
        chunk.require("song_id", pl.when(~again).then("song_id"), "another one on every line")
        found.append(chunk.text.select(song.alias("song"), *SEPARATORS).drop_nulls("song"))
    return pl.concat(found)


def _encode_features(features: pl.DataFrame, counts: pl.Series) -> tuple[list[Field], dict[str, Bags]]:
    """Return a field for each feature, and its bag for each song; ``counts`` says how often the songs occur in training."""
    fields: list[Field] = []
    bags: dict[str, Bags] = {}
    for feature, separators in SEPARATORS.items():
        bags[feature], rows = encode_parts(features[feature], separators, counts)
        fields.append(Field(feature, rows, multiple=True))
    return fields, bags


def write_sample(folder: str | Path, *, users: int = 100, songs: int = 80, records: int = 5_000, seed: int = 0) -> None:
    """Write generated records and songs in KKBox's format into a folder, which is made if need be.

    There is something to learn: whether a song is heard again depends on the user, the song and its artist. Some songs have
    several composers, or none; one that is listened to is not in songs.csv.
    """
    rng = np.random.default_rng(seed)
    user, song, artist = rng.integers(users, size=records), rng.integers(songs, size=records), rng.integers(20, size=songs)
    score = rng.standard_normal(users)[user] + rng.standard_normal(songs)[song] + rng.standard_normal(20)[artist[song]]
    target = (score + rng.standard_normal(records) > 0).astype(int)
    names = ["Ann", "Bo| Ann", "周|Bo, 2", "Cy/Di", "Di;Ann、Bo", ""]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train = pl.DataFrame({"msno": [f"user{u}=" for u in user], "song_id": [f"song{s}=" for s in song]})
    source = {"source_system_tab": "my library", "source_screen_name": None, "source_type": "album"}
    train = train.with_columns(pl.lit(value, pl.String).alias(name) for name, value in source.items())
    train.with_columns(pl.Series("target", target)).write_csv(folder / "train.csv")
    pl.DataFrame(
        {
            "song_id": [f"song{s}=" for s in range(1, songs + 1)],
            "song_length": rng.integers(100_000, 400_000, songs),
            "genre_ids": rng.choice(["465", "465|1259", "1011"], songs),
            "artist_name": [f"Artist {a}, The" for a in artist[1:]] + ["Bo"],
            "composer": rng.choice(names, songs),
            "lyricist": rng.choice(names, songs),
            "language": rng.choice(["3.0", "52.0", "-1.0"], songs),
        }
    ).write_csv(folder / "songs.csv")
