"""MuZero on CartPole, one environment, one search at a time."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.update(num_envs=1, num_steps=64, num_updates=8, random_steps=1024, eval_episodes=100)
    return config
