"""PQN on CartPole, with small networks."""
from algorithms import pqn


def get_config():
    config = pqn.get_config()
    config.update(env_steps=200_000, eval_every=20_000, hidden_dims=(64, 64), lr=1e-3)
    return config
