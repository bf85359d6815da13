"""Q2: the networks, the training loop, the search, what is stored, the loader, the control."""

import importlib
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import runs
import utils
from conftest import ROOT, oct_arrays, run_script
from runs import UserError
from tools import pooling_control

import medmnist
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

q2 = importlib.import_module("hw2-q2")


def call(*flags):
    """Run the command with these flags, in this process."""
    q2.main(q2.make_parser().parse_args([str(flag) for flag in flags]))


def results(out, pattern="*"):
    files = sorted((out / "results").glob(f"{pattern}.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def numbers(result):
    """What is the same in two equal runs: everything but times."""
    epochs = [{**row, "seconds": None} for row in result["epochs"]]
    return epochs, result["test"], result["status"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Runs train in this process; only the test of the script itself starts others."""
    monkeypatch.setattr(runs, "side_by_side", in_turn)


def in_turn(function, jobs, n_processes=None):
    return [function(*job) for job in jobs]


# ------------------------------------------------------------------------------------------ network
BOTH = pytest.mark.parametrize("no_maxpool", [False, True])


@BOTH
def test_forward_and_a_step_equal_the_assignment_read_literally(no_maxpool):
    stride, pool = (2, []) if no_maxpool else (1, [nn.MaxPool2d(2)])
    reference = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride, 1),
        nn.ReLU(),
        *pool,
        nn.Conv2d(8, 16, 3, stride, 0),
        nn.ReLU(),
        *pool,
        nn.Flatten(),
        nn.Linear(576, 320),
        nn.ReLU(),
        nn.Linear(320, 120),
        nn.ReLU(),
        nn.Linear(120, 4),
        nn.LogSoftmax(dim=1),
    )
    model = q2.CNN(0.0, no_maxpool)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    X, y = torch.rand(8, 1, 28, 28), torch.randint(4, (8,))
    torch.testing.assert_close(model(X), reference(X), atol=1e-5, rtol=0)
    for network in (model, reference):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        q2.train_batch(X, y, network, optimizer, F.nll_loss)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@BOTH
def test_dropout_follows_the_first_affine_map_in_training_only(no_maxpool):
    model = q2.CNN(0.5, no_maxpool)
    X = torch.rand(2, 1, 28, 28)
    seen = []
    model.dropout.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    assert not torch.equal(model(X), model(X))
    assert seen[0].shape == (2, 320) and not torch.equal(seen[0], seen[1])
    model.eval()
    assert torch.equal(model(X), model(X))


@BOTH
def test_parameters_and_products_counted_by_hand(no_maxpool):
    model = q2.CNN(0.7, no_maxpool)
    convolutions = (9 + 1) * 8 + (8 * 9 + 1) * 16
    affine = (576 + 1) * 320 + (320 + 1) * 120 + (120 + 1) * 4
    assert q2.get_number_trainable_params(model) == convolutions + affine == 224_892
    first, second = (14, 6) if no_maxpool else (28, 12)  # widths of the convolutions' outputs
    products = 8 * first**2 * 9 + 16 * second**2 * 72 + 576 * 320 + 320 * 120 + 120 * 4
    assert q2.count_multiply_accumulates(model) == products


def test_input_shapes_and_bytes_give_the_same_log_probabilities():
    model = q2.CNN(0.7).eval()
    X = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    output = model(X)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))
    for shape in ((3, 784), (3, 28, 28)):
        torch.testing.assert_close(model(X.view(shape)), output)
        torch.testing.assert_close(model(X.view(shape) / 255), output)


@pytest.mark.parametrize("shape", [(5, 3, 28, 28), (5, 1, 224, 224), (28, 28), (5, 783)])
def test_images_of_another_shape_are_refused(shape):
    """Flattened, they would give 15 and 320 predictions for 5 images."""
    for use in (q2.CNN(0.7), lambda X: q2.predict(q2.CNN(0.7), X)):
        with pytest.raises(ValueError, match="images must be"):
            use(torch.zeros(shape))


def test_labels_as_medmnist_has_them_give_the_same_accuracy():
    """Compared with (N,), labels (N, 1) would broadcast to (N, N)."""
    torch.manual_seed(0)
    model, X, y = q2.CNN(0.7), torch.rand(40, 1, 28, 28), torch.randint(4, (40,))
    assert q2.evaluate(model, X, y[:, None]) == q2.evaluate(model, X, y) <= 1
    assert q2.test_metrics(model, X, y[:, None]) == q2.test_metrics(model, X, y)
    with pytest.raises(ValueError, match=r"labels must be \(N,\) or \(N, 1\) for 40 images"):
        q2.evaluate(model, X, y[:39])


@BOTH
def test_everything_lies_on_the_device(no_maxpool):
    """With torch's fake tensors on a GPU: a tensor left on the CPU raises."""
    model = q2.CNN(0.7, no_maxpool)
    with FakeTensorMode():
        for layer in model.children():
            for name, values in layer.named_parameters():
                setattr(layer, name, nn.Parameter(torch.empty(values.shape, device="cuda")))
        X = torch.zeros(10, 1, 28, 28, dtype=torch.uint8, device="cuda")
        y = torch.zeros(10, dtype=torch.long, device="cuda")
        assert F.nll_loss(model(X), y).device.type == "cuda"
        assert q2.predict(model, q2.shifted(X, 1, 0)).device.type == "cuda"


# -------------------------------------------------------------------------- training and evaluation
def test_images_are_shifted_by_whole_pixels_in_four_directions(monkeypatch):
    X = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    X[0, 0, 10, 20] = 1
    evaluate = Mock(return_value=1.0)
    monkeypatch.setattr(q2, "evaluate", evaluate)
    assert q2.accuracy_shifted(None, X, None, 2) == 1.0
    seen = [call.args[1].nonzero()[0, 2:].tolist() for call in evaluate.call_args_list]
    assert sorted(seen) == [[8, 20], [10, 18], [10, 22], [12, 20]]
    X = torch.arange(28 * 28).view(1, 1, 28, 28)
    assert (q2.shifted(X, 3, 0)[0, 0, -4:] == X[0, 0, -1]).all()  # the edge is repeated


def test_evaluation_is_in_small_batches_without_gradients(monkeypatch):
    monkeypatch.setattr(q2, "EVALUATION_BATCH", 4)
    model = q2.CNN(0.7)
    seen = []
    model.register_forward_hook(
        lambda _, images, output: seen.append((len(output), output.grad_fn))
    )
    q2.predict(model, torch.rand(10, 1, 28, 28))
    assert seen == [(4, None), (4, None), (2, None)]


class BrightestBand(nn.Module):
    """Guesses the class of oct_arrays by the height of the brightest band."""

    def forward(self, X):
        bands = X.reshape(-1, 4, 7, 28)[:, :, :6].float()  # (B, class, 6, 28)
        return bands.mean(dim=(2, 3)).div(20).log_softmax(dim=1)


def test_metrics_equal_medmnists_evaluator(tmp_path):
    """On 1,000 images, two batches; all but the first 100 images are noise."""
    arrays = oct_arrays(n_test=1000)
    arrays["test_images"][100:] = np.random.default_rng(0).integers(0, 256, (900, 28, 28))
    np.savez(tmp_path / "octmnist.npz", **arrays)
    splits, _ = utils.load_oct_data(tmp_path)
    X, y = splits["test"]
    model = BrightestBand()
    metrics = q2.test_metrics(model, X, y)
    evaluator = medmnist.Evaluator("octmnist", "test", root=str(tmp_path))
    auc, accuracy = evaluator.evaluate(q2.predict(model, X).exp().numpy())
    assert metrics["accuracy"] == accuracy and metrics["auc"] == pytest.approx(auc, abs=1e-12)
    assert metrics["accuracy_shifted"][0] == accuracy

    seen = [0] * 4
    n_right = 0
    confusion = np.zeros((4, 4), int)
    for truth, guess in zip(y.tolist(), q2.predict(model, X).argmax(1).tolist(), strict=True):
        seen[truth] += 1
        confusion[truth, guess] += 1
        n_right += seen[truth] <= (182, 55, 42, 250)[truth] and truth == guess
    assert metrics["confusion"] == confusion.tolist()
    assert metrics["accuracy_course_subset"] == pytest.approx(n_right / 529)

    few = y[:100] < 3  # too few for the course's subset, and a class is missing
    metrics = q2.test_metrics(model, X[:100][few], y[:100][few])
    assert metrics["accuracy_course_subset"] is None and metrics["auc"] is None
    assert np.shape(metrics["confusion"]) == (4, 4) and metrics["confusion"][3] == [0] * 4


# ----------------------------------------------------------------------------------- from the table
def result_of(rate, val_accuracy, test=0.5, status="finished"):
    """The part of a results file that a table is made from."""
    return {
        "config": {"learning_rate": rate},
        "status": status,
        "epochs": [{"val_accuracy": 1 - val_accuracy}, {"val_accuracy": val_accuracy}],
        "test": {"accuracy": test, "auc": test, "accuracy_course_subset": None},
    }


def test_the_best_rate_is_chosen_by_mean_validation_accuracy_not_by_test():
    group = [result_of(0.01, 0.8, test=0.5), result_of(0.01, 0.9, test=0.7)]
    table = q2.summarise([*group, result_of(0.1, 0.86, test=0.4), result_of(0.001, 0.3)])
    assert [row["learning_rate"] for row in table] == [0.1, 0.01, 0.001]
    assert table[1]["val_accuracy"] == pytest.approx([0.85, 0.1 / 2**0.5])
    assert table[0]["accuracy"] == [0.4, None] and table[0]["accuracy_course_subset"] == []
    assert q2.best_row(table)["learning_rate"] == 0.1


def test_a_lucky_run_does_not_win_for_a_rate_at_which_others_diverged():
    lucky = [result_of(1.0, 0.99)] + [result_of(1.0, 0.2, status="diverged")] * 4
    table = q2.summarise([*lucky, *[result_of(0.1, 0.8)] * 5])
    assert (table[0]["finished"], table[0]["diverged"]) == (1, 4)
    assert q2.best_row(table)["learning_rate"] == 0.1
    with pytest.raises(UserError, match=r"at every learning rate .*: 1\.0 \(4\); try smaller"):
        q2.best_row(q2.summarise(lucky))


@pytest.mark.parametrize(
    "rates, no_maxpool, is_of_search, name",
    [
        ([0.1, 0.01], False, False, "CNN-rates-epochs3"),
        ([0.1, 0.01], True, False, "CNN-rates-strided-epochs3"),
        ([0.1], False, False, "CNN-maxpool-lr0.1-epochs3"),
        ([0.1], True, False, "CNN-strided-lr0.1-epochs3"),
        ([0.1], True, True, "CNN-networks-epochs3"),
    ],
)
def test_a_figure_is_named_for_what_it_shows(monkeypatch, rates, no_maxpool, is_of_search, name):
    words = ["-epochs", "3", "-out", "out", *["-no_maxpool"][:no_maxpool]]
    args = q2.make_parser().parse_args(words)
    rows = [{"config": {**vars(args), "learning_rate": rate}} for rate in rates]
    monkeypatch.setattr(q2, "plot", Mock())
    q2.plot_results(args, rows, rows if is_of_search else [], "spots")
    assert q2.plot.call_args.args[2:] == (name, "out", "spots")


# --------------------------------------------------------------- searches, and what belongs to them
@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with data and, in out/, a search on them. Tests must not change it."""
    folder = tmp_path_factory.mktemp("searched")
    np.savez(folder / "octmnist.npz", source="synthetic test images", **oct_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "side_by_side", in_turn)
        patch.setattr(utils, "save_figure", Mock())
        call("-data", folder, "-out", folder / "out", "-epochs", 3, "-seed", 1, 2, *RATES)
    return folder


RATES = ("-learning_rate", 0.0001, 0.1)
NAME = "q2-search"


@pytest.fixture
def flags(searched, tmp_path):
    """The flags of that search, without its rates, on a copy of its folder."""
    shutil.copytree(searched, tmp_path / "copy")
    q2.load_data.cache_clear()
    folder = tmp_path / "copy"
    return ["-data", folder, "-out", folder / "out", "-epochs", 3, "-seed", 1, 2]


def out_of(flags):
    return flags[3]


BEST = ("-learning_rate", "best", "-no_maxpool")


OTHER_FLAGS = {
    "-epochs": (4, "had epochs 3, not 4; search with"),
    "-batch_size": (9, "had batch_size 8, not 9"),
    "-l2_decay": (0.1, "had l2_decay 0.0, not 0.1"),
    "-dropout": (0.5, "had dropout 0.7, not 0.5"),
    "-optimizer": ("adam", "had optimizer sgd, not adam"),
    "-seed": (1, r"had seed \[1, 2\], not \[1\]"),
    "-name": ("other", r"has no q2-other\.json; search with"),
}


@pytest.mark.parametrize("flag", OTHER_FLAGS)
def test_best_is_refused_where_the_search_had_other_flags(flags, flag):
    value, sentence = OTHER_FLAGS[flag]
    with pytest.raises(UserError, match=sentence):
        call(*flags, *BEST, flag, value)
    assert not results(out_of(flags), "q2-strided*")


def test_best_is_refused_where_the_search_had_other_data(flags):
    np.savez(flags[1] / "octmnist.npz", source="synthetic test images", **oct_arrays(seed=1))
    with pytest.raises(UserError, match="of other data"):
        call(*flags, *BEST)
    assert not results(out_of(flags), "q2-strided*")


def test_the_last_search_counts_and_one_of_other_flags_is_kept(flags, capsys, monkeypatch):
    """`best` reads the newest search of its name."""
    monkeypatch.setattr(utils, "save_figure", Mock())
    out = out_of(flags)
    first = results(out)[NAME]
    call(*flags, *RATES)  # the same again
    assert not list((out / "results").glob("*-old*"))
    call(*flags, "-learning_rate", 0.2, 0.0001)
    assert "q2-search.json is written anew; the one of before is kept as" in capsys.readouterr().out
    kept = json.loads((out / "results" / "q2-search-old1.json").read_text())
    assert kept["table"] == first["table"] and kept["best"] == first["best"]
    call(*flags, *BEST)
    rate = results(out)[NAME]["best"]["learning_rate"]
    assert "rates 0.2, 0.0001; seeds 1, 2; synthetic test images" in capsys.readouterr().out
    assert results(out, f"q2-strided-lr{rate}-*")
    call(*flags, *RATES, "-name", "other")  # beside it
    assert results(out)["q2-other"]["config"]["learning_rate"] == [0.1, 0.0001]
    call(*flags, *RATES, "-no_maxpool")  # the strided network's own search is another file
    assert results(out)[NAME]["config"]["learning_rate"] == [0.2, 0.0001]
    call(*flags, *RATES, "-plot_only")  # each run has its own file


def test_the_committed_results_are_read_by_todays_code(tmp_path, monkeypatch):
    """Also drawn: the search's figure, and both networks at its best rate."""
    shutil.copytree(ROOT / "report" / "results", tmp_path / "results")
    monkeypatch.setattr(utils, "save_figure", Mock())
    seeds = ("-seed", 42, 43, 44, 45, 46)
    call("-out", tmp_path, *seeds, "-learning_rate", 0.1, 0.01, 0.001, "-plot_only")
    call("-out", tmp_path, *seeds, *BEST, "-plot_only")
    drawn = [call.args[2] for call in utils.save_figure.call_args_list]
    assert drawn == ["CNN-rates", "CNN-networks"]
    for epochs, name in ((15, "search"), (150, "search-epochs150")):
        words = f"-out {ROOT / 'report'} -name {name} -epochs {epochs} -plot_only"
        args = q2.make_parser().parse_args([*words.split(), "-seed", "42", "43", "44", "45", "46"])
        search, results = q2.load_search(args)
        assert search["best"]["learning_rate"] == (0.1 if epochs == 15 else 0.01)
        assert search["table"] == q2.summarise(results)
        assert q2.best_row(search["table"]) == search["best"]


def test_the_assignments_own_two_commands_train_on_octmnist(oct_folder, monkeypatch):
    """`python download_octmnist.py`, then `python hw2-q2.py`; results go to build/data."""
    monkeypatch.chdir(oct_folder.parent)
    call("-epochs", 1)
    (result,) = results(oct_folder.parent / "build" / "data").values()
    assert result["data"]["source"] == "synthetic test images"
    monkeypatch.chdir(oct_folder)
    q2.load_data.cache_clear()
    with pytest.raises(UserError, match=r"`python download_octmnist.py` .* `make sample` .*-data"):
        call("-epochs", 1)


def test_results_of_other_data_are_not_drawn_together(flags):
    path = out_of(flags) / "results" / "q2-maxpool-lr0.1-seed2-epochs3.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "data": {**result["data"], "sha256": "another"}}))
    with pytest.raises(UserError, match="not all of the same data; train all of them again"):
        call(*flags, "-learning_rate", 0.1, "-plot_only")


def test_an_interrupted_run_says_so(flags, monkeypatch):
    monkeypatch.setattr(q2, "evaluate", Mock(side_effect=[0.5, 0.6, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        call(*flags[:-1])
    stored = results(out_of(flags))["q2-maxpool-lr0.01-seed1-epochs3"]
    assert stored["status"] == "interrupted" and len(stored["epochs"]) == 2
    with pytest.raises(UserError, match="was interrupted; run the same command without"):
        call(*flags[:-1], "-plot_only")


# ------------------------------------------------------------------------------ names and processes
def test_every_run_has_a_name_of_its_own_and_no_run_is_planned_twice(flags):
    args = q2.make_parser().parse_args([])
    names = list(q2.plan_runs(args, [0.01, 0.01000000001]))
    assert names == ["q2-maxpool-lr0.01-seed42", "q2-maxpool-lr0.01000000001-seed42"]
    words = "-no_maxpool -epochs 2 -dropout 0.5 -optimizer adam -seed 2 1 -device cpu"
    args = q2.make_parser().parse_args(words.split())
    q2.check_flags(args)
    ending = "-epochs2-dropout0.5-optimizeradam"  # what differs from the defaults
    planned = list(q2.plan_runs(args, [0.1]))
    assert planned == [f"q2-strided-lr0.1-seed{seed}{ending}" for seed in (1, 2)]
    for twice in (("-learning_rate", "0.1", "0.10"), ("-seed", 1, 1)):
        with pytest.raises(UserError, match="has one twice"):
            call(*flags, *twice)


def test_the_script_itself_trains_side_by_side_the_same_numbers_as_alone(flags):
    process = run_script("hw2-q2.py", *flags, *BEST, timeout=600)
    assert process.returncode == 0, process.stderr
    drawn = sorted(path.name for path in (out_of(flags) / "figures").iterdir())
    assert drawn == ["CNN-networks-epochs3.pdf", "CNN-networks-epochs3.png"]
    first, second = results(out_of(flags), "q2-strided*").values()
    rate = second["config"]["learning_rate"]
    call(*flags[:-2], 2, "-learning_rate", rate, "-no_maxpool")
    alone = results(out_of(flags))[second["run"]]
    assert numbers(alone) == numbers(second) != numbers(first)


@pytest.mark.parametrize("device, n_forks", [("cpu", 1), ("cuda", 0)])
def test_one_process_a_run_but_one_for_all_on_a_gpu(flags, monkeypatch, device, n_forks):
    fork = Mock(side_effect=in_turn)
    monkeypatch.setattr(runs, "side_by_side", fork)
    monkeypatch.setattr(runs, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(q2, "train", lambda name, *_: name)
    args = q2.make_parser().parse_args([str(flag) for flag in flags])
    planned = q2.plan_runs(args, [0.1, 0.01])
    assert q2.train_all(planned, args.out) == list(planned) and fork.call_count == n_forks
    assert q2.load_data.cache_info().currsize == 1  # here: processes share the images


# ---------------------------------------------------------------------------------------- all flags
BASE = (
    "-epochs 2 -batch_size 8 -learning_rate 0.1 -l2_decay 0.01 -dropout 0.3 -optimizer sgd"
    " -seed 1 -device cpu -data data -out out"
)
OTHER_NUMBERS = {
    "batch_size": 9,
    "learning_rate": 0.11,
    "l2_decay": 0.02,
    "dropout": 0.4,
    "optimizer": "adam",
    "no_maxpool": True,
    "seed": 2,
}
SAME_NUMBERS = {
    "epochs": 3,  # the first two epochs are the same
    "data": "copy",
    "out": "elsewhere",
    "device": "cpu:0",
    "plot_only": True,
    "name": "other",
}


def test_every_flag_changes_what_it_says_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    np.savez("data/octmnist.npz", **oct_arrays(24, 12, 12))
    monkeypatch.setattr(q2, "plot_results", Mock())
    monkeypatch.setattr(runs, "git_commit", lambda: "a commit")  # git would be asked for every run
    shutil.copytree("data", "copy")
    call(*BASE.split())
    (base,) = results(Path("out")).values()
    assert {*OTHER_NUMBERS, *SAME_NUMBERS} == set(vars(q2.make_parser().parse_args([])))
    for flag, value in {**OTHER_NUMBERS, **SAME_NUMBERS}.items():
        folder = {"out": "elsewhere", "plot_only": "out"}.get(flag, flag)
        call(*BASE.split(), "-out", folder, f"-{flag}", *([] if value is True else [value]))
        (changed,) = results(Path(folder)).values()
        config = {**base["config"], flag: value}
        assert changed["config"] == {key: config[key] for key in base["config"]}, flag
        assert changed["seed"] == config["seed"], flag
        for key in ("data", "parameters", "status", "search"):
            assert changed[key] == base[key], flag
        losses, base_losses = ([row["train_loss"] for row in r["epochs"]] for r in (changed, base))
        if flag in OTHER_NUMBERS:
            assert len(losses) == 2 and not {*losses} & {*base_losses}, flag
        elif flag == "epochs":
            assert len(losses) == 3 and numbers(changed)[0][:2] == numbers(base)[0]
        else:
            assert numbers(changed) == numbers(base), flag
            assert (changed == base) == (flag == "plot_only")  # which trains nothing: the old file


# ---------------------------------------------------------------------------------------- bad input
BAD_FLAGS = ("-epochs 0", "-dropout 1", "-seed -1", "-learning_rate best 0.1", "-data nowhere")


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags_are_refused(words, flags):
    with pytest.raises((UserError, SystemExit)):
        call(*flags, *words.split())


def test_a_folder_that_cannot_be_written_is_found_before_training(flags, monkeypatch):
    monkeypatch.setattr(q2, "train_all", Mock(side_effect=AssertionError("it trains")))
    with pytest.raises(UserError, match=r"octmnist\.npz.*: Not a directory"):
        call(*flags, "-out", flags[1] / "octmnist.npz")


def test_every_run_diverged_is_one_sentence_and_a_result(flags):
    with pytest.raises(UserError, match="in every run; try a smaller rate"):
        call(*flags, "-learning_rate", 1e30)
    found = results(out_of(flags), "q2-maxpool-lr1e+30*").values()
    assert [run["status"] for run in found] == ["diverged"] * 2
    assert [(run["epochs"], run["test"]) for run in found] == [([], {})] * 2


# ------------------------------------------------------------------------------ the control of Q2.3
def test_average_pooling_is_the_same_network_with_means():
    images = torch.rand(3, 1, 28, 28)
    control = pooling_control.AveragePoolingCNN(0.0).eval()
    x = torch.relu(control.conv1(images))
    x = x.reshape(3, 8, 14, 2, 14, 2).mean(dim=(3, 5))
    x = torch.relu(control.conv2(x)).reshape(3, 16, 6, 2, 6, 2).mean(dim=(3, 5)).flatten(1)
    x = torch.relu(control.fc2(torch.relu(control.fc1(x))))
    torch.testing.assert_close(control(images), control.fc3(x).log_softmax(dim=1))
    assert q2.get_number_trainable_params(control) == 224_892


def test_the_control_trains_its_own_network(flags):
    words = [*flags, "-learning_rate", 0.1]
    pooling_control.main(pooling_control.make_parser().parse_args([str(word) for word in words]))
    found = results(out_of(flags))
    average = found["q2-avgpool-lr0.1-seed1-epochs3"]
    assert average["config"]["pooling"] == "average"
    assert numbers(average) != numbers(found["q2-maxpool-lr0.1-seed1-epochs3"])
