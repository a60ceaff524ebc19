"""The doctor must name what is wrong with a stack, also where the stack cannot be imported at all."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from embsearch_plugin import stack
from embsearch_plugin.errors import StackError

CPU = {"torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0+cpu.shim", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
GPU = {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"}


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize("has_driver", [False, True])
@pytest.mark.parametrize(
    "versions",
    [
        pytest.param(CPU, id="cpu"),
        pytest.param(without(CPU, "fbgemm-gpu"), id="cpu build without the stand-in"),
        pytest.param({**GPU, "fbgemm-gpu": "1.8.0+cpu"}, id="cpu build from PyTorch's index"),
        pytest.param({"torch": "2.11.0", "fbgemm-gpu-cpu": "1.6.0", "torchrec": "1.6.1"}, id="another release"),
        pytest.param({"torch": "2.15.0a0", "fbgemm-gpu-cpu": "1.10.0", "torchrec": "1.10.0"}, id="two digits"),
        pytest.param({**CPU, "torch": stack.UNKNOWN}, id="torch from source"),
        pytest.param({**GPU, "fbgemm-gpu": stack.UNKNOWN, "torchrec": stack.UNKNOWN}, id="nightlies"),
    ],
)
def test_versions_that_belong_together(versions: dict[str, str], has_driver: bool) -> None:
    assert stack.version_problems(versions, has_driver=has_driver) == []


def test_the_cuda_build_is_fine_where_there_is_a_driver() -> None:
    assert stack.version_problems(GPU, has_driver=True) == []


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        pytest.param({}, ["torch is not", "fbgemm-gpu is not", "torchrec is not"], id="nothing"),
        pytest.param(without(CPU, "torch"), ["torch is not installed"], id="no torch"),
        pytest.param(without(CPU, "fbgemm-gpu-cpu"), ["fbgemm-gpu is not installed"], id="only the stand-in"),
        pytest.param(GPU, ["without an NVIDIA driver"], id="cuda build"),
        pytest.param({**GPU, "fbgemm-gpu": "1.8.0+cu130"}, ["without an NVIDIA driver"], id="marked cuda build"),
        pytest.param({**CPU, "fbgemm-gpu": "1.8.0+cpu"}, ["both installed"], id="two cpu builds"),
        pytest.param({**CPU, "torchrec": "1.7.0"}, ["torchrec 1.7.0 is not built for torch 2.13.0"], id="old torchrec"),
        pytest.param({**CPU, "fbgemm-gpu-cpu": "1.80.0"}, ["fbgemm-gpu-cpu 1.80.0 is not built"], id="80 is not 8"),
        pytest.param({**CPU, "torchrec": "0.8.0"}, ["torchrec 0.8.0 is not built"], id="0.8 is not 1.8"),
        pytest.param(
            {**CPU, "torch": "2.15.0"},
            ["torchrec 1.8.0 is not built for torch 2.15.0", "fbgemm-gpu-cpu 1.8.0 is not built for torch 2.15.0"],
            id="newest torch",
        ),
        pytest.param(
            {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.9.0", "fbgemm-gpu-cpu": "1.8.0"},
            ["fbgemm-gpu 1.9.0 is not built", "both installed", "without an NVIDIA driver"],
            id="everything at once",
        ),
    ],
)
def test_versions_that_do_not(versions: dict[str, str], expected: list[str]) -> None:
    problems = stack.version_problems(versions, has_driver=False)
    assert len(problems) == len(expected)
    assert all(text in problem.what for text, problem in zip(expected, problems, strict=True))


@pytest.mark.parametrize(("has_driver", "install"), [(False, "-r requirements/cpu.txt"), (True, "-e '.[gpu]'")])
def test_the_remedy_is_a_command_for_this_python_and_this_machine(has_driver: bool, install: str) -> None:
    remedy = stack.version_problems({}, has_driver=has_driver)[0].remedy
    assert remedy.startswith(sys.executable)
    assert remedy.endswith(f"-m pip install {install}")


def test_a_report_ends_with_each_command_once() -> None:
    report = stack.StackReport("3.11.7", GPU, "not usable", tuple(stack.version_problems({}, has_driver=False)))
    problems, commands = str(report).split("What to type, in the project's root folder:\n")
    assert "3. torchrec is not installed." in problems
    assert commands.strip() == report.problems[0].remedy


def test_this_machine_is_all_good() -> None:
    report = stack.describe()
    assert report.problems == ()
    assert str(report).endswith("All good.")
    assert report.cuda.startswith(("usable", "not usable"))


@pytest.mark.parametrize(
    ("versions", "has_driver", "devices", "expected"),
    [
        pytest.param(GPU, True, 2, "usable: 2 device(s)", id="gpu machine"),
        pytest.param(GPU, True, 0, "not usable: torch 2.13.0 finds no device", id="hidden devices"),
        pytest.param(CPU, True, 2, "not usable: fbgemm-gpu is not the CUDA build", id="cpu build on a gpu machine"),
        pytest.param(CPU, False, 0, "not usable: no NVIDIA driver", id="cpu machine"),
    ],
)
def test_cuda_is_usable_or_the_report_says_why_not(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], has_driver: bool, devices: int, expected: str
) -> None:
    monkeypatch.setattr(stack, "installed_versions", lambda: versions)
    monkeypatch.setattr(stack, "has_nvidia_driver", lambda: has_driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    assert stack.describe().cuda.startswith(expected)


def test_metadata_is_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "torch-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stack.installed_versions()["torch"] == "9.9"
    assert any("not built for torch 9.9" in problem.what for problem in stack.check_versions())


def test_a_package_without_metadata_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    assert stack.installed_versions() == dict.fromkeys(("torch", "fbgemm-gpu", "torchrec"), stack.UNKNOWN)


def test_require_looks_again_after_a_failure_and_not_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[stack.Problem("torch has gone.", "bring it back")], []]
    monkeypatch.setattr(stack, "check_versions", lambda: answers.pop(0))
    stack.require.cache_clear()
    with pytest.raises(StackError, match=r"torch has gone\.\n.*\n  bring it back$"):
        stack.require()
    stack.require()
    stack.require()
    assert answers == []


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=False)


def fake_package(folder: Path, name: str, source: str = "") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


@pytest.mark.parametrize(
    "error",
    [
        "OSError: libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
        "ImportError: undefined symbol: _ZNK3c105Error4whatEv",
        "AttributeError: '_OpNamespace' 'fbgemm' object has no attribute 'jagged_2d_to_dense'",
    ],
)
def test_a_library_that_cannot_be_loaded_ends_in_what_to_type(tmp_path: Path, error: str) -> None:
    fake_package(tmp_path, "torch")
    kind, _, message = error.partition(": ")
    fake_package(tmp_path, "fbgemm_gpu", f"raise {kind}({message!r})")
    done = run_python("from embsearch_plugin.stack import require; require()", tmp_path)
    assert done.returncode == 1
    cause, final = done.stderr.split("embsearch_plugin.errors.StackError: The stack of embsearch-plugin:")
    assert error in cause
    assert f"1. `import fbgemm_gpu` fails with {error}" in final
    assert "-m pip install" in final.splitlines()[-1]


def test_the_check_at_import_time_is_light(tmp_path: Path) -> None:
    code = "import sys; from embsearch_plugin import stack; stack.check_versions(); print(*sys.modules)"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"torch", "torchrec", "fbgemm_gpu", "numpy"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("statement", ["from embsearch_plugin import searchable", "import embsearch_plugin as es; es.prepare"])
def test_a_stack_that_cannot_be_loaded_is_explained_where_the_plugin_is_imported(statement: str, tmp_path: Path) -> None:
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text("raise OSError('libnvidia-ml.so.1: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "embsearch_plugin.errors.StackError" in done.stderr
    assert "pip install" in done.stderr.rpartition("StackError")[2]
