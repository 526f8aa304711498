"""SAC on the half cheetah of Brax, simulated on the accelerator. It needs the extra brax."""
from algorithms import sac


def get_config():
    config = sac.get_config()
    config.update(env="brax/halfcheetah", env_kwargs=dict(backend="spring", episode_length=1000), num_envs=64)
    config.update(env_steps=1_000_000, random_steps=8192, eval_every=100_000, eval_episodes=16)
    config.smoke = dict(env_kwargs=dict(episode_length=20), num_envs=2, random_steps=20, buffer_size=1000)
    return config
