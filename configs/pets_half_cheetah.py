"""HalfCheetah of MuJoCo, simulated on the host; its reward is known but for how far it measures the speed."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/HalfCheetah-v5", num_steps=1000, env_steps=20_000, eval_every=1000, random_steps=1000)
    config.update(num_updates=2000, batch_size=64, horizon=20, noise_beta=0.25)
    return config
