"""A stand-in for a method with a learned model: next_obs = obs + w' (obs, action, 1); its actions are random."""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct

from core.dataset import read_arrays
from core.evaluation import ended


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem, env="drift", env_kwargs=dict(noise=0.5), num_envs=2, num_steps=2,
        env_steps=8, eval_every=4, pretrained="", eval_episodes=2,
        collect=dict(episodes=50, num_envs=7, env_kwargs=dict(noise=0.05)),
        pretrain=dict(num_epochs=200, batch_size=64, holdout=0.2, lr=0.01),
    ))


class Run(NamedTuple):
    params: dict
    env_state: Any
    obs: jax.Array
    last: dict


class Model(struct.PyTreeNode):
    params: dict
    opt_state: Any


def init(key, env, config):
    params = {"layer": {"w": jnp.zeros((4, 2))}}
    if config.pretrained:
        params = jax.tree.map(jnp.asarray, read_arrays(config.pretrained))
    env_state, obs = env.reset(key)
    zeros, no = jnp.zeros(env.num_envs), jnp.zeros(env.num_envs, bool)
    last = dict(obs=obs, action=jnp.zeros((env.num_envs, 1)), next_obs=obs, reward=zeros, terminated=no, truncated=no)
    return Run(params, env_state, obs, last)


def train_step(run, key, env, config):
    for step_key in jax.random.split(key, config.num_steps):
        act_key, env_key = jax.random.split(step_key)
        action = env.action_space.sample(act_key, (env.num_envs,))
        env_state, ts = env.step(env_key, run.env_state, action)
        last = dict(obs=run.obs, action=action, next_obs=ts.next_obs, reward=ts.reward, terminated=ts.terminated,
                    truncated=ts.truncated)
        run = Run(run.params, env_state, ts.obs, last)
    return run, dict(ended=ended(ts).mean())


def measure(run, key, env, config):
    return {"return": jnp.float32(0), "weight": jnp.abs(run.params["layer"]["w"]).sum()}


def initial_carry(run, num_envs):
    return jnp.zeros(num_envs)


def act(run, carry, obs, key):
    """The action says how many steps of the episode it remembers."""
    return carry + 1, carry[:, None] / 20


def predict(params, obs, action, env, config):
    """The next of one obs (2,) and action (1,)."""
    return obs + jnp.concatenate([obs, action, jnp.ones(1)]) @ params["layer"]["w"]


def predict_all(params, data, env, config):
    return jax.vmap(lambda obs, action: predict(params, obs, action, env, config))(data["obs"], data["action"])


def optimiser(config):
    return optax.adam(optax.linear_schedule(config.pretrain.lr, 0.0, 1800))


def pretrain_init(key, data, env, config):
    params = {"layer": {"w": jnp.zeros((4, 2))}}
    return Model(params, optimiser(config).init(params))


def pretrain_step(model, key, data, env, config):
    index = jax.random.randint(key, (config.pretrain.batch_size,), 0, len(data["obs"]))
    batch = jax.tree.map(lambda x: x[index], data)

    def loss(params):
        return jnp.square(predict_all(params, batch, env, config) - batch["next_obs"]).mean()

    value, grads = jax.value_and_grad(loss)(model.params)
    updates, opt_state = optimiser(config).update(grads, model.opt_state)
    return Model(optax.apply_updates(model.params, updates), opt_state), dict(loss=value)


def pretrain_test(model, data, env, config):
    error = predict_all(model.params, data, env, config) - data["next_obs"]
    return {"error": jnp.sqrt(jnp.square(error[:, 0]).mean())}
