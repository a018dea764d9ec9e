"""Names: queries a second and latency of netstore-resolver in a sandbox, beside dnsmasq and aardvark-dns; by dnsperf."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import sh, start_netstore
from dnslib import DNSRecord

from netstore.api.v1 import endpoint_pb2, network_pb2
from netstore.client import BlockingClient as Client
from netstore.kernel.namespaces import socket_inside

SECONDS = 4
CALM_RATE = 2000  # queries a second at which latency is measured: nobody's limit
BATCH = 250
AARDVARK = "/usr/lib/podman/aardvark-dns"


def ask(name: str, namespace: str, server: str, queries: Path) -> None:
    """Load one server for some seconds, then ask it calmly, and print what dnsperf measured."""
    base = ["ip", "netns", "exec", namespace, "dnsperf", "-s", server, "-d", str(queries), "-c", "4"]
    loaded = subprocess.run([*base, "-l", str(SECONDS), "-q", "20"], capture_output=True, text=True).stdout
    calm = [*base, "-l", "2", "-q", "20", "-Q", str(CALM_RATE), "-v"]
    verbose = subprocess.run(calm, capture_output=True, text=True).stdout
    rate = re.search(r"Queries per second:\s+([\d.]+)", loaded)
    lost = re.search(r"Queries lost:\s+(\d+)", loaded)
    times = sorted(float(each) * 1e3 for each in re.findall(r"^> NOERROR \S+ A ([\d.]+)", verbose, re.M))
    if not (rate and lost and times):
        print(f"{name:<46} not measured: {loaded.strip()[-200:]} {verbose[:200]}")
        return
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    print(f"{name:<46}{float(rate[1]):>12.0f}{p50:>10.2f}{p99:>10.2f}{int(lost[1]):>8}", flush=True)


def memory(place: Path) -> str:
    """Return what netstore-resolver holds."""
    pid = subprocess.run(
        ["pgrep", "-nf", f"netstore-resolver .*{place}"], capture_output=True, text=True
    ).stdout.strip()
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert resident
    return f"{int(resident[1]) / 1024:.0f} MB"


def attach(client: Client, first: int, last: int) -> None:
    """Attach namespaces c<first> to c<last - 1>, each batch to a network of its own: a bridge has 1,024 ports."""
    sh(f"for i in $(seq {first} {last - 1}); do echo netns add c$i; done | ip -batch -")
    for start in range(first, last, BATCH):
        network = "bench" if start < BATCH else f"bench{start}"
        if start >= BATCH:
            client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": network}))
        endpoints = [{"spec": {"network": network, "sandbox": {"netns_path": f"/run/netns/c{index}"},
                               "name": {0: "web", 1: "db"}.get(index, f"c{index}")}}
                     for index in range(start, min(start + BATCH, last))]  # fmt: skip
        client.endpoints.AttachEndpoints(endpoint_pb2.AttachEndpointsRequest(endpoints=endpoints))


def followed(client: Client) -> list[float]:
    """Return how long after an attach was answered its name was, in milliseconds, asked from another sandbox."""
    descriptor = os.open("/run/netns/c0", os.O_RDONLY)
    times = []
    with socket_inside(descriptor, socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(2)
        for index in range(50):
            sh(f"ip netns add new{index}")
            spec = {"network": "bench", "sandbox": {"netns_path": f"/run/netns/new{index}"}, "name": f"new{index}"}
            question = DNSRecord.question(f"new{index}").pack()
            client.endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec}))
            started = time.perf_counter()
            while True:
                asking.sendto(question, ("127.0.0.11", 53))
                if DNSRecord.parse(asking.recv(4096)).rr:
                    break
            times.append((time.perf_counter() - started) * 1e3)
    os.close(descriptor)
    return times


@contextmanager
def rival(place: Path, name: str, names: int) -> Iterator[bool]:
    """Run another name server, which knows so many names, on 10.99.0.1 of the namespace `other`; False without it."""
    hosts = {"web": "10.99.1.2", "db": "10.99.1.3"} | {
        f"c{n}": f"10.99.{n // 250 + 2}.{n % 250 + 1}" for n in range(2, names)
    }
    inside = ["ip", "netns", "exec", "other"]
    if name == "dnsmasq" and shutil.which("dnsmasq"):
        (place / "hosts").write_text("".join(f"{address} {host}\n" for host, address in hosts.items()))
        command = [
            "dnsmasq",
            "-k",
            "-p",
            "53",
            "-a",
            "10.99.0.1",
            "-z",
            "-R",
            "-h",
            "-H",
            str(place / "hosts"),
            "-u",
            "root",
        ]
        server = subprocess.Popen([*inside, *command], stderr=subprocess.DEVNULL)
        time.sleep(0.7)
        yield True
        server.terminate()
        server.wait()
    elif name == "aardvark-dns" and Path(AARDVARK).exists():
        directory = place / "aardvark"
        directory.mkdir(exist_ok=True)
        lines = (f"{index:064x} {address}  {host}" for index, (host, address) in enumerate(hosts.items()))
        (directory / "bench").write_text("\n".join(["10.99.0.1", *lines, ""]))
        subprocess.Popen(
            [*inside, AARDVARK, "--config", str(directory), "--port", "53", "run"], stderr=subprocess.DEVNULL
        )
        time.sleep(0.7)
        yield True
        os.kill(int((directory / "aardvark.pid").read_text()), signal.SIGKILL)
        time.sleep(0.3)
    else:
        yield False


def main() -> None:
    """Print the table."""
    if not shutil.which("dnsperf"):
        sys.exit("dnsperf is not installed: nothing measured")
    place = Path(sys.argv[1])
    queries = place / "queries"
    queries.write_text("web A\ndb A\n")
    client = start_netstore(place)
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "bench"}))
    print(f"{'':<46}{'queries/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'lost':>8}")
    attach(client, 0, 2)
    ask("netstore-resolver, 2 sandboxes", "c0", "127.0.0.11", queries)
    attach(client, 2, 500)
    ask("netstore-resolver, 500 sandboxes", "c0", "127.0.0.11", queries)
    sh("ip netns add other; ip -n other link set lo up; ip -n other addr add 10.99.0.1/24 dev lo")
    for name in ("dnsmasq", "aardvark-dns"):
        for count in (2, 500):
            with rival(place, name, count) as there:
                if there:
                    ask(f"{name}, {count} names", "other", "10.99.0.1", queries)
                else:
                    print(f"{name:<46} not installed")
    print(f"resident with 500 sandboxes: {memory(place)}")
    attach(client, 500, 1000)
    for index in range(0, 1000, 10):
        sh(f"ip netns exec c{index} dig @127.0.0.11 +short c{index + 1}")
    times = followed(client)
    print(f"resident with 1,000 sandboxes: {memory(place)}")
    print(f"a new name is answered after: p50 {statistics.median(times):.2f} ms, most {max(times):.2f} ms")


main()
