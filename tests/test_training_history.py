import json
import shutil
import sys

import pytest

from jlml_jax import train
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate


def test_results_tell_who_trained_where_another_command_did(tiny_config, tmp_path, monkeypatch):
    def provenance_by(command, mode, steps=12):
        monkeypatch.setattr(sys, "argv", ["-", command])
        tiny_config.train.steps = steps
        train_and_evaluate(tiny_config, tmp_path / "run", mode)
        path = tmp_path / "run" / "results.json"
        return json.loads(path.read_text())["provenance"] if path.exists() else None

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingLog, "report", stop)
        with pytest.raises(Stop):
            provenance_by("never-saved", "train")
    assert provenance_by("first", "train_and_evaluate")["command"].endswith(" first")
    assert "training" not in provenance_by("first", "train_and_evaluate")
    evaluated = provenance_by("second", "evaluate")
    assert evaluated["command"].endswith(" second")
    assert [(start["command"].split()[-1], start["first_step"]) for start in evaluated["training"]] == [("first", 0)]
    assert {"commit", "versions", "hardware"} <= set(evaluated["training"][0])

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")  # as a run is left that was stopped
    resumed = provenance_by("third", "train_and_evaluate")
    assert [(start["command"].split()[-1], start["first_step"]) for start in resumed["training"]] == [
        ("first", 0), ("third", 6)]
    (tmp_path / "run" / "training.json").write_text("[")
    with pytest.raises(UserError, match=r"training.json is damaged .* delete it"):
        provenance_by("third", "evaluate")
