"""The continuous cart-pole of mbrl-lib, balanced: 200 random steps, then trials of 200 steps at most, +1 a step."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="cartpole_balance", env_steps=1600, horizon=15)
    return config
