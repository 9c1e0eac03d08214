"""The evaluation of a run, on its own test and on other data sets, and of several trials together: results.json."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jlml_jax import evaluate, logs, norm_statistics, parallel, pictures, result_rows, training_history
from jlml_jax.checkpoints import RESULTS, read_description, read_results
from jlml_jax.command import Run
from jlml_jax.datasets.split import Split
from jlml_jax.errors import UserError, first_few
from jlml_jax.evaluate import FeatureCache, Features, Forward
from jlml_jax.files import write_atomically
from jlml_jax.logs import TrainingLog
from jlml_jax.models import init_variables
from jlml_jax.protocols import Trial
from jlml_jax.train_step import TrainState


def evaluate_run(run: Run, state: TrainState, started: float) -> list[dict[str, Any]]:
    """Evaluates the network of `state`, prints the tables and writes results.json, whose rows it returns.

    `started` is when the run began, in seconds of `time.perf_counter`.
    """
    variables, step = _variables(state), int(state.step)
    own_rows = _own_rows(run, variables)
    rows = own_rows + _other_rows(run, variables)
    if rows:
        print(result_rows.format_rows(rows), flush=True)
    else:
        print(f"{run.trial.dataset} has no test; evaluate the run on other data sets with --config.evaluate.datasets",
              flush=True)
    provenance = run.command.provenance
    results = provenance | {
        "seed": run.config.seed, "steps": step, "train_fingerprint": run.label_map["fingerprint"],
        result_rows.SETTINGS: result_rows.settings_of(run.config.evaluate),
        "wall_time_seconds": round(time.perf_counter() - started, 1)}
    _write(run.workdir, rows,
           training_history.with_training(results, provenance, training_history.read(run.workdir)))
    if is_due(run.config, step):
        parallel.on_first_process(lambda: _log_last(run, step, own_rows))
    return rows


def _log_last(run: Run, step: int, own_rows: list[dict[str, Any]]) -> None:
    """Adds to the evaluations while training the one at the end, unless an earlier call has."""
    if logs.is_evaluated(run.workdir, step):
        return
    features = (*run.model.active_branches(), "joint")  # others are baselines
    log = TrainingLog(run.workdir, step, run.config.train.steps, run.config.train.batch_size)
    log.evaluation(step, [row for row in own_rows if row["protocol"] == run.trial.protocol
                          and row["feature"] in features], seconds=0)
    log.close()


def is_due(config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether the run is evaluated after `step` steps, by `config.evaluate.every`."""
    every = config.evaluate.every
    return every > 0 and step > 0 and (step % every == 0 or step == config.train.steps)


def refuse_no_test(trial: Trial, config: ml_collections.ConfigDict) -> None:
    """A UserError if the run is to be evaluated while it trains, and `trial` has nobody to search for."""
    if config.evaluate.every and trial.query is None:
        hold_out = "" if trial.validation is not None else ", or hold people out with --config.data.held_out_identities"
        raise UserError(f"evaluate.every={config.evaluate.every} asks for rank-1 and mAP while training, and "
                        f"{trial.dataset} has no queries and gallery; give --config.evaluate.every=0{hold_out}")


class _Stopped(Exception):
    """An evaluation was asked to stop."""


def evaluate_while_training(run: Run, state: TrainState, stopped: Callable[[], Any]) -> list[dict[str, Any]] | None:
    """The rows of the run's own test by the network of `state`, one a feature: single-query, not re-ranked.

    `stopped` is asked before every batch; where it says so, there are none.
    """
    def unless_stopped(program: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if stopped():
                raise _Stopped
            return program(*arguments)
        return call

    settings = run.config.evaluate.copy_and_resolve_references()
    settings.reranking, settings.multi_query = False, ""
    try:
        features = norm_statistics.features_of(run.trial, unless_stopped(run.forward()),
                                               unless_stopped(run.statistics()), _variables(state), run.config,
                                               run.command.mesh)
        return evaluate.evaluate_trials([run.trial], features, settings, run.products())
    except _Stopped:
        return None


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _own_rows(run: Run, variables: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the run's own test or validation images."""
    config, trial = run.config.evaluate, run.trial
    rows = []
    if trial.validation is not None:
        rows += evaluate.evaluate_validation(trial, _extract(run, run.forward("logits"), variables, trial.validation))
    if trial.query is None:
        return rows
    features = _features_of(run, trial, variables)
    if config.baselines:
        rows += evaluate.evaluate_baselines(trial, run.config.data) + [_untrained_row(run)]
    rows += evaluate.evaluate_trials([trial], features, config, run.products())
    if config.picture and jax.process_index() == 0:
        query, gallery = (evaluate.matching_feature(features(split), config.normalize)
                          for split in (trial.query, trial.gallery))
        pictures.ranked_lists(trial, query, gallery, run.workdir / "ranked.png")
        print(f"ranked lists of a few queries in {run.workdir / 'ranked.png'}", flush=True)
    return rows


def _untrained_row(run: Run) -> dict[str, Any]:
    """Of the network before its first step: what its structure alone is worth."""
    data, config = run.config.data, run.config.evaluate.copy_and_resolve_references()
    config.norm_statistics = "run"
    variables = init_variables(run.model, run.config.seed, data.height, data.width)
    single_query = dataclasses.replace(run.trial, multi_query=None)
    rows = evaluate.evaluate_trials([single_query], functools.partial(_extract, run, run.forward(), variables), config)
    return rows[-1] | {"feature": "untrained network"}


def _other_rows(run: Run, variables: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the data sets that `evaluate.datasets` names, in all their trials."""
    config, products = run.config.evaluate, run.products()
    rows = []
    for tests in run.command.other_tests:
        if config.norm_statistics == "run":  # an image has the same features in all trials
            rows += evaluate.evaluate_trials(tests, _features_of(run, tests[0], variables), config, products)
        else:
            of_tests = [row for test in tests for row in evaluate.evaluate_trials(
                [test], _features_of(run, test, variables), config, products)]
            rows += of_tests + (result_rows.mean_rows(of_tests) if len(tests) > 1 else [])
    trained = run.label_map
    if not run.config.train.steps:  # nothing was; the run that it starts from was
        trained = trained["init_from"] or trained
    return [row | {"trained_on": trained["dataset"], "trained_trial": run.trial.number} for row in rows]


def _features_of(run: Run, trial: Trial, variables: dict[str, Any]) -> FeatureCache:
    return norm_statistics.features_of(trial, run.forward(), run.statistics(), variables, run.config, run.command.mesh)


def _extract(run: Run, forward: Forward, variables: dict[str, Any], split: Split) -> Features:
    return evaluate.extract_features(forward, variables, split, run.config.data, run.config.evaluate.batch_size,
                                     run.command.mesh)


def collect_trials(workdir: Path, settings: ml_collections.ConfigDict, provenance: dict[str, Any]
                   ) -> list[dict[str, Any]]:
    """Writes the results of all trials evaluated so far, and their means, into the folder that they are in.

    The means are over the trials that were trained for as many steps as any, and evaluated by these settings, a
    `config.evaluate`. Returns all rows.
    """
    trials = {path.parent: read_results(path.parent) for path in sorted(workdir.glob(f"trial-*/{RESULTS}"))}
    if not trials:  # on another host than the one that writes, which does not see them yet
        return []
    steps = max(trial["provenance"]["steps"] for trial in trials.values())
    fewer_steps = [folder for folder, trial in trials.items() if trial["provenance"]["steps"] < steps]
    wanted = result_rows.settings_of(settings)
    otherwise = [folder for folder, trial in trials.items() if trial["provenance"].get(
        result_rows.SETTINGS, result_rows.settings_of(read_description(folder)[0].evaluate)) != wanted]
    for left_out, why in ((fewer_steps, f"evaluated after fewer steps than the {steps} of others"),
                          (otherwise, f"evaluated by another {' or '.join(wanted)}")):
        if left_out:
            print(f"{why} and not in the means: {first_few([folder.name for folder in left_out])}; the same command "
                  "with these trials evaluates them again", flush=True)
    alike = [row for folder, trial in trials.items() if folder not in fewer_steps + otherwise for row in trial["rows"]]
    others = [row for row in alike if "trained_trial" in row]
    means = result_rows.mean_rows([row for row in alike if "trained_on" not in row])
    means += result_rows.mean_rows(result_rows.without_averaged(others), over="trained_trial")
    if means:
        print(result_rows.format_rows(means), flush=True)
    rows = [row for trial in trials.values() for row in trial["rows"]] + means
    _write(workdir, rows, training_history.of_trials([trial["provenance"] for trial in trials.values()], provenance))
    return rows


def _write(workdir: Path, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
    def write():
        write_atomically(workdir / RESULTS, json.dumps({"rows": rows, "provenance": provenance}, indent=1))
        print(f"results in {workdir / RESULTS}", flush=True)

    parallel.on_first_process(write)
