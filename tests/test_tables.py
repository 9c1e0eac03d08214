"""The command that makes the paper's tables, on the miniature Market-1501, and the published figures."""

import csv
import io
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import market1501, modern, synthetic
from experiments.tables import __main__ as command
from experiments.tables import figures, plan, published, size, timing
from experiments.tables.report import Outcome, Report, outcomes
from jlml_jax import datasets, result_rows
from jlml_jax.augment import normalise
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.models import build_model, init_variables, is_identity_layer
from jlml_jax.protocols import joined_name
from jlml_jax.train import train_and_evaluate

DATASET = "market1501"
TINY = ["--config.data.height=16", "--config.data.width=8", "--config.model.num_strips=1", "--config.model.depth=1",
        "--config.model.stem_features=4", "--config.model.global_widths=(4,)", "--config.model.local_widths=(4,)",
        "--config.model.global_feature_dim=8", "--config.model.local_feature_dim=8", "--config.train.steps=4",
        "--config.train.batch_size=8", "--config.evaluate.batch_size=16", "--config.log_every=2",
        "--config.checkpoint_every=2", "--config.compilation_cache="]


def run(*arguments):
    return command.main(["tables", *map(str, arguments)])


@pytest.fixture(scope="module")
def arguments(market1501_dir):
    return [f"--dataset={DATASET}", f"--config.data.data_dir={market1501_dir}", *TINY]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, arguments):
    """Tables 9 and 12 made: the folder of all tables.

    The full JLML's is the only training here; the run without penalties is a copy of it that says so in its config.
    """
    workdir = tmp_path_factory.mktemp("tables")
    assert run("--table=9", f"--workdir={workdir}", *arguments) == 0
    copy = workdir / DATASET / "without_sfl" / "seed-0"
    shutil.copytree(workdir / DATASET / "jlml" / "seed-0", copy)
    config = json.loads((copy / "config.json").read_text())
    config["loss"]["lambda_global"] = config["loss"]["lambda_local"] = 0.0
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "results.json").touch()
    assert run("--table=12", f"--workdir={workdir}", *arguments) == 0
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, times of files included, for tests that change it."""
    shutil.copytree(trained, tmp_path / "tables")
    return tmp_path / "tables"


@pytest.fixture
def no_training(monkeypatch):
    """The rows that would be trained, by name; nothing is, nor drawn."""
    asked = []
    monkeypatch.setattr(figures, "draw", lambda report, folder, stem: [])
    monkeypatch.setattr(command, "train_and_evaluate", lambda config, workdir: asked.append(config.name))
    return asked


def lines_of(workdir, number):
    """The CSV's lines by (line, query, score)."""
    text = (workdir / DATASET / f"table_{number}.csv").read_text()
    return {(line["line"], line["query"], line["score"]): line for line in csv.DictReader(io.StringIO(text))}


def score_of(workdir, row, feature, protocol, score):
    rows = json.loads((workdir / DATASET / row / "seed-0" / "results.json").read_text())["rows"]
    found, = (one[score] for one in rows if (one["feature"], one["protocol"]) == (feature, protocol))
    return 100 * found


# --- The paper's figures

def test_published_figures():
    def paper(number, line):
        return list(published.load(number).rows[line])

    assert paper("6", "JLML") == paper("9", "JLML (joint)") == [85.1, 65.5, 89.7, 74.5]
    assert paper("5", "X-Corr") == [72.4, 95.5, None, 98.4, 72.0, 96.0, None, 98.2]
    assert paper("5", "MTDnet") == [74.7, 96.0, 97.5] + 5 * [None]
    assert paper("7", "SCS") == [53.5, 82.6, 91.5, 96.7]
    assert paper("8", "JLML") == [37.5, 61.4, 69.4, 77.4]
    assert paper("10", "UniLoss, Local Feature") == [46.3, 26.3, 58.0, 34.0]
    assert paper("13", "JLML-ResNet39") == [1.54e9, 7.2, 39, 5]
    assert [len(published.load(str(number)).rows) for number in range(5, 14)] == [9, 5, 9, 5, 3, 6, 2, 2, 5]


@pytest.mark.parametrize(("number", "better", "worse", "gains"), [
    ("5", "JLML", "DGD", {0: 7.9}), ("5", "JLML", "X-Corr", {4: 8.6}), ("6", "JLML", "S-CNN", {0: 19.3, 2: 13.7}),
    ("8", "JLML", "GOG", {0: 12.8}), ("9", "JLML (joint)", "JLML (Local)", {0: 6.2, 1: 7.7, 2: 3.3, 3: 6.1}),
    ("10", "MultiLoss, Full", "UniLoss, Full", {0: 9.0, 1: 13.3, 2: 6.0, 3: 11.7}),
    ("11", "With Shared Feature", "Without Shared Feature", {0: 1.9, 1: 2.4, 2: 1.4, 3: 2.4}),
    ("12", "With SFL", "Without SFL", {0: 1.7, 1: 1.7, 2: 1.0, 3: 1.6}),
])
def test_published_figures_agree_with_the_gains_in_the_papers_text(number, better, worse, gains):
    rows = published.load(number).rows
    assert {k: round(rows[better][k] - rows[worse][k], 1) for k in gains} == gains


def test_every_table_is_whole():
    for name, table in plan.TABLES.items():
        if table.title:
            assert table.rows() and not table.comparisons
            continue
        paper = published.load(name)
        assert all(len(values) == len(paper.columns) for values in paper.rows.values())
        assert table.ours.keys() <= paper.rows.keys()
        assert {line for pair in table.comparisons for line in pair} <= table.ours.keys()
    assert published.citation("X-Corr") == "Subramaniam et al., 2016"
    assert published.citation("JLML (joint)") == published.citation("UniLoss, Full") == "Li et al., 2017"
    compared = {line for number in ("5", "6", "7", "8", "13") for line in published.load(number).rows}
    assert {line for line in compared if published.citation(line) == "Li et al., 2017"} == {"JLML", "JLML-ResNet39"}


# --- What the user can mend

@pytest.mark.parametrize(("given", "message"), [
    (["--table=4"], "--table=4 is not a table made here; give one of 5 to 13, or of normalize, feature, strips"),
    (["--table=nine"], "--table=nine is not a table"),
    (["--dataset=market1501"], "--table= is not a table"),
    (["--table=6"], "--dataset=: table 6 is defined on market1501"),
    (["--table=6", "--dataset=viper"], "--dataset=viper: table 6 is defined on market1501"),
    (["--table=5", "--dataset=cuhk03"], "cuhk03/detected, cuhk03/labeled"),
    (["--table=9", "--dataset=tiny_imagenet"], "table 9 is defined on"),
    (["--table=9", "--dataset=folder/"], "folder/NAME"),
    (["--table=9", "--dataset=viper", "--only=uni_loss"], "--only=uni_loss is not a row of table 9; its rows are jlml"),
    (["--table=13", "--dataset=viper", "--only=jlml"], "it has nothing to train"),
    (["--table=9", "--dataset=viper", "--seeds=0,a"], "--seeds=0,a"),
    (["--table=9", "--dataset=viper", "--seeds="], "--seeds="),
    (["--table=9", "--dataset=viper", "--seeds=1,1"], "names a seed twice"),
    (["--table=9", "--dataset=viper", "--config.train.stps=1"], "near it: train.steps"),
    (["--table=9", "--dataset=viper", "--config.seed=1"], "use --seeds"),
    (["--table=9", "--dataset=viper", "--config.data.name=grid"], "use --dataset"),
    (["--table=10", "--dataset=viper", "--config.model.loss=uni"], "model.loss='uni' is for all rows"),
    (["--table=12", "--dataset=viper", "--config.loss.lambda_global=0", "--config.loss.lambda_local=0"], "the same"),
    (["--table=5", "--dataset=cuhk03/labeled", "--config.data.cuhk03_protocol=767/700"], "single-shot"),
    (["--table=9", "--dataset=viper", "--dri_run"], "dri_run"),
    (["--table=9", "--dataset=viper", "jlml"], "unexpected argument 'jlml'"),
])
def test_bad_input_is_told_in_one_line(capsys, tmp_path, no_training, given, message):
    assert run(f"--workdir={tmp_path / 'tables'}", *given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not no_training and not (tmp_path / "tables").exists()


def test_data_that_are_not_prepared(capsys, tmp_path):
    assert run("--table=7", "--dataset=viper", f"--workdir={tmp_path}", f"--config.data.data_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert "jlml seed 0: viper is not prepared" in error and "python -m jlml_jax.prepare viper" in error
    assert "| JLML | 50.2 | failed |" in (tmp_path / "viper" / "table_7.md").read_text()


def test_without_matplotlib_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tables\]'"):
        figures.check_matplotlib()


# --- A table that was made

def test_table_12(trained):
    lines = lines_of(trained, 12)
    for line, row in (("With SFL", "jlml"), ("Without SFL", "without_sfl")):
        for query in ("single", "multi"):
            for score in ("rank1", "mean_ap_trapezoid"):
                ours = score_of(trained, row, "joint", f"{query}-query", score)
                assert float(lines[line, query, score]["ours"]) == pytest.approx(ours, abs=1e-3)
                assert lines[line, query, score]["state"] == "finished"
    line = lines["With SFL", "multi", "mean_ap_trapezoid"]
    assert float(line["paper"]) == 74.5
    assert float(line["difference"]) == pytest.approx(float(line["ours"]) - 74.5, abs=1e-3)
    assert lines["With SFL", "single", "rank20"]["paper"] == "" and lines["With SFL", "single", "rank20"]["ours"]
    text = (trained / DATASET / "table_12.md").read_text()
    rank1 = score_of(trained, "jlml", "joint", "single-query", "rank1")
    assert f"| With SFL | 85.1 | {rank1:.1f} | {rank1 - 85.1:+.1f} | 65.5 |" in text
    assert "With SFL over Without SFL | +1.7 |" in text and "one run a row" in text
    assert "| complete |" in text


def test_every_run_carries_its_provenance(trained):
    found = json.loads((trained / DATASET / "table_12_runs.json").read_text())
    assert [(one["row"], one["seed"]) for one in found] == [("without_sfl", 0), ("jlml", 0)]
    for one in found:
        source = one["provenance"]
        assert {"command", "commit", "uncommitted_changes", "versions", "hardware", "seed", "wall_time_seconds",
                "images_per_second", "train_fingerprint", "incomplete"} <= source.keys()
        assert source["steps"] == source["config"]["train"]["steps"] == 4
        assert len(one["rows"]) == 6  # three features, two protocols
    assert [one["provenance"]["config"]["loss"]["lambda_local"] for one in found] == [0.0, 5e-4]


def test_what_is_published_of_a_run_names_no_folder_of_this_machine():
    source = {
        "command": "tables --table=9 --workdir=/a/b --config.data.data_dir=/c --config.init_from=/a/first --seeds=0",
        "config": {"init_from": "/a/first", "data": {"data_dir": "/c", "name": "viper"}, "compilation_cache": "/d"}}
    assert plan.without_paths(source) == {
        "command": "tables --table=9 --config.init_from=runs/first --seeds=0",
        "config": {"init_from": "runs/first", "data": {"data_dir": "", "name": "viper"}, "compilation_cache": ""}}


def test_figures_of_table_12(trained):
    folder = trained / DATASET
    for name in ("training", "cmc", "features", "scales"):
        picture = (folder / f"table_12_{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) < 200_000
        assert f"(table_12_{name}.png)" in (folder / "table_12.md").read_text()
    curves = list(csv.DictReader((folder / "table_12_training.csv").open()))
    logged = [json.loads(line) for line in (folder / "jlml" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert ([float(one["cross_entropy"]) for one in curves if (one["row"], one["classifier"]) == ("jlml", "local")]
            == [line["cross_entropy/local"] for line in logged])
    layers = {(one["row"], one["when"], one["branch"], one["strip"]): one
              for one in csv.DictReader((folder / "table_12_features.csv").open())}
    assert len(layers) == 2 * 2 * 2  # rows, before and after, global and one strip
    trained_run = load_run(folder / "jlml" / "seed-0")
    model = build_model(trained_run.config, 0)
    for when, variables in (("before", init_variables(model, 0, 16, 8)), ("after", trained_run.variables)):
        kernel = np.asarray(variables["params"]["local_head"]["fc"]["kernel"])
        assert float(layers["jlml", when, "local", "0"]["group_norm_mean"]) == pytest.approx(
            np.abs(kernel).sum(axis=0).mean(), rel=1e-5)
    assert layers["jlml", "before", "global", ""] != layers["jlml", "after", "global", ""]


def test_scales_of_the_branches(trained, market1501_dir):
    """Against the distances themselves, over all pairs of queries."""
    folder = trained / DATASET
    scales, = (one for one in csv.DictReader((folder / "table_12_scales.csv").open()) if one["row"] == "jlml")
    run = load_run(folder / "jlml" / "seed-0")
    images = datasets.load(DATASET, ("query",), str(market1501_dir))["query"].decode(16, 8)
    model = build_model(run.config, 0)
    params = {name: leaf for name, leaf in run.variables["params"].items() if not is_identity_layer(name)}
    features = model.apply(run.variables | {"params": params}, normalise(images, run.config.data))["features"]
    squares = {branch: np.square(np.asarray(values)[:, None] - np.asarray(values)[None]).sum()
               for branch, values in features.items()}
    assert float(scales["local_share"]) == pytest.approx(100 * squares["local"] / sum(squares.values()), rel=1e-3)
    for branch, values in features.items():
        assert float(scales[f"{branch}_norm"]) == pytest.approx(np.linalg.norm(values, axis=1).mean(), rel=1e-3)


def test_scales_are_by_the_statistics_that_the_run_is_tested_by(trained, tmp_path):
    folder = shutil.copytree(trained / DATASET / "jlml" / "seed-0", tmp_path / "run")
    scales = {}
    for source in ("run", "data"):
        config = json.loads((folder / "config.json").read_text())
        config["evaluate"]["norm_statistics"] = source
        (folder / "config.json").write_text(json.dumps(config))
        scales[source] = figures._scales(types.SimpleNamespace(trials=lambda: [folder]))
    kept, = (one for one in csv.DictReader((trained / DATASET / "table_12_scales.csv").open()) if one["row"] == "jlml")
    assert scales["run"]["global_norm"] == pytest.approx(float(kept["global_norm"]), rel=1e-5)
    assert scales["data"]["global_norm"] != pytest.approx(scales["run"]["global_norm"], rel=1e-2)


def test_groups_of_the_feature_layers():
    kernel = np.array([[3.0, 4.0], [0.0, 5e-4]])
    local = np.array([[1.0, -2.0], [3.0, 0.0], [0.0, 0.0], [0.0, -0.5]])
    found = figures.groups_of({"global_head": {"fc": {"kernel": kernel}}, "local_head": {"fc": {"kernel": local}}}, 2)
    assert [(one.branch, one.strip) for one in found] == [("global", None), ("local", 0), ("local", 1)]
    np.testing.assert_allclose(found[0].norms, [5, 5e-4])
    np.testing.assert_allclose(found[1].norms, [4, 2])
    np.testing.assert_allclose(found[2].norms, [0, 0.5])
    assert [one.near_zero() for one in found] == [0.5, 0.25, 0.75]


# --- What is there is reused; what is not does not spoil the rest

def test_home_may_be_written_as_shells_leave_it(copied, arguments, no_training, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    assert run("--table=12", f"--workdir=~/{copied.name}", *arguments) == 0
    assert not no_training


def test_the_full_run_serves_the_other_tables(copied, arguments, no_training):
    assert run("--table=6", f"--workdir={copied}", *arguments) == 0
    assert not no_training
    lines = lines_of(copied, 9)
    for line, feature in (("JLML (Global)", "global"), ("JLML (Local)", "local"), ("JLML (joint)", "joint")):
        ours = score_of(copied, "jlml", feature, "multi-query", "mean_ap_trapezoid")
        assert float(lines[line, "multi", "mean_ap_trapezoid"]["ours"]) == pytest.approx(ours, abs=1e-3)
    text = (copied / DATASET / "table_6.md").read_text()
    assert "| SCS | 51.9 |  |  | 26.3 |  |  | - |" in text and "| JLML | 85.1 |" in text


def test_a_crashed_row_does_not_spoil_the_others(copied, arguments, monkeypatch, capsys):
    def crash(config, workdir):
        assert config.model.loss == "uni"
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(command, "train_and_evaluate", crash)
    assert run("--table=10", f"--workdir={copied}", *arguments) == 2
    assert "1 of 2 runs failed, uni_loss seed 0: RuntimeError: out of memory" in capsys.readouterr().err
    text = (copied / DATASET / "table_10.md").read_text()
    assert "| UniLoss, Full | 76.1 | failed |" in text
    assert "- uni_loss: seed 0 failed: RuntimeError: out of memory" in text
    assert lines_of(copied, 10)["UniLoss, Full", "single", "rank1"]["ours"] == ""
    rank1 = score_of(copied, "jlml", "joint", "single-query", "rank1")
    assert f"| MultiLoss, Full | 85.1 | {rank1:.1f} |" in text


def test_a_half_finished_row_is_no_result(copied, arguments, no_training):
    seed = copied / DATASET / "without_sfl" / "seed-0"
    shutil.rmtree(seed / "checkpoints" / "4")
    assert run("--table=12", "--only=jlml", f"--workdir={copied}", *arguments) == 0
    text = (copied / DATASET / "table_12.md").read_text()
    assert "- without_sfl: seed 0 unfinished: step 2 of 4" in text
    assert "| Without SFL | 83.4 | unfinished |" in text and "| With SFL | 85.1 | unf" not in text
    assert not no_training
    run("--table=12", f"--workdir={copied}", *arguments)
    assert no_training == ["without_sfl"]


def test_a_run_of_another_config_is_no_result(copied, arguments, no_training):
    run("--table=12", "--only=without_sfl", f"--workdir={copied}", *arguments, "--config.optim.learning_rate=0.5")
    text = (copied / DATASET / "table_12.md").read_text()
    assert "was made by another config: optim.learning_rate (0.01 there, 0.5 here)" in text
    assert "| With SFL | 85.1 | unfinished |" in text and no_training == ["without_sfl"]


def test_an_evaluation_that_was_cut_short_is_done_again(copied, arguments, no_training):
    config = copied / DATASET / "jlml" / "seed-0" / "config.json"
    config.write_text(config.read_text())  # as at the start of a call that did not come to its results
    run("--table=9", f"--workdir={copied}", *arguments)
    assert no_training == ["jlml"]
    assert "not all that is trained is evaluated" in (copied / DATASET / "table_9.md").read_text()


def test_dry_run_lists_runs_and_trains_nothing(trained, arguments, no_training, monkeypatch, capsys):
    monkeypatch.setattr(timing, "estimate", lambda config: timing.Estimate(10.0, 0.5, 8.0, 2))
    assert run("--table=12", "--seeds=0,7", "--dry_run", f"--workdir={trained}", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("without_sfl seed 0: 4 steps, finished; 0 s; ")
    assert lines[1].startswith("without_sfl seed 7: 4 steps, not begun; 40 s; ")
    assert lines[-1].startswith("1 minutes in all")
    assert not no_training and not (trained / DATASET / "jlml" / "seed-7").exists()


def test_a_data_set_without_a_config_of_its_own():
    config = command._parse_config(["tables"], "msmt17")
    assert (config.name, config.data.name, config.data.trials) == ("market1501", "msmt17", "all")


def test_estimate(arguments):
    config = command._parse_config(["tables", *arguments[1:]], DATASET)
    found = timing.estimate(config)
    assert found.trials == 1 and found.compilation > 10 * found.step > 0
    again = found.run(1_000, compiled=True)
    assert again == pytest.approx(1_000 * found.step + found.evaluation)
    assert found.run(1_000, compiled=False) == pytest.approx(found.compilation + again)


# --- Several seeds, several trials

def write_run(run, scores, normalize="none"):
    """A finished run without any training; `scores`: by trial, rank 1 of feature joint."""
    for trial, rank1 in scores.items():
        folder = run.folder / f"trial-{trial:02d}" if len(scores) > 1 else run.folder
        (folder / "checkpoints" / str(run.config.train.steps)).mkdir(parents=True)
        row = {"dataset": joined_name(run.config.data.name, run.config.data.joined_splits),
               "protocol": "single-query", "trial": trial, "feature": "joint",
               "normalize": normalize} | dict.fromkeys(result_rows.SCORES, rank1)
        rows = [row, row | {"feature": "chance", "rank1": 0.0}, row | {"trained_on": "grid", "rank1": 0.0}]
        (folder / "results.json").write_text(json.dumps({"rows": rows, "provenance": {}}))
    (run.folder / "config.json").write_text(run.config.to_json())
    (run.folder / "results.json").touch()


def report_of(tmp_path, number, config, seeds, scores):
    table = plan.TABLES[number]
    runs = plan.plan_runs(table, config, tmp_path, seeds)
    for one, of_run in zip(runs, scores, strict=True):
        write_run(one, of_run)
    return Report(table, config.data.name, outcomes(runs, {}))


def test_mean_and_deviation_over_seeds_and_gains_seed_by_seed(tmp_path):
    config = synthetic.get_config()
    config.evaluate.normalize = "none"
    report = report_of(tmp_path, "11", config, [0, 1, 2], [{0: 0.2}, {0: 0.4}, {0: 0.6}, {0: 0.3}, {0: 0.5}, {0: 0.71}])
    assert report.rows["jlml"] == Outcome(report.rows["jlml"].runs, "")
    ours = report.figure("Without Shared Feature", "rank1", False)
    assert (ours.mean, ours.deviation, ours.samples) == pytest.approx((40, 20, 3))
    column = report.published.columns[0]
    gain = report.gain("With Shared Feature", "Without Shared Feature", column)
    assert gain.text("+") == "+10.3 ± 0.6"
    assert report.figure("With Shared Feature", "rank1", True) is None  # nobody is queried by several images there
    assert not report.comparable and "difference" not in report._texts("With Shared Feature", 85.1, column)
    assert report.spread() == "± is the sample standard deviation over 3 seeds"


def test_mean_and_deviation_over_trials(tmp_path):
    config = market1501.get_config()
    config.data.name, config.data.trials = "viper", "0-2"
    report = report_of(tmp_path, "7", config, [0], [{0: 0.5, 1: 0.6, 2: 0.7, 3: 0.0}])  # trial 3 is not asked for
    ours = report.figure("JLML", "rank1", False)
    assert (ours.mean, ours.deviation, ours.samples) == pytest.approx((60, 10, 3))
    assert report.spread() == "± is the sample standard deviation over 3 trials"
    assert report._texts("JLML", 50.2, report.published.columns[0]) == ["50.2", "60.0 ± 10.0", "+9.8"]
    figures._cmc_curves(report, tmp_path, "cmc")  # with the published curves, some of them of rank 1 alone
    assert (tmp_path / "cmc.png").stat().st_size > 10_000


def test_rows_are_the_papers_ablations():
    config = market1501.get_config()
    config.init_from = "runs/{row}/imagenet"
    runs = {run.row: run.config for name in ("10", "11", "12")
            for run in plan.plan_runs(plan.TABLES[name], config, Path("tables"), [3])}
    assert runs.keys() == {"jlml", "uni_loss", "separate_stems", "without_sfl"}
    flat = flatten_dict(config.to_dict(), sep=".")
    changed = {"name", "seed", "init_from"}
    for row, of_row in runs.items():
        delta = {field: value for field, value in flatten_dict(of_row.to_dict(), sep=".").items()
                 if value != flat[field] and field not in changed}
        assert delta == plan.ROWS[row]
        assert (of_row.seed, of_row.init_from) == (3, f"runs/{row}/imagenet")


# --- What the paper is silent about

def test_a_study_of_the_evaluation_trains_nothing(copied, arguments, monkeypatch, capsys):
    asked = []

    def make(config, workdir):
        asked.append((config.evaluate.normalize, json.loads((workdir / "config.json").read_text())["train"]["steps"]))
        assert not (workdir / "results.json").exists() and list((workdir / "checkpoints").iterdir())
        train_and_evaluate(config, workdir)

    monkeypatch.setattr(command, "train_and_evaluate", make)
    assert run("--table=normalize", f"--workdir={copied}", *arguments) == 0
    assert asked == [("joint", 4), ("per_branch", 4)]  # none is the full run
    assert "step 4/4" not in capsys.readouterr().out
    text = (copied / DATASET / "table_normalize.md").read_text()
    assert text.startswith("### L2 normalisation of the matching feature (market1501)") and "paper" not in text
    assert "| line | R1 | R10 | mAP |" in text
    lines = lines_of(copied, "normalize")
    for line, row in (("none, joint", "jlml"), ("joint, joint", "normalize_joint"), ("none, local", "jlml")):
        ours = score_of(copied, row, line.partition(", ")[2], "single-query", "rank1")
        assert float(lines[line, "single", "rank1"]["ours"]) == pytest.approx(ours, abs=1e-3)
    assert lines["none, joint", "single", "rank1"]["citation"] == ""


def test_an_evaluation_of_weights_that_the_full_run_has_no_more_is_no_result(copied, arguments, no_training, capsys):
    full, row = (copied / DATASET / name / "seed-0" for name in ("jlml", "normalize_joint"))
    shutil.copytree(full, row)
    config = json.loads((row / "config.json").read_text())
    config["evaluate"]["normalize"] = "joint"
    (row / "config.json").write_text(json.dumps(config))
    (row / "results.json").touch()
    command_line = "--table=normalize", "--only=normalize_joint", f"--workdir={copied}", *arguments
    assert run(*command_line) == 0
    digests = full / "checkpoints" / "4" / "sha256.json"
    digests.write_text(digests.read_text().replace("a", "b"))  # as if the full run were trained anew
    capsys.readouterr()
    assert run(*command_line) == 2
    reason = f"{row} has other weights than {full}, which it is to evaluate; delete it"
    assert reason in capsys.readouterr().err
    assert reason in (copied / DATASET / "table_normalize.md").read_text()
    assert not no_training
    shutil.rmtree(row)
    run(*command_line)
    assert no_training == ["normalize_joint"]
    assert (row / "checkpoints" / "4" / "sha256.json").read_text() == digests.read_text()


def test_each_trial_is_compared_with_the_weights_that_it_evaluates(tmp_path):
    config = market1501.get_config()
    config.data.name, config.data.trials = "viper", "0-1"
    full, one, _ = plan.plan_runs(plan.TABLES["normalize"], config, tmp_path, [0])
    for each in (full, one):
        write_run(each, {0: 0.5, 1: 0.6, 2: 0.7}, normalize=each.config.evaluate.normalize)
        for folder in each.folder.glob("trial-*/checkpoints/*"):
            (folder / "sha256.json").write_text(folder.parents[1].name)
    for trial in (2, 1):  # 2 is not asked for
        assert one.missing() == ""
        digests = full.folder / f"trial-{trial:02d}" / "checkpoints" / str(config.train.steps) / "sha256.json"
        digests.write_text("of another training")
    assert "has other weights than" in one.missing() and full.missing() == ""


def test_a_study_of_an_evaluation_needs_the_trained_run(tmp_path, arguments, no_training, capsys):
    assert run("--table=normalize", "--only=normalize_joint", f"--workdir={tmp_path}", *arguments) == 2
    assert "jlml/seed-0, which has its weights, is not trained" in capsys.readouterr().err
    assert not no_training


def test_rows_of_studies_that_change_nothing_are_the_full_run():
    config = synthetic.get_config()  # BN on the feature, 4 strips, 5e-4, per_branch
    for name, same in (("feature", "feature_fc_bn"), ("strips", "strips_4"), ("penalties", "penalties_0.0005"),
                       ("normalize", "normalize_per_branch"), ("size", "size_64x32")):
        runs = plan.plan_runs(plan.TABLES[name], config, Path("tables"), [1])
        assert [run.row for run in runs if run.folder == Path("tables/jlml/seed-1")] == [same]
        for one in runs:
            for field, value in plan.ROWS[one.row].items():
                assert one.config[field.partition(".")[0]][field.partition(".")[2]] == value
        assert all((one.trained_in is not None) == (name == "normalize" and one.row != same) for one in runs)
        assert name != "normalize" or runs[0].row == same


def test_the_recipe_is_changed_one_ingredient_at_a_time():
    config = modern.get_config()
    given = flatten_dict(config.to_dict(), sep=".")
    runs = plan.plan_runs(plan.TABLES["recipe"], config, Path("tables"), [0])
    assert [run.row for run in runs if run.folder == Path("tables/jlml/seed-0")] == ["jlml"]  # no line repeats it
    for one in runs[1:]:
        changed = {field: value for field, value in flatten_dict(one.config.to_dict(), sep=".").items()
                   if value != given[field] and field != "name"}
        # A loss beyond the paper's is refused without the field that it needs.
        assert len(changed) == (2 if one.row in ("cosine_margin_0.2", "triplet_1") else 1)
        assert changed.items() <= plan.ROWS[one.row].items()
    assert [run.row for run in runs if run.trained_in] == ["flip_average_off"]


def test_a_run_evaluated_otherwise_is_evaluated_again(tmp_path):
    config = modern.get_config()
    one = plan.plan_runs(plan.TABLES["9"], config, tmp_path, [0])[0]
    write_run(one, {0: 0.5}, normalize="per_branch")
    assert one.missing() == ""
    one.config.evaluate.flip_average = False
    assert "made by another config: evaluate.flip_average" in one.missing()


def test_a_row_that_is_evaluated_alone_starts_where_the_trained_one_did():
    config = modern.get_config()
    config.init_from = "runs/{row}"
    runs = plan.plan_runs(plan.TABLES["normalize"], config, Path("tables"), [0])
    assert {one.config.init_from for one in runs} == {"runs/jlml"}
    runs = plan.plan_runs(plan.TABLES["11"], config, Path("tables"), [0])
    assert {one.config.init_from for one in runs} == {"runs/jlml", "runs/separate_stems"}


def test_extra_distractors_are_not_set_beside_the_papers_test(tmp_path):
    config = market1501.get_config()
    config.evaluate.extra_gallery = "folder/distractors"
    report = report_of(tmp_path, "6", config, [0], [{0: 0.5}])
    one, = report.rows["jlml"].runs
    assert report.tested_on == "market1501, folder/distractors as extra distractors" and not report.comparable
    path = one.folder / "results.json"
    results = json.loads(path.read_text())
    results["rows"] = [row | {"protocol": f"{protocol}, 5 extra distractors", "rank1": rank1}
                       for row in results["rows"] for protocol, rank1 in (("single-query", 0.5), ("multi-query", 0.9))]
    path.write_text(json.dumps(results))
    assert report.figure("JLML", "rank1", False).mean == 50 and report.figure("JLML", "rank1", True).mean == 90
    one.config.evaluate.extra_gallery = ""
    assert "made by another config: evaluate.extra_gallery" in one.missing()


def test_people_held_out_are_not_set_beside_the_papers_test(tmp_path):
    config = market1501.get_config()
    config.data.held_out_identities = 500
    report = report_of(tmp_path, "6", config, [0], [{0: 0.5}])
    assert report.tested_on == "market1501, 500 training identities held out" and not report.comparable
    column = report.published.columns[0]
    assert report._texts("JLML", 85.1, column) == ["85.1", "50.0"] and report.heading(column) == "R1"
    assert [report.published.columns[k].protocol for k in report.columns] == ["single-query"] * 2


def test_people_held_out_of_joined_sets_are_those_of_the_table(tmp_path):
    config = market1501.get_config()
    config.data.name, config.data.joined_splits = "folder/a+folder/b", "train"
    run = plan.Run("jlml", 0, tmp_path / "run", config)
    write_run(run, {0: 0.5})
    assert [(row["dataset"], row["feature"]) for row in run.results()] == [
        ("folder/a+folder/b (train)", "joint"), ("folder/a+folder/b (train)", "chance")]


# --- Table 13

def test_size_of_the_papers_network(tmp_path):
    found = size.measure(market1501.get_config(), 224, 224)
    assert (found.multiply_adds, found.parameters, found.depth, found.streams) == (789_897_216, 7_790_624, 39, 5)
    assert found.xla_operations == pytest.approx(1.5e9, rel=0.02)


def test_table_13(tmp_path, arguments, no_training):
    assert run("--table=13", "--dataset=synthetic_pedestrians", f"--workdir={tmp_path}", *TINY) == 0
    text = (tmp_path / "synthetic_pedestrians" / "table_13.md").read_text()
    assert "| JLML-ResNet39 | 1.54e+09 |" in text and "| ours, 224x224 |" in text and "| ours, 16x8 |" in text
    lines = list(csv.DictReader((tmp_path / "synthetic_pedestrians" / "table_13.csv").open()))
    ours = {(one["line"], one["score"]): one for one in lines}
    assert float(ours["ResNet50", "multiply_adds"]["paper"]) == 3.8e9
    parameters = ours["ours, 224x224", "parameters"]
    assert math.isclose(float(parameters["difference"]), float(parameters["ours"]) - 7.2, abs_tol=1e-5)
