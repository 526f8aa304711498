"""Two independent PPO learners in the coin game of 16 steps, a team each."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(env="coin_game", num_envs=64, num_steps=32, env_steps=200_000, eval_every=20_000)
    config.update(eval_episodes=1024, lr=2.5e-3, discount=0.96)
    return config
