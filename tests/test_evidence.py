"""tools/evidence.py: each entry writes what it says, on the data that it names."""

import importlib
import json
import shlex
import subprocess

import runs
import utils
from conftest import ROOT, oct_arrays, write_corpus
from runs import UserError
from tools import (
    evidence,
    finetune,
    make_model,
    part_of_ljspeech,
    pooling_control,
    run_notebook,
)

import numpy as np
import pytest

q2 = importlib.import_module("hw2-q2")
q1_measure = importlib.import_module("q1_measure")
ENTRIES = pytest.mark.parametrize("entry", evidence.ENTRIES, ids=lambda entry: entry.name)


def names_of(words):
    """The results that a command writes, by its own parser."""
    script, *flags = words
    if script == "q1_measure.py":
        q1_measure.make_parser().parse_args(flags)
        return ["q1"]
    if script == "hw2-q2.py":
        args = q2.make_parser().parse_args(flags)
        q2.check_flags(args)
        if args.learning_rate == ["best"]:
            search = runs.load_result("report", f"q2-{args.name}")
            return list(q2.plan_runs(args, [search["best"]["learning_rate"]]))
        search = [f"q2-{args.name}"] if len(args.learning_rate) > 1 else []
        return [*q2.plan_runs(args, args.learning_rate), *search]
    module, *flags = flags
    if module == "tools.finetune":
        second = flags.index("&&")  # "&& python -m tools.make_model"
        args = finetune.make_parser().parse_args(flags[:second])
        assert flags[second + 1 : second + 4] == ["python", "-m", "tools.make_model"]
        scored = make_model.make_parser().parse_args(flags[second + 4 :])
        made = f"{args.out}/finetuned/checkpoints/q3-{args.decoder}.pt"
        assert str(scored.checkpoint) == made and str(scored.data) == args.data
        return [f"q3-model-{args.decoder}"]
    if module in ("bench.commands", "tools.exercises"):
        assert not flags
        return [module.split(".")[1].replace("commands", "times")]
    if module == "tools.pooling_control":
        return list(pooling_control.plan_runs(pooling_control.make_parser().parse_args(flags)))
    assert module == "tools.run_notebook"
    given = run_notebook.read_parameters(run_notebook.make_parser().parse_args(flags).parameters)
    return [f"q3-{given['decoders']}{given['tag']}"]


@ENTRIES
def test_an_entrys_command_writes_the_results_under_which_it_stands(entry):
    names = names_of(shlex.split(entry.command.format(data="data")))
    assert sorted(names) == sorted(entry.makes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with small data of both kinds, in which results are made and kept."""
    np.savez(tmp_path / "octmnist.npz", source="synthetic test images", **oct_arrays())
    write_corpus(tmp_path)
    monkeypatch.setattr(evidence, "OUT", str(tmp_path / "out"))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "kept")
    sets = {name: ("{data}", "f00") for name in evidence.DATA_SETS}
    monkeypatch.setattr(evidence, "DATA_SETS", sets)
    return tmp_path


SMALL = {
    "q1": ("q1_measure.py -seq_lens 64 128 -dims 4", ("q1",), None),
    "q2": (
        "hw2-q2.py -data {data} -epochs 1 -learning_rate 0.1 0.01",
        (*(f"q2-maxpool-lr{rate}-seed42-epochs1" for rate in (0.1, 0.01)), "q2-search"),
        "retina",
    ),
    "control": (
        "-m tools.pooling_control -data {data} -epochs 1 -seed 1",
        ("q2-avgpool-lr0.01-seed1-epochs1",),
        "retina",
    ),
    "q3": (
        "-m tools.run_notebook data={data} decoders=lstm tag=-a resume=1 d=16 n_blocks=1 epochs=1",
        ("q3-lstm-a",),
        "spoken",
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_an_entry_is_made_from_beginning_to_end(folder, name):
    words, makes, data = SMALL[name]
    out = f" out={folder}/out" if name == "q3" else f" -out {folder}/out"
    entry = evidence.Entry(name, words + out, makes, data, 1)
    if data:
        problem = rf"the data {data} of {name} have the hash .*, not f00; take the same data"
        with pytest.raises(UserError, match=problem):
            evidence.make(entry, str(folder), takes_any_data=False)
    evidence.make(entry, str(folder), takes_any_data=True)
    kept = {path.stem: json.loads(path.read_text()) for path in (folder / "kept").iterdir()}
    assert sorted(kept) == sorted(makes)
    assert all(result["status"] == "finished" for result in kept.values())


def test_an_entry_of_two_commands_ends_with_the_first_that_fails(folder):
    def entry(first):
        second = f"-c \"open('{folder}/second', 'w')\""
        command = f'-c "{first}" && python {second}'
        return evidence.Entry("two", command, ("two",), "spoken retina", 1, is_in_place=True)

    with pytest.raises(UserError, match=r"spoken on another kind of processor"):
        evidence.make(entry("pass"), str(folder), takes_any_data=False)
    with pytest.raises(UserError, match="two was not made"):
        evidence.make(entry("raise SystemExit(2)"), str(folder), takes_any_data=True)
    assert not (folder / "second").exists()
    evidence.make(entry("pass"), str(folder), takes_any_data=True)
    assert (folder / "second").exists()


def test_results_of_another_command_and_edited_files_are_refused(folder, monkeypatch):
    words, makes, data = SMALL["control"]
    entry = evidence.Entry("control", f"{words} -out {folder}/out", makes, data, 1)
    evidence.make(entry, str(folder), takes_any_data=True)
    monkeypatch.setattr(
        evidence.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0)
    )
    other = evidence.Entry("control", f"{words} -out {folder}/out -data .", makes, None, 1)
    with pytest.raises(UserError, match="was made by another command; delete it first"):
        evidence.make(other, str(folder), takes_any_data=True)
    monkeypatch.setattr(runs, "git_commit", lambda: "abc-dirty")
    with pytest.raises(UserError, match="files were edited since the last commit"):
        evidence.main(evidence.make_parser().parse_args(["q1"]))
    with pytest.raises(UserError, match="there is no entry q9"):
        evidence.main(evidence.make_parser().parse_args(["q9"]))


def test_part_of_ljspeech_copies_the_clips_that_are_named(tmp_path, monkeypatch):
    source = write_corpus(tmp_path)
    names = ["LJ001-0002", "LJ001-0007"]
    monkeypatch.setattr(part_of_ljspeech, "IDS", tmp_path / "ids")
    (tmp_path / "ids").write_text("\n".join(names))
    words = ["-data", str(tmp_path), "-out", str(tmp_path / "part")]
    args = part_of_ljspeech.make_parser().parse_args(words)
    part_of_ljspeech.main(args)
    part = tmp_path / "part" / "LJSpeech-1.1"
    assert [row[0] for row in utils.read_metadata(part / "metadata.csv")] == names
    for name in names:
        assert (part / "wavs" / f"{name}.wav").read_bytes() == (
            source / "wavs" / f"{name}.wav"
        ).read_bytes()
    with pytest.raises(UserError, match="is there already"):
        part_of_ljspeech.main(args)


def test_part_of_ljspeech_that_was_cut_short_is_not_there(tmp_path, monkeypatch):
    source = write_corpus(tmp_path)
    monkeypatch.setattr(part_of_ljspeech, "IDS", tmp_path / "ids")
    (tmp_path / "ids").write_text("LJ001-0002\nLJ001-0007")
    (source / "wavs" / "LJ001-0007.wav").unlink()
    words = ["-data", str(tmp_path), "-out", str(tmp_path / "part")]
    args = part_of_ljspeech.make_parser().parse_args(words)
    with pytest.raises(UserError, match=r"LJ001-0007\.wav: No such file"):
        part_of_ljspeech.main(args)
    assert not (tmp_path / "part" / "LJSpeech-1.1").exists()


def test_what_edits_the_tree_is_made_last():
    """What is made after it would name a commit with edits."""
    names = [entry.name for entry in evidence.ENTRIES]
    assert names[-1] == "exercises" and len(set(names)) == len(names)


def test_every_committed_result_is_of_a_clean_commit_or_told_as_older():
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "cat-file", "-e", "HEAD~20"], capture_output=True).returncode:
        pytest.skip("this checkout has no history")
    older = (ROOT / "report" / "results" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "report" / "results").glob("*.json")):
        commit = json.loads(path.read_text()).get("environment", {}).get("commit")
        if f"`{path.stem}`" in older:
            continue
        assert commit and "dirty" not in commit, path.stem
        is_ancestor = [*git, "merge-base", "--is-ancestor", commit, "HEAD"]
        assert subprocess.run(is_ancestor, capture_output=True).returncode == 0, path.stem
