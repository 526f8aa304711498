"""PPO with a memory against tit-for-tat in the iterated prisoner's dilemma: 100 rounds, -1 a round for cooperation."""
from algorithms import ppo_memory


def get_config():
    config = ppo_memory.get_config()
    config.update(env="fixed_coplayer", num_envs=16, num_steps=100, env_steps=160_000, eval_every=16_000)
    config.update(eval_episodes=8, hidden_dims=(16,), memory_dim=16, lr=1e-2, discount=0.96)
    with config.unlocked():
        config.env_kwargs = dict(coplayer="tit_for_tat")
    return config
