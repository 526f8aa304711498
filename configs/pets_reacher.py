"""Reacher of MuJoCo, simulated on the host; its reward is known, its dynamics are not."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/Reacher-v5", num_steps=50, env_steps=2500, eval_every=50, score_episodes=10)
    config.update(num_updates=300, horizon=15)
    return config
