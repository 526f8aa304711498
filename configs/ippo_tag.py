"""JaxMARL's simple_tag: three chasers and one runner, which see and move differently."""
from algorithms import ippo


def get_config():
    config = ippo.get_config()
    config.update(env="jaxmarl/MPE_simple_tag_v3", num_envs=64, num_steps=32, env_steps=1_000_000, eval_every=100_000)
    config.update(lr=1e-3, num_minibatches=4, normalize_obs=True, normalize_reward=True)
    return config
