"""InvertedPendulum of MuJoCo, simulated on the host, +1 a step for at most 1,000 steps; its reward is known."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/InvertedPendulum-v5", num_steps=1000, env_steps=6000, eval_every=1000)
    config.update(horizon=15)
    return config
