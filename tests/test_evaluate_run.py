"""A run that is evaluated while it trains."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from runs import final_state, lines_of

from jlml_jax import evaluate_run, protocols, train
from jlml_jax.train import train_and_evaluate


@pytest.fixture
def evaluated_config(tiny_config, monkeypatch):
    """Evaluated after steps 3, 6, 9 and 12; reports are after 4, 8 and 12, checkpoints after 6 and 12.

    Who is who in the gallery is drawn, or the miniature's colours would give all scores of 1 from the first step on.
    """
    load = protocols.load

    def load_drawn(name, data):
        trial = load(name, data).trial(0)
        identities = np.random.RandomState(0).permutation(trial.gallery.identities)
        trial = dataclasses.replace(trial, gallery=dataclasses.replace(trial.gallery, identities=identities))
        return protocols.Protocol(1, lambda number: trial)

    monkeypatch.setattr(protocols, "load", load_drawn)
    tiny_config.evaluate.every, tiny_config.evaluate.picture = 3, False
    tiny_config.model.branches = "global"
    return tiny_config


def evaluations_of(workdir):
    return [line for line in lines_of(workdir) if "rank1/global" in line]


def scores_of(rows, features):
    return {f"{score}/{row['feature']}": row[score] for row in rows for score in ("rank1", "mean_ap")
            if row["protocol"] == "single-query" and row["feature"] in features}


def assert_equal_states(config, a, b):
    left, right = final_state(config, a), final_state(config, b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_evaluations_change_nothing_and_are_those_of_a_run_that_ends_there(evaluated_config, tmp_path, capsys):
    config = evaluated_config
    config.model.branches = "both"
    config.evaluate.update(normalize="per_branch", norm_statistics="camera", flip_average=True, reranking=True,
                           baselines=True, every=0)
    train_and_evaluate(config, tmp_path / "plain", "train")
    config.evaluate.every = 3
    capsys.readouterr()
    rows = train_and_evaluate(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert_equal_states(config, tmp_path / "plain", tmp_path / "run")

    lines, evaluations = lines_of(tmp_path / "run"), evaluations_of(tmp_path / "run")
    assert [line for line in lines if line not in evaluations] == lines_of(tmp_path / "plain")
    assert [line["step"] for line in evaluations] == [3, 6, 9, 12]
    features = ("global", "local", "joint")
    assert evaluations[-1] == {"step": 12} | scores_of(rows, features)
    assert len({line["mean_ap/joint"] for line in evaluations}) > 1  # or the next comparison would say nothing
    line, = (line for line in told.splitlines() if line.startswith("step 6/12  evaluation in per cent: global R1 "))
    assert line.endswith(f"joint R1 {100 * evaluations[1]['rank1/joint']:.1f} mAP "
                         f"{100 * evaluations[1]['mean_ap/joint']:.1f}")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    rows = train_and_evaluate(config, tmp_path / "run", "evaluate")
    assert evaluations[1] == {"step": 6} | scores_of(rows, features)


class Broken(Exception):
    pass


@pytest.mark.parametrize("loader", ["device", pytest.param("tf_data", marks=pytest.mark.slow)])
def test_no_evaluation_is_missing_or_twice_after_a_stop(evaluated_config, tmp_path, monkeypatch, loader):
    config = evaluated_config
    config.data.loader = loader
    train_and_evaluate(config, tmp_path / "whole")
    begun, disturbances = [], {1: "signal", 3: "error", 5: "error"}  # by the number of the evaluation

    def evaluate_while_training(run, state, stopped):
        begun.append(int(state.step))
        disturbance = disturbances.get(len(begun))
        if disturbance == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif disturbance:
            raise Broken
        return evaluate_run.evaluate_while_training(run, state, stopped)

    monkeypatch.setattr(train, "evaluate_while_training", evaluate_while_training)
    with pytest.raises(SystemExit) as left:
        train_and_evaluate(config, tmp_path / "run")
    assert left.value.code == 128 + signal.SIGTERM and begun == [3]
    assert evaluations_of(tmp_path / "run") == []
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"3"}
    for steps in ([3, 6], [6, 9]):  # what a stop has left out comes first; checkpoint 6 is from before its evaluation
        begun_before = len(begun)
        with pytest.raises(Broken):
            train_and_evaluate(config, tmp_path / "run")
        assert begun[begun_before:] == steps
    train_and_evaluate(config, tmp_path / "run", "train")
    assert begun[5:] == [9]
    assert evaluations_of(tmp_path / "run") == evaluations_of(tmp_path / "whole")[:3]
    for _ in range(2):
        train_and_evaluate(config, tmp_path / "run")  # which is finished, and is evaluated at its end
        assert sorted(map(json.dumps, lines_of(tmp_path / "run"))) == sorted(map(json.dumps, lines_of(
            tmp_path / "whole")))
    assert_equal_states(config, tmp_path / "whole", tmp_path / "run")


def test_a_run_may_be_evaluated_from_some_step_on(evaluated_config, tmp_path):
    config = evaluated_config
    config.evaluate.every, config.train.steps = 0, 12
    train_and_evaluate(config, tmp_path / "run", "train")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    config.evaluate.every = 5
    train_and_evaluate(config, tmp_path / "run")
    assert [line["step"] for line in evaluations_of(tmp_path / "run")] == [10, 12]  # the last one is of the end
