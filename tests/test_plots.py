"""plots.py: what the marks of a text and the frames of the animation say."""

import plots

import PIL.Image
import torch


def test_wrong_letters_are_bold_and_missing_ones_are_marked():
    assert plots.marked("cat", "cat") == "cat"
    assert plots.marked("cat", "kat") == "<b>k</b>at"
    assert plots.marked("cat", "caat") in ("c<b>a</b>at", "ca<b>a</b>t")
    assert plots.marked("cats", "cas") == "ca<b>‸</b>s"


def test_the_animation_holds_its_last_picture(tmp_path):
    """A frame for each letter, two seconds for the last."""
    weights = torch.eye(4)[:3]  # each letter listens one frame later
    likeliest = [("a", 0.7), ("b", 0.2), ("c", 0.1)]
    steps = [("<" + "a" * n, likeliest, weights[n]) for n in range(3)]
    path = plots.animate(steps, torch.zeros(8, 80), tmp_path / "a.gif", "synthetic test tones")
    durations = []
    with PIL.Image.open(path) as picture:
        for n in range(picture.n_frames):
            picture.seek(n)
            durations.append(picture.info["duration"])
        assert picture.width >= 700
    assert durations == [150, 150, 2_000]
