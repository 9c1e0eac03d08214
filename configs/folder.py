"""Your own data set, --config.data.name=folder/NAME: not the paper's recipe, but one that learns from few images."""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "folder"
    config.data.name = "folder/mine"
    config.data.height, config.data.width = 128, 64
    config.model.feature_norm = True
    config.optim.learning_rate = 0.03
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 5e-4
    config.augment.crop_padding = 5
    config.train.steps = 5_000
    config.evaluate.normalize = "per_branch"
    return config
