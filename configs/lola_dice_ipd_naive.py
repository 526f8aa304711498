"""The same games as lola_dice_ipd without a look-ahead: what opponent shaping is compared with."""
from algorithms import lola_dice


def get_config():
    config = lola_dice.get_config()
    config.lookahead = 0
    return config
