"""SHAPER in the prisoner's dilemma, against a co-player that learns by policy gradients: 100 games a trial."""
from algorithms import shaper


def get_config():
    return shaper.get_config()
