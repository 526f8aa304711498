"""An evader whose pursuer's cost is off by factors in [1/2, 2], and another one's half way."""
from configs import adapt_cartpole


def get_config(algorithm="icem_online"):
    config = adapt_cartpole.get_config(algorithm)
    config.update(env="pursuit_evasion_lqr", horizon=20, kept_elites=15)
    config.planner.update(num_samples=500, num_elites=50, num_iterations=5)
    return config
