"""Makes this Linux process look like one of macOS or Windows, then uses the engine in it.

`python other_system.py SYSTEM FOLDER [RANK]`: with a rank, it is one of two. The interpreter, its
standard library and torch stay those of Linux, so they are imported before anything is hidden.
"""

from __future__ import annotations

import importlib
import mmap
import os
import pkgutil
import select
import selectors
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

LINUX_ONLY = {
    os: (
        "memfd_create", "MFD_CLOEXEC", "posix_fallocate", "posix_fadvise", "sched_getaffinity",
        "sched_setaffinity", "copy_file_range", "splice", "sendfile", "eventfd", "pidfd_open",
        "O_PATH", "O_DIRECT", "O_NOATIME", "fdatasync", "setns", "unshare",
        "waitid", "WEXITED", "WSTOPPED", "WCONTINUED", "WNOWAIT", "CLD_EXITED", "CLD_STOPPED",
        "CLD_CONTINUED", "P_PID", "P_PIDFD",
    ),
    socket: ("TCP_QUICKACK", "SO_PEERCRED", "SOCK_CLOEXEC", "SO_PASSCRED", "TCP_USER_TIMEOUT"),
    mmap: ("MADV_HUGEPAGE", "MADV_DONTFORK", "MADV_DOFORK", "MADV_REMOVE", "MAP_POPULATE"),
    select: ("epoll",),
}  # fmt: skip
"""macOS has none of these."""
UNIX_ONLY = {
    os: (
        "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_SYNC", "preadv",
        "pwritev", "readv", "writev", "pread", "pwrite", "fork", "forkpty", "register_at_fork",
        "geteuid", "getuid", "getegid", "getgid", "getpgid", "setpgid", "setsid", "killpg", "major",
        "minor", "sysconf", "statvfs", "fstatvfs", "uname", "mkfifo", "chown", "fchmod", "fchown",
        "SEEK_DATA", "SEEK_HOLE", "WNOHANG", "getloadavg", "sync", "lockf",
    ),
    socket: ("AF_UNIX", "MSG_DONTWAIT", "MSG_NOSIGNAL", "CMSG_LEN"),
    mmap: ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "PROT_READ", "PROT_WRITE"),
    select: ("poll",),
}  # fmt: skip
UNIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
BEFORE = (
    "asyncio", "concurrent.futures", "cProfile", "ctypes.util", "fsspec", "hypothesis", "logging",
    "multiprocessing.connection", "multiprocessing.reduction", "numpy", "pytest", "secrets",
    "selectors", "subprocess", "tempfile", "torch.distributed.checkpoint.hf_storage", "uuid",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.utils._pytree",
    "zipfile", "torch.distributed.tensor", "torch.distributed.checkpoint.format_utils", "filelock",
    "torch.distributed.checkpoint._fsspec_filesystem", "cloudpickle", "pdb", "webbrowser",
    "unittest", "doctest", "shutil", "queue", "socketserver",
)  # fmt: skip
"""Modules that choose their own calls by the system when they are imported."""


def become(system: str) -> None:
    """Hide what the system lacks, and take its name."""
    for name in BEFORE:
        importlib.import_module(name)
    hide(LINUX_ONLY)
    if system == "win32":
        hide(UNIX_ONLY)
        for name in UNIX_MODULES:
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
        # Of a class in C, so that only this hides it.
        socket.socket.sendmsg = property(_missing)  # type: ignore[method-assign,assignment]
        selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc]
        os.kill = _missing  # signal 0 would end the process there
    sys.addaudithook(_refuse_proc)
    stat = os.stat
    os.stat = lambda path, *rest, **more: stat(_outside_proc(path), *rest, **more)
    sys.platform = system


def hide(names: dict[Any, tuple[str, ...]]) -> None:
    for module, attributes in names.items():
        for name in attributes:
            if hasattr(module, name):
                delattr(module, name)


def _missing(*_: Any) -> Any:
    raise AttributeError("hidden")


def _outside_proc(path: Any) -> Any:
    if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc/"):
        raise FileNotFoundError(2, "hidden", path)
    return path


def _refuse_proc(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _outside_proc(arguments[0])


def import_all(*packages: str) -> None:
    """Import every module of the packages, or end with the list of those that fail."""
    failed = []
    for package in packages:
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, package + "."):
            try:
                importlib.import_module(module.name)
            except Exception:  # noqa: BLE001 - all of them are listed
                failed.append(f"{module.name}: {traceback.format_exc(limit=-1)}")
    if failed:
        sys.exit("\n".join(failed))


def use_engine(folder: Path) -> None:
    """Save and load in each way that one process has."""
    import pytest
    import torch

    from pytest_dcp import checkpoint as dcp
    from pytest_dcp.checkpoint.format_utils import dcp_to_torch_save
    from pytest_dcp.errors import SaverProcessError

    state = {"w": torch.arange(1 << 20), "nested": {"b": torch.ones(3, dtype=torch.bfloat16)}}
    state["step"] = 7

    def check(checkpoint_id: Any, **keywords: Any) -> None:
        blank = {"w": torch.zeros(1 << 20, dtype=torch.int64), "step": 0}
        blank["nested"] = {"b": torch.zeros(3, dtype=torch.bfloat16)}
        dcp.load(blank, checkpoint_id=checkpoint_id, **keywords)
        assert torch.equal(blank["w"], state["w"])
        assert torch.equal(blank["nested"]["b"], state["nested"]["b"])
        assert blank["step"] == 7

    for _ in range(2):  # the second save replaces the first
        dcp.save(state, checkpoint_id=folder / "saved")
        check(folder / "saved")
    dcp.save(state, checkpoint_id=folder / "alone", no_dist=True)
    check(folder / "alone", no_dist=True)
    dcp.async_save(state, checkpoint_id=folder / "thread").result(timeout=120)
    check(folder / "thread")
    with pytest.raises((SaverProcessError, dcp.api.CheckpointException), match=r"needs Linux"):
        dcp.async_save(
            state,
            checkpoint_id=folder / "process",
            async_checkpointer_type=dcp.state_dict_saver.AsyncCheckpointerType.PROCESS,
        ).result(timeout=120)
    dcp_to_torch_save(folder / "saved", folder / "one.pt")
    assert torch.equal(torch.load(folder / "one.pt")["w"], state["w"])

    tensors = {"w": state["w"], "v": torch.ones(5)}
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "hf")))
    blank = {"w": torch.zeros(1 << 20, dtype=torch.int64), "v": torch.zeros(5)}
    dcp.load(blank, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "hf")))
    assert torch.equal(blank["w"], tensors["w"])

    data = next((folder / "saved").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(dcp.api.CheckpointException, match=r"checksum|CRC|crc"):
        check(
            folder / "saved", storage_reader=dcp.FileSystemReader(folder / "saved", verify="full")
        )


def use_two_ranks(folder: Path, rank: int) -> None:
    """Save and load together with the other rank."""
    import torch
    import torch.distributed as dist

    from pytest_dcp import checkpoint as dcp

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mine = {f"of rank {rank}": torch.full((4,), rank), "both": torch.arange(6)}
    dcp.save(mine, checkpoint_id=folder / "two")
    blank = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    dcp.load(blank, checkpoint_id=folder / "two")
    assert all(torch.equal(blank[name], tensor) for name, tensor in mine.items())
    dist.destroy_process_group()


if __name__ == "__main__":
    become(sys.argv[1])
    if len(sys.argv) > 3:
        use_two_ranks(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        import_all("pytest_dcp.checkpoint", "pytest_dcp._engine")
        use_engine(Path(sys.argv[2]))
        importlib.import_module("pytest_dcp.plugin")
    print("used")
