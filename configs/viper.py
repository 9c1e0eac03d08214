"""VIPeR, the paper's training recipe (Table 4), ten trials: --config.data.trials=all; --config.init_from=RUN."""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "viper"
    config.data.name = "viper"
    return config
