"""A store of objects on loopback: S3, Google Cloud Storage and Azure to read, S3 to write."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Literal
from urllib.parse import parse_qs, unquote


@dataclass
class ObjectStore:
    """Objects by bucket and key; the requests that came are kept as method, path and range."""

    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    refuses: HTTPStatus | None = None

    def environment(self) -> dict[str, str]:
        """What the clients of all three want to know."""
        url = f"http://127.0.0.1:{self.port}"
        google = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**google, "private_key_id": ""}),
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ENDPOINT": url,
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_SKIP_SIGNATURE": "true",
        }


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Serve an empty store until the end of the block."""
    store = ObjectStore()

    class Handler(_Handler):
        served = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.port = server.server_port
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives its request
    served: ObjectStore

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_PUT(self) -> None:
        place = unquote(self.path.partition("?")[0])
        self.served.requests.append(("PUT", place, None))
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.served.refuses is not None:
            self._send(self.served.refuses, {}, b"<Error/>")
            return
        self.served.objects[place] = data
        self._send(HTTPStatus.OK, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, b"")

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, method: Literal["HEAD", "GET"]) -> None:
        place = unquote(self.path.partition("?")[0])
        asked = self.headers.get("range")
        self.served.requests.append((method, place, asked))
        data = self.served.objects.get(place)
        if self.served.refuses is not None:
            self._send(self.served.refuses, {}, b"<Error/>")
        elif "list-type=2" in self.path:
            self._list(place)
        elif data is None:
            self._send(HTTPStatus.NOT_FOUND, {}, b"<Error/>")
        else:
            self._give(method, data, asked)

    def _list(self, bucket: str) -> None:
        prefix = parse_qs(self.path.partition("?")[2]).get("prefix", [""])[0]
        keys = [one.removeprefix(f"{bucket}/") for one in sorted(self.served.objects)]
        found = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f'<ETag>"x"</ETag><Size>1</Size></Contents>'
            for key in keys
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self._send(HTTPStatus.OK, {"Content-Type": "application/xml"}, text.encode())

    def _give(self, method: str, data: bytes, asked: str | None) -> None:
        headers = {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
            "Accept-Ranges": "bytes",
        }
        status, body = HTTPStatus.OK, data
        if asked:
            first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
            body = data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(data)}"
            status = HTTPStatus.PARTIAL_CONTENT
        self._send(status, headers, body, with_body=method == "GET")

    def _send(
        self, status: HTTPStatus, headers: dict[str, str], body: bytes, *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with suppress(BrokenPipeError, ConnectionResetError):  # a client may have seen enough
                self.wfile.write(body)
