"""download_octmnist.py against a local file server.

Files that arrive whole, cut short, as another file, not at all, or silently; refused connections.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download_octmnist
import utils
from conftest import POSIX, ROOT, assert_one_sentence, run_script
from runs import UserError

import pytest

CONTENT = bytes(range(256)) * 2_000  # 512 kB: more than the buffers of a connection hold
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Answers by the path that is asked for; counts the requests in `server.n_requests`."""

    def do_GET(self):
        self.server.n_requests += 1
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/silent":
            return self.server.finished.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        parts = {"/whole": CONTENT, "/other": CONTENT[::-1]}
        try:
            self.wfile.write(parts.get(self.path, CONTENT[:100_000]))
            if self.path == "/stuck":
                self.server.finished.wait()
        except ConnectionError:
            pass  # the client looks for redirections first, without reading on

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
    server.finished.set()
    server.shutdown()
    server.server_close()


def download(root, url, md5=MD5):
    flags = ["-root", str(root), "-url", url, "-md5", md5]
    return download_octmnist.main(download_octmnist.make_parser().parse_args(flags))


def test_fetches_once_then_only_verifies(server, tmp_path, capsys):
    path = download(tmp_path / "data", f"{server.url}/whole")
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path / "data") == ["octmnist.npz"]
    n_requests, written = server.n_requests, path.stat().st_mtime_ns
    download(tmp_path / "data", f"{server.url}/whole")
    assert (server.n_requests, path.stat().st_mtime_ns) == (n_requests, written)
    output = capsys.readouterr()
    assert "fetched" in output.out and "here already" in output.out
    assert output.err == ""


FAILURES = {
    "/truncated": "100,000 bytes",
    "/other": "another file",
    "/missing": "Not Found",
    "/silent": "timed out",
}


@pytest.mark.parametrize("page, reason", FAILURES.items())
def test_failure_says_what_to_do_and_leaves_nothing(server, tmp_path, monkeypatch, page, reason):
    monkeypatch.setattr(download_octmnist, "TIMEOUT", 0.5)
    with pytest.raises(UserError, match=rf"(?s){reason}.*by hand.*make sample") as caught:
        download(tmp_path, server.url + page)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []
    assert socket.getdefaulttimeout() is None


def test_refused_connection_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/octmnist.npz"
    flags = ("-root", tmp_path / "data", "-url", url)
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    process = run_script("download_octmnist.py", *flags, env=environment)
    assert_one_sentence(process)
    assert "refused" in process.stderr and "make sample" in process.stderr
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("url", ["nonsense", "ftp://", "http://[", "gopher://x/y"])
def test_bad_url(tmp_path, url):
    with pytest.raises(UserError, match="by hand"):
        download(tmp_path, url)


def test_damaged_file_is_reported_and_kept(server, tmp_path):
    (tmp_path / "octmnist.npz").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"damaged or another file.*delete it"):
        download(tmp_path, f"{server.url}/whole")
    assert (tmp_path / "octmnist.npz").read_bytes() == CONTENT[:-1] and server.n_requests == 0


def test_root_that_is_a_file(server, tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="cannot write"):
        download(tmp_path / "data", f"{server.url}/whole")


@POSIX
def test_killed_half_way(server, tmp_path):
    flags = ["-root", str(tmp_path), "-url", f"{server.url}/stuck"]
    process = subprocess.Popen([sys.executable, str(ROOT / "download_octmnist.py"), *flags])
    deadline = time.monotonic() + 30
    while not any(file.stat().st_size for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "octmnist.npz").exists()
    download(tmp_path, f"{server.url}/whole")
    assert os.listdir(tmp_path) == ["octmnist.npz"]


def test_defaults_are_medmnists():
    args = download_octmnist.make_parser().parse_args([])
    assert args.md5 == utils.OCTMNIST_MD5
    assert args.url.split("?")[0].endswith("/octmnist.npz")
