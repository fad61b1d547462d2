"""A Google Cloud Storage of one bucket, in memory, on this machine: as much of its JSON interface as its real clients
(gcsfs and TensorStore) ask for, generations and their preconditions included."""

from collections.abc import Iterator
import contextlib
import datetime
import http.server
import itertools
import json
import os
import re
import threading
import urllib.parse

BUCKET = "bucket"


class BucketServer(http.server.ThreadingHTTPServer):
    """`objects` is name → (content, generation); with `forbidden` every request is refused, or, where it is a text,
    those that it is in the address of."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.times: dict[str, str] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.forbidden: bool | str = False
        self.lock, self.numbers = threading.RLock(), itertools.count(1)
        self.address = f"http://localhost:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """Variables that send real clients here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or gcsfs asks Google itself what kind of bucket it is
        }


@contextlib.contextmanager
def bucket_server() -> Iterator[BucketServer]:
    server = BucketServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = {name: os.environ.get(name) for name in server.environment()}
    os.environ.update(server.environment())
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client to acknowledge its head
    server: BucketServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        with self.server.lock:
            forbidden = self.server.forbidden
            if forbidden in urllib.parse.unquote(self.path) if isinstance(forbidden, str) else forbidden:
                text = "somebody@project.iam.gserviceaccount.com does not have storage.objects.list access"
                return self._json({"error": {"code": 403, "message": text, "errors": [{"message": text}]}}, 403)
            if url.path == "/batch/storage/v1":
                return self._batch(body)
            if match := re.fullmatch(r"/upload/storage/v1/b/[^/]+/o", url.path):
                return self._upload(query, body)
            path = re.sub("^/download", "", url.path)
            if match := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/rewriteTo/b/[^/]+/o/([^/]+)", path):
                source, target = map(urllib.parse.unquote, match.groups())
                self._put(target, self.server.objects[source][0])
                return self._json({"done": True, "resource": self._resource(target)})
            if match := re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)", path):
                return self._object(urllib.parse.unquote(match[1]), query)
            if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
                return self._list(query)
            return self._json({"name": BUCKET, "locationType": "region", "storageClass": "STANDARD"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _object(self, name: str, query: dict):
        content, generation = self.server.objects.get(name, (None, 0))
        if self._fails(query, generation):
            return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        if content is None:
            return self._json({"error": {"code": 404, "message": f"No such object: {BUCKET}/{name}"}}, 404)
        if self.command == "DELETE":
            del self.server.objects[name]
            return self._send(204, b"")
        if query.get("alt") != "media":
            return self._json(self._resource(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(304, b"", {"x-goog-generation": str(generation)})
        headers, status = {"x-goog-generation": str(generation)}, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            start = int(match[1]) if match[1] else size - int(match[2])
            stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
            if start >= size and size:
                return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            content, status = content[start:stop], 206
        self._send(status, content, headers)

    def _list(self, query: dict):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names, prefixes = [], set()
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                names.append(name)
        items = [self._resource(name) for name in names[: int(query.get("maxResults", 10**9))]]
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, query: dict, body: bytes):
        kind = query["uploadType"]
        if kind == "resumable" and "upload_id" not in query:
            number = str(next(self.server.numbers))
            self.server.uploads[number] = query.get("name") or json.loads(body)["name"], bytearray()
            location = f"{self.server.address}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            return self._send(200, b"", {"Location": location})
        if kind == "resumable":
            name, received = self.server.uploads[query["upload_id"]]
            received += body
            if self.headers["Content-Range"].endswith("/*"):
                return self._send(308, b"", {"Range": f"bytes=0-{len(received) - 1}"})
            content = bytes(received)
        elif kind == "multipart":
            about, content = _parts(body, self.headers["Content-Type"])
            name = json.loads(about)["name"]
        else:
            name, content = query["name"], body
        if self._fails(query, self.server.objects.get(name, (b"", 0))[1]):
            return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
        self._put(name, content)
        self._json(self._resource(name))

    def _batch(self, body: bytes):
        boundary = "answers"
        answers = []
        for path in re.findall(rb"DELETE \S*?/storage/v1/b/[^/]+/o/(\S+) HTTP", body):
            name = urllib.parse.unquote(path.decode().split("?")[0])
            status = b"204 No Content" if self.server.objects.pop(name, None) else b"404 Not Found"
            answers.append(b"--answers\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 " + status + b"\r\n\r\n\r\n")
        content = b"".join(answers) + b"--answers--"
        self._send(200, content, {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def _fails(self, query: dict, generation: int) -> bool:
        return "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation

    def _put(self, name: str, content: bytes):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.server.objects[name] = content, next(self.server.numbers)
        self.server.times[name] = now.replace("+00:00", "Z")

    def _resource(self, name: str) -> dict:
        content, generation = self.server.objects[name]
        time = self.server.times.get(name, "2026-01-01T00:00:00.000Z")
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "updated": time, "timeCreated": time,
            "storageClass": "STANDARD", "contentType": "application/octet-stream",
        }  # fmt: skip

    def _json(self, value: dict, status: int = 200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _parts(body: bytes, content_type: str) -> list[bytes]:
    """Of multipart/related, as they were sent: Python's `email` would take them for text."""
    boundary = re.search(r"boundary=[\"']?([^\"';]+)", content_type)[1].encode()
    contents = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + boundary)[1:-1]]
    return [re.sub(rb"\r?\n\Z", b"", content) for content in contents]
