"""PPO on CartPole: the first row of the README."""
from algorithms import ppo


def get_config():
    return ppo.get_config()
