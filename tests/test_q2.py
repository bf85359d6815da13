"""Q2: the networks, the training loop, the loader, the search and the command line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runs
import utils
from conftest import (
    POSIX,
    ROOT,
    SHARED,
    assert_one_sentence,
    load_script,
    oct_arrays,
    restore_interrupts,
    run_python,
    run_script,
    run_tool,
)
from tools import pooling_control

import medmnist
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

q2 = load_script("hw2-q2")


# ----------------------------------------------------------------------------------------- network
def reference_network(no_maxpool):
    """The assignment's description, layer after layer, as an independent implementation."""
    if no_maxpool:
        features = [
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 0),
            nn.ReLU(),
        ]
    else:
        features = [
            nn.Conv2d(1, 8, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(8, 16, 3, 1, 0),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        ]
    classifier = [
        nn.Linear(576, 320),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(320, 120),
        nn.ReLU(),
        nn.Linear(120, 4),
    ]
    return nn.Sequential(*features, nn.Flatten(), *classifier, nn.LogSoftmax(dim=1))


def matching_pair(no_maxpool):
    """Our network and the reference, with the same weights."""
    model = q2.CNN(0.0, no_maxpool)
    reference = reference_network(no_maxpool)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    return model, reference


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_forward_equals_the_assignment_read_literally(no_maxpool):
    model, reference = matching_pair(no_maxpool)
    X = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(model(X), reference(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_one_optimiser_step_equals_the_reference(no_maxpool):
    model, reference = matching_pair(no_maxpool)
    X = torch.rand(8, 1, 28, 28)
    y = torch.randint(4, (8,))
    for network in (model, reference):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        q2.train_batch(X, y, network, optimizer, F.nll_loss)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("no_maxpool, sizes", [(False, [28, 14, 12, 6]), (True, [14, 6])])
def test_image_sizes_are_those_of_the_comment(no_maxpool, sizes):
    seen = []
    model = q2.CNN(0.7, no_maxpool)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            layer.register_forward_hook(lambda layer, _, output: seen.append(output.shape[2:]))
    model(torch.rand(1, 1, 28, 28))
    assert seen == [(size, size) for size in sizes]


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_dropout_follows_the_first_affine_map_in_training_only(no_maxpool):
    model = q2.CNN(0.5, no_maxpool)
    X = torch.rand(2, 1, 28, 28)
    seen = []
    model.dropout.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    assert not torch.equal(model(X), model(X))
    assert seen[0].shape == (2, 320) and not torch.equal(seen[0], seen[1])
    model.eval()
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_parameters_counted_by_hand(no_maxpool):
    convolutions = (9 + 1) * 8 + (8 * 9 + 1) * 16
    affine = (576 + 1) * 320 + (320 + 1) * 120 + (120 + 1) * 4
    assert convolutions + affine == 224_892
    assert q2.get_number_trainable_params(q2.CNN(0.7, no_maxpool)) == convolutions + affine


def test_multiply_accumulates_counted_by_hand():
    affine = 576 * 320 + 320 * 120 + 120 * 4
    maxpool = 8 * 28**2 * 9 + 16 * 12**2 * 72 + affine
    strided = 8 * 14**2 * 9 + 16 * 6**2 * 72 + affine
    assert (maxpool, strided) == (445_536, 278_784)
    assert q2.count_multiply_accumulates(q2.CNN(0.7)) == maxpool
    assert q2.count_multiply_accumulates(q2.CNN(0.7, True)) == strided


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_input_shapes_give_the_same_log_probabilities(no_maxpool):
    model = q2.CNN(0.7, no_maxpool).eval()
    X = torch.rand(3, 1, 28, 28)
    output = model(X)
    assert output.shape == (3, 4)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))
    for shape in ((3, 784), (3, 28, 28)):
        torch.testing.assert_close(model(X.view(shape)), output)


def test_bytes_are_scaled_to_unit_range():
    model = q2.CNN(0.7).eval()
    X = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    scaled = torch.tensor(X.numpy() / 255, dtype=torch.float32)
    torch.testing.assert_close(model(X), model(scaled), atol=1e-6, rtol=0)


def test_predict_in_chunks_equals_one_pass(monkeypatch):
    model = q2.CNN(0.7)
    X = torch.rand(11, 1, 28, 28)
    whole = q2.predict(model, X)
    monkeypatch.setattr(q2, "EVALUATION_BATCH", 4)
    torch.testing.assert_close(q2.predict(model, X), whole)


def test_accuracy_shifted_moves_by_whole_pixels(monkeypatch):
    X = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    X[0, 0, 10, 20] = 1
    seen = []

    def note_position(model, moved, y):
        seen.append(moved.nonzero()[0, 2:].tolist())
        return 1.0

    monkeypatch.setattr(q2, "evaluate", note_position)
    assert q2.accuracy_shifted(None, X, None, 2) == 1.0
    assert sorted(seen) == [[8, 20], [10, 18], [10, 22], [12, 20]]


def test_shifted_images_repeat_their_edges():
    X = torch.arange(28 * 28).view(1, 1, 28, 28)
    assert torch.equal(q2.shifted(X, 0, 0), X)
    assert (q2.shifted(X, 3, 0)[0, 0, -4:] == X[0, 0, -1]).all()
    assert (q2.shifted(X, 0, -2)[0, 0, :, :3] == X[0, 0, :, :1]).all()


# ---------------------------------------------------------------------------------------- training
class Silent:
    def update(self):
        pass


def test_epoch_loss_is_this_epochs_mean_over_images():
    torch.manual_seed(1)
    X = torch.rand(10, 1, 28, 28)
    y = torch.randint(4, (10,))
    model = q2.CNN(0.0)
    frozen = torch.optim.SGD(model.parameters(), 0.0)  # a rate of 0: the same weights throughout
    for _ in range(2):  # the second epoch must not remember the first
        loss = q2.train_epoch(X, y, model, frozen, F.nll_loss, 4, Silent())  # 4, 4 and 2 images
        by_hand = sum(-model(X)[i, y[i]].item() for i in range(10)) / 10
        assert loss == pytest.approx(by_hand, abs=1e-6)


def test_metrics_equal_medmnists_evaluator(tmp_path):
    np.savez(tmp_path / "octmnist.npz", **oct_arrays(n_test=1000))
    splits, _ = utils.load_oct_data(tmp_path)
    X, y = splits["test"]
    model = q2.CNN(0.7)
    metrics = q2.test_metrics(model, X, y)
    evaluator = medmnist.Evaluator("octmnist", "test", root=str(tmp_path))
    auc, accuracy = evaluator.evaluate(q2.predict(model, X).exp().numpy())
    assert (metrics["auc"], metrics["accuracy"]) == (auc, accuracy)
    assert metrics["accuracy_shifted"][0] == accuracy

    predicted = q2.predict(model, X).argmax(1)
    seen = [0] * 4
    right = 0
    confusion = np.zeros((4, 4), int)
    for truth, guess in zip(y.tolist(), predicted.tolist()):
        seen[truth] += 1
        confusion[truth, guess] += 1
        right += seen[truth] <= q2.COURSE_SUBSET[truth] and truth == guess
    assert np.sum(metrics["confusion"]) == 1000
    assert np.trace(metrics["confusion"]) == round(1000 * accuracy)
    assert metrics["confusion"] == confusion.tolist()
    assert metrics["accuracy_course_subset"] == pytest.approx(right / 529)
    assert q2.test_metrics(model, X[:100], y[:100])["accuracy_course_subset"] is None


def test_a_class_missing_among_the_test_images_keeps_the_other_metrics():
    X = torch.rand(6, 1, 28, 28)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    metrics = q2.test_metrics(q2.CNN(0.7), X, y)
    assert metrics["auc"] is None and 0 <= metrics["accuracy"] <= 1
    assert np.shape(metrics["confusion"]) == (4, 4) and metrics["confusion"][3] == [0] * 4


def results(out, pattern="*"):
    files = sorted((out / "results").glob(f"{pattern}.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def numbers(result):
    """What two equal runs must have in common: everything but times."""
    epochs = []
    for epoch in result["epochs"]:
        epochs.append({key: value for key, value in epoch.items() if key != "seconds"})
    return epochs, result["test"], result["status"]


def start_and_stop(script, *flags, file, how):
    """Start a script and stop it once `file` is there; returns its exit status and stderr."""
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, flags)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=restore_interrupts if os.name == "posix" else None,
    )
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate()
    return process.returncode, stderr


def test_search_on_the_command_line(oct_folder, tmp_path):
    out = tmp_path / "out"
    flags = ("-data", oct_folder, "-out", out, "--epochs", 3)
    process = run_script("hw2-q2.py", *flags, "-learning_rate", 0.1, 0.0001, 1e12, "-seed", 1, 2)
    assert process.returncode == 0, process.stderr
    found = results(out)
    search = found.pop("q2-search-epochs3")
    assert len(found) == 6
    assert {run["data"]["source"] for run in found.values()} == {"synthetic test images"}
    for seed in (1, 2):
        assert found[f"q2-maxpool-lr1e+12-seed{seed}-epochs3"]["status"] == "diverged"
    assert "infinite or NaN" in process.stdout
    assert search["runs"] == [
        "q2-maxpool-lr0.1-seed1-epochs3",
        "q2-maxpool-lr0.1-seed2-epochs3",
        "q2-maxpool-lr0.0001-seed1-epochs3",
        "q2-maxpool-lr0.0001-seed2-epochs3",
        "q2-maxpool-lr1e+12-seed1-epochs3",
        "q2-maxpool-lr1e+12-seed2-epochs3",
    ]
    assert search["config"]["learning_rate"] == [0.1, 0.0001, 1e12]
    assert search["config"]["seed"] == [1, 2]
    means = {}
    for row in search["table"]:
        rate = row["learning_rate"]
        group = [run for run in found.values() if run["config"]["learning_rate"] == rate]
        if row["finished"]:
            means[rate] = np.mean([run["epochs"][-1]["val_accuracy"] for run in group])
            assert row["val_accuracy"][0] == pytest.approx(means[rate])
    assert search["best"]["learning_rate"] == max(means, key=means.get)
    for suffix in ("pdf", "png"):
        assert len(list((out / "figures").glob(f"CNN-*.{suffix}"))) == 2
    assert not list((out / "checkpoints").iterdir())

    strided = (*flags, "-learning_rate", "best", "-no_maxpool")
    process = run_script("hw2-q2.py", *strided)
    assert process.returncode == 0, process.stderr
    name = f"q2-strided-lr{search['best']['learning_rate']:g}-seed42-epochs3"
    before = results(out)
    assert name in before and before["q2-search-strided-epochs3"]["runs"] == [name]
    for figure in (out / "figures").iterdir():
        figure.unlink()
    (oct_folder / "octmnist.npz").unlink()  # drawing needs no data
    assert run_script("hw2-q2.py", *strided, "-plot_only").returncode == 0
    assert results(out) == before and len(list((out / "figures").iterdir())) == 4


def result_of(rate, *val_accuracies, test=0.5, seed=42):
    """A finished run with these validation accuracies, as far as a table looks at it."""
    return {
        "config": {"learning_rate": rate},
        "seed": seed,
        "status": "finished",
        "epochs": [{"val_accuracy": accuracy} for accuracy in val_accuracies],
        "test": {"accuracy": test, "auc": test, "accuracy_course_subset": None},
    }


def test_search_picks_the_best_by_validation_not_by_test():
    rows = q2.summarise(
        [
            result_of(0.1, 0.6, test=0.9),
            result_of(0.01, 0.8, test=0.5),
            result_of(0.01, 0.9, test=0.7),
        ]
    )
    assert [row["val_accuracy"][0] for row in rows] == pytest.approx([0.6, 0.85])
    assert rows[1]["accuracy"] == pytest.approx([0.6, 0.1 * 2**0.5])
    assert rows[0]["accuracy"] == [0.9, None] and rows[0]["accuracy_course_subset"] == []
    assert q2.best_row(rows)["learning_rate"] == 0.01


def test_groups_are_ranked_and_the_median_is_of_the_last_epoch():
    best = result_of(0.1, 0.2, 0.9)
    worst = result_of(0.1, 0.9, 0.3)
    middle = result_of(0.1, 0.5, 0.4)
    diverged = {**result_of(0.1), "status": "diverged"}
    groups = q2.by_rate([best, result_of(0.5, 0.1), worst, middle])
    assert list(groups) == [0.5, 0.1] and groups[0.1] == [worst, middle, best]
    assert q2.median_run(groups[0.1]) is middle
    assert q2.median_run(q2.by_rate([best, diverged])[0.1]) is diverged
    row = q2.table_row(0.1, [diverged, best])
    assert (row["finished"], row["diverged"]) == (1, 1) and row["val_accuracy"] == [0.9, None]


def test_names_tell_what_differs_from_the_defaults():
    parse = q2.make_parser().parse_args
    assert list(q2.plan_runs(parse([]), [0.01])) == ["q2-maxpool-lr0.01-seed42"]
    flags = "-no_maxpool -epochs 2 -dropout 0.5 -optimizer adam -seed 1 2 -device cpu".split()
    assert list(q2.plan_runs(parse(flags), [0.1])) == [
        "q2-strided-lr0.1-seed1-epochs2-dropout0.5-optimizeradam",
        "q2-strided-lr0.1-seed2-epochs2-dropout0.5-optimizeradam",
    ]


def test_never_more_processes_than_runs_nor_processors_waiting(monkeypatch):
    monkeypatch.setattr(runs, "usable_cpus", lambda: 2)
    assert [q2.n_processes(n_runs) for n_runs in (1, 3, 4, 5, 15)] == [1, 3, 4, 2, 2]
    monkeypatch.setattr(runs, "usable_cpus", lambda: 64)
    assert [q2.n_processes(n_runs) for n_runs in (1, 15, 100, 200)] == [1, 15, 100, 64]


def test_same_seed_same_numbers_alone_or_side_by_side(oct_folder, tmp_path):
    flags = ("-data", oct_folder, "-epochs", 2)
    run_script("hw2-q2.py", *flags, "-out", tmp_path / "alone", "-seed", 5)
    run_script("hw2-q2.py", *flags, "-out", tmp_path / "beside", "-seed", 4, 5)
    name = "q2-maxpool-lr0.01-seed5-epochs2"
    alone = results(tmp_path / "alone")[name]
    beside = results(tmp_path / "beside")[name]
    assert numbers(alone) == numbers(beside)
    other = results(tmp_path / "beside")[name.replace("seed5", "seed4")]
    assert numbers(alone) != numbers(other)


@POSIX
@pytest.mark.parametrize("name_of_signal", ["SIGINT", "SIGKILL"])
def test_interrupted_run_keeps_its_epochs_and_resumes_to_the_same_numbers(
    oct_folder, tmp_path, name_of_signal
):
    how = getattr(signal, name_of_signal)
    flags = ["-data", str(oct_folder), "-epochs", "40", "-optimizer", "adam"]
    name = "q2-maxpool-lr0.01-seed42-epochs40-optimizeradam"
    whole = tmp_path / "whole"
    out = tmp_path / "cut"
    run_script("hw2-q2.py", *flags, "-out", whole)
    file = out / "results" / f"{name}.json"
    code, stderr = start_and_stop(ROOT / "hw2-q2.py", *flags, "-out", out, file=file, how=how)
    if how == signal.SIGINT:
        assert code == 2 and stderr.strip().endswith("goes on from there.")
        assert "Traceback" not in stderr
    cut = results(out)[name]
    assert cut["status"] == "interrupted" and 1 <= len(cut["epochs"]) < 40
    assert_one_sentence(run_script("hw2-q2.py", *flags, "-out", out, "-plot_only"))

    process = run_script("hw2-q2.py", *flags, "-out", out)
    assert process.returncode == 0
    resumed = results(out)[name]
    assert numbers(resumed) == numbers(results(whole)[name])
    (part,) = resumed["resumed"]
    assert len(cut["epochs"]) <= part["after_epoch"] < 40
    assert f"{name}: goes on after epoch {part['after_epoch']}\n" in process.stdout
    assert part["environment"] == resumed["environment"] == cut["environment"]
    assert "resumed" not in results(whole)[name]


def test_a_resumed_run_keeps_the_environment_of_each_part(oct_folder, tmp_path, monkeypatch):
    """A run of three epochs, one on each of three machines, and its test on the last of them."""
    flags = ["-data", str(oct_folder), "-out", str(tmp_path / "out"), "-epochs", "3"]
    args = q2.make_parser().parse_args(flags)
    ((name, config),) = q2.plan_runs(args, [0.01]).items()
    job = (name, config, args.out, "the command", 0)

    class PowerCut(Exception):
        pass

    def train_one_epoch_on(machine):
        save = runs.save_result

        def cut_after_an_epoch(out, result):
            save(out, result)
            if result["status"] == "interrupted":
                raise PowerCut

        monkeypatch.setattr(runs, "environment", lambda device: {"processor": machine})
        monkeypatch.setattr(runs, "save_result", cut_after_an_epoch)
        with pytest.raises(PowerCut):
            q2.train_run(*job)
        monkeypatch.setattr(runs, "save_result", save)

    for machine in ("first", "second", "third"):
        train_one_epoch_on(machine)
    whole = q2.train_run(*job)  # only the test is missing
    assert whole["status"] == "finished" and len(whole["epochs"]) == 3
    assert whole["environment"] == {"processor": "first"}
    assert whole["resumed"] == [
        {"after_epoch": 1, "environment": {"processor": "second"}},
        {"after_epoch": 2, "environment": {"processor": "third"}},
    ]


@POSIX
def test_a_run_that_was_cut_beside_others_goes_on_alone(oct_folder, tmp_path):
    out = tmp_path / "out"
    flags = ["-data", oct_folder, "-epochs", 60, "-out", out]
    name = "q2-maxpool-lr0.01-seed1-epochs60"
    file = out / "results" / f"{name}.json"
    seeds = ("-seed", 1, 2)
    start_and_stop(ROOT / "hw2-q2.py", *flags, *seeds, file=file, how=signal.SIGINT)
    process = run_script("hw2-q2.py", *flags, "-seed", 1)
    assert f"{name}: goes on after epoch" in process.stdout, process.stdout + process.stderr


@POSIX
def test_an_edited_network_is_trained_again(oct_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ("hw2-q2.py", "runs.py", "utils.py"):
        shutil.copy(ROOT / file, copy)
    script = copy / "hw2-q2.py"
    name = "q2-maxpool-lr0.01-seed42-epochs60"
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    flags = ["-data", oct_folder, "-epochs", 60]
    file = out / "results" / f"{name}.json"
    start_and_stop(script, *flags, "-out", out, file=file, how=signal.SIGKILL)
    before = script.read_text()
    edited = before.replace("x = F.relu(self.fc2(x))", "x = F.elu(self.fc2(x))")
    assert edited != before
    script.write_text(edited)

    process = run_python(script, *flags, "-out", out)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{name}: its code (or Python) has changed, so it starts anew")
    run_python(script, *flags, "-out", whole)
    assert numbers(results(out)[name]) == numbers(results(whole)[name])
    assert "resumed" not in results(out)[name]
    (kept,) = (out / "checkpoints").glob("[!.]*")  # a killed process may leave a hidden file
    assert kept.name.startswith(f"{name}-code-")


# ------------------------------------------------- nothing stale: `-learning_rate best`, -plot_only
@pytest.fixture
def refusal(monkeypatch, capsys):
    """Gives the command with these flags, here in this process; returns its one sentence."""

    def run(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hw2-q2.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runs.run_script(q2.main, q2.make_parser())
        assert stop.value.code == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        return sentence

    return run


def test_best_names_the_search_that_is_missing(oct_folder, tmp_path, refusal):
    flags = ["-data", oct_folder, "-out", tmp_path, "-learning_rate", "best", "-epochs", 2]
    sentence = refusal(*flags, "-seed", 1, 2)
    search = f"python hw2-q2.py -data {oct_folder} -out {tmp_path} -learning_rate 0.1 0.01 0.001"
    assert f"run `{search} -epochs 2 -seed 1 2` first." in sentence


def test_best_is_taken_from_a_search_on_this_data_only(oct_folder, tmp_path, refusal):
    out = tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    np.savez(other / "octmnist.npz", source="other images", **oct_arrays(seed=1))
    flags = ["-out", out, "-epochs", 1]
    search = ("-learning_rate", 0.1, 0.01)
    best = ("-learning_rate", "best", "-no_maxpool")
    assert run_script("hw2-q2.py", "-data", other, *flags, *search).returncode == 0
    sentence = refusal("-data", oct_folder, *flags, *best)
    assert "is of other data (other images); run `python hw2-q2.py" in sentence
    assert f"-data {oct_folder}" in sentence
    assert not results(out, "q2-strided*")
    assert run_script("hw2-q2.py", "-data", other, *flags, *best).returncode == 0


def test_best_stands_alone(oct_folder, tmp_path, refusal):
    flags = ["-data", oct_folder, "-out", tmp_path, "-learning_rate", "best", 0.1]
    assert "best stands alone" in refusal(*flags)


def test_plot_only_names_the_command_that_is_missing(oct_folder, tmp_path, refusal):
    flags = ["-data", oct_folder, "-out", tmp_path, "-epochs", 1]
    sentence = refusal(*flags, "-plot_only")
    command = f"python hw2-q2.py -data {oct_folder} -out {tmp_path} -epochs 1"
    assert f"does not exist; run `{command}` first." in sentence


def test_results_of_different_data_are_not_drawn_together(tmp_path):
    args = q2.make_parser().parse_args(["-out", str(tmp_path), "-seed", "1", "2"])
    planned = q2.plan_runs(args, [0.01])
    for name, config in planned.items():
        data = {"source": "images", "sha256": f"of {name}"}
        result = runs.new_result("q2", name, "command", config, data, "cpu")
        runs.save_result(tmp_path, {**result, "status": "finished"})
    with pytest.raises(runs.UserError, match="different data"):
        q2.load_runs(planned, tmp_path)


# --------------------------------------------------------------------------------------- bad input
def damaged(change):
    arrays = oct_arrays()
    change(arrays)
    return arrays


BAD_ARRAYS = {
    "has no entry 'val_labels'": lambda a: a.pop("val_labels"),
    "NaN": lambda a: a.update(train_images=np.full((60, 28, 28), np.nan, np.float32)),
    "is float64": lambda a: a.update(test_images=np.zeros((20, 28, 28))),
    "is uint8 (20, 32, 32)": lambda a: a.update(test_images=np.zeros((20, 32, 32), np.uint8)),
    "is uint8 (60,), not uint8 ('N', 1)": lambda a: a.update(train_labels=a["train_labels"][:, 0]),
    "has a label 7": lambda a: a.update(train_labels=np.full((60, 1), 7, np.uint8)),
    "has 0 entries": lambda a: a.update(
        val_images=np.zeros((0, 28, 28), np.uint8), val_labels=np.zeros((0, 1), np.uint8)
    ),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_wrong_arrays_are_named(tmp_path, message):
    np.savez(tmp_path / "octmnist.npz", **damaged(BAD_ARRAYS[message]))
    with pytest.raises(runs.UserError) as error:
        utils.load_oct_data(tmp_path)
    assert message in str(error.value)


CHANGES = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 255)),  # position and new value
    min_size=1,
    max_size=20,
)


@given(CHANGES, st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_overwritten_bytes_never_change_an_image(changes, cut):
    """A file with bytes overwritten and its end cut off is refused in a sentence, or unchanged."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **oct_arrays())
    content = bytearray(buffer.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "octmnist.npz").write_bytes(content[: len(content) - cut])
        try:
            splits, _ = utils.load_oct_data(folder)
        except runs.UserError as error:
            assert "\n" not in str(error)
        else:
            for split, (X, y) in splits.items():
                assert (X[:, 0].numpy() == oct_arrays()[f"{split}_images"]).all()
                assert (y.numpy() == oct_arrays()[f"{split}_labels"][:, 0]).all()


def test_damaged_files_are_refused(oct_folder):
    path = oct_folder / "octmnist.npz"
    whole = path.read_bytes()
    _, info = utils.load_oct_data(oct_folder)
    assert info["counts"] == {"train": 60, "val": 20, "test": 20}
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(runs.UserError, match="damaged"):
            utils.load_oct_data(oct_folder)
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(path, **{**oct_arrays(), "train_images": pickled})
    with pytest.raises(runs.UserError, match="damaged"):  # pickled objects are never loaded
        utils.load_oct_data(oct_folder)


@pytest.mark.parametrize(
    "error, reason",
    [(PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "memory")],
)
def test_a_good_file_that_cannot_be_read_is_not_called_damaged(
    oct_folder, monkeypatch, error, reason
):
    def fail(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(runs.UserError, match=reason) as caught:
        utils.load_oct_data(oct_folder)
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


def test_memory_that_runs_out_while_unpacking_is_not_called_damage(oct_folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(runs.UserError, match="too little memory"):
        utils.load_oct_data(oct_folder)


def test_another_dataset_under_the_name_of_octmnist_is_refused(tmp_path):
    """Such as PneumoniaMNIST: the same format, two classes."""
    arrays = oct_arrays()
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"] %= 2
    np.savez(tmp_path / "octmnist.npz", **arrays)
    with pytest.raises(runs.UserError, match=r"is not OCTMNIST: .* none of drusen, normal"):
        utils.load_oct_data(tmp_path)


def test_surroundings_that_hide_or_misname_modules(oct_folder, tmp_path):
    hostile = {**os.environ, "PYTHONSAFEPATH": "1", "MPLBACKEND": "no-such-toolkit"}
    flags = ["-data", oct_folder, "-out", tmp_path / "out", "-epochs", 1]
    process = run_script("hw2-q2.py", *flags, env=hostile, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


BAD_FLAGS = [
    "-epochs 0",
    "-learning_rate -1",
    "-learning_rate nan",
    "-learning_rate fast",
    "-learning_rate best",
    "-learning_rate best 0.1",
    "-dropout 1.5",
    "-batch_size 0",
    "-l2_decay -0.1",
    "-optimizer adagrad",
    "-seed -1",
    "-data nowhere",
    "-unknown 1",
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(flags, oct_folder, tmp_path, refusal):
    assert refusal("-data", oct_folder, "-out", tmp_path / "out", *flags.split())


def test_unwritable_folder_and_missing_gpu_end_in_one_sentence(oct_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_one_sentence(run_script("hw2-q2.py", "-data", oct_folder, "-out", tmp_path / "file"))
    if not torch.cuda.is_available():
        flags = ("-data", oct_folder, "-out", tmp_path, "-device", "cuda")
        assert_one_sentence(run_script("hw2-q2.py", *flags))


def test_every_rate_diverged_ends_in_one_sentence(oct_folder, tmp_path):
    flags = ("-data", oct_folder, "-out", tmp_path / "out", "-learning_rate", 1e12)
    assert_one_sentence(run_script("hw2-q2.py", *flags))
    assert [run["status"] for run in results(tmp_path / "out").values()] == ["diverged"]


def test_batch_larger_than_the_data_is_fine(oct_folder, tmp_path):
    flags = ("-data", oct_folder, "-out", tmp_path / "out", "-epochs", 1, "-batch_size", 1000)
    assert run_script("hw2-q2.py", *flags).returncode == 0


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoints" / "run.pt"
    assert runs.load_checkpoint(path, {}) is None
    runs.save_checkpoint(path, {"config": 1}, {"x": torch.ones(3)})
    assert runs.load_checkpoint(path, {"config": 1})["x"].sum() == 3
    with pytest.raises(runs.UserError, match="other config"):
        runs.load_checkpoint(path, {"config": 2})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(runs.UserError, match="damaged"):
        runs.load_checkpoint(path, {"config": 1})


NO_REAL_IMAGES = "no real retinal images beside this checkout"


@pytest.mark.skipif(not (SHARED / "octmnist").exists(), reason=NO_REAL_IMAGES)
def test_real_images_load():
    splits, info = utils.load_oct_data(SHARED / "octmnist")
    assert info["counts"] == {"train": 1902, "val": 200, "test": 300} and "real" in info["source"]
    assert splits["test"][1].bincount().tolist() == [75] * 4
    assert splits["train"][0].shape == (1902, 1, 28, 28)
    assert splits["train"][0].dtype == torch.uint8


# ------------------------------------------------------------------------------ the control of Q2.3
def test_average_pooling_is_the_same_network_with_means():
    images = torch.rand(3, 1, 28, 28)
    torch.manual_seed(0)
    control = pooling_control.with_average_pooling().CNN(0.0).eval()
    x = torch.relu(control.conv1(images))
    x = x.reshape(3, 8, 14, 2, 14, 2).mean(dim=(3, 5))
    x = torch.relu(control.conv2(x)).reshape(3, 16, 6, 2, 6, 2).mean(dim=(3, 5)).flatten(1)
    x = torch.relu(control.fc2(torch.relu(control.fc1(x))))
    assert torch.allclose(control(images), control.fc3(x).log_softmax(dim=1), atol=1e-6)
    assert q2.get_number_trainable_params(control) == 224_892
    assert q2.count_multiply_accumulates(control) == q2.count_multiply_accumulates(q2.CNN(0.0))


def test_the_control_trains_its_own_network(oct_folder, tmp_path):
    flags = ["-data", oct_folder, "-out", tmp_path / "out", "-epochs", 2, "-seed", 1, 2]
    process = run_tool("pooling_control", *flags)
    assert process.returncode == 0, process.stderr
    found = results(tmp_path / "out")
    assert sorted(found) == [f"q2-avgpool-lr0.01-seed{seed}-epochs2" for seed in (1, 2)]
    result = found["q2-avgpool-lr0.01-seed1-epochs2"]
    assert result["config"]["pooling"] == "average" and "pooling_control" in result["command"]
    run_script("hw2-q2.py", *flags)
    other = results(tmp_path / "out", "q2-maxpool*")["q2-maxpool-lr0.01-seed1-epochs2"]
    assert numbers(other) != numbers(result)
