import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from fast_compilation import XLA_FLAGS
from processes import WITHOUT_TENSORFLOW, child_environment, run_program
from runs import assert_close_trees, assert_same_run, final_state, lines_of

from jlml_jax import parallel, train
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.logs import read_training
from jlml_jax.train import train_and_evaluate


@pytest.mark.slow
def test_several_steps_in_one_dispatch_are_the_same_steps(smooth_config, tmp_path):
    smooth_config.train.steps, smooth_config.log_every, smooth_config.checkpoint_every = 4, 2, 4
    for most in (1, 2):
        smooth_config.train.steps_per_dispatch = most
        smooth_config.profile = "1:3" if most == 2 else ""
        train_and_evaluate(smooth_config, tmp_path / str(most), "train")
    assert [len(list((tmp_path / most).rglob("perfetto_trace.json.gz"))) for most in "12"] == [0, 1]
    for a, b in zip(lines_of(tmp_path / "1"), lines_of(tmp_path / "2"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert_close_trees(final_state(smooth_config, tmp_path / "1"), final_state(smooth_config, tmp_path / "2"))


def test_a_run_as_an_accelerator_has_it(smooth_config, tmp_path, monkeypatch, capsys):
    """In bfloat16, with layers as Flax has them, several steps a dispatch and dispatches ahead, no operations counted.

    Each of these is tested by itself; together, on a real GPU, they once ended every run before its first step.
    """
    smooth_config.train.steps, smooth_config.log_every, smooth_config.checkpoint_every = 8, 2, 4
    smooth_config.evaluate.every = 4
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    rows = train_and_evaluate(smooth_config, tmp_path)
    assert "step 8/8" in capsys.readouterr().out
    assert {row["feature"] for row in rows} == {"global", "local", "joint"}
    assert all(0 < row["mean_ap"] <= 1 for row in rows)
    assert [(line["step"], "loss" in line) for line in lines_of(tmp_path)] == [
        (2, True), (4, True), (4, False), (6, True), (8, True), (8, False)]
    losses = [line["loss"] for line in read_training(tmp_path)]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 64), (160, 64)])
def test_both_loaders_train_alike(smooth_config, tmp_path, size):
    """The same images in the same order, from the images' own size, which the step enlarges, with the same pixels."""
    smooth_config.data.height, smooth_config.data.width = size
    smooth_config.train.steps, smooth_config.log_every = 4, 1
    for loader in ("device", "tf_data"):
        smooth_config.data.loader = loader
        train_and_evaluate(smooth_config, tmp_path / loader, "train")
    for a, b in zip(lines_of(tmp_path / "device"), lines_of(tmp_path / "tf_data"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


PROGRAM = """
import json, sys
import ml_collections
from jlml_jax.errors import exit_status
from jlml_jax.train import train_and_evaluate
config = ml_collections.ConfigDict(json.loads(sys.argv[1]))
for section, key in (("data", "mean"), ("data", "std"), ("model", "global_widths"), ("model", "local_widths")):
    with config.unlocked():
        config[section][key] = tuple(config[section][key])

def run():
    train_and_evaluate(config, *sys.argv[2:])
"""

COMMAND = PROGRAM + "sys.exit(exit_status(run))"


def start(config, workdir):
    return subprocess.Popen([sys.executable, "-c", COMMAND, config.to_json(), str(workdir), "train"],
                            env=child_environment(TF_CPP_MIN_LOG_LEVEL="3", XLA_FLAGS=XLA_FLAGS),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_after(process, checkpoint, number):
    """Sends signal `number` as soon as the folder `checkpoint` is there."""
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=60)


@pytest.fixture
def long_config(tiny_config):
    tiny_config.train.steps, tiny_config.log_every, tiny_config.checkpoint_every = 400, 7, 40
    return tiny_config


def test_a_killed_run_goes_on_to_the_same_bits(long_config, tmp_path):
    whole = start(long_config, tmp_path / "whole")
    output, error = whole.communicate(timeout=180)
    assert whole.returncode == 0, error

    killed = start(long_config, tmp_path / "killed")
    stop_after(killed, tmp_path / "killed" / "checkpoints" / "80", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "400").exists()
    resumed = start(long_config, tmp_path / "killed")
    output, error = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, error
    assert "resuming after step" in output
    assert_same_run(long_config, tmp_path / "whole", tmp_path / "killed")


def test_a_signal_while_the_last_step_is_saved_is_heeded(tiny_config, tmp_path, monkeypatch, capsys):
    waited = train.Checkpoints.wait

    def wait(checkpoints):
        waited(checkpoints)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Checkpoints, "wait", wait)
    with pytest.raises(SystemExit) as left:
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert left.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 12, which is saved; the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert train_and_evaluate(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(long_config, tmp_path):
    assert start(long_config, tmp_path / "whole").wait(180) == 0
    stopped = start(long_config, tmp_path / "stopped")
    output, error = stop_after(stopped, tmp_path / "stopped" / "checkpoints" / "80", signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM after step" in output
    assert start(long_config, tmp_path / "stopped").wait(180) == 0
    assert_same_run(long_config, tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_after_damage_a_run_ends_at_the_same_bits(tiny_config, tmp_path, capsys):
    train_and_evaluate(tiny_config, tmp_path / "a", "train")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    damaged = max((tmp_path / "b" / "checkpoints" / "12" / "state").glob("ocdbt.process_0/d/*"),
                  key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train_and_evaluate(tiny_config, tmp_path / "b", "train")
    told = capsys.readouterr().out
    assert f"{damaged} is damaged: checkpoint 12 is set aside as 12.damaged; going on from checkpoint 6\n" in told
    assert "resuming after step 6\n" in told
    assert_same_run(tiny_config, tmp_path / "a", tmp_path / "b")


def test_a_second_run_in_the_folder_is_refused(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on host-a, since yesterday")
        other.flush()
        with pytest.raises(UserError, match=r"run is in use by process 7 on host-a, since yesterday; wait"):
            train_and_evaluate(tiny_config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_finished_run_says_so_and_evaluates_again(tiny_config, tmp_path, capsys):
    rows = train_and_evaluate(tiny_config, tmp_path / "run")
    assert {row["feature"] for row in rows} == {"global", "local", "joint"}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "run" / "ranked.png").stat().st_size > 1000
    (tmp_path / "run" / "results.json").unlink()
    tiny_config.evaluate.normalize = "joint"  # a field that may change
    capsys.readouterr()
    again = train_and_evaluate(tiny_config, tmp_path / "run")
    assert "is finished: 12 steps" in capsys.readouterr().out
    assert {row["normalize"] for row in again} == {"joint"}
    assert lines_of(tmp_path / "run")[-1]["step"] == 12
    tiny_config.evaluate.normalize = "none"
    evaluated = train_and_evaluate(tiny_config, tmp_path / "run", "evaluate")
    assert evaluated == rows


def test_a_run_is_loaded_with_its_latest_weights(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    run = load_run(tmp_path / "run")
    assert run.step == 12 and run.config.to_json() == tiny_config.to_json()
    assert isinstance(run.config.model.global_widths, tuple)
    loaded = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables)}
    state = final_state(tiny_config, tmp_path / "run")
    assert len(loaded) > 100
    for name, leaf in loaded.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, state[name.replace("['params']", ".params", 1)
                                                  .replace("['batch_stats']", ".batch_stats", 1)])


def test_what_is_not_a_run_is_not_loaded(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"is not a run's folder \(No such file or directory: config.json\)"):
        load_run(tmp_path)
    label_map = {"dataset": "market1501", "fingerprint": "0", "identities": {"market1501": [1]}, "init_from": None}
    whole = {"config.json": tiny_config.to_json(), "label_map.json": json.dumps(label_map)}
    for file, content in (("config.json", "{"), ("config.json", "[1]"), ("config.json", '{"model": {"depth": "3"}}'),
                          ("config.json", '{"data": 3}'), ("config.json", "[" * 100_000), ("label_map.json", "[]"),
                          ("label_map.json", "{}")):
        for name, text in (whole | {file: content}).items():
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="damaged config.json or label_map.json"):
            load_run(tmp_path)
    (tmp_path / "label_map.json").write_text(whole["label_map.json"])
    with pytest.raises(UserError, match="has no checkpoint yet; train it first"):
        load_run(tmp_path)
    (tmp_path / "trial-03").mkdir()
    (tmp_path / "trial-03" / "label_map.json").write_text("{}")
    with pytest.raises(UserError, match="holds several trials; give one of them, such as .*trial-03"):
        load_run(tmp_path)


def test_another_config_is_refused_by_its_fields(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    before = (tmp_path / "run" / "config.json").read_bytes()
    tiny_config.optim.learning_rate = 0.5
    tiny_config.model.num_strips = 1
    with pytest.raises(UserError, match=r"model.num_strips \(2 there, 1 here\), optim.learning_rate"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_other_data_are_refused(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    labels = json.loads((tmp_path / "run" / "label_map.json").read_text())
    assert labels["dataset"] == "market1501" and labels["identities"] == {"market1501": [2, 4, 6, 8]}
    (tmp_path / "run" / "label_map.json").write_text(json.dumps(labels | {"fingerprint": "0"}))
    with pytest.raises(UserError, match="trained on another version of market1501"):
        train_and_evaluate(tiny_config, tmp_path / "run")


def test_a_run_without_a_checkpoint_yet_may_be_begun_anew(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(tiny_config.to_json())
    tiny_config.train.steps, tiny_config.optim.learning_rate = 2, 0.5
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["learning_rate"] == 0.5


def test_a_folder_that_is_no_run_is_refused(tiny_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no config.json"):
        train_and_evaluate(tiny_config, tmp_path)


def test_parameters_that_are_not_finite_stop_the_run(tiny_config, tmp_path):
    """The learning rate overflows at step 9, after a loss and a gradient that are well; checkpoint 6 stays the last."""
    tiny_config.optim.schedule, tiny_config.optim.decay_every = "step", 8
    tiny_config.optim.decay_factor = 1e38
    with pytest.raises(UserError, match=r"parameter_norm not finite at step 9; checkpoint 6 "):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"6"}
    assert all(np.isfinite(leaf).all() for leaf in final_state(tiny_config, tmp_path / "run").values())
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [4, 8]


@pytest.mark.parametrize(("weight", "names"), [
    (3e38, "gradient_norm, loss, parameter_norm, penalty/global"),
    (1e30, "gradient_norm, parameter_norm"),  # whose squares overflow; the loss does not
])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tiny_config, tmp_path, weight, names):
    tiny_config.update_from_flattened_dict(
        {"loss.lambda_global": weight, "model.branches": "global", "checkpoint_every": 1})
    with pytest.raises(UserError, match=f"^{names} not finite at step 1; no checkpoint yet"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(("field", "value", "message"), [
    ("train.batch_size", 6, "train.batch_size=6 does not divide over 4 devices; use a multiple of 4, such as 4"),
    ("evaluate.batch_size", 3, "evaluate.batch_size=3 does not divide over 4 devices"),
    ("train.batch_size", 4000, "larger than the training set"),
    ("seed", -1, "seed=-1 must be in [0, 4294967295]"),
    ("train.dtype", "float16", "train.dtype='float16' is unknown; known are auto, float32, bfloat16"),
    ("data.height", 30, "data.height=30: half of it does not divide by model.num_strips=2"),
    ("data.name", "market1502", "unknown data set 'market1502'"),
    ("data.trials", "1", "data.trials='1' is not among the trials, 0 to 0"),
    ("data.loader", "torch", "data.loader='torch' is unknown"),
    ("model.loss", "triplet", "model.loss='triplet' is unknown"),
    ("loss.margin", 0.2, "loss.margin=0.2 is taken from a cosine"),
    ("loss.triplet_weight", 1.0, "loss.triplet_weight=1.0 compares images of a person"),
    ("train.images_per_identity", 3, "train.images_per_identity=3 does not divide the 8 images of a batch"),
    ("optim.schedule", "poly", "optim.schedule='poly' is unknown"),
    ("evaluate.normalize", "l2", "evaluate.normalize='l2' is unknown"),
])
def test_bad_fields_are_named(tiny_config, tmp_path, field, value, message):
    tiny_config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as raised:
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()  # or the mended command would be refused there


def test_data_that_are_not_prepared_are_named_with_the_command(tiny_config, tmp_path):
    tiny_config.data.data_dir = str(tmp_path / "empty")
    with pytest.raises(UserError, match="python -m jlml_jax.prepare market1501 --source="):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluating_nothing_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint to evaluate"):
        train_and_evaluate(tiny_config, tmp_path / "run", "evaluate")


def test_a_run_is_evaluated_on_other_devices_than_it_was_trained_on(tiny_run, tmp_path, monkeypatch):
    """The batches of its training, 8 images, do not divide over them."""
    shutil.copytree(tiny_run, tmp_path / "run")
    make_mesh = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None: make_mesh((devices or jax.devices())[:3]))
    config = load_run(tiny_run).config
    config.evaluate.batch_size, config.evaluate.picture = 15, False
    assert train_and_evaluate(config, tmp_path / "run", "evaluate")
    with pytest.raises(UserError, match="train.batch_size=8 does not divide over 3 devices"):
        train_and_evaluate(config, tmp_path / "run")


def test_training_and_evaluation_need_no_tensorflow(tiny_config, tmp_path):
    tiny_config.train.steps = 4
    done = run_program(WITHOUT_TENSORFLOW + PROGRAM + "run()\nassert 'tensorflow' not in sys.modules",
                       tiny_config.to_json(), tmp_path / "run", timeout=180, XLA_FLAGS=XLA_FLAGS)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    probe = run_program(WITHOUT_TENSORFLOW + "import tensorflow")
    assert "No module named 'tensorflow'" in probe.stderr  # the block blocks


@pytest.mark.parametrize(("parts", "message"), [
    (0, r"train.accumulation_steps=0 must be in \[1, inf\)"),
    (4, "train.batch_size=8 does not divide over 4 devices in train.accumulation_steps=4 micro-batches; use a multiple "
        "of 16"),
])
def test_parts_that_the_batch_does_not_divide_into_are_refused(tiny_config, tmp_path, parts, message):
    tiny_config.train.accumulation_steps = parts
    with pytest.raises(UserError, match=message):
        train_and_evaluate(tiny_config, tmp_path / "run")
