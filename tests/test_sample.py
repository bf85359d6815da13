"""make_sample_data.py: the formats, the classes, the speech, and that nothing half-written or foreign is harmed."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import soundfile
from conftest import ROOT, SHARED, run_script

import make_sample_data
import utils
from utils import UserError

N_CLIPS = 60
TINY = {"train": (22, 7, 5, 30), "val": (3, 1, 1, 4), "test": (2, 2, 2, 2)}


def make(out, *flags):
    """Run the script's main in this process; everything tiny unless flags say otherwise."""
    arguments = ["-out", out, "-n_clips", N_CLIPS, "-workers", 1, *flags]
    make_sample_data.main(make_sample_data.make_parser().parse_args([str(argument) for argument in arguments]))
    return out


def contents(folder):
    """{path: (bytes, time of writing)} of every file under a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def same_bytes(a, b):
    return {k: v[0] for k, v in contents(a).items()} == {k: v[0] for k, v in contents(b).items()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Both datasets, a tenth of the images and 60 clips, made in this process. Tests must not change it."""
    tenth = {split: tuple(round(n / 10) for n in counts) for split, counts in make_sample_data.SPLITS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_sample_data, "SPLITS", tenth)
        return make(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(make_sample_data, "SPLITS", TINY)


# -------------------------------------------------------------------------------------------------------- OCTMNIST
def test_octmnist_has_medmnists_format(sample):
    with np.load(sample / "octmnist.npz", allow_pickle=False) as file:
        assert set(file.files) - {"source", "settings"} == {
            f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")
        }
    splits, info = utils.load_oct_data(sample)
    assert info["source"] == "synthetic sample (procedural B-scans)"
    assert info["counts"] == {"train": 800, "val": 80, "test": 100}
    assert np.bincount(splits["test"][1].numpy()).tolist() == [25] * 4
    assert len(set(splits["train"][1][:50].tolist())) > 2  # shuffled


def test_octmnist_sizes():
    """OCTMNIST's class mix, and in the test split the 182, 55, 42 and 250 images of the course's subset."""
    for split in ("train", "val"):
        counts = np.array(make_sample_data.SPLITS[split])
        np.testing.assert_allclose(counts / counts.sum(), (0.343, 0.105, 0.080, 0.472), atol=0.003)
    assert make_sample_data.SPLITS["test"] == (250, 250, 250, 250)


def test_octmnist_is_deterministic(tiny, tmp_path):
    first, again, other = (
        make(tmp_path / name, "-only", "octmnist", "-seed", seed)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert same_bytes(first, again) and not same_bytes(first, other)


def test_no_image_twice(sample):
    with np.load(sample / "octmnist.npz") as file:
        images = np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])
    assert len({image.tobytes() for image in images}) == len(images)


def test_classes_are_what_they_claim(monkeypatch):
    """Scans that differ in their class alone (same random numbers, no speckle), measured in pixels."""
    monkeypatch.setattr(make_sample_data, "SPECKLE", 1e9)
    depth, rows, lift, crests, dark, thick = np.arange(28)[:, None], {}, {}, {}, {}, {}
    for label in (3, 0, 1, 2):
        scans = make_sample_data.draw_scans(np.full(200, label), np.random.default_rng(0)).astype(float)
        scans[scans == 255] = 0  # the white corners
        outer, inner = scans.argmax(axis=1), (scans > 40).argmax(axis=1)  # (N, 28): rows of the two surfaces
        rows[label] = outer
        lift[label] = np.median((rows[3] - outer).max(axis=1))
        crests[label] = ((outer[:, 1:-1] < outer[:, :-2]) & (outer[:, 1:-1] <= outer[:, 2:])).sum(axis=1).mean()
        retina = (depth > inner[:, None] + 1) & (depth < outer[:, None] - 1)  # (N, 28, 28)
        dark[label] = (retina & (scans < 30)).sum(axis=(1, 2)).mean()
        thick[label] = (outer - inner).mean()
        if label == 3:
            assert (inner.max(axis=1) - np.median(inner, axis=1)).mean() > 2  # the foveal dip
    assert lift[0] >= 3 and crests[0] < 3  # CNV: one high rise of the outer layer
    assert 2 <= lift[2] <= lift[0] and crests[2] > 3.5  # drusen: several small ones
    assert lift[1] == 0 and dark[1] > 5 and thick[1] > thick[3] + 0.8  # DME: dark cysts and thickening
    assert max(dark[0], dark[2], dark[3]) < 0.1


# ----------------------------------------------------------------------------------------------------------- speech
def read_rows(folder):
    return [line.split("|") for line in (folder / "LJSpeech-1.1" / "metadata.csv").read_text().splitlines()]


def test_ljspeech_has_its_format(sample):
    rows = read_rows(sample)
    assert len(rows) == N_CLIPS and all(len(row) == 3 and row[1] == row[2] for row in rows)
    assert {f"{row[0]}.wav" for row in rows} == set(os.listdir(sample / "LJSpeech-1.1" / "wavs"))
    assert all(re.fullmatch(r"SY\d{3}-\d{4}", row[0]) for row in rows)
    label = (sample / "LJSpeech-1.1" / "README").read_text().splitlines()[0]
    assert label == "synthetic sample: sentences from a small grammar, spoken by eSpeak NG"
    for clip, _, text in rows:
        sound, rate = soundfile.read(sample / "LJSpeech-1.1" / "wavs" / f"{clip}.wav")
        info = soundfile.info(sample / "LJSpeech-1.1" / "wavs" / f"{clip}.wav")
        assert (rate, info.channels, info.subtype, info.format) == (22_050, 1, "PCM_16", "WAV")
        assert 10 < len(text) / (len(sound) / rate) < 30  # characters a second
        assert 0.1 < np.abs(sound).max() < 1


def test_sentences_are_distinct_and_cover_the_alphabet():
    texts = [row[2] for row in make_sample_data.grammar(2_000, 42)]
    assert len(set(texts)) == len({row[0] for row in make_sample_data.grammar(2_000, 42)}) == 2_000
    assert set("".join(texts).lower()) == set("abcdefghijklmnopqrstuvwxyz ,.?-")
    assert all(20 <= len(text) <= 55 for text in texts)
    assert texts[:10] == [row[2] for row in make_sample_data.grammar(10, 42)]
    assert texts[:10] != [row[2] for row in make_sample_data.grammar(10, 43)]
    with pytest.raises(UserError, match="only 35,136 sentences"):
        make_sample_data.grammar(35_137, 42)


def test_command_line_and_workers(sample, tmp_path):
    """The sound depends on the seed alone: two workers make what this process made in `sample`."""
    flags = ("-only", "ljspeech", "-out", tmp_path, "-n_clips", N_CLIPS, "-workers", 2)
    process = run_script("make_sample_data.py", *flags)
    assert (process.returncode, process.stderr, process.stdout.count("\n")) == (0, "", 1)
    assert same_bytes(tmp_path / "LJSpeech-1.1", sample / "LJSpeech-1.1")
    before = contents(tmp_path)["LJSpeech-1.1/wavs/SY001-0001.wav"][0]
    make(tmp_path, "-only", "ljspeech", "-metadata", tmp_path / "LJSpeech-1.1" / "metadata.csv", "-seed", 1)
    assert contents(tmp_path)["LJSpeech-1.1/wavs/SY001-0001.wav"][0] != before  # the same text, another voice


def test_rate_and_pitch_vary(tmp_path):
    lines = [f"X-{i}|the same words|the same words\n" for i in range(8)]
    (tmp_path / "meta.csv").write_text("".join(lines))
    make(tmp_path, "-only", "ljspeech", "-metadata", tmp_path / "meta.csv")
    lengths = {soundfile.info(path).frames for path in (tmp_path / "LJSpeech-1.1" / "wavs").iterdir()}
    assert len(lengths) > 5


def test_metadata_is_spoken_as_given(tmp_path):
    text = 'LJ001-0001|In 1901, Mr. «Ünal»|In nineteen oh one, mister Ünal\nLJ050-0278|"Why?"|why, she said\n'
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8")
    make(tmp_path, "-only", "ljspeech", "-metadata", tmp_path / "meta.csv", "-workers", 2)
    folder = tmp_path / "LJSpeech-1.1"
    assert (folder / "metadata.csv").read_text(encoding="utf-8") == text
    assert sorted(os.listdir(folder / "wavs")) == ["LJ001-0001.wav", "LJ050-0278.wav"]
    assert (
        (folder / "README").read_text().startswith("synthetic stand-in: transcripts of meta.csv, spoken by eSpeak NG\n")
    )
    assert soundfile.info(folder / "wavs" / "LJ001-0001.wav").duration > 1.5  # the normalised column: written-out words


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "No such file"),
        (b"", "line 1 .* number of columns"),
        (b"a|b|c\nd|e\n", "line 2 .* number of columns"),
        (b"a|b|c|d\n", "number of columns"),
        (b"a|b|c\n\n", "line 2 .* number of columns"),
        (b"../a|b|c\n", "the id '../a'"),
        (b"/etc/a|b|c\n", "the id '/etc/a'"),
        (b"a\n|b|c\n", "line 1"),
        (b"|b|c\n", "the id ''"),
        (b"a|b|c\na|d|e\n", "line 2 .* second time"),
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


@pytest.mark.skipif(not SHARED.exists(), reason="the real LJ Speech metadata is not beside this checkout")
def test_real_metadata():
    assert len(make_sample_data.read_metadata(SHARED / "ljspeech_metadata_full.csv")) == 13_100


def test_long_install_path(sample, tmp_path, monkeypatch):
    """eSpeak NG's C code cuts paths at 160 bytes; the sound must be the same from a longer one."""
    folder = tmp_path / ("x" * 120) / ("é" * 60)
    folder.mkdir(parents=True)
    (folder / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(folder / "espeak-ng-data"))
    make(tmp_path, "-only", "ljspeech")
    assert same_bytes(tmp_path / "LJSpeech-1.1", sample / "LJSpeech-1.1")


def test_unusable_espeak_data(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="eSpeak NG cannot read its data"):
        make(tmp_path, "-only", "ljspeech", "-n_clips", 1)
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------- again, and interrupted
def test_second_call_does_nothing(tiny, tmp_path, capsys):
    before = contents(make(tmp_path))
    capsys.readouterr()
    assert contents(make(tmp_path)) == before
    assert capsys.readouterr().out.count("complete already") == 2


def test_incomplete_or_other_settings_are_made_again(tiny, tmp_path):
    before = contents(make(tmp_path))
    next((tmp_path / "LJSpeech-1.1" / "wavs").iterdir()).unlink()
    make(tmp_path)
    assert {k: v[0] for k, v in contents(tmp_path).items()} == {k: v[0] for k, v in before.items()}
    make(tmp_path, "-seed", 1)
    after = contents(tmp_path)
    assert after["octmnist.npz"][0] != before["octmnist.npz"][0]
    assert after["LJSpeech-1.1/metadata.csv"][0] != before["LJSpeech-1.1/metadata.csv"][0]
    assert sorted(os.listdir(tmp_path)) == ["LJSpeech-1.1", "octmnist.npz"]


def test_foreign_data_is_left_alone(tiny, tmp_path):
    (tmp_path / "LJSpeech-1.1").mkdir()
    (tmp_path / "LJSpeech-1.1" / "README").write_text("The LJ Speech Dataset")
    np.savez(tmp_path / "octmnist.npz", train_images=np.zeros(3))
    before = contents(tmp_path)
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="name another folder"):
            make(tmp_path, "-only", only)
    (tmp_path / "octmnist.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="damaged"):
        make(tmp_path, "-only", "octmnist")
    assert contents(tmp_path)["LJSpeech-1.1/README"] == before["LJSpeech-1.1/README"]


def test_full_disk_keeps_what_was_there(tiny, tmp_path, monkeypatch):
    before = contents(make(tmp_path))

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(soundfile, "write", fail)
    monkeypatch.setattr(np, "savez_compressed", fail)
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="No space left on device"):
            make(tmp_path, "-only", only, "-seed", 1)
    assert contents(tmp_path) == before


def test_killed_half_way(tmp_path):
    command = [sys.executable, str(ROOT / "make_sample_data.py"), "-only", "ljspeech", "-out", str(tmp_path)]
    process = subprocess.Popen([*command, "-n_clips", "2000", "-workers", "1"])
    deadline = time.monotonic() + 30
    while not any(tmp_path.rglob("*.wav")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "LJSpeech-1.1").exists()
    make(tmp_path, "-only", "ljspeech")
    assert os.listdir(tmp_path) == ["LJSpeech-1.1"]


def test_out_that_is_a_file(tiny, tmp_path):
    (tmp_path / "out").touch()
    for only in ("octmnist", "ljspeech"):
        with pytest.raises(UserError, match="cannot write"):
            make(tmp_path / "out", "-only", only)


@pytest.mark.parametrize("flags", [["-n_clips", "0"], ["-seed", "-1"], ["-workers", "0"], ["-only", "mnist"], ["-x"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_sample_data.make_parser().parse_args(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
