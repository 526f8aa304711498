"""MuZero on CartPole with the search of its first paper: PUCT, noise at the root, visits as policy."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.update(search="puct", num_simulations=25, eval_episodes=100)
    return config
