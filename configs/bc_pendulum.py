"""Behaviour cloning on the data of configs/iql_pendulum.py."""
from algorithms import bc


def get_config():
    config = bc.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3, dataset="runs/iql_pendulum/collect/data.npz")
    return config
