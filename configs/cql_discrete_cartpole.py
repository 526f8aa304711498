"""Discrete CQL on CartPole. The data: 200 episodes of PQN after 20,000 steps, with 30% random actions."""
from algorithms import cql_discrete


def get_config():
    config = cql_discrete.get_config()
    config.update(hidden_dims=(64, 64), lr=1e-3, tau=0.02, updates=10_000)
    config.collect = dict(num_envs=20, episodes=200, random_actions=0.3)
    return config
