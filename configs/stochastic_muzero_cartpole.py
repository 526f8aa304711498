"""Stochastic MuZero on gymnax's CartPole, where chance does nothing: to compare it with muzero_cartpole_puct."""
from algorithms import stochastic_muzero


def get_config():
    config = stochastic_muzero.get_config()
    config.env_kwargs = {}
    config.update(env="gymnax/CartPole-v1", env_steps=100_000, eval_every=20_000, eval_episodes=100)
    config.update(value_bound=20.0)
    return config
