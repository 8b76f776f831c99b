"""An object store as fsspec sees one: a fake, in a folder that all ranks share.

A file appears whole when its upload ends, there is no rename, and a listing shows what was there
when `settle` was called last, not what is there now.
"""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

PROTOCOL = "fakestore"
LISTING = "listing.json"


class ObjectStore(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """fakestore://folder/name is the file folder/name below `root`."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, root: str, fail_at: int = -1, **options: Any) -> None:
        """fail_at: the number of the changing request that fails."""
        super().__init__(**options)
        self.root = Path(root)
        self.fail_at = fail_at
        self.changes = 0
        self.lock = threading.Lock()

    # Requests.

    def log(self, what: str, path: str, *more: int) -> None:
        """Requests of all ranks, one line each."""
        line = json.dumps([what, self.name_of(path), *more]) + "\n"
        fd = os.open(self.root / "requests", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode())
        os.close(fd)

    def change(self, what: str, path: str) -> None:
        """A request that changes something; fails if it is its turn."""
        with self.lock:
            number, self.changes = self.changes, self.changes + 1
        if number == self.fail_at:
            raise OSError(f"503 Slow Down: {what} {path}")
        self.log(what, path)

    # Requests.

    def name_of(self, path: str) -> str:
        name: str = self._strip_protocol(path)
        return name

    def place(self, path: str) -> Path:
        return self.root / "objects" / self.name_of(path).replace("/", "\\")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.change("put", path)
        self.place(path).parent.mkdir(exist_ok=True)
        upload = self.place(path).with_suffix(f".upload-{os.getpid()}-{threading.get_ident()}")
        upload.write_bytes(value)
        upload.replace(self.place(path))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        content = self.place(path).read_bytes()[start:end]
        self.log("get", path, len(content))
        return content

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        place = self.place(path)
        if not place.exists():
            raise FileNotFoundError(path)
        return {"name": self.name_of(path), "size": place.stat().st_size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.log("list", path)
        names = json.loads((self.root / LISTING).read_text())
        inside = [name for name in names if name.startswith(self.name_of(path) + "/")]
        found = [{"name": name, "size": 0, "type": "file"} for name in inside]
        return found if detail else inside

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def rm_file(self, path: str) -> None:
        self.change("delete", path)
        self.place(path).unlink()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" in mode:
            return io.BytesIO(self.cat_file(path))
        return Upload(self, path)


class Upload(io.BytesIO):
    """A file that is sent in parts, and is there when it is closed."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        super().__init__()
        self.store, self.path = store, path

    def write(self, data: Any) -> int:
        self.store.change("part", self.path)
        return super().write(data)

    def discard(self) -> None:
        """Give the upload up."""
        super().close()

    def close(self) -> None:
        if not self.closed:
            self.store.pipe_file(self.path, self.getvalue())
            super().close()


def objects(root: Path, folder: str) -> set[str]:
    """The names of the objects of a folder."""
    names = [path.name.replace("\\", "/") for path in (root / "objects").iterdir()]
    return {name.removeprefix(folder + "/") for name in names if name.startswith(folder + "/")}


def settle(root: Path) -> None:
    """Let listings show what is there."""
    here = root / "objects"
    here.mkdir(exist_ok=True)
    names = sorted(path.name.replace("\\", "/") for path in here.iterdir())
    (root / LISTING).write_text(json.dumps(names))


def requests(root: Path) -> list[list[Any]]:
    """Requests of all ranks so far."""
    return [json.loads(line) for line in (root / "requests").read_text().splitlines()]


fsspec.register_implementation(PROTOCOL, ObjectStore, clobber=True)
