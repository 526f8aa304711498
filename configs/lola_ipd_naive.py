"""Both players of the infinite prisoner's dilemma climb their own value: what LOLA is compared with."""
from algorithms import lola


def get_config():
    config = lola.get_config()
    config.form = "naive"
    return config
