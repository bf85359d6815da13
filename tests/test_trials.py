"""tools/trials.py: each kind of run is trained with its own settings, and none twice."""

import runs
from conftest import write_corpus
from tools import trials


def test_six_kinds_of_runs_for_a_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "side_by_side", lambda train, jobs: [train(*job) for job in jobs])
    write_corpus(tmp_path)
    flags = ["-data", str(tmp_path), "-out", str(tmp_path / "out"), "-epochs", "1", "-seed", "7"]
    args = trials.make_parser().parse_args(flags)
    trials.main(args)
    found, losses = {}, set()
    for path in (tmp_path / "out" / "results").glob("*.json"):
        result = runs.load_result(tmp_path / "out", path.stem)
        assert result["status"] == "finished"
        config = result["config"]
        found[path.stem] = (config["ctc_weight"], config["clock"], config["seed"])
        losses.add(result["test"]["loss"])
    assert found == {
        "q3-lstm-trial-ctc-seed7": (0.3, 1, 7),
        "q3-lstm-trial-noctc-seed7": (0.0, 1, 7),
        "q3-transformer-trial-ctc-seed7": (0.3, 1, 7),
        "q3-transformer-trial-noctc-seed7": (0.0, 1, 7),
        "q3-transformer-trial-ctc-random-seed7": (0.3, 0, 7),
        "q3-transformer-trial-noctc-random-seed7": (0.0, 0, 7),
    }
    assert len(losses) == 6  # each is another model
    assert list((tmp_path / "out" / "checkpoints").glob("*.pt")) == []
    capsys.readouterr()
    trials.main(args)
    assert capsys.readouterr().out.startswith("0 runs")
    q3 = runs.load_definitions(trials.NOTEBOOK, data=str(tmp_path), out=args.out, epochs=2)
    assert not trials.is_trained("q3-lstm-trial-ctc-seed7", q3, q3.load_corpus(q3.settings))
