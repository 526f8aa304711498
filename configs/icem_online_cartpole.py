"""A network that learnt the nominal cart-pole swings it up; half way the pole becomes twice as heavy."""
import math

from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="cartpole_swingup", env_steps=200)
    config.env_kwargs = dict(jump_step=100, jump_by=(("log_pole_mass", math.log(2)),))
    config.collect.env_kwargs = dict()  # nominal, and stays so
    config.update(adapt="lora_xs", lora_rank=16, prior_var=0.01, drift_var=1e-3)
    return config
