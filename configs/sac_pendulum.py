"""SAC on Pendulum, with small networks."""
from algorithms import sac


def get_config():
    config = sac.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3)
    return config
