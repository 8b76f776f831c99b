"""A storage in an sqlite database, whose files C code writes: for the suite for storages."""

from __future__ import annotations

import io
import os
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

FILE = "checkpoint.sqlite"
Place = str | os.PathLike[str]


class Database:
    """The tables of one checkpoint, in a folder."""

    def __init__(self, path: Place) -> None:
        self.folder = Path(path)

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """A transaction. Raises FileNotFoundError where there is no database."""
        if not (self.folder / FILE).exists():
            raise FileNotFoundError(self.folder / FILE)
        with closing(sqlite3.connect(self.folder / FILE)) as connection, connection:
            yield connection

    def make(self) -> None:
        """Make the folder and the tables, which may be there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.folder / FILE)) as connection, connection:
            connection.execute("create table if not exists entries (id integer primary key, data)")
            connection.execute("create table if not exists metadata (data)")


class Placed:
    """The common part of the writer and the reader."""

    def __init__(self, path: Place) -> None:
        self.database = Database(path)

    def reset(self, checkpoint_id: Place | None = None) -> None:
        if checkpoint_id is not None:
            self.database = Database(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Place) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class SqliteWriter(Placed, StorageWriter):
    def storage_meta(self) -> StorageMeta | None:
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.database.make()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self.database.opened() as connection:
            for item in plan.items:
                data: Any = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    content = data.getvalue()
                else:
                    stream = io.BytesIO()
                    torch.save(data.detach().clone(), stream)
                    content = stream.getvalue()
                row = connection.execute("insert into entries (data) values (?)", (content,))
                results.append(WriteResult(item.index, len(content), row.lastrowid))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {one.index: one.storage_data for some in results for one in some}
        entry_ids = list(metadata.storage_data.values())
        with self.database.opened() as connection:
            connection.execute("delete from metadata")
            connection.execute("insert into metadata values (?)", (pickle.dumps(metadata),))
            marks = ", ".join("?" * len(entry_ids))
            connection.execute(f"delete from entries where id not in ({marks})", entry_ids)
        with closing(sqlite3.connect(self.database.folder / FILE)) as connection:
            connection.execute("vacuum")


class SqliteReader(Placed, StorageReader):
    def read_metadata(self) -> Metadata:
        with self.database.opened() as connection:
            found = connection.execute("select data from metadata").fetchone()
        if found is None:
            raise FileNotFoundError("no checkpoint was finished")
        metadata: Metadata = pickle.loads(found[0])
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.rows: Any = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with self.database.opened() as connection:
            for item in plan.items:
                row = self.rows[item.storage_index]
                found = connection.execute("select data from entries where id = ?", (row,))
                stream = io.BytesIO(found.fetchone()[0])
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, stream)
                    continue
                stored = torch.load(stream, weights_only=True)
                for dim, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    stored = stored.narrow(dim, start, length)
                target = planner.resolve_tensor(item)
                target.detach().copy_(stored)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future
