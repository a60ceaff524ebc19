"""What figures were measured on, and with which clock."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("embsearch-plugin", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


def clock() -> float:
    """Return seconds: the process's own with one thread, whatever others do on the machine; otherwise the wall clock's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock_name() -> str:
    """Return what :func:`clock` reads."""
    return "CPU time of the process" if torch.get_num_threads() == 1 else "wall clock"


def machine() -> dict[str, Any]:
    """Say what it runs on, as plain data."""
    return {
        "processor": _processor(),
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
