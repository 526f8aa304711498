"""Swing-up of a pendulum whose inertia and damping are off by a factor in [1/2, 2], drawn anew half way."""
from configs import adapt_cartpole


def get_config(algorithm="icem_online"):
    config = adapt_cartpole.get_config(algorithm)
    config.update(env="damped_pendulum", env_steps=400, eval_every=400, horizon=60, kept_elites=9)
    config.env_kwargs.jump_step = 200
    config.planner.update(num_samples=300, num_elites=30, num_iterations=5)
    return config
