"""Which web addresses a request may name: allowed hosts, in one spelling each, and addresses of the public internet."""

import asyncio
from collections.abc import Iterable
import dataclasses
import ipaddress
import re
import socket

import httpx

_PORTS = {"https": 443, "http": 80}
# Labels of letters, digits, `-` and `_` (which some buckets have); what ends in a number is an address (WHATWG)
_LABEL = "(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)")

_NOT_PUBLIC = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3", "168.63.129.16/32",  # the last is Azure's, of the machine that a virtual one runs on
    )
]  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = [ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "3fff::/20")]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PRIVATE = [
    ipaddress.ip_network(network)
    for network in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
]


def host_of(url: httpx.URL) -> str:
    """A URL's host in the spelling in which hosts are compared: lower case, IDNA, without a dot at the end; an IPv6
    address without brackets. ValueError for any other spelling of an address, and for what is no host."""
    host = url.raw_host.decode("ascii").removesuffix(".")
    if ":" in host:
        address = ipaddress.IPv6Address(host)
        if address.scope_id is not None:
            raise ValueError("expected an address without a zone")
        return str(address)
    if _NUMBER.fullmatch(host):
        return str(ipaddress.IPv4Address(host))
    if not _NAME.fullmatch(host):
        raise ValueError("expected the name of a host")
    return host


def port_of(url: httpx.URL) -> int:
    """The port of an http or https URL."""
    return url.port or _PORTS[url.scheme]


@dataclasses.dataclass(frozen=True)
class Domain:
    """An entry of --allowed-media-domains: a host, or all below it; `port` None for that of the scheme."""

    host: str
    below: bool = False
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> "Domain":
        """Of `example.com`, `*.example.com` or `.example.com` (hosts below it), `host:port`, an address. ValueError."""
        name = entry.strip()
        host = name.removeprefix("*") if name.startswith("*.") else name
        try:
            url = httpx.URL(f"https://{host.removeprefix('.')}/")
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from None
        found = cls(host_of(url), host.startswith("."), url.port)
        if url.userinfo or url.raw_path != b"/" or url.fragment or (found.below and is_address(found.host)):
            raise ValueError(entry)
        return found

    def admits(self, host: str, port: int, usual: int) -> bool:
        """Whether a request may name this host and port; `usual` is the port of its scheme."""
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and port == (self.port or usual)


def admitted(url: httpx.URL, domains: Iterable[Domain]) -> bool:
    """Whether a domain admits the host and port of an http or https URL; ValueError as `host_of`."""
    host, port = host_of(url), port_of(url)
    return any(domain.admits(host, port, _PORTS[url.scheme]) for domain in domains)


def is_address(host: str) -> bool:
    """Whether a host, as `host_of` returns it, is an address and no name."""
    return ":" in host or bool(_NUMBER.fullmatch(host))


def is_public(address: str, allow_private: bool = False) -> bool:
    """Whether an IP address is one of the public internet; `allow_private` admits this machine and private networks
    too, but never link-local addresses, where clouds keep their machines' credentials.

    An IPv6 address that stands for one of IPv4 (mapped, 6to4, NAT64) is judged as that.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or low or ip
    if allow_private and any(ip in network for network in _PRIVATE):
        return True
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC)
    return ip in _GLOBAL_V6 and not any(ip in network for network in _NOT_GLOBAL_V6)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system tells them. OSError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
