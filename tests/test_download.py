"""Both downloads: what arrives is whole and right, and a failure leaves nothing behind."""

import functools
import hashlib
import os
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download_octmnist
import utils
from conftest import write_corpus
from runs import UserError
from tools import download_ljspeech

import pytest

CONTENT = bytes(range(256)) * 2_000


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The address of a server with two files, one of them cut short."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_octmnist, "MD5", hashlib.md5(CONTENT).hexdigest())
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "whole").write_bytes(CONTENT)
    (folder / "cut").write_bytes(CONTENT[:100_000])
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download(root, url):
    flags = ["-root", str(root), "-url", url]
    download_octmnist.main(download_octmnist.make_parser().parse_args(flags))


def test_it_is_fetched_once_and_then_only_checked(mirror, tmp_path):
    folder = tmp_path / "new" / "data"
    download(folder, f"{mirror}/whole")
    assert os.listdir(folder) == ["octmnist.npz"]
    download(folder, "http://127.0.0.1:9/nobody-is-asked")
    assert (folder / "octmnist.npz").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url, reason",
    [
        ("MIRROR/cut", "cut is not OCTMNIST"),
        ("MIRROR/missing", "404: File not found"),
        ("SILENT/octmnist.npz", "timed out"),
        ("nonsense", "unknown url type"),
    ],
)
def test_failure_says_what_to_do_and_leaves_nothing(mirror, tmp_path, monkeypatch, url, reason):
    monkeypatch.setattr(download_octmnist, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        url = url.replace("MIRROR", mirror).replace("SILENT", address)
        with pytest.raises(UserError, match=rf"{reason}.*; try again"):  # in one line
            download(tmp_path / "data", url)
    assert os.listdir(tmp_path / "data") == []


def test_damaged_file_is_reported_and_kept(mirror, tmp_path):
    (tmp_path / "octmnist.npz").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"octmnist\.npz is not OCTMNIST .* delete it"):
        download(tmp_path, f"{mirror}/whole")
    assert (tmp_path / "octmnist.npz").read_bytes() == CONTENT[:-1]


def test_a_root_that_is_a_file_is_not_taken_for_a_failed_download(mirror, tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match=r"data: File exists; check that path"):
        download(tmp_path / "data", f"{mirror}/whole")


# --------------------------------------------------------------------------------------- LJ Speech
def test_download_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    """torchaudio unpacks in place, and takes any folder of that name to be complete."""
    calls = []

    def fetch(root, download):
        calls.append(sorted(path.name for path in Path(root).iterdir()))
        (Path(root) / "archive").touch()
        write_corpus(Path(root), 4)
        if len(calls) == 1:
            raise RuntimeError("connection\nlost")

    monkeypatch.setattr("torchaudio.datasets.LJSPEECH", fetch)
    with pytest.raises(UserError, match=r"connection lost.*by hand"):
        download_ljspeech.download_ljspeech(tmp_path / "data")
    assert not (tmp_path / "data" / "LJSpeech-1.1").exists()
    download_ljspeech.download_ljspeech(tmp_path / "data")
    assert calls == [[], ["archive"]] and os.listdir(tmp_path / "data") == ["LJSpeech-1.1"]
    assert utils.load_ljspeech(tmp_path / "data")[1]["counts"]["train"] == 2


def test_an_archive_that_is_cut_short_is_one_sentence(tmp_path):
    (tmp_path / "LJSpeech-download").mkdir()
    (tmp_path / "LJSpeech-download" / "LJSpeech-1.1.tar.bz2").write_bytes(b"BZh9 cut short")
    with pytest.raises(UserError, match="LJSpeech-download, or place"):
        download_ljspeech.download_ljspeech(tmp_path)
    assert os.listdir(tmp_path) == ["LJSpeech-download"]
