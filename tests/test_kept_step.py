import jax
import numpy as np
import pytest
from runs import Parts, assert_close_trees

from jlml_jax import provenance, train_step
from jlml_jax.kept_step import KeptStep


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def kept_in(cache):
    return sorted(cache.glob("jlml_jax-step-*"))


def two_steps(parts, step):
    state, metrics = parts.state, []
    for _ in range(2):
        state, values = step(state, parts.data, parts.seed)
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


def plain(config, parts):
    return train_step.make_train_step(config, parts.model, parts.optimizer, parts.mesh, from_device_data=True)


def untraceable(*_):
    pytest.fail("the step was traced")


@pytest.mark.parametrize("devices", [1, 4])
def test_a_later_start_takes_the_trace_and_computes_the_same(smooth_config, cache, devices):
    source = provenance.collect()
    expected = two_steps(parts := Parts(smooth_config, devices), plain(smooth_config, parts))
    first = two_steps(parts := Parts(smooth_config, devices),
                      KeptStep(plain(smooth_config, parts), "a", source, str(cache)))
    assert len(kept_in(cache)) == 1
    later = two_steps(Parts(smooth_config, devices), KeptStep(untraceable, "a", source, str(cache)))
    for state, metrics in (first, later):
        assert jax.tree.structure(state) == jax.tree.structure(expected[0])
        assert_close_trees(state, expected[0])
        for given, wanted in zip(metrics, expected[1], strict=True):
            assert_close_trees(given, wanted)
    np.testing.assert_array_equal(later[1][1]["loss"], first[1][1]["loss"])


def test_another_step_has_a_trace_of_its_own(smooth_config, cache):
    source = provenance.collect()
    parts = Parts(smooth_config, 1)

    def trace(made_of="a", source=source, batch=parts.data):
        parts = Parts(smooth_config, 1)
        KeptStep(plain(smooth_config, parts), made_of, source, str(cache))(parts.state, batch, parts.seed)
        return len(kept_in(cache))

    assert trace() == trace() == 1
    assert trace(made_of="b") == 2
    assert trace(source=source | {"source_sha256": "of edited code"}) == 3
    assert trace(source=source | {"versions": {"jax": "0.0"}}) == 4
    assert trace(batch=jax.tree.map(lambda rows: rows[:-1], parts.data)) == 5
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        assert trace() == 6
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def test_data_of_another_size_have_a_trace_of_their_own(smooth_config, cache):
    """One command trains several trials by one step, and CUHK03's have 13,122 images, or some fewer or more."""
    parts = Parts(smooth_config, 1)
    step = KeptStep(plain(smooth_config, parts), "a", provenance.collect(), str(cache))
    fewer = jax.tree.map(lambda rows: rows[:-3], parts.data)
    expected = [plain(smooth_config, parts)(Parts(smooth_config, 1).state, data, parts.seed)[1]["loss"]
                for data in (parts.data, fewer)]
    losses = [step(Parts(smooth_config, 1).state, data, parts.seed)[1]["loss"]
              for data in (parts.data, fewer, parts.data)]
    np.testing.assert_allclose(losses, [*expected, expected[0]], rtol=1e-5)
    assert len(kept_in(cache)) == 2


@pytest.mark.parametrize("damage", [lambda kept: kept[:-1], lambda kept: b"", lambda kept: kept[:-1] + b"?"])
def test_a_damaged_trace_is_made_again(smooth_config, cache, damage):
    source = provenance.collect()
    parts = Parts(smooth_config, 1)
    first = two_steps(parts, KeptStep(plain(smooth_config, parts), "a", source, str(cache)))
    (path,) = kept_in(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = two_steps(parts := Parts(smooth_config, 1), KeptStep(plain(smooth_config, parts), "a", source, str(cache)))
    np.testing.assert_array_equal(first[1][1]["loss"], again[1][1]["loss"])
    assert len(path.read_bytes()) == len(whole)
    two_steps(Parts(smooth_config, 1), KeptStep(untraceable, "a", source, str(cache)))


def test_where_nothing_can_be_kept_the_step_runs(smooth_config, cache):
    source = provenance.collect()
    cache.write_text("not a folder")
    for folder in (str(cache), ""):
        two_steps(parts := Parts(smooth_config, 1), KeptStep(plain(smooth_config, parts), "a", source, folder))
    assert cache.read_text() == "not a folder"
