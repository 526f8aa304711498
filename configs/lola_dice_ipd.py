"""Both players of the prisoner's dilemma shape each other, in sampled games of 150 rounds."""
from algorithms import lola_dice


def get_config():
    return lola_dice.get_config()
