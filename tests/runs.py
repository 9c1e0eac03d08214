"""What runs left behind, and comparing it."""

import json

import jax
import numpy as np

from jlml_jax import models, optim, parallel, protocols, train_step
from jlml_jax.checkpoints import Checkpoints
from jlml_jax.logs import TIME_FIELDS


def lines_of(workdir):
    """metrics.jsonl without the fields that say how long things took."""
    return [{key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS}
            for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(config, workdir):
    """The arrays of the run's last checkpoint, by path."""
    protocol = protocols.load(config.data.name, config.data).trial(0)
    model = models.build_model(config, len(protocol.identities()))
    mesh = parallel.make_mesh(jax.devices()[:1])
    state = train_step.init_state(config, model, optim.make_optimizer(config.optim, config.train.steps), mesh)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    state, _ = checkpoints.restore(state)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_run(config, a, b):
    assert lines_of(a) == lines_of(b)
    left, right = final_state(config, a), final_state(config, b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def assert_close_trees(a, b, tolerance=1e-3):
    """Every array agrees to `tolerance` of its largest value: a sum in another order rounds otherwise, and BN on
    small maps magnifies that; a sum over the wrong images would be off by half and more."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(np.abs(x).max(), 1e-2)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
