"""Reacher of MuJoCo, simulated on the host: a fit every 50 steps, which is an episode; each has a target of its own."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/Reacher-v5", num_steps=50, env_steps=2700, eval_every=2700, eval_episodes=10)
    config.update(log_every=50, num_updates=300, horizon=15)
    return config
