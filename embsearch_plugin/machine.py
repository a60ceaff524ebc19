"""What figures were measured on, and with which clock."""

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from embsearch_plugin.errors import SettingsError, StackError

PACKAGES = ("embsearch-plugin", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


def clock() -> float:
    """Return seconds: the process's own with one thread, whatever others do on the machine; otherwise the wall clock's.

    Where a GPU is used it is the wall clock's, once the GPU has done all it was given.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time() if _own_time() else time.perf_counter()


def clock_name() -> str:
    """Return what :func:`clock` reads."""
    return "CPU time of the process" if _own_time() else "wall clock"


def _own_time() -> bool:
    return torch.get_num_threads() == 1 and not torch.cuda.is_initialized()


def check_device(device: str) -> None:
    """Raise a SettingsError unless ``device`` is the name of one."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SettingsError(f"device must be cpu, cuda or cuda:N, got {device!r}")


def begin_to_use(device: str) -> None:
    """Make sure that ``device`` is there, and let it be the one that kernels run on and :func:`clock` waits for.

    Raises:
        StackError: where it is not there.
    """
    if device == "cpu":
        return
    count, number = torch.cuda.device_count(), torch.device(device).index or 0
    if number >= count:
        raise StackError(
            f"device {device!r} is not there: torch sees {count} CUDA device(s).\n  Possible solutions: 1) device=cpu  "
            "2) `embsearch doctor` says what is wrong with the installation."
        )
    torch.cuda.init()
    torch.cuda.set_device(number)


def machine() -> dict[str, Any]:
    """Say what it runs on, as plain data."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock_name(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that figures depend on."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
