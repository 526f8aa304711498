"""The same with the search that Stochastic MuZero has, too."""
from configs import muzero_2048


def get_config():
    config = muzero_2048.get_config()
    config.search = "puct"
    return config
