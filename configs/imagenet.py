"""Pre-training on ImageNet-2012 (Table 4, "Pre-train"); Tiny-ImageNet-200: --config.data.name=tiny_imagenet."""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "imagenet"
    config.data.name = "imagenet2012"
    config.optim.decay_every = 100_000
    config.train.steps = 300_000
    return config
