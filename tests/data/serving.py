"""A folder behind http://, by a server that sends byte ranges or by one that does not."""

import contextlib
import http.server
import os
import re
import threading
from functools import partial
from typing import ClassVar


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own: the whole file, whatever range is requested."""

    protocol_version = "HTTP/1.0"  # a connection ends with its request, and so with the server
    requests: ClassVar[list] = []  # one server at a time

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        super().do_GET()


class Ranges(Plain):
    """Byte ranges and ETags, as object storage has them."""

    def do_GET(self):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if match is None or not os.path.isfile(path):
            return super().do_GET()
        self.requests.append((self.path, match[0]))
        first, last = int(match[1]), int(match[2])
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{os.path.getsize(path)}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self):
        path = self.translate_path(self.path)
        if os.path.isfile(path):
            status = os.stat(path)
            self.send_header("ETag", f'"{status.st_size}-{status.st_mtime_ns}"')
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@contextlib.contextmanager
def served(folder, handler=Ranges):
    """The URL of a folder; ``handler.requests`` has (path, range) of each request."""
    handler.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
