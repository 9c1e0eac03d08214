"""All people of CUHK03 and Market-1501 together, the paper's training recipe: what VIPeR and GRID start from.

A detector's boxes: --config.data.name=cuhk03/detected+market1501.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.name = "cuhk03_market1501"
    config.data.name = "cuhk03/labeled+market1501"
    return config
