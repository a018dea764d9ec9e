"""A third party's driver: bridges of the same network on every node, without a wire between them.

What it is told of other nodes it writes to /run/netns/.spanning.json, where tests read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from netstore.drivers.base import Observed
from netstore.drivers.bridge import BridgeDriver
from netstore.model import Network, Node, RemoteEndpoint, Scope

STATE = Path("/run/netns/.spanning.json")


def _load() -> dict[str, dict[str, list[str]]]:
    return json.loads(STATE.read_text()) if STATE.exists() else {}


class SpanningBridge(BridgeDriver):
    name = "spanning"
    scope = Scope.GLOBAL

    def apply_remote(
        self, network: Network, *, add: Sequence[RemoteEndpoint], remove: Sequence[RemoteEndpoint]
    ) -> None:
        state = _load()
        mine = state.setdefault(network.id, {})
        for each in remove:
            for address in each.addresses:
                mine.pop(address, None)
        for each in add:
            for address in each.addresses:
                mine[address] = [each.mac, each.vtep]
        STATE.write_text(json.dumps(state))

    def apply_peers(self, peers: Mapping[str, Node]) -> bool:
        STATE.write_text(json.dumps({**_load(), "peers": {address: [] for address in peers}}))
        return False

    def observe(self, network: Network) -> Observed:
        remotes = {(address, *entry) for address, entry in _load().get(network.id, {}).items()}
        return replace(super().observe(network), remotes=frozenset(remotes), neighbours=frozenset())
