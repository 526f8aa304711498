"""A network that learnt the nominal cart-pole swings it up; half way the pole becomes twice as heavy."""
import importlib
import math


def get_config(algorithm="icem_online_lora"):
    config = importlib.import_module(f"algorithms.{algorithm}").get_config()
    config.env_kwargs = dict(jump_step=100, jump_by=(("log_pole_mass", math.log(2)),), reveal=False)
    own = dict(lora_rank=16, prior_var=0.01, drift_var=1e-3)
    config.update({name: value for name, value in own.items() if name in config})
    return config
