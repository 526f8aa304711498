"""PPO shapes a co-player that learns between games, as M-FOS does: the prisoner's dilemma, 100 games an episode."""
from algorithms import ppo


def get_config():
    config = ppo.get_config()
    config.update(env="learning_coplayer", num_envs=64, num_steps=100, env_steps=2_560_000, eval_every=256_000)
    config.update(eval_episodes=64, hidden_dims=(32, 32), lr=3e-3, entropy_coef=0.0, init_std=0.5)
    config.update(normalize_reward=True)
    return config
