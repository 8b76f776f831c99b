"""How a save becomes the checkpoint of its folder, at one instant.

A checkpoint is one metadata file, `.metadata`, and the data files that it names. A data file that
no metadata names is not part of any checkpoint, so a save can write its data files under unique
names without touching the old checkpoint. The save takes effect when its metadata gets the name
`.metadata`; everything before that is preparation, everything after it is cleanup.

Each rank writes its data files (`__RANK_N-SAVE.distcp`) and syncs them. Once all have reported
this, the coordinator locks the folder, checks that the files exist, and:

1. syncs the folder, so that the names of the data files last;
2. writes the metadata to a temporary name (`.metadata-SAVE.tmp`) and syncs it;
3. waits until the readers of the old metadata have opened their files, or have had their time
   (see `lease`), and renames the temporary file over the old one;
4. syncs the folder again: from here on the new checkpoint survives a power cut;
5. removes the files that no metadata names any more: the old data files, and leftovers of dead
   saves.

The state after a crash, whether processes die or the power fails:

    crash during            the folder loads as      left over
    writing of data files   old                      some of the new data files
    1, 2, the wait in 3     old                      the new data files, perhaps .tmp
    3 once renamed, 4       new (a power cut may     the old data files
                            still give old)          (the new ones and .tmp)
    5                       new                      some of the old data files

"Old" is no checkpoint where this is the folder's first save. Between 3 and 4 both answers are
whole, since old files are not removed before the folder is synced. The next save removes the
leftovers before it writes (`remove_unnamed`), so that a full disk has room for it, and again in its
own step 5 (`sweep`). A save that fails without dying removes its files itself
(`FileSystemWriter.discard`).

Assumes that a rename is atomic for readers and that fsync works as POSIX specifies. If the file
system cannot sync folders, a warning says so. Assumes that saves to one folder do not overlap: a
save that begins while another one is writing takes that save's files for leftovers and removes
them, and the other save's commit then fails. Guarantees, with `sync`, that once a save has returned
its checkpoint is the folder's, and that a reader finds the old checkpoint or the new one at every
instant; a reader that planned with the old metadata and opens a file after step 5 finds it missing,
never another save's bytes. Without `sync` all of this holds if processes die, but a power cut may
leave neither checkpoint whole.

Ranks that save on their own (without collectives) each do all this with a metadata file of their
own, `__RANK.metadata`. A later commit of the whole sweeps those too.

An object store has no rename, but puts a file whole or not at all: there steps 2 and 3 are one put
of the metadata. Its listings may also be out of date, so the files of the commit are looked up by
name.

Two ranks save; here the metadata are just the names of the data files:

>>> from pathlib import Path
>>> from pytest_dcp._engine.io.local_disk import LocalDisk
>>> folder = Folder(LocalDisk(), Path("checkpoint"))
>>> _ = folder.make()
>>> def write_data(save):
...     names = [data_name(f"__{rank}_", 0, save) for rank in (0, 1)]
...     for name in names:
...         with folder.create(name) as out:
...             out.write([b"elements"])
...     return " ".join(names).encode()
>>> def files_named(metadata):
...     return (folder.path / metadata).read_text().split()
>>> publish(folder, METADATA, [write_data("1a")], "1a", sync=True)
>>> sweep(folder, files_named, rank=None)
[]

The next save dies before its commit. The first one is still the folder's checkpoint:

>>> _ = write_data("2b")
>>> files_named(METADATA)
['__0_0-1a.distcp', '__1_0-1a.distcp']

The third replaces it, and sweeps the files of both:

>>> publish(folder, METADATA, [write_data("3c")], "3c", sync=True)
>>> sweep(folder, files_named, rank=None)
['__0_0-1a.distcp', '__0_0-2b.distcp', '__1_0-1a.distcp', '__1_0-2b.distcp']
>>> folder.names()
['.metadata', '__0_0-3c.distcp', '__1_0-3c.distcp']
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

from pytest_dcp._engine.io.disk import Buffer
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from pytest_dcp.tracebacks import add_note

METADATA = ".metadata"
SUFFIX = ".distcp"
TEMPORARY = ".tmp"

OURS = re.compile(r"__(?P<rank>\d+)_\d+(-[0-9a-f]+)?\.distcp")
"""Names of data files: torch's, and ours with the save's own part. Nothing else is removed."""
RANK_METADATA = re.compile(r"__(?P<rank>\d+)\.metadata")
LEFT_OVER = re.compile(r"(__(?P<rank>\d+))?\.metadata(-[0-9a-f]+)?\.tmp")


def metadata_name(rank: int | None = None) -> str:
    """The metadata of the whole checkpoint, or of one rank that saved on its own."""
    return METADATA if rank is None else f"__{rank}{METADATA}"


def data_name(prefix: str, number: int, save: str) -> str:
    """The n-th data file of a rank's save. `save` distinguishes it from the files of any other
    save.
    """
    return f"{prefix}{number}-{save}{SUFFIX}"


def publish(
    folder: Folder,
    name: str,
    content: Sequence[Buffer],
    save: str,
    *,
    sync: bool,
    waits: bool = True,
) -> None:
    """Steps 1 to 4: make `content` the metadata of this name.

    waits: wait for readers; False if the caller has already waited for them.

    Without `sync` the steps are the same but nothing is waited for: a power cut may lose the save.
    """
    temporary = f"{name}-{save}{TEMPORARY}" if folder.disk.renames else name
    # Writing a file syncs its bytes, not its name: without this, a power cut could remove data
    # files that the new metadata names.
    if sync:
        folder.sync()
    try:
        with folder.create(temporary) as out:
            out.write(content)
            # Before the rename: otherwise the new name could survive a power cut without its bytes.
            if sync:
                out.sync()
        if folder.disk.renames:
            # Readers of the old metadata first open their files, which the sweep then removes.
            with folder.between_leases(name) if waits else nullcontext():
                folder.replace(temporary, name)
    except BaseException as error:
        if not folder.disk.renames:
            raise  # `name` is the checkpoint's own: it may still hold the old metadata
        # A failed save removes all it can.
        try:
            folder.remove(temporary)
        except OSError as more:
            add_note(error, f"{temporary} is still there: {more!r}")
        raise
    # The rename is visible already, so a failure here does not undo the save, and says so.
    if sync:
        try:
            folder.sync()
        except OSError as error:
            raise CheckpointError(
                f"the new checkpoint is in place, but its folder {folder} could not be synced: "
                f"until it is, a power cut may bring back the old one ({error})"
            ) from error


def sweep(
    folder: Folder, list_files: Callable[[str], Iterable[str]], *, rank: int | None
) -> list[str]:
    """Step 5: remove the stale files; returns their names.

    list_files: the data files that a metadata file names. rank: None after a commit of the whole
    checkpoint, which also replaces the ranks' separate saves; or the rank that committed its own
    part: then only its files are considered.
    """
    committed = (METADATA,) if rank is None else (METADATA, metadata_name(rank))
    return _remove(folder, list_files, committed.__contains__, lambda name: _is_stale(name, rank))


def remove_unnamed(folder: Folder, list_files: Callable[[str], Iterable[str]]) -> list[str]:
    """Remove data files that no metadata of the folder names, left by dead saves; their names."""
    return _remove(folder, list_files, _is_metadata, is_leftover)


def _remove(
    folder: Folder,
    list_files: Callable[[str], Iterable[str]],
    counts: Callable[[str], bool],
    is_stale: Callable[[str], bool],
) -> list[str]:
    """Remove the stale files that no metadata in force names; returns their names."""
    # Listed before any metadata is read: a file that appears later is not removed, even if no
    # metadata names it.
    present = folder.names()
    metadata_files = {METADATA, *filter(counts, present)}
    keep = _list_all_files(list_files, metadata_files)
    stale = [name for name in present if name not in keep and is_stale(name)]
    # Metadata that names one of these files may exist without being listed.
    keep |= _list_all_files(
        list_files, set(filter(counts, map(_metadata_of, stale))) - metadata_files
    )
    removed = [name for name in stale if name not in keep]
    for name in removed:
        folder.remove(name)
    return removed


def _metadata_of(name: str) -> str:
    """The metadata that would name this file if its rank had saved on its own."""
    data = OURS.fullmatch(name)
    return METADATA if data is None else metadata_name(int(data["rank"]))


def _is_metadata(name: str) -> bool:
    return name == METADATA or RANK_METADATA.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Whether a save wrote this file, so that it is a leftover unless some metadata names it."""
    return bool(OURS.fullmatch(name) or LEFT_OVER.fullmatch(name))


def _is_stale(name: str, rank: int | None) -> bool:
    """Whether this commit should remove a file that no metadata names."""
    if rank is None:
        kinds = (OURS, RANK_METADATA, LEFT_OVER)
        return any(kind.fullmatch(name) for kind in kinds)
    own = OURS.fullmatch(name) or LEFT_OVER.fullmatch(name)
    return own is not None and own["rank"] == str(rank)


def _list_all_files(
    list_files: Callable[[str], Iterable[str]], metadata: Iterable[str]
) -> set[str]:
    found: set[str] = set()
    for name in metadata:
        try:
            found.update(list_files(name))
        except FileNotFoundError:
            continue
        except CheckpointCorruptError as error:
            # Which files it names is unknown, so nothing may be removed.
            raise error.at(file=name) from error
    return found
