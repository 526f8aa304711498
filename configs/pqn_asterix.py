"""PQN on MinAtar's Asterix, with the numbers of its authors."""
from algorithms import pqn


def get_config():
    config = pqn.get_config()
    config.update(env="gymnax/Asterix-MinAtar", num_envs=128, num_steps=32, env_steps=10_000_000, eval_every=1_000_000)
    config.update(hidden_dims=(128,), channels=16, lr=5e-4, trace=0.65, num_epochs=2, num_minibatches=32)
    config.update(final_epsilon=0.05, epsilon_steps=0.1, reward_scale=1.0)
    return config
