"""tools/trials.py: each kind of run is trained with its own settings, and none twice."""

import json

from conftest import run_tool, write_corpus


def test_six_kinds_of_runs_for_a_seed(tmp_path):
    write_corpus(tmp_path)
    flags = ["-data", tmp_path, "-out", tmp_path / "out", "-epochs", 1, "-seed", 7]
    first = run_tool("trials", *flags)
    assert first.returncode == 0, first.stderr
    results = {}
    for path in (tmp_path / "out" / "results").glob("*.json"):
        results[path.stem] = json.loads(path.read_text())
    found = {}
    for name, result in results.items():
        config = result["config"]
        found[name] = (config["ctc_weight"], config["clock"], config["seed"])
        assert result["status"] == "finished" and "tools.trials" in result["command"]
    assert found == {
        "q3-lstm-trial-ctc-seed7": (0.3, 1, 7),
        "q3-lstm-trial-noctc-seed7": (0.0, 1, 7),
        "q3-transformer-trial-ctc-seed7": (0.3, 1, 7),
        "q3-transformer-trial-noctc-seed7": (0.0, 1, 7),
        "q3-transformer-trial-ctc-random-seed7": (0.3, 0, 7),
        "q3-transformer-trial-noctc-random-seed7": (0.0, 0, 7),
    }
    losses = [result["test"]["loss"] for result in results.values()]
    assert len(set(losses)) == 6  # each is another model
    assert list((tmp_path / "out" / "checkpoints").glob("*.pt")) == []
    again = run_tool("trials", *flags)
    assert again.stdout.startswith("0 runs")
