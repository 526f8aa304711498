"""HalfCheetah of MuJoCo, simulated on the host: a fit every 1,000 steps, the length of an episode. The planner knows
the speed at the end of a step; the environment pays the mean speed over the step."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/HalfCheetah-v5", env_kwargs=dict(max_episode_steps=1000), num_steps=1000)
    config.update(env_steps=21_000, random_steps=1000, eval_every=21_000, eval_episodes=1, log_every=1000)
    config.update(num_updates=2000, batch_size=64, horizon=20)
    config.planner.noise_beta = 0.25
    config.smoke.env_kwargs = dict(max_episode_steps=20)
    return config
