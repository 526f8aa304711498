"""SAC on the cheetah of the DeepMind Control Suite, simulated on the host. It needs the extra dm_control."""
from algorithms import sac


def get_config():
    config = sac.get_config()
    config.update(env="gymnasium/dm_control/cheetah-run-v0", env_kwargs=dict(max_episode_steps=1000))
    config.update(env_steps=100_000, random_steps=5000, eval_every=20_000, eval_episodes=10, buffer_size=100_000)
    config.smoke = dict(env_kwargs=dict(max_episode_steps=20), random_steps=100)
    return config
