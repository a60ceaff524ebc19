"""Bytes of the tables, and the peak memory of training with and without a search, each in a process of its own."""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from embsearch_plugin.bench.timing import Trainer, compact, uniform
from embsearch_plugin.bench.workload import FOUR_WIDTHS, TWO_WIDTHS, Workload
from embsearch_plugin.fused import FusedEmbeddingBags

STEPS = 6


def stored_bytes(work: Workload) -> dict[str, dict[str, int]]:
    """Return, per form of the tables, the bytes of weights and indices, and of the optimizer's state."""
    found = {"uniform": _bytes(uniform(work))}
    for name, widths in (("two widths", TWO_WIDTHS), ("four widths", FOUR_WIDTHS)):
        found[f"compact, {name}"] = _bytes(compact(work, widths))
    return found


def _bytes(collection: nn.Module) -> dict[str, int]:
    fused = next(module for module in collection.modules() if isinstance(module, FusedEmbeddingBags))
    states = [tensor for state in fused.optimizer_states().values() for tensor in state.values()]
    return {
        "tables": sum(tensor.nbytes for tensor in [*collection.parameters(), *collection.buffers()]),
        "optimizer": sum(tensor.nbytes for tensor in states),
    }


def peak_bytes(work: Workload, *, search: bool) -> int:
    """Return the peak of a training's memory, once it runs, above what the process held before the model was built.

    On a GPU it is the memory of its tensors there.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(work)), "search" if search else "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _train(work: Workload, search: bool) -> None:
    """Take some training steps, each followed by a search step where there is a search."""
    batches = work.batches()
    session = None
    if search:
        model, session = work.searched()
    else:
        model = work.baseline()
    step = Trainer(model)
    step(batches[0])  # builds the kernels of a search, whose tables then exist twice for a moment, as the baseline's did
    _forget_peak()
    for number in range(STEPS):
        step(batches[number % len(batches)])
        if session is not None:
            session.step(batches[-number % len(batches)])


def _forget_peak() -> None:
    """Give freed memory back, and let the highest level so far be the present one."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int:
    """Return a number of bytes from Linux's account of this process: VmRSS now, VmHWM the highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _main() -> None:
    torch.set_num_threads(1)
    work = Workload(**json.loads(sys.argv[1]))
    _train(work.alike(tables=2, rows=100, batch=16), search=True)  # what is loaded at first use is not counted
    gc.collect()
    before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else _status("VmRSS")
    _train(work, search=sys.argv[2] == "search")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status("VmHWM")
    sys.stdout.write(f"{peak - before}\n")


if __name__ == "__main__":
    _main()
