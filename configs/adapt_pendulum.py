"""Swing-up of a pendulum whose inertia and damping are off by a factor in [1/2, 2], drawn anew half way."""
from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="damped_pendulum", env_steps=400, model="physics", adapt="all")
    config.env_kwargs = dict(spread=2.0, jump_step=200, process_noise=0.01)
    config.update(prior_var=0.16, obs_var=1e-4, drift_var=1e-4, lr=0.03, num_linearizations=4)
    config.update(horizon=60, num_samples=300, num_elites=30, kept_elites=9, num_iterations=5)
    return config
