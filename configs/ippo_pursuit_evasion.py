"""Two pursuers against one evader that learns too."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(env="pursuit_evasion", env_steps=200_000, eval_every=20_000, eval_episodes=256)
    config.update(lr=1e-3, num_minibatches=2, normalize_reward=True)
    return config
