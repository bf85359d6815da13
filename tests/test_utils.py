"""utils.py: tokens, sound, features, batches, and LJ Speech's files, whole and broken.

OCTMNIST's file is tested with its question, in test_q2.py.
"""

import os
import tarfile
import tempfile
from pathlib import Path

import utils
from conftest import POSIX, SHARED, write_corpus
from runs import UserError
from utils import PAD, START, STOP, VOCABULARY

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


# ------------------------------------------------------------------------------------------ tokens
@given(st.text())
def test_tokens_round_trip(text):
    tokens = utils.encode(text)
    assert (
        tokens[0] == START
        and tokens[-1] == STOP
        and START not in tokens[1:]
        and STOP not in tokens[:-1]
    )
    expected = "".join(letter if letter in VOCABULARY[4:] else "#" for letter in text.lower())
    assert utils.decode(tokens) == expected
    assert utils.decode([*tokens, PAD, PAD]) == expected
    assert utils.encode(expected) == tokens


def test_tokens_by_hand():
    assert utils.encode("A z, é") == [0, 9, 4, 34, 5, 4, 3, 1]
    assert utils.encode("abcdef", max_len=5) == [0, 9, 10, 11, 1]


# ------------------------------------------------------------------------------------------- sound
def slaney_filters():
    """80 triangular filters of unit area on Slaney's mel scale, by its definition: (80, 513)."""

    def to_hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(utils.SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    edges, bins = to_hz(np.linspace(0, top, 82)), np.linspace(0, utils.SAMPLE_RATE / 2, 513)
    up = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    down = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(up, down)) * 2 / (edges[2:] - edges[:-2])[:, None]


def test_log_mel_equals_its_definition_in_numpy():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=5000).astype(np.float32) * np.linspace(0, 1, 5000, dtype=np.float32)
    padded = np.pad(samples, 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[i : i + 1024] * window for i in range(0, 5001, 256)])
    power = np.abs(np.fft.rfft(frames)) ** 2 @ slaney_filters().T
    decades = np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(decades, decades.max() - 8) + 4) / 4
    features = utils.log_mel(torch.from_numpy(samples))
    assert features.shape == (1 + 5000 // 256, 80)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    "rate, channels, subtype", [(22_050, 1, "PCM_16"), (48_000, 2, "PCM_16"), (22_050, 1, "PCM_U8")]
)
def test_other_sample_rates_channels_and_widths(tmp_path, rate, channels, subtype):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(
        tmp_path / "tone.wav", np.stack([tone] * channels, axis=1), rate, subtype=subtype
    )
    samples = utils.read_audio(tmp_path / "tone.wav")
    assert abs(len(samples) - 22_050) <= 1 and samples.ndim == 1
    assert np.abs(np.fft.rfft(samples.numpy())).argmax() == 440


@pytest.mark.parametrize("content", [b"", b"not a sound", "empty", "short"])
def test_unreadable_sound_is_one_sentence(tmp_path, content):
    path = tmp_path / "clip.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, np.zeros({"empty": 0, "short": 500}[content]), 22_050)
    with pytest.raises(UserError, match=r"clip\.wav"):
        utils.read_audio(path)


# ------------------------------------------------------------------------------------------ corpus
def test_corpus_is_split_in_order_and_labelled(tmp_path):
    root = write_corpus(tmp_path, 40)
    splits, info = utils.load_ljspeech(tmp_path)
    assert (
        info["counts"] == {"train": 30, "val": 2, "test": 8}
        and info["source"] == "synthetic test tones"
    )
    ids = [row[0] for split in ("train", "val", "test") for row in splits[split]]
    assert ids == [f"LJ001-{i:04}" for i in range(40)]
    windows = "﻿" + (root / "metadata.csv").read_text().replace("\n", "\r\n")
    (root / "metadata.csv").write_bytes(windows.encode())
    assert utils.load_ljspeech(tmp_path)[0] == splits  # a byte-order mark and CRLF change nothing


@pytest.mark.parametrize("n_clips", [4, 5, 6, 7, 20])
def test_small_corpora_have_no_empty_split(tmp_path, n_clips):
    write_corpus(tmp_path, n_clips)
    _, info = utils.load_ljspeech(tmp_path)
    assert min(info["counts"].values()) >= 1 and sum(info["counts"].values()) == n_clips


def clips_named(names):
    return [(name, "text", None) for name in names]


def test_official_split_of_the_full_corpus():
    splits, how = utils.split_clips(clips_named([f"LJ0{i:05}" for i in range(13_100)]))
    assert [len(splits[split]) for split in utils.SPLITS] == [9_825, 655, 2_620]
    assert how == "official"


@pytest.mark.skipif(not SHARED.exists(), reason="the real LJ Speech metadata is not at hand")
def test_official_split_begins_where_it_is_said_to():
    rows = (SHARED / "ljspeech_metadata_full.csv").read_text().splitlines()
    splits, how = utils.split_clips(clips_named([row.split("|")[0] for row in rows]))
    first = {split: clips[0][0] for split, clips in splits.items()}
    assert first == {"train": "LJ001-0001", "val": "LJ037-0213", "test": utils.FIRST_TEST_CLIP}
    assert how == "official"


def test_official_test_clips_of_a_part_stay_test():
    """20 clips of the training part, 20 of the validation part, 3 of the test part."""
    names = [f"LJ{chapter:03}-{i:04}" for chapter in (1, 38) for i in range(20)]
    names += ["LJ040-0046", "LJ040-0047", "LJ050-0278"]
    splits, how = utils.split_clips(clips_named(names))
    assert [name for name, _, _ in splits["test"]] == ["LJ040-0047", "LJ050-0278"]
    assert [name for name, _, _ in splits["val"]] == ["LJ038-0019", "LJ040-0046"]
    assert [name for name, _, _ in splits["train"]] == names[:39]
    assert "official test part" in how


BAD_ROWS = {
    "2 columns": "LJ001-0003|only",
    "no clip in wavs/": "LJ009-0001|x|x",
    "no text": "LJ001-0003|x|",
    "an id seen before": "LJ001-0000|x|x",
}


@pytest.mark.parametrize("problem", BAD_ROWS)
def test_bad_metadata_names_the_row(tmp_path, problem):
    root = write_corpus(tmp_path)
    rows = (root / "metadata.csv").read_text().splitlines()
    rows[3] = BAD_ROWS[problem]
    (root / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match="row 4") as error:
        utils.load_ljspeech(tmp_path)
    assert problem in str(error.value)


def test_missing_or_undecodable_corpus(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        utils.load_ljspeech(tmp_path)
    root = write_corpus(tmp_path)
    (root / "metadata.csv").write_bytes(b"LJ001-0000|x|caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        utils.load_ljspeech(tmp_path)


def silent_corpus(folder, n_clips, metadata):
    """Clips 0, 1, … that are empty files, and this metadata.csv (bytes)."""
    root = Path(folder) / "LJSpeech-1.1"
    (root / "wavs").mkdir(parents=True)
    for i in range(n_clips):
        (root / "wavs" / f"{i}.wav").touch()
    (root / "metadata.csv").write_bytes(metadata)


LETTERS = st.characters(exclude_characters="|\n", exclude_categories=["Cs"])


@given(st.lists(st.text(LETTERS).filter(str.strip), min_size=4, max_size=9))
@settings(max_examples=50, deadline=None)
def test_any_transcript_is_read_as_it_stands(texts):  # quotes, other scripts, control characters
    with tempfile.TemporaryDirectory() as folder:
        silent_corpus(
            folder,
            len(texts),
            "\n".join(f"{i}|raw|{text}" for i, text in enumerate(texts)).encode(),
        )
        splits, info = utils.load_ljspeech(folder)
    assert [row[1] for rows in splits.values() for row in rows] == [text.strip() for text in texts]
    assert "LJ Speech" not in info["source"]


@given(st.binary() | st.text("0123|x\r\n\"'\ufeff").map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_metadata_is_read_or_refused_in_one_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        silent_corpus(folder, 4, content)
        try:
            utils.load_ljspeech(folder)
        except UserError as error:
            assert "\n" not in str(error) and str(error).endswith((".", "by hand"))


def test_download_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    """torchaudio unpacks in place, and takes any folder of that name for whole."""
    calls = []

    def fetch(root, download):
        calls.append(sorted(path.name for path in Path(root).iterdir()))
        (Path(root) / "archive").touch()
        write_corpus(Path(root), 4)
        if len(calls) == 1:
            raise RuntimeError("connection\nlost")

    monkeypatch.setattr("torchaudio.datasets.LJSPEECH", fetch)
    with pytest.raises(UserError, match=r"connection lost.*by hand"):
        utils.download_ljspeech(tmp_path / "data")
    assert not (tmp_path / "data" / "LJSpeech-1.1").exists()
    utils.download_ljspeech(tmp_path / "data")
    assert calls == [[], ["archive"]] and os.listdir(tmp_path / "data") == ["LJSpeech-1.1"]
    assert utils.load_ljspeech(tmp_path / "data")[1]["counts"]["train"] == 2


@pytest.mark.parametrize("name", ["../escaped", "{absolute}/escaped", None])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, name):
    (tmp_path / "LJSpeech-download").mkdir()
    archive = tmp_path / "LJSpeech-download" / "LJSpeech-1.1.tar.bz2"
    if name is None:
        archive.write_bytes(b"BZh9 cut short")
    else:
        with tarfile.open(archive, "w:bz2") as tar:
            tar.addfile(tarfile.TarInfo(name.format(absolute=tmp_path)))
    with pytest.raises(UserError, match="LJSpeech-download, or place"):
        utils.download_ljspeech(tmp_path)
    assert os.listdir(tmp_path) == ["LJSpeech-download"]


# ---------------------------------------------------------------------------- features and batches
def test_features_are_cached_and_a_damaged_cache_is_made_again(tmp_path):
    write_corpus(tmp_path)
    splits, _ = utils.load_ljspeech(tmp_path)
    first = utils.load_features(splits, tmp_path / "out")
    (cache,) = (tmp_path / "out" / "features").iterdir()
    before = cache.stat().st_mtime_ns
    again = utils.load_features(splits, tmp_path / "out")
    assert cache.stat().st_mtime_ns == before
    cache.write_bytes(cache.read_bytes()[:1000])
    repaired = utils.load_features(splits, tmp_path / "out")
    for split in first:
        assert len(first[split]) == len(splits[split])
        for a, b, c in zip(first[split], again[split], repaired[split]):
            assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == torch.float16


def test_batches_hold_every_clip_once_and_similar_lengths():
    torch.manual_seed(0)
    lengths = torch.randint(50, 900, (203,)).tolist()
    batches = utils.batches_by_length(lengths, 16)
    assert sorted(torch.cat(batches).tolist()) == list(range(203))
    spread = [max(lengths[i] for i in batch) / min(lengths[i] for i in batch) for batch in batches]
    assert sorted(spread)[len(spread) // 2] < 1.4
    assert [b.tolist() for b in utils.batches_by_length(lengths, 16)] != [
        b.tolist() for b in batches
    ]
    ordered = torch.cat(utils.batches_by_length(lengths, 16, shuffle=False))
    assert [lengths[i] for i in ordered] == sorted(lengths)


# ------------------------------------------------------------------------------ what people bring
@pytest.mark.parametrize(
    "suffix, subtype", [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16")]
)
def test_half_a_sound_file_is_refused(tmp_path, suffix, subtype):
    path = tmp_path / f"clip.{suffix}"
    tone = np.sin(np.arange(44_100) / 20)
    soundfile.write(path, tone, utils.SAMPLE_RATE, subtype=subtype)
    assert len(utils.read_audio(path)) == 44_100
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"clip\.(wav|flac) is (cut short|no readable)"):
        utils.read_audio(path)


def test_a_stream_of_unknown_length_is_read(tmp_path):
    """Programs that write WAV to a pipe cannot know its length: they promise the largest one."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.sin(np.arange(44_100) / 20), utils.SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(utils.read_audio(path)) == 44_100


@pytest.mark.parametrize("rate", [44_101, 8_000, 48_000])
def test_resampling_keeps_a_tone(tmp_path, rate):
    time = np.arange(3 * rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples = utils.read_audio(tmp_path / "tone.wav").numpy()
    assert abs(len(samples) - 3 * utils.SAMPLE_RATE) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / utils.SAMPLE_RATE)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=5e-3)


@pytest.mark.parametrize("gain, taken", [(1, 1), (0.9, 0.95), (-1, 1), (0, 1), (0.1, 1)])
def test_channels_that_agree_are_averaged_and_otherwise_the_loudest_is_taken(tmp_path, gain, taken):
    tone = 0.5 * np.sin(np.arange(44_100) / 20)
    for channels in (np.stack([tone, gain * tone], axis=1), np.stack([gain * tone, tone], axis=1)):
        soundfile.write(tmp_path / "stereo.wav", channels, utils.SAMPLE_RATE, subtype="FLOAT")
        samples = utils.read_audio(tmp_path / "stereo.wav").numpy()
        sign = np.sign(samples @ tone)
        np.testing.assert_allclose(sign * samples, taken * tone, atol=1e-5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank_lines", [0, 2])
def test_metadata_saved_by_other_editors(tmp_path, encoding, line_end, blank_lines):
    root = write_corpus(tmp_path)
    splits, _ = utils.load_ljspeech(tmp_path)
    text = (root / "metadata.csv").read_text().rstrip("\n") + (1 + blank_lines) * "\n"
    (root / "metadata.csv").write_bytes(text.replace("\n", line_end).encode(encoding))
    assert utils.load_ljspeech(tmp_path)[0] == splits


@POSIX
def test_the_true_reason_when_metadata_cannot_be_read(tmp_path):
    root = write_corpus(tmp_path)
    (root / "metadata.csv").unlink()
    (root / "metadata.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metadata\.csv \(Is a directory\)"):
        utils.load_ljspeech(tmp_path)
