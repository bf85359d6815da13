"""Q2: the networks, the training loop, the loader, the search and the command line."""

import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, assert_one_sentence, load_script, oct_arrays, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import utils

q2 = load_script("hw2-q2")


# --------------------------------------------------------------------------------------------------------- network
def reference_network(no_maxpool):
    """The assignment's description, layer after layer and in its order, as an independent implementation."""
    if no_maxpool:
        features = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 0), nn.ReLU()]
    else:
        features = [nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 2)]
        features += [nn.Conv2d(8, 16, 3, 1, 0), nn.ReLU(), nn.MaxPool2d(2, 2)]
    classifier = [nn.Linear(576, 320), nn.ReLU(), nn.Dropout(0.0), nn.Linear(320, 120), nn.ReLU(), nn.Linear(120, 4)]
    return nn.Sequential(*features, nn.Flatten(), *classifier, nn.LogSoftmax(dim=1))


def matching_pair(no_maxpool):
    model, reference = q2.CNN(0.0, no_maxpool), reference_network(no_maxpool)
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
    X, y = torch.rand(8, 1, 28, 28), torch.randint(4, (8,))
    q2.train_batch(X, y, model, torch.optim.SGD(model.parameters(), 0.1), F.nll_loss)
    q2.train_batch(X, y, reference, torch.optim.SGD(reference.parameters(), 0.1), F.nll_loss)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_parameters_counted_by_hand(no_maxpool):
    by_hand = (9 + 1) * 8 + (8 * 9 + 1) * 16 + (576 + 1) * 320 + (320 + 1) * 120 + (120 + 1) * 4
    assert by_hand == 224_892
    assert q2.get_number_trainable_params(q2.CNN(0.7, no_maxpool)) == by_hand


def test_multiply_accumulates_counted_by_hand():
    affine = 576 * 320 + 320 * 120 + 120 * 4
    assert q2.count_multiply_accumulates(q2.CNN(0.7)) == 8 * 28**2 * 9 + 16 * 12**2 * 72 + affine
    assert q2.count_multiply_accumulates(q2.CNN(0.7, True)) == 8 * 14**2 * 9 + 16 * 6**2 * 72 + affine


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_input_shapes_give_the_same_log_probabilities(no_maxpool):
    model, X = q2.CNN(0.7, no_maxpool).eval(), torch.rand(3, 1, 28, 28)
    output = model(X)
    assert output.shape == (3, 4)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))
    for shape in ((3, 784), (3, 28, 28)):
        torch.testing.assert_close(model(X.view(shape)), output)


def test_bytes_are_scaled_to_unit_range():
    model, X = q2.CNN(0.7).eval(), torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(model(X), model(torch.tensor(X.numpy() / 255, dtype=torch.float32)), atol=1e-6, rtol=0)


def test_predict_in_chunks_equals_one_pass(monkeypatch):
    model, X = q2.CNN(0.7), torch.rand(11, 1, 28, 28)
    whole = q2.predict(model, X)
    monkeypatch.setattr(q2, "EVALUATION_BATCH", 4)
    torch.testing.assert_close(q2.predict(model, X), whole)


def test_accuracy_shifted_moves_by_whole_pixels(monkeypatch):
    X = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    X[0, 0, 10, 20] = 1
    seen = []
    monkeypatch.setattr(q2, "evaluate", lambda model, moved, y: seen.append(moved.nonzero()[0, 2:].tolist()) or 1.0)
    assert q2.accuracy_shifted(None, X, None, 2) == 1.0
    assert sorted(seen) == [[8, 20], [10, 18], [10, 22], [12, 20]]


# -------------------------------------------------------------------------------------------------------- training
class Silent:
    def update(self):
        pass


def test_epoch_loss_is_this_epochs_mean_over_images():
    torch.manual_seed(1)
    X, y, model = torch.rand(10, 1, 28, 28), torch.randint(4, (10,)), q2.CNN(0.0)
    frozen = torch.optim.SGD(model.parameters(), 0.0)  # a rate of 0: every batch sees the same weights
    for _ in range(2):  # the second epoch must not remember the first
        loss = q2.train_epoch(X, y, model, frozen, F.nll_loss, 4, Silent())  # batches of 4, 4 and 2
        by_hand = sum(-model(X)[i, y[i]].item() for i in range(10)) / 10
        assert loss == pytest.approx(by_hand, abs=1e-6)


def test_metrics_equal_medmnists_evaluator(tmp_path, monkeypatch):
    arrays = oct_arrays(n_test=1000)
    np.savez(tmp_path / "octmnist.npz", **arrays)
    splits, _ = utils.load_oct_data(tmp_path)
    model, (X, y) = q2.CNN(0.7), splits["test"]
    metrics = q2.test_metrics(model, X, y)
    evaluator = medmnist.Evaluator("octmnist", "test", root=str(tmp_path))
    auc, accuracy = evaluator.evaluate(q2.predict(model, X).exp().numpy())
    assert (metrics["auc"], metrics["accuracy"]) == (auc, accuracy)
    assert np.sum(metrics["confusion"]) == 1000 and np.trace(metrics["confusion"]) == round(1000 * accuracy)
    assert metrics["accuracy_shifted"][0] == accuracy
    predicted, seen, right = q2.predict(model, X).argmax(1), [0] * 4, 0
    for truth, guess in zip(y.tolist(), predicted.tolist()):
        seen[truth] += 1
        right += seen[truth] <= q2.COURSE_SUBSET[truth] and truth == guess
    assert metrics["accuracy_course_subset"] == pytest.approx(right / 529)
    assert q2.test_metrics(model, X[:100], y[:100])["accuracy_course_subset"] is None


def results(out, pattern="*"):
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "results").glob(f"{pattern}.json"))}


def numbers(result):
    """What two equal runs must have in common: everything but times."""
    epochs = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in result["epochs"]]
    return epochs, result["test"], result["status"]


def test_search_on_the_command_line(oct_folder, tmp_path):
    out = tmp_path / "out"
    flags = ("-data", oct_folder, "-out", out, "--epochs", 3)
    process = run_script("hw2-q2.py", *flags, "-learning_rate", 0.1, 0.0001, 1e12, "-seed", 1, 2)
    assert process.returncode == 0, process.stderr
    found = results(out)
    search = found.pop("q2-search-epochs3")
    assert len(found) == 6 and {run["data"]["source"] for run in found.values()} == {"synthetic test images"}
    assert [found[f"q2-maxpool-lr1e+12-seed{seed}-epochs3"]["status"] for seed in (1, 2)] == ["diverged"] * 2
    assert "infinite or NaN" in process.stdout
    means = {}
    for row in search["table"]:
        runs = [run for run in found.values() if run["config"]["learning_rate"] == row["learning_rate"]]
        if row["finished"]:
            means[row["learning_rate"]] = np.mean([run["epochs"][-1]["val_accuracy"] for run in runs])
            assert row["val_accuracy"][0] == pytest.approx(means[row["learning_rate"]])
    assert search["best"]["learning_rate"] == max(means, key=means.get)
    assert len(list((out / "figures").glob("CNN-*.pdf"))) == len(list((out / "figures").glob("CNN-*.png"))) == 2
    assert not list((out / "checkpoints").iterdir())

    process = run_script("hw2-q2.py", *flags, "-learning_rate", "best", "-no_maxpool")
    assert process.returncode == 0, process.stderr
    name = f"q2-strided-lr{search['best']['learning_rate']:g}-seed42-epochs3"
    before = results(out)
    assert name in before and before["q2-search-strided-epochs3"]["runs"] == [name]
    for figure in (out / "figures").iterdir():
        figure.unlink()
    assert run_script("hw2-q2.py", *flags, "-learning_rate", "best", "-no_maxpool", "-plot_only").returncode == 0
    assert results(out) == before and len(list((out / "figures").iterdir())) == 4


def test_search_picks_the_best_by_validation_not_by_test():
    def run(rate, val, test):
        metrics = {"accuracy": test, "auc": test, "accuracy_course_subset": None}
        return {
            "config": {"learning_rate": rate},
            "status": "finished",
            "epochs": [{"val_accuracy": val}],
            "test": metrics,
        }

    rows = q2.summarise([run(0.1, 0.6, 0.9), run(0.01, 0.8, 0.5), run(0.01, 0.9, 0.7)])
    assert [row["val_accuracy"][0] for row in rows] == pytest.approx([0.6, 0.85])
    assert rows[1]["accuracy"] == pytest.approx([0.6, 0.1 * 2**0.5]) and rows[0]["accuracy"] == [0.9, None]


def test_same_seed_same_numbers_alone_or_side_by_side(oct_folder, tmp_path):
    flags = ("-data", oct_folder, "-epochs", 2)
    run_script("hw2-q2.py", *flags, "-out", tmp_path / "alone", "-seed", 5)
    run_script("hw2-q2.py", *flags, "-out", tmp_path / "beside", "-seed", 4, 5)
    name = "q2-maxpool-lr0.01-seed5-epochs2"
    alone, beside = results(tmp_path / "alone")[name], results(tmp_path / "beside")[name]
    assert numbers(alone) == numbers(beside)
    other = results(tmp_path / "beside")[name.replace("seed5", "seed4")]
    assert numbers(alone) != numbers(other)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_keeps_its_epochs_and_resumes_to_the_same_numbers(oct_folder, tmp_path, how):
    flags = ["-data", str(oct_folder), "-epochs", "40", "-optimizer", "adam"]
    name = "q2-maxpool-lr0.01-seed42-epochs40-optimizeradam"
    run_script("hw2-q2.py", *flags, "-out", tmp_path / "whole")
    command = [sys.executable, str(ROOT / "hw2-q2.py"), *flags, "-out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    file = tmp_path / "cut" / "results" / f"{name}.json"
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 2 and stderr.strip().endswith("goes on from there.") and "Traceback" not in stderr
    cut = results(tmp_path / "cut")[name]
    assert cut["status"] == "interrupted" and 1 <= len(cut["epochs"]) < 40
    assert_one_sentence(run_script("hw2-q2.py", *flags, "-out", tmp_path / "cut", "-plot_only"))
    assert run_script("hw2-q2.py", *flags, "-out", tmp_path / "cut").returncode == 0
    assert numbers(results(tmp_path / "cut")[name]) == numbers(results(tmp_path / "whole")[name])


# ------------------------------------------------------------------------------------------------------- bad input
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
    with pytest.raises(utils.UserError) as error:
        utils.load_oct_data(tmp_path)
    assert message in str(error.value)


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=20), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_overwritten_bytes_never_change_an_image(changes, cut):
    """A file with bytes overwritten and the end cut off is refused in one sentence, or read unchanged."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **oct_arrays())
    content = bytearray(buffer.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "octmnist.npz").write_bytes(content[: len(content) - cut])
        try:
            splits, _ = utils.load_oct_data(folder)
        except utils.UserError as error:
            assert "\n" not in str(error)
        else:
            for split, (X, y) in splits.items():
                assert (X[:, 0].numpy() == oct_arrays()[f"{split}_images"]).all()
                assert (y.numpy() == oct_arrays()[f"{split}_labels"][:, 0]).all()


def test_damaged_files_are_refused(oct_folder):
    path = oct_folder / "octmnist.npz"
    whole = path.read_bytes()
    assert utils.load_oct_data(oct_folder)[1]["counts"] == {"train": 60, "val": 20, "test": 20}
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(utils.UserError, match="damaged"):
            utils.load_oct_data(oct_folder)
    np.savez(path, **oct_arrays() | {"train_images": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(utils.UserError, match="damaged"):  # pickled objects are never loaded
        utils.load_oct_data(oct_folder)


BAD_FLAGS = [
    "-epochs 0", "-learning_rate -1", "-learning_rate nan", "-learning_rate fast", "-dropout 1.5", "-batch_size 0",
    "-l2_decay -0.1", "-optimizer adagrad", "-seed -1", "-data nowhere", "-learning_rate best", "-unknown 1",
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(flags, oct_folder, tmp_path, monkeypatch, capsys):
    arguments = ["-data", str(oct_folder), "-out", str(tmp_path / "out"), *flags.split()]
    monkeypatch.setattr(sys, "argv", ["hw2-q2.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        utils.run_script(q2.main, q2.make_parser())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_unwritable_folder_and_missing_gpu_end_in_one_sentence(oct_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_one_sentence(run_script("hw2-q2.py", "-data", oct_folder, "-out", tmp_path / "file"))
    if not torch.cuda.is_available():
        assert_one_sentence(run_script("hw2-q2.py", "-data", oct_folder, "-out", tmp_path, "-device", "cuda"))


def test_every_rate_diverged_ends_in_one_sentence(oct_folder, tmp_path):
    process = run_script("hw2-q2.py", "-data", oct_folder, "-out", tmp_path / "out", "-learning_rate", 1e12)
    assert_one_sentence(process)
    assert [run["status"] for run in results(tmp_path / "out").values()] == ["diverged"]


def test_batch_larger_than_the_data_is_fine(oct_folder, tmp_path):
    flags = ("-data", oct_folder, "-out", tmp_path / "out", "-epochs", 1, "-batch_size", 1000)
    assert run_script("hw2-q2.py", *flags).returncode == 0


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoints" / "run.pt"
    assert utils.load_checkpoint(path, {}) is None
    utils.save_checkpoint(path, {"config": 1}, {"x": torch.ones(3)})
    assert utils.load_checkpoint(path, {"config": 1})["x"].sum() == 3
    with pytest.raises(utils.UserError, match="other config"):
        utils.load_checkpoint(path, {"config": 2})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(utils.UserError, match="damaged"):
        utils.load_checkpoint(path, {"config": 1})


@pytest.mark.skipif(not (SHARED / "octmnist").exists(), reason="no real retinal images beside this checkout")
def test_real_images_load():
    splits, info = utils.load_oct_data(SHARED / "octmnist")
    assert info["counts"] == {"train": 1902, "val": 200, "test": 300} and "real" in info["source"]
    assert splits["test"][1].bincount().tolist() == [75] * 4
    assert splits["train"][0].shape == (1902, 1, 28, 28) and splits["train"][0].dtype == torch.uint8
