"""Scaling on paper against the network that is trained."""

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet
from experiments import scaling
from experiments.bench import floor
from experiments.scaling import SLICES, Counts
from jlml_jax import models, optim, parallel, train_step


@pytest.fixture(scope="module")
def config():
    config = imagenet.get_config()
    config.data.height, config.data.width = 32, 16
    config.model.num_strips, config.model.depth, config.model.stem_features = 2, 1, 4
    config.model.global_widths, config.model.local_widths = (4, 8), (4, 6)
    config.model.global_feature_dim = config.model.local_feature_dim = 16
    return config


def all_reduced(config, num_classes):
    """The sizes of the arrays that the step reduces over two devices, in its program as it is traced."""
    mesh = parallel.make_mesh(jax.devices()[:2])
    model, optimizer = models.build_model(config, num_classes), optim.make_optimizer(config.optim, 1)

    def init():
        variables = model.init(jax.random.key(0), jnp.zeros((1, config.data.height, config.data.width, 3)))
        return train_step.TrainState(jnp.int32(0), variables["params"], variables["batch_stats"],
                                     optimizer.init(variables["params"]))

    batch = (jax.ShapeDtypeStruct((4, config.data.height, config.data.width, 3), jnp.uint8),
             jax.ShapeDtypeStruct((4,), jnp.int32), None)
    step = train_step.make_train_step(config, model, optimizer, mesh, from_device_data=False)
    program = step.trace(jax.eval_shape(init), batch, jax.ShapeDtypeStruct((), jnp.uint32)).jaxpr
    return [array.aval.size for equation in floor.equations(program.jaxpr, ("psum",)) for array in equation.invars]


def test_counts_are_those_of_the_programs_all_reduces(config):
    counts = scaling.count(config, 10)
    sizes = all_reduced(config, 10)
    scalars = sizes.count(1)  # the loss and what it consists of
    assert len(sizes) - scalars == counts.gradient_reductions + counts.norm_reductions
    assert 4 * (sum(sizes) - scalars) == counts.gradient_bytes + counts.norm_bytes
    assert counts.norm_bytes > 0 and 5 <= scalars <= 10


def test_counts_of_the_network_as_published():
    counts = scaling.count(imagenet.get_config(), 1_000)
    assert counts.parameters == 7_790_624 + 2 * (512 + 1) * 1_000
    assert counts.gradient_bytes == 4 * counts.parameters
    assert counts.multiply_adds == 789_897_216 + 2 * 512 * 1_000
    assert counts.norm_layers == 1 + 5 * 36 + 4 + 4 * 3  # the stem; 36 in a tower; shortcuts
    assert counts.norm_sequence == 1 + 36


COUNTS = Counts(parameters=10**6, gradient_reductions=9, norm_layers=20, norm_channels=1000, norm_sequence=10,
                multiply_adds=10**9)


def test_a_step_by_hand():
    where = scaling.Slice("made up", devices=4, processes=2, peak=1e12, peak_of="", links=1e9, share=0.5,
                          latency=(1e-3, 1e-3), source="")
    step = scaling.step_of(COUNTS, where, batch_per_device=8, utilisation=0.5, latency=1e-3)
    assert step.compute == pytest.approx(8 * 6e9 / 0.5e12)
    assert step.gradients == pytest.approx(1e-3 + 2 * 3 / 4 * 4e6 / 0.5e9)
    assert step.norms == pytest.approx(20 * 1e-3 + 2 * 3 / 4 * 16_000 / 0.5e9)
    even = scaling.break_even(COUNTS, where, 0.5, 1e-3)
    step = scaling.step_of(COUNTS, where, even, 0.5, 1e-3)
    assert step.compute == pytest.approx(step.gradients + step.norms)


def test_the_page_has_every_slice_in_every_table():
    decoding = {"images_per_second": 90.0, "images_per_core_second": 100.0, "cores": 2, "load_average": 1.5,
                "mean_file_bytes": 110_000.0}
    page = scaling.page(COUNTS, decoding, 300_000, {"command": "python -m experiments.scaling", "commit": "abcdef012",
                                                    "versions": {"jax": "0"}})
    for where in SLICES:
        assert page.count(f"| {where.name} |") + page.count(f"| [{where.name}]({where.source}) |") == 4
    assert "27 core-hours" in page  # 9.6 million images at 100 a core-second
    assert "| gradients all-reduced | 4.0 MB, 9 arrays |" in page
    assert "Commit abcdef0" in page
