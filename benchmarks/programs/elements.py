"""Prints each transaction of nftables in this namespace: CLOCK_MONOTONIC, then per set the elements that came and went.

A line of JSON each: {"at": seconds, "sets": {"slots": [came, went]}}.
"""

from __future__ import annotations

import json
import socket
import time

from netstore.kernel.attributes import NETLINK_NETFILTER, attributes, messages

NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES = 7, 10
NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM, NFT_MSG_NEWGEN = 12, 14, 15
NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_LIST_ELEM = 2, 3, 1
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE = 270, 1, 33

events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
events.bind((0, 0))
events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
print("ready", flush=True)
sets: dict[str, list[int]] = {}
while True:
    data = events.recv(1 << 20)
    now = time.monotonic()
    for kind, message in messages(data):
        if kind >> 8 != NFNL_SUBSYS_NFTABLES:
            continue
        if kind & 0xFF in (NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM):
            found = attributes(message, 20)
            name = found[NFTA_SET_ELEM_LIST_SET][4:].split(b"\0")[0].decode()
            sets.setdefault(name, [0, 0])[kind & 0xFF == NFT_MSG_DELSETELEM] += 1  # one is told in each
        elif kind & 0xFF == NFT_MSG_NEWGEN:
            print(json.dumps({"at": now, "sets": sets}), flush=True)
            sets = {}
