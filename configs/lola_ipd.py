"""Both players of the infinite prisoner's dilemma shape each other, by the Taylor form of LOLA."""
from algorithms import lola


def get_config():
    return lola.get_config()
