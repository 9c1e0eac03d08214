import functools
import importlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from experiments.bench import __main__ as command
from experiments.bench import crops, end_to_end, few_crops, floor
from experiments.bench.timing import ratio_of
from jlml_jax.models import build_model


def test_ratios_are_of_pairs():
    assert ratio_of([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "minimum": 1.0, "maximum": 3.0}


def test_work_counted_is_the_networks():
    """DESIGN: 789,897,216 multiply-adds an image of 224 x 224 without the identity layers."""
    model = build_model(default.get_config(), 0).clone(native=True)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    work = floor.count_work(model.apply, variables, images)
    assert sum(piece.flops for piece in work) == 2 * 2 * 789_897_216
    # A layer that reads its input, its kernel and writes its result, of which the stem's is known.
    assert floor.Work(2 * 2 * 112 * 112 * 32 * 27, 4 * (2 * 224 * 224 * 3 + 27 * 32 + 2 * 112 * 112 * 32)) in work


def test_work_of_a_gradient_is_that_of_two_more_products():
    def loss(kernel, x, stride):
        pad = ((1, 1), (1, 1))
        y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.square(y).sum()

    kernel, x = jnp.ones((3, 3, 4, 8)), jnp.ones((2, 8, 8, 4))
    for stride in (1, 2):
        once = 2 * 2 * (8 // stride)**2 * 8 * 9 * 4
        gradient = jax.grad(functools.partial(loss, stride=stride), argnums=(0, 1))
        assert [piece.flops for piece in floor.count_work(gradient, kernel, x)] == [once] * 3


def test_the_floor_is_the_slower_of_operations_and_bytes():
    work = [floor.Work(flops=10**9, bytes=8), floor.Work(flops=2, bytes=10**9)]
    with mock.patch.object(floor, "device_rates", lambda _: {"flops_per_second": 1e9, "bytes_per_second": 5e8}):
        result = floor.floor_of(work, "float32", 6.0)
    assert (result["seconds"], result["reached"], result["bound_by_memory"]) == (3.0, 0.5, 0.5)


def test_rates_are_measured():
    assert all(1e8 < rate < 1e16 for rate in floor.device_rates("float32").values())


@pytest.mark.parametrize("benchmark", ["train", "forward", "input"])
def test_without_pytorch_it_says_how_to_install_it(monkeypatch, capsys, benchmark):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("torch_peer", "train_step", "forward", "input_rate"):
        monkeypatch.delitem(sys.modules, f"experiments.bench.{module}", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", benchmark])
    assert command.exit_status(command._command) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["train", "forward"])
def test_both_do_the_same_work(benchmark):
    """Checked by the benchmarks themselves, before they time anything."""
    pytest.importorskip("torch", reason="needs pip install -e '.[bench]'")
    module, function = command.BENCHMARKS[benchmark][0].split(".")
    measure = getattr(importlib.import_module(f"experiments.bench.{module}"), function)
    result = measure(height=64, width=32, batch_size=4, dtype="float32", repeats=1)
    assert result["over_torch"]["median"] > 0
    assert np.isfinite(list(result["images_per_second"].values())).all()


@pytest.mark.slow
def test_few_crops_take_less_than_a_full_batch(monkeypatch):
    monkeypatch.setattr(few_crops, "COUNTS", (5,))
    assert few_crops.bench_few_crops(1)["full_batch_over"]["5"]["minimum"] > 3


@pytest.mark.slow
def test_a_run_is_measured_from_end_to_end(tiny_config, monkeypatch):
    monkeypatch.setattr(crops, "NUM_IMAGES", 64)
    monkeypatch.setattr(default, "get_config", tiny_config.copy_and_resolve_references)
    result = end_to_end.bench_end_to_end(height=64, width=32, batch_size=4, dtype="float32", repeats=2)
    rates = result["images_per_second"]
    assert rates.keys() == {"bare", "end to end"} and result["images"] == 64
    assert all(low <= rates[name] <= high for name, (low, high) in result["spread"].items())
    assert result["of_bare"] == rates["end to end"] / rates["bare"]
