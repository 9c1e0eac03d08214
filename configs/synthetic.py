"""The default: people drawn from a seed, the full network at a size that a laptop trains in minutes."""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "synthetic"
    config.data.name = "synthetic_pedestrians"
    config.data.height, config.data.width = 64, 32
    config.model.feature_norm = True
    config.optim.learning_rate = 0.03
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 5e-4
    config.augment.crop_padding = 3
    config.train.steps = 450
    config.evaluate.normalize = "per_branch"
    config.evaluate.baselines = True
    config.log_every = 50
    config.checkpoint_every = 150
    return config
