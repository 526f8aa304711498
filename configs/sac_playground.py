"""SAC on the cart pole of MuJoCo Playground. It needs the extra playground. On an accelerator, set impl="warp"."""
from algorithms import sac


def get_config():
    config = sac.get_config()
    config.update(env="playground/CartpoleBalance", env_kwargs=dict(impl="jax", episode_length=1000), num_envs=8)
    config.update(env_steps=100_000, random_steps=4096, eval_every=20_000, eval_episodes=16, buffer_size=100_000)
    config.smoke = dict(env_kwargs=dict(episode_length=20), num_envs=2, random_steps=20, buffer_size=1000)
    return config
