"""PPO on Pendulum: continuous actions, normalised observations and rewards."""
from algorithms import ppo


def get_config():
    config = ppo.get_config()
    config.update(env="gymnax/Pendulum-v1", num_envs=16, num_steps=128, env_steps=500_000, eval_every=50_000)
    config.update(lr=1e-3, num_epochs=10, num_minibatches=8, entropy_coef=0.0, discount=0.95)
    config.update(normalize_obs=True, normalize_reward=True)
    return config
