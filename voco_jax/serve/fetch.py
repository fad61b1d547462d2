"""Pictures and clips that a request names by a URL: `data:` is decoded, `https:` is fetched from allowed hosts.

A server that fetches what strangers name must not become their way into the network that it stands in. So the host of
a URL, and of each that it redirects to, is resolved once, all its addresses are checked, and the connection goes to one
of these: a name that means another address a moment later changes nothing. TLS and the Host header use the name. No
proxy, cookie or password of this machine takes part.
"""

import asyncio
import binascii
from collections.abc import Awaitable, Callable, Iterable, Sequence
import dataclasses
import functools
import re
import ssl
from urllib.parse import unquote_to_bytes

import httpcore
import httpx

from voco_jax.serve import hosts
from voco_jax.serve.limits import Media, MediaError, MediaLimits
from voco_jax.terminal import one_line

_REDIRECTS = (301, 302, 303, 307, 308)
_LONGEST_URL = 2**13  # characters, of a URL that is fetched
_MOST_TRIED = 4  # addresses of a host that are connected to, one after the other
_PIECE = 2**16  # characters of percent-encoding that are decoded together: each takes an object of Python's
_ERRORS = (
    httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Network:
    """How the web is reached: addresses of a (host, port), connections to an address, certificates that are trusted."""

    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = hosts.resolve
    backend: httpcore.AsyncNetworkBackend = dataclasses.field(default_factory=httpcore.AnyIOBackend)
    certificates: Callable[[], ssl.SSLContext] = functools.cache(httpx.create_ssl_context)


_NETWORK = Network()


async def fetch(url: str, limits: MediaLimits, *, video: bool, network: Network = _NETWORK) -> Media:
    """The bytes that a `data:` or `https:` URL stands for, a picture's or a clip's: not yet looked at, within `limits`.

    MediaError for a URL that is not admitted, for what cannot be fetched, and for what is too large or too slow.
    """
    most = limits.most(video)
    if url[:5].lower() == "data:":
        return await asyncio.to_thread(_from_data, url, most)
    name = shown(url)
    try:
        async with asyncio.timeout(limits.timeout):
            return await _fetch(url, name, most, limits, network)
    except TimeoutError:
        raise MediaError(f"{name}: expected all of it within {limits.timeout:g} s, found it slower") from None


def shown(url: str) -> str:
    """A URL for messages: short and printable, without password and query, which may be secrets. Of a text that is no
    URL nothing is shown: it may be a picture.

    >>> shown("https://me:secret@example.com/a.png?key=1"), shown("iVBORw0KGgo=")
    ('https://example.com/a.png', 'URL')
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]{0,15}:)(//([^/?#]*@)?([^/?#@]*)([^?#]*))?", url[:_LONGEST_URL])
    if not found:
        return "URL"
    return one_line(f"{found[1].lower()}//{found[4]}{found[5]}" if found[2] else found[1].lower(), 100)


# ---- https: --------------------------------------------------------------------------------------------------------


async def _fetch(url: str, name: str, most: int, limits: MediaLimits, network: Network) -> Media:
    target = _checked(url, name, limits)
    for _ in range(limits.max_redirects + 1):
        found = await _get(target, name, most, limits, network)
        if isinstance(found, Media):
            return found
        url = _joined(target, found, name)
        target = _checked(url, f"{name}: redirected to {shown(url)}", limits)
    raise MediaError(f"{name}: expected {limits.max_redirects} redirects at most, found more")


def _checked(url: str, name: str, limits: MediaLimits) -> httpx.URL:
    """MediaError unless it may be fetched, as far as the URL itself tells."""
    if not limits.domains:
        raise MediaError(f"{name}: this server fetches no URLs; send the file itself, as data:TYPE;base64,…")
    schemes = ("https", "http") if limits.allow_http else ("https",)
    expected = f"{name}: expected {' or '.join(f'{scheme}://HOST/…' for scheme in schemes)} or data:TYPE;base64,…"
    if len(url) > _LONGEST_URL:
        raise MediaError(f"{expected}, found {len(url)} characters of something else")
    try:
        target = httpx.URL(url)
        if target.scheme not in schemes:
            raise MediaError(f"{expected}, found another address")
        host = hosts.host_of(target)
        admitted = hosts.admitted(target, limits.domains)
    except (httpx.InvalidURL, ValueError):
        raise MediaError(f"{name}: expected the name of a host and a path, found what is no URL") from None
    if target.userinfo:
        raise MediaError(f"{name}: expected a URL without user name and password, found one with them")
    if not admitted:
        raise MediaError(f"{name}: this server does not fetch from {host}, port {hosts.port_of(target)}")
    return target


def _joined(base: httpx.URL, location: str, name: str) -> str:
    try:
        return str(base.join(location))
    except (httpx.InvalidURL, ValueError):
        raise MediaError(f"{name}: redirected to what is no URL") from None


async def _get(url: httpx.URL, name: str, most: int, limits: MediaLimits, network: Network) -> Media | str:
    """What a checked URL gives; or where it is redirected to."""
    host, port = hosts.host_of(url), hosts.port_of(url)
    addresses = await _addresses(host, port, name, limits, network)
    trusted = await asyncio.to_thread(network.certificates)
    timeouts = dict.fromkeys(("pool", "write", "read"), limits.timeout)
    asked = httpcore.URL(scheme=url.raw_scheme, host=host.encode(), port=port, target=url.raw_path)
    headers: dict[bytes | str, bytes | str] = {
        "Host": (f"[{host}]" if ":" in host else host) + (f":{url.port}" if url.port else ""),
        "User-Agent": "voco",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
    }
    try:
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=trusted, network_backend=_Pinned(addresses, network.backend, limits.timeout)
            ) as pool,
            pool.stream("GET", asked, headers=headers, extensions={"timeout": timeouts}) as response,
        ):
            given = {key.lower(): value.decode("utf-8", "replace") for key, value in response.headers}
            location = given.get(b"location")
            if response.status in _REDIRECTS and location is not None:
                return location
            _check_answer(response.status, given, name, most)
            content = bytearray()
            async for part in response.aiter_stream():
                content += part
                if len(content) > most:
                    raise MediaError(f"{name}: expected {most} bytes at most, found more")
    except _ERRORS as error:
        reason = str(error) or type(error).__name__
        raise MediaError(one_line(f"{name}: cannot be fetched: {reason}", 300)) from None
    return Media(data=bytes(content), name=name, label=_label(given.get(b"content-type", "")))


def _check_answer(status: int, headers: dict[bytes, str], name: str, most: int) -> None:
    """MediaError unless what follows the headers is the file as it is, and small enough."""
    if status != 200:
        raise MediaError(f"{name}: expected status 200, found {status}")
    encoding = headers.get(b"content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaError(one_line(f"{name}: expected no content encoding, found {encoding}", 200))
    length = headers.get(b"content-length", "")
    if length.isdecimal() and int(length[:19]) > most:
        raise MediaError(f"{name}: expected {most} bytes at most, found {int(length[:19])}")


async def _addresses(host: str, port: int, name: str, limits: MediaLimits, network: Network) -> Sequence[str]:
    """A host's addresses; MediaError unless all of them may be connected to."""
    try:
        addresses = [host] if hosts.is_address(host) else await network.resolve(host, port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise MediaError(f"{name}: {host}: expected a host with an address, found none")
    if not all(hosts.is_public(address, limits.allow_private) for address in addresses):
        raise MediaError(f"{name}: {host}: expected public addresses, found one that is not")
    return addresses[:_MOST_TRIED]


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to these addresses, whatever the name of the host means by now."""

    def __init__(self, addresses: Sequence[str], backend: httpcore.AsyncNetworkBackend, seconds: float):
        self.addresses, self.backend, self.seconds = addresses, backend, seconds

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable | None = None,
    ) -> httpcore.AsyncNetworkStream:
        each = self.seconds / len(self.addresses)
        *others, last = self.addresses
        for address in others:
            try:
                return await self.backend.connect_tcp(address, port, each, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self.backend.connect_tcp(last, port, each, local_address, socket_options)


# ---- data: ---------------------------------------------------------------------------------------------------------


def _from_data(url: str, most: int) -> Media:
    about, comma, payload = url[5:].partition(",")
    name = "data: URL"
    if not comma:
        raise MediaError(f"{name}: expected data:TYPE;base64,…, found no comma")
    label, *parameters = about.split(";")
    if len(payload) > 4 * most + 2**12:  # in base64, with each character percent-encoded
        raise MediaError(f"{name}: expected {most} bytes at most, found more")
    try:
        content = payload.encode("ascii")
    except UnicodeEncodeError:
        raise MediaError(f"{name}: expected ASCII characters, found others") from None
    if "%" in payload:
        content = _unquoted(content)
    if parameters and parameters[-1].strip().lower() == "base64":
        content = _from_base64(content.translate(None, b" \t\r\n\f"), name, most)
    if len(content) > most:
        raise MediaError(f"{name}: expected {most} bytes at most, found {len(content)}")
    return Media(data=content, name=name, label=_label(label))


def _unquoted(text: bytes) -> bytes:
    """`unquote_to_bytes`, in bounded memory."""
    content, at = bytearray(), 0
    while at < len(text):
        piece = text[at : at + _PIECE]
        escape = piece.rfind(b"%", max(1, len(piece) - 2))  # which must not be cut
        if escape > 0 and at + len(piece) < len(text):
            piece = piece[:escape]
        content += unquote_to_bytes(piece)
        at += len(piece)
    return bytes(content)


def _from_base64(text: bytes, name: str, most: int) -> bytes:
    """Padding may be left out."""
    if len(text) // 4 * 3 > most + 2:
        raise MediaError(f"{name}: expected {most} bytes at most, found more")
    if not text.endswith(b"="):
        text += b"=" * (-len(text) % 4)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        reason = str(error)[:100].lower()
        raise MediaError(f"{name}: expected base64, found something else ({reason})") from None


def _label(media_type: str) -> str:
    return one_line(media_type.partition(";")[0].strip().lower(), 60)
