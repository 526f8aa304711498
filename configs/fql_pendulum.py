"""FQL on the data of configs/iql_pendulum.py, with small networks."""
from algorithms import fql


def get_config():
    config = fql.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3, tau=0.1, discount=0.97, updates=8000, distill_weight=0.1)
    return config
