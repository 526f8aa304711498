"""MuZero on Acrobot: −1 a step until the tip is above the line."""
from algorithms import muzero


def get_config():
    config = muzero.get_config()
    config.update(env="gymnax/Acrobot-v1", eval_episodes=100)
    return config
