"""utils.py: tokens, sound, features, batches, and the files of both data sets, whole and broken."""

import hashlib
import os

import utils
from conftest import oct_arrays, write_corpus
from runs import UserError
from utils import PAD, START, STOP, VOCABULARY

import medmnist
import numpy as np
import pytest
import soundfile
import torch


# ------------------------------------------------------------------------------------------- plots
def test_a_figure_names_its_data_and_is_the_same_bytes_again(tmp_path):
    def save(folder):
        figure = utils.pyplot().figure(figsize=(2, 1))
        assert utils.save_figure(figure, tmp_path / folder, "a", "made up_$") is figure
        assert figure.get_supxlabel().replace("\n", " ") == "data: made up_$"
        return {path.name: path.read_bytes() for path in (tmp_path / folder / "figures").iterdir()}

    files = save("first")
    assert sorted(files) == ["a.pdf", "a.png"] and save("second") == files


# ---------------------------------------------------------------------------------------- OCTMNIST
BAD_ARRAYS = {
    "has no entry 'val_labels'": lambda a: a.pop("val_labels"),
    r"is uint8 \(20, 32, 32\)": lambda a: a.update(test_images=np.zeros((20, 32, 32), np.uint8)),
    "has a label 7": lambda a: a["test_labels"].__setitem__(0, 7),
    r"classes \[0, 1\], not 0 to 3": lambda a: a["train_labels"].__imod__(2),  # another dataset
    "has 0 entries": lambda a: a.update(
        val_images=np.zeros((0, 28, 28), np.uint8), val_labels=np.zeros((0, 1), np.uint8)
    ),
    "not in MedMNIST's format": lambda a: a.update(source=np.array([{"a": 1}], dtype=object)),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_wrong_arrays_are_named(tmp_path, message):
    arrays = oct_arrays()
    BAD_ARRAYS[message](arrays)
    np.savez(tmp_path / "octmnist.npz", **arrays)
    with pytest.raises(UserError, match=message):
        utils.load_oct_data(tmp_path)


def test_the_official_file_is_known_by_its_checksum_and_another_says_what_it_is(
    tmp_path, monkeypatch
):
    assert utils.OCTMNIST_MD5 == medmnist.INFO["octmnist"]["MD5"]
    path = tmp_path / "octmnist.npz"
    np.savez(path, **oct_arrays())
    assert utils.load_oct_data(tmp_path)[1]["source"] == "octmnist.npz of unknown origin"
    np.savez(path, source="drawings", **oct_arrays())
    assert utils.load_oct_data(tmp_path)[1]["source"] == "drawings"
    monkeypatch.setattr(utils, "OCTMNIST_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    assert utils.load_oct_data(tmp_path)[1]["source"] == "OCTMNIST"


@pytest.mark.parametrize("key", ["train_labels", "val_images", "test_images", "test_labels"])
def test_the_hash_is_of_every_image_and_label(tmp_path, key):
    found = set()
    for change in (0, 1):
        arrays = oct_arrays()
        arrays[key][-1] = 3 - change
        np.savez(tmp_path / "octmnist.npz", **arrays)
        found.add(utils.load_oct_data(tmp_path)[1]["sha256"])
    assert len(found) == 2


def test_damage_is_seen_wherever_it_is(oct_folder):
    path = oct_folder / "octmnist.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2  # within compressed images
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (b"", whole[:middle], whole[:-1], flipped):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            utils.load_oct_data(oct_folder)


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
    assert utils.decode([START, 9, STOP, 10, STOP]) == "a"
    assert utils.decode([START, 9, PAD, 10]) == "a"
    assert utils.decode([9, 10]) == "ab"


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
    samples[:1500] = 0  # silence, which is 8 decades below the loudest moment of the clip
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


def test_a_clip_is_centred_band_by_band():
    clip = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 80.0]])
    assert utils.centre(clip).tolist() == [[-2, -30], [0, -10], [2, 40]]


# ------------------------------------------------------------------------------------------ corpus
@pytest.mark.parametrize("mark, line_end", [("\ufeff", "\r\n"), ("", "\r")])
def test_corpus_is_split_in_order_and_labelled(tmp_path, mark, line_end):
    """However an editor saved the table: with a byte-order mark, other line ends, a blank line."""
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
    table, wavs = root / "metadata.csv", root / "wavs"

    def hash_now():
        return utils.load_ljspeech(tmp_path)[1]["sha256"]

    hashes = [hash_now()]
    for clip in sorted(wavs.iterdir()):
        content = bytearray(clip.read_bytes())
        content[-1] ^= 1
        clip.write_bytes(content)
        hashes.append(hash_now())
    for old, new in (("Text 3", "text 3"), ("yes", "no")):
        table.write_text(table.read_text().replace(old, new))
        hashes.append(hash_now())
    table.write_text(table.read_text().replace("LJ001-0003", "LJ001-0009"))
    (wavs / "LJ001-0003.wav").rename(wavs / "LJ001-0009.wav")
    hashes.append(hash_now())
    assert len(set(hashes)) == 1 + 4 + 2 + 1
    os.utime(wavs / "LJ001-0000.wav", (0, 0))  # times do not count
    assert hash_now() == hashes[-1]


def test_a_corpus_says_what_it_is(tmp_path):
    root = write_corpus(tmp_path, 4)
    (root / "README").write_text("The LJ Speech Dataset\n")
    assert utils.load_ljspeech(tmp_path)[1]["source"] == "LJ Speech 1.1, 4 of 13,100 clips"
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("LJ0", "X"))
    for clip in (root / "wavs").iterdir():
        clip.rename(root / "wavs" / clip.name.replace("LJ0", "X"))
    assert utils.load_ljspeech(tmp_path)[1]["source"] == "a corpus of 4 clips"


def test_the_transcript_is_the_normalised_one_and_the_path_its_own(tmp_path):
    root = write_corpus(tmp_path, 4)
    splits, _ = utils.load_ljspeech(tmp_path)
    clips = [*splits["train"], *splits["val"], *splits["test"]]
    texts = ["aa, yes", "bbb, yes", "cccc, yes", "dd, yes"]
    names = [f"LJ001-{i:04}" for i in range(4)]
    assert clips == [
        (n, text, root / "wavs" / f"{n}.wav") for n, text in zip(names, texts, strict=True)
    ]


def clips_named(names):
    return [(name, "text", None) for name in names]


def ids(splits):
    """The ids of every split: {split: [id]}."""
    return {split: [name for name, _, _ in clips] for split, clips in splits.items()}


@pytest.mark.parametrize("first", [0, 2_600])  # where the rows begin
def test_the_courses_split_of_the_full_corpus(first):
    names = [f"LJ{1 + i // 262:03}-{i % 262:04}" for i in range(13_100)]
    splits, how = utils.split_clips(clips_named(names[first:] + names[:first]))
    expected = {"train": names[:9_825], "val": names[9_825:10_480], "test": names[10_480:]}
    assert ids(splits) == expected
    assert how == "the course's: first 75 %, next 5 %, last 20 % of the clips, in order"


def test_the_courses_split_begins_where_it_is_said_to(real_data):
    rows = (real_data / "ljspeech_metadata_full.csv").read_text("utf-8").splitlines()
    splits, _ = utils.split_clips(clips_named([row.split("|")[0] for row in rows]))
    first = {split: clips[0][0] for split, clips in splits.items()}
    assert first == {"train": "LJ001-0001", "val": "LJ037-0213", "test": utils.FIRST_TEST_CLIP}


@pytest.mark.parametrize("n_first", [0, 20])
def test_test_clips_of_a_part_stay_test(n_first):
    """Of the 31 clips before the boundary a twentieth, 1.55, is validation: two clips."""
    names = [f"LJ{chapter:03}-{i:04}" for chapter in (1, 12, 38) for i in range(10)]
    names += ["LJ040-0046", "LJ040-0047", "LJ040-0048", "LJ050-0278"]
    splits, how = utils.split_clips(clips_named(names[n_first:] + names[:n_first]))
    expected = {
        "train": names[:29],
        "val": ["LJ038-0009", "LJ040-0046"],
        "test": ["LJ040-0047", "LJ040-0048", "LJ050-0278"],
    }
    assert ids(splits) == expected and "the course's test part" in how


OTHERS = [f"X-{i}" for i in range(10)]


@pytest.mark.parametrize(
    "names, n_train, n_val",
    [
        (["LJ001-0001", "LJ001-0002", "LJ040-0047", "LJ040-0048"], 1, 1),  # two test clips
        (["LJ001-0001", "LJ040-0047", "LJ040-0048", "LJ040-0049"], 2, 1),  # only one other clip
        ([f"LJ001-{i:04}" for i in range(50)], 38, 2),  # no test clips
        (OTHERS[:4], 2, 1),  # the smallest corpus: no split is empty
        (OTHERS[::-1], 8, 1),  # in the order of its rows
        ([*OTHERS[::-1], "LJ001-0001"], 8, 1),
    ],
)
def test_corpora_that_are_no_usual_part(names, n_train, n_val):
    splits, _ = utils.split_clips(clips_named(names))
    expected = {"train": names[:n_train], "val": names[n_train:][:n_val]}
    assert ids(splits) == {**expected, "test": names[n_train + n_val :]}


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


# ---------------------------------------------------------------------------- features and batches
def assert_features_are_the_clips(splits, out):
    """They equal those of every clip computed alone."""
    features = utils.load_features(splits, out)
    assert list(features) == list(splits)
    for split, rows in splits.items():
        for clip, (_, _, path) in zip(features[split], rows, strict=True):
            assert clip.dtype == torch.float16
            assert torch.equal(clip, utils.log_mel(utils.read_audio(path)).half())


def test_features_are_cached_and_a_damaged_cache_is_made_again(tmp_path):
    write_corpus(tmp_path)
    splits, _ = utils.load_ljspeech(tmp_path)
    assert_features_are_the_clips(splits, tmp_path / "out")
    (cache,) = (tmp_path / "out" / "features").iterdir()
    before = cache.stat().st_mtime_ns
    assert_features_are_the_clips(splits, tmp_path / "out")
    assert cache.stat().st_mtime_ns == before
    cache.write_bytes(cache.read_bytes()[:1000])
    assert_features_are_the_clips(splits, tmp_path / "out")


def write_noise(path, seed, n_samples=6000, time=10**9):
    """Write a clip that depends on the seed; as from an archive, all have the same time."""
    noise = np.random.default_rng(seed).uniform(-1, 1, n_samples).cumsum() / 100
    soundfile.write(path, noise, utils.SAMPLE_RATE)
    os.utime(path, ns=(time, time))


def another_of_the_same_size(splits):
    """It is not the first clip, and it is replaced within the same second."""
    write_noise(splits["train"][2][2], seed=99, time=10**9 + 10**6)


def a_longer_one_of_the_same_time(splits):
    write_noise(splits["test"][-1][2], seed=99, n_samples=7000)


def two_in_another_order(splits):
    splits["train"][1:3] = splits["train"][2:0:-1]


def a_clip_in_another_split(splits):
    splits["train"].append(splits["val"].pop(0))


def the_code_is_edited(splits):
    log_mel = utils.log_mel
    utils.log_mel = lambda samples: log_mel(samples) / 2


CACHE_CHANGES = (
    another_of_the_same_size,
    a_longer_one_of_the_same_time,
    two_in_another_order,
    a_clip_in_another_split,
    the_code_is_edited,
)


@pytest.mark.parametrize("change", CACHE_CHANGES)
def test_a_cache_of_other_clips_is_not_used(tmp_path, monkeypatch, change):
    monkeypatch.setattr(utils, "log_mel", utils.log_mel)  # put back afterwards
    paths = [tmp_path / f"{i}.wav" for i in range(7)]
    for i, path in enumerate(paths):
        write_noise(path, seed=i)
    rows = [(path.stem, "text", path) for path in paths]
    splits = {"train": rows[:3], "val": rows[3:5], "test": rows[5:]}
    assert_features_are_the_clips(splits, tmp_path / "out")
    change(splits)
    assert_features_are_the_clips(splits, tmp_path / "out")


def test_padding_has_the_value_that_is_asked_for():
    features = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])]
    padded, lengths = utils.pad(features, -7.0)
    assert padded.tolist() == [[[1, 2], [-7, -7]], [[3, 4], [5, 6]]]
    assert lengths.tolist() == [1, 2]
    padded, lengths = utils.pad([torch.tensor([START, 9, STOP]), torch.tensor([START])], PAD)
    assert padded.tolist() == [[START, 9, STOP], [START, PAD, PAD]]
    assert lengths.tolist() == [3, 1] and padded.dtype == torch.int64


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


def epochs_of_batches(lengths, batch_size, n_epochs=20):
    torch.manual_seed(0)
    return [
        [
            sorted(lengths[i] for i in batch)
            for batch in utils.batches_by_length(lengths, batch_size)
        ]
        for _ in range(n_epochs)
    ]


def test_batches_come_in_an_order_that_is_new_every_epoch():
    """The batch that is not full, with the longest clip, may come anywhere, too."""
    epochs = epochs_of_batches([100, 200, 300, 400, 500, 600, 700], 2)
    assert {tuple(map(tuple, sorted(batches))) for batches in epochs} == {
        ((100, 200), (300, 400), (500, 600), (700,))
    }
    for wanted in ([100, 200], [700]):
        assert {batches.index(wanted) for batches in epochs} == {0, 1, 2, 3}


def test_lengths_are_jittered_by_up_to_5_percent():
    within = epochs_of_batches([100] * 8 + [104] * 8, 8)
    beyond = epochs_of_batches([100] * 8 + [106] * 8, 8)
    assert any(100 in batch and 104 in batch for batches in within for batch in batches)
    assert not any(100 in batch and 106 in batch for batches in beyond for batch in batches)


def test_unshuffled_batches_are_in_order_of_length_and_nothing_is_drawn():
    before = torch.get_rng_state()
    batches = utils.batches_by_length([5, 9, 5, 1, 9, 5, 1], 3, shuffle=False)
    assert [batch.tolist() for batch in batches] == [[3, 6, 0], [2, 5, 1], [4]]
    assert torch.equal(torch.get_rng_state(), before)


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
    """Programs that write WAV to a pipe do not know its length and promise the largest one."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.sin(np.arange(44_100) / 20), utils.SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(utils.read_audio(path)) == 44_100


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_resampling_keeps_a_tone_and_its_length(tmp_path, rate):
    time = np.arange(3 * rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples = utils.read_audio(tmp_path / "tone.wav").numpy()
    assert len(samples) == 3 * utils.SAMPLE_RATE and samples.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / utils.SAMPLE_RATE)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=5e-3)


@pytest.mark.parametrize("gain, taken", [(0.9, 0.95), (-1, 1), (0, 0.5), (-0.5, 0.75)])
def test_channels_are_averaged_after_aligning_their_signs(tmp_path, gain, taken):
    tone = 0.5 * np.sin(np.arange(44_100) / 20)
    for channels in (np.stack([tone, gain * tone], axis=1), np.stack([gain * tone, tone], axis=1)):
        soundfile.write(tmp_path / "stereo.wav", channels, utils.SAMPLE_RATE, subtype="FLOAT")
        samples = utils.read_audio(tmp_path / "stereo.wav").numpy()
        sign = np.sign(samples @ tone)
        np.testing.assert_allclose(sign * samples, taken * tone, atol=1e-5)


@pytest.mark.parametrize("promised, is_read", [(8, True), (2_000, True), (20_000, False)])
@pytest.mark.parametrize("place", ["RIFF", "data"])
def test_a_header_may_promise_a_little_more(tmp_path, promised, is_read, place):
    """The length of the whole file may be any: only that of the samples counts."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.sin(np.arange(44_100) / 20), utils.SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    offset = {"RIFF": 4, "data": 40}[place]
    length = int.from_bytes(content[offset : offset + 4], "little") + promised
    content[offset : offset + 4] = length.to_bytes(4, "little")
    path.write_bytes(content)
    if is_read or place == "RIFF":
        assert len(utils.read_audio(path)) == 44_100
    else:
        with pytest.raises(UserError, match="cut short"):
            utils.read_audio(path)
