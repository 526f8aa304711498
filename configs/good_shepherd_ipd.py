"""The Good Shepherd in the prisoner's dilemma, against a co-player that climbs its own value: 100 games a trial."""
from algorithms import good_shepherd


def get_config():
    return good_shepherd.get_config()
