"""gtsa explore in a process of its own, and questions to its server."""

import http.client
import json
import re
import signal
import time
from contextlib import contextmanager
from urllib.parse import urlencode

from forking import fork

PATIENCE = 120  # seconds


class Server:
    """A started explorer."""

    def __init__(self, process):
        self.process = process
        address = r"^(http://127\.0\.0\.1:(\d+)/\?token=(\S+))\n"
        self.wait(lambda: re.search(address, self.output, re.MULTILINE) or process.poll() is not None)
        found = re.search(address, self.output, re.MULTILINE)
        assert found, process.communicate()
        self.url, self.port, self.token = found[1], int(found[2]), found[3]

    @property
    def output(self):
        """What it has printed so far."""
        return self.process.printed()

    def wait(self, condition):
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, self.output
            time.sleep(0.05)

    def get(self, path, /, host=None, cookie=None, **query):
        """(status, headers, content) of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"Host": host or f"127.0.0.1:{self.port}", **({"Cookie": cookie} if cookie else {})}
        connection.request("GET", f"{path}?{urlencode(query)}", headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def ask(self, what, /, **query):
        """An answer in JSON."""
        status, _, content = self.get(f"/api/{what}", token=self.token, **query)
        assert status == 200, content
        return json.loads(content)

    def finish(self):
        """Waits until all features are computed."""
        self.wait(lambda: self.ask("progress")["finished"])
        return self.ask("progress")

    def stop(self):
        """Ctrl-C; the exit code and what stderr says."""
        self.process.send_signal(signal.SIGINT)
        _, error = self.process.communicate(PATIENCE)
        return self.process.returncode, error


@contextmanager
def explorer(*arguments):
    process = fork("explore", *arguments, "--no-browser")
    try:
        server = Server(process)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(PATIENCE)
            assert process.returncode == 130 and "stopped" in error and "Traceback" not in error, error
