"""InvertedPendulum of MuJoCo, simulated on the host, +1 a step for at most 1,000 steps: a fit every 100 steps."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="gymnasium/InvertedPendulum-v5", num_steps=100, env_steps=5200, eval_every=2600, log_every=100)
    config.update(num_updates=500, horizon=15)
    return config
