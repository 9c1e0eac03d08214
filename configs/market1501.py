"""Market-1501, the paper's training recipe (Table 4)."""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "market1501"
    config.data.name = "market1501"
    return config
