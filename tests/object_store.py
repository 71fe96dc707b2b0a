"""An S3-compatible server on the loopback address that counts what is fetched, stops in the middle of a body, and
can be stopped and started again."""

import threading
from collections import Counter
from pathlib import Path

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Silent(WSGIRequestHandler):
    """Prints no line for each request."""

    def log(self, type: str, message: str, *args: object) -> None:
        pass


class Store:
    """The server; what is in it outlasts :meth:`stop`."""

    def __init__(self) -> None:
        self.gets: Counter[str] = Counter()
        self.reached = threading.Event()
        """Half of the object of :meth:`hold` was sent."""
        self._held, self._go_on = "", threading.Event()
        self._application = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.start()
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Begin to answer, at the same address as before."""
        self._server = make_server("127.0.0.1", self._port, self._answer, threaded=True, request_handler=Silent)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def hold(self, part: str) -> None:
        """Send half of the next object whose path has this part."""
        self.reached.clear()
        self._go_on.clear()
        self._held = part

    def let_go(self) -> None:
        """Send the other half."""
        self._held = ""
        self._go_on.set()

    def client(self):
        """For what the test puts there itself."""
        return boto3.client("s3", endpoint_url=self.address)

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """Put a folder into a new bucket."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")

    def set_environment(self, patch: pytest.MonkeyPatch) -> None:
        """Make it the store of this process and of those that it starts."""
        for name, value in (ENVIRONMENT | {"S3_ENDPOINT_URL": self.address}).items():
            patch.setenv(name, value)

    def _answer(self, environ, respond):
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET":
            self.gets[path] += 1
        answer = self._application(environ, respond)
        if not self._held or self._held not in path:
            return answer
        body = b"".join(answer)

        def halves():
            yield body[: len(body) // 2]
            self.reached.set()
            self._go_on.wait(60)
            yield body[len(body) // 2 :]

        return halves()
