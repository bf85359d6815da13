"""tools/letters.py: which transcripts the model of English letters may read, and that it learns."""

import runs
import utils
from conftest import write_corpus
from tools import letters

import torch


def test_only_training_transcripts_are_read(tmp_path):
    write_corpus(tmp_path)
    held_out = {clip for clip, _, _ in utils.load_ljspeech(tmp_path)[0]["val"]}
    clips = [
        *sorted(held_out),
        "LJ002-0001",
        "LJ037-0212",
        "LJ037-0213",
        "LJ040-0046",
        "LJ040-0047",
    ]
    (tmp_path / "all.csv").write_text("".join(f"{c}|{c}|{c}\n" for c in clips))
    training, validation = letters.split_texts(tmp_path / "all.csv", tmp_path)
    assert [utils.decode(t.tolist()) for t in training] == [
        utils.decode(utils.encode(c)) for c in clips[-5:-3]
    ]
    assert len(validation) == 2 and held_out


def test_it_learns_what_comes_next(tmp_path, capsys):
    write_corpus(tmp_path)
    rows = [f"LJ00{i}-0001|x|{'abcde' * (1 + i)}" for i in range(1, 9)]
    rows += ["LJ037-0300|x|abcdeabcde"]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    flags = ["-metadata", "all.csv", "-data", ".", "-out", "out", "-epochs", "60"]
    flags = [
        str(tmp_path / word) if word[0] != "-" and not word.isdigit() else word for word in flags
    ]
    letters.main(letters.make_parser().parse_args(flags))
    saved = runs.load_checkpoint(tmp_path / "out" / "models" / "letters.pt")
    assert (
        saved["vocabulary"] == utils.VOCABULARY
        and saved["model"]["to_logits.bias"].dtype == torch.float16
    )
    bits = [
        float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if "bits" in line
    ]
    assert bits[-1] < 1 < bits[0]
