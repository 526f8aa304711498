"""The continuous cart-pole of mbrl-lib, balanced: 200 random steps, then a fit every 50 steps; +1 a step."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="cartpole_balance", num_steps=50, env_steps=1200, eval_every=500, eval_episodes=5, log_every=50)
    config.update(horizon=15, num_updates=500)
    return config
