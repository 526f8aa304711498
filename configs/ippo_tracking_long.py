"""The same six agents with ten times the budget."""
from configs import ippo_tracking


def get_config():
    config = ippo_tracking.get_config()
    config.update(env_steps=1_000_000, eval_every=100_000, eval_episodes=256)
    return config
