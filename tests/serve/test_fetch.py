import asyncio
import base64
import gzip
import time

import httpx
import pytest

from tests.serve.web import PUBLIC, PUBLIC_V6, Web, answer, redirect
from voco_jax.errors import UserError
from voco_jax.serve.fetch import Media, MediaError, fetch
from voco_jax.serve.hosts import Domain, admitted, is_public, resolve
from voco_jax.serve.limits import MediaLimits
from voco_jax.terminal import printable

PIXELS = bytes(range(256)) * 4
LIMITS = MediaLimits(("pictures.example", "*.cdn.example", "uncertified.example"), max_picture_bytes=2000, timeout=5)


def get(url: str, web: Web | None = None, limits: MediaLimits = LIMITS, video: bool = False) -> Media:
    async def once():
        if web is None:
            return await fetch(url, limits, video=video)
        async with web:
            return await fetch(url, limits, video=video, network=web.network)

    return asyncio.run(once())


def refused(url: str, web: Web | None = None, limits: MediaLimits = LIMITS, video: bool = False) -> str:
    """The one line."""
    with pytest.raises(MediaError) as error:
        get(url, web, limits, video)
    line = str(error.value)
    assert line == printable(line) and len(line) < 400
    return line


# ---- Hosts ---------------------------------------------------------------------------------------------------------


def test_fetch():
    """By the name, at the address; and nothing is asked for that would have to be decompressed."""
    web = Web({"/a.png?size=1": answer(PIXELS, content_type="Image/PNG; charset=x")})
    media = get("https://Pictures.EXAMPLE.:443/a.png?size=1#part", web)
    assert media == Media(data=PIXELS, name="https://Pictures.EXAMPLE.:443/a.png", label="image/png")
    assert repr(media.data) not in repr(media)
    assert (web.resolved, web.connected) == (["pictures.example"], [(PUBLIC, 443)])
    assert web.server_names == ["pictures.example"]
    (request,) = web.requests
    first, *headers = request.lower().split("\r\n")
    assert first == "get /a.png?size=1 http/1.1"
    assert "host: pictures.example" in headers and "accept-encoding: identity" in headers
    assert not any(header.startswith(("cookie", "authorization", "referer")) for header in headers)


def test_environment_is_not_asked(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web = Web({"/": answer(PIXELS)})
    assert get("https://pictures.example", web).data == PIXELS and web.connected == [(PUBLIC, 443)]


def test_certificate_is_of_the_name():
    web = Web({"/": answer(PIXELS)})
    assert "ertificate" in refused("https://uncertified.example/", web) and not web.requests


def test_no_url_by_default():
    web = Web({"/": answer(PIXELS)})
    for url in ("https://pictures.example/", "http://127.0.0.1/", "file:///etc/passwd", "iVBORw0KGgo="):
        assert "this server fetches no URLs" in refused(url, web, MediaLimits())
    assert not web.resolved


@pytest.mark.parametrize(
    ("entry", "yes", "no"),
    [
        ("pictures.example", ["pictures.example", "PICTURES.example.", "pictures.example:443"],
         ["a.pictures.example", "evilpictures.example", "pictures.example.evil.com", "pictures.example:8443", "evil"]),
        ("*.cdn.example", ["a.cdn.example", "a.b.cdn.example"], ["cdn.example", "acdn.example", "a.cdn.example:80"]),
        (".cdn.example", ["a.cdn.example"], ["cdn.example"]),
        ("Pictures.Example:8443", ["pictures.example:8443"], ["pictures.example"]),
        ("bücher.example", ["BÜCHER.example", "xn--bcher-kva.example"], ["bucher.example"]),
        (PUBLIC, [PUBLIC, f"{PUBLIC}."], ["93.184.216.35"]),
        (f"[{PUBLIC_V6}]:8443", [f"[{PUBLIC_V6.upper()}]:8443", "[2606:2800:0220:1:248:1893:25c8:1946]:8443"], []),
    ],
)  # fmt: skip
def test_domains(entry, yes, no):
    domain = Domain.parse(entry)
    for host in yes + no:
        assert admitted(httpx.URL(f"https://{host}/"), [domain]) == (host in yes), host


@pytest.mark.parametrize(
    "entry",
    ["", "*", ".", "*.", "*example.com", "a.*.com", "https://example.com", "example.com/a", "me@example.com",
     "example.com?a", "*.93.184.216.34", "0177.0.0.1", "2130706433", "a..b", "-a.com", "a b.com", "example.com:x",
     "[2606::1%25eth0]"],
)  # fmt: skip
def test_entries_that_are_no_hosts(entry):
    with pytest.raises(UserError, match="--allowed-media-domains: expected a host"):
        MediaLimits((entry,))


@pytest.mark.parametrize("change", [dict(timeout=0), dict(max_video_bytes=-1), dict(max_redirects=-1)])
def test_limits(change):
    with pytest.raises(UserError, match=f"{next(iter(change))}: expected"):
        MediaLimits(**change)


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/", "file:///etc/passwd", "file:/etc/passwd", "ftp://pictures.example/",
        "gopher://pictures.example/", "//pictures.example/", "/etc/passwd", "https:pictures.example", "https:///a.png",
        "https://", "", "jar:https://pictures.example!/", "https://evil.example/", "https://pictures.example:22/",
        "https://pictures.example:8443/", "https://pictures.example:99999999/", "https://pictures.example:x/",
        "https://me:secret@pictures.example/", "https://pictures.example@evil.example/",
        "https://evil.example#@pictures.example/", "https://evil.example\\@pictures.example/",
        "https://pictures.example\\.evil.example/", "https://pictures.example%2eevil.example/",
        "https://pictures.example\r\nX: y/", "https://pictures.example/\0", "https://pict\u2028ures.example/\x1b[2J",
        "https://evil.example?.cdn.example", "https://evil.example/.cdn.example", "https://..cdn.example/",
        "https://a..cdn.example/", f"https://{'a' * 64}.cdn.example/", f"https://{'a.' * 130}cdn.example/",
        "https://pictures.example/" + "a" * 9000, "https://[::1", "https://[::1]x/", "https://pictures.example\ud800/",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url):
    web = Web({"/": answer(PIXELS)})
    line = refused(url, web)
    assert not web.resolved and not web.connected
    assert "secret" not in line


LOOPBACKS = [
    "127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0X7F.1", "0177.0.0.1",
    "017700000001", "127.0.0.01", "0", "0.0.0.0", "127.255.255.254", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[::1%25lo]",
    "[fe80::1%25eth0]", "127。0。0。1", "127.0.0.1%2e", "%31%32%37.0.0.1", "①②⑦.0.0.1",
    "１２７.0.0.1", "localhost", "LOCALHOST.", "a.localhost",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACKS)
def test_this_machine_in_all_spellings(host):
    """Neither where it is not allowed, nor where it is: then its address is looked at, and connected to never."""
    local = [["127.0.0.1"]]
    web = Web({"/": answer(PIXELS)}, {"localhost": local, "a.localhost": local})
    refused(f"https://{host}/", web)
    assert not web.resolved and not web.connected
    allowed = ("127.0.0.1", "0.0.0.0", "127.255.255.254", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]",
               "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "localhost", "*.localhost")  # fmt: skip
    refused(f"https://{host}/", web, MediaLimits(allowed))
    assert not web.connected


def test_public_addresses():
    public = ["8.8.8.8", PUBLIC, PUBLIC_V6, "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "172.32.0.1",
              "100.128.0.1", "192.0.1.1", "198.20.0.1", "2a00:1450:4001::1"]  # fmt: skip
    others = ["0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.8.8",
              "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1",
              "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
              "255.255.255.255", "168.63.129.16",
              "::", "::1", "::8.8.8.8", "fe80::1", "fe80::1%eth0", "2606:2800::1%1", "fc00::1", "fd00:ec2::254",
              "ff02::1", "fec0::1", "2001:db8::1", "2001::1", "2001:10::1", "3fff::1", "5f00::1", "4000::1", "100::1",
              "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8",
              "2002:a00:1::", "2002:7f00:1::1", "2002:a9fe:a9fe::"]  # fmt: skip
    assert [address for address in public if not is_public(address)] == []
    assert [address for address in others if is_public(address)] == []
    private = {"10.1.2.3", "127.0.0.1", "127.8.8.8", "172.16.0.1", "172.31.255.255", "192.168.1.1", "::1", "fc00::1",
               "fd00:ec2::254", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::", "2002:7f00:1::1"}  # fmt: skip
    assert {address for address in others if is_public(address, allow_private=True)} == private


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["169.254.169.254"], ["::1"], [PUBLIC, "10.0.0.1"], ["fe80::1%2", PUBLIC], [PUBLIC] * 9 + ["::1"]],
)
def test_names_of_addresses_that_are_not_public(addresses):
    web = Web({"/": answer(PIXELS)}, {"pictures.example": [addresses]})
    line = refused("https://pictures.example/", web)
    assert line.endswith("pictures.example: expected public addresses, found one that is not")
    assert not web.connected and not any(address in line for address in addresses)


def test_names_without_an_address():
    web = Web({}, {"pictures.example": [[]]})
    assert "expected a host with an address" in refused("https://pictures.example/", web)

    async def fails(host, port):
        raise OSError("no such name")

    web._resolve = fails
    assert "expected a host with an address" in refused("https://pictures.example/", web)


def test_names_that_change():
    """The address that was checked is the one that is connected to; another host, or another hop, is checked anew."""
    names = {"pictures.example": [[PUBLIC], ["127.0.0.1"]]}
    web = Web({"/": answer(PIXELS), "/again": redirect("/")}, names)
    assert get("https://pictures.example/", web).data == PIXELS
    assert (web.resolved, web.connected) == (["pictures.example"], [(PUBLIC, 443)])
    names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert "expected public addresses" in refused("https://pictures.example/again", web)
    assert web.connected == [(PUBLIC, 443)] * 2


def test_next_address_where_one_does_not_answer():
    web = Web({"/": answer(PIXELS)}, {"pictures.example": [["93.184.216.99", PUBLIC_V6]]})
    assert get("https://pictures.example/", web).data == PIXELS
    assert web.connected == [("93.184.216.99", 443), (PUBLIC_V6, 443)]
    web = Web({}, {"pictures.example": [[f"93.184.216.{i}" for i in range(100, 200)]]})
    assert "cannot be fetched: no such machine" in refused("https://pictures.example/", web)
    assert len(web.connected) == 4


def test_addresses_as_hosts():
    web = Web({"/": answer(PIXELS)})
    assert get(f"https://{PUBLIC}/", web, MediaLimits((PUBLIC,))).data == PIXELS
    assert not web.resolved and web.connected == [(PUBLIC, 443)]


def test_own_port():
    web = Web({"/": answer(PIXELS)})
    get("https://pictures.example:8443/", web, MediaLimits(("pictures.example:8443",)))
    assert web.connected == [(PUBLIC, 8443)] and "Host: pictures.example:8443" in web.requests[0]


def test_names_are_normalised():
    web = Web({"/": answer(PIXELS)})
    assert get("https://BÜCHER.example/", web, MediaLimits(("bücher.example",))).data == PIXELS
    assert web.resolved == web.server_names == ["xn--bcher-kva.example"]


def test_private_servers_where_they_are_allowed():
    """By sockets as they are, without anything of these tests in between."""
    web = Web({"/": answer(PIXELS)}, tls=False)

    async def tried(**allowed):
        limits = MediaLimits((f"127.0.0.1:{web.port}", f"localhost:{web.port}"), timeout=5, **allowed)
        return [await fetch(f"http://{host}:{web.port}/", limits, video=False) for host in ("127.0.0.1", "localhost")]

    async def all_tried():
        async with web:
            assert [media.data for media in await tried(allow_http=True, allow_private=True)] == [PIXELS] * 2
            with pytest.raises(MediaError, match="expected public addresses"):
                await tried(allow_http=True)
            with pytest.raises(MediaError, match="expected https://HOST/… or data:"):
                await tried(allow_private=True)
        assert "127.0.0.1" in await resolve("localhost", 80)

    asyncio.run(all_tried())
    assert len(web.requests) == 2


# ---- Redirects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://10.0.0.1/", "redirected to https://10.0.0.1/: this server does not fetch from 10.0.0.1, port 443"),
        ("https://evil.example/?key=1", "redirected to https://evil.example/: this server does not fetch"),
        ("//evil.example/", "does not fetch from evil.example"),
        ("http://pictures.example/", "expected https://HOST"),
        ("file:///etc/passwd", "expected https://HOST"),
        ("data:image/png;base64,AAAA", "expected https://HOST"),
        ("https://me:you@pictures.example/", "without user name"),
        ("https://pictures.example:22/", "port 22"),
        ("https://[::1", "redirected to what is no URL"),
        ("https://internal.cdn.example/", "internal.cdn.example: expected public addresses"),
    ],
)
def test_redirects_that_are_refused(location, expected):
    web = Web({"/a": redirect(location)}, {"internal.cdn.example": [["10.0.0.1"]]})
    assert expected in refused("https://pictures.example/a", web)
    assert web.connected == [(PUBLIC, 443)]


def test_redirects():
    pages = {"/a": redirect("b?c", "301 Moved"), "/b?c": redirect("https://x.cdn.example/d"), "/d": answer(PIXELS)}
    web = Web(pages)
    media = get("https://pictures.example/a", web)
    assert media.data == PIXELS and media.name == "https://pictures.example/a"
    assert web.resolved == web.server_names == ["pictures.example", "pictures.example", "x.cdn.example"]
    web = Web({"/a": redirect("/b", "307 Temporary"), "/b": redirect("/a", "308 Permanent")})
    assert "expected 3 redirects at most" in refused("https://pictures.example/a", web)
    assert len(web.requests) == 4
    web = Web({"/a": answer(PIXELS, "302 Found")})
    assert "expected status 200, found 302" in refused("https://pictures.example/a", web)


# ---- Answers -------------------------------------------------------------------------------------------------------


async def endless(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(bytes(1000))
        await writer.drain()


async def endless_chunks(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\nx\r\n" * 100)
        await writer.drain()


async def endless_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n" * 100)
        await writer.drain()


async def drips(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def drips_headers(writer):
    for letter in "HTTP/1.1 200 OK\r\n" + "x" * 1000:
        writer.write(letter.encode())
        await writer.drain()
        await asyncio.sleep(0.02)


async def silent(writer):
    await asyncio.sleep(30)


AT_MOST = "expected 2000 bytes at most, found"
SLOW = "expected all of it within 0.3 s, found it slower"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (endless, AT_MOST),
        (endless_chunks, AT_MOST),
        (endless_headers, "cannot be fetched"),
        (drips, SLOW),
        (drips_headers, SLOW),
        (silent, SLOW),
        (answer(content_length="2001"), f"{AT_MOST} 2001"),
        (answer(content_length="9" * 19), f"{AT_MOST} 9999999999999999999"),
        (answer(content_length="9" * 4000), "cannot be fetched"),
        (answer(PIXELS, content_length="1500"), "cannot be fetched"),
        (answer(PIXELS, content_length="-1"), "cannot be fetched"),
        (answer(PIXELS, content_length="many"), "cannot be fetched"),
        (answer(b"zz\r\n", transfer_encoding="chunked"), "cannot be fetched"),
        (answer(gzip.compress(bytes(10**8), 9), content_encoding="gzip", content_length="1000"), "no content encoding"),
        (answer(PIXELS, content_encoding="br"), "expected no content encoding, found br"),
        (answer(PIXELS, transfer_encoding="gzip"), "cannot be fetched"),
        (answer(PIXELS, "404 Not \x1b[2J Found"), "found 404"),
        (answer(PIXELS, "206 Partial Content"), "found 206"),
        (answer(PIXELS, "500 Error"), "found 500"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "cannot be fetched"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
    ],
)  # fmt: skip
def test_answers_that_are_refused(page, expected):
    """Whatever a server sends, it is one line, soon; and nothing stays open."""
    limits = MediaLimits(("pictures.example",), max_picture_bytes=2000, timeout=0.3 if expected == SLOW else 5)
    web, start = Web({"/a": page, "/": answer(PIXELS)}), time.monotonic()

    async def tried():
        async with web:
            with pytest.raises(MediaError) as error:
                await fetch("https://pictures.example/a", limits, video=False, network=web.network)
            assert (await fetch("https://pictures.example/", limits, video=False, network=web.network)).data == PIXELS
            if page is not silent:  # which does not notice
                while web.open:
                    await asyncio.sleep(0.01)
        return str(error.value)

    line = asyncio.run(asyncio.wait_for(tried(), 3))
    assert line.startswith("https://pictures.example/a: ") and expected in line and line == printable(line)
    assert time.monotonic() - start < 2


def test_deadline_holds_for_names_and_redirects():
    async def slow(host, port):
        await asyncio.sleep(0.2)
        return [PUBLIC]

    web = Web({"/a": redirect("/a")})
    web._resolve = slow
    assert SLOW in refused("https://pictures.example/a", web, MediaLimits(("pictures.example",), timeout=0.3))
    assert len(web.requests) == 1


def test_clips_may_be_larger():
    web = Web({"/": answer(bytes(3000))})
    limits = MediaLimits(("pictures.example",), max_picture_bytes=2000, max_video_bytes=3000)
    assert len(get("https://pictures.example/", web, limits, video=True).data) == 3000
    assert AT_MOST in refused("https://pictures.example/", web, limits)


def test_who_asked_may_leave():
    """A fetch that is cancelled closes its connection."""

    async def cancelled():
        async with Web({"/": drips}) as web:
            fetching = asyncio.create_task(fetch("https://pictures.example/", LIMITS, video=False, network=web.network))
            while not web.open:
                await asyncio.sleep(0.01)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            while web.open:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(cancelled(), 3))


# ---- data: ---------------------------------------------------------------------------------------------------------

ENCODED = base64.b64encode(PIXELS).decode()


@pytest.mark.parametrize(
    ("url", "label"),
    [
        (f"data:image/png;base64,{ENCODED}", "image/png"),
        (f"DATA:Image/PNG;charset=utf-8;BASE64,{ENCODED}", "image/png"),
        (f"data:;base64,{ENCODED.rstrip('=')}", ""),
        (f"data:image/png;base64, {' '.join(ENCODED)}\r\n", "image/png"),
        (f"data:image/png;base64,{''.join(f'%{ord(letter):02x}' for letter in ENCODED)}", "image/png"),
        ("data:image/png," + "".join(f"%{byte:02X}" for byte in PIXELS), "image/png"),
    ],
)
def test_data(url, label):
    media = get(url, limits=MediaLimits(max_picture_bytes=len(PIXELS)))
    assert media == Media(data=PIXELS, name="data: URL", label=label)


def test_long_percent_encoding():
    """Escapes at all places of the pieces that it is decoded in."""
    for shift in range(3):
        content = b"a" * shift + bytes([255, 1]) * 40_000
        url = "data:," + "a" * shift + "%FF%01" * 40_000
        assert get(url, limits=MediaLimits(max_picture_bytes=10**5)).data == content


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        (f"data:image/png;base64;{ENCODED}", "no comma"),
        ("data:image/png;base64,A", "expected base64"),
        ("data:image/png;base64,AAA=AAAA", "expected base64"),
        ("data:image/png;base64,AA-_", "expected base64"),
        ("data:image/png;base64,AA\x1b[2J", "expected base64"),
        ("data:image/png;base64,%zz", "expected base64"),
        ("data:image/png;base64,é", "expected ASCII"),
        ("data:image/png;base64,\ud800", "expected ASCII"),
        ("data:image/png;base64," + "A" * 2672, "expected 2000 bytes at most, found more"),  # before it is decoded
        ("data:image/png;base64," + "A" * 10**5, "expected 2000 bytes at most"),
        ("data:image/png;base64," + " " * 10**5, "expected 2000 bytes at most"),
        ("data:," + "a" * 2001, "expected 2000 bytes at most, found 2001"),
    ],
)
def test_data_that_is_refused(url, expected):
    line = refused(url)
    assert expected in line and "AAAA" not in line and "[2J" not in line
