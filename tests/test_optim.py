import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from jlml_jax.errors import UserError
from jlml_jax.optim import learning_rate_schedule, make_optimizer


def settings(**fields):
    optim = default.get_config().optim
    optim.update(fields)
    return optim


def rates(steps, total_steps=50_000, **fields):
    """As the training step computes them: compiled, from an int32 count."""
    schedule = jax.jit(learning_rate_schedule(settings(**fields), total_steps))
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_the_papers_steps():
    steps = [0, 19_999, 20_000, 39_999, 40_000, 49_999]
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose(rates(steps), expected, rtol=1e-6)
    schedule = learning_rate_schedule(settings(), 50_000)
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, rtol=1e-6)  # as the log reads it


@pytest.mark.parametrize("decay_every", [1, 10, 41, 400, 1_700, 1_900, 3_900, 6_800, 20_000, 100_000])
def test_a_decay_comes_at_its_step(decay_every):
    """Compiled, a division by a constant may become a product with its rounded inverse, one step late."""
    steps = [times * decay_every + offset for times in (1, 2, 3) for offset in (-1, 0)]
    expected = [10.0 ** -(2 + step // decay_every) for step in steps]
    np.testing.assert_allclose(rates(steps, 10 ** 6, decay_every=decay_every), expected, rtol=1e-5)


def test_cosine_falls_to_zero():
    start, middle, end = rates([0, 500, 1000], 1000, schedule="cosine")
    np.testing.assert_allclose([start, middle], [0.01, 0.005], rtol=1e-5)
    assert abs(end) < 1e-9
    assert (np.diff(rates(range(0, 1001, 50), 1000, schedule="cosine")) < 0).all()


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_rises_to_the_schedule(schedule):
    steps = [0, 1, 4, 9, 10, 500]
    plain = np.array(rates(steps, 1000, schedule=schedule))
    warm = rates(steps, 1000, schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose(warm, plain * [0.1, 0.2, 0.5, 1, 1, 1], rtol=1e-6)
    assert warm[0] > 0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"optim\.schedule='linear'.*step, cosine"):
        learning_rate_schedule(settings(schedule="linear"), 10)


@pytest.mark.parametrize("momentum, weight_decay, nesterov", [(0.9, 0.0, False), (0.9, 0.1, False), (0.0, 0.1, False),
                                                              (0.9, 0.1, True)])
def test_updates_against_momentum_by_hand(momentum, weight_decay, nesterov):
    rng = np.random.default_rng(0)
    params = {"conv": {"kernel": rng.normal(size=(3, 2))}, "norm": {"scale": rng.normal(size=2),
                                                                    "bias": rng.normal(size=2)}}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    fields = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "decay_every": 2}
    optimizer = make_optimizer(settings(**fields), 10)
    state = optimizer.init(params)
    by_hand = {path: leaf.astype(np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    velocity = {path: np.zeros(leaf.shape) for path, leaf in by_hand.items()}
    for rate in (0.01, 0.01, 0.001):
        gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            if path[-1].key == "kernel":
                gradient = gradient + weight_decay * by_hand[path]
            velocity[path] = momentum * velocity[path] + gradient
            by_hand[path] -= rate * (gradient + momentum * velocity[path] if nesterov else velocity[path])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_allclose(leaf, by_hand[path], rtol=1e-5, err_msg=path)
