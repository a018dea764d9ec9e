"""Run in a host's namespace: makes network namespaces, holds them, and says from how many of them an address answers.

Prints the first of their descriptors; then, for each address that it reads, from how many of them a connection to it is
refused by the machine itself: so their neighbour resolution works in both directions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import sys
import time

CLONE_NEWNET = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
home = os.open("/proc/self/ns/net", os.O_RDONLY)
first = os.dup(home) + 1  # the namespaces have the descriptors from here on
for _ in range(int(sys.argv[1])):
    assert libc.unshare(CLONE_NEWNET) == 0
    os.open("/proc/self/ns/net", os.O_RDONLY)
last = first + int(sys.argv[1])
libc.setns(home, CLONE_NEWNET)
print(first, flush=True)
for line in sys.stdin:
    poll, waiting = select.poll(), {}
    for namespace in range(first, last):
        libc.setns(namespace, CLONE_NEWNET)
        asking = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if asking.connect_ex((line.strip(), 9)) == errno.EINPROGRESS:
            waiting[asking.fileno()] = asking
            poll.register(asking, select.POLLOUT)
    libc.setns(home, CLONE_NEWNET)
    refused, end = 0, time.monotonic() + 20
    while waiting and time.monotonic() < end:
        for descriptor, _ in poll.poll(1000):
            poll.unregister(descriptor)
            with waiting.pop(descriptor) as asking:
                refused += asking.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
    for asking in waiting.values():
        asking.close()
    print(refused, flush=True)
