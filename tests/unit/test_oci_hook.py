"""What annotations ask for: the grammar of the OCI hook."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstore.adapters.oci.messages import State, decode
from netstore.adapters.programs import Refusal
from netstore.errors import InvalidArgument


def state(annotations: dict[str, str], **more: Any) -> State:
    return State(id="web", bundle="/b", pid=7, annotations=annotations, **more)


def test_what_is_asked_for() -> None:
    wanted = state({
        "io.netstore.networks": " app ip=10.1.0.5, alias=www,alias=x ; db,mac-address=02:00:00:00:00:07,gw-priority=2;",
        "io.netstore.ports": "8080:80; 127.0.0.1:5353:53/udp",
        "io.netstore.volumes": "data:/var/lib/x:ro;logs:/log",
        "other": "x",
    }).wanted()  # fmt: skip
    app, db = wanted.networks
    assert (app.network, app.ipv4_address, list(app.aliases), app.name) == ("app", "10.1.0.5", ["www", "x"], "web")
    assert [(port.host_ip, port.host_port, port.container_port) for port in app.ports] == [
        ("", 8080, 80),
        ("127.0.0.1", 5353, 53),
    ]
    assert (db.network, db.mac_address, db.gateway_priority, len(db.ports)) == ("db", "02:00:00:00:00:07", 2, 0)
    assert [(each.source, each.target, each.read_only) for each in wanted.volumes] == [
        ("data", "/var/lib/x", True),
        ("logs", "/log", False),
    ]
    assert state({"io.netstore.networks": "name=app", "io.netstore.name": "db"}).wanted().networks[0].name == "db"
    long = State(id="ab" * 32, bundle="/b", annotations={"io.netstore.networks": "app"})
    assert long.wanted().networks[0].name == "ab" * 6
    assert state({}).wanted() == state({"io.netstore.networks": " ; "}).wanted()


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("networks", "app,tea=1", "tea=1"), ("networks", "ip=10.0.0.1", "names no network"), ("ports", "80", "needs a network"),
        ("volumes", "/etc:/x", "exists"), ("volumes", "/x", "exists"), ("volumes", "./a:/x", "exists"), ("volumes", "a:b", "'b'"),
        ("volumes", "a:/x:nocopy", "no_copy"), ("volumes", "a:/x:U", "chown"), ("volumes", "a:/../x", ".."),
        ("network", "app", "io.netstore.networks"), ("", "x", "io.netstore."),
    ],
)  # fmt: skip
def test_what_is_refused(key: str, text: str, said: str) -> None:
    with pytest.raises((Refusal, InvalidArgument)) as refused:
        state({f"io.netstore.{key}": text}).wanted()
    error = refused.value
    assert said in (f"{error.msg} {error.details}" if isinstance(error, Refusal) else str(error))


def test_pods() -> None:
    """A pod's sandbox has the networks, every container of it asks for the same ones, and has volumes of its own."""
    asked = {"io.netstore.networks": "app", "io.netstore.volumes": "data:/x"}
    for part, pod in (
        ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
        ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ):
        sandbox = State(id="p", bundle="/p", annotations=asked | {part: "sandbox", pod: "p"})
        container = State(id="c", bundle="/c", annotations=asked | {part: "container", pod: "p"})
        assert sandbox.labels() == container.labels()
        assert (sandbox.in_pod, container.in_pod) == (False, True)
        assert sandbox.wanted().networks == container.wanted().networks
        assert (len(sandbox.wanted().volumes), len(container.wanted().volumes)) == (0, 1)


def test_bundles() -> None:
    here = state({})
    read = here.read(
        b'{"root": {"path": "rootfs"}, "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}]}}'
    )
    assert (read.root.path, read.netns) == ("/b/rootfs", "/n")
    assert (here.read(b'{"root": {"path": "/r"}}').root.path, here.read(b'{"root": {"path": "/r"}}').netns) == (
        "/r",
        "",
    )
    for wrong in (b"", b"{}", b'{"root": 7}', b"[" * 100_000, b'{"root": {"path": "x"}, "linux": 7}'):
        with pytest.raises(Refusal, match=r"/b/config\.json"):
            here.read(wrong)


@example("0\r=", "ports")
@given(st.text(), st.sampled_from(["networks", "ports", "volumes", "name"]))
def test_any_text(text: str, key: str) -> None:
    """Whatever an annotation says is understood, or refused with a message."""
    base = {} if key == "networks" else {"io.netstore.networks": "app"}
    try:
        state(base | {f"io.netstore.{key}": text}).wanted()
    except (Refusal, InvalidArgument):
        pass


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_state(body: Any) -> None:
    for spoken in (json.dumps(body), json.dumps({"id": body, "bundle": "/b"}), json.dumps({"id": "x", "bundle": body})):
        try:
            decode(spoken.encode(errors="replace"))
        except Refusal:
            pass
