"""download_octmnist.py against a local file server: whole, cut, missing and silent files."""

import hashlib
import os
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download_octmnist
from runs import UserError

import pytest

CONTENT = bytes(range(256)) * 2_000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Answers by the path that is asked for."""

    def do_GET(self):
        self.server.n_requests += 1
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/silent":
            return self.server.finished.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        with suppress(ConnectionError):  # the client looks for redirections first, reading nothing
            self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:100_000])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.n_requests = 0
    server.finished = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    socket.setdefaulttimeout(None)
    server.finished.set()
    server.shutdown()
    server.server_close()


def download(root, url):
    flags = ["-root", str(root), "-url", url, "-md5", MD5]
    return download_octmnist.main(download_octmnist.make_parser().parse_args(flags))


def test_fetches_once_then_only_verifies(server, tmp_path, capsys):
    path = download(tmp_path / "data", f"{server.url}/whole")
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path / "data") == ["octmnist.npz"]
    n_requests = server.n_requests
    download(tmp_path / "data", f"{server.url}/whole")
    assert server.n_requests == n_requests
    output = capsys.readouterr().out
    assert "fetched" in output and "here already" in output


FAILURES = {
    "SERVER/cut": "corrupted",
    "SERVER/missing": "Not Found",
    "SERVER/silent": "timed out",
    "http://127.0.0.1:9/octmnist.npz": "refused",
    "nonsense": "unknown url type",
}


@pytest.mark.parametrize("url, reason", FAILURES.items())
def test_failure_says_what_to_do_and_leaves_nothing(server, tmp_path, monkeypatch, url, reason):
    monkeypatch.setattr(download_octmnist, "TIMEOUT", 0.5)
    with pytest.raises(UserError, match=rf"{reason}.*by hand.*make sample"):  # in one line
        download(tmp_path, url.replace("SERVER", server.url))
    assert os.listdir(tmp_path) == []


def test_what_another_process_is_still_fetching_is_left_alone(server, tmp_path):
    partial = tmp_path / ".octmnist-1.npz"
    partial.write_bytes(CONTENT[:1000])
    download(tmp_path, f"{server.url}/whole")
    assert partial.read_bytes() == CONTENT[:1000]


def test_damaged_file_is_reported_and_kept(server, tmp_path):
    (tmp_path / "octmnist.npz").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"damaged or another file.*delete it"):
        download(tmp_path, f"{server.url}/whole")
    assert (tmp_path / "octmnist.npz").read_bytes() == CONTENT[:-1] and server.n_requests == 0


def test_root_that_is_a_file_is_not_the_connections_fault(tmp_path):
    """`runs.run_script` makes a sentence of it that names the folder."""
    (tmp_path / "data").touch()
    with pytest.raises(FileExistsError, match="data"):
        download(tmp_path / "data", "http://127.0.0.1:9/octmnist.npz")
