import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from jlml_jax.errors import UserError
from jlml_jax.profiling import Trace, parse_steps
from jlml_jax.train import train_and_evaluate


def test_steps_are_half_open():
    assert parse_steps("20:25") == range(20, 25)
    assert not parse_steps("")


@pytest.mark.parametrize("text", ["20", "25:20", "20:20", "-1:3", "a:b", "1:2:3", ":5", "1.5:2", "\u0663:\u0664"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(UserError, match=r"profile=.* is not START:STOP"):
        parse_steps(text)


@pytest.fixture
def profiler(monkeypatch, tmp_path):
    """What is called of JAX's profiler."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/perfetto_trace.json.gz").touch()
    return calls


@pytest.mark.parametrize("steps, at_once, traced", [
    ((2, 4), 1, [2, 3]), ((2, 4), 3, [0, 3]), ((0, 1), 5, [0]), ((4, 90), 5, [0, 5]), ((50, 60), 5, [])])
def test_the_dispatches_that_hold_any_of_the_steps_are_traced(profiler, tmp_path, steps, at_once, traced):
    trace, during = Trace(range(*steps), tmp_path), []
    for start in range(0, 10, at_once):
        dispatch = range(start, start + at_once)
        trace.before(dispatch)
        if profiler.count("start") > profiler.count("stop"):
            during.append(start)
        trace.after(dispatch, jnp.zeros(()))
    trace.stop()
    trace.stop()
    assert during == traced
    assert profiler == (["start", "stop"] if traced else [])


def test_the_trace_is_one_that_perfetto_opens(tmp_path, capsys):
    trace, doubled = Trace(range(1, 2), tmp_path), jax.jit(lambda x: 2 * x)
    for step in range(3):
        trace.before(range(step, step + 1))
        trace.after(range(step, step + 1), doubled(jnp.ones(8)))
    path, = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any("lambda" in event.get("name", "") for event in events)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # TensorBoard's
    assert f"trace of steps 1 to 1: {path}" in capsys.readouterr().out


def test_steps_that_are_not_trained_are_refused_and_those_of_before_told(tiny_config, tmp_path, capsys):
    steps = tiny_config.train.steps
    tiny_config.profile = f"{steps}:{steps + 2}"
    with pytest.raises(UserError, match=f"profile={steps}:{steps + 2} is beyond train.steps={steps}"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    tiny_config.profile = ""
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(steps))
    tiny_config.profile = "1:3"
    capsys.readouterr()
    train_and_evaluate(tiny_config, tmp_path / "run", "train")
    assert "nothing is traced: the steps of profile=1:3 were taken before\n" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()
