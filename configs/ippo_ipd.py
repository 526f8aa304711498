"""Two independent PPO learners in the iterated prisoner's dilemma of 100 rounds: -2 a round where both defect."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(env="iterated_matrix_game", num_envs=16, num_steps=100, env_steps=160_000, eval_every=16_000)
    config.update(eval_episodes=8, hidden_dims=(16,), lr=1e-2, discount=0.96)
    return config
