"""The same with the whole budget of that file."""
from configs import ippo_spread


def get_config():
    config = ippo_spread.get_config()
    config.update(env_steps=10_000_000, eval_every=1_000_000)
    return config
