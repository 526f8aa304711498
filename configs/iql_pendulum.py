"""IQL on Pendulum, with small networks. The data: 100 episodes of SAC after 2,900 steps, with noise."""
from algorithms import iql


def get_config():
    config = iql.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3, updates=30_000, eval_every=3000, tau=0.02, discount=0.97)
    config.collect = dict(num_envs=20, episodes=100, action_noise=0.5)
    return config
