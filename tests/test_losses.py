import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jlml_jax.errors import UserError
from jlml_jax.losses import batch_hard_triplet, check_fields, cross_entropy, exclusive_l12_norm, jlml_loss, l21_norm

STRIPS = 4


def reference_l21(kernel):
    """Eq. 1 and its gradient in float64, a loop at a time."""
    value, gradient = 0.0, np.zeros(kernel.shape)
    for i, row in enumerate(kernel.astype(np.float64)):
        norm = sum(w * w for w in row) ** 0.5
        value += norm
        if norm:
            gradient[i] = row / norm
    return value, gradient


def reference_exclusive_l12(kernel, strips=STRIPS):
    """Eq. 2 and its gradient in float64, a loop at a time."""
    rows, outputs = kernel.shape
    value, gradient = 0.0, np.zeros(kernel.shape)
    for i in range(outputs):
        for j in range(strips):
            own = range(j * rows // strips, (j + 1) * rows // strips)
            l1 = sum(abs(float(kernel[k, i])) for k in own)
            value += l1 ** 2
            for k in own:
                gradient[k, i] = 2 * l1 * np.sign(float(kernel[k, i]))
    return value, gradient


PENALTIES = [(l21_norm, reference_l21), (functools.partial(exclusive_l12_norm, num_strips=STRIPS),
                                         reference_exclusive_l12)]


def random_kernel(shape=(24, 7), seed=0):
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    kernel[3] = 0
    kernel[10] *= 1e-3
    return kernel


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("penalty, reference", PENALTIES, ids=["l21", "exclusive_l12"])
def test_penalties_against_float64(penalty, reference, jit):
    function = jax.value_and_grad(penalty)
    value, gradient = (jax.jit(function) if jit else function)(random_kernel())
    expected, expected_gradient = reference(random_kernel())
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5)


@pytest.mark.parametrize("penalty, reference", PENALTIES, ids=["l21", "exclusive_l12"])
def test_penalties_under_vmap_and_jit_against_float64(penalty, reference):
    """jaxlib 0.10.2 miscompiled a batched sum of squares (jax issue 39103)."""
    kernels = np.stack([random_kernel(seed=seed) for seed in range(5)])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(penalty)))(kernels)
    for kernel, value, gradient in zip(kernels, values, gradients, strict=True):
        expected, expected_gradient = reference(kernel)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5)


@pytest.mark.parametrize("penalty, _", PENALTIES, ids=["l21", "exclusive_l12"])
def test_zeros_have_gradient_zero(penalty, _):
    gradient = jax.jit(jax.grad(penalty))
    np.testing.assert_array_equal(gradient(random_kernel())[3], 0)
    np.testing.assert_array_equal(gradient(np.zeros((24, 7), np.float32)), 0)
    assert jax.jit(penalty)(np.zeros((24, 7), np.float32)) == 0


def test_rows_compete_within_their_strip_alone():
    kernel = random_kernel()
    rng = np.random.default_rng(1)
    within = np.concatenate([6 * j + rng.permutation(6) for j in range(STRIPS)])
    across = np.arange(24).reshape(STRIPS, 6).T.ravel()  # what a strip-minor order would take for strips
    l21, exclusive_l12 = (jax.jit(penalty) for penalty, _ in PENALTIES)
    value = exclusive_l12(kernel)
    np.testing.assert_allclose(exclusive_l12(kernel[within]), value, rtol=1e-6)
    assert abs(exclusive_l12(kernel[across]) / value - 1) > 1e-3
    np.testing.assert_allclose(l21(kernel[across]), l21(kernel), rtol=1e-6)


def test_by_hand():
    kernel = np.array([[3, -4], [0, 0], [-1, 0], [2, 1]], np.float32)
    np.testing.assert_allclose(jax.jit(l21_norm)(kernel), 5 + 0 + 1 + 5 ** 0.5, rtol=1e-6)
    exclusive_l12 = jax.jit(exclusive_l12_norm, static_argnums=1)
    assert exclusive_l12(kernel, 2) == 3 ** 2 + 4 ** 2 + (1 + 2) ** 2 + 1 ** 2
    assert exclusive_l12(kernel, 4) == (kernel ** 2).sum()


def test_rows_that_do_not_divide_into_strips_are_refused():
    with pytest.raises(ValueError, match="10 rows.*4 strips"):
        exclusive_l12_norm(jnp.ones((10, 2)), 4)


def reference_cross_entropy(logits, labels, smoothing):
    logits = np.asarray(logits, np.float64)
    losses = []
    for row, label in zip(logits, labels, strict=True):
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(-(target * log_p).sum())
    return np.mean(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_against_float64(smoothing, scale):
    rng = np.random.default_rng(0)
    logits, labels = scale * rng.normal(size=(6, 9)).astype(np.float32), rng.integers(0, 9, 6)
    function = jax.jit(jax.value_and_grad(cross_entropy))
    value, gradient = function(logits, labels, smoothing)
    np.testing.assert_allclose(value, reference_cross_entropy(logits, labels, smoothing), rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)  # softmax minus target, both of sum 1


def test_cross_entropy_of_equal_logits_is_that_of_chance():
    logits = np.full((4, 751), 1e6, np.float32)
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, np.arange(4)), np.log(751), rtol=1e-6)


def test_labels_are_not_smoothed_unless_asked_for():
    outputs, params, labels = inputs(["global"], ["global"])
    expected = reference_cross_entropy(outputs["logits"]["global"], labels, 0.0)
    np.testing.assert_allclose(cross_entropy(outputs["logits"]["global"], labels), expected, rtol=1e-5)
    loss, _ = jlml_loss(outputs, params, labels, lambda_global=0.0, lambda_local=0.0, num_strips=STRIPS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_weights_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        jlml_loss(*inputs(["global"], ["global"]), 0.0, 0.0, STRIPS)


def inputs(heads, branches=("global", "local")):
    rng = np.random.default_rng(0)
    outputs = {"features": {branch: jnp.zeros((6, 7)) for branch in branches},
               "logits": {head: jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for head in heads}}
    params = {f"{branch}_head": {"fc": {"kernel": random_kernel(seed=seed)}} for seed, branch in enumerate(branches)}
    return outputs, params, rng.integers(0, 5, 6)


def test_the_loss_is_eq_5_summed_over_the_branches():
    outputs, params, labels = inputs(["global", "local"])
    loss, terms = jax.jit(functools.partial(jlml_loss, lambda_global=0.3, lambda_local=0.02, num_strips=STRIPS,
                                            label_smoothing=0.1))(outputs, params, labels)
    expected = {
        "cross_entropy/global": reference_cross_entropy(outputs["logits"]["global"], labels, 0.1),
        "cross_entropy/local": reference_cross_entropy(outputs["logits"]["local"], labels, 0.1),
        "penalty/global": 0.3 * reference_l21(params["global_head"]["fc"]["kernel"])[0],
        "penalty/local": 0.02 * reference_exclusive_l12(params["local_head"]["fc"]["kernel"])[0],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-5)
    assert terms["loss"] == loss
    for head in ("global", "local"):
        hits = [row.argmax() == label for row, label in zip(np.asarray(outputs["logits"][head]), labels, strict=True)]
        np.testing.assert_allclose(terms[f"accuracy/{head}"], np.mean(hits), rtol=1e-6)


@pytest.mark.parametrize("heads, branches", [(["global", "local"], ("global", "local")),
                                             (["joint"], ("global", "local")),
                                             (["global"], ("global",)), (["local"], ("local",))])
def test_terms_by_head_and_branch(heads, branches):
    outputs, params, labels = inputs(heads, branches)
    loss, terms = jax.jit(functools.partial(jlml_loss, lambda_global=1e-2, lambda_local=1e-2, num_strips=STRIPS))(
        outputs, params, labels)
    penalties = {f"penalty/{branch}" for branch in branches}
    entropies = {f"cross_entropy/{head}" for head in heads}
    assert terms.keys() == {"loss"} | penalties | entropies | {f"accuracy/{head}" for head in heads}
    np.testing.assert_allclose(loss, sum(terms[name] for name in penalties | entropies), rtol=1e-6)


def test_the_penalties_gradient_reaches_the_feature_layers_and_weight_0_turns_it_off():
    outputs, params, labels = inputs(["global", "local"])

    @jax.jit
    def gradient(weight):
        return jax.grad(lambda params: jlml_loss(outputs, params, labels, lambda_global=weight, lambda_local=weight,
                                                 num_strips=STRIPS)[0])(params)

    for branch, (_, reference) in zip(("global", "local"), PENALTIES, strict=True):
        kernel = params[f"{branch}_head"]["fc"]["kernel"]
        np.testing.assert_allclose(gradient(0.5)[f"{branch}_head"]["fc"]["kernel"], 0.5 * reference(kernel)[1],
                                   rtol=1e-5)
        np.testing.assert_array_equal(gradient(0.0)[f"{branch}_head"]["fc"]["kernel"], 0)


# --- beyond the paper

def reference_triplet(features, labels, margin):
    """Batch-hard over all images, in float64, an image at a time."""
    unit = np.asarray(features, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    losses = []
    for anchor, label in enumerate(labels):
        distances = np.linalg.norm(unit - unit[anchor], axis=1)
        positives = [distances[i] for i in range(len(labels)) if labels[i] == label and i != anchor]
        negatives = [distances[i] for i in range(len(labels)) if labels[i] != label]
        losses.append(max(0.0, margin + max(positives) - min(negatives)) if positives and negatives else 0.0)
    return np.mean(losses)


def triplet_features(seed=0, size=(12, 7)):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 9, 9, 9, 9, 1, 2],
                                    [7] * 12, list(range(12))])
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.5])
def test_triplets_against_float64(labels, margin):
    labels = np.array(labels)
    value, gradient = jax.jit(jax.value_and_grad(batch_hard_triplet))(triplet_features(), labels, margin)
    np.testing.assert_allclose(value, reference_triplet(triplet_features(), labels, margin), rtol=1e-5, atol=1e-7)
    step = 1e-5 * np.random.default_rng(1).normal(size=(12, 7))
    moved = [reference_triplet(triplet_features() + sign * step, labels, margin) for sign in (1, -1)]
    np.testing.assert_allclose((gradient * step).sum(), (moved[0] - moved[1]) / 2, rtol=1e-3, atol=1e-9)


def test_a_triplet_knows_no_scale():
    labels = np.repeat(np.arange(4), 3)
    one, other = (batch_hard_triplet(scale * triplet_features(), labels, 0.3) for scale in (1, 1e3))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_equal_features_and_zeros_have_a_finite_gradient():
    features = np.repeat(triplet_features(size=(3, 7)), 2, axis=0)
    features[2:4] = 0
    gradient = jax.grad(batch_hard_triplet)(features, np.array([0, 0, 1, 1, 2, 2]), 0.3)
    assert np.isfinite(gradient).all()


def test_triplets_are_looked_for_on_all_devices():
    labels = np.array([0, 0, 1, 1, 1, 1, 2, 3])  # split between four devices, a person's images lie on several
    features = triplet_features(size=(8, 7))
    mapped = jax.pmap(functools.partial(batch_hard_triplet, axis_name="batch"), axis_name="batch",
                      in_axes=(0, 0, None), devices=jax.devices()[:4])
    for margin in (0.3, 1.5):  # by the second, an image that took itself for another one would count
        values = mapped(features.reshape(4, 2, 7), labels.reshape(4, 2), margin)
        np.testing.assert_allclose(values.mean(), reference_triplet(features, labels, margin), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_margin_is_taken_from_the_true_cosine(smoothing):
    outputs, params, labels = inputs(["global", "local"])
    loss, terms = jlml_loss(outputs, params, labels, lambda_global=0.0, lambda_local=0.0, num_strips=STRIPS,
                            label_smoothing=smoothing, margin=0.2, cosine_scale=30.0)
    for head in ("global", "local"):
        logits = np.array(outputs["logits"][head], np.float64)
        hits = (logits.argmax(axis=1) == labels).mean()
        logits[np.arange(6), labels] -= 0.2 * 30
        np.testing.assert_allclose(terms[f"cross_entropy/{head}"], reference_cross_entropy(logits, labels, smoothing),
                                   rtol=1e-5)
        np.testing.assert_allclose(terms[f"accuracy/{head}"], hits, rtol=1e-6)  # of the cosines as they are


def test_triplets_are_a_term_a_branch():
    outputs, params, labels = inputs(["global", "local"])
    outputs["features"] = {"global": triplet_features(1, (6, 7)), "local": triplet_features(2, (6, 7))}
    given = functools.partial(jlml_loss, outputs, params, labels, lambda_global=1e-3, lambda_local=1e-3,
                              num_strips=STRIPS)
    loss, terms = given(triplet_weight=0.5, triplet_margin=0.3)
    for branch, features in outputs["features"].items():
        expected = 0.5 * reference_triplet(features, labels, 0.3)
        np.testing.assert_allclose(terms[f"triplet/{branch}"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, given()[0] + terms["triplet/global"] + terms["triplet/local"], rtol=1e-6)
    assert terms["triplet/global"] > 0 and not any(name.startswith("triplet") for name in given()[1])


@pytest.mark.parametrize("fields, message", [
    ({"margin": 0.2}, "loss.margin=0.2 .*--config.model.cosine_scale"),
    ({"triplet_weight": 1.0}, "loss.triplet_weight=1.0 .*--config.train.images_per_identity"),
])
def test_a_loss_without_what_it_needs_is_refused(fields, message):
    loss = default.get_config().loss
    check_fields(loss, 0.0, 0)
    loss.update(fields)
    with pytest.raises(UserError, match=message):
        check_fields(loss, 0.0, 0)
    check_fields(loss, 30.0, 4)
