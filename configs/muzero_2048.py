"""MuZero, which has no chance in its model, on a 2048 of 2 x 2 cells: to compare it with stochastic_muzero_2048."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.update(env="small_2048", env_kwargs=dict(side=2), env_steps=30_000, eval_every=5_000, eval_episodes=256)
    config.update(num_simulations=32, value_bound=10.0)
    return config
