import dataclasses
import functools
import math
import os
import re
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from runs import Parts, assert_close_trees

from configs import market1501
from jlml_jax import device_data, models, parallel, provenance, sampling, train, train_step
from jlml_jax.command import Command
from jlml_jax.kept_step import KeptStep


def run_steps(config, count, steps=3):
    parts = Parts(config, count)
    step = train_step.make_train_step(config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)
    state, metrics = parts.state, []
    for _ in range(steps):
        state, values = step(state, parts.data, parts.seed)
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


def test_four_devices_compute_what_one_does(smooth_config):
    (one, one_metrics), (four, four_metrics) = run_steps(smooth_config, 1), run_steps(smooth_config, 4)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert_close_trees(a, b)
    assert_close_trees(one, four)
    moved = [np.abs(b - a).max() for a, b in zip(
        jax.tree.leaves(Parts(smooth_config, 1).state.params), jax.tree.leaves(four.params), strict=True)]
    assert max(moved) > 1e-3  # or the comparison would say nothing


@pytest.mark.parametrize("parts", [1, 2])
def test_four_devices_compute_what_one_does_with_what_is_beyond_the_paper(smooth_config, parts):
    """Triplets are looked for in the batch (or its part) of all devices, whose features depend on one another."""
    smooth_config.update_from_flattened_dict({
        "model.cosine_scale": 30.0, "loss.margin": 0.1, "loss.triplet_weight": 1.0, "loss.triplet_margin": 1.5,
        "train.images_per_identity": 2, "train.norm_by_camera": True, "train.accumulation_steps": parts})
    (one, one_metrics), (four, four_metrics) = run_steps(smooth_config, 1), run_steps(smooth_config, 4)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert_close_trees(a, b)
        assert a["triplet/global"] > 0 and a["triplet/local"] > 0
    assert_close_trees(one, four)


def test_the_optimizer_starts_as_optax_has_it(smooth_config):
    smooth_config.optim.weight_decay = 5e-4
    parts = Parts(smooth_config, 4)
    expected = parts.optimizer.init(jax.device_get(parts.state.params))
    assert jax.tree.structure(parts.state.opt_state) == jax.tree.structure(expected)
    for actual, leaf in zip(jax.tree.leaves(parts.state.opt_state), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == leaf.dtype
        np.testing.assert_array_equal(actual, leaf)


def test_the_network_is_printed_with_its_operations(capsys):
    config = market1501.get_config()
    model = models.build_model(config, 751)
    train.print_model(model, config)
    printed = capsys.readouterr().out
    number = sum(leaf.size for leaf in jax.tree.leaves(models.init_variables(model, 0, 224, 224)["params"]))
    printed_sizes = {name: int(size.replace(",", "")) for name, size in re.findall(r"^(\w+) +([\d,]+)$", printed, re.M)}
    assert printed_sizes["stem"] == 3 * 3 * 3 * 32 + 2 * 32
    assert sum(printed_sizes.values()) == number
    assert f"in all{number:>26,}\n" in printed
    operations = float(printed.split(" floating-point operations an image of 224x224")[0].split()[-1])
    assert operations == pytest.approx(1.49e9, rel=0.02)  # as `python -m experiments.tables --table=13` counts


@pytest.mark.parametrize("missing", ["no count", "no CPU"])
def test_the_network_is_printed_where_nothing_counts_operations(tiny_config, capsys, monkeypatch, missing):
    """JAX gives None for what is lowered for a GPU or a TPU, and has no CPU where JAX_PLATFORMS does not name it."""
    if missing == "no count":
        monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    else:
        monkeypatch.setattr(jax, "local_devices", mock.Mock(side_effect=RuntimeError("Unknown backend cpu")))
    train.print_model(models.build_model(tiny_config, 4), tiny_config)
    printed = capsys.readouterr().out
    assert "in all" in printed and "operations" not in printed


def test_operations_are_counted_for_the_hosts_processor(tiny_config, monkeypatch):
    placed = mock.Mock(wraps=jax.default_device)
    monkeypatch.setattr(jax, "default_device", placed)
    assert models.count_operations(models.build_model(tiny_config, 4), 32, 16) > 0
    placed.assert_called_once_with(jax.local_devices(backend="cpu")[0])


def test_the_norm_is_that_of_all_leaves():
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(shape, np.float32) for shape in [(), (3,), (2, 5), (1, 1, 4)] * 50]
    assert len(leaves) > 2 * train_step._LEAVES_AT_ONCE
    expected = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves))
    np.testing.assert_allclose(train_step._norm({"a": leaves[:7], "b": leaves[7:]}), expected, rtol=1e-6)
    leaves[-1][0, 0, 2] = np.nan
    assert np.isnan(train_step._norm(leaves))


def test_the_step_runs_under_pmap_to_the_same_numbers(smooth_config):
    parts = Parts(smooth_config, 4)
    step = functools.partial(train_step.train_step, model=parts.model, optimizer=parts.optimizer, config=smooth_config)
    pmapped = jax.pmap(step, axis_name=parallel.BATCH_AXIS, in_axes=(0, None, None), devices=jax.devices()[:4])
    host_state, host_data = jax.device_get((parts.state, parts.data))
    state = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (4, *np.shape(leaf))), host_state)
    for _ in range(3):
        state, metrics = pmapped(state, host_data, smooth_config.seed)
    mapped_state, mapped_metrics = run_steps(smooth_config, 4)
    for device in range(4):
        take = functools.partial(jax.tree.map, lambda leaf, device=device: np.asarray(leaf)[device])
        assert_close_trees(take(metrics), mapped_metrics[-1])
        assert_close_trees(take(state), mapped_state)


def test_batch_statistics_are_those_of_the_whole_batch(smooth_config):
    """Without synchronised BN the running statistics of the stem would be one device's."""
    (one, _), (four, _) = run_steps(smooth_config, 1, steps=1), run_steps(smooth_config, 4, steps=1)
    np.testing.assert_allclose(one.batch_stats["stem"]["norm"]["var"], four.batch_stats["stem"]["norm"]["var"],
                               rtol=1e-5)
    assert np.abs(one.batch_stats["stem"]["norm"]["mean"]).max() > 1e-4


def test_state_is_donated_and_stays_replicated(smooth_config):
    parts = Parts(smooth_config, 4)
    step = train_step.make_train_step(smooth_config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)
    after, _ = step(parts.state, parts.data, parts.seed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parts.state))
    assert all(leaf.sharding.spec == PartitionSpec() and len(leaf.sharding.device_set) == 4
               for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(("first_step", "most", "at_once"), [(0, 4, 3), (6, 4, 3), (4, 4, 2), (5, 4, 1), (0, 25, 6)])
def test_reports_checkpoints_and_the_end_fall_between_dispatches(tiny_config, first_step, most, at_once):
    tiny_config.data.loader = "device"
    tiny_config.train.steps, tiny_config.log_every, tiny_config.checkpoint_every = 18, 6, 12
    tiny_config.train.steps_per_dispatch = most
    assert train_step.steps_per_dispatch(tiny_config, first_step) == at_once
    tiny_config.evaluate.every = 4
    assert train_step.steps_per_dispatch(tiny_config, first_step) == math.gcd(2, first_step)
    tiny_config.data.loader = "tf_data"
    assert train_step.steps_per_dispatch(tiny_config, first_step) == 1


def test_accumulated_gradients_are_the_mean_of_the_parts(smooth_config):
    """Against the two halves of the batch, each a step of its own from the same weights.

    SGD without momentum moves the weights along the gradient, so that the step says what it was. The second part's
    running statistics start from those that the first one left.
    """
    smooth_config.optim.momentum, smooth_config.optim.learning_rate = 0.0, 1.0
    smooth_config.augment.flip, smooth_config.augment.crop_padding = False, 0
    parts = Parts(smooth_config, 1)
    indices = np.asarray(sampling.batch_indices(smooth_config.seed, 0, len(parts.data.labels), 8))
    start = jax.device_get(parts.state)

    def one_step(rows, batch_stats, accumulation_steps):
        smooth_config.train.accumulation_steps = accumulation_steps
        step = train_step.make_train_step(smooth_config, parts.model, parts.optimizer, parts.mesh,
                                          from_device_data=False)
        state = parallel.replicate(dataclasses.replace(start, batch_stats=batch_stats), parts.mesh)
        batch = np.asarray(parts.data.images)[rows], np.asarray(parts.data.labels)[rows], None
        state, metrics = jax.device_get(step(state, parallel.shard_batch(batch, parts.mesh), parts.seed))
        return jax.tree.map(np.subtract, start.params, state.params), state.batch_stats, metrics

    gradient, stats, metrics = one_step(indices, start.batch_stats, 2)
    first, first_stats, first_metrics = one_step(indices[:4], start.batch_stats, 1)
    second, second_stats, second_metrics = one_step(indices[4:], first_stats, 1)
    assert_close_trees(jax.tree.map(lambda a, b: (a + b) / 2, first, second), gradient)
    assert_close_trees(second_stats, stats)
    assert metrics["loss"] == pytest.approx((first_metrics["loss"] + second_metrics["loss"]) / 2, rel=1e-5)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-3)  # of the mean, not the norms' mean


def test_penalties_pull_at_the_feature_layers_and_weight_decay_at_every_kernel(smooth_config):
    """All that a step of plain SGD does to the other layers where identity layers of zeros pass no gradient on."""
    smooth_config.model.global_widths = smooth_config.model.local_widths = (4,)
    smooth_config.optim.momentum, smooth_config.optim.learning_rate, smooth_config.optim.weight_decay = 0.0, 1.0, 0.05
    smooth_config.loss.lambda_global, smooth_config.loss.lambda_local = 0.1, 0.2
    parts = Parts(smooth_config, 1)
    params = jax.device_get(parts.state.params)
    for name in filter(models.is_identity_layer, params):
        params[name]["kernel"] = np.zeros_like(params[name]["kernel"])
    step = train_step.make_train_step(smooth_config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)
    state, _ = step(parallel.replicate(dataclasses.replace(parts.state, params=params), parts.mesh), parts.data,
                    parts.seed)
    pull = jax.tree_util.tree_map_with_path(lambda path, leaf: 0.05 * leaf * (path[-1].key == "kernel"), params)
    kernel = params["global_head"]["fc"]["kernel"]
    pull["global_head"]["fc"]["kernel"] += 0.1 * kernel / np.linalg.norm(kernel, axis=1)[:, None]
    kernel = params["local_head"]["fc"]["kernel"]
    by_strip = kernel.reshape(smooth_config.model.num_strips, -1, kernel.shape[1])
    by_strip = 0.2 * 2 * np.sign(by_strip) * np.abs(by_strip).sum(1, keepdims=True)
    pull["local_head"]["fc"]["kernel"] += by_strip.reshape(kernel.shape)
    for name, end in jax.device_get(state.params).items():
        if not models.is_identity_layer(name):
            assert_close_trees(jax.tree.map(np.subtract, params[name], pull[name]), end)
        else:
            assert np.abs(end["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_the_parts_of_a_batch_do_not_depend_on_the_devices(smooth_config):
    smooth_config.train.accumulation_steps = 2
    (one, one_metrics), (four, four_metrics) = run_steps(smooth_config, 1), run_steps(smooth_config, 4)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert_close_trees(a, b)
    assert_close_trees(one, four)


@pytest.mark.parametrize("images_per_identity", [0, 2])
def test_both_loaders_take_the_same_parts(tiny_config, tmp_path, images_per_identity):
    tiny_config.train.images_per_identity, tiny_config.train.norm_by_camera = images_per_identity, True
    parts = Parts(tiny_config, 4)
    tiny_config.data.loader, tiny_config.train.accumulation_steps = "tf_data", 2
    draw = functools.partial(device_data.draw, seed=tiny_config.seed, step=0, batch_size=8,
                             axis_name=parallel.BATCH_AXIS, micro_batches=2)
    _, drawn, drawn_cameras = jax.jit(jax.shard_map(draw, mesh=parts.mesh, in_specs=PartitionSpec(),
                                     out_specs=PartitionSpec(parallel.BATCH_AXIS), check_vma=False))(parts.data)
    asked = Command("train", parts.mesh, parts.optimizer, other_tests=[], provenance={})
    run = train._check_run(asked, tiny_config, tmp_path, parts.trial)
    _, labels, cameras = next(train._batches(run, 0))
    np.testing.assert_array_equal(labels, drawn)
    np.testing.assert_array_equal(cameras, drawn_cameras)
    in_order = parts.trial.labels()[sampling.batch_indices(tiny_config.seed, 0, len(parts.data.labels), 8,
                                                              parts.data.groups)]
    assert labels.tolist() != in_order.tolist()  # device by device, not micro-batch by micro-batch


def test_a_seed_draws_its_own_batches_in_the_same_program(smooth_config):
    parts = Parts(smooth_config, 1)
    step = train_step.make_train_step(smooth_config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)
    state = jax.device_get(parts.state)
    losses = [float(step(parallel.replicate(state, parts.mesh), parts.data, np.uint32(seed))[1]["loss"])
              for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert step._cache_size() == 1


def test_bfloat16_is_for_convolutions_alone(smooth_config):
    """Close to float32, not equal to it, and what is kept stays float32."""
    (wide, wide_metrics) = run_steps(smooth_config, 1, steps=1)
    smooth_config.train.dtype = "bfloat16"
    (narrow, narrow_metrics) = run_steps(smooth_config, 1, steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves((narrow.params, narrow.batch_stats, narrow.opt_state))
            if leaf.ndim} == {np.dtype(np.float32)}
    assert narrow_metrics[0]["penalty/global"] == wide_metrics[0]["penalty/global"]  # of the same weights
    assert narrow_metrics[0]["loss"] == pytest.approx(wide_metrics[0]["loss"], rel=0.02)
    assert narrow_metrics[0]["loss"] != wide_metrics[0]["loss"]
    assert train_step.compute_dtype("auto") == np.float32  # on a CPU


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_accelerators(smooth_config, platform):
    """As they run it: the vendor's layers, bfloat16, several steps a dispatch, all that augments. No device needed."""
    smooth_config.train.dtype = "bfloat16"
    smooth_config.augment.update(color_jitter=0.2, erasing_probability=0.5)
    smooth_config.loss.triplet_weight, smooth_config.train.images_per_identity = 1.0, 2
    parts = Parts(smooth_config, 4)
    step = train_step.make_train_step(smooth_config, parts.model.clone(native=True), parts.optimizer, parts.mesh,
                                      from_device_data=True, num_steps=5)
    text = step.trace(parts.state, parts.data, parts.seed).lower(lowering_platforms=(platform,)).as_text()
    types = re.findall(r"stablehlo\.convolution.* -> tensor<(?:\d+x)*(\w+)>", text)
    assert set(types) == {"bf16"}
    assert "stablehlo.while" in text and "all_reduce" in text
    assert "custom_call" not in text  # nothing that only another platform has


@pytest.mark.parametrize("kept", [False, True])
def test_the_compiler_hears_its_options(smooth_config, tmp_path, monkeypatch, kept):
    """Of the step itself, and of one whose trace is kept; what this jaxlib does not know is left out."""
    assert parallel.compiler_options()["xla_cpu_prefer_vector_width"] == 512
    monkeypatch.setattr(parallel, "compiler_options", lambda: {"xla_cpu_unheard_of": 1})
    assert not parallel._knows("xla_cpu_unheard_of", 1)
    parts = Parts(smooth_config, 1)
    step = train_step.make_train_step(smooth_config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)
    if kept:
        step = KeptStep(step, "a", provenance.collect(), str(tmp_path))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_unheard_of"):
        step(parts.state, parts.data, parts.seed)


@pytest.mark.parametrize("cores, side_by_side", [(2, False), (64, True)])
def test_many_cores_keep_operations_side_by_side(monkeypatch, cores, side_by_side):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    options = parallel.compiler_options()
    assert options.get("xla_cpu_enable_concurrency_optimized_scheduler", True) == side_by_side
