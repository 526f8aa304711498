"""The same, but the pole becomes twice as long: for the nominal model it is lost then."""
import math

from configs import icem_online_cartpole


def get_config(algorithm="icem_online_lora"):
    config = icem_online_cartpole.get_config(algorithm)
    config.env_kwargs.jump_by = (("log_half_length", math.log(2)),)
    return config
