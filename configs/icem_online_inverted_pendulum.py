"""InvertedPendulum of MuJoCo: what was learnt from random actions goes on learning while it balances."""
from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="gymnasium/InvertedPendulum-v5", env_steps=1000, eval_every=50, horizon=15)
    config.update(prior_var=0.01, drift_var=1e-5)
    config.collect = dict(episodes=40, learner="none", action_noise=1.0)
    return config
