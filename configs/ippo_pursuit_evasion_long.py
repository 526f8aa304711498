"""The same chase with ten times the budget."""
from configs import ippo_pursuit_evasion


def get_config():
    config = ippo_pursuit_evasion.get_config()
    config.update(env_steps=2_000_000, eval_every=200_000)
    return config
