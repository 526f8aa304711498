"""Swing-up with every constant of the cart-pole off by a factor in [1/2, 2], drawn anew when half of it is over."""
from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="cartpole_swingup", env_steps=200, model="physics", adapt="all")
    config.env_kwargs = dict(spread=2.0, jump_step=100, process_noise=0.01)
    config.update(prior_var=0.16, obs_var=1e-4, drift_var=1e-4, lr=0.03, num_linearizations=4)
    return config
