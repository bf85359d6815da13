"""Everything that can go wrong, tried on the real command lines: a table of faults and outcomes.

    python tests/faults.py                      all of them, about a quarter of an hour
    python tests/faults.py data notebook_run    some: data flag download speech group output name
                                                surroundings stop run speaking notebook_run

Each fault must end in one sentence on stderr and exit status 2, or, where the damage is harmless or
a run was killed, in the same numbers as an undamaged, uninterrupted run; never in a traceback or a
half-written file. Prints a line per fault and the count; exit status 1 if any failed. What a system
lacks (another user, a full device) is left out and said. Everything happens in a temporary folder.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from conftest import ROOT, oct_arrays, restore_interrupts, write_corpus
from runs import UserError
from tools.make_report import update_readme

import numpy as np
import psutil
import soundfile
from test_download import CONTENT, MD5, Server

Q1 = "q1_linear_attention.py"
Q2 = "hw2-q2.py"
NOTEBOOK = "tools.run_notebook"
SAMPLE = "tools.make_sample_data"
REPORT = "tools.make_report"
ROWS = []  # (group, passed) of every fault


# ----------------------------------------------------------------------------------------- running
def start(program, *arguments, before=(), after="", cwd=ROOT, **environment):
    """Start a script (a file) or a tool (a module) in a process group of its own.

    `before`: words in front of the command, such as ("nohup",). `after`: what a shell does with it,
    such as "| head -n 1". A variable of the environment that is None is removed.
    """
    words = [program] if program.endswith(".py") else ["-m", program]
    command = [*before, sys.executable, *words, *map(str, arguments)]
    if after:
        command = ["bash", "-o", "pipefail", "-c", f"{shlex.join(command)} {after}"]
    settings = {key: value for key, value in os.environ.items() if key not in environment}
    for key, value in environment.items():
        if value is not None:
            settings[key] = str(value)
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=restore_interrupts if os.name == "posix" else None,
    )


def finish(program, *arguments, **options):
    """Run it to its end; returns (exit status, stdout, stderr)."""
    process = start(program, *arguments, **options)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def kill(process):
    """kill -9, its workers or its Jupyter kernel with it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
    process.communicate()


def wait_for(condition, process):
    """Wait until `condition()` holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def report(group, fault, passed, what):
    """Print the line of one fault, and remember whether it passed."""
    ROWS.append((group, bool(passed)))
    verdict = "ok  " if passed else "FAIL"
    print(f"{verdict}  {group:12}  {fault:44}  {what[:150]}", flush=True)


def skip(group, fault, reason):
    """Say that a fault cannot be tried on this system; it does not count."""
    print(f"-     {group:12}  {fault:44}  not tried: {reason}", flush=True)


def is_one_sentence(status, stdout, stderr):
    """The house rule for every mistake and every stop."""
    sentences = [line for line in stderr.splitlines() if line.strip()]
    return status == 2 and len(sentences) == 1 and "Traceback" not in stdout + stderr


def expect_sentence(group, fault, program, *arguments, out=None, says="", **options):
    """The fault must end in one sentence and status 2, leaving nothing half-written in `out`.

    `says`: words that must be in the sentence.
    """
    status, stdout, stderr = finish(program, *arguments, **options)
    half_written = list(Path(out).rglob(".*")) if out else []
    passed = is_one_sentence(status, stdout, stderr) and says in stderr and not half_written
    sentences = stderr.strip().splitlines()
    what = sentences[-1] if sentences else f"status {status}, silent"
    report(group, fault, passed, what)


def expect_numbers(group, fault, truth, program, *arguments, out, shows="", **options):
    """It must end well, without a word on stderr, in the same numbers as the results file `truth`.

    `shows`: words that must be in the output.
    """
    if program == Q2:
        arguments = (*arguments, "-out", out)
    if program == NOTEBOOK:
        options["OUT"] = out
    status, stdout, stderr = finish(program, *arguments, **options)
    same = same_numbers(Path(ROOT, out) / "results" / truth.name, truth)
    passed = status == 0 and same and not stderr.strip() and shows in stdout
    what = f"same numbers {shows}"
    if not passed:
        what = f"status {status}, same numbers: {same}, stderr: {stderr.strip()[-300:]!r}"
    report(group, fault, passed, what)


def numbers(path):
    """What a results file holds, times aside."""
    result = json.loads(path.read_text())
    rows = []
    for row in [*result["epochs"], result["test"]]:
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    return rows, result["status"], result.get("examples")


def same_numbers(a, b):
    """Whether two results files hold the same epochs, test metrics and examples."""
    return a.exists() and b.exists() and numbers(a) == numbers(b)


# -------------------------------------------------------------------------------------- OCTMNIST
def archive_of(**changes):
    """The bytes of a small octmnist.npz with some arrays changed."""
    with tempfile.TemporaryFile() as file:
        np.savez(file, **{**oct_arrays(), **changes})
        file.seek(0)
        return file.read()


def reads_the_same(folder, other):
    """Whether both folders hold the same images and labels; UserError where one cannot be read."""
    (a, _), (b, _) = utils.load_oct_data(folder), utils.load_oct_data(other)
    for split in a:
        for x, y in zip(a[split], b[split]):
            if not (x == y).all():
                return False
    return True


def as_others_may_read():
    """Words before a command that take root's right to read everything; None where they cannot."""
    if os.name != "posix":
        return None
    if os.geteuid() != 0:
        return ()
    words = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    return words if works(*words) else None


def works(*words):
    """Whether this same Python can be started by these words."""
    command = [*words, sys.executable, "-c", "import sys; print(sys.version, sys.base_prefix)"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return False
    return shown == f"{sys.version} {sys.base_prefix}\n"


def data_faults(folder):
    good = folder / "good"
    whole = (good / "octmnist.npz").read_bytes()
    rng = random.Random(0)
    out = folder / "out"

    def try_content(fault, content, may_be_harmless=False):
        bad = folder / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        (bad / "octmnist.npz").write_bytes(content)
        try:
            same = reads_the_same(bad, good)
        except UserError:
            expect_sentence("data", fault, Q2, "-data", bad, "-out", out, "-epochs", 1, out=out)
        else:
            what = "harmless: every image and label was read unchanged"
            report("data", fault, may_be_harmless and same, what)

    expect_sentence("data", "missing file", Q2, "-data", folder / "nowhere", "-out", out)
    (folder / "dir" / "octmnist.npz").mkdir(parents=True)
    expect_sentence("data", "a folder of that name", Q2, "-data", folder / "dir", "-out", out)
    try_content("empty file", b"")
    try_content("text file", b"not an npz")
    for cut in sorted(rng.sample(range(1, len(whole)), 10)):
        try_content(f"truncated at byte {cut:,}", whole[:cut])
    for position in sorted(rng.sample(range(len(whole)), 10)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.randrange(8)
        try_content(f"bit flipped in byte {position:,}", bytes(flipped), may_be_harmless=True)

    def only_first_two(split, n):
        return {f"{split}_labels": (np.arange(n) % 2).astype(np.uint8)[:, None]}

    two = {**only_first_two("train", 60), **only_first_two("val", 20), **only_first_two("test", 20)}
    (folder / "two").mkdir()
    (folder / "two" / "octmnist.npz").write_bytes(archive_of(**two))
    words = (Q2, "-data", folder / "two", "-out", out, "-epochs", 1)
    lacking = "none of drusen, normal"
    expect_sentence("data", "two classes under its name", *words, out=out, says=lacking)

    locked = folder / "locked" / "octmnist.npz"
    locked.parent.mkdir()
    locked.write_bytes(whole)
    locked.chmod(0)
    fault = "a file that may not be read"
    words = (Q2, "-data", locked.parent, "-out", out, "-epochs", 1)
    if as_others_may_read() is None:
        skip("data", fault, "an account may read everything, and setpriv cannot change that")
    else:
        reason = "(Permission denied); make it readable"
        expect_sentence("data", fault, *words, before=as_others_may_read(), out=out, says=reason)

    nan = np.full((60, 28, 28), np.nan, np.float32)
    try_content("float images", archive_of(train_images=np.zeros((60, 28, 28))))
    try_content("images with NaN", archive_of(train_images=nan))
    try_content("images of 32 x 32", archive_of(test_images=np.zeros((20, 32, 32), np.uint8)))
    try_content("a label 9", archive_of(val_labels=np.full((20, 1), 9, np.uint8)))
    try_content("an empty split", archive_of(val_images=np.zeros((0, 28, 28), np.uint8)))
    try_content("pickled objects", archive_of(train_images=np.array([{}], dtype=object)))
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 28, 28), }"
    header = b"\x93NUMPY\x01\x00v\x00" + shape.encode()
    with zipfile.ZipFile(folder / "huge.npz", "w") as file:
        file.writestr("train_images.npy", header.ljust(127) + b"\n")
    try_content("a header that claims 78 TB", (folder / "huge.npz").read_bytes())


# ------------------------------------------------------------------------------------------- flags
def flag_faults(folder):
    out = folder / "out"
    for flags in (
        "-epochs 0",
        "-learning_rate nan",
        "-dropout 1.5",
        "-batch_size 0",
        "-optimizer none",
        "-device cuda",
        "-device cuda:7",
        "-device cuda:x",
        "-learning_rate best 0.1",
    ):
        folders = ("-data", folder / "good", "-out", out)
        expect_sentence("flags", flags, Q2, *folders, *flags.split())
    for program, flags in ((Q1, "-n_terms 2"), (Q1, "-device cuda:7"), (SAMPLE, "-n_clips 0")):
        expect_sentence("flags", f"{program} {flags}", program, "-out", out, *flags.split())
    nowhere = folder / "nowhere"
    for name, value in (
        ("EPOCHS", "many"),
        ("DECODERS", "gru"),
        ("DATA", nowhere),
        ("DROPOUT", 2),
        ("DEVICE", "cuda:7"),
    ):
        fault = f"{name}={Path(str(value)).name}"
        expect_sentence("notebook", fault, NOTEBOOK, **{"OUT": out, name: value})

    # what belongs to an earlier command: its sentence names that command
    empty, searched, other = folder / "empty", folder / "searched", folder / "other"
    words = (Q2, "-data", folder / "good", "-epochs", 1, "-out")
    search = f"run `python hw2-q2.py -data {folder / 'good'} -out {empty} -learning_rate 0.1 0.01"
    best = ("-learning_rate", "best", "-no_maxpool")
    fault = "best without a search"
    expect_sentence("flags", fault, *words, empty, *best, says=search)
    command = f"run `python hw2-q2.py -data {folder / 'good'} -epochs 1 -out {empty}`"
    fault = "-plot_only without results"
    expect_sentence("flags", fault, *words, empty, "-plot_only", says=command)
    expect_sentence("flags", f"Q1 {fault}", Q1, "-plot_only", "-out", empty, says=f"{Q1} -out")
    other.mkdir()
    (other / "octmnist.npz").write_bytes(archive_of(test_labels=np.ones((20, 1), np.uint8)))
    finish(*words, searched, "-learning_rate", 0.1, 0.01)
    words = (Q2, "-data", other, "-epochs", 1, "-out", searched, *best)
    search = (
        f"other data (octmnist.npz of unknown origin); run `python hw2-q2.py -data {other} -out"
    )
    expect_sentence("flags", "best of a search on other data", *words, says=search)


# ---------------------------------------------------------------------------------------- LJ Speech
def change_rows(root, change):
    """Write metadata.csv with its lines changed by a function."""
    lines = (root / "metadata.csv").read_text().splitlines()
    (root / "metadata.csv").write_bytes("\n".join(change(lines)).encode("latin-1"))


def convert_first_clip(root, rate=22_050, channels=1, subtype="PCM_16"):
    """Write the first clip, which write_corpus makes a tone of 200 Hz, in another format."""
    path = root / "wavs" / "LJ001-0000.wav"
    n_samples = soundfile.info(path).frames
    seconds = np.arange(n_samples * rate // 22_050) / rate
    tone = 0.5 * np.sin(2 * np.pi * 200 * seconds)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate, subtype=subtype)


def reads_like_the_usual(folder, change):
    """Whether a corpus after `change(its root)` has the same clips, texts and (nearly) sound."""
    for name in ("usual", "unusual"):
        shutil.rmtree(folder / name, ignore_errors=True)
        root = write_corpus(folder / name)
    change(root)
    usual, _ = utils.load_ljspeech(folder / "usual")
    unusual, _ = utils.load_ljspeech(folder / "unusual")
    for split, clips in usual.items():
        if [clip[:2] for clip in clips] != [clip[:2] for clip in unusual[split]]:
            return False
    a = utils.read_audio(usual["train"][0][2])
    b = utils.read_audio(unusual["train"][0][2])
    difference = (a[100:4000] - b[100:4000]).abs().max()
    return abs(len(a) - len(b)) <= 1 and difference < 0.02  # a 16-bit file's rounding, resampling


def speech_faults(folder):
    corpus = folder / "speech"

    def refused(group, fault, change, says=""):
        shutil.rmtree(corpus, ignore_errors=True)
        change(write_corpus(corpus))
        q3 = {"DATA": corpus, "OUT": folder / "out", "EPOCHS": 1}
        expect_sentence(group, fault, NOTEBOOK, says=says, **q3)

    def accepted(group, fault, change):
        report(group, fault, reads_like_the_usual(folder, change), "accepted: same texts and sound")

    def row(text):
        return lambda root: change_rows(root, lambda lines: [*lines, text])

    def instead_of_row_3(text):
        return lambda root: change_rows(root, lambda lines: [*lines[:3], text, *lines[4:]])

    clip = "wavs/LJ001-0002.wav"
    silence = np.zeros(0)
    refused("audio", "zero length", lambda root: soundfile.write(root / clip, silence, 22_050))
    refused("audio", "a text file named .wav", lambda root: (root / clip).write_text("hello"))
    refused("audio", "an empty file", lambda root: (root / clip).write_bytes(b""))
    refused("audio", "a missing clip", lambda root: (root / clip).unlink())
    refused("metadata", "two columns", instead_of_row_3("LJ001-0003|x"))
    refused("metadata", "a double id", row("LJ001-0000|x|x"))
    refused("metadata", "an empty transcript", instead_of_row_3("LJ001-0003|x|"))
    refused("metadata", "not UTF-8", row("LJ001-0000|é|é"))
    refused("metadata", "missing", lambda root: (root / "metadata.csv").unlink())
    refused("metadata", "a clip outside the corpus", row("../../etc/passwd|x|x"))

    def with_crlf(lines):
        return [line + "\r" for line in lines]

    def with_mark(lines):
        return ["\ufeff".encode().decode("latin-1") + lines[0], *lines[1:]]

    accepted("audio", "8 bits a sample", lambda root: convert_first_clip(root, subtype="PCM_U8"))
    accepted("audio", "stereo", lambda root: convert_first_clip(root, channels=2))
    accepted("audio", "48 kHz", lambda root: convert_first_clip(root, rate=48_000))
    accepted("metadata", "CRLF line ends", lambda root: change_rows(root, with_crlf))
    accepted("metadata", "a byte-order mark", lambda root: change_rows(root, with_mark))

    def saved_as(encoding, line_end="\n", end=""):
        def change(root):
            text = (root / "metadata.csv").read_text().rstrip("\n") + end
            (root / "metadata.csv").write_bytes(text.replace("\n", line_end).encode(encoding))

        return change

    accepted("metadata", "UTF-16", saved_as("utf-16"))
    accepted("metadata", "line ends of the old Mac", saved_as("utf-8", line_end="\r"))
    accepted("metadata", "blank lines at the end", saved_as("utf-8", end="\n\n\n"))
    unmarked = "looks like UTF-16; save it in the encoding UTF-8"
    refused("metadata", "UTF-16 without a mark", saved_as("utf-16-le"), says=unmarked)

    def cut_in_half(ending):
        def change(root):
            path = root / clip
            samples, rate = soundfile.read(path)
            path.unlink()
            path = path.with_suffix(ending)
            soundfile.write(path, samples, rate)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])

        return change

    first = "wavs/LJ001-0000.wav"

    def with_header(riff, data):
        """The clip as a recorder leaves it that could not write how long it is."""

        def change(root):
            content = bytearray((root / first).read_bytes())
            at = content.index(b"data") + 4
            content[4:8] = riff.to_bytes(4, "little")
            content[at : at + 4] = data.to_bytes(4, "little")
            (root / first).write_bytes(content)

        return change

    def flac_of_unknown_length(root):
        samples, rate = soundfile.read(root / first)
        (root / first).unlink()
        path = (root / first).with_suffix(".flac")
        soundfile.write(path, samples, rate)
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0  # the number of samples: the last 36 bits of these
        content[22:26] = bytes(4)
        path.write_bytes(content)

    def of_rate(hertz):
        return lambda root: soundfile.write(root / clip, np.ones(9000) / 9, hertz)

    def far_too_loud(root):
        soundfile.write(root / clip, np.full(9000, 5e24), 22_050, "FLOAT")

    accepted("audio", "WAV from SoX through a pipe", with_header(0x7FFFF024, 0x7FFFF000))
    accepted("audio", "WAV of a recorder that was killed", with_header(36, 0))
    accepted("audio", "WAV of unknown length", with_header(0xFFFFFFFF, 0xFFFFFFFF))
    accepted("audio", "FLAC of unknown length", flac_of_unknown_length)
    refused("audio", "a sample rate of 1 Hz", of_rate(1), says="a sample rate of 1 Hz")
    refused("audio", "samples of 5e24", far_too_loud, says="far too large")
    refused("audio", "WAV: half, the header whole", cut_in_half(".wav"), says="is cut short")
    refused("audio", "FLAC: half, the header whole", cut_in_half(".flac"), says="LJ001-0002.flac")

    shutil.rmtree(corpus, ignore_errors=True)
    quoted = '"He said ""yes""", he said'
    change_rows(write_corpus(corpus), lambda lines: [f"LJ001-0000|x|{quoted}", *lines[1:]])
    splits, _ = utils.load_ljspeech(corpus)
    _, text, _ = splits["train"][0]
    report("metadata", "quotes in a transcript", text == quoted, "accepted: read as they stand")


# ---------------------------------------------------------------------------------------- download
def download_faults(folder):
    """The real command line against a server on this machine."""
    os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.n_requests = 0
    server.finished = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = folder / "fetched"
    url = f"http://127.0.0.1:{server.server_port}"
    words = ("download_octmnist.py", "-root", root, "-md5", MD5, "-url")
    for fault, page in (
        ("cut short", "truncated"),
        ("another file", "other"),
        ("not found", "missing"),
    ):
        expect_sentence("download", fault, *words, f"{url}/{page}", out=root)
    expect_sentence("download", "refused", *words, "http://127.0.0.1:9/octmnist.npz", out=root)
    for round_ in (1, 2):
        process = start(*words, f"{url}/stuck")
        wait_for(lambda: list(root.glob(".octmnist*")), process)
        kill(process)
        finish(*words, f"{url}/whole")
        file = root / "octmnist.npz"
        whole = os.listdir(root) == [file.name] and file.read_bytes() == CONTENT
        what = "the next call fetched it and tidied up"
        report("download", f"killed half-way, round {round_}", whole, what)
        file.unlink(missing_ok=True)
    server.finished.set()
    server.shutdown()


# ------------------------------------------------------------------------------------------ output
def output_faults(folder):
    (folder / "file").write_text("")
    good = ("-data", folder / "good", "-epochs", 1)
    expect_sentence("output", "the folder is a file", Q2, *good, "-out", folder / "file")
    expect_sentence("output", "the folder is read-only (/proc)", Q2, *good, "-out", "/proc/out")
    nothing = folder / "nothing-here"
    expect_sentence("output", "report: nothing there", REPORT, "-out", nothing)
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode == 0:  # needs root
        fault = "full disk while training"
        expect_sentence("output", fault, Q2, *good, "-out", disk, out=disk)
        fault = "full disk while drawing"
        expect_sentence("output", fault, SAMPLE, "-only", "octmnist", "-out", disk, out=disk)
        fault = "full disk while speaking"
        expect_sentence("output", fault, SAMPLE, "-only", "ljspeech", "-out", disk, out=disk)
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------------------- names
def q3_settings(folder, **settings):
    """Settings of the notebook for a tiny training; `folder`/speech is written."""
    shutil.rmtree(folder / "speech", ignore_errors=True)
    write_corpus(folder / "speech")
    q3 = {"DATA": folder / "speech", "DECODERS": "lstm", "EPOCHS": 1, "DEVICE": "cpu"}
    return {**q3, **settings}


def truth_of(folder, program, *arguments, run, **settings):
    """The results file of an undisturbed run."""
    out = Path(tempfile.mkdtemp(prefix="truth-", dir=folder))
    if program == NOTEBOOK:
        finish(program, *arguments, OUT=out, **settings)
    else:
        finish(program, *arguments, "-out", out)
    return out / "results" / f"{run}.json"


def name_faults(folder):
    """Folders with unusual names, and the same folder by other names."""
    name = "q2-maxpool-lr0.01-seed42-epochs30-optimizeradam"
    flags = ("-epochs", 30, "-optimizer", "adam")
    truth = truth_of(folder, Q2, *flags, "-data", folder / "good", run=name)
    named = folder / "my däta (1)"
    shutil.copytree(folder / "good", named)
    out = folder / "my résults"
    expect_numbers("names", "Q2: blanks and umlauts", truth, Q2, *flags, "-data", named, out=out)
    fault = "Q2: umlauts, and a system of ASCII"
    ascii_ = {"LC_ALL": "C", "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0}
    words = (Q2, *flags, "-data", named)
    expect_numbers("names", fault, truth, *words, out=folder / "ä b", **ascii_)

    relative = Path(os.path.relpath(folder))
    for how, data, out in (
        ("absolute, then relative", relative / "good", relative / "out-absolute"),
        ("with a slash at its end", f"{folder}/good/", f"{folder}/out-slash/"),
        ("through .. and .", folder / "good" / ".." / "good", f"{folder}/./out-dots"),
    ):
        first_out = Path(ROOT, out).resolve()
        process = start(Q2, *flags, "-data", folder / "good", "-out", first_out)
        wait_for((first_out / "results" / f"{name}.json").exists, process)
        kill(process)
        fault = f"Q2 resumed: {how}"
        words = (Q2, *flags, "-data", data)
        expect_numbers("names", fault, truth, *words, out=out, shows="goes on after epoch")

    q3 = q3_settings(folder, EPOCHS=12)
    truth = truth_of(folder, NOTEBOOK, run="q3-lstm", **q3)
    named = folder / "my späch"
    shutil.copytree(folder / "speech", named)
    out = folder / "my nötebook"
    process = start(NOTEBOOK, OUT=out, **q3)
    wait_for((out / "results" / truth.name).exists, process)
    kill(process)
    q3["DATA"] = os.path.relpath(named, ROOT) + "/"
    fault = "Q3 resumed: blanks, umlauts, another path"
    expect_numbers("names", fault, truth, NOTEBOOK, out=out, shows="goes on after epoch", **q3)


# ------------------------------------------------------------------------------------ surroundings
NO_ENTRY = """
import pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = getpwuid
"""


def count_workers(process):
    """The largest number of worker processes at one time, until `process` ends."""
    most = 0
    while process.poll() is None:
        n_workers = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    n_workers += any("popen_loky" in word for word in child.cmdline())
        most = max(most, n_workers)
        time.sleep(0.02)
    return most


def surrounding_faults(folder):
    """Users, homes, terminals, processors and variables that are not the usual ones."""
    folder.chmod(0o755)  # another user passes through it
    flags = ("-data", folder / "good", "-epochs", 2)
    truth = truth_of(folder, Q2, *flags, run="q2-maxpool-lr0.01-seed42-epochs2")
    q3 = q3_settings(folder)
    q3_truth = truth_of(folder, NOTEBOOK, run="q3-lstm", **q3)
    tiny = ("-seq_lens", 32, 64, "-dims", 4)

    n_outs = 0

    def new_out():
        nonlocal n_outs
        n_outs += 1
        return folder / f"surroundings-{n_outs}"

    def trains(fault, **options):
        out = options.pop("out", None) or new_out()
        expect_numbers("surroundings", f"Q2: {fault}", truth, Q2, *flags, out=out, **options)

    def executes(fault, **options):
        out = options.pop("out", None) or new_out()
        options = {**q3, **options}
        expect_numbers("surroundings", f"Q3: {fault}", q3_truth, NOTEBOOK, out=out, **options)

    def measures(fault, **options):
        out = new_out()
        status, _, stderr = finish(Q1, *tiny, "-out", out, **options)
        file = out / "results" / "q1.json"
        finished = file.exists() and json.loads(file.read_text())["status"] == "finished"
        calm = status == 0 and not stderr
        what = "measured and saved" if calm else f"status {status}: {stderr.strip()[-200:]!r}"
        report("surroundings", f"Q1: {fault}", calm and finished, what)

    # a user without an account entry and without a home
    nameless = dict.fromkeys(("USER", "LOGNAME", "LNAME", "USERNAME"))
    nowhere = folder / "no" / "home"
    user = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")
    reads = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    for words in (
        user,
        (*user, *reads),
    ):  # where its Python lies in a folder that others cannot see
        if os.name == "posix" and works(*words):
            options = {"before": words, "HOME": "/nonexistent", **nameless}
            break
    else:
        (folder / "sitecustomize.py").write_text(NO_ENTRY)
        options = {"PYTHONPATH": folder, "HOME": nowhere, **nameless}
    fault = "a user without an entry, no home"
    for test in (trains, executes):
        out = new_out()
        out.mkdir()
        out.chmod(0o777)
        test(fault, out=out, **options)
    options = {"PYTHONPATH": folder, "HOME": None, **nameless}
    (folder / "sitecustomize.py").write_text(NO_ENTRY)
    trains("no entry, HOME not set", **options)
    measures("no entry, HOME not set", **options)
    (folder / "sitecustomize.py").unlink()
    clean = not (ROOT / "~").exists()  # medmnist would make it
    report("surroundings", "Q2: no entry, HOME not set: no folder ~", clean, "none is left")
    trains("HOME is missing", HOME=nowhere)
    trains("HOME is a file (/dev/null)", HOME=os.devnull)
    executes("HOME is a file (/dev/null)", HOME=os.devnull)
    locked_home = folder / "locked-home"
    locked_home.mkdir()
    locked_home.chmod(0o500)
    if as_others_may_read() is None:
        skip("surroundings", "HOME may not be written", "an account may write everywhere")
    else:
        trains("HOME may not be written", HOME=locked_home, before=as_others_may_read())
        executes("HOME may not be written", HOME=locked_home, before=as_others_may_read())

    # streams
    trains("stderr closed (2>&-)", after="2>&-")
    trains("both closed (>&- 2>&-)", after=">&- 2>&-")
    executes("stderr closed (2>&-)", after="2>&-")
    out = new_out()
    wrong = ("-data", folder / "nowhere", "-out", out)
    status, _, stderr = finish(Q2, *wrong, after="2>&-")
    report("surroundings", "Q2: a mistake, stderr closed", status == 2 and not stderr, "status 2")
    if Path("/dev/full").exists():
        trains("printing on a full device", after="> /dev/full")
        executes("printing on a full device", after="> /dev/full")
    trains("the reader goes away", after="| head -n 1", shows="epoch   1")
    executes("the reader goes away", after="| head -n 1")
    measures("the reader goes away", after="| head -n 1")
    out = new_out()
    plain = {"LC_ALL": "C", "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0}
    rates = ("-learning_rate", 0.01, 0.1, "-seed", 1, 42)
    status, stdout, stderr = finish(Q2, *flags, *rates, "-out", out, **plain)
    saved = (out / "results" / "q2-search-epochs2.json").exists()
    signed = " +- " in stdout and "best by validation" in stdout
    same = same_numbers(out / "results" / truth.name, truth)
    passed = status == 0 and not stderr and signed and saved and same
    report("surroundings", "Q2: a terminal without ±", passed, "+- in the table, search saved")

    # variables
    for backend in ("gtk4agg", "module://nowhere", "nonsense"):
        trains(f"MPLBACKEND={backend}", MPLBACKEND=backend)
    measures("MPLBACKEND=module://nowhere", MPLBACKEND="module://nowhere")
    executes("MPLBACKEND=module://nowhere", MPLBACKEND="module://nowhere")
    trains("PYTHONSAFEPATH=1", PYTHONSAFEPATH=1)
    measures("PYTHONSAFEPATH=1", PYTHONSAFEPATH=1)
    if shutil.which("make"):  # it takes the variable away from the tools
        out = new_out()
        (out / "results").mkdir(parents=True)
        command = ["make", "-o", ".venv/ready", f"PY={sys.executable}", "report", f"OUT={out}"]
        settings = {**os.environ, "PYTHONSAFEPATH": "1"}
        made = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
        passed = made.returncode == 0 and (out / "results.pdf").exists()
        what = "results.pdf" if passed else made.stderr.strip()[-200:]
        report("surroundings", "make report: PYTHONSAFEPATH=1", passed, what)
    trains("python -OO", PYTHONOPTIMIZE=2)
    measures("python -OO", PYTHONOPTIMIZE=2)
    latex = folder / "latex"
    latex.mkdir()
    (latex / "matplotlibrc").write_text("text.usetex: True\n")
    trains("LaTeX in a matplotlibrc", MPLCONFIGDIR=latex)
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["/gone/bin/python"], "display_name": "x", "language": "python"}')
    executes("another python3 among the kernels", JUPYTER_PATH=folder / "jupyter")
    if os.name == "posix":
        delete = ("sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
        gone = {"before": delete, "cwd": folder, "says": "the current folder is gone"}
        for name in (Q1, Q2):
            expect_sentence("surroundings", f"{name} in a deleted folder", str(ROOT / name), **gone)
    long = folder / ("t" * (101 - len(str(folder)) - 1))
    long.mkdir()
    executes(f"TMPDIR of {len(str(long))} characters", TMPDIR=long)

    # processors
    if shutil.which("taskset"):
        core = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
        process = start(Q2, *flags, "-seed", 1, 2, 42, "-out", new_out(), before=core)
        most = count_workers(process)
        process.communicate()
        passed = process.returncode == 0 and most <= 1
        report("surroundings", "Q2: three runs, one core", passed, f"{most} workers")
        process = start(NOTEBOOK, OUT=new_out(), before=core, **q3)
        most = count_workers(process)
        process.communicate()
        passed = process.returncode == 0 and most <= 1
        report("surroundings", "Q3: one core", passed, f"{most} workers")
    out = new_out()
    process = start(Q2, *flags, "-seed", 1, 42, "-out", out)
    most = count_workers(process)
    process.communicate()
    same = same_numbers(out / "results" / truth.name, truth)
    passed = process.returncode == 0 and most <= 2 and same
    report("surroundings", "Q2: two runs, all cores", passed, f"{most} workers, same numbers")


# ------------------------------------------------------------------------------------------- stops
def stop_faults(folder):
    """Stops that are not Ctrl-C: one sentence, nothing trains on, and the next call goes on."""
    if os.name != "posix":
        skip("stop", "SIGTERM, SIGHUP, kill -9", "other signals on this system")
        return
    flags = ("-data", folder / "good", "-epochs", 60, "-seed", 1, 2)
    names = [f"q2-maxpool-lr0.01-seed{seed}-epochs60" for seed in (1, 2)]
    whole = folder / "unstopped"
    finish(Q2, *flags, "-out", whole)
    n_outs = 0

    def stops(fault, stop, says, before=()):
        """Train both runs; once both have epochs, `stop(process, its children)`."""
        nonlocal n_outs
        n_outs += 1
        out = folder / f"stopped-{n_outs}"
        files = [out / "results" / f"{name}.json" for name in names]
        process = start(Q2, *flags, "-out", out, before=before)
        wait_for(lambda: all(file.exists() for file in files), process)
        children = psutil.Process(process.pid).children(recursive=True)
        stop(process, children)
        stdout, stderr = process.communicate()
        _, alive = psutil.wait_procs(children, timeout=20)
        kept = all((out / "checkpoints" / f"{name}.pt").exists() for name in names)
        cut = any(numbers(file)[1] == "interrupted" for file in files)
        passed = is_one_sentence(process.returncode, stdout, stderr) and says in stderr
        what = stderr.strip() if passed else f"{process.returncode}: {stderr.strip()[-400:]!r}"
        passed = passed and not alive and kept and cut
        status, stdout, stderr = finish(Q2, *flags, "-out", out)
        same = all(same_numbers(file, whole / "results" / file.name) for file in files)
        went_on = status == 0 and same and "goes on after epoch" in stdout and not stderr
        if not (kept and cut and went_on) or alive:
            what += f" kept {kept}, cut {cut}, {len(alive)} alive, went on {went_on}"
        report("stop", f"Q2: {fault}", passed and went_on, what)

    def one(number):
        return lambda process, children: process.send_signal(number)

    def all_of(number):
        return lambda process, children: os.killpg(process.pid, number)

    def after_a_hangup(process, children):
        process.send_signal(signal.SIGHUP)  # nohup: it trains on
        time.sleep(0.5)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def kill_a_worker(process, children):
        workers = [child for child in children if "--process-name" in child.cmdline()]
        workers[0].kill()

    interrupted = "interrupted; finished epochs are saved; the same command goes on"
    stops("SIGTERM", one(signal.SIGTERM), interrupted)
    stops("SIGTERM to all its processes", all_of(signal.SIGTERM), interrupted)
    stops("SIGHUP", one(signal.SIGHUP), interrupted)
    stops("SIGHUP to all its processes", all_of(signal.SIGHUP), interrupted)
    stops("Ctrl-C to all its processes", all_of(signal.SIGINT), interrupted)
    if shutil.which("nohup"):
        stops("nohup: SIGHUP, then SIGTERM", after_a_hangup, interrupted, before=("nohup",))
    stops("kill -9 of a worker", kill_a_worker, "killed, mostly for want of memory")

    q3 = q3_settings(folder, EPOCHS=12)
    truth = truth_of(folder, NOTEBOOK, run="q3-lstm", **q3)
    for name in ("SIGTERM", "SIGHUP"):
        out = folder / f"q3-{name}"
        process = start(NOTEBOOK, OUT=out, **q3)
        wait_for((out / "results" / truth.name).exists, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(getattr(signal, name))
        stdout, stderr = process.communicate()
        _, alive = psutil.wait_procs(children, timeout=20)
        passed = is_one_sentence(process.returncode, stdout, stderr) and interrupted in stderr
        passed = passed and children and not alive and (out / "hw2-q3.ipynb").exists()
        what = stderr.strip()[-300:] + f" {len(alive)} processes alive" * bool(alive)
        report("stop", f"Q3: {name}", passed, what)
        fault = f"Q3: {name}, and again"
        expect_numbers("stop", fault, truth, NOTEBOOK, out=out, shows="goes on after epoch", **q3)


# ------------------------------------------------------------------------- the group's own entries
def group_faults(folder):
    """report/group.toml as editors save it, in a copy of the repository."""
    copy = folder / "repository"
    unneeded = (".*", "sample", "build", "data", "__pycache__", "*.zip")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unneeded))
    file = copy / "report" / "group.toml"
    text = file.read_text(encoding="utf-8")
    filled_in = text.replace("TO BE FILLED IN", "G-7", 2).replace("TO BE FILLED IN", "Ä wrote it")

    def save(encoding, line_end="\n"):
        file.write_bytes(filled_in.replace("\n", line_end).encode(encoding))

    for fault, encoding, line_end in (
        ("group.toml with a mark", "utf-8-sig", "\n"),
        ("group.toml from Windows", "utf-8-sig", "\r\n"),
        ("group.toml in UTF-16", "utf-16", "\n"),
    ):
        save(encoding, line_end)
        status, _, stderr = finish(REPORT, "-submission", cwd=copy)
        archive = copy / "G-7.zip"
        passed = status == 0 and not stderr and zipfile.is_zipfile(archive)
        report("report", fault, passed, "accepted: G-7.zip" if passed else stderr.strip())
        archive.unlink(missing_ok=True)
    save("latin-1")
    says = "group.toml is not UTF-8 text; save it in the encoding UTF-8"
    expect_sentence("report", "group.toml in Latin-1", REPORT, "-submission", cwd=copy, says=says)


# --------------------------------------------------------------------------- leftovers, kill -9
def run_faults(folder):
    """Q2 and the report: damaged leftovers, kill -9 and resume, two runs at once."""
    name = "q2-maxpool-lr0.01-seed42-epochs30-optimizeradam"
    result = Path("results") / f"{name}.json"
    words = (Q2, "-data", folder / "good", "-epochs", 30, "-optimizer", "adam", "-out")
    truth = folder / "whole" / result
    finish(*words, folder / "whole")

    checkpoint = folder / "damaged" / "checkpoints" / f"{name}.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"PK damaged")
    expect_sentence("resume", "Q2: damaged checkpoint", *words, folder / "damaged")
    cut = folder / "cut" / "results" / "q1.json"
    cut.parent.mkdir(parents=True)
    cut.write_text('{"question": "q1", "ru')
    expect_sentence("report", "a result cut short", REPORT, "-out", folder / "cut")

    for round_ in range(1, 6):
        out = folder / f"killed-{round_}"
        process = start(*words, out)
        wait_for((out / result).exists, process)
        time.sleep(random.random())
        kill(process)
        finish(*words, out)
        same = same_numbers(out / result, truth)
        report("resume", f"Q2: kill -9, round {round_}", same, "same numbers")

    pair = [start(*words, folder / "pair") for _ in range(2)]
    errors = [process.communicate()[1] for process in pair]
    same = same_numbers(folder / "pair" / result, truth)
    calm = not any("Traceback" in text for text in errors)
    report("at once", "Q2: two runs into one folder", same and calm, "same numbers")


def speaking_faults(folder):
    """The spoken sample: a text that the voice cannot say, kill -9 and resume."""
    metadata = folder / "meta.csv"
    metadata.write_text("X-1|one|one\nX-2|中文|中文\n", encoding="utf-8")
    spoken = (SAMPLE, "-only", "ljspeech")
    fault = "a text that the voice cannot say"
    out = folder / "unspeakable"
    expect_sentence("metadata", fault, *spoken, "-metadata", metadata, "-out", out, out=out)

    words = (*spoken, "-n_clips", 200, "-out")
    finish(*words, folder / "spoken")
    truth = files_of(folder / "spoken")
    for round_ in (1, 2):
        out = folder / f"spoken-{round_}"
        process = start(*words, out)
        wait_for(lambda out=out: list(out.rglob("[!.]*.wav")), process)
        time.sleep(random.random())
        kill(process)
        finish(*words, out)
        same = files_of(out) == truth and len(truth) == 202  # clips, metadata.csv and README
        report("resume", f"speaking: kill -9, round {round_}", same, "same files")


def files_of(folder):
    """{path: bytes} of all files under a folder, the hidden ones too."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder)] = path.read_bytes()
    return found


def notebook_run_faults(folder):
    """The notebook: a damaged checkpoint, kill -9 and resume."""
    result = Path("results") / "q3-lstm.json"
    q3 = q3_settings(folder, EPOCHS=12)
    finish(NOTEBOOK, OUT=folder / "whole", **q3)
    truth = folder / "whole" / result

    checkpoint = folder / "damaged" / "checkpoints" / "q3-lstm.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(b"PK damaged")
    expect_sentence("resume", "Q3: damaged checkpoint", NOTEBOOK, OUT=folder / "damaged", **q3)
    for round_ in range(1, 6):
        out = folder / f"q3-killed-{round_}"
        process = start(NOTEBOOK, OUT=out, **q3)
        wait_for((out / result).exists, process)
        time.sleep(random.random())
        kill(process)
        finish(NOTEBOOK, OUT=out, **q3)
        same = same_numbers(out / result, truth)
        report("resume", f"Q3: kill -9, round {round_}", same, "same numbers")


GROUPS = {
    "data": data_faults,
    "flag": flag_faults,
    "download": download_faults,
    "speech": speech_faults,
    "group": group_faults,
    "output": output_faults,
    "name": name_faults,
    "surroundings": surrounding_faults,
    "stop": stop_faults,
    "run": run_faults,
    "speaking": speaking_faults,
    "notebook_run": notebook_run_faults,
}


def main(chosen):
    """Try the faults of the groups `chosen`, or all; then README's line says how many passed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good").mkdir()
        np.savez_compressed(Path(folder) / "good" / "octmnist.npz", **oct_arrays())
        for name in chosen or GROUPS:
            GROUPS[name](Path(folder))
    n_handled = sum(passed for _, passed in ROWS)
    count = f"{n_handled} of {len(ROWS)} faults handled"
    print(count)
    if not chosen:
        groups = Counter(group for group, _ in ROWS)
        listed = ", ".join(f"{n} {group}" for group, n in groups.items())
        line = f"Last complete run of `make faults`: {count} ({listed})."
        update_readme("faults", "make faults", line)
    sys.exit(n_handled < len(ROWS))


if __name__ == "__main__":
    main(sys.argv[1:])
