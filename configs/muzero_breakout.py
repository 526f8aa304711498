"""MuZero on MinAtar's Breakout."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.update(env="gymnax/Breakout-MinAtar", env_steps=200_000, eval_every=50_000, buffer_size=50_000)
    config.update(channels=16, hidden_dims=(128,), latent_dim=128, value_bound=10.0, n_step=20, lr=1e-3)
    return config
