import functools
import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import default
from jlml_jax.errors import UserError
from jlml_jax.layers import max_pool
from jlml_jax.models import JLML, build_model, check_input_size, init_variables

TINY = {"stem_features": 4, "global_widths": (4, 8), "local_widths": (4, 8), "depth": 1, "global_feature_dim": 6,
        "local_feature_dim": 10, "native": False}


def abstract(size=(224, 224), num_identities=0, **fields):
    """Shapes of the variables, of the outputs and of what every module gives, without computing anything."""
    return trace(size, num_identities, frozenset(fields.items()))


@functools.cache
def trace(size, num_identities, fields):
    model = JLML(num_identities, **dict(fields))
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    outputs, variables = jax.eval_shape(functools.partial(model.init_with_output, capture_intermediates=True,
                                                          mutable=True), jax.random.key(0), images)
    shapes = {tuple(key.key for key in path[:-2]): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(variables.pop("intermediates"))
              if path[-2].key == "__call__"}
    return variables, outputs, shapes


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_parameters(num_identities=0, **fields):
    return count(abstract(num_identities=num_identities, **fields)[0]["params"])


shallow = functools.partial(abstract, depth=1)  # faster to trace, for what does not depend on depth


def initialised(seed=0, size=(32, 16), **fields):
    model = JLML(**({"num_identities": 5} | TINY | fields))
    return model, init_variables(model, seed, *size)


# --- Table 1

def test_stem_and_pools_of_table_1():
    _, _, shapes = abstract()
    assert shapes["stem",] == (1, 112, 112, 32)
    assert [key for key in shapes if len(key) == 1 and "stem" in key[0]] == [("stem",)]
    pools = {((3, 3), (2, 2), ((1, 1), (1, 1))): ((1, 112, 112, 32), (1, 56, 56, 32)),
             ((2, 2), (1, 2), ((0, 1), (0, 0))): ((1, 28, 112, 32), (1, 28, 56, 32))}
    for arguments, (before, after) in pools.items():
        for native in (True, False):
            pool = functools.partial(max_pool, window=arguments[0], strides=arguments[1], padding=arguments[2],
                                     native=native)
            assert jax.eval_shape(pool, jax.ShapeDtypeStruct(before, jnp.float32)).shape == after


@pytest.mark.parametrize("towers, sizes, widths", [
    (["global_tower"], [(56, 56), (28, 28), (14, 14), (7, 7)], [32, 64, 128, 256]),
    ([f"local_tower_{j}" for j in range(4)], [(28, 56), (14, 28), (7, 14), (4, 7)], [16, 32, 64, 128]),
])
def test_stages_of_table_1(towers, sizes, widths):
    variables, _, shapes = abstract()
    for tower in towers:
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True), start=2):
            for unit in (1, 2, 3):
                name = f"conv{stage}_{unit}"
                for conv, features in (("conv1", width), ("conv2", width), ("conv3", 2 * width)):
                    assert shapes[tower, name, conv] == (1, *size, features)
                assert shapes[tower, name] == (1, *size, 2 * width)
                kernels = variables["params"][tower][name]
                assert [kernels[conv]["kernel"].shape[0] for conv in ("conv1", "conv2", "conv3")] == [1, 3, 1]
                agrees = unit > 1 or (stage == 2 and width == 16)  # the local stem has conv2_1's 32 features already
                assert ("shortcut_conv" in kernels) != agrees
        assert shapes[tower,] == (1, 2 * widths[-1])
        assert len([key for key in shapes if key[0] == tower and len(key) == 2]) == 12


def test_features_and_logits_of_table_1():
    variables, outputs, _ = abstract(num_identities=751)
    assert {name: x.shape for name, x in outputs["features"].items()} == {"global": (1, 512), "local": (1, 512)}
    assert {name: x.shape for name, x in outputs["logits"].items()} == {"global": (1, 751), "local": (1, 751)}
    params = variables["params"]
    assert params["global_head"]["fc"]["kernel"].shape == (512, 512)
    assert params["local_head"]["fc"]["kernel"].shape == (1024, 512)
    assert params["local_identity"]["kernel"].shape == params["global_identity"]["kernel"].shape == (512, 751)


def test_thirty_nine_layers():
    """The paper counts conv1, 4 stages of 9 convs, the feature fc and the identity fc along a branch."""
    _, _, shapes = abstract(num_identities=751)
    convs = [key for key in shapes if key[0] == "global_tower" and key[-1] in ("conv1", "conv2", "conv3")]
    assert 1 + len(convs) + 2 == 39


def test_parameters():
    assert num_parameters() == 7_790_624
    assert num_parameters(751) == 8_561_150 == 7_790_624 + 2 * (512 * 751 + 751)


def test_multiply_adds():
    """Convs and feature fcs: every output value costs its kernel's inputs."""
    variables, _, shapes = abstract()
    total = 0
    for path, kernel in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *module, leaf = (key.key for key in path)
        if leaf == "kernel":
            total += math.prod(shapes[tuple(module)]) * math.prod(kernel.shape[:-1])
    assert total == 789_897_216


def test_operations_that_xla_counts():
    model, variables = JLML(0), abstract()[0]
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    flops = jax.jit(model.apply).lower(variables, images).cost_analysis()["flops"]
    assert flops == pytest.approx(1.5e9, rel=0.02)


# --- ablations and other fields

@pytest.mark.parametrize("branch, absent", [("global", "local"), ("local", "global")])
def test_one_branch_alone(branch, absent):
    variables, outputs, _ = shallow(num_identities=751, branches=branch)
    assert outputs["features"].keys() == outputs["logits"].keys() == {branch}
    assert not [name for name in variables["params"] if absent in name]
    both = shallow(num_identities=751)[0]["params"]
    assert count(variables["params"]) == sum(count(tree) for name, tree in both.items() if absent not in name)


def test_one_joint_loss():
    variables, outputs, _ = shallow(num_identities=751, loss="uni")
    assert {name: x.shape for name, x in outputs["logits"].items()} == {"joint": (1, 751)}
    assert outputs["features"].keys() == {"global", "local"}
    assert variables["params"]["joint_identity"]["kernel"].shape == (1024, 751)
    assert num_parameters(751, loss="uni", depth=1) == num_parameters(depth=1) + 1024 * 751 + 751


def test_the_joint_head_reads_global_then_local():
    model, variables = initialised(loss="uni", size=(16, 8), num_strips=2, global_widths=(4,), local_widths=(4,))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8, 3)), jnp.float32)
    outputs = jax.jit(model.apply)(variables, images)
    joint = np.concatenate([outputs["features"]["global"], outputs["features"]["local"]], axis=1)
    expected = joint @ variables["params"]["joint_identity"]["kernel"]
    np.testing.assert_allclose(outputs["logits"]["joint"], expected, rtol=1e-4, atol=1e-4)


def test_a_stem_a_branch():
    variables, _, _ = shallow(shared_stem=False)
    assert {"global_stem", "local_stem"} < variables["params"].keys() and "stem" not in variables["params"]
    assert num_parameters(shared_stem=False, depth=1) - num_parameters(depth=1) == 3 * 3 * 3 * 32 + 2 * 32
    assert num_parameters(751, shared_stem=False, depth=1, branches="global") == num_parameters(
        751, depth=1, branches="global")


@pytest.mark.parametrize("num_strips", [1, 2, 8])
def test_number_of_strips(num_strips):
    variables, outputs, shapes = shallow(num_strips=num_strips)
    towers = [name for name in variables["params"] if name.startswith("local_tower_")]
    assert len(towers) == num_strips
    assert all(shapes[tower, "conv2_1"] == (1, 112 // num_strips, 56, 32) for tower in towers)
    assert variables["params"]["local_head"]["fc"]["kernel"].shape == (256 * num_strips, 512)
    assert outputs["features"]["local"].shape == (1, 512)


@pytest.mark.parametrize("size, strips", [((160, 64), 4), ((36, 20), 3), ((8, 4), 2)])
def test_other_image_sizes(size, strips):
    check_input_size(*size, strips)
    _, outputs, shapes = shallow(size=size, num_strips=strips, branches="local")
    assert shapes["stem",] == (1, size[0] // 2, size[1] // 2, 32)
    assert outputs["features"]["local"].shape == (1, 512)


def test_cosine_identity_layers():
    model = JLML(7, depth=1, stem_features=4, global_widths=(4, 8), local_widths=(4, 8), num_strips=2,
                 global_feature_dim=6, local_feature_dim=6, cosine_scale=30.0)
    variables = init_variables(model, 0, 16, 8)
    outputs = model.apply(variables, np.random.default_rng(0).normal(size=(5, 16, 8, 3)).astype(np.float32))
    for head in ("global", "local"):
        assert variables["params"][f"{head}_identity"].keys() == {"kernel"}
        feature, kernel = outputs["features"][head], variables["params"][f"{head}_identity"]["kernel"]
        lengths = np.linalg.norm(feature, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
        np.testing.assert_allclose(outputs["logits"][head], 30 * (feature @ kernel) / lengths, rtol=1e-4, atol=1e-5)


def test_no_identities_no_identity_layers():
    variables, outputs, _ = shallow()
    assert outputs["logits"] == {}
    assert not [name for name in variables["params"] if "identity" in name]


def test_norm_then_relu_after_the_feature_layer():
    model, variables = initialised(size=(16, 8), num_strips=1, global_widths=(4,), local_widths=(4,), num_identities=0,
                                   feature_norm=True, feature_relu=True)
    images = np.random.default_rng(0).normal(size=(4, 16, 8, 3)).astype(np.float32)
    outputs, state = jax.jit(functools.partial(model.apply, train=True, capture_intermediates=True,
                                               mutable=["intermediates", "batch_stats"]))(variables, images)
    for branch in ("global", "local"):
        head = state["intermediates"][f"{branch}_head"]
        normed = head["norm"]["__call__"][0]
        np.testing.assert_allclose(normed.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(normed.std(axis=0), 1, atol=1e-2)
        np.testing.assert_array_equal(outputs["features"][branch], np.maximum(normed, 0))
    assert "norm" not in shallow()[0]["params"]["global_head"]


# --- strips

@pytest.fixture(scope="module")
def network_of_strips():
    """Images [2, 64, 8, 3] to the local and the pooled features [2, strip, D]; a strip is 16 image rows."""
    model, variables = initialised(size=(64, 8), branches="local", num_identities=0)
    compiled = jax.jit(functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"]))

    def apply(images):
        outputs, state = compiled(variables, images)
        towers = state["intermediates"]
        return outputs["features"]["local"], np.stack(
            [towers[f"local_tower_{j}"]["__call__"][0] for j in range(4)], axis=1)

    return variables, apply


@pytest.fixture
def pooled_by_strip(network_of_strips):
    return lambda images: network_of_strips[1](images)[1]


@pytest.mark.parametrize("strip", range(4))
def test_a_strip_is_seen_by_its_own_tower_alone(pooled_by_strip, strip):
    images = np.random.default_rng(0).normal(size=(2, 64, 8, 3)).astype(np.float32)
    changed = images.copy()
    rows = slice(16 * strip, 16 * strip + 15)  # the stem's window takes the last row into the next strip too
    changed[:, rows] += 1
    before, after = pooled_by_strip(images), pooled_by_strip(changed)
    others = [j for j in range(4) if j != strip]
    np.testing.assert_array_equal(after[:, others], before[:, others])
    assert np.abs(after[:, strip] - before[:, strip]).max() > 1e-3


def test_strips_are_cut_after_the_stem_not_out_of_the_image(pooled_by_strip):
    images = np.random.default_rng(0).normal(size=(2, 64, 8, 3)).astype(np.float32)
    changed = images.copy()
    changed[:, 15] += 1  # the last row of strip 0, under a stem window of strip 1
    differs = np.abs(pooled_by_strip(changed) - pooled_by_strip(images)).max(axis=(0, 2)) > 1e-4
    np.testing.assert_array_equal(differs, [True, True, False, False])


def test_local_features_are_strip_major(network_of_strips):
    """The exclusive penalty takes rows j * d to (j + 1) * d - 1 of the feature layer for strip j's."""
    variables, apply = network_of_strips
    features, pooled = apply(np.random.default_rng(0).normal(size=(2, 64, 8, 3)).astype(np.float32))
    kernel = variables["params"]["local_head"]["fc"]["kernel"]
    np.testing.assert_allclose(features, pooled.reshape(2, -1) @ kernel, rtol=1e-4, atol=1e-5)
    assert (features < 0).any()  # no ReLU unless asked


# --- sizes refused, initial values

@pytest.mark.parametrize("height, width, strips, nearest", [(222, 224, 4, 224), (230, 64, 4, 232), (224, 224, 3, 222),
                                                            (4, 4, 4, 8)])
def test_a_height_that_strips_do_not_divide_is_refused(height, width, strips, nearest):
    with pytest.raises(UserError, match=rf"data\.height={height}.*num_strips={strips}.* {nearest}$"):
        check_input_size(height, width, strips)
    check_input_size(nearest, width, strips)


@pytest.mark.parametrize("height, width", [(225, 224), (224, 63), (2, 64), (64, 0)])
def test_an_odd_or_tiny_size_is_refused(height, width):
    with pytest.raises(UserError, match=rf"data\.height={height}.*data\.width={width}"):
        check_input_size(height, width, 1)


def test_initial_variables_have_the_tree_of_flax():
    model, variables = initialised(feature_norm=True)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 16, 3)))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    for ours, flax in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert isinstance(ours, np.ndarray) and (ours.shape, ours.dtype) == (flax.shape, flax.dtype)


def test_initial_values():
    variables = init_variables(JLML(751, depth=2), 0, 224, 224)
    for path, values in jax.tree_util.tree_leaves_with_path(variables):
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(values.shape[:-1])
            error = math.sqrt(2 / fan_in / values.size)
            assert abs(values.std() / math.sqrt(2 / fan_in) - 1) < 5 / math.sqrt(2 * values.size), path
            assert abs(values.mean()) < 5 * error, path
        else:
            np.testing.assert_array_equal(values, {"scale": 1, "var": 1, "bias": 0, "mean": 0}[name], err_msg=path)
    wide = variables["params"]["global_tower"]["conv5_2"]["conv2"]["kernel"]
    assert np.abs(wide).max() > 3.5 * wide.std()  # not truncated


def test_initial_values_are_a_function_of_seed_and_place():
    params, again, other = (initialised(seed)[1]["params"] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for path, values in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            assert not np.array_equal(values, functools.reduce(lambda tree, key: tree[key.key], path, other)), path
    first, second = params["local_tower_0"]["conv2_1"], params["local_tower_1"]["conv2_1"]
    assert not np.array_equal(first["conv1"]["kernel"], second["conv1"]["kernel"])
    assert not np.array_equal(params["global_identity"]["kernel"], params["local_identity"]["kernel"][:6])


def test_units_of_one_shape_are_traced_once():
    model = JLML(5, **TINY | {"depth": 3})
    images = jnp.zeros((2, 32, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    traced = jax.make_jaxpr(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
    units = [call.params["jaxpr"] for call in traced.eqns if call.params.get("name") == "core_fn"]
    towers, stages = 1 + model.num_strips, len(model.global_widths)
    assert len(units) == towers * stages * model.depth
    assert len({id(unit) for unit in units}) == 2 * stages * 2  # a stage's first and its others, global and local


def test_a_model_of_a_config_read_from_json_is_the_same_and_hashable():
    config = default.get_config()
    read = ml_collections.ConfigDict(json.loads(config.to_json()))
    assert isinstance(read.model.global_widths, list)
    assert build_model(read, 5) == build_model(config, 5)
    assert hash(build_model(read, 5)) == hash(build_model(config, 5))
