"""The address where gloo listens for a rank, as gloo itself writes it into the group's store.

gloo connects its full mesh while a process group is made. For that each rank writes its listening
address under the key `<device>//0/<rank>` of the group's store, so the store has the address of
every rank before the rank calls anything of ours. The socket stays open as long as the rank's
process and its process group last. A process that the rank has forked keeps it open, too.

The value is gloo's `Rank::bytes` (gloo/transport/tcp/context.cc), in the machine's byte order:

    size_t  length of the host's name       8 bytes
            the host's name
    size_t  length of the address           136
            sockaddr_storage                128 bytes
            sequence number                 8 bytes, always -1 here
    ssize_t pair identifiers                8 bytes for each rank of the group

The format is private to gloo: any other value is read as None, unknown. So is the value of a group
that connects lazily (TORCH_GLOO_LAZY_INIT), which has no pair identifiers: no connection has proved
that the address leads to the rank.

Pure (no I/O).
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from dataclasses import dataclass

AF_INET = 2
AF_INET6 = 10
"""Both as on Linux: gloo uses its tcp transport on no other system."""
ADDRESS_BYTES = 136
MAX_NAME_BYTES = 255
SIZE = struct.Struct("=Q")
NO_SEQUENCE = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class GlooListener:
    """A rank's listening socket."""

    host: str
    """Numeric."""
    port: int

    def can_reach(self, other: GlooListener) -> bool:
        """Whether this rank's own connections have proved that the other's address leads to it.

        While the group is made, the rank with the higher address connects to the rank with the
        lower one (gloo's `Device::isInitiator`). Ranks with one address share a network: one of the
        two connected to the address that both have. The opposite direction is not proved: a network
        may forward nothing to the other rank, or have another host with its address.
        """
        own, others = ipaddress.ip_address(self.host), ipaddress.ip_address(other.host)
        return own.version == others.version and own.packed >= others.packed


def parse_listener(value: bytes, size: int) -> GlooListener | None:
    """Where a rank listens; None for a value in another format.

    size: of the group.

    >>> address = struct.pack("=H", AF_INET) + struct.pack("!H4B", 4711, 10, 0, 0, 1) + bytes(120)
    >>> value = SIZE.pack(2) + b"vm" + SIZE.pack(136) + address + NO_SEQUENCE + bytes(2 * 8)
    >>> parse_listener(value, size=2)
    GlooListener(host='10.0.0.1', port=4711)
    >>> parse_listener(value, size=3) is None
    True
    """
    if len(value) < SIZE.size:
        return None
    (name_bytes,) = SIZE.unpack_from(value)
    at = SIZE.size + name_bytes
    # The total length is a check in itself: it fits one length of the name and one group size.
    if name_bytes > MAX_NAME_BYTES or len(value) != at + SIZE.size + ADDRESS_BYTES + 8 * size:
        return None
    (address_bytes,) = SIZE.unpack_from(value, at)
    address = value[at + SIZE.size : at + SIZE.size + ADDRESS_BYTES]
    # A listening address ends with the sequence number -1; another layout has other bytes there.
    if address_bytes != ADDRESS_BYTES or not address.endswith(NO_SEQUENCE):
        return None
    return _parse_sockaddr(address)


def _parse_sockaddr(address: bytes) -> GlooListener | None:
    """Host and port of a sockaddr_in or sockaddr_in6; None for an address that cannot be tried."""
    # As the kernel has them: the family in the machine's byte order, the port in the network's.
    family = int.from_bytes(address[:2], sys.byteorder)
    port = int.from_bytes(address[2:4], "big")
    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    if family == AF_INET:
        host = ipaddress.IPv4Address(address[4:8])
    elif family == AF_INET6:
        # Four bytes between port and address are the flow label.
        host = ipaddress.IPv6Address(address[8:24])
    else:
        return None
    if not port or host.is_unspecified or host.is_multicast:
        return None
    if host.version == 6 and (host.is_link_local or host.ipv4_mapped is not None):
        return None  # valid in one network only, or an IPv4 address in IPv6 form
    return GlooListener(str(host), port)
