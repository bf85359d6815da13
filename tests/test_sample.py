"""The stand-ins: formats, classes, speech, and that nothing half-written or foreign is harmed."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import utils
from conftest import POSIX, ROOT, SHARED, restore_interrupts, run_tool
from runs import UserError
from tools import make_sample_data, sample_images, sample_speech

import numpy as np
import pytest
import soundfile

N_CLIPS = 60
TINY = {"train": (22, 7, 5, 30), "val": (3, 1, 1, 4), "test": (2, 2, 2, 2)}


def make(out, *flags):
    """Run the tool's main in this process; everything tiny unless flags say otherwise."""
    arguments = ["-out", out, "-n_clips", N_CLIPS, "-workers", 1, *flags]
    parser = make_sample_data.make_parser()
    make_sample_data.main(parser.parse_args([str(argument) for argument in arguments]))
    return out


def contents(folder):
    """{path: (bytes, time of writing)} of every file under a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def only_bytes(folder):
    """{path: bytes} of every file under a folder."""
    return {name: content for name, (content, _) in contents(folder).items()}


@pytest.fixture(scope="module")
def tenth():
    """A tenth of the images."""
    splits = {}
    for split, counts in sample_images.SPLITS.items():
        splits[split] = tuple(round(n / 10) for n in counts)
    return splits


@pytest.fixture(scope="module")
def sample(tenth, tmp_path_factory):
    """Both datasets, a tenth of the images and 60 clips. Tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_images, "SPLITS", tenth)
        return make(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(sample_images, "SPLITS", TINY)


# ---------------------------------------------------------------------------------------- OCTMNIST
def test_octmnist_has_medmnists_format(sample):
    with np.load(sample / "octmnist.npz", allow_pickle=False) as file:
        names = set(file.files) - {"source", "settings"}
    expected = set()
    for split in ("train", "val", "test"):
        expected |= {f"{split}_images", f"{split}_labels"}
    assert names == expected
    splits, info = utils.load_oct_data(sample)
    assert info["source"] == "synthetic sample (procedural B-scans)"
    assert info["counts"] == {"train": 800, "val": 80, "test": 100}
    assert np.bincount(splits["test"][1].numpy()).tolist() == [25] * 4
    assert len(set(splits["train"][1][:50].tolist())) > 2  # shuffled


def test_octmnist_sizes():
    """OCTMNIST's class mix, and of each class in the test split at least the course's subset."""
    for split in ("train", "val"):
        counts = np.array(sample_images.SPLITS[split])
        np.testing.assert_allclose(counts / counts.sum(), (0.343, 0.105, 0.080, 0.472), atol=0.003)
    assert sample_images.SPLITS["test"] == (250, 250, 250, 250)


def test_images_are_those_of_edition_1(sample):
    """Whoever changes what is drawn must raise EDITION: samples already written are then remade."""
    assert sample_images.EDITION == 1
    digest = hashlib.sha256()
    with np.load(sample / "octmnist.npz") as file:
        for split in ("train", "val", "test"):
            digest.update(file[f"{split}_images"].tobytes())
            digest.update(file[f"{split}_labels"].tobytes())
    expected = "f7ce032a8bb34b4aab41f9998470b9bf76fb1781f44434e668a71132a785293a"
    assert digest.hexdigest() == expected


def test_octmnist_is_deterministic(tiny, tmp_path):
    first = make(tmp_path / "first", "-only", "octmnist", "-seed", 3)
    again = make(tmp_path / "again", "-only", "octmnist", "-seed", 3)
    other = make(tmp_path / "other", "-only", "octmnist", "-seed", 4)
    assert only_bytes(first) == only_bytes(again) != only_bytes(other)


def test_no_image_twice(sample):
    with np.load(sample / "octmnist.npz") as file:
        images = np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])
    assert len({image.tobytes() for image in images}) == len(images)


def test_classes_are_what_they_claim(monkeypatch):
    """Scans that differ in their class alone (same random numbers, no speckle), in pixels."""
    monkeypatch.setattr(sample_images, "SPECKLE", 1e9)
    depth = np.arange(28)[:, None]
    rows, lift, crests, dark, thick = {}, {}, {}, {}, {}
    for label in (3, 0, 1, 2):
        labels = np.full(200, label)
        scans = sample_images.draw_scans(labels, np.random.default_rng(0)).astype(float)
        scans[scans == 255] = 0  # the white corners
        outer = scans.argmax(axis=1)  # (N, 28): rows of the outer surface
        inner = (scans > 40).argmax(axis=1)  # (N, 28)
        rows[label] = outer
        lift[label] = np.median((rows[3] - outer).max(axis=1))
        left, middle, right = outer[:, :-2], outer[:, 1:-1], outer[:, 2:]
        crests[label] = ((middle < left) & (middle <= right)).sum(axis=1).mean()
        retina = (depth > inner[:, None] + 1) & (depth < outer[:, None] - 1)  # (N, 28, 28)
        dark[label] = (retina & (scans < 30)).sum(axis=(1, 2)).mean()
        thick[label] = (outer - inner).mean()
        if label == 3:
            dip = inner.max(axis=1) - np.median(inner, axis=1)
            assert dip.mean() > 2  # the foveal dip
    assert lift[0] >= 3 and crests[0] < 3  # CNV: one high rise of the outer layer
    assert 2 <= lift[2] <= lift[0] and crests[2] > 3.5  # drusen: several small ones
    assert lift[1] == 0 and dark[1] > 5  # DME: dark cysts
    assert thick[1] > thick[3] + 0.8  # and thickening
    assert max(dark[0], dark[2], dark[3]) < 0.1


# ------------------------------------------------------------------------------------------ speech
def read_rows(folder):
    text = (folder / "LJSpeech-1.1" / "metadata.csv").read_text()
    return [line.split("|") for line in text.splitlines()]


def test_ljspeech_has_its_format(sample):
    root = sample / "LJSpeech-1.1"
    rows = read_rows(sample)
    assert sample_speech.SAMPLE_RATE == utils.SAMPLE_RATE
    assert len(rows) == N_CLIPS and all(len(row) == 3 and row[1] == row[2] for row in rows)
    assert {f"{row[0]}.wav" for row in rows} == set(os.listdir(root / "wavs"))
    assert all(re.fullmatch(r"SY\d{3}-\d{4}", row[0]) for row in rows)
    label = (root / "README").read_text().splitlines()[0]
    voice = "spoken by a neural voice (hibari-tts)"
    assert label == f"synthetic sample: sentences from a small grammar, {voice}"
    for clip, _, text in rows:
        path = root / "wavs" / f"{clip}.wav"
        sound, rate = soundfile.read(path)
        info = soundfile.info(path)
        assert (rate, info.channels) == (22_050, 1)
        assert (info.subtype, info.format) == ("PCM_16", "WAV")
        assert 10 < len(text) / (len(sound) / rate) < 30  # characters a second
        assert 0.1 < np.abs(sound).max() < 1
        loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
        assert (
            loud[0] / rate < 0.05 and (len(sound) - loud[-1]) / rate < 0.15
        )  # as LJ Speech is cut


def test_sentences_are_distinct_and_cover_the_alphabet():
    rows = sample_speech.grammar(2_000, 42)
    texts = [row[2] for row in rows]
    assert len(set(texts)) == len({row[0] for row in rows}) == 2_000
    assert set("".join(texts).lower()) == set("abcdefghijklmnopqrstuvwxyz ,.?-")
    assert all(20 <= len(text) <= 55 for text in texts)
    assert texts[:10] == [row[2] for row in sample_speech.grammar(10, 42)]
    assert texts[:10] != [row[2] for row in sample_speech.grammar(10, 43)]
    with pytest.raises(UserError, match="only 35,136 sentences"):
        sample_speech.grammar(35_137, 42)


def test_command_line_and_workers(sample, tmp_path):
    """The sound depends on the seed alone: two workers make what this process made in `sample`."""
    flags = ("-only", "ljspeech", "-out", tmp_path, "-n_clips", N_CLIPS, "-workers", 2)
    process = run_tool("make_sample_data", *flags)
    assert (process.returncode, process.stderr, process.stdout.count("\n")) == (0, "", 1)
    assert only_bytes(tmp_path / "LJSpeech-1.1") == only_bytes(sample / "LJSpeech-1.1")
    clip = tmp_path / "LJSpeech-1.1" / "wavs" / "SY001-0001.wav"
    before = clip.read_bytes()
    metadata = tmp_path / "LJSpeech-1.1" / "metadata.csv"
    make(tmp_path, "-only", "ljspeech", "-metadata", metadata, "-seed", 1)
    assert clip.read_bytes() != before  # the same text, said in another way


def test_a_clip_does_not_depend_on_the_others(sample, tmp_path):
    make(tmp_path, "-only", "ljspeech", "-n_clips", 3)
    few, many = only_bytes(tmp_path / "LJSpeech-1.1" / "wavs"), only_bytes(sample / "LJSpeech-1.1")
    assert len(few) == 3
    for name, content in few.items():
        assert content == many[f"wavs/{name}"]


def test_pace_and_noise_vary(tmp_path):
    lines = [f"X-{i}|the same words|the same words\n" for i in range(8)]
    (tmp_path / "meta.csv").write_text("".join(lines))
    make(tmp_path, "-only", "ljspeech", "-metadata", tmp_path / "meta.csv")
    clips = list((tmp_path / "LJSpeech-1.1" / "wavs").iterdir())
    assert len({soundfile.info(path).frames for path in clips}) > 5
    first, again = (sample_speech.say("The same words.", 1.0, seed=1) for _ in range(2))
    other = sample_speech.say("The same words.", 1.0, seed=2)
    assert (first == again).all() and len(other) and not np.array_equal(first, other)
    assert len(sample_speech.say("The same words.", 0.8, seed=1)) > 1.1 * len(first)


def test_no_clip_is_clipped(monkeypatch):
    """A sound that is too loud for 16 bits is turned down, not cut off."""
    quiet = sample_speech.say("Hello there.", 1.0, seed=1).astype(float)
    voice = sample_speech.voice()
    monkeypatch.setattr(sample_speech, "voice", lambda: lambda *a, **k: 5 * voice(*a, **k))
    loud = sample_speech.say("Hello there.", 1.0, seed=1).astype(float)
    assert np.abs(loud).max() == 32_767 and (np.abs(loud) == 32_767).sum() == 1
    np.testing.assert_allclose(loud, quiet * 32_767 / np.abs(quiet).max(), atol=4)


@pytest.mark.parametrize("frequency", [200, 3_000, 9_000])
def test_resampling_keeps_tones_where_they_are(monkeypatch, frequency):

    def tone(*_, **__):
        return (0.5 * np.sin(2 * np.pi * frequency * np.arange(24_000) / 24_000)).astype("f4")

    monkeypatch.setattr(sample_speech, "voice", lambda: tone)
    samples = sample_speech.say("", 1.0, seed=0)
    time_of_sample = np.arange(len(samples)) / 22_050
    expected = 0.5 * np.sin(2 * np.pi * frequency * time_of_sample)
    middle = slice(1_000, -1_000)
    np.testing.assert_allclose(samples[middle] / 32_767, expected[middle], atol=0.005)


def test_metadata_is_spoken_as_given(tmp_path):
    text = (
        "LJ001-0001|In 1901, Mr. «Ünal»|In nineteen oh one, mister Ünal\n"
        'LJ050-0278|"Why?"|why, she said\n'
    )
    metadata = tmp_path / "meta.csv"
    metadata.write_text(text, encoding="utf-8")
    make(tmp_path, "-only", "ljspeech", "-metadata", metadata, "-workers", 2)
    folder = tmp_path / "LJSpeech-1.1"
    assert (folder / "metadata.csv").read_text(encoding="utf-8") == text
    assert sorted(os.listdir(folder / "wavs")) == ["LJ001-0001.wav", "LJ050-0278.wav"]
    voice = "spoken by a neural voice (hibari-tts)"
    label = (folder / "README").read_text().splitlines()[0]
    assert label == f"synthetic stand-in: transcripts of meta.csv, {voice}"
    written_out = soundfile.info(folder / "wavs" / "LJ001-0001.wav").duration
    assert written_out > 1.5  # the normalised column: words instead of numbers


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "No such file"),
        (b"", "line 1 .* number of columns"),
        (b"a|b|c\nd|e\n", "line 2 .* number of columns"),
        (b"a|b|c|d\n", "number of columns"),
        (b"a|b|c\n\nd|e|f\n", "line 2 .* number of columns"),
        (b"../a|b|c\n", "the id '../a'"),
        (b"/etc/a|b|c\n", "the id '/etc/a'"),
        (b"a\n|b|c\n", "line 1"),
        (b"|b|c\n", "the id ''"),
        (b"a|b|c\na|d|e\n", "line 2 .* second time"),
        (b"a|b|c\nA|d|e\n", "line 2 .* second time"),
        (b"a|b| ...\n", "no words"),
        (b"a|b|caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_metadata(tmp_path, content, fault):
    if content is not None:
        (tmp_path / "meta.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){fault}"):
        make(tmp_path / "out", "-only", "ljspeech", "-metadata", tmp_path / "meta.csv")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the real LJ Speech metadata is not here")
def test_real_metadata():
    assert len(sample_speech.read_metadata(SHARED / "ljspeech_metadata_full.csv")) == 13_100


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_the_voice_cannot_say(tmp_path, workers):
    """It reads Latin letters and digits; other scripts give no sound, which must not go unseen."""
    text = "X-1|one|one\nX-2|two|two\nX-3|中文|中文\n"
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8")
    flags = ("-only", "ljspeech", "-metadata", tmp_path / "meta.csv", "-workers", workers)
    with pytest.raises(UserError, match="cannot say the transcript of X-3"):
        make(tmp_path / "out", *flags)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="a terminal is made by pty")
def test_bar_on_a_terminal(tmp_path):
    import pty
    import termios

    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 80))
    command = [sys.executable, "-m", "tools.make_sample_data", "-only", "ljspeech"]
    flags = ["-out", str(tmp_path), "-n_clips", "4", "-workers", "1"]
    subprocess.run([*command, *flags], cwd=ROOT, stderr=terminal, check=True, timeout=60)
    os.set_blocking(leader, False)
    assert b"speaking" in os.read(leader, 100_000)


# --------------------------------------------------------------------------- again, and interrupted
def test_second_call_does_nothing(tiny, tmp_path, capsys):
    before = contents(make(tmp_path))
    capsys.readouterr()
    assert contents(make(tmp_path)) == before
    assert capsys.readouterr().out.count("complete already") == 2


def test_incomplete_or_other_settings_are_made_again(tiny, tmp_path):
    before = only_bytes(make(tmp_path))
    next((tmp_path / "LJSpeech-1.1" / "wavs").iterdir()).unlink()
    make(tmp_path)
    assert only_bytes(tmp_path) == before
    make(tmp_path, "-seed", 1)
    after = only_bytes(tmp_path)
    for name in ("octmnist.npz", "LJSpeech-1.1/metadata.csv"):
        assert after[name] != before[name]
    assert sorted(os.listdir(tmp_path)) == ["LJSpeech-1.1", "octmnist.npz"]


def test_foreign_data_is_left_alone(tiny, tmp_path):
    (tmp_path / "LJSpeech-1.1").mkdir()
    (tmp_path / "LJSpeech-1.1" / "README").write_text("The LJ Speech Dataset")
    np.savez(tmp_path / "octmnist.npz", train_images=np.zeros(3))
    before = contents(tmp_path)
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="name another folder"):
            make(tmp_path, "-only", only)
    assert contents(tmp_path) == before
    (tmp_path / "octmnist.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="damaged"):
        make(tmp_path, "-only", "octmnist")
    assert contents(tmp_path)["LJSpeech-1.1/README"] == before["LJSpeech-1.1/README"]


def test_a_sample_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "octmnist.npz").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*directory"):
        make(tmp_path, "-only", "octmnist")


def test_full_disk_keeps_what_was_there(tiny, tmp_path, monkeypatch):
    before = contents(make(tmp_path))

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(np, "savez_compressed", fail)
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="No space left on device"):
            make(tmp_path, "-only", only, "-seed", 1)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_two_processes_at_once_leave_a_whole_folder_or_none(tmp_path, monkeypatch):
    """The slower one finds clips gone with the folder that the faster one has just named."""
    before = contents(make(tmp_path, "-only", "ljspeech"))
    monkeypatch.setattr(sample_speech, "speak_all", lambda *_: None)
    with pytest.raises(UserError, match="another process"):
        make(tmp_path, "-only", "ljspeech", "-seed", 1)
    assert contents(tmp_path) == before


def interrupt_half_way(out, n_clips, number):
    """Start speaking, send the signal once a few clips are there; returns the process."""
    command = [sys.executable, "-m", "tools.make_sample_data", "-only", "ljspeech"]
    process = subprocess.Popen(
        [*command, "-out", str(out), "-n_clips", str(n_clips), "-workers", "1"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    deadline = time.monotonic() + 30
    while len(list(out.rglob("[!.]*.wav"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()
    return process


@POSIX
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_interrupted_half_way_and_resumed(sample, tmp_path, name):
    """Nothing is there until all is; the same command goes on, and what is spoken stays."""
    n_clips = 120
    process = interrupt_half_way(tmp_path, n_clips, getattr(signal, name))
    assert process.returncode == (-9 if name == "SIGKILL" else 2)
    assert not (tmp_path / "LJSpeech-1.1").exists()
    (work,) = tmp_path.iterdir()
    for half in (work / "wavs").glob(".*"):
        half.unlink()
    (work / "wavs" / ".SY001-0001-123.wav").write_bytes(b"of a process that was killed")
    spoken = contents(work / "wavs")
    assert 3 < len(spoken) < n_clips

    flags = ("-only", "ljspeech", "-out", tmp_path, "-n_clips", n_clips)
    assert run_tool("make_sample_data", *flags).returncode == 0
    assert os.listdir(tmp_path) == ["LJSpeech-1.1"]
    whole = contents(tmp_path / "LJSpeech-1.1" / "wavs")
    assert len(whole) == n_clips
    for clip, content_and_time in spoken.items():
        assert clip.startswith(".") or whole[clip] == content_and_time
    uninterrupted = only_bytes(sample / "LJSpeech-1.1" / "wavs")
    for clip, content in uninterrupted.items():
        assert whole[clip][0] == content


@POSIX
def test_killed_half_way_then_other_settings(tmp_path):
    interrupt_half_way(tmp_path, 2_000, signal.SIGKILL)
    assert not (tmp_path / "LJSpeech-1.1").exists()
    make(tmp_path, "-only", "ljspeech")
    assert os.listdir(tmp_path) == ["LJSpeech-1.1"]


def test_out_that_is_a_file(tiny, tmp_path):
    (tmp_path / "out").touch()
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="cannot write"):
            make(tmp_path / "out", "-only", only)


@pytest.mark.parametrize(
    "flags", [["-n_clips", "0"], ["-seed", "-1"], ["-workers", "0"], ["-only", "mnist"], ["-x"]]
)
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_sample_data.make_parser().parse_args(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
