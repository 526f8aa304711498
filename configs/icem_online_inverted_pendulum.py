"""InvertedPendulum of MuJoCo: what was learnt from random actions goes on learning while it balances."""
from algorithms import icem_online


def get_config():
    config = icem_online.get_config()
    config.update(env="gymnasium/InvertedPendulum-v5", env_steps=1000, log_every=50, eval_every=500, eval_episodes=5)
    config.env_kwargs = dict()
    config.update(prior_var=0.01, drift_var=1e-5, horizon=15)
    config.collect = dict(episodes=40, num_envs=10, learn=False, action_noise=1.0)
    config.pretrain.rollout_steps = 5  # random actions let it fall after about so many steps
    return config
