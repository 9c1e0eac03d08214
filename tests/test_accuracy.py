"""The page of the runs on real images."""

import itertools
import json
import os

import pytest

from configs import default
from experiments import accuracy
from jlml_jax.result_rows import SCORES

LINES = [{"step": 100, "loss": 6.0, "images_per_second": 32.0, "seconds": 100.0},
         {"step": 150, "loss": 5.0, "images_per_second": 16.0, "seconds": 200.0}]


def _row(trial=0, feature="joint", value=0.5, **more):
    return {"dataset": "market1501", "protocol": "single-query", "trial": trial, "feature": feature,
            "normalize": "none"} | dict.fromkeys(SCORES, value) | more


def _run(folder, rows=None, steps=150, **fields):
    config = default.get_config()
    config.data.name, config.train.steps = "market1501", 150
    config.update_from_flattened_dict(fields)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "checkpoints" / str(steps)).mkdir(parents=True)
    if rows is not None:
        (folder / "results.json").write_text(json.dumps({"rows": rows, "provenance": {
            "command": f"python -m jlml_jax.main --config=configs/market1501.py --workdir={folder} "
                       f"--config.data.data_dir={folder.parent} --config.init_from={folder.parent}/imagenet "
                       "--config.train.steps=150",
            "commit": "0123456789ab", "hardware": {"devices": 1, "device_kind": "cpu", "cpus": 2}}}))
    return folder


def _trials(folder, numbers=(0, 1), rows=None, **fields):
    """The folder of several trials, each evaluated, and all together."""
    _run(folder, **fields)
    for number in numbers:
        _run(folder / f"trial-{number:02d}", [_row(number)], **fields)
    deviations = {f"{score}_std": 0.0 for score in SCORES}
    rows = rows or [*map(_row, numbers), _row("mean", trials=list(numbers)) | deviations]
    (folder / "results.json").write_text(json.dumps({"rows": rows, "provenance": {"command": "", "steps": 150}}))
    return folder


def _written_after(path, other):
    """Times of files are too coarse for a test to go by."""
    os.utime(path, ns=2 * (other.stat().st_mtime_ns + 10**9,))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "FOLDER", tmp_path / "results" / "accuracy")
    monkeypatch.setattr(accuracy, "PAGE", tmp_path / "results" / "accuracy.md")
    return tmp_path / "results"


def test_a_run_becomes_a_record_without_this_machines_paths_and_a_line_beside_the_papers(tmp_path, kept):
    folder = _run(tmp_path / "secret" / "modern", [_row(value=0.4567), _row(feature="global", value=0.25)],
                  **{"optim.schedule": "cosine", "seed": 3})
    assert accuracy.main([str(folder)]) == 0
    text = (kept / "accuracy" / "modern.json").read_text()
    record = json.loads(text)
    assert "secret" not in text
    assert record["provenance"]["command"] == (
        "python -m jlml_jax.main --config=configs/market1501.py --config.init_from=runs/imagenet "
        "--config.train.steps=150")
    assert record["recipe"] == {"optim.schedule": "cosine"}
    assert record["training_seconds"] == 100 * 32 / 32 + 50 * 32 / 16
    page = (kept / "accuracy.md").read_text()
    assert "| modern | market1501 | single-query | joint | 45.7 |" in page
    assert "85.1" in page and "65.5" in page  # the paper's, Table 6
    assert "| 3 |" in page and "0123456" in page


def test_results_of_fewer_steps_are_not_those_of_a_finished_run(tmp_path, kept):
    folder = _run(tmp_path / "secret" / "modern", [_row(value=0.4567)])
    results = json.loads((folder / "results.json").read_text())
    results["provenance"]["steps"] = 100
    (folder / "results.json").write_text(json.dumps(results))
    assert accuracy.main([str(folder)]) == 0
    assert "45.7" not in (kept / "accuracy.md").read_text()


def test_results_from_before_the_config_are_not_of_its_recipe(tmp_path, kept, run_command):
    folder = _run(tmp_path / "modern", [_row(value=0.4567)])
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"norm_statistics": "run"', '"norm_statistics": "camera"'))
    _written_after(config, folder / "results.json")
    status, told, _ = run_command(accuracy, folder)
    reason = "to be evaluated again: modern is not evaluated since its config.json was written"
    assert status == 0 and f"modern is shown without figures: {reason}" in told
    page = (kept / "accuracy.md").read_text()
    assert reason in page and "45.7" not in page
    _written_after(folder / "results.json", config)
    assert accuracy.main([str(folder)]) == 0
    assert "45.7" in (kept / "accuracy.md").read_text()


def test_trials_evaluated_one_after_the_other_are_a_finished_run(tmp_path):
    folder = _trials(tmp_path / "trials")
    written = [path / name for path, name in (  # by a call on the second trial
        (folder, "config.json"), (folder / "trial-01", "config.json"), (folder / "trial-01", "results.json"),
        (folder, "results.json"))]
    _written_after(written[0], written[-1])
    for before, after in itertools.pairwise(written[:-1]):
        _written_after(after, before)
    assert accuracy.make_record(folder)["state"] != "finished"
    _written_after(written[-1], written[-2])
    assert accuracy.make_record(folder)["state"] == "finished"


@pytest.mark.parametrize(("fault", "reason"), [
    ("config", "trial-01 is not evaluated since its config.json was written"),
    ("results", "trial-01 is not evaluated since"),
    ("steps", "trial-01 is evaluated at step 100 of 150"),
    ("settings", "trial-01 is evaluated by another evaluate.flip_average"),
    ("rows", "trial-01 has no rows"),
])
def test_every_trial_is_evaluated_as_the_run_says(tmp_path, fault, reason):
    folder = _trials(tmp_path / "trials", rows=[_row(0)] if fault == "rows" else None)
    config, results = (folder / "trial-01" / name for name in ("config.json", "results.json"))
    if fault == "config":
        _written_after(config, results)
    elif fault == "results":
        results.unlink()
    elif fault == "steps":
        results.write_text(json.dumps({"rows": [_row(1)], "provenance": {"steps": 100}}))
    elif fault == "settings":
        config.write_text(config.read_text().replace('"flip_average": false', '"flip_average": true'))
        _written_after(results, config)
    record = accuracy.make_record(folder)
    assert record["state"].startswith("to be evaluated again: ") and reason in record["state"]
    assert not record["rows"]


def test_a_single_trial_is_named(tmp_path, kept):
    folders = [_trials(tmp_path / "fourth", [3], rows=[_row(3)]), _run(tmp_path / "only", [_row()])]
    of_others = [_row(trained_on="market1501", trained_trial=0) | {"dataset": "viper"}]
    folders.append(_trials(tmp_path / "several", rows=[_row(0), _row(1), *of_others]))
    assert accuracy.main(list(map(str, folders))) == 0
    page = (kept / "accuracy.md").read_text()
    assert "| fourth | market1501 | single-query, trial 3 |" in page
    assert "| only | market1501 | single-query |" in page
    for number in (0, 1):
        assert f"| several | market1501 | single-query, trial {number} |" in page
    assert "| several | market1501 | single-query, network of trial 0 |" in page


def test_the_committed_page_is_of_the_committed_records():
    kept = [json.loads(path.read_text()) for path in sorted(accuracy.FOLDER.glob("*.json"))]
    assert len(kept) > 100
    assert accuracy.page(kept) == accuracy.PAGE.read_text()


def test_a_test_of_others_is_not_of_people_held_out(tmp_path, kept):
    other = _row(value=0.4567, dataset="viper", trained_on="market1501")
    assert accuracy.main([str(_run(tmp_path / "modern", [_row(), other], **{"data.held_out_identities": 5}))]) == 0
    titles = [line for line in (kept / "accuracy.md").read_text().splitlines() if line.startswith("## ")]
    assert titles[:2] == ["## viper", "## market1501, people held out of the training set"]


@pytest.mark.parametrize(("pooling", "told"), [("mean", ""), ("max", "evaluate.multi_query max"), ("", "")])
def test_how_multi_queries_are_pooled_is_told_unless_by_their_mean(tmp_path, kept, pooling, told):
    rows = [_row(), *([_row(protocol="multi-query")] if pooling else [])]
    assert accuracy.main([str(_run(tmp_path / "pooled", rows, **{"evaluate.multi_query": pooling}))]) == 0
    page = (kept / "accuracy.md").read_text()
    assert f"**pooled**: {told or 'as published'}\n" in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json"])
def test_a_damaged_file_is_told(tmp_path, kept, refused_by, name):
    folder = _run(tmp_path / "modern", [_row()])
    (folder / name).write_text("5\n")
    assert f"{folder / name} does not read" in refused_by(accuracy, folder)


def test_a_run_evaluated_by_another_command_shows_the_one_that_trained(tmp_path, kept):
    folder = _run(tmp_path / "secret" / "modern", [_row()])
    path = folder / "results.json"
    results = json.loads(path.read_text())
    trained = {"command": f"python -m jlml_jax.main --workdir={folder} --config.seed=7", "commit": "fedcba987654",
               "hardware": {"devices": 8, "device_kind": "gpu", "cpus": 64}}
    results["provenance"]["training"] = [trained]
    path.write_text(json.dumps(results))
    assert accuracy.main([str(folder)]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "python -m jlml_jax.main --config.seed=7" in page and "fedcba9" in page and "8 gpu, 64 core(s)" in page
    assert "0123456" not in page and "secret" not in (kept / "accuracy" / "modern.json").read_text()


def test_a_run_that_did_not_end_is_on_the_page_without_figures(tmp_path, kept):
    assert accuracy.main([str(_run(tmp_path / "broken", steps=100))]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "at step 100 of 150" in page
    assert "## market1501" not in page
    assert json.loads((kept / "accuracy" / "broken.json").read_text())["last_metrics"] == {"step": 150, "loss": 5.0}


def test_of_several_trials_the_mean_is_shown_with_its_deviation(tmp_path, kept):
    deviations = {f"{score}_std": 0.02 for score in SCORES}
    rows = [_row(0), _row(1, value=0.7), _row("mean", value=0.6, trials=[0, 1], **deviations)]
    assert accuracy.main([str(_run(tmp_path / "trials", rows))]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "single-query, 2 trials | joint | 60.0 ± 2.0" in page
    assert "70.0" not in page


def test_a_classification_is_shown_by_its_accuracies(tmp_path, kept):
    row = {"dataset": "tiny_imagenet", "protocol": "classification", "trial": 0, "feature": "global", "top1": 0.25,
           "top5": 0.5}
    assert accuracy.main([str(_run(tmp_path / "pretrained", [row], **{"data.name": "tiny_imagenet"}))]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "| feature | top-1 | top-5 |" in page
    assert "| pretrained | tiny_imagenet | classification | global | 25.0 | 50.0 |" in page


def test_other_data_and_people_held_out_are_told_apart(tmp_path, kept):
    crossed = [_row(), _row(trained_on="market1501") | {"dataset": "viper"}]
    folders = [_run(tmp_path / "crossed", crossed), _run(tmp_path / "chosen", [_row()],
                                                         **{"data.held_out_identities": 100})]
    assert accuracy.main(list(map(str, folders))) == 0
    page = (kept / "accuracy.md").read_text()
    viper = page[page.index("## viper"):page.index("## Runs")]
    assert "| crossed | market1501 |" in viper
    assert "## market1501, people held out of the training set" in page
    assert page.index("## viper") < page.index("held out")


def test_a_run_of_no_steps_is_trained_on_nothing(tmp_path, kept):
    folders = []
    for name, init_from in (("moved", "/secret/modern"), ("drawn", "")):
        rows = [_row(), _row(trained_on="cuhk03/detected" if init_from else "market1501") | {"dataset": "viper"}]
        folders.append(_run(tmp_path / name, rows, steps=0, **{"train.steps": 0, "init_from": init_from}))
    assert accuracy.main(list(map(str, folders))) == 0
    page = (kept / "accuracy.md").read_text()
    market1501, viper = page[:page.index("## viper")], page[page.index("## viper"):page.index("## Runs")]
    assert "| moved | nothing (weights of modern) |" in market1501 and "| moved | cuhk03/detected |" in viper
    assert all("| drawn | nothing (random weights) |" in table for table in (market1501, viper))


def test_what_batch_normalisation_went_by_is_told(tmp_path, kept):
    assert accuracy.main([str(_run(tmp_path / "by_camera", [_row(norm_statistics="camera")]))]) == 0
    assert "single-query, BN by each camera's training images, without labels |" in (kept / "accuracy.md").read_text()


def test_of_several_networks_on_other_data_the_mean_is_shown(tmp_path, kept):
    deviations = {f"{score}_std": 0.02 for score in SCORES}
    rows = [_row(trial, value=0.7, trained_on="viper", trained_trial=network) for network in (0, 1)
            for trial in (0, 1, "mean")]
    rows.append(_row("mean", value=0.6, trained_on="viper", trained_trial="mean", trained_trials=[0, 1]) | deviations)
    assert accuracy.main([str(_run(tmp_path / "networks", rows))]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "| networks | viper | single-query, 2 networks | joint | 60.0 ± 2.0" in page
    assert "70.0" not in page


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, kept, refused_by):
    assert str(tmp_path) in refused_by(accuracy, tmp_path)
    assert not (kept / "accuracy.md").exists()


def test_two_runs_of_one_name_are_refused(tmp_path, kept, refused_by, run_command):
    folders = [_run(tmp_path / row / "seed-0", [_row()]) for row in ("jlml", "uni_loss")]
    error = refused_by(accuracy, *folders)
    assert f"{folders[0]} and {folders[1]} would both be kept as seed-0.json" in error and "ln -s" in error
    assert not kept.exists()
    link = tmp_path / "uni_loss_seed-0"
    link.symlink_to(folders[1])
    assert run_command(accuracy, folders[0], link)[0] == 0
    assert {path.stem for path in (kept / "accuracy").iterdir()} == {"seed-0", "uni_loss_seed-0"}


@pytest.mark.parametrize(("fields", "fingerprint", "told"), [
    ({"model.loss": "uni"}, "a", "model.loss (None there, 'uni' here)"),
    ({"evaluate.normalize": "joint"}, "a", "evaluate.normalize"),
    ({"data.name": "viper"}, "a", "dataset ('market1501' there, 'viper' here)"),
    ({"seed": 1}, "a", "seed (0 there, 1 here)"),
    ({}, "b", "other images or people trained on"),
])
def test_a_name_that_is_another_runs_is_refused(tmp_path, kept, refused_by, run_command, fields, fingerprint, told):
    def trained_on(folder, fingerprint):
        results = json.loads((folder / "results.json").read_text())
        results["provenance"]["train_fingerprint"] = fingerprint
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    first = trained_on(_run(tmp_path / "first" / "seed-0", [_row()]), "a")
    assert run_command(accuracy, first)[0] == 0
    before = (kept / "accuracy" / "seed-0.json").read_text()
    other = trained_on(_run(tmp_path / "other" / "seed-0", [_row()], **fields), fingerprint)
    third = _run(tmp_path / "third", [_row()])
    error = refused_by(accuracy, third, other)
    assert f"{kept / 'accuracy' / 'seed-0.json'} is of another run: {told}" in error and "delete that file" in error
    assert (kept / "accuracy" / "seed-0.json").read_text() == before
    assert not (kept / "accuracy" / "third.json").exists()


def test_a_run_is_kept_again_with_further_rows_and_trials(tmp_path, kept, run_command):
    folder = _run(tmp_path / "modern", steps=100)
    assert run_command(accuracy, folder)[0] == 0
    (folder / "checkpoints" / "150").mkdir()
    for fingerprint, rank1 in (("a", 0.25), ("a", 0.5), (["a", "b"], 0.75)):
        results = {"rows": [_row(value=rank1)], "provenance": {"command": "", "train_fingerprint": fingerprint}}
        (folder / "results.json").write_text(json.dumps(results))
        assert run_command(accuracy, folder)[0] == 0
        assert f"| joint | {100 * rank1:.1f} |" in (kept / "accuracy.md").read_text()


def test_steps_without_a_rate_take_that_of_others_and_a_line_cut_short_is_left_out(tmp_path, kept):
    folder = _run(tmp_path / "cut", [_row()])
    lines = [{"step": 50, "images_per_second": 32.0}, {"step": 51, "images_per_second": 0.0},
             {"step": 150, "images_per_second": 32.0}]
    lines.insert(1, {"step": 50, "rank1/joint": 0.5, "mean_ap/joint": 0.25})  # of an evaluation while training
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + text[:20])
    assert accuracy.main([str(folder)]) == 0
    assert json.loads((kept / "accuracy" / "cut.json").read_text())["training_seconds"] == 150
    (folder / "metrics.jsonl").write_text(json.dumps(lines[2]) + "\n")
    assert accuracy.main([str(folder)]) == 0


def test_all_commands_that_trained_are_shown(tmp_path, kept):
    folder = _run(tmp_path / "trials", [_row()])
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["provenance"]["training"] = [
        {"command": f"python -m jlml_jax.main --config.data.trials={trials}", "commit": "fedcba987654",
         "hardware": {"devices": 1, "device_kind": "cpu", "cpus": 2}} for trials in ("0-4", "5-9")]
    path.write_text(json.dumps(results))
    assert accuracy.main([str(folder)]) == 0
    page = (kept / "accuracy.md").read_text()
    assert "main --config.data.trials=0-4\npython -m jlml_jax.main --config.data.trials=5-9\n```" in page
