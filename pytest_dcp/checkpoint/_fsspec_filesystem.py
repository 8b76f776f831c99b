"""fsspec's file systems: the names of torch's private module `_fsspec_filesystem`."""

from pytest_dcp.checkpoint.fsspec_storage import FsspecReader, FsspecWriter

__all__ = ["FsspecWriter", "FsspecReader"]
