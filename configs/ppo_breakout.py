"""PPO on MinAtar's Breakout."""
from algorithms import ppo


def get_config():
    config = ppo.get_config()
    config.update(env="gymnax/Breakout-MinAtar", num_envs=64, num_steps=128, env_steps=1_000_000, eval_every=100_000)
    config.update(lr=5e-3, num_minibatches=8)
    return config
