import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jlml_jax import parallel
from jlml_jax.layers import GLOBAL_PSEUDO_COUNT, BatchNorm, Conv, he_normal, max_pool

SIZES = [(9, 7), (8, 6), (4, 2), (2, 2), (1, 1)]  # larger and smaller than a 3x3 window, odd and even


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- convolution

def convolve(x, kernel, stride):
    """A symmetrically padded convolution in float64, window by window."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    return np.stack([np.stack([np.einsum("bijc,ijcd->bd", padded[:, r:r + size, c:c + size], kernel.astype(np.float64))
                               for c in columns], axis=1) for r in rows], axis=1)


@functools.cache
def convolutions(kernel_size, stride, channels, native):
    """Values and gradients (to input and kernel) on maps of all `SIZES`, compiled at once."""
    layer = Conv(4, kernel_size, stride, native=native)

    def values(xs, kernel):
        return [layer.apply({"params": {"kernel": kernel}}, x) for x in xs]

    def weighted(xs, kernel):  # by other weights everywhere, so that no gradient is alike
        return sum((y * normal(*y.shape, seed=1)).sum() for y in values(xs, kernel))

    @jax.jit
    def both(xs, kernel):
        return values(xs, kernel), jax.grad(weighted, argnums=(0, 1))(xs, kernel)

    xs = [normal(2, height, width, channels) for height, width in SIZES]
    return xs, normal(kernel_size, kernel_size, channels, 4, seed=2), both


CONVOLUTIONS = [(1, 1, 3), (1, 2, 3), (3, 1, 3), (3, 1, 6), (3, 2, 3), (3, 2, 6)]  # few input channels, and more


@pytest.mark.parametrize("kernel_size, stride, channels", CONVOLUTIONS)
def test_both_forms_of_convolution_agree(kernel_size, stride, channels):
    results = []
    for native in (True, False):
        xs, kernel, both = convolutions(kernel_size, stride, channels, native)
        results.append(both(xs, kernel))
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kernel_size, stride, channels", CONVOLUTIONS)
def test_convolution_against_numpy(kernel_size, stride, channels, native):
    xs, kernel, both = convolutions(kernel_size, stride, channels, native)
    values, (x_gradients, kernel_gradient) = both(xs, kernel)
    expected_kernel_gradient = np.zeros(kernel.shape)
    for x, value, x_gradient in zip(xs, values, x_gradients, strict=True):
        assert value.shape == (2, -(-x.shape[1] // stride), -(-x.shape[2] // stride), 4)
        assert_close(value, convolve(x, kernel, stride))
        # The operation is linear in x and in the kernel: <weights, conv(x, k)> gives both gradients their sums.
        weights = normal(*value.shape, seed=1)
        np.testing.assert_allclose((x_gradient * x).sum(), (weights * convolve(x, kernel, stride)).sum(),
                                   rtol=1e-3, atol=1e-3)
        for tap in np.ndindex(kernel.shape[:2]):
            for c in range(channels):
                unit = np.zeros(kernel.shape)
                unit[(*tap, c)] = 1
                expected_kernel_gradient[(*tap, c)] += (weights * convolve(x, unit, stride)).sum((0, 1, 2))
    assert_close(kernel_gradient, expected_kernel_gradient)


def test_padding_is_symmetric_where_same_padding_would_not_be():
    x, kernel = np.zeros((1, 4, 4, 1), np.float32), np.zeros((3, 3, 1, 1), np.float32)
    x[0, 0, 0], kernel[1, 1] = 1, 1  # SAME pads an even map at stride 2 below and on the right alone
    for native in (True, False):
        y = Conv(1, 3, 2, native=native).apply({"params": {"kernel": kernel}}, x)
        np.testing.assert_array_equal(y[0, :, :, 0], [[1, 0], [0, 0]])


@pytest.mark.parametrize("native", [True, False])
def test_convolution_computes_in_the_type_asked(native):
    layer = Conv(4, 3, native=native, dtype=jnp.bfloat16)
    for shape in ((8, 8, 3), (8, 8, 6), (2, 2, 6)):
        y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, *shape)))
        assert variables["params"]["kernel"].dtype == jnp.float32 and y.dtype == jnp.bfloat16


def test_kernels_are_he_normal():
    kernel = jax.jit(lambda: he_normal(jax.random.key(0), (3, 3, 32, 64)))()
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 32)), rtol=0.03)
    assert np.abs(kernel).max() > 3.5 * kernel.std()  # not truncated


# --- batch normalisation

def flax_norm(train):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)


@pytest.fixture(scope="module")
def norm_variables():
    return {"params": {"scale": 1 + normal(5) / 4, "bias": normal(5, seed=1)},
            "batch_stats": {"mean": normal(5, seed=2), "var": np.exp(normal(5, seed=3))}}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (16, 5)])
def test_batch_norm_against_flax(train, shape, norm_variables):
    x, weights = 2 * normal(*shape) + 0.5, normal(*shape, seed=1)

    def ours(variables, x):
        return BatchNorm(None).apply(variables, x, train, mutable=["batch_stats"])

    def flax(variables, x):
        return flax_norm(train).apply(variables, x, mutable=["batch_stats"])

    results = []
    for function in (ours, flax):
        def loss(params, x, function=function):
            y, updates = function(norm_variables | {"params": params}, x)
            return (y * weights).sum(), (y, updates)

        gradients, (y, updates) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(norm_variables["params"], x)
        results.append((y, updates["batch_stats"], gradients))
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(actual, expected)
    stats = results[0][1]
    if train:
        expected = 0.9 * norm_variables["batch_stats"]["var"] + 0.1 * x.var(axis=tuple(range(x.ndim - 1)))
        np.testing.assert_allclose(stats["var"], expected, rtol=1e-5)  # the biased variance
    else:
        jax.tree.map(np.testing.assert_array_equal, stats, norm_variables["batch_stats"])


def test_batch_norm_in_evaluation_ignores_the_batch(norm_variables):
    x = normal(6, 5)
    evaluate = jax.jit(lambda x: BatchNorm(None).apply(norm_variables, x, False))
    stats, params = norm_variables["batch_stats"], norm_variables["params"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(evaluate(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluate(x[:1]), evaluate(x)[:1], rtol=1e-5)


def test_batch_norm_starts_from_the_standard_normal():
    variables = jax.jit(lambda x: BatchNorm("batch").init(jax.random.key(0), x, True))(np.full((4, 3), 7, np.float32))
    expected = {"params": {"scale": 1, "bias": 0}, "batch_stats": {"mean": 0, "var": 1}}
    jax.tree.map(lambda x, value: np.testing.assert_array_equal(x, np.full(3, value)), variables, expected)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_batch_norm_of_values_far_from_zero_stays_finite(mean, norm_variables):
    """E[x^2] - E[x]^2 cancels there and may come out below 0."""
    def loss(x):
        y, updates = BatchNorm(None).apply(norm_variables, x, True, mutable=["batch_stats"])
        return (y * normal(64, 5, seed=1)).sum(), (y, updates)

    gradient, results = jax.jit(jax.grad(loss, has_aux=True))(mean + 1e-3 * normal(64, 5))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, results)))
    assert (results[1]["batch_stats"]["var"] >= 0).all()


def test_batch_norm_over_four_devices_takes_the_whole_batchs_statistics(norm_variables):
    x, weights = normal(8, 3, 5) + np.arange(8, dtype=np.float32)[:, None, None], normal(8, 3, 5, seed=1)
    assert len(jax.devices()) == 4
    mesh, rows, whole = parallel.make_mesh(), PartitionSpec("batch"), PartitionSpec()

    def step(axis_name, x, weights):
        def loss(x):
            y, updates = BatchNorm(axis_name).apply(norm_variables, x, True, mutable=["batch_stats"])
            return (y * weights).sum(), (y, updates["batch_stats"])

        gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, stats

    sharded = jax.shard_map(functools.partial(step, "batch"), mesh=mesh, in_specs=(rows, rows),
                            out_specs=(rows, rows, whole), check_vma=False)
    whole_batch = jax.jit(functools.partial(step, None))
    for actual, expected in zip(*map(jax.tree.leaves, (jax.jit(sharded)(x, weights), whole_batch(x, weights))),
                                strict=True):
        assert_close(actual, expected)


def one_hot(groups):
    return np.eye(max(groups) + 1, dtype=np.float32)[groups]


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 5)])
def test_batch_norm_by_groups(norm_variables, shape):
    """By loops, in float64: each group's moments with `GLOBAL_PSEUDO_COUNT` of the whole batch."""
    groups = [0, 1, 0, 2, 0, 1]
    x = normal(*shape) * 2 + np.array(groups, np.float32).reshape(-1, *[1] * (len(shape) - 1))

    def apply(x, cameras):
        return BatchNorm(None).apply(norm_variables, x, True, cameras, mutable=["batch_stats"])

    actual, updates = jax.jit(apply)(x, one_hot(groups))
    params, wide = norm_variables["params"], np.asarray(x, np.float64).reshape(6, -1, 5)
    for group in range(3):
        rows = np.array(groups) == group
        mean, square = ((values[rows].mean(1).sum(0) + GLOBAL_PSEUDO_COUNT * values.mean((0, 1)))
                        / (rows.sum() + GLOBAL_PSEUDO_COUNT) for values in (wide, wide ** 2))
        expected = (wide[rows] - mean) / np.sqrt(square - mean ** 2 + 1e-5) * params["scale"] + params["bias"]
        assert_close(actual[rows], expected.reshape(-1, *shape[1:]))
    plain, plain_updates = jax.jit(functools.partial(apply, cameras=None))(x)
    for a, b in zip(*map(jax.tree.leaves, (updates, plain_updates)), strict=True):
        assert_close(a, b)
    assert np.abs(actual - plain).max() > 0.1
    assert_close(jax.jit(apply)(x, one_hot([0] * 6))[0], plain)  # one group is the batch


def test_the_gradient_of_batch_norm_by_groups_is_finite_where_a_group_has_one_image_alone(norm_variables):
    x, weights, groups = np.ones((4, 5), np.float32), normal(4, 5), one_hot([0, 1, 2, 2])

    def loss(x):
        return (BatchNorm(None).apply(norm_variables, x, True, groups, mutable=["batch_stats"])[0] * weights).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


def test_batch_norm_statistics_are_float32_in_half_precision(norm_variables):
    x = (normal(64, 5) + 30).astype(jnp.bfloat16)
    norm = BatchNorm(None, dtype=jnp.bfloat16)
    y, updates = jax.jit(lambda x: norm.apply(norm_variables, x, True, mutable=["batch_stats"]))(x)
    assert y.dtype == jnp.bfloat16 and updates["batch_stats"]["var"].dtype == jnp.float32
    expected = 0.9 * norm_variables["batch_stats"]["mean"] + 0.1 * np.asarray(x, np.float64).mean(axis=0)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected, rtol=1e-5)


# --- max-pooling

POOLS = [((3, 3), (2, 2), ((1, 1), (1, 1))), ((2, 2), (1, 2), ((0, 1), (0, 0)))]


def pooled_by_loops(x, window, strides, padding):
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    rows = range(0, x.shape[1] - window[0] + 1, strides[0])
    columns = range(0, x.shape[2] - window[1] + 1, strides[1])
    return np.stack([np.stack([x[:, r:r + window[0], c:c + window[1]].max((1, 2)) for c in columns], axis=1)
                     for r in rows], axis=1)


@pytest.mark.parametrize("pool", POOLS)
def test_both_forms_of_max_pooling_agree(pool):
    xs = [normal(4, *size, 3) for size in ((9, 7), (4, 2))]
    for x in xs:
        x[2:] -= 10  # all negative: zeros padded in would win

    def weighted(native, xs):
        ys = [max_pool(x, *pool, native=native) for x in xs]
        return sum((y * normal(*y.shape, seed=1)).sum() for y in ys), ys

    results = [jax.jit(jax.grad(functools.partial(weighted, native), has_aux=True))(xs) for native in (True, False)]
    for gradients, ys in results:
        for x, y, gradient, expected in zip(xs, ys, gradients, results[0][0], strict=True):
            np.testing.assert_array_equal(y, pooled_by_loops(x, *pool))
            assert np.abs(gradient).max() > 0
            np.testing.assert_allclose(gradient, expected, atol=1e-6)  # there are no ties
            np.testing.assert_array_equal(y, nn.max_pool(x, *pool))


def test_both_forms_share_a_gradient_after_relu_in_spite_of_its_ties():
    x, weights = normal(2, 8, 6, 3) - 1, normal(2, 4, 3, 3)  # mostly zeros after ReLU

    def gradient(native):
        return jax.jit(jax.grad(lambda x: (max_pool(nn.relu(x), *POOLS[0], native=native) * weights).sum()))(x)

    np.testing.assert_allclose(gradient(True), gradient(False), atol=1e-6)
