"""utils.py: tokens, sound, features, batches, and LJ Speech's files, whole and broken.

OCTMNIST's file is tested with its question, in test_q2.py.
"""

import os
from pathlib import Path

import utils
from conftest import SHARED, write_corpus
from runs import UserError
from utils import PAD, START, STOP, VOCABULARY

import numpy as np
import pytest
import soundfile
import torch


# ------------------------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("text", ["", "<a>@# é", "İ\n"])
def test_tokens_round_trip(text):
    tokens = utils.encode(text)
    assert (tokens[0], tokens[-1]) == (START, STOP)
    assert START not in tokens[1:] and STOP not in tokens[:-1]
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
    "content, said",
    [
        (b"", "is no readable sound file"),
        (b"not a sound", "is no readable sound file"),
        (np.zeros(500), "less sound than one window"),
        (np.full(5000, np.nan), "samples that are no numbers"),
    ],
)
def test_unreadable_sound_is_one_sentence(tmp_path, content, said):
    path = tmp_path / "clip.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, content, 22_050, subtype="FLOAT")
    with pytest.raises(UserError, match=rf"clip\.wav.* {said}"):
        utils.read_audio(path)


# ------------------------------------------------------------------------------------------ corpus
@pytest.mark.parametrize("mark, line_end", [("\ufeff", "\r\n"), ("", "\r")])
def test_corpus_is_split_in_order_and_labelled(tmp_path, mark, line_end):
    """Whatever editor saved its table, with a blank line at the end."""
    root = write_corpus(tmp_path, 40)
    table = mark + (root / "metadata.csv").read_text() + "\n"
    (root / "metadata.csv").write_bytes(table.replace("\n", line_end).encode())
    splits, info = utils.load_ljspeech(tmp_path)
    assert info["counts"] == {"train": 30, "val": 2, "test": 8}
    assert info["source"] == "synthetic test tones"
    ids = [row[0] for split in ("train", "val", "test") for row in splits[split]]
    assert ids == [f"LJ001-{i:04}" for i in range(40)]


def test_the_hash_is_of_what_is_said_and_heard(tmp_path):
    root = write_corpus(tmp_path, 4)
    before = utils.load_ljspeech(tmp_path)[1]["sha256"]
    clip = root / "wavs" / "LJ001-0002.wav"
    content = bytearray(clip.read_bytes())
    content[-1] ^= 1
    clip.write_bytes(content)
    assert utils.load_ljspeech(tmp_path)[1]["sha256"] != before


def test_the_smallest_corpus_has_no_empty_split():
    splits, _ = utils.split_clips(clips_named([f"X-{i}" for i in range(4)]))
    assert [len(rows) for rows in splits.values()] == [2, 1, 1]


def clips_named(names):
    return [(name, "text", None) for name in names]


def test_the_courses_split_of_the_full_corpus():
    splits, how = utils.split_clips(clips_named([f"LJ0{i:05}" for i in range(13_100)]))
    assert [len(splits[split]) for split in utils.SPLITS] == [9_825, 655, 2_620]
    assert how.startswith("the course's: first 75 %")


@pytest.mark.skipif(not SHARED.exists(), reason="the real LJ Speech metadata is not at hand")
def test_the_courses_split_begins_where_it_is_said_to():
    rows = (SHARED / "ljspeech_metadata_full.csv").read_text().splitlines()
    splits, _ = utils.split_clips(clips_named([row.split("|")[0] for row in rows]))
    first = {split: clips[0][0] for split, clips in splits.items()}
    assert first == {"train": "LJ001-0001", "val": "LJ037-0213", "test": utils.FIRST_TEST_CLIP}


def test_test_clips_of_a_part_stay_test():
    """20 clips of the training part, 20 of the validation part, 3 of the test part."""
    names = [f"LJ{chapter:03}-{i:04}" for chapter in (1, 38) for i in range(20)]
    names += ["LJ040-0046", "LJ040-0047", "LJ050-0278"]
    splits, how = utils.split_clips(clips_named(names))
    assert [name for name, _, _ in splits["test"]] == ["LJ040-0047", "LJ050-0278"]
    assert [name for name, _, _ in splits["val"]] == ["LJ038-0019", "LJ040-0046"]
    assert [name for name, _, _ in splits["train"]] == names[:39]
    assert "the course's test part" in how


@pytest.mark.parametrize(
    "row, problem",
    [
        (b"LJ001-0003|only", "row 4 of .*metadata.csv has 2 columns"),
        (b"LJ001-0003||", "row 4 of .*metadata.csv has no text"),
        (b"LJ001-0000|x|x", "row 4 of .*metadata.csv has the id LJ001-0000 of an earlier row"),
        (b"LJ009-0001|x|x", "there is no clip of LJ009-0001 in .*wavs"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, problem):
    root = write_corpus(tmp_path)
    rows = (root / "metadata.csv").read_bytes().splitlines()
    rows[3] = row
    (root / "metadata.csv").write_bytes(b"\n".join(rows))
    with pytest.raises(UserError, match=problem):
        utils.load_ljspeech(tmp_path)


def test_a_missing_or_undecodable_corpus(tmp_path):
    with pytest.raises(UserError, match="does not exist; `make data` fetches LJ Speech"):
        utils.load_ljspeech(tmp_path)
    root = write_corpus(tmp_path)
    for encoding in ("latin-1", "utf-16"):
        (root / "metadata.csv").write_bytes("LJ001-0000|x|café\n".encode(encoding))
        with pytest.raises(UserError, match="UTF-8"):
            utils.load_ljspeech(tmp_path)
    (root / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"metadata\.csv: No such file"):
        utils.load_ljspeech(tmp_path)


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


def test_an_archive_that_is_cut_short_is_one_sentence(tmp_path):
    (tmp_path / "LJSpeech-download").mkdir()
    (tmp_path / "LJSpeech-download" / "LJSpeech-1.1.tar.bz2").write_bytes(b"BZh9 cut short")
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
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_half_a_sound_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    tone = np.sin(np.arange(44_100) / 20)
    soundfile.write(path, tone, utils.SAMPLE_RATE)
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


def test_resampling_keeps_a_tone(tmp_path):
    rate = 48_000
    time = np.arange(3 * rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples = utils.read_audio(tmp_path / "tone.wav").numpy()
    assert abs(len(samples) - 3 * utils.SAMPLE_RATE) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / utils.SAMPLE_RATE)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=5e-3)


@pytest.mark.parametrize("gain, taken", [(0.9, 0.95), (-1, 1), (0, 1)])
def test_channels_that_agree_are_averaged_and_otherwise_the_loudest_is_taken(tmp_path, gain, taken):
    tone = 0.5 * np.sin(np.arange(44_100) / 20)
    for channels in (np.stack([tone, gain * tone], axis=1), np.stack([gain * tone, tone], axis=1)):
        soundfile.write(tmp_path / "stereo.wav", channels, utils.SAMPLE_RATE, subtype="FLOAT")
        samples = utils.read_audio(tmp_path / "stereo.wav").numpy()
        sign = np.sign(samples @ tone)
        np.testing.assert_allclose(sign * samples, taken * tone, atol=1e-5)
