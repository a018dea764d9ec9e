"""Prints when this namespace's kernel has the entries of an endpoint of another node: MAC and CLOCK_MONOTONIC, a line each.

The driver writes the tunnel's and the bridge's entry first and the neighbour last, in one batch: the neighbour tells it.
"""

from __future__ import annotations

import socket
import struct
import time

from netstore.kernel.attributes import attributes, messages

RTMGRP_NEIGH, RTM_NEWNEIGH, AF_BRIDGE, NUD_PERMANENT, NDA_LLADDR, SO_RCVBUFFORCE = 4, 28, 7, 0x80, 2, 33

events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
events.bind((0, RTMGRP_NEIGH))
print("ready", flush=True)
while True:
    data = events.recv(1 << 16)
    now = time.monotonic()
    for kind, message in messages(data):
        if kind != RTM_NEWNEIGH:
            continue
        family, state = struct.unpack_from("=BxxxiH", message, 16)[::2]
        found = attributes(message, 28)
        if family != AF_BRIDGE and state & NUD_PERMANENT and NDA_LLADDR in found:
            print(found[NDA_LLADDR][4:10].hex(":"), now, flush=True)
