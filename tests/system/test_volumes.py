"""The verbs of volumes as a user types them: create again, ls, rm, prune, trash, update, rename, schedules."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from conftest import Node, wait_until


def data_of(node: Node, volume: str) -> Path:
    return Path(node.out("volume", "inspect", "-f", "{{.Status.Mountpoint}}", volume))


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_create_again_is_the_same_or_says_the_difference(node: Node) -> None:
    create = ["volume", "create", "-d", "image", "--size", "16M", "--label", "a=b", "v"]
    assert node.out(*create) == node.out(*create) == "v"
    assert node.out("volume", "ls", "-q") == "v"
    for flags, said in ((["--size", "32M"], "size_bytes is 16777216, asked for 33554432"), (["--label", "c=d"], "labels is"),
                        (["--snapshot-schedule", "@daily"], "snapshot_schedule is '', asked for '@daily'")):  # fmt: skip
        refused = node.cli(*create, *flags, check=False)
        assert refused.returncode == 1
        assert f"volume v exists and differs: {said}" in refused.stderr


def test_ls_shows_what_is_known_without_a_walk(node: Node, image: str) -> None:
    node.cli("volume", "create", "plain")
    node.cli("volume", "create", "-d", "image", "--size", "16M", "--label", "tier=db", "sized")
    node.cli("run", "-d", "--name", "c", "-v", "sized:/s", image)
    rows = {row[1]: row for row in table(node.out("volume", "ls"))[1:]}
    assert table(node.out("volume", "ls"))[0] == ["DRIVER", "VOLUME", "NAME", "SIZE", "USED", "INODES", "CONTAINERS"]
    assert rows["plain"] == ["local", "plain", "-", "-", "-", "-"]
    assert rows["sized"][0] == "image"
    assert rows["sized"][2].endswith("MB")
    assert int(rows["sized"][4]) > 1
    assert rows["sized"][5] == "c"
    for term, found in (("dangling=true", "plain"), ("dangling=false", "sized"), ("driver=image", "sized"),
                        ("label=tier", "sized"), ("label=tier=web", ""), ("name=pla", "plain")):  # fmt: skip
        assert node.out("volume", "ls", "-q", "-f", term) == found, term
    shown = json.loads(node.out("volume", "ls", "--format", "json"))
    assert [volume["name"] for volume in shown] == ["plain", "sized"]


def test_prune_shows_first_and_spares_what_is_named_or_used(node: Node, image: str) -> None:
    for name, label in (("named", "a=b"), ("used", "a=b"), ("other", "c=d")):
        node.cli("volume", "create", "--label", label, name)
    anonymous = node.out("volume", "create")
    (data_of(node, anonymous) / "file").write_bytes(bytes(2_048_000))
    node.cli("run", "-d", "--name", "c", "-v", "used:/u", image)
    shown = node.cli("volume", "prune")
    assert table(shown.stdout) == [["VOLUME", "NAME", "SIZE"], [anonymous, "2.048MB"]]
    assert "Nothing is removed yet: --force does it (2.048MB)" in shown.stderr
    assert anonymous in node.out("volume", "ls", "-q")
    assert "Total reclaimed space: 2.048MB" in node.out("volume", "prune", "--force")
    node.cli("volume", "prune", "-a", "--force", "--filter", "label=c=d")
    assert node.out("volume", "ls", "-q").split() == ["named", "used"]
    node.cli("volume", "prune", "-a", "--force")
    assert node.out("volume", "ls", "-q") == "used"


def test_rm_says_by_whom_and_the_trash_gives_back(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image, "sh", "-c", "echo kept > /v/file; sleep 1000")
    refused = node.cli("volume", "rm", "v", check=False)
    assert "volume v is in use by c" in refused.stderr
    assert "remove the containers" in refused.stderr
    node.cli("volume", "rm", "-f", "nosuch")
    node.cli("rm", "-f", "c")
    node.cli("volume", "snapshot", "create", "v", "s")
    node.cli("volume", "update", "v", "--snapshot-schedule", "@every 3s")
    node.cli("volume", "rm", "--trash", "24h", "v")
    assert node.out("volume", "ls", "-q") == ""
    assert table(node.out("volume", "trash", "ls"))[1][0] == "v"
    assert "24 hours" in node.out("volume", "trash", "ls")
    assert node.out("system", "check") == "kernel and store agree"
    node.kill()
    node.start()
    node.cli("volume", "create", "v")
    taken = node.cli("volume", "trash", "restore", "v", check=False)
    assert "give another name to restore it by" in taken.stderr
    assert node.out("volume", "trash", "restore", "v", "back") == "back"
    assert (data_of(node, "back") / "file").read_text() == "kept\n"
    assert node.out("volume", "snapshot", "ls", "-q", "-f", "name=s") == "back@s"
    wait_until(lambda: "back@auto" in node.out("volume", "snapshot", "ls", "-q"), what="its schedule to go on")
    for name in ("back", "v"):
        node.cli("volume", "rm", "--trash", "1h", name)
    assert node.cli("volume", "trash", "empty", "nosuch", check=False).returncode == 1
    assert node.out("volume", "trash", "empty", "v") == "v"
    assert node.out("volume", "trash", "empty") == "back"
    assert node.out("volume", "trash", "ls", "-q") == ""
    assert [path.name for path in (node.place / "state/volumes/local").iterdir() if path.name[0] != "."] == []


def test_the_trash_is_emptied_by_itself(node: Node) -> None:
    node.stop()
    config = node.place / "trash.toml"
    config.write_text('[resolver]\nmanage = false\n[volumes]\ntrash = "1s"\n')
    node.start_resolver()
    node.start("--config", str(config))
    node.cli("volume", "create", "v")
    node.cli("volume", "rm", "v")
    assert "v" in node.out("volume", "trash", "ls")
    time.sleep(1.2)
    node.kill()
    node.start("--config", str(config))
    wait_until(lambda: node.out("volume", "trash", "ls", "-q") == "", what="the trash to be emptied")


def test_rename_keeps_what_is_mounted(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "c", "-v", "old:/v", image)
    assert node.out("volume", "rename", "old", "new") == "new"
    node.cli("exec", "c", "sh", "-c", "echo kept > /v/file")
    assert (data_of(node, "new") / "file").read_text() == "kept\n"
    node.cli("volume", "create", "old")
    assert "volume new exists" in node.cli("volume", "rename", "old", "new", check=False).stderr
    node.cli("stop", "-t", "0", "c")
    node.cli("start", "c")
    assert node.out("exec", "c", "cat", "/v/file") == "kept"
    assert '"new"' in node.out("inspect", "-f", "{{json .Status.Mounts}}", "c")


def test_update_changes_what_may_change(node: Node, image: str) -> None:
    options = ["-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=16m"]
    node.cli("volume", "create", *options, "--label", "a=b", "v")
    node.cli("volume", "update", "v", "--label-add", "c=d", "--label-rm", "a", "-o", "o=size=32m", "--keep", "3")
    shown = json.loads(node.out("volume", "inspect", "v"))[0]
    assert shown["labels"] == {"c": "d"}
    assert (shown["spec"]["options"]["o"], shown["spec"]["snapshot_keep"]) == ("size=32m", 3)
    size = node.out("run", "--rm", "-v", "v:/v", image, "stat", "-f", "-c", "%b %S", "/v").split()
    assert int(size[0]) * int(size[1]) == 32 << 20
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image)
    assert "is mounted with these options" in node.cli("volume", "update", "v", "-o", "o=", check=False).stderr
    assert "cannot change" in node.cli("volume", "update", "v", "-o", "type=ext4", check=False).stderr
    assert "say what to change" in node.cli("volume", "update", "v", check=False).stderr


def test_schedules_survive_restarts_and_keep_so_many(node: Node) -> None:
    node.cli("volume", "create", "v", "--snapshot-schedule", "@every 1s", "--keep", "2")
    node.cli("volume", "snapshot", "create", "v", "mine")

    def scheduled() -> list[str]:
        return node.out("volume", "snapshot", "ls", "v", "-q", "-f", "scheduled=true").split()

    wait_until(lambda: len(scheduled()) == 2, what="two snapshots")
    first = scheduled()
    wait_until(lambda: len(scheduled()) == 2 and not set(first) & set(scheduled()), what="the first two to go")
    node.kill()
    node.start()
    seen = set(scheduled())
    wait_until(lambda: set(scheduled()) - seen, what="a snapshot after the restart")
    assert "v@mine" in node.out("volume", "snapshot", "ls", "-q")
    node.cli("volume", "update", "v", "--snapshot-schedule", "@daily")
    time.sleep(0.5)
    seen = set(scheduled())
    time.sleep(1.5)
    assert set(scheduled()) == seen


def test_a_tree_as_deep_as_a_container_likes_is_measured_copied_and_removed(node: Node, image: str) -> None:
    node.cli("volume", "create", "v")
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image)
    for place in ("/v", "/tmp"):
        script = f"cd {place}; i=0; while [ $i -lt 1200 ]; do busybox mkdir d && cd d; i=$((i+1)); done"
        node.cli("exec", "c", "sh", "-c", script)
    assert "Volumes" in node.out("system", "df")
    node.cli("volume", "snapshot", "create", "v", "s")
    node.cli("rm", "-f", "c")
    assert node.out("volume", "prune", "-a", "-f").startswith("VOLUME NAME")
    for left in ("containers-removed", "volumes/local/.removed"):
        assert os.listdir(node.place / "state" / left) == []
    node.kill()
    node.start()
    assert node.out("system", "check") == "kernel and store agree"
