"""CrossQ on Walker2d of Gymnasium, simulated on the host, with narrow critics for a CPU."""
from algorithms import crossq


def get_config():
    config = crossq.get_config()
    config.update(env="gymnasium/Walker2d-v5", env_kwargs=dict(max_episode_steps=1000), env_steps=100_000)
    config.update(random_steps=5000, eval_every=20_000, eval_episodes=10, buffer_size=100_000)
    config.critic_dims = (256, 256)
    config.smoke = dict(env_kwargs=dict(max_episode_steps=20), random_steps=100)
    return config
