"""AlphaZero plays itself in Connect Four, of pgx."""
from algorithms import alphazero


def get_config():
    config = alphazero.get_config()
    config.update(env="pgx/connect_four", num_envs=128, env_steps=1_000_000, eval_every=100_000, random_steps=8192)
    config.update(buffer_size=100_000, hidden_dims=(256, 256), num_updates=32, max_considered=7)
    return config
