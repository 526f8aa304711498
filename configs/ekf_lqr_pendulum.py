"""Dual control of a pendulum too weak to be lifted at once, its damping and inertia unknown."""
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.update(env="damped_pendulum", about="params", env_steps=400, eval_every=400)  # one episode
    config.update(explore="independent", info_weight=5.0)
    config.update(prior_var=0.5, obs_var=1e-4, drift_var=1e-3, drift_decay=0.95, drift_floor=1e-6)
    config.update(horizon=60, kept_elites=9, planner=dict(num_samples=300, num_elites=30, decay=1.0))
    return config
