"""JaxMARL's simple_spread with the numbers of JaxMARL's own ippo_ff_mpe.yaml, at a tenth of its budget."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(env="jaxmarl/MPE_simple_spread_v3", num_envs=16, num_steps=128, share_params=True)
    config.update(env_steps=1_000_000, eval_every=100_000, eval_episodes=256, lr=2.5e-4, num_minibatches=4)
    return config
