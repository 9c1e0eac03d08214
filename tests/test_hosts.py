"""Several processes on the loopback address, as several hosts: real ones, each with two CPU devices."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from fast_compilation import XLA_FLAGS
from processes import ROOT, child_environment
from runs import lines_of

from jlml_jax import parallel
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.logs import read_training

TIMEOUT = 170  # seconds, of a command: nothing may hang


def start(workdir, *arguments, data_dir, devices=2, **variables):
    """The main command on the miniature Market-1501, with a network of a few hundred weights."""
    variables = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                 "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "jlml_jax.main", f"--config={ROOT / 'configs' / 'market1501.py'}",
         f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", "--config.data.height=32",
         "--config.data.width=16", "--config.model.branches=global", "--config.model.depth=1",
         "--config.model.stem_features=4", "--config.model.global_widths=(4,)",
         "--config.model.global_feature_dim=8",
         "--config.optim.learning_rate=0.0002", "--config.train.steps=40", "--config.train.batch_size=8",
         "--config.evaluate.batch_size=16", "--config.log_every=4", "--config.checkpoint_every=20",
         "--config.evaluate.every=10", "--config.compilation_cache=", *arguments],
        env=child_environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Hosts:
    """Two processes of one command; `of_second` are further arguments of the second one's."""

    def __init__(self, workdir, *arguments, of_second=(), devices=(2, 2), data_dir):
        coordinator = f"--coordinator=127.0.0.1:{free_port()}"
        self.processes = [
            start(workdir, *arguments, *(of_second if number else ()), coordinator, "--num_processes=2",
                  f"--process_id={number}", data_dir=data_dir, devices=devices[number]) for number in (0, 1)]

    def send_after(self, file, text, number, process):
        """Sends signal `number` to a process as soon as `text` is in `file`."""
        deadline = time.monotonic() + TIMEOUT
        while not (file.exists() and text in file.read_text()):
            for running in self.processes:
                assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.processes[process].send_signal(number)

    def finish(self, *statuses, timeout=TIMEOUT):
        """Waits for both, which must end with `statuses`; their (stdout, stderr)."""
        try:
            told = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert [process.returncode for process in self.processes] == list(statuses), told
        return told


def errors_of(told):
    """The one error line of each process."""
    lines = [[line for line in error.splitlines() if line.startswith("error: ")] for _, error in told]
    assert [len(of_process) for of_process in lines] == [1, 1], told
    assert all("Traceback" not in error for _, error in told)
    return [of_process[0] for of_process in lines]


def weights_of(workdir):
    run = load_run(workdir)
    return {"/".join(path): value for path, value in _leaves(run.variables)} | {"step": run.step}


def _leaves(tree, path=()):
    for name, value in tree.items():
        yield from _leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


def assert_close_runs(a, b):
    """Every logged figure agrees to 1e-5, and so do the metrics of the ranking."""
    for left, right in zip(lines_of(a), lines_of(b), strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-7)
    left, right = (json.loads((run / "results.json").read_text())["rows"] for run in (a, b))
    assert left == right and {row["protocol"] for row in left} == {"single-query", "multi-query"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, market1501_dir):
    """The same run by two processes with two devices each, and by one process with four."""
    folder = tmp_path_factory.mktemp("runs")
    hosts = Hosts(folder / "two", data_dir=market1501_dir)
    told = hosts.finish(0, 0)
    one = start(folder / "one", data_dir=market1501_dir, devices=4)
    _, error = one.communicate(timeout=TIMEOUT)
    assert one.returncode == 0, error
    (folder / "told.json").write_text(json.dumps(told))
    return folder


def keep_only(run, step):
    """The run as it was after `step`."""
    for path in (run / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)
    (run / "results.json").unlink()


def test_two_processes_compute_what_one_does(runs):
    training = read_training(runs / "two")
    assert [line["step"] for line in training] == list(range(4, 41, 4))
    assert [line["step"] for line in lines_of(runs / "two") if "rank1/global" in line] == [10, 20, 30, 40]
    assert training[0]["loss"] > 1.01 * training[-1]["loss"]  # or nothing was learned
    assert_close_runs(runs / "two", runs / "one")
    hardware = json.loads((runs / "two" / "results.json").read_text())["provenance"]["hardware"]
    assert hardware["processes"] == 2 and hardware["devices"] == 4


def test_only_the_first_process_tells_and_writes(runs):
    (first, _), (second, second_error) = json.loads((runs / "told.json").read_text())
    assert "step 40/40" in first and "results in" in first and "floating-point operations an image" in first
    # XLA's CPU collectives tell of themselves, from two threads, whose words run into each other.
    of_gloo = r"\[Gloo\]|Rank|Expected|number|of|is|connected|to|peer|ranks|[\d.:\s]"
    assert re.sub(of_gloo, "", second + second_error) == ""
    assert len(list((runs / "two").glob("events.*"))) == 2  # of training, and of the evaluation at its end


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way_round(runs, tmp_path, market1501_dir):
    for source in ("one", "two"):
        shutil.copytree(runs / source, tmp_path / source)
        keep_only(tmp_path / source, 20)
    hosts = Hosts(tmp_path / "one", data_dir=market1501_dir)
    one = start(tmp_path / "two", data_dir=market1501_dir, devices=4)
    (first, _), _ = hosts.finish(0, 0)
    output, error = one.communicate(timeout=TIMEOUT)
    assert one.returncode == 0, error
    assert "resuming after step 20" in output and "resuming after step 20" in first
    assert_close_runs(tmp_path / "one", runs / "one")
    assert_close_runs(tmp_path / "two", runs / "two")


@pytest.mark.slow
def test_a_stop_of_one_process_stops_both_and_the_run_goes_on_to_the_same_bits(runs, tmp_path, market1501_dir):
    stopped = Hosts(tmp_path / "run", data_dir=market1501_dir)
    stopped.send_after(tmp_path / "run" / "metrics.jsonl", '"step": 4,', signal.SIGTERM, process=1)
    (output, _), _ = stopped.finish(143, 143)
    step = int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", output)[1])
    assert 4 <= step < 40 and load_run(tmp_path / "run").step == step
    (output, _), _ = Hosts(tmp_path / "run", data_dir=market1501_dir).finish(0, 0)
    assert f"resuming after step {step}" in output
    assert lines_of(tmp_path / "run") == lines_of(runs / "two")
    stopped, whole = weights_of(tmp_path / "run"), weights_of(runs / "two")
    assert stopped.keys() == whole.keys() and stopped["step"] == 40
    for name in stopped:
        np.testing.assert_array_equal(stopped[name], whole[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, market1501_dir, killed):
    """Within a minute, by JAX's heartbeats if not by a collective that fails."""
    hosts = Hosts(tmp_path / "run", "--config.train.steps=1000000", "--mode=train", data_dir=market1501_dir)
    hosts.send_after(tmp_path / "run" / "metrics.jsonl", '"step": 4,', signal.SIGKILL, process=killed)
    other = hosts.processes[1 - killed]
    try:
        _, error = other.communicate(timeout=60)
    finally:
        for process in hosts.processes:
            process.kill()
    assert other.returncode not in (0, -signal.SIGKILL)
    assert "another process ended before" in error or "another task died" in error


def test_processes_that_were_started_differently_are_refused(tmp_path, market1501_dir):
    told = Hosts(tmp_path / "run", of_second=["--config.seed=5", "--config.loss.lambda_local=0.25"],
                 data_dir=market1501_dir).finish(2, 2)
    for error in errors_of(told):
        assert "the processes differ in config.loss.lambda_local (0.0005 in process 0, 0.25 in process 1), " in error
        assert "config.seed (0 in process 0, 5 in process 1); start all of them with the same command" in error
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_the_first_process_ends_all(tmp_path, market1501_dir):
    """Only process 0 claims the folder; the others would wait for it in a collective."""
    (tmp_path / "thesis.tex").write_text("x")
    told = Hosts(tmp_path, data_dir=market1501_dir).finish(2, 2)
    for error in errors_of(told):
        assert error.startswith("error: process 0 of 2: ") and "no config.json, so it is not a run's folder" in error


@pytest.mark.slow
def test_processes_with_unequal_devices_are_refused(tmp_path, market1501_dir):
    told = Hosts(tmp_path / "run", devices=(2, 1), data_dir=market1501_dir).finish(2, 2)
    for error in errors_of(told):
        assert "must have equally many devices, but there are 2 in process 0, 1 in process 1" in error


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_ends_in_one_line(tmp_path, market1501_dir):
    """Either process alone, the one that listens and the one that calls."""
    alone = [start(tmp_path / "run", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2",
                   f"--process_id={number}", "--join_timeout=2", data_dir=market1501_dir) for number in (0, 1)]
    for number, process in enumerate(alone):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert error.startswith(f"error: process {number} of 2 did not find all the others at --coordinator=127.0.0.1:")
        assert error.count("\n") == 1 and "in 2 seconds" in error


@pytest.mark.parametrize(("arguments", "message"), [
    (("10.0.0.1:8476", None, None), "go together, but --num_processes and --process_id is not given"),
    ((None, 2, 0), "go together, but --coordinator is not given"),
    (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 is not HOST:PORT"),
    (("10.0.0.1:8476", 2, 2), "--process_id=2 is not one of --num_processes=2"),
])
def test_flags_that_name_no_process_are_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parallel.initialize(*arguments, timeout=1)


@pytest.mark.parametrize(("environment", "alone"), [
    ({}, False),  # no scheduler: JAX finds none either
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, True),
    ({"SLURM_JOB_ID": "7"}, True),  # salloc's shell
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),  # a pod of no indexed Job
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, True),
])
def test_one_process_of_a_scheduler_is_no_job_of_several(environment, alone):
    assert parallel._scheduled_alone(environment) == alone


def test_a_pod_that_cannot_find_the_others_does_not_train_alone(monkeypatch):
    """Without the package kubernetes JAX knows of no scheduler."""
    for name, value in {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}.items():
        monkeypatch.setenv(name, value)
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    enabled = jax.config.jax_enable_preemption_service
    with pytest.raises(UserError, match=r"package kubernetes, .* pip install -e '.\[k8s\]'"):
        parallel.initialize(None, None, None, timeout=60)
    jax.config.update("jax_enable_preemption_service", enabled)


@pytest.mark.parametrize(("environment", "ids"), [
    ({}, None),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
    ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),  # a task a GPU: JAX's own way
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
])
def test_a_slurm_task_that_has_its_node_alone_has_all_its_gpus(environment, ids):
    assert parallel._slurm_device_ids(environment) == ids


@pytest.mark.slow
def test_a_slurm_job_of_two_tasks_joins_by_itself(tmp_path, market1501_dir):
    """As srun starts them; the batch is refused once both have joined, which ends the test soon."""
    port = free_port()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
             "JAX_COORDINATOR_PORT": str(port)}
    tasks = [start(tmp_path / "run", "--config.train.batch_size=6", data_dir=market1501_dir, **slurm,
                   SLURM_PROCID=str(number)) for number in (0, 1)]
    for number, task in enumerate(tasks):
        _, error = task.communicate(timeout=TIMEOUT)
        assert task.returncode == 2
        assert f"error: process {number} of 2: train.batch_size=6 does not divide over 4 devices" in error
