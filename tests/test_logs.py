import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jlml_jax import logs
from jlml_jax.errors import UserError
from jlml_jax.logs import TIME_FIELDS, TrainingLog, is_evaluated, read_training


def metrics(step):
    """As the train step gives them, one step a dispatch."""
    return {name: [value] for name, value in of_step(step).items()}


def of_step(step):
    return {"loss": float(step), "cross_entropy/global": 2.0 * step, "accuracy/global": 0.5, "penalty/global": 0.25}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir):
    return [{name: value for name, value in record.items() if name not in TIME_FIELDS} for record in records(workdir)]


def train(workdir, first, last, report_every, interval=None):
    """Logs the steps `first` + 1 to `last` and returns the interval as a checkpoint then keeps it."""
    log = TrainingLog(workdir, first, 100, 32, interval)
    for done in range(first + 1, last + 1):
        log.add(done, metrics(done))
        if done % report_every == 0:
            log.report(done, 0.01 * done)
    interval = json.loads(json.dumps(log.interval()))
    log.close()
    return interval


def events(workdir):
    accumulator = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]}


def test_a_report_is_the_mean_since_the_last_one(tmp_path):
    assert train(tmp_path, 0, 7, 3) == metrics(7)
    assert timeless(tmp_path) == [
        {"step": 3, "loss": 2, "cross_entropy/global": 4, "accuracy/global": 0.5, "penalty/global": 0.25,
         "learning_rate": 0.03},
        {"step": 6, "loss": 5, "cross_entropy/global": 10, "accuracy/global": 0.5, "penalty/global": 0.25,
         "learning_rate": 0.06},
    ]
    for record in records(tmp_path):
        assert set(TIME_FIELDS) < record.keys() and record["images_per_second"] > 0 <= record["seconds"]


def test_a_dispatch_of_several_steps_counts_as_they_do(tmp_path):
    log = TrainingLog(tmp_path, 0, 100, 32)
    log.add(3, {"loss": [1.0, 2.0, 6.0]})
    log.report(3, 0.01)
    assert timeless(tmp_path) == [{"step": 3, "loss": 3.0, "learning_rate": 0.01}]
    assert records(tmp_path)[0]["images_per_second"] == 0  # the first dispatch's time is the compiler's
    log.close()


def test_the_line_of_the_first_dispatch_tells_no_rate(tmp_path, capsys):
    train(tmp_path, 0, 2, 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/100  loss 1.000  global 2.000 + 0.250 (50.0 %)"
    assert "images/s" in second


def test_a_reported_line_is_on_disk_at_once(tmp_path):
    log = TrainingLog(tmp_path, 0, 100, 32)
    log.add(1, metrics(1))
    log.report(1, 0.01)
    assert timeless(tmp_path)[0]["step"] == 1
    log.close()


def test_the_line_of_progress(tmp_path, capsys):
    train(tmp_path, 0, 2, 2)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("step 2/100  loss 1.500  global 3.000 + 0.250 (50.0 %)  ")
    assert "images/s" in line and line.endswith(" left")


@pytest.mark.parametrize("saved", [3, 4, 5, 6])
def test_a_resumed_log_is_that_of_an_uninterrupted_run(saved, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    train(tmp_path / "whole", 0, 9, 3)
    interval = train(tmp_path / "parts", 0, saved, 3)
    train(tmp_path / "parts", 0 + saved, 9, 3, interval)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    train(tmp_path, 0, 9, 3)
    before = records(tmp_path)
    TrainingLog(tmp_path, 7, 100, 32).close()
    assert records(tmp_path) == before[:2]
    TrainingLog(tmp_path, 6, 100, 32).close()
    assert records(tmp_path) == before[:2]
    TrainingLog(tmp_path, 0, 100, 32).close()
    assert records(tmp_path) == []


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    train(tmp_path, 0, 6, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for cut in (len(whole) - 1, len(whole) - 20, len(whole.splitlines()[0]) + 2):
        path.write_text(whole[:cut])
        TrainingLog(tmp_path, 6, 100, 32).close()
        assert path.read_text() == whole.splitlines(keepends=True)[0]


@pytest.mark.parametrize("line", ["{\"step\": 3, \n", "3\n", "{}\n", "\0\0\n"])
def test_a_damaged_line_is_named_and_nothing_dropped(tmp_path, line):
    train(tmp_path, 0, 6, 3)
    path = tmp_path / "metrics.jsonl"
    content = path.read_text() + line
    path.write_text(content)
    with pytest.raises(UserError, match="metrics.jsonl is damaged in line 3 .*; mend that line, or move the file away"):
        TrainingLog(tmp_path, 6, 100, 32)
    assert path.read_text() == content


def test_an_interval_given_to_a_checkpoint_does_not_change_while_it_is_written(tmp_path):
    """Orbax turns it into JSON in the background, while training goes on."""
    log = TrainingLog(tmp_path, 0, 100, 32)
    log.add(1, metrics(1))
    interval = log.interval()
    log.add(2, metrics(2))
    assert interval["loss"] == [1.0]
    log.close()


def scored(*values):
    return [{"feature": feature, "rank1": value, "mean_ap": value / 2, "rank5": 1.0}
            for feature, value in zip(("global", "joint"), values, strict=True)]


def test_an_evaluation_has_a_line_of_its_own(tmp_path):
    train(tmp_path, 0, 6, 3)
    log = TrainingLog(tmp_path, 6, 100, 32)
    log.evaluation(6, scored(0.25, 0.5), 1.0)
    log.close()
    assert records(tmp_path)[2] == {"step": 6, "rank1/global": 0.25, "rank1/joint": 0.5, "mean_ap/global": 0.125,
                                    "mean_ap/joint": 0.25}
    assert [is_evaluated(tmp_path, step) for step in (3, 6)] == [False, True]
    assert read_training(tmp_path) == records(tmp_path)[:2]
    assert events(tmp_path)["mean_ap/joint"] == [(6, 0.25)]
    TrainingLog(tmp_path, 5, 100, 32).close()
    assert not is_evaluated(tmp_path, 6)


def test_the_time_of_evaluations_is_not_that_of_training(tmp_path, monkeypatch, capsys):
    clock = iter([10.0, 20.0, 75.0])  # at the first step; at the reports
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
    log = TrainingLog(tmp_path, 0, 100, 32)
    log.add(2, metrics(2))
    for done, seconds in ((4, 6.0), (6, 50.0)):
        log.evaluation(done - 1, scored(0.25, 0.5), seconds)
        log.add(done, metrics(done))
        log.report(done, 0.01)
    log.close()
    training = read_training(tmp_path)
    assert [line["images_per_second"] for line in training] == [2 * 32 / (20 - 10 - 6), 2 * 32 / (75 - 20 - 50)]
    assert [line["seconds"] for line in training] == [20 - 10 - 6, 75 - 10 - 6 - 50]
    assert capsys.readouterr().out.endswith("12.8 images/s  3:55 left\n")  # 94 steps


def test_tensorboard_reads_the_events(tmp_path):
    train(tmp_path, 0, 6, 3)
    scalars = events(tmp_path)
    assert scalars.keys() == {"loss", "cross_entropy/global", "accuracy/global", "penalty/global", "learning_rate",
                              "images_per_second"}
    assert scalars["loss"] == [(3, 2.0), (6, 5.0)]
    assert scalars["learning_rate"] == [(3, pytest.approx(0.03)), (6, pytest.approx(0.06))]


def test_events_of_steps_that_come_again_are_superseded(tmp_path):
    train(tmp_path, 0, 9, 3)
    log = TrainingLog(tmp_path, 6, 100, 32)
    log.add(9, {"loss": [-1.0]})
    log.report(9, 0.5)
    log.close()
    assert events(tmp_path)["loss"] == [(3, 2.0), (6, 5.0), (9, -1.0)]
