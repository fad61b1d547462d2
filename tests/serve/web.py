"""A web for tests: names that mean public addresses, and one server on 127.0.0.1 that answers at all of these."""

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import datetime
import functools
import ipaddress
from pathlib import Path
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
import httpcore

from voco_jax.serve.fetch import Network

PUBLIC, PUBLIC_V6 = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
# `uncertified.example` is not among those that the certificate is for
CERTIFIED = ("pictures.example", "*.cdn.example", "xn--bcher-kva.example", PUBLIC)

Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


class Web(httpcore.AnyIOBackend):
    """Answers with `pages`, by path: bytes of a whole answer, or what writes one. `names` gives the addresses of a
    host, one list after the other, of which the last stays; all others have PUBLIC.

    `resolved`, `connected`, `requests` and `server_names` (of TLS) are what was asked of it, in order.
    """

    def __init__(self, pages: dict[str, Page], names: dict[str, list[list[str]]] | None = None, tls: bool = True):
        self.pages, self.names, self.tls = pages, names or {}, tls
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.server_names: list[str | None] = []
        self.open = 0  # connections

    async def __aenter__(self) -> "Web":
        server, self._trusting = _contexts()
        server.sni_callback = lambda _, name, __: self.server_names.append(name)
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=server if self.tls else None)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    @property
    def network(self) -> Network:
        return Network(self._resolve, self, lambda: self._trusting)

    async def _resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        answers = self.names.get(host, [[PUBLIC]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.connected.append((host, port))
        if host not in (PUBLIC, PUBLIC_V6):
            raise httpcore.ConnectError("no such machine")
        return await super().connect_tcp("127.0.0.1", self.port, timeout, local_address, socket_options)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(request)
                page = self.pages[request.split()[1]]
                if isinstance(page, bytes):
                    writer.write(page)
                else:
                    await page(writer)
                await writer.drain()
        finally:
            self.open -= 1
            writer.close()


def answer(content: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP answer; `content_type` and other headers by their names. Its length is told unless a header does."""
    lines = {name.replace("_", "-"): value for name, value in headers.items()}
    if not {"content-length", "transfer-encoding"} & set(lines):
        lines["content-length"] = str(len(content))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + content


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status=status, location=location)


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server with a certificate for CERTIFIED, and of a client that trusts it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address(host)) if host == PUBLIC else x509.DNSName(host) for host in CERTIFIED]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "chain.pem"
        file.write_bytes(certificate + secret)
        server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=certificate.decode())
