"""transcribe.py and demo.py: recordings are written down whole, one line per file."""

import decoding
import demo
import runs
import transcribe
import utils
from conftest import run_script
from tools import sample_speech

import numpy as np
import pytest
import soundfile
import torch

RATE = utils.SAMPLE_RATE
SENTENCES = ("The sailor sold the letter.", "Who found the long bridge after lunch?")
Q3 = runs.load_definitions(transcribe.NOTEBOOK, device="cpu")


@pytest.fixture(scope="module")
def spoken():
    """Both sentences by the sample's voice, each (n,) float32."""
    clips = [sample_speech.say(text, speed=0.9, seed=1) for text in SENTENCES]  # 16 bits each
    return [torch.from_numpy(clip / np.float32(32_768)) for clip in clips]


@pytest.fixture(scope="module")
def model():
    return Q3.load_model(transcribe.MODEL)


def room(seconds, decibels):
    """Noise of so many decibels below full scale (root mean square against 1)."""
    noise = np.random.default_rng(0).normal(size=int(seconds * RATE))
    return torch.from_numpy((noise * 10 ** (decibels / 20)).astype(np.float32))


# ------------------------------------------------------------------------------------- recordings
def test_stretches_are_short_in_order_and_leave_nothing_out(spoken):
    """For half a minute of speech without a clear pause."""
    trimmed = [samples[: len(samples) - RATE // 5] for samples in spoken]
    samples = torch.cat(12 * trimmed)
    stretches = transcribe.stretches_of_speech(samples)
    assert len(stretches) > 3
    assert all(b - a <= (transcribe.LONGEST_STRETCH + 0.1) * RATE for a, b in stretches)
    ends = [0, *(b for _, b in stretches)]
    starts = [*(a for a, _ in stretches), len(samples)]
    assert all(0 <= start - end < 0.5 * RATE for end, start in zip(ends, starts, strict=True))


def test_a_margin_of_sound_stays_around_each_stretch(spoken, monkeypatch):
    """On both sides, compared with the stretch that is found without a margin."""
    samples = torch.cat([torch.zeros(2 * RATE), spoken[0], torch.zeros(2 * RATE)])
    ((start, stop),) = transcribe.stretches_of_speech(samples)
    monkeypatch.setattr(transcribe, "MARGIN", 0.0)
    ((first, last),) = transcribe.stretches_of_speech(samples)
    for margin in (first - start, stop - last):
        assert margin / RATE == pytest.approx(0.15, abs=0.02)


def test_the_letters_have_a_vote_only_where_they_are_asked(model, spoken, monkeypatch):
    heard = []
    monkeypatch.setattr(
        decoding, "beam_search", lambda *_, letters, **__: heard.append(letters) or [9]
    )
    for letter_share in (0.4, 0):
        transcribe.transcribe_samples(model, spoken[0], letter_share=letter_share)
    assert heard[0] is transcribe.letter_model() and heard[-1] is None


def test_the_letters_weigh_what_the_models_file_says(model, spoken, monkeypatch):
    heard = []
    monkeypatch.setattr(
        decoding, "beam_search", lambda *_, letter_share, **__: heard.append(letter_share) or [9]
    )
    for chosen in ({}, {"letter_share": 0.2}, {"letter_share": 0}):
        monkeypatch.setattr(model, "search", chosen)
        transcribe.transcribe_samples(model, spoken[0])
    monkeypatch.delattr(model, "search")  # as of a model that was just trained
    transcribe.transcribe_samples(model, spoken[0])
    assert heard == [decoding.LETTER_SHARE, 0.2, 0, decoding.LETTER_SHARE]


@pytest.mark.parametrize("decibels", [-300, -30])
def test_nobody_speaks(model, tmp_path, decibels):
    soundfile.write(tmp_path / "room.wav", room(5, decibels).numpy(), RATE)
    assert transcribe.transcribe(model, tmp_path / "room.wav") == []


def test_what_people_record_comes_out_whole(model, spoken, tmp_path):
    """With noise before and after, pauses with and without noise, an inverted right channel."""
    texts = [transcribe.write_down(model, samples) for samples in spoken]
    for sentence, text in zip(SENTENCES, texts, strict=True):
        assert Q3.damerau_levenshtein(sentence.lower(), text) > 0.6
    first, second = spoken
    silence, noise = torch.zeros(12 * RATE), room(7, -40)
    samples = torch.cat([room(3, -40), first, silence, second, noise, first, room(2, -50)])
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), RATE)
    written = transcribe.text_of(transcribe.transcribe(model, tmp_path / "a.wav"))
    assert Q3.damerau_levenshtein(" ".join([*texts, texts[0]]), written) > 0.85


def test_the_model_that_comes_with_the_clone_understands_real_clips(model, real_data):
    splits, info = utils.load_ljspeech(real_data)
    assert info["source"].startswith("LJ Speech 1.1")
    similarity = []
    for _, text, path in splits["test"][:4]:
        reference = utils.decode(utils.encode(text))
        written = transcribe.text_of(transcribe.transcribe(model, path))
        similarity.append(Q3.damerau_levenshtein(reference, written))
    assert np.mean(similarity) > 0.6


# ------------------------------------------------------------------------------------ command line
def test_one_line_for_each_file_in_order(tmp_path, spoken):
    speech = spoken[0].numpy()
    soundfile.write(tmp_path / "b.wav", speech, RATE)
    soundfile.write(tmp_path / "a b.flac", speech, RATE)
    soundfile.write(tmp_path / "silence.ogg", np.zeros(8_000), 8_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    names = ["b.wav", "missing.wav", "a b.flac", "broken.wav", "silence.ogg"]
    files = [tmp_path / name for name in names]
    process = run_script("transcribe.py", *files)
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [path for path, _ in lines] == [str(files[i]) for i in (0, 2, 4)]
    assert lines[0][1] == lines[1][1] != "" and lines[2][1] == ""
    silent, problems = process.stderr.splitlines()
    assert silent == f"{files[4]}: nobody speaks in it."
    assert process.returncode == 2
    assert "missing.wav: No such file" in problems
    assert "broken.wav is no readable sound file" in problems


def test_two_speakers_one_on_each_side_are_both_heard(model, spoken, tmp_path):
    texts = [transcribe.write_down(model, samples) for samples in spoken]
    first, second, silence = *spoken, torch.zeros(RATE)
    left = torch.cat([first, silence, torch.zeros_like(second)])
    right = torch.cat([torch.zeros_like(first), silence, second])
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE)
    written = transcribe.text_of(transcribe.transcribe(model, tmp_path / "a.wav"))
    assert Q3.damerau_levenshtein(" ".join(texts), written) > 0.9


def test_a_model_that_writes_nothing_is_not_a_silent_room(
    model, spoken, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(transcribe, "write_down", lambda *_: "")
    soundfile.write(tmp_path / "a.wav", spoken[0].numpy(), RATE)
    transcribe.main(transcribe.make_parser().parse_args([str(tmp_path / "a.wav")]))
    assert capsys.readouterr().err.endswith("a.wav: the model wrote nothing.\n")


def test_a_phones_memo_is_told_how_to_be_converted(tmp_path):
    path = tmp_path / "memo.m4a"
    path.write_bytes(b"\0\0\0 ftypM4A isom" + bytes(999))
    with pytest.raises(runs.UserError, match=r"memo\.m4a is no .*-i memo\.m4a memo-new\.wav`"):
        transcribe.transcribe(None, path)


# --------------------------------------------------------------------------------------- the page
def test_the_page_gives_the_text_always_and_a_picture_that_fits(model, monkeypatch, tmp_path):
    """Of 90 seconds of speech, say."""
    second = RATE
    written = [(10 * i * second, 9 * second + 10 * i * second, "a" * 120) for i in range(9)]
    monkeypatch.setattr(transcribe, "write_stretches", lambda *_: iter(written))
    soundfile.write(tmp_path / "long.wav", np.zeros(90 * RATE, dtype=np.float32), RATE)
    *earlier, (text, figure) = demo.text_and_picture(model, tmp_path / "long.wav")
    assert text == " ".join(["a" * 120] * 9)
    assert earlier == [(text[: 121 * n - 1], None) for n in range(1, 10)]  # as it comes
    height = figure.get_figheight() * figure.dpi
    assert len(figure.axes) == 4 and height < 16_383  # pixels, the most that WebP allows


def test_the_page_says_how_often_its_model_errs():
    result = runs.load_result(runs.ROOT / "report", "q3-model-transformer")
    scores = result["recordings"]["clips as they are"]
    said = demo.about_the_model()
    assert f"Of {scores['n']} other sentences" in said
    assert f"{round(100 * scores['wer'])} % of the words wrong" in said
    assert f"{result['trained']['data']['counts']['train']} sentences read by one woman" in said
    assert len(demo.EXAMPLES) == 2


def test_the_page_says_what_is_wrong_with_a_recording(tmp_path):
    """Without the path of a temporary file, and without advice about metadata.csv."""
    (tmp_path / "memo.m4a").write_bytes(bytes(999))
    ((text, figure),) = demo.text_and_picture(None, tmp_path / "memo.m4a")
    assert text.startswith("(The recording is no readable sound file") and figure is None
    assert str(tmp_path) not in text and "metadata" not in text


def test_a_model_of_another_vocabulary_is_searched_without_the_letters(monkeypatch, capsys):
    monkeypatch.setattr(utils, "VOCABULARY", utils.VOCABULARY + "0123456789")
    transcribe.letter_model.cache_clear()
    assert transcribe.letter_model() is None
    assert "letters.pt knows another vocabulary" in capsys.readouterr().err
    transcribe.letter_model.cache_clear()
