"""CUHK03, boxes drawn by hand, the paper's training recipe (Table 4), 20 trials: --config.data.trials=all.

A detector's boxes: --config.data.name=cuhk03/detected. The 767/700 split: --config.data.cuhk03_protocol=767/700.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "cuhk03"
    config.data.name = "cuhk03/labeled"
    return config
