"""What is saved: damage to it, no room for it, and who may write it."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from processes import child_environment

from experiments.faults import kill
from jlml_jax import parallel
from jlml_jax.checkpoints import Checkpoints, claim_workdir, has_checkpoint, latest_step, load_run, set_aside_damaged
from jlml_jax.errors import UserError, storage_errors_told
from jlml_jax.logs import TrainingLog

LABELS = {"dataset": "market1501", "fingerprint": "0123", "identities": {"market1501": [2, 4]}, "init_from": None}


def state_of(step):
    """As a train state is laid out: on every device, with a scalar among the arrays."""
    rng = np.random.default_rng(step)
    return parallel.replicate({"params": {"kernel": rng.standard_normal((64, 50)).astype(np.float32)},
                               "batch_stats": {"mean": rng.standard_normal(7).astype(np.float32)},
                               "step": np.int32(step)}, parallel.make_mesh(jax.devices()[:1]))


def save(workdir, *steps, keep=3):
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(step, state_of(step), {"interval": {"loss": [0.5 * step]}})
        checkpoints.wait()
    checkpoints.close()


def restored(workdir):
    """The step that a run goes on from, whose state and progress are asserted to be those saved."""
    checkpoints = Checkpoints(workdir, 3)
    state, progress = checkpoints.restore(state_of(0))
    step = checkpoints.latest_step()
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert progress == {"interval": {"loss": [0.5 * step]}}
    return step


@pytest.fixture
def run(tiny_config, tmp_path):
    """A run with the checkpoints 2 and 4."""
    with claim_workdir(tmp_path / "run", tiny_config, LABELS):
        save(tmp_path / "run", 2, 4)
    return tmp_path / "run"


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def files_of(checkpoint):
    """Those that its content depends on; Orbax writes the others when it commits."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file()
                  and not (path.parent == checkpoint and path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")))


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_used(run, capsys, damage):
    files = files_of(run / "checkpoints" / "4")
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        damage(file)
        saved = load_run(run)
        assert saved.step == 2
        np.testing.assert_array_equal(saved.variables["params"]["kernel"], state_of(2)["params"]["kernel"])
        told = capsys.readouterr().err
        assert told.endswith("; taking checkpoint 2 instead\n") and told.count("\n") == 1
        assert f"{file} is damaged" in told or file.name == "sha256.json"  # which may then blame another one
        file.write_bytes(content)
    assert load_run(run).step == 4


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, capsys):
    for _ in range(2):  # the second time, the first one set aside is in the way
        file = next(run.glob("checkpoints/4/state/ocdbt.process_0/d/*"))
        flip(file)
        set_aside_damaged(run)
        assert capsys.readouterr().out == (f"{file} is damaged: checkpoint 4 is set aside as 4.damaged; going on from "
                                           "checkpoint 2\n")
        assert latest_step(run) == 2 and restored(run) == 2
        save(run, 4)
        assert restored(run) == 4
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4", "4.damaged"}


def test_a_whole_checkpoint_is_left_where_it_is(run, capsys):
    set_aside_damaged(run)
    assert capsys.readouterr() == ("", "") and restored(run) == 4
    assert load_run(run).step == 4 and capsys.readouterr().err == ""


def test_a_run_with_damaged_checkpoints_alone_is_refused_and_left(run):
    before = sorted(run.rglob("*"))
    for step in (2, 4):
        flip(next(run.glob(f"checkpoints/{step}/state/ocdbt.process_0/d/*")))
    for use in (load_run, set_aside_damaged):
        with pytest.raises(UserError, match=rf"no checkpoint in {run}/checkpoints is whole: .*/4/.* damaged, .*/2/"):
            use(run)
    assert sorted(run.rglob("*")) == before


def test_a_run_without_checkpoints_has_none_to_set_aside(tmp_path, capsys):
    set_aside_damaged(tmp_path)
    assert capsys.readouterr().out == "" and not has_checkpoint(tmp_path)


def test_what_a_killed_save_left_is_cleared_away(run):
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "6.orbax-checkpoint-tmp" / "half").write_text("x")
    assert latest_step(run) == 4
    save(run, 8)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4", "8"}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("on_linux", [True, False])
def test_without_room_a_save_is_refused_and_the_last_checkpoint_stays(tmp_path, monkeypatch, on_linux):
    if not on_linux:
        monkeypatch.delattr(os, "posix_fallocate")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    save(tmp_path, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=r"cannot use .*checkpoints.* \(File too large\); .* run the same command"):
        save(tmp_path, 4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert restored(tmp_path) == 2
    save(tmp_path, 4)
    assert restored(tmp_path) == 4


def test_what_fails_while_it_is_written_is_told(tmp_path, monkeypatch, small_files):
    """The disk may fill up between the check and the writing: TensorStore's ValueError, from another thread."""
    monkeypatch.setattr(Checkpoints, "_check_room", lambda *_: None)
    with pytest.raises(UserError, match=r"cannot use .* \(File too large\)"), storage_errors_told(tmp_path):
        save(tmp_path, 2)
    assert not has_checkpoint(tmp_path)


def test_logs_tell_of_a_full_disk_at_once(tmp_path, small_files):
    log = TrainingLog(tmp_path, 0, 100, 8)
    with pytest.raises(UserError, match="File too large"), storage_errors_told(tmp_path):
        for done in range(1, 100):
            log.add(done, {"loss": [1.0]})
            log.report(done, 0.1)
    assert 3 < done < 99
    with pytest.raises(OSError):
        log.close()
    whole = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    TrainingLog(tmp_path, done, 100, 8).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Failed to write to file 14: No space left on device [os_error_code='28']"),
    RuntimeError("write() failed: No space left on device"),
])
def test_a_full_disk_is_told_whatever_is_raised(tmp_path, error):
    with pytest.raises(UserError, match=rf"cannot use {tmp_path} \(No space left on device\)"), \
            storage_errors_told(tmp_path):
        raise error


def test_other_errors_are_bugs_and_pass(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors_told(tmp_path):
        (tmp_path / "x").read_text()


HOLDER = """
import sys, time
from pathlib import Path
import ml_collections
from jlml_jax.checkpoints import claim_workdir
with claim_workdir(Path(sys.argv[1]), ml_collections.ConfigDict({"data": {"name": "market1501"}}), {"dataset": "x"}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tiny_config, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True,
                              env=child_environment())
    try:
        assert holder.stdout.readline() == "held\n"
        config = (tmp_path / "run" / "config.json").read_bytes()
        with pytest.raises(UserError, match=rf"run is in use by process {holder.pid} on {os.uname().nodename}, since "
                                            rf"{time.strftime('%Y')}.*; wait until that has ended, stop it, or give"):
            claim_workdir(tmp_path / "run", tiny_config, LABELS)
        assert (tmp_path / "run" / "config.json").read_bytes() == config
    finally:
        holder.kill()
        holder.wait()
    with claim_workdir(tmp_path / "run", tiny_config, LABELS):  # the lock of a killed process is gone
        assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == tiny_config.train.steps
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            claim_workdir(tmp_path / "run", tiny_config, LABELS)
    claim_workdir(tmp_path / "run", tiny_config, LABELS).close()


@pytest.mark.parametrize("name", ["config.json", "label_map.json"])
def test_what_describes_a_run_is_not_guessed_when_it_is_damaged(run, tiny_config, name):
    truncate(run / name)
    for _ in range(2):  # the refusal lets go of the lock
        with pytest.raises(UserError, match=f"{run / name} is damaged or gone .*; copy it back from elsewhere"):
            claim_workdir(run, tiny_config, LABELS)


def test_a_run_made_before_a_field_existed_goes_on_with_its_default(run, tiny_config):
    config = json.loads((run / "config.json").read_text())
    del config["augment"]["color_jitter"], config["data"]["held_out_identities"]
    (run / "config.json").write_text(json.dumps(config))
    tiny_config.augment.color_jitter = 0.5
    with pytest.raises(UserError, match=r"another config: augment.color_jitter \(0.0 there, 0.5 here\)"):
        claim_workdir(run, tiny_config, LABELS)
    tiny_config.augment.color_jitter = 0.0
    claim_workdir(run, tiny_config, LABELS).close()


def test_the_folder_of_several_trials_may_be_used_by_several_runs(tiny_config, tmp_path):
    with claim_workdir(tmp_path, tiny_config), claim_workdir(tmp_path, tiny_config):
        assert not (tmp_path / "lock").exists()


def test_a_start_that_was_killed_before_anything_was_written_goes_on(tiny_config, tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "config.json.0123abcd.part").write_text("{")
    claim_workdir(tmp_path, tiny_config, LABELS).close()
    assert (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_run_goes_on_after_a_full_and_a_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")

    def start(folder):
        return kill.Process(tmp_path, kill.TRAINING.arguments(folder))

    def ends_with(process, told):
        assert process.end() == 2
        error, = (line for line in process.errors if line.startswith("error: "))
        assert f"{disk / 'run'}" in error and told in error

    try:
        assert start(tmp_path / "whole").end() == 0
        filled = start(disk)
        while filled.running() and not (disk / "run" / "checkpoints" / "24").exists():
            time.sleep(0.001)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 16))
        ends_with(filled, "No space left on device")
        ends_with(start(disk), "No space left on device")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ends_with(start(disk), "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        (disk / "filler").unlink()
        resumed = start(disk)
        assert resumed.end() == 0 and resumed.has_told("resuming after step ")
        assert kill.TRAINING.outcome(disk) == kill.TRAINING.outcome(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_loading_a_run_warns_of_nothing(tiny_run, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda *arguments, **_: warned.append(arguments))  # Orbax's
    load_run(tiny_run)
    assert not warned


def test_weights_are_read_alone_and_are_those_that_orbax_restores_with_all_else(tiny_run, monkeypatch):
    all_of_it = ocp.PyTreeCheckpointer().restore(tiny_run / "checkpoints" / "12" / "state")

    def opens_every_array(*_):
        raise AssertionError

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "metadata", opens_every_array)
    weights = load_run(tiny_run).variables
    jax.tree.map(np.testing.assert_array_equal, weights, {part: all_of_it[part] for part in ("params", "batch_stats")})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights))
