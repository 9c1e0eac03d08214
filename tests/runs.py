"""What a step of a run needs, what runs left behind, and comparing it."""

import json

import jax
import numpy as np

from jlml_jax import models, optim, parallel, protocols, sampling, train_step
from jlml_jax.checkpoints import Checkpoints
from jlml_jax.device_data import place
from jlml_jax.logs import TIME_FIELDS

# Of results.json.
ROW_FIELDS = {"dataset", "protocol", "trial", "feature", "normalize", "rank1", "rank5", "rank10", "rank20", "mean_ap",
              "mean_ap_trapezoid", "mean_inp", "num_queries", "num_gallery"}
ROW_FRACTIONS = [field for field in ROW_FIELDS if field.startswith(("rank", "mean_"))]


class Parts:
    """What a step needs, on the first `count` devices."""

    def __init__(self, config, count):
        self.seed, self.mesh = np.uint32(config.seed), parallel.make_mesh(jax.devices()[:count])
        self.trial = protocols.load(config.data.name, config.data).trial(0)
        self.model = models.build_model(config, len(self.trial.identities()))
        self.optimizer = optim.make_optimizer(config.optim, config.train.steps)
        groups = sampling.identity_groups(self.trial.labels(), config.train.images_per_identity)
        cameras = self.trial.camera_one_hot() if config.train.norm_by_camera else None
        self.data = place(self.trial.train, self.trial.labels(), config.data.height, config.data.width,
                          self.mesh, groups, cameras)
        self.state = train_step.init_state(config, self.model, self.optimizer, self.mesh)


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
