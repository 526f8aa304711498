"""Dual control of a merge before a car that yields by an unknown driver model, learnt from how it yields."""
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.update(env="merging_idm", about="params", env_steps=300, eval_every=300)  # one episode
    config.update(prior_var=1.0, obs_var=1e-3, num_linearizations=10, drift_var=1e-3)
    config.update(horizon=40, kept_elites=9, planner=dict(num_samples=300, num_elites=30, decay=1.0))
    return config
