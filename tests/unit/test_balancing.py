"""What services have in the firewall, also when the kernel takes a part of it and refuses the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from netstore.errors import KernelError
from netstore.kernel.firewall import Element
from netstore.model import (
    Address,
    Endpoint,
    EndpointMode,
    EndpointSpec,
    Network,
    NetworkSpec,
    Pool,
    Sandbox,
    Scope,
    ServiceSpec,
)
from netstore.networks import ipam
from netstore.networks.context import Context
from netstore.networks.services import Services
from netstore.store import Store, Transaction

POOL = Pool(subnet="10.0.0.0/16", gateway="10.0.0.1")
NETWORK = Network(
    id="a" * 64, name="n", spec=NetworkSpec(driver="told"), interface="nsbr-a", pools=(POOL,), host_seen_at=("10.0.0.1",),
    host_addresses=(Address(address="10.0.0.1", prefix=16),),
)  # fmt: skip


class Driver:
    """A driver that has nothing to do."""

    scope = Scope.LOCAL
    has_services = True

    def is_here(self, _: Network) -> bool:
        return True

    def expect_services(self, *_: Any) -> None:
        pass

    def apply_services(self, _: Network) -> None:
        pass


class Elements:
    """A firewall that holds elements, and refuses an exchange."""

    def __init__(self) -> None:
        self.held: set[Element] = set()
        self.until = 1 << 30

    def exchange(self, old: Collection[Element], new: Collection[Element]) -> None:
        self.until -= 1
        if self.until < 0:
            raise KernelError(12, "exchanging", "elements")
        self.held = (self.held - set(old)) | set(new)

    def remove(self, elements: Iterable[Element]) -> None:
        self.held -= set(elements)


def _fill(tx: Transaction) -> None:
    tx.networks.insert(NETWORK)
    ipam.reserve_pool(tx, NETWORK, POOL)
    tx.sandboxes.insert(Sandbox(id="s", path="/run/netns/a", inode=7))
    address = Address(address="10.0.0.2", prefix=16)
    tx.endpoints.insert(Endpoint(id="e" * 64, network_id=NETWORK.id, sandbox_id="s", spec=EndpointSpec(),
                                 attached=True, addresses=(address,), labels={"tier": "web"}))  # fmt: skip


async def test_what_the_kernel_took_of_a_service_goes_when_it_refuses_the_rest(tmp_path: Path) -> None:
    store, firewall = Store(tmp_path / "netstore.db"), Elements()
    context = Context(store, {"told": Driver()}, None, Path(), (), ())  # type: ignore[dict-item, arg-type]
    await store.write(_fill)
    services = Services(context, firewall)  # type: ignore[arg-type]
    spec = ServiceSpec(network_id=NETWORK.id, selector=("tier=web",), mode=EndpointMode.VIP)
    firewall.until = 1
    with pytest.raises(KernelError):
        await services.create("web", NETWORK.name, spec, labels={})
    assert firewall.held  # else nothing is tried here
    firewall.until = 1 << 30
    await services._refresh(NETWORK.id)  # what `touch` brings about
    assert firewall.held == set()
    assert await store.read(lambda tx: tx.services.all()) == []
    await services.close()
    await store.close()
    context.close()
