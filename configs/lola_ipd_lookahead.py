"""Both players of the infinite prisoner's dilemma shape each other: the derivative through the look-ahead."""
from algorithms import lola


def get_config():
    config = lola.get_config()
    config.form = "lookahead"
    return config
