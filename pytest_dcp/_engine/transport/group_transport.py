"""A state dict from one rank to others, over a process group's point-to-point operations.

The sender sends a description, as plain data, and then each tensor's elements. Nothing that a peer
sends can run code: `coordinate.wire` encodes the values, and the sender refuses others. If the
receiver already has such a state dict, its tensors are filled in place.

Messages, each in one send: the number and lengths of the description's segments; the segments; each
tensor, as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pytest_dcp._engine.coordinate.wire import pack, unpack
from pytest_dcp._engine.transport.state_description import TensorNote, describe, rebuild
from pytest_dcp._torch_internals.checkpoint_classes import _pg_transport

LENGTH_TAG, HEAD_TAG, TENSOR_TAG = 1, 2, 3
MAX_SEGMENTS = 1 << 20
MAX_HEAD_BYTES = 1 << 30
"""Limit of a description: 1 GiB, enough for some ten million tensors."""


class PGTransport(_pg_transport.PGTransport):
    """Sends and receives state dicts over a process group.

    pg: the group; ranks are its ranks.
    timeout: of each operation.
    device: the device from which the group's backend sends, and to which it receives.
    state_dict: returns a state dict to receive into: its tensors are filled if their dtype, shape,
        layout and place match; otherwise, and with None, the tensors are new, on the CPU. Of a
        sharded tensor the sender's part is received: send from the rank that has the same part.

    torch's class of this name is a base for the sake of `isinstance`; all methods are ours.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        timeout: timedelta,
        device: torch.device,
        state_dict: Callable[[], object] | None = None,
    ) -> None:
        self._pg = pg
        self._timeout = timeout
        self._device = device
        self._state_dict = state_dict

    def send_checkpoint(self, dst_ranks: list[int], state_dict: object) -> None:
        """Send the state dict to each of the ranks, which call `recv_checkpoint`.

        Raises TypeError, before anything is sent, for a value that is not plain data.
        """
        described, tensors = describe(state_dict)
        segments = [memoryview(one).cast("B") for one in pack(described)]
        lengths = torch.tensor([len(segments), *map(len, segments)], dtype=torch.int64)
        count = torch.tensor([lengths.numel()], dtype=torch.int64)
        head = np.concatenate([np.frombuffer(one, np.uint8) for one in segments])
        for dst in dst_ranks:
            self._send(count, dst, LENGTH_TAG)
            self._send(lengths, dst, LENGTH_TAG)
            self._send(torch.from_numpy(head), dst, HEAD_TAG)
        for tensor in tensors:
            content = _bytes_of(tensor.to(self._device))
            for dst in dst_ranks if content.numel() else ():
                self._send(content, dst, TENSOR_TAG)

    def recv_checkpoint(self, src_rank: int) -> object:
        """The state dict that the rank sends with `send_checkpoint`.

        Raises ValueError if the message does not describe one.
        """
        count = int(self._receive(1, torch.int64, src_rank, LENGTH_TAG).item())
        if not 2 <= count <= MAX_SEGMENTS:
            raise ValueError(f"expected a state dict from rank {src_rank}, got {count} lengths")
        _, *lengths = self._receive(count, torch.int64, src_rank, LENGTH_TAG).tolist()
        if min(lengths) < 0 or sum(lengths) > MAX_HEAD_BYTES:
            raise ValueError(
                f"expected a description of at most {MAX_HEAD_BYTES} bytes from rank {src_rank}, "
                f"got one of {sum(lengths)}"
            )
        head = self._receive(sum(lengths), torch.uint8, src_rank, HEAD_TAG)
        described = unpack(_cut(head, lengths))

        def take(note: TensorNote, room: torch.Tensor | None) -> torch.Tensor:
            return self._take(note, room, src_rank)

        template = self._state_dict() if self._state_dict is not None else None
        with torch.no_grad():
            return rebuild(described, take, template)

    def _take(self, note: TensorNote, room: torch.Tensor | None, src: int) -> torch.Tensor:
        """The next tensor, received into the given one if it fits."""
        fits = room is not None and (room.dtype, room.shape) == (note.dtype, note.shape)
        if room is not None and fits and self._receives_directly(room):
            if room.numel():
                self._receive_into(_bytes_of(room.detach()), src, TENSOR_TAG)
            return room
        received = torch.empty(note.shape, dtype=note.dtype, device=self._device)
        if received.numel():
            self._receive_into(_bytes_of(received), src, TENSOR_TAG)
        if room is not None and fits:
            room.copy_(received)
            return room
        return received.cpu().requires_grad_(note.requires_grad)

    def _receives_directly(self, room: torch.Tensor) -> bool:
        """Whether the backend can write into the tensor's memory: its bytes are the elements."""
        plain = room.is_contiguous() and not room.is_conj() and not room.is_neg()
        return plain and room.device == self._device

    def _send(self, tensor: torch.Tensor, dst: int, tag: int) -> None:
        self._pg.send([tensor.to(self._device)], dst, tag).wait(self._timeout)

    def _receive(self, numel: int, dtype: torch.dtype, src: int, tag: int) -> torch.Tensor:
        tensor = torch.empty(numel, dtype=dtype, device=self._device)
        self._receive_into(tensor, src, tag)
        return tensor.cpu()

    def _receive_into(self, tensor: torch.Tensor, src: int, tag: int) -> None:
        self._pg.recv([tensor], src, tag).wait(self._timeout)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as bytes: backends do not support every dtype."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _cut(head: torch.Tensor, lengths: Sequence[int]) -> list[memoryview]:
    content: Any = head.numpy()
    whole, at = memoryview(content), 0
    segments = []
    for length in lengths:
        segments.append(whole[at : at + length])
        at += length
    return segments
