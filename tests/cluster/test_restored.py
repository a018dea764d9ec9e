"""All of etcd is lost, and comes back from a backup or from nothing: what runs keeps what it has, and nothing is given twice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from conftest import Node, wait_until

from cluster.lab import Etcd3, address_of, connect, info, joined, known, pings, reaches, resolves, restart, states


def disconnect(node: Node, sandbox: str, network: str = "app") -> None:
    node.cli("network", "disconnect", network, "--netns", f"/run/netns/{sandbox}")


def holders(etcd: Etcd3) -> dict[str, str]:
    """Return who holds each address of the cluster, by network and address."""
    lines = etcd.ctl("get", "--prefix", "/netstore/1/claims/addresses/").split()
    return dict(zip(lines[::2], lines[1::2], strict=True))


def ups_and_downs(node: Node) -> list[str]:
    """Return what a node saw of the others' coming and going."""
    return node.out("system", "events", "--since", "0", "--until-now", "--filter", "kind=node").splitlines()


def attached(nodes: list[Node]) -> list[str]:
    """Return the addresses of all nodes' endpoints."""
    found = [each for node in nodes for each in json.loads(node.out("endpoint", "ls", "--format", "json"))]
    return sorted(each["status"]["addresses"][0].split("/")[0] for each in found)


def test_from_a_backup(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    for name in ("app", "again", "unused"):
        one.cli("network", "create", "-d", "overlay", name)
        known(nodes3, name)
    first, second = connect(one, "a"), connect(two, "b")
    moving = connect(two, "old", "app", "--ip", second.rsplit(".", 1)[0] + ".50")
    wait_until(lambda: resolves(one, "a", "old") == moving, what="what is in the backup")
    etcd3.save()

    # What the backup knows nothing of: an address has another holder, a name another network; and one is gone.
    disconnect(two, "old")
    assert connect(three, "new", "app", "--ip", moving) == moving
    one.cli("network", "rm", "again")
    known_as = one.out("network", "create", "-d", "overlay", "again")
    known(nodes3, "again")
    third = connect(three, "c", "again")
    late = connect(one, "late", "app")
    two.cli("network", "rm", "unused")
    wait_until(lambda: resolves(two, "b", "late") == late, what="the last change")

    etcd3.kill(0, 1, 2)
    for node in nodes3:  # none of them remembers it but by its disk
        node.kill()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(restart, nodes3))
    assert pings(two, "b", first)
    etcd3.restore()
    joined(nodes3)
    wait_until(lambda: resolves(two, "b", "late") == late, what="what was put back")
    attach = ("network", "connect", "app", "--netns", one.host.netns("d"), "--name", "d")
    waits = one.cli(*attach, check=False)
    assert waits.returncode == 0 or "the nodes put it back" in waits.stderr
    wait_until(lambda: one.cli(*attach, check=False).returncode == 0, seconds=20, what="the end of the recovery")
    fourth = address_of(one, "d")
    assert attached(nodes3) == sorted([first, second, moving, third, late, fourth])
    assert len({first, second, moving, late, fourth}) == 5
    for node in nodes3:
        assert "evict" not in node.out("system", "events", "--since", "0", "--until-now", "--filter", "kind=endpoint")
        assert one.out("network", "inspect", "-f", "{{.Id}}", "again") == known_as
    for address in (moving, late, fourth):
        reaches(two, "b", address)
    reaches(three, "new", first)
    wait_until(lambda: resolves(one, "a", "new") == moving and not resolves(one, "a", "old"), what="names as they are")
    claimed = holders(etcd3)
    assert all(any(key.endswith(f"/{address}") for key in claimed) for address in attached(nodes3))
    assert "unused" in one.out("network", "ls"), "nobody can tell it from one that was made"
    for node in nodes3:
        wait_until(lambda node=node: not node.cli("system", "check", check=False).returncode, what="agreement")


def test_from_nothing(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """What is used is put back; the snapshot here is the emptiest that there is: a new etcd."""
    one, two, three = nodes3
    one.cli("network", "create", "-d", "spanning", "app")
    one.cli("network", "create", "-d", "spanning", "unused")
    first, second = connect(one, "a"), connect(two, "b")
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    etcd3.kill(0, 1, 2)
    etcd3.forget()
    etcd3.start(0, 1, 2)
    wait_until(lambda: list(states(three).values()) == ["up"] * 3, seconds=20, what="the nodes")
    wait_until(lambda: "unused" not in three.out("network", "ls"), what="the end of what nobody uses")
    wait_until(lambda: "app" in three.out("network", "ls"), what="what is used")
    path = three.host.netns("c")
    attach = ("network", "connect", "app", "--netns", path, "--name", "c")
    waits = three.cli(*attach, check=False)  # unless it took too long to get here, nothing new is claimed yet
    assert waits.returncode == 0 or "the nodes put it back" in waits.stderr
    wait_until(lambda: three.cli(*attach, check=False).returncode == 0, seconds=20, what="the end of the recovery")
    third = address_of(three, "c")
    assert len({first, second, third}) == 3
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    wait_until(lambda: resolves(one, "a", "c") == third, what="what is new")
    assert resolves(three, "c", "a") == first


def test_members_are_lost_one_by_one(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """Whichever goes, the leader or not, that to which a node speaks or not: calls are answered, nobody is lost."""
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    before = [ups_and_downs(node) for node in nodes3]
    second = connect(two, "b")
    leader = etcd3.leader()
    for index in ((leader + 1) % 3, (leader + 2) % 3, leader):
        etcd3.kill(index)
        address = connect(one, f"a{index}")
        wait_until(lambda index=index, of=address: resolves(two, "b", f"a{index}") == of, what="its name")
        reaches(one, f"a{index}", second)
        etcd3.start(index)
        etcd3.wait()
    assert [ups_and_downs(node) for node in nodes3] == before
    assert {info(node)["state"] for node in nodes3} == {"joined"}
