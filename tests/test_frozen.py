"""`train.frozen_through`: layers that keep the weights and BN statistics that they start with."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import Parts, lines_of

from jlml_jax import augment, losses, models, norm_statistics, parallel, train_step
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate

# The modules of the tiny network, whose towers have two stages, by the layer of Table 1.
LAYERS = {"conv1": ("stem", "global_stem", "local_stem"), "conv2": ("conv2_1",), "conv3": ("conv3_1",),
          "feature": ("global_head", "local_head")}


def is_frozen(path, through):
    """Whether the array at that path, as JAX gives it, belongs to a layer up to `through`."""
    order = list(LAYERS)
    names = {name for layer in order[:order.index(through) + 1] for name in LAYERS[layer]}
    return any(getattr(key, "key", None) in names for key in path)


def by_path(tree):
    return {path: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_frozen_alone_stay(before, after, through):
    """Params and BN statistics: to the bit those of frozen layers, and of others none."""
    before, after = by_path(before), by_path(after)
    assert before.keys() == after.keys()
    frozen = {path for path in before if is_frozen(path, through)}
    assert frozen and frozen < before.keys()
    for path, leaf in before.items():
        assert (leaf.tobytes() == after[path].tobytes()) == (path in frozen), jax.tree_util.keystr(path)


def variables_of(state):
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats})


def make_step(config, parts, **options):
    return train_step.make_train_step(config, parts.model, parts.optimizer, parts.mesh, **options)


@pytest.fixture
def config(tiny_config):
    """All that moves weights: penalties that outweigh the classifiers, weight decay, momentum."""
    tiny_config.update_from_flattened_dict({
        "model.feature_norm": True, "optim.weight_decay": 0.1, "loss.lambda_global": 0.1, "loss.lambda_local": 0.1})
    return tiny_config


@pytest.mark.parametrize(("through", "devices", "fields"), [
    ("conv1", 1, {"model.shared_stem": False}),
    ("conv2", 4, {"train.accumulation_steps": 2, "loss.triplet_weight": 1.0, "train.images_per_identity": 2}),
    ("conv3", 1, {"model.branches": "local"}),
    ("feature", 1, {"model.branches": "global"}),
    ("feature", 4, {"model.loss": "uni", "train.accumulation_steps": 2}),
])
def test_frozen_layers_stay_to_the_bit_and_the_others_move(config, through, devices, fields):
    config.update_from_flattened_dict({"train.frozen_through": through} | fields)
    parts = Parts(config, devices)
    before, step, state = variables_of(parts.state), make_step(config, parts, from_device_data=True), parts.state
    momentum = {path for path, leaf in by_path(state.opt_state).items() if leaf.ndim}
    assert momentum and not any(is_frozen(path, through) for path in momentum)
    for _ in range(2):
        state, _ = step(state, parts.data, parts.seed)
    after = variables_of(state)
    assert_frozen_alone_stay(before, after, through)
    if through == "feature":
        identity = {path[1].key for path in by_path(before) if not is_frozen(path, through)}
        assert identity == {"joint_identity" if config.model.loss == "uni" else "global_identity"}


def test_with_nothing_frozen_everything_moves(config):
    config.model.branches = "local"
    parts = Parts(config, 1)
    before = by_path(variables_of(parts.state))
    state, _ = make_step(config, parts, from_device_data=True)(parts.state, parts.data, parts.seed)
    for path, leaf in by_path(variables_of(state)).items():
        assert (leaf != before[path]).any(), jax.tree_util.keystr(path)


def test_with_all_but_identity_layers_frozen_the_loss_is_that_of_a_forward_as_at_test(config):
    config.train.frozen_through, config.augment.flip = "feature", False
    parts = Parts(config, 4)
    rng = np.random.default_rng(0)
    moments = jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype), parts.state.batch_stats)
    state = parts.state.replace(batch_stats=parallel.replicate(moments, parts.mesh))
    variables = variables_of(state)
    images, labels = rng.integers(0, 256, (8, 32, 16, 3), np.uint8), rng.integers(0, 4, 8).astype(np.int32)
    outputs = jax.jit(parts.model.apply)(variables, augment.normalise(images, config.data))
    expected, _ = losses.jlml_loss(outputs, variables["params"], labels, num_strips=2, **config.loss)
    batch = parallel.shard_batch((images, labels, None), parts.mesh)
    _, metrics = make_step(config, parts, from_device_data=False)(state, batch, parts.seed)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_step_goes_back_no_further_than_what_is_trained(tiny_config):
    """A convolution's backward pass is two of its kind, and there is no other work of that order."""
    def operations(through):
        tiny_config.train.frozen_through = through
        parts = Parts(tiny_config, 1)
        parts.model = parts.model.clone(native=True)
        step = make_step(tiny_config, parts, from_device_data=True)
        return step.lower(parts.state, parts.data, parts.seed).cost_analysis()["flops"]

    by_layer = [operations(through) for through in ("", "conv1", "conv2", "conv3", "feature")]
    assert by_layer == sorted(by_layer, reverse=True) and len(set(by_layer)) == 5
    forward = 8 * models.count_operations(models.build_model(tiny_config, 4).clone(native=True), 32, 16)
    assert by_layer[-1] < 1.5 * forward and by_layer[0] > 2.5 * forward


def test_statistics_measured_at_test_are_those_of_frozen_layers_too(config):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 16, 3), np.uint8)

    def measured():
        parts = Parts(config, 1)
        statistics = norm_statistics.make_statistics(parts.model, config, parts.mesh)
        return jax.device_get(statistics(variables_of(parts.state), images))

    of_all = measured()
    config.train.frozen_through = "feature"
    jax.tree.map(np.testing.assert_array_equal, measured(), of_all)


def test_the_layers_are_those_of_table_1(config):
    model = models.JLML(5)
    assert model.layers() == ("conv1", "conv2", "conv3", "conv4", "conv5", "feature") and model.frozen_layers() == ()
    assert model.clone(frozen_through="conv3").frozen_layers() == ("conv1", "conv2", "conv3")
    assert models.JLML(5, branches="local", local_widths=(4,)).layers() == ("conv1", "conv2", "feature")


# --- runs

@pytest.fixture
def further(tiny_run):
    """The config of a run that starts from `tiny_run`, on the same people."""
    config = load_run(tiny_run).config
    config.init_from, config.train.frozen_through = str(tiny_run), "conv2"
    return config


def test_a_run_keeps_the_layers_that_it_starts_from(further, tiny_run, tmp_path, capsys):
    further.data.loader, further.train.steps = "tf_data", 2
    train_and_evaluate(further, tmp_path / "run", "train")
    assert "the identity layers are new\nfrozen: conv1, conv2\n" in capsys.readouterr().out
    assert_frozen_alone_stay(load_run(tiny_run).variables, load_run(tmp_path / "run").variables, "conv2")


def test_a_frozen_run_goes_on_where_it_stopped_and_another_one_from_its_end(further, tiny_run, tmp_path):
    assert train_and_evaluate(further, tmp_path / "whole")
    assert_frozen_alone_stay(load_run(tiny_run).variables, load_run(tmp_path / "whole").variables, "conv2")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "12")
    (tmp_path / "stopped" / "metrics.jsonl").unlink()
    train_and_evaluate(further, tmp_path / "stopped", "train")
    jax.tree.map(np.testing.assert_array_equal, *(load_run(tmp_path / name).variables for name in ("whole", "stopped")))
    assert lines_of(tmp_path / "stopped")[-1] == lines_of(tmp_path / "whole")[-1]
    with pytest.raises(UserError, match=r"train.frozen_through \('conv2' there, 'conv1' here\)"):
        further.train.frozen_through = "conv1"
        train_and_evaluate(further, tmp_path / "whole")

    further.update_from_flattened_dict({"init_from": str(tmp_path / "whole"), "keep_identity_layers": True,
                                        "train.frozen_through": "", "train.steps": 0})
    train_and_evaluate(further, tmp_path / "next", "train")
    jax.tree.map(np.testing.assert_array_equal, *(load_run(tmp_path / name).variables for name in ("whole", "next")))


def test_a_run_from_before_the_field_had_nothing_frozen(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["frozen_through"]
    path.write_text(json.dumps(saved))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    config = load_run(tmp_path / "run").config
    assert config.train.frozen_through == ""
    train_and_evaluate(config, tmp_path / "run", "train")
    assert "resuming after step 6" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "run").variables, load_run(tiny_run).variables)


@pytest.mark.parametrize(("fields", "message"), [
    ({"init_from": ""}, "train.frozen_through=conv2 would freeze random weights; give the run whose weights to freeze, "
                        "--config.init_from, or no train.frozen_through"),
    ({"init_from": "", "train.frozen_through": "conv6"},
     "train.frozen_through='conv6' is unknown; known are conv1, conv2, conv3, feature, and the empty text, which "
     "freezes nothing"),
    ({"train.norm_by_camera": True}, "train.frozen_through=conv2 keeps statistics of all cameras together, and "
                                     "train.norm_by_camera=True normalises by each camera's; give one of the two"),
])
def test_what_cannot_be_frozen_is_refused(further, tmp_path, fields, message):
    further.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as raised:
        train_and_evaluate(further, tmp_path / "run")
    assert str(raised.value) == message
    assert not (tmp_path / "run").exists()
