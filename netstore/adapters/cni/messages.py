"""What CNI says: environment and configuration in, a result or an error out (CNI specification 1.1.0)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from netstore.adapters.programs import Late, Refusal, TooLong
from netstore.errors import InvalidArgument, NetstoreError
from netstore.kernel.sandboxes import RESOLVER_ADDRESS
from netstore.model import Endpoint, Network, Sandbox, stable_mac

__all__ = ["VERSIONS", "CniError", "Config", "Dns", "Identity", "Named", "Request", "decode", "describe", "result"]

VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
"""Versions of configurations and results. The program netstore-cni, which answers VERSION, has them too."""

INCOMPATIBLE, UNSUPPORTED_FIELD, BAD_ENVIRONMENT, UNDECODABLE, BAD_CONFIG, TRY_LATER = 1, 2, 4, 6, 7, 11
NOT_AVAILABLE = 50
_OURS = {"NOT_FOUND": 101, "ALREADY_EXISTS": 102, "FAILED_PRECONDITION": 103, "RESOURCE_EXHAUSTED": 104}
_DEFECT = 100
_CODES: Mapping[type[Refusal], int] = {Late: TRY_LATER, TooLong: UNDECODABLE}

_CONTAINER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")
_INTERFACE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")
_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
}
_SINCE_1_1 = ("GC", "STATUS")

S = TypeVar("S", bound=msgspec.Struct)


class CniError(Refusal):
    """An error as the specification has it: a code, what happened, and details."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg, details)
        self.code = code

    @classmethod
    def of(cls, error: NetstoreError) -> CniError:
        """Translate an error of ours; the hint becomes the details."""
        if isinstance(error, InvalidArgument):
            if error.field == "netns_path":
                return cls(BAD_ENVIRONMENT, f"CNI_NETNS: {error.value!r} is not accepted", error.accepted)
            return cls(BAD_CONFIG, error.what, error.hint)
        code = TRY_LATER if error.code == "UNAVAILABLE" else _OURS.get(error.code, _DEFECT)
        return cls(code, error.what, error.hint)


class Dns(msgspec.Struct, kw_only=True):
    """`servers` and `searches` are the capability's words, the others those of configurations and results."""

    servers: list[str] = []
    searches: list[str] = []
    nameservers: list[str] = []
    domain: str = ""
    search: list[str] = []
    options: list[str] = []


class PortMapping(msgspec.Struct, kw_only=True, rename={"host_port": "hostport", "host_ip": "hostip",
                                                        "container_port": "containerport"}):  # fmt: skip
    """One entry of the capability portMappings; host port 0 is not published."""

    host_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    container_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    protocol: str = "tcp"
    host_ip: str = ""


class Bandwidth(msgspec.Struct, kw_only=True, rename={"ingress_rate": "ingressrate", "egress_rate": "egressrate"}):
    """Bits a second, 0 for no limit; ingress is what the container receives. Bursts are the kernel's to choose."""

    ingress_rate: Annotated[int, msgspec.Meta(ge=0)] = 0
    egress_rate: Annotated[int, msgspec.Meta(ge=0)] = 0


class RuntimeConfig(msgspec.Struct, kw_only=True, rename={"port_mappings": "portmappings"}):
    """The capabilities, their keys in lower case. Aliases are a list, or lists by network (podman)."""

    port_mappings: list[PortMapping] = []
    bandwidth: Bandwidth = msgspec.field(default_factory=Bandwidth)
    ips: list[str] = []
    mac: str = ""
    dns: Dns | None = None
    aliases: list[str] | dict[str, list[str]] = []


class Label(msgspec.Struct):
    """One of args.cni.labels."""

    key: str
    value: str = ""


class CniArgs(msgspec.Struct, kw_only=True):
    """args.cni of a configuration (CNI's conventions)."""

    ips: list[str] = []
    mac: str = ""
    aliases: list[str] = []
    labels: list[Label] = []


class Args(msgspec.Struct, kw_only=True):
    """args of a configuration."""

    cni: CniArgs = msgspec.field(default_factory=CniArgs)


class Create(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the network is made where it is not there; the words are those of the contract's NetworkSpec."""

    driver: str = "bridge"
    subnet: str = ""
    gateway: str = ""
    subnet6: str = ""
    internal: bool = False
    options: dict[str, str] = {}


class Attachment(msgspec.Struct, kw_only=True):
    """One of those that GC leaves."""

    container_id: str = msgspec.field(name="containerID")
    ifname: str


class PreviousAddress(msgspec.Struct):
    """One of a previous result's addresses."""

    address: str


class Previous(msgspec.Struct, kw_only=True):
    """What CHECK looks at of the chain's result."""

    ips: list[PreviousAddress] = []


class Named(msgspec.Struct, kw_only=True):
    """What DEL needs of a configuration: nothing that ADD would refuse may keep a runtime from cleaning up."""

    cni_version: str = msgspec.field(name="cniVersion", default="")
    name: str = ""


class Config(Named, kw_only=True):
    """A network configuration; keys that are not here are other plugins' or runtimes'."""

    network: str = ""
    create: Create | None = None
    ipam: dict[str, Any] = {}
    dns: Dns = msgspec.field(default_factory=Dns)
    args: Args = msgspec.field(default_factory=Args)
    runtime: dict[str, Any] = msgspec.field(name="runtimeConfig", default_factory=dict)
    previous: Previous | None = msgspec.field(name="prevResult", default=None)
    valid: list[Attachment] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)

    @property
    def network_name(self) -> str:
        """The network of ours that is meant."""
        return self.network or self.name


class Identity(msgspec.Struct, frozen=True):
    """What CNI knows an attachment by; kept as labels of the endpoint, and nowhere else."""

    config: str
    container: str
    interface: str

    def labels(self) -> dict[str, str]:
        """Return the endpoint's labels."""
        return {"cni.network": self.config, "cni.container-id": self.container, "cni.ifname": self.interface}

    def has(self, endpoint: Endpoint) -> bool:
        """Say whether an endpoint is this attachment's."""
        return self.labels().items() <= endpoint.labels.items()


class Request(msgspec.Struct, frozen=True):
    """One call: what is to be done, in which configuration, CNI's variables, and for ADD the capabilities."""

    command: str
    config: Config
    variables: Mapping[str, str]
    runtime: RuntimeConfig

    @property
    def identity(self) -> Identity:
        """Whose attachment it is about."""
        return Identity(self.config.name, self.variables["CNI_CONTAINERID"], self.variables["CNI_IFNAME"])

    @property
    def arguments(self) -> dict[str, str]:
        """CNI_ARGS.

        Raises:
            CniError: it is not KEY=VALUE;KEY=VALUE.
        """
        found = {}
        for pair in self.variables.get("CNI_ARGS", "").split(";"):
            key, separator, value = pair.partition("=")
            if pair and not separator:
                raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS: {pair[:200]!r} is not accepted", "KEY=VALUE;KEY=VALUE")
            found[key] = value
        return found


def decode(variables: Mapping[str, str], body: bytes) -> Request:
    """Read and check a call.

    Raises:
        CniError: with the specification's code for what is wrong.
    """
    command = variables.get("CNI_COMMAND", "")
    if command not in _NEEDED:
        raise CniError(
            BAD_ENVIRONMENT, f"CNI_COMMAND: {command[:200]!r} is not accepted", f"one of {', '.join(_NEEDED)}, VERSION"
        )
    try:
        if command == "DEL":
            named = msgspec.json.decode(body, type=Named)
            config = Config(cni_version=named.cni_version, name=named.name)
        else:
            config = msgspec.json.decode(body, type=Config)
        runtime = msgspec.convert(_lowered(config.runtime), RuntimeConfig) if command == "ADD" else RuntimeConfig()
    except msgspec.ValidationError as error:
        raise CniError(BAD_CONFIG, f"the network configuration is not accepted: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise CniError(UNDECODABLE, f"the network configuration is no JSON: {error}") from error
    _check_config(command, config)
    _check_variables(command, variables)
    return Request(command, config, variables, runtime)


def _lowered(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    """Return capabilities with keys in lower case: containerd writes HostPort, and Go does not mind."""

    def inner(value: Any) -> Any:
        if isinstance(value, list):
            return [inner(each) for each in value]
        return {key.lower(): each for key, each in value.items()} if isinstance(value, dict) else value

    # Keys of aliases are names.
    return {key.lower(): value if key.lower() == "aliases" else inner(value) for key, value in capabilities.items()}


def _check_config(command: str, config: Config) -> None:
    if config.cni_version not in VERSIONS:
        raise CniError(
            INCOMPATIBLE, f"cniVersion {config.cni_version[:200]!r} is not supported", f"one of {', '.join(VERSIONS)}"
        )
    if command in _SINCE_1_1 and config.cni_version < "1.1.0":
        raise CniError(INCOMPATIBLE, f"{command} is no command of cniVersion {config.cni_version}", "1.1.0 has it")
    if not _CONTAINER.fullmatch(config.name):
        raise CniError(BAD_CONFIG, f"name: {config.name[:200]!r} is not accepted", "letters, digits, '_', '.', '-'")
    if config.ipam:
        raise CniError(
            UNSUPPORTED_FIELD, f"ipam: {str(config.ipam)[:200]} is not supported",
            'netstore gives the addresses itself: leave ipam out, or write "create": {"subnet": "10.9.0.0/24"}',
        )  # fmt: skip


def _check_variables(command: str, variables: Mapping[str, str]) -> None:
    missing = [name for name in _NEEDED[command] if not variables.get(name)]
    if missing:
        raise CniError(BAD_ENVIRONMENT, f"{', '.join(missing)} missing in the environment", f"{command} needs it")
    for name, pattern in (("CNI_CONTAINERID", _CONTAINER), ("CNI_IFNAME", _INTERFACE)):
        value = variables.get(name, "")
        if name in _NEEDED[command] and (not pattern.fullmatch(value) or value in (".", "..", "lo", "all", "default")):
            raise CniError(
                BAD_ENVIRONMENT, f"{name}: {value[:200]!r} is not accepted", f"what matches {pattern.pattern}"
            )


def describe(refusal: Refusal, body: bytes) -> dict[str, Any]:
    """Return what is printed of a failure, in the configuration's version where it can be read and we know it."""
    try:
        version = msgspec.json.decode(body, type=Named).cni_version
    except (msgspec.DecodeError, RecursionError):
        version = ""
    code = refusal.code if isinstance(refusal, CniError) else _CODES.get(type(refusal), _DEFECT)
    return {
        "cniVersion": version if version in VERSIONS else VERSIONS[-1],
        "code": code, "msg": refusal.msg, "details": refusal.details,
    }  # fmt: skip


def result(request: Request, endpoint: Endpoint, network: Network, sandbox: Sandbox) -> dict[str, Any]:
    """Return the result of ADD in the configuration's version."""
    version = request.config.cni_version
    inner: dict[str, Any] = {"name": endpoint.interface_name, "mac": endpoint.mac_address,
                             "sandbox": request.variables["CNI_NETNS"]}  # fmt: skip
    interfaces = [inner]
    if network.spec.driver == "bridge":
        outer = {"name": network.interface, "mac": stable_mac(network.id)}
        interfaces = [outer, {"name": endpoint.host_interface}, inner]
    if version >= "1.1.0" and network.mtu:
        for each in interfaces:
            each["mtu"] = network.mtu
    addresses = []
    for address in endpoint.addresses:
        entry = {"address": f"{address.address}/{address.prefix}", "interface": len(interfaces) - 1}
        if address.gateway and not network.spec.internal:
            entry["gateway"] = address.gateway
        if version < "1.0.0":
            entry["version"] = "6" if ":" in address.address else "4"
        addresses.append(entry)
    return {
        "cniVersion": version, "interfaces": interfaces, "ips": addresses, "routes": _routes(endpoint, network),
        "dns": _dns(request, names=sandbox.resolver and not network.predefined),
    }  # fmt: skip


def _routes(endpoint: Endpoint, network: Network) -> list[dict[str, str]]:
    out = [
        {"dst": "::/0" if ":" in each.gateway else "0.0.0.0/0", "gw": each.gateway}
        for each in endpoint.addresses
        if endpoint.default_route and each.gateway
    ]
    return [*out, *({"dst": route.destination, "gw": route.gateway} for route in network.spec.routes)]


def _dns(request: Request, *, names: bool) -> dict[str, Any]:
    """Return what resolv.conf should say: our resolver where it answers, which asks the servers that were given."""
    given, own = request.runtime.dns or Dns(), request.config.dns
    answer = {
        "nameservers": [RESOLVER_ADDRESS] if names else given.servers or given.nameservers or own.nameservers,
        "domain": given.domain or own.domain,
        "search": given.searches or given.search or own.search,
        "options": given.options or own.options,
    }
    return {key: value for key, value in answer.items() if value}
