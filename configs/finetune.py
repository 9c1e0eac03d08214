"""From the run that comes along to your own people: --config.data.name=folder/NAME, or another set.

First: python -m jlml_jax.unpack --workdir=runs/pretrained. The network and the input's size are that run's; from
another one, give its --config.init_from, --config.data.height and --config.data.width. The triplet loss, its weight,
the colour jitter and the steps were chosen on people of VIPeR, held out (experiments/results/transfer.md), who have two
images each; with more images take more steps, and more --config.train.images_per_identity.
"""

from configs import modern


def get_config():
    config = modern.get_config()
    config.name = "finetune"
    config.init_from = "runs/pretrained"
    config.data.name = "folder/mine"
    config.data.height, config.data.width = 256, 128
    config.augment.crop_padding = 10
    config.augment.color_jitter = 0.4
    config.loss.triplet_weight = 3.0
    config.optim.learning_rate = 0.02
    config.optim.warmup_steps = 15
    config.train.images_per_identity = 2
    config.train.steps = 400
    return config
