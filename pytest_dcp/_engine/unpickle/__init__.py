"""Reads the pickles of a checkpoint without trusting them: runs none of their code, and imports
nothing.

Enters: bytes. Leaves: torch's metadata objects, the description of a tensor, or a plain
value, equal to what `pickle.load` gives. Anything else leaves as `CheckpointCorruptError`: as its
subclass `UntrustedPickleError` if a pickle asks for more than data needs, and as the latter's
subclass `UnknownGlobalError` if it is well formed but holds objects that this reader does not know.
`offset` counts from the start of the bytes.

Time and memory are proportional to the input: at most 200 bytes of memory per byte. Containers may
be shared within a value that `read_value` returns and within planner_data, as in any pickle;
`check_plain` bounds how deep and how large that makes them. In Metadata sizes, chunks, even whole
entries may be shared, so change no object in place.
"""

from pytest_dcp._engine.unpickle.machine import UnknownGlobalError
from pytest_dcp._engine.unpickle.metadata_reader import read_metadata
from pytest_dcp._engine.unpickle.plain_values import read_value
from pytest_dcp._engine.unpickle.tensor_pickles import TensorPickle, read_tensor_pickle

__all__ = [
    "TensorPickle",
    "UnknownGlobalError",
    "read_metadata",
    "read_tensor_pickle",
    "read_value",
]
