"""MuZero on CartPole."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.eval_episodes = 100
    return config
