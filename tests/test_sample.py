"""The stand-ins: formats, classes, speech; nothing is left half-written or overwritten."""

import os
import re
import signal
import subprocess
import sys

import utils
from conftest import POSIX, ROOT
from runs import UserError
from tools import make_sample_data, sample_images, sample_speech

import numpy as np
import pytest
import soundfile

N_CLIPS = 12
SPLITS = {"train": (22, 7, 5, 30), "val": (3, 1, 1, 4), "test": (2, 2, 2, 2)}


def make(out, *flags):
    """Call the tool in this process; everything tiny unless flags say otherwise."""
    words = ["-out", out, "-n_clips", N_CLIPS, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_images, "SPLITS", SPLITS)
        make_sample_data.main(make_sample_data.make_parser().parse_args(list(map(str, words))))
    return out


def contents(folder):
    """{path: bytes} of every file under a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Both datasets, tiny. Tests must not change it."""
    sample_speech.say("Once.", 1.0, seed=0)  # load the voice before processes are forked
    return make(tmp_path_factory.mktemp("sample"))


# ---------------------------------------------------------------------------------------- OCTMNIST
def test_octmnist_has_medmnists_format(sample):
    splits, info = utils.load_oct_data(sample)
    assert info["source"] == "synthetic sample (procedural B-scans)"
    assert info["class_counts"] == {split: list(counts) for split, counts in SPLITS.items()}
    assert len(set(splits["train"][1][:20].tolist())) > 2  # shuffled
    images = np.concatenate([images.numpy() for images, _ in splits.values()])
    assert len({image.tobytes() for image in images}) == len(images)  # no image occurs twice


def test_classes_are_what_they_claim(monkeypatch):
    """Scans of the same random numbers, without speckle, differ only in their class."""
    monkeypatch.setattr(sample_images, "SPECKLE", 1e9)
    depth = np.arange(28)[:, None]
    rows, lift, crests, dark = {}, {}, {}, {}
    for label in (3, 0, 1, 2):
        labels = np.full(200, label)
        scans = sample_images.draw_scans(labels, np.random.default_rng(0)).astype(float)
        scans[scans == 255] = 0  # the white corners
        rows[label] = outer = scans.argmax(axis=1)  # (N, 28): rows of the outer surface
        inner = (scans > 40).argmax(axis=1)  # (N, 28)
        lift[label] = np.median((rows[3] - outer).max(axis=1))
        left, middle, right = outer[:, :-2], outer[:, 1:-1], outer[:, 2:]
        crests[label] = ((middle < left) & (middle <= right)).sum(axis=1).mean()
        retina = (depth > inner[:, None] + 1) & (depth < outer[:, None] - 1)  # (N, 28, 28)
        dark[label] = (retina & (scans < 30)).sum(axis=(1, 2)).mean()
    assert lift[0] >= 3 and crests[0] < 3  # CNV: one high rise of the outer layer
    assert 2 <= lift[2] <= lift[0] and crests[2] > 3.5  # drusen: several small ones
    assert lift[1] == 0 and dark[1] > 5  # DME: dark cysts
    assert max(dark[0], dark[2], dark[3]) < 0.1


# ------------------------------------------------------------------------------------------ speech
def test_ljspeech_has_its_format(sample):
    root = sample / "LJSpeech-1.1"
    rows = [line.split("|") for line in (root / "metadata.csv").read_text().splitlines()]
    assert len(rows) == N_CLIPS and all(row[1] == row[2] for row in rows)
    assert {f"{row[0]}.wav" for row in rows} == set(os.listdir(root / "wavs"))
    _, info = utils.load_ljspeech(sample)
    voice = "spoken by a neural voice (hibari-tts)"
    assert info["source"] == f"synthetic sample: sentences from a small grammar, {voice}"
    for clip, _, text in rows:
        assert re.fullmatch(r"SY\d{3}-\d{4}", clip)
        found = soundfile.info(root / "wavs" / f"{clip}.wav")
        assert (found.samplerate, found.channels, found.subtype) == (22_050, 1, "PCM_16")
        assert 10 < len(text) / found.duration < 30  # characters a second
        sound, rate = soundfile.read(root / "wavs" / f"{clip}.wav")
        loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
        silence = (loud[0] / rate, (len(sound) - loud[-1]) / rate)  # as LJ Speech is cut
        assert silence[0] < 0.05 and silence[1] < 0.15 and 0.1 < np.abs(sound).max() < 1


def test_sentences_are_distinct_and_cover_the_alphabet():
    rows = sample_speech.grammar(sample_speech.N_CLIPS, 42)
    texts = [row[2] for row in rows]
    assert len(set(texts)) == len({row[0] for row in rows}) == sample_speech.N_CLIPS
    assert set("".join(texts).lower()) == set("abcdefghijklmnopqrstuvwxyz ,.?-")
    assert texts[:10] == [row[2] for row in sample_speech.grammar(10, 42)]
    assert texts[:10] != [row[2] for row in sample_speech.grammar(10, 43)]
    n_sentences = len(sample_speech.all_sentences())
    with pytest.raises(UserError, match=f"only {n_sentences:,} sentences"):
        sample_speech.grammar(n_sentences + 1, 42)


def test_same_seed_same_files(sample, tmp_path):
    """A smaller sample, too: a clip depends only on its text, its row and the seed."""
    few = contents(make(tmp_path / "few", "-n_clips", 4))
    many = contents(sample)
    assert len(few) == 4 + 3  # metadata.csv, README and octmnist.npz
    for name, content in few.items():
        assert name.endswith(("metadata.csv", "README")) or content == many[name]
    other = contents(make(tmp_path / "other", "-n_clips", 4, "-seed", 1))
    assert other["octmnist.npz"] != few["octmnist.npz"]
    assert other["LJSpeech-1.1/metadata.csv"] != few["LJSpeech-1.1/metadata.csv"]


def test_pace_and_noise_vary():
    first, other = (sample_speech.say("The same words.", 1.0, seed=seed) for seed in (1, 2))
    assert len(other) and not np.array_equal(first, other)
    assert len(sample_speech.say("The same words.", 0.8, seed=1)) > 1.1 * len(first)


def test_no_clip_is_clipped(monkeypatch):
    """A sound that is too loud for 16 bits is turned down, not cut off."""
    quiet = sample_speech.say("Hello there.", 1.0, seed=1).astype(float)
    voice = sample_speech.voice()
    monkeypatch.setattr(sample_speech, "voice", lambda: lambda *a, **k: 5 * voice(*a, **k))
    loud = sample_speech.say("Hello there.", 1.0, seed=1).astype(float)
    assert np.abs(loud).max() == 32_767 and (np.abs(loud) == 32_767).sum() == 1
    np.testing.assert_allclose(loud, quiet * 32_767 / np.abs(quiet).max(), atol=4)


# ---------------------------------------------------------------------------- another corpus's text
def speak_table(folder, table):
    """Speak the rows of a metadata file with this content."""
    (folder / "meta.csv").write_bytes(table.encode())
    return make(folder / "out", "-only", "ljspeech", "-metadata", folder / "meta.csv")


def test_metadata_is_spoken_as_given(tmp_path):
    table = "LJ001-0001|In 1901, Mr. «Ünal»|In nineteen oh one, mister Ünal\n"
    table += 'LJ050-0278|"Why?"|why, she said\n'
    root = speak_table(tmp_path, table) / "LJSpeech-1.1"
    assert (root / "metadata.csv").read_text(encoding="utf-8") == table
    label = (root / "README").read_text().splitlines()[0]
    assert label.startswith("synthetic stand-in: transcripts of meta.csv, spoken by a neural voice")
    assert soundfile.info(root / "wavs" / "LJ001-0001.wav").duration > 1.5  # the third column
    assert (root / "wavs" / "LJ050-0278.wav").exists()


@pytest.mark.parametrize(
    "table, said",
    [
        ("a|b|c\n\nd|e|f\n", "row 2 .* 1 columns"),
        ("X-1|one|one\nX-3|中文|中文\n", "cannot say the transcript of X-3"),
    ],
)
def test_wrong_rows_are_one_sentence(tmp_path, table, said):
    with pytest.raises(UserError, match=said):
        speak_table(tmp_path, table)
    assert not (tmp_path / "out" / "LJSpeech-1.1").exists()


def test_the_whole_sample_has_sentences_outside_its_grammar(tmp_path, monkeypatch):
    said = [text for _, _, text in utils.read_metadata(make_sample_data.SENTENCES)]
    assert len(said) == 20 and not {*said} & {*sample_speech.all_sentences()}
    monkeypatch.setattr(sample_speech, "N_CLIPS", 4)
    few = tmp_path / "few.csv"
    few.write_text("A-1|Yes.|Yes.\n")
    monkeypatch.setattr(make_sample_data, "SENTENCES", few)
    args = make_sample_data.make_parser().parse_args(["-out", str(tmp_path), "-only", "ljspeech"])
    make_sample_data.main(args)
    for folder, n_clips in ((tmp_path, 4), (tmp_path / "sentences", 1)):
        assert len(list((folder / "LJSpeech-1.1" / "wavs").iterdir())) == n_clips


# --------------------------------------------------------------------------- again, and interrupted
def test_second_call_does_nothing_and_other_settings_replace_the_sample(tmp_path, capsys):
    make(tmp_path, "-n_clips", 4)
    before = (tmp_path / "LJSpeech-1.1" / "metadata.csv").stat().st_mtime_ns
    make(tmp_path, "-n_clips", 4)
    assert capsys.readouterr().out.count("complete already") == 2
    assert (tmp_path / "LJSpeech-1.1" / "metadata.csv").stat().st_mtime_ns == before
    make(tmp_path, "-n_clips", 3)
    assert sorted(os.listdir(tmp_path)) == ["LJSpeech-1.1", "octmnist.npz"]
    assert len(list((tmp_path / "LJSpeech-1.1" / "wavs").iterdir())) == 3


def test_foreign_data_is_left_alone(tmp_path):
    (tmp_path / "LJSpeech-1.1").mkdir()
    (tmp_path / "LJSpeech-1.1" / "README").write_text("The LJ Speech Dataset")
    np.savez(tmp_path / "octmnist.npz", train_images=np.zeros(3))
    before = contents(tmp_path)
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="name another folder"):
            make(tmp_path, "-only", only)
    assert contents(tmp_path) == before


@POSIX
def test_killed_half_way_and_gone_on_with(sample, tmp_path):
    """The folder appears when it is complete; the same command goes on with what is spoken."""
    flags = ["-only", "ljspeech", "-out", str(tmp_path), "-n_clips", str(N_CLIPS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.make_sample_data", *flags],
        cwd=ROOT,
        env={**os.environ, "LOKY_MAX_CPU_COUNT": "1"},  # many would say everything at once
        start_new_session=True,
    )
    while not list(tmp_path.rglob("[!.]*.wav")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # it and its workers
    process.wait()
    spoken = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.wav")}
    assert 0 < len(spoken) < N_CLIPS and not (tmp_path / "LJSpeech-1.1").exists()

    make(tmp_path, "-only", "ljspeech")
    assert os.listdir(tmp_path) == ["LJSpeech-1.1"]
    for path, time in spoken.items():
        assert (tmp_path / "LJSpeech-1.1" / "wavs" / path.name).stat().st_mtime_ns == time
    found = contents(tmp_path / "LJSpeech-1.1")
    assert found.items() >= contents(sample / "LJSpeech-1.1").items()
