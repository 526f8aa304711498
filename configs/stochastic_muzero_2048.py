"""Stochastic MuZero on a 2048 of 2 x 2 cells, where the best player has 66.96."""
from algorithms import stochastic_muzero


def get_config():
    return stochastic_muzero.get_config()
