"""PQN on CartPole."""
from algorithms import pqn


def get_config():
    return pqn.get_config()
