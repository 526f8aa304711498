"""CrossQ on Pendulum, with small networks."""
from algorithms import crossq


def get_config():
    config = crossq.get_config()
    config.update(hidden_dims=(64, 64), critic_dims=(64, 64))
    return config
