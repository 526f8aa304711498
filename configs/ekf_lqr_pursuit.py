"""Dual control of a pursuer with a hidden cost: passive learning of its gain."""
from algorithms import ekf_lqr


def get_config():
    return ekf_lqr.get_config()
