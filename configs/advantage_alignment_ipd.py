"""Two players that align their advantages, in the iterated prisoner's dilemma of 100 rounds: greedy play cooperates."""
from algorithms import advantage_alignment


def get_config():
    config = advantage_alignment.get_config()
    config.update(num_envs=32, num_steps=100, env_steps=640_000, eval_every=64_000)
    config.update(eval_episodes=8, hidden_dims=(16,), lr=3e-3, discount=0.96, normalize_reward=True)
    return config
