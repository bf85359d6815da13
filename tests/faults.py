"""Everything that can go wrong, tried on the real command lines: a table of faults and what became of each.

    python tests/faults.py                      all of them, about ten minutes
    python tests/faults.py data notebook_run    some: data flag download speech output run notebook_run

Each fault must end in one sentence on stderr and exit status 2, or, where the damage is harmless or a run was killed,
in the same numbers as an undamaged, uninterrupted run; never in a traceback or a half-written file. Prints a line per
fault and the count; exit status 1 if any failed. Everything happens in a temporary folder.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, oct_arrays
from test_download import CONTENT, MD5, Server
from test_q3 import write_corpus

import utils
from make_report import update_readme

Q2_FLAGS = ("-epochs", 30, "-optimizer", "adam")
ROWS = []


def start(script, *arguments, **environment):
    """Start a script of the project in a process group of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    settings = {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, **pipes)


def kill(process):
    """kill -9, its workers or its Jupyter kernel with it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
    process.communicate()


def report(group, fault, passed, what):
    ROWS.append((group, bool(passed)))
    print(f"{'ok  ' if passed else 'FAIL'}  {group:12}  {fault:44}  {what[:150]}", flush=True)


def expect_sentence(group, fault, script, *arguments, out=None, **environment):
    """The fault must end in one sentence and status 2, leaving nothing half-written in `out`."""
    process = start(script, *arguments, **environment)
    stdout, stderr = process.communicate()
    sentences = [line for line in stderr.splitlines() if line.strip()]
    left = [path.name for path in Path(out).rglob(".*")] if out else []
    passed = process.returncode == 2 and len(sentences) == 1 and "Traceback" not in stdout + stderr and not left
    report(group, fault, passed, sentences[-1] if sentences else f"status {process.returncode}, silent")


def same_numbers(a, b):
    """Whether two results files hold the same epochs and test metrics, times aside."""

    def numbers(path):
        result = json.loads(path.read_text())
        rows = [*result["epochs"], result["test"]]
        rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        return rows, result["status"], result.get("examples")

    return numbers(a) == numbers(b)


# ------------------------------------------------------------------------------------------------------------ faults
def data_faults(folder):
    good = folder / "good"
    whole, rng = (good / "octmnist.npz").read_bytes(), random.Random(0)

    def try_content(fault, content, harmless=False):
        bad = folder / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        (bad / "octmnist.npz").write_bytes(content)
        arguments = ("hw2-q2.py", "-data", bad, "-out", folder / "out", "-epochs", 1)
        with contextlib.suppress(utils.UserError):
            splits, _ = utils.load_oct_data(bad)
            expected, _ = utils.load_oct_data(good)
            same = all((splits[s][i] == expected[s][i]).all() for s in splits for i in (0, 1))
            return report("data", fault, harmless and same, "harmless: every image and label was read unchanged")
        expect_sentence("data", fault, *arguments, out=folder / "out")

    def arrays(**changes):
        with tempfile.TemporaryFile() as file:
            np.savez(file, **oct_arrays() | changes)
            file.seek(0)
            return file.read()

    expect_sentence("data", "missing file", "hw2-q2.py", "-data", folder / "nowhere", "-out", folder / "out")
    (folder / "dir" / "octmnist.npz").mkdir(parents=True)
    expect_sentence("data", "a folder of that name", "hw2-q2.py", "-data", folder / "dir", "-out", folder / "out")
    try_content("empty file", b"")
    try_content("text file", b"not an npz")
    for cut in sorted(rng.sample(range(1, len(whole)), 10)):
        try_content(f"truncated at byte {cut:,}", whole[:cut])
    for position in sorted(rng.sample(range(len(whole)), 10)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.randrange(8)
        try_content(f"bit flipped in byte {position:,}", bytes(flipped), harmless=True)
    try_content("float images", arrays(train_images=np.zeros((60, 28, 28))))
    try_content("images with NaN", arrays(train_images=np.full((60, 28, 28), np.nan, np.float32)))
    try_content("images of 32 x 32", arrays(test_images=np.zeros((20, 32, 32), np.uint8)))
    try_content("a label 9", arrays(val_labels=np.full((20, 1), 9, np.uint8)))
    try_content("an empty split", arrays(val_images=np.zeros((0, 28, 28), np.uint8)))
    try_content("pickled objects", arrays(train_images=np.array([{}], dtype=object)))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 28, 28), }"
    with zipfile.ZipFile(folder / "huge.npz", "w") as file:
        file.writestr("train_images.npy", header.ljust(127) + b"\n")
    try_content("a header that claims 78 TB", (folder / "huge.npz").read_bytes())


def flag_faults(folder):
    for flags in (
        "-epochs 0",
        "-learning_rate nan",
        "-dropout 1.5",
        "-batch_size 0",
        "-optimizer none",
        "-device cuda",
    ):
        expect_sentence("flags", flags, "hw2-q2.py", "-data", folder / "good", "-out", folder / "out", *flags.split())
    for script, flags in (("q1_linear_attention.py", "-n_terms 2"), ("make_sample_data.py", "-n_clips 0")):
        expect_sentence("flags", f"{script} {flags}", script, "-out", folder / "out", *flags.split())
    for name, value in (("EPOCHS", "many"), ("DECODERS", "gru"), ("DATA", folder / "nowhere"), ("DROPOUT", 2)):
        settings = {"OUT": folder / "out", name: value}
        expect_sentence("notebook", f"{name}={Path(str(value)).name}", "run_notebook.py", **settings)


def speech_faults(folder):
    def try_corpus(group, fault, change):
        corpus = folder / "speech"
        shutil.rmtree(corpus, ignore_errors=True)
        change(write_corpus(corpus))
        expect_sentence(group, fault, "run_notebook.py", DATA=corpus, OUT=folder / "out", EPOCHS=1)

    def rows(root, change):
        lines = (root / "metadata.csv").read_text().splitlines()
        (root / "metadata.csv").write_bytes("\n".join(change(lines)).encode("latin-1"))

    clip = "wavs/LJ001-0002.wav"
    try_corpus("audio", "zero length", lambda root: soundfile.write(root / clip, np.zeros(0), 22_050))
    try_corpus("audio", "a text file named .wav", lambda root: (root / clip).write_text("hello"))
    try_corpus("audio", "an empty file", lambda root: (root / clip).write_bytes(b""))
    try_corpus("audio", "a missing clip", lambda root: (root / clip).unlink())
    try_corpus("metadata", "two columns", lambda root: rows(root, lambda lines: [*lines[:3], "LJ001-0003|x"]))
    try_corpus("metadata", "a double id", lambda root: rows(root, lambda lines: [*lines, lines[0]]))
    try_corpus("metadata", "an empty transcript", lambda root: rows(root, lambda lines: [*lines[:4], "LJ001-0004|x|"]))
    try_corpus("metadata", "not UTF-8", lambda root: rows(root, lambda lines: [*lines, "LJ001-0000|é|é"]))
    try_corpus("metadata", "missing", lambda root: (root / "metadata.csv").unlink())
    try_corpus("metadata", "a clip outside the corpus", lambda root: rows(root, lambda x: [*x, "../../etc/passwd|x|x"]))

    def accepted(group, fault, change):
        """Unusual but sound: the same clips and texts must be read; the sound within a 16-bit file's rounding."""
        corpora = []
        for name in ("usual", "unusual"):
            shutil.rmtree(folder / name, ignore_errors=True)
            corpora.append(write_corpus(folder / name))
        change(corpora[1])
        (usual, _), (unusual, _) = utils.load_ljspeech(folder / "usual"), utils.load_ljspeech(folder / "unusual")
        same = all([row[:2] for row in usual[s]] == [row[:2] for row in unusual[s]] for s in usual)
        a, b = utils.read_audio(corpora[0] / clip), utils.read_audio(corpora[1] / clip)
        same &= abs(len(a) - len(b)) <= 1 and (a[100:4000] - b[100:4000]).abs().max() < 0.02
        report(group, fault, same, "accepted: the same texts and sound")

    def convert(root, rate=22_050, channels=1, subtype="PCM_16"):
        seconds = np.arange(6300 * rate // 22_050) / rate
        tone = 0.5 * np.sin(2 * np.pi * 250 * seconds)  # as write_corpus has it
        soundfile.write(root / "wavs/LJ001-0001.wav", np.stack([tone] * channels, axis=1), rate, subtype=subtype)

    clip = "wavs/LJ001-0001.wav"
    accepted("audio", "8 bits a sample", lambda root: convert(root, subtype="PCM_U8"))
    accepted("audio", "stereo", lambda root: convert(root, channels=2))
    accepted("audio", "48 kHz", lambda root: convert(root, rate=48_000))
    accepted("metadata", "CRLF line ends", lambda root: rows(root, lambda lines: [line + "\r" for line in lines]))
    bom = "\ufeff".encode().decode("latin-1")
    accepted("metadata", "a byte-order mark", lambda root: rows(root, lambda lines: [bom + lines[0], *lines[1:]]))

    shutil.rmtree(folder / "speech", ignore_errors=True)
    root = write_corpus(folder / "speech")
    quoted = '"He said ""yes""", he said'
    rows(root, lambda lines: [f"LJ001-0000|x|{quoted}", *lines[1:]])
    first = utils.load_ljspeech(folder / "speech")[0]["train"][0][1]
    report("metadata", "quotes in a transcript", first == quoted, "accepted: read as they stand")


def download_faults(folder):
    """The real command line against a server on this machine."""
    os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.n_requests, server.finished = 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, url = folder / "fetched", f"http://127.0.0.1:{server.server_port}"
    flags = ("download_octmnist.py", "-root", root, "-md5", MD5, "-url")
    for fault, page in (("cut short", "/truncated"), ("another file", "/other"), ("not found", "/missing")):
        expect_sentence("download", fault, *flags, url + page, out=root)
    expect_sentence("download", "refused", *flags, "http://127.0.0.1:9/octmnist.npz", out=root)
    for round_ in range(2):
        process = start(*flags, f"{url}/stuck")
        while not list(root.glob(".octmnist*")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        process = start(*flags, f"{url}/whole")
        process.communicate()
        whole = process.returncode == 0 and os.listdir(root) == ["octmnist.npz"]
        whole = whole and (root / "octmnist.npz").read_bytes() == CONTENT
        report("download", f"killed half-way, round {round_ + 1}", whole, "the next call fetched it and tidied up")
        (root / "octmnist.npz").unlink()
    server.finished.set()
    server.shutdown()


def output_faults(folder):
    (folder / "file").write_text("")
    good = ("-data", folder / "good", "-epochs", 1)
    expect_sentence("output", "the folder is a file", "hw2-q2.py", *good, "-out", folder / "file")
    expect_sentence("output", "the folder is read-only (/proc)", "hw2-q2.py", *good, "-out", "/proc/out")
    expect_sentence("output", "report: nothing there", "make_report.py", "-out", folder / "nothing-here")
    disk = folder / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)], capture_output=True)
    if mount.returncode == 0:  # needs root
        expect_sentence("output", "full disk while training", "hw2-q2.py", *good, "-out", disk, out=disk)
        expect_sentence("output", "full disk while speaking", "make_sample_data.py", "-out", disk, "-n_clips", 50)
        subprocess.run(["umount", str(disk)], check=True)


def run_faults(folder):
    """Damaged leftovers, kill -9 and resume, two runs at once."""
    name, q2 = "q2-maxpool-lr0.01-seed42-epochs30-optimizeradam", ("hw2-q2.py", "-data", folder / "good", *Q2_FLAGS)
    start(*q2, "-out", folder / "whole").communicate()
    truth = folder / "whole" / "results" / f"{name}.json"
    checkpoint = folder / "damaged" / "checkpoints" / f"{name}.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"PK damaged")
    expect_sentence("resume", "Q2: damaged checkpoint", *q2, "-out", folder / "damaged")
    cut = folder / "cut" / "results" / "q1.json"
    cut.parent.mkdir(parents=True)
    cut.write_text('{"question": "q1", "ru')
    expect_sentence("report", "a result cut short", "make_report.py", "-out", folder / "cut")

    for round_ in range(5):
        out = folder / f"killed-{round_}"
        process = start(*q2, "-out", out)
        while not list(out.glob("results/q2*.json")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.random())
        kill(process)
        start(*q2, "-out", out).communicate()
        report(
            "resume",
            f"Q2: kill -9, round {round_ + 1}",
            same_numbers(out / "results" / f"{name}.json", truth),
            "same numbers",
        )
    pair = [start(*q2, "-out", folder / "pair") for _ in range(2)]
    outputs = [process.communicate() for process in pair]
    same = same_numbers(folder / "pair" / "results" / f"{name}.json", truth)
    report(
        "at once",
        "Q2: two runs into one folder",
        same and not any("Traceback" in e for _, e in outputs),
        "same numbers",
    )


def notebook_run_faults(folder):
    """The notebook: a damaged checkpoint, kill -9 and resume."""
    shutil.rmtree(folder / "speech", ignore_errors=True)
    write_corpus(folder / "speech")
    q3 = {"DATA": folder / "speech", "DECODERS": "lstm", "EPOCHS": 12, "DEVICE": "cpu"}
    start("run_notebook.py", OUT=folder / "whole", **q3).communicate()
    (folder / "damaged" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "damaged" / "checkpoints" / "q3-lstm.pt").write_bytes(b"PK damaged")
    expect_sentence("resume", "Q3: damaged checkpoint", "run_notebook.py", OUT=folder / "damaged", **q3)
    for round_ in range(5):
        out = folder / f"q3-killed-{round_}"
        process = start("run_notebook.py", OUT=out, **q3)
        while not (out / "results" / "q3-lstm.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.random())
        kill(process)
        start("run_notebook.py", OUT=out, **q3).communicate()
        same = same_numbers(out / "results" / "q3-lstm.json", folder / "whole" / "results" / "q3-lstm.json")
        report("resume", f"Q3: kill -9, round {round_ + 1}", same, "same numbers")


def main():
    groups = (data_faults, flag_faults, download_faults, speech_faults, output_faults, run_faults, notebook_run_faults)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good").mkdir()
        np.savez_compressed(Path(folder) / "good" / "octmnist.npz", **oct_arrays())
        for faults in groups:
            if not sys.argv[1:] or faults.__name__.removesuffix("_faults") in sys.argv[1:]:
                faults(Path(folder))
    handled = sum(passed for _, passed in ROWS)
    print(f"{handled} of {len(ROWS)} faults handled")
    if not sys.argv[1:]:
        groups = ", ".join(f"{n} {group}" for group, n in Counter(group for group, _ in ROWS).items())
        line = f"Last complete run of `make faults`: {handled} of {len(ROWS)} faults handled ({groups})."
        update_readme("faults", "make faults", line)
    sys.exit(handled < len(ROWS))


if __name__ == "__main__":
    main()
