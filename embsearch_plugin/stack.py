"""What the machine's stack is: torch, torchrec and fbgemm-gpu, and whether they work together.

torchrec and fbgemm-gpu of release 1.N are built for torch 2.(N+5). fbgemm-gpu is two distributions with one import
package: ``fbgemm-gpu`` (CUDA, cannot be loaded without an NVIDIA driver) and ``fbgemm-gpu-cpu``. pip enforces none of
this, and what is wrong shows up as an error about a shared library, far from its cause.

Nothing heavy is imported at module level: this module has to work just when torch does not.
"""

import ctypes
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

from embsearch_plugin.errors import StackError

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
PACKAGES = {"torch": ("torch",), "fbgemm_gpu": FBGEMM, "torchrec": ("torchrec",)}  # what to import: where it comes from
STAND_IN = "+cpu.shim"  # the version of the empty distribution in requirements/fbgemm-gpu-on-cpu ends so
UNKNOWN = "unknown version"  # importable, but without metadata: built from source, or a nightly of another name
NVIDIA_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver; the CUDA build is linked to it


@dataclass(frozen=True)
class Problem:
    """What keeps the stack from working, the command that repairs it, and the error behind it if there was one."""

    what: str
    remedy: str
    cause: Exception | None = None


@dataclass(frozen=True)
class StackReport:
    """The stack of this machine. ``str()`` of it is what ``embsearch doctor`` prints."""

    python: str
    versions: Mapping[str, str]
    cuda: str
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        rows = {"python": self.python, **self.versions, "CUDA": self.cuda}
        table = "".join(f"  {name:<15} {value}\n" for name, value in rows.items())
        return f"The stack of embsearch-plugin:\n{table}\n{self._verdict()}"

    def _verdict(self) -> str:
        if not self.problems:
            return "All good."
        problems = "".join(f"  {i}. {problem.what}\n" for i, problem in enumerate(self.problems, start=1))
        commands = "\n".join(dict.fromkeys(f"  {problem.remedy}" for problem in self.problems))
        return f"Problems:\n{problems}What to type, in the project's root folder:\n{commands}"


def describe() -> StackReport:
    """Look at the metadata; if it shows no problem, import the three packages too."""
    return _report(check_versions() or _import_problems())


def check_versions() -> list[Problem]:
    """Return the problems that installed metadata gives away. Takes milliseconds and imports none of the stack."""
    return version_problems(installed_versions(), has_driver=has_nvidia_driver())


@cache
def require() -> None:
    """Import the stack, or raise :class:`StackError` with the whole report. Free after the first success."""
    problems = check_versions() or _import_problems()
    if problems:
        raise StackError(str(_report(problems))) from problems[0].cause


def installed_versions() -> dict[str, str]:
    """Return ``{distribution: version}`` of what is installed of the stack."""
    versions: dict[str, str] = {}
    for package, distributions in PACKAGES.items():
        for name in distributions:
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        if versions.keys().isdisjoint(distributions) and find_spec(package):
            versions[distributions[0]] = UNKNOWN
    return versions


def has_nvidia_driver() -> bool:
    """Return whether the library that the NVIDIA driver brings can be loaded."""
    try:
        ctypes.CDLL(NVIDIA_LIBRARY)
    except OSError:
        return False
    return True


def version_problems(versions: Mapping[str, str], *, has_driver: bool) -> list[Problem]:
    """Judge ``{distribution: version}`` for a machine with or without an NVIDIA driver."""
    remedy = _reinstall(has_driver)
    return [Problem(fault, remedy) for fault in _faults(versions, has_driver)]


def _faults(versions: Mapping[str, str], has_driver: bool) -> Iterator[str]:
    builds = _fbgemm_builds(versions)
    installed = {name: versions[name] for name in ("torch", "torchrec") if name in versions} | builds
    for names in PACKAGES.values():
        if installed.keys().isdisjoint(names):
            yield f"{names[0]} is not installed."
    for name, version in installed.items():
        if name != "torch" and not _fits(version, installed.get("torch", UNKNOWN)):
            yield f"{name} {version} is not built for torch {installed['torch']}: 1.N goes with torch 2.(N+5)."
    if len(builds) > 1:
        yield "fbgemm-gpu and fbgemm-gpu-cpu are both installed; each overwrites the other's package fbgemm_gpu."
    if _is_cuda_build(builds) and not has_driver:
        yield f"fbgemm-gpu {builds['fbgemm-gpu']} is the CUDA build; without an NVIDIA driver it cannot be loaded."


def _fbgemm_builds(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: versions[name] for name in FBGEMM if name in versions and not versions[name].endswith(STAND_IN)}


def _is_cuda_build(builds: Mapping[str, str]) -> bool:
    # PyTorch's own index has CPU and ROCm builds under this name too, and marks them: 1.8.0+cpu.
    version = builds.get("fbgemm-gpu", UNKNOWN)
    return version != UNKNOWN and not version.partition("+")[2].startswith(("cpu", "rocm"))


def _fits(version: str, torch: str) -> bool:
    if UNKNOWN in {version, torch}:
        return True
    release = re.match(r"1\.(\d+)\.", version)
    return release is not None and torch.startswith(f"2.{int(release[1]) + 5}.")


def _reinstall(has_driver: bool) -> str:
    # Uninstalling comes first: else pip removes one build of fbgemm_gpu after writing the other over it, and keeps a
    # CPU build of torch where a CUDA build is needed, because `==2.13.0` accepts `2.13.0+cpu`.
    pip = f"{shlex.quote(sys.executable)} -m pip"
    install = "-e '.[gpu]'" if has_driver else "-r requirements/cpu.txt"
    return f"{pip} uninstall -y torch torchrec {' '.join(FBGEMM)} && {pip} install {install}"


def _import_problems() -> list[Problem]:
    for package in PACKAGES:
        try:
            import_module(package)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what shared libraries that clash raise
            what = f"`import {package}` fails with {type(error).__name__}: {error}"
            return [Problem(what, _reinstall(has_nvidia_driver()), error)]
    return []


def _report(problems: list[Problem]) -> StackReport:
    versions = installed_versions()
    cuda = "not looked at: see the problems below" if problems else _cuda(versions)
    return StackReport(platform.python_version(), versions, cuda, tuple(problems))


def _cuda(versions: Mapping[str, str]) -> str:
    if not has_nvidia_driver():
        return "not usable: no NVIDIA driver on this machine"
    if not _is_cuda_build(_fbgemm_builds(versions)):
        return "not usable: fbgemm-gpu is not the CUDA build"
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return f"not usable: torch {versions['torch']} finds no device"
    return f"usable: {torch.cuda.device_count()} device(s), CUDA {torch.version.cuda}"
