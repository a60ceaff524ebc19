"""Where a study is kept: Optuna's storages by URL, and what becomes of the trials of workers that were killed."""

import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from embsearch_plugin.errors import EmbsearchError, StudyError
from embsearch_plugin.files import is_locked, locked
from embsearch_plugin.study.config import hidden

RUNNING, WORKER = "running", "worker"
MAX_RETRIES = 3
HEARTBEAT, GRACE = 60, 180  # seconds
BUSY = {"connect_args": {"timeout": 120}}  # seconds that SQLite waits for another process


def url_of(given: str | None, folder: Path) -> str:
    """Return the storage's URL: the one given, or that of a SQLite file in the run folder."""
    return given or f"sqlite:///{folder.resolve() / 'study.db'}"


def storage_of(url: str) -> BaseStorage:
    """Open a storage: ``journal:///FILE``, ``redis://``, or whatever SQLAlchemy takes.

    On a database server trials have heartbeats, so that those of a machine that is gone are tried again.
    """
    if url.startswith("journal:///"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal:///")))
    if url.startswith(("redis://", "rediss://")):
        return JournalStorage(JournalRedisBackend(url))
    if url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs=BUSY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry_callback()
        )


def retry_callback() -> RetryHeartbeatStaleTrialCallback:
    """Return what queues a lost trial again, with the same values, a few times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)


def name_metrics(study: optuna.Study, names: list[str]) -> None:
    """Name a study's values, for Optuna's own plots and dashboard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(names)


@contextmanager
def explained(url: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong with a storage, or with the disk, into an error that says what to do; ``more`` errors, too."""
    try:
        yield
    except (EmbsearchError, optuna.TrialPruned):
        raise
    except Exception as error:
        if not (isinstance(error, (OSError, StorageInternalError, *more)) or type(error).__module__.startswith(_DRIVERS)):
            raise
        raise StudyError(
            f"the study cannot go on, because its storage {hidden(url)} or the disk cannot be used: {_first_line(error)}\n"
            "  Possible solutions: 1) see that the storage can be reached, and that the disk is not full  2) another storage.\n"
            "  Nothing is lost: the same command goes on with what was finished."
        ) from error


_DRIVERS = ("sqlalchemy", "sqlite3", "redis", "psycopg", "pymysql", "MySQLdb", "mysql")


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or ['no more is known.'])[0].rstrip('.')}."


def worker(folder: Path) -> str:
    """Name this machine and run folder, which a trial is marked with."""
    return f"{socket.gethostname()}:{folder.resolve()}"


@contextmanager
def alive(trial: optuna.Trial, folder: Path) -> Iterator[None]:
    """Mark a trial as one that a living process of this run folder works on."""
    mark = folder / RUNNING / str(trial.number)
    with locked(mark):
        trial.set_user_attr(WORKER, worker(folder))
        try:
            yield
        finally:
            mark.rmdir()


def retry_lost(study: optuna.Study, folder: Path, *, own: bool) -> list[int]:
    """Mark the running trials of this folder whose process is gone as failed, and queue them again; return their numbers.

    Args:
        study: the study, which no other process of this folder may change meanwhile.
        folder: the run folder.
        own: whether the storage is the folder's own, so that all trials are.
    """
    lost = [
        trial
        for trial in study.get_trials(states=(TrialState.RUNNING,))
        if (own or trial.user_attrs.get(WORKER) == worker(folder)) and not is_locked(folder / RUNNING / str(trial.number))
    ]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL)
        retry(study, trial)
        shutil.rmtree(folder / RUNNING / str(trial.number), ignore_errors=True)
    return [trial.number for trial in lost]


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial that could not be finished again."""
    retry_callback()(study, trial)
