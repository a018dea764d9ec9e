"""Names: queries a second and latency of netstore-resolver in a sandbox, beside dnsmasq and aardvark-dns; by dnsperf."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import sh, start_netstore

from netstore.api.v1 import endpoint_pb2, network_pb2

SECONDS = 4
AARDVARK = next(
    (p for p in ("/usr/lib/podman/aardvark-dns", "/usr/libexec/podman/aardvark-dns") if Path(p).exists()), ""
)


def ask(name: str, namespace: str, server: str, queries: Path) -> None:
    """Load one server for some seconds and print what dnsperf measured."""
    command = [
        "ip",
        "netns",
        "exec",
        namespace,
        "dnsperf",
        "-s",
        server,
        "-d",
        queries,
        "-l",
        str(SECONDS),
        "-c",
        "4",
        "-q",
        "20",
    ]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    rate = re.search(r"Queries per second:\s+([\d.]+)", output)
    lost = re.search(r"Queries lost:\s+(\d+)", output)
    latency = re.search(r"Average Latency \(s\):\s+([\d.]+)", output)
    if not (rate and latency and lost):
        print(f"{name:<52} not measured: {output.strip()[-200:]}")
        return
    print(f"{name:<52}{float(rate[1]):>12.0f}{float(latency[1]) * 1e3:>12.2f}{int(lost[1]):>8}", flush=True)


def resolver_memory() -> str:
    """Return what netstore-resolver holds."""
    pid = subprocess.run(
        ["pgrep", "-nf", "netstore-resolver --state-dir"], capture_output=True, text=True
    ).stdout.strip()
    return re.search(r"VmRSS:\s+(\d+ kB)", Path(f"/proc/{pid}/status").read_text())[1]  # type: ignore[index]


def main() -> None:
    """Print the table."""
    if not shutil.which("dnsperf"):
        sys.exit("dnsperf is not installed (apt-get install dnsperf dnsmasq-base aardvark-dns): nothing measured")
    place = Path(sys.argv[1])
    queries = place / "queries"
    queries.write_text("web A\ndb A\n")
    client = start_netstore(place)
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "bench"}))

    def attach(index: int) -> None:
        sh(f"ip netns add c{index}")
        spec = {"network": "bench", "sandbox": {"netns_path": f"/run/netns/c{index}"},
                "name": {0: "web", 1: "db"}.get(index, f"c{index}")}  # fmt: skip
        client.endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec}))

    print(f"{'':<52}{'queries/s':>12}{'mean ms':>12}{'lost':>8}")
    attach(0)
    attach(1)
    ask("netstore-resolver, 2 sandboxes", "c0", "127.0.0.11", queries)
    for index in range(2, 500):
        attach(index)
    ask("netstore-resolver, 500 sandboxes", "c0", "127.0.0.11", queries)
    print(f"{'':<52}{resolver_memory()} resident with 500 sandboxes")
    sh("ip netns add other; ip -n other link set lo up; ip -n other addr add 10.99.0.1/24 dev lo")
    rivals = {"dnsmasq": ["dnsmasq", "-k", "-p", "53", "-a", "10.99.0.1", "-z", "-R", "-h", "--host-record=web,10.99.0.2",
                          "--host-record=db,10.99.0.3", "--host-record=web.bench,10.99.0.2"]}  # fmt: skip
    if AARDVARK:
        (place / "aardvark").mkdir()
        (place / "aardvark/bench").write_text(f"10.99.0.1\n{'a' * 64} 10.99.0.2  web\n{'b' * 64} 10.99.0.3  db\n")
        rivals["aardvark-dns"] = [AARDVARK, "--config", str(place / "aardvark"), "--port", "53", "run"]
    for name, command in rivals.items():
        if not shutil.which(command[0]):
            print(f"{name:<52} not installed")
            continue
        server = subprocess.Popen(["ip", "netns", "exec", "other", *command], stderr=subprocess.DEVNULL)
        time.sleep(0.7)
        ask(name, "other", "10.99.0.1", queries)
        server.terminate()
        server.wait()
        subprocess.run(["pkill", "-f", str(place / "aardvark")], check=False)
        time.sleep(0.3)


main()
