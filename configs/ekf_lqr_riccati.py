"""Dual control of a pursuer that plays the regulator of infinite horizon, the belief about its cost: Q, with R = 1."""
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.env_kwargs = dict(infinite_horizon=True, process_noise=0.0, reveal=False)
    config.update(about="cost", prior_var=25.0, num_linearizations=8)
    return config
