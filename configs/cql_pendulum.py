"""CQL on the data of configs/iql_pendulum.py, with small networks."""
from algorithms import cql


def get_config():
    config = cql.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3, actor_lr=3e-4, tau=0.05, discount=0.97, updates=10_000,
                  num_actions=4, cql_alpha=0.5)
    return config
