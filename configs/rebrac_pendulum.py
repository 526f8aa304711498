"""ReBRAC on the data of configs/iql_pendulum.py, with small networks."""
from algorithms import rebrac


def get_config():
    config = rebrac.get_config()
    config.update(hidden_dims=(64, 64), batch_size=256, tau=0.1, discount=0.97, updates=10_000,
                  actor_penalty=0.1, critic_penalty=1.0)
    return config
