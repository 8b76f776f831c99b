"""Times bare `os.fork()` worlds: the practical limit for a world of fresh processes.

A script: `python peer_fork.py --workload W --size N --worlds K [--huge-pages] --out FILE`. One
process with torch imported and one thread forks N ranks; each joins a gloo group over a file store,
makes its mesh, runs the workload and exits. Nothing is collected, captured, reported or supervised.
FILE gets JSON with `first_ms`, `each_ms` (the K - 1 worlds after the first) and `notes`.

The first world reports the modules that torch imported lazily; this process imports them before the
next, since forks that import in every rank are not the fastest possible. With `--huge-pages` the
process also freezes its garbage collector and moves its memory to huge pages, which makes forks
cheaper.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import workloads
from torch.distributed.device_mesh import init_device_mesh

MADV_COLLAPSE = 25  # linux/mman.h; Linux 6.1 or later
HUGE_PAGE_BYTES = 2 << 20
LAZY_PACKAGES = ("torch", "numpy", "sympy")


def run_rank(workload: str, rank: int, size: int, folder: Path) -> None:
    """Joins the world whose store lies in `folder` and runs the workload. Collective."""
    torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined] # torch re-exports it without __all__
        str(folder / "store"), size
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    workloads.WORKLOADS[workload](init_device_mesh("cpu", (size,)))


def fork_rank(workload: str, rank: int, size: int, folder: Path, *, tell: bool) -> int:
    """The pid of a new rank; with `tell` it lists its imported modules in `folder/modules.json`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run_rank(workload, rank, size, folder)
        if tell:
            (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))
    except BaseException:  # noqa: BLE001 # a forked rank must never return into its parent's code
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_world(workload: str, size: int, *, tell_in: Path | None = None) -> float:
    """The duration in ms of one world, from the first fork to the last exit.

    Raises RuntimeError when a rank failed. `tell_in` is a folder that keeps `modules.json`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = tell_in or Path(scratch)
        started_s = time.perf_counter()
        pids = [
            fork_rank(workload, rank, size, folder, tell=tell_in is not None and rank == 0)
            for rank in range(size)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        elapsed_ms = (time.perf_counter() - started_s) * 1e3
    if any(codes):
        raise RuntimeError(f"exit codes of the ranks were {codes}, expected zeros")
    return elapsed_ms


def import_lazy(folder: Path) -> list[str]:
    """The names of the modules that the first world imported and that are imported here now."""
    names = json.loads((folder / "modules.json").read_text())
    lazy = [
        name
        for name in names
        if name not in sys.modules and name.partition(".")[0] in LAZY_PACKAGES
    ]
    for name in lazy:
        importlib.import_module(name)
    return lazy


def collapse_huge_pages() -> int:
    """The number of writable private mappings of this process that now lie on huge pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    collapsed = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access = line.split()[:2]
        start, end = (int(address, 16) for address in span.split("-"))
        start = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        length = end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - start
        if access != "rw-p" or length <= 0:
            continue
        refused = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_COLLAPSE)
        collapsed += not refused
    return collapsed


def measure(workload: str, size: int, worlds: int, *, huge_pages: bool) -> dict[str, object]:
    """The timings of `worlds` worlds in a row, and what they ran on."""
    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    with tempfile.TemporaryDirectory() as scratch:
        first_ms = run_world(workload, size, tell_in=Path(scratch))
        lazy = import_lazy(Path(scratch))
    notes: dict[str, object] = {"threads": threads, "lazy_modules": len(lazy)}
    if huge_pages:
        gc.collect()
        gc.freeze()
        notes["collapsed_mappings"] = collapse_huge_pages()
    each_ms = [run_world(workload, size) for _ in range(worlds - 1)]
    return {"first_ms": first_ms, "each_ms": each_ms, "notes": notes}


def main() -> None:
    """Runs the worlds and writes their durations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=workloads.WORKLOADS, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--worlds", type=int, required=True)
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    timings = measure(options.workload, options.size, options.worlds, huge_pages=options.huge_pages)
    options.out.write_text(json.dumps(timings))


if __name__ == "__main__":
    main()
