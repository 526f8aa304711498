"""Swing-up with every constant of the cart-pole off by a factor in [1/2, 2], drawn anew when half of it is over."""
import importlib


def get_config(algorithm="icem_online"):  # or one of its children: --config=configs/adapt_cartpole.py:icem_online_refit
    config = importlib.import_module(f"algorithms.{algorithm}").get_config()
    config.update(env="cartpole_swingup", model="physics", adapt="all", obs_var=1e-4)
    config.env_kwargs = dict(spread=2.0, jump_step=100, process_noise=0.01, reveal=False)
    own = dict(prior_var=0.16, drift_var=1e-4, num_linearizations=4, lr=0.03)
    config.update({name: value for name, value in own.items() if name in config})
    return config
