"""An evader whose pursuer's cost is off by factors in [1/2, 2], and another one's half way."""
from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="pursuit_evasion_lqr", env_steps=200, model="physics", adapt="all")
    config.env_kwargs = dict(spread=2.0, jump_step=100, process_noise=0.01)
    config.update(prior_var=0.16, obs_var=1e-4, drift_var=1e-4, lr=0.03, num_linearizations=4)
    config.update(horizon=20, num_samples=500, num_elites=50, kept_elites=15, num_iterations=5)
    return config
