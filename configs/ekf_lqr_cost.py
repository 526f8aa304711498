"""Dual control of a pursuer with a hidden cost, the belief about the cost itself: four log-weights, R = 1."""
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.update(about="cost", prior_var=9.0, num_linearizations=8)
    return config
