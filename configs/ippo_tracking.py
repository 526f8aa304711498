"""Six agents drive to one goal inside a box."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(lr=1e-3, num_minibatches=4)
    return config
