"""Services: what it costs the kernel, and how long it takes, that one backend comes or goes, beside 10 and 100."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import BIN, figure, sh, start_netstore

from netstore.api.v1 import endpoint_pb2, network_pb2
from netstore.client import BlockingClient as Client
from netstore.kernel.skeleton import SLOTS

PROGRAMS = Path(__file__).parent / "programs"
CHANGES = 20
QUIET_SECONDS = 0.3
SLOT_MAPS = ("slots", "port_slots")


@dataclass
class Transactions:
    """What nftables was told, as it was told."""

    seen: list[dict[str, object]] = field(default_factory=list)

    def read(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            self.seen.append(json.loads(line))

    def settle(self) -> None:
        """Wait until nothing changes any more."""
        count = -1
        while count != (count := len(self.seen)):
            time.sleep(QUIET_SECONDS)

    def about(self, name: str) -> list[tuple[float, int, int]]:
        """Return the transactions that changed a map: when, and how many elements came and went."""
        return [(each["at"], *each["sets"][name]) for each in self.seen if name in each["sets"]]  # type: ignore[index, operator, misc]


def attach(client: Client, index: int) -> endpoint_pb2.Endpoint:
    spec = {"network": "app", "sandbox": {"netns_path": f"/run/netns/b{index}"}}
    request = endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec, "labels": {"tier": "web"}})
    return client.endpoints.AttachEndpoint(request).endpoint


def detach(client: Client, endpoint: endpoint_pb2.Endpoint) -> None:
    client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id))


def series(client: Client, transactions: Transactions, count: int) -> None:
    """Let one more backend come and go beside `count`, again and again, and print what that takes."""
    found: dict[str, list[tuple[float, int, int]]] = {"comes": [], "goes": []}

    def change(what: str, work: object) -> object:
        transactions.seen.clear()
        began = time.monotonic()
        result = work()  # type: ignore[operator]
        transactions.settle()
        changed = [each for name in SLOT_MAPS for each in transactions.about(name)]
        assert changed, "the service follows"
        ended, messages = max(at for at, _, _ in changed), sum(came + went for _, came, went in changed)
        times = {at for at, _, _ in changed}
        found[what].append(((ended - began) * 1e3, messages, len(times)))
        return result

    for _ in range(CHANGES):
        endpoint = change("comes", lambda: attach(client, count))
        change("goes", lambda: detach(client, endpoint))  # type: ignore[arg-type]  # noqa: B023
    for what, each in found.items():
        ms, messages, transacted = (statistics.median(values) for values in zip(*each, strict=True))
        least = 2 * 2 * SLOTS / (count + 1)  # a fair share moves, in two maps, each as one that goes and one that comes
        note = f"worst {max(value for value, _, _ in each):.1f}"
        figure(f"beside {count}, one {what}: all slots lead there, p50", ms, "ms", most=100, note=note)
        note = f"in {transacted:.0f} transactions; a fair share is {least:.0f}"
        figure(f"beside {count}, one {what}: elements exchanged, p50", messages, "", note=note)


def main() -> None:
    """Measure."""
    place = Path(sys.argv[1])
    sh("mkdir -p /run/netns")
    client = start_netstore(place)
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "app"}))
    flags = "--network app --label tier=web -p 8080:80"
    sh(f"{BIN}/netstore -H {client.address} service create web {flags}")
    sh("for i in $(seq 0 100); do echo netns add b$i; done | ip -batch -")
    transactions = Transactions()
    with subprocess.Popen([sys.executable, PROGRAMS / "elements.py"], stdout=subprocess.PIPE, text=True) as monitor:
        try:
            assert monitor.stdout
            assert monitor.stdout.readline() == "ready\n"
            threading.Thread(target=transactions.read, args=(monitor.stdout,), daemon=True).start()
            there = 0
            for count in (10, 100):
                for index in range(there, count):
                    attach(client, index)
                there = count
                transactions.settle()
                series(client, transactions, count)
        finally:
            monitor.kill()


if __name__ == "__main__":
    main()
