"""Dual control of a linear system of which all 24 numbers are unknown: acts to learn them."""
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.update(env="linear_tracking", about="params", env_steps=90, eval_every=90)  # one episode
    config.update(explore="independent", info_weight=500 / 24)  # 500 for 24 parameters, in nats
    config.update(prior_var=1.0, obs_var=0.1, drift_var=1e-3, drift_decay=0.999, drift_floor=1e-4)
    config.update(horizon=15, kept_elites=9, planner=dict(num_samples=300, num_elites=30, decay=1.0))
    return config
