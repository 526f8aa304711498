"""iCEM online, the filter over low-rank changes of the weights: LoRA-XS (Bałazy et al., 2024, arXiv:2405.17604).
Child of icem_online.py; the diff is the method.

    W_l = U S V'                     singular values of layer l's kernel (I, O) at the start        Agent.create
    kernel = W_l + U_r S_r A_l V_r'  of the r = lora_rank largest; biases stay as they are     Agent.insert
    adapt="lora_xs"     θ = all entries of every A_l (r, r)
    adapt="tiny_lora"   θ = the v_l of A_l = Σ_k v_lk P_lk, k <= lora_size, each P_lk (r, r) random, N(0, 1 / r²), fixed

θ is zero at the start of an episode: the model is then the pretrained network. The symbols, what is kept and
random are as in icem_online.py; θ is small, so that a full P costs little. r is at most the smaller side of
a layer's kernel. A physics model has no layers.

Departures: LoRA-XS fine-tunes language models by gradients; a Kalman filter over A, and "tiny_lora", are ours.
Decides: drift_var, prior_var, lora_rank. Cost: that of the parent; the filter adds O(n² D), n = layers · r².
Expect: configs/icem_online_longer_pole.py: return 162 [153, 168] where the frozen network gets 122, 32 seeds, 0.5 ms a
step and seed on two CPU cores.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict

from core import ekf, planning
from core.clock import Clock
from core.config import choice, count, fraction, nonnegative, positive, whole
from core.dataset import read_arrays
from core.envs import Box, Transition, ended, hidden, repeat, require, restart
from core.errors import UserError
from core.evaluation import evaluate
from core.networks import MLP


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",
        env_kwargs=dict(reveal=False),  # the environment's own settings
        num_envs=count(1),  # each with its own truth, belief and plan
        num_steps=choice(1),  # of every environment in one train_step
        env_steps=count(200),  # one episode
        log_every=count(5),
        eval_every=count(200),
        eval_episodes=count(1),  # of each seed: fresh ones, in which it learns from the prior again
        rehearse=False,  # also play evaluation episodes with the weights of the moment, which stay fixed: `rehearsal`
        hidden_dims=count((64, 64)),
        pretrained="",  # file of weights and scaling (algorithms/dynamics.py); none: random weights
        learn=True,
        adapt=choice("lora_xs", "tiny_lora"),
        lora_rank=count(8),  # r
        lora_size=count(16),  # of v_l, tiny_lora
        belief=choice("full", "diagonal", "low_rank"),
        belief_rank=count(8),  # of low_rank
        prior_var=positive(0.1),  # P_0 = prior_var · I
        obs_var=positive(1e-3),  # R_0 = obs_var · I
        num_linearizations=count(1),  # of g in one update
        forgetting=positive(1.0),  # λ
        drift_var=nonnegative(0.0),  # q_0
        noise_rate=fraction(0.0),  # ρ
        horizon=count(25),
        kept_elites=whole(3),  # from one step to the next
        planner=dict(num_samples=count(40), num_elites=count(10), num_iterations=count(3), decay=positive(1.25),
                     init_std=positive(0.5), noise_beta=nonnegative(2.0), momentum=fraction(0.1)),
        # launchers.collect and launchers.pretrain read these two sections
        collect=dict(episodes=count(20), num_envs=count(10), learn=False, env_kwargs=dict(reveal=True),
                     action_noise=nonnegative(0.3)),
        pretrain=dict(updates=count(10_000), eval_every=count(500), batch_size=count(64), lr=positive(1e-3),
                      holdout=fraction(0.2), rollout_steps=count(25)),
    ))


class Carry(NamedTuple):  # of one environment, within an episode
    belief: ekf.Belief  # N(m, P) about θ
    R: jax.Array  # (D,)
    drift_var: jax.Array  # q
    plan: planning.Carry
    report: dict  # what the newest transition said about the belief before it: error, nll, nis, covered


class Agent(struct.PyTreeNode):
    weights: Any  # all weights at the start of an episode
    bases: dict  # of every layer: U_r S_r (I, r), V_r' (r, O), P (K, r, r)
    scaling: dict  # centre (I,) and spread (I,) of z, scale (D,) of changes
    env: Any = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, x, env, config):
        agent, (key, *keys) = cls(None, None, None, env, config), jax.random.split(key, 2 + len(config.hidden_dims))
        z = agent.inputs(x, jnp.zeros(env.action_space.shape))
        scaling = dict(centre=jnp.zeros_like(z), spread=jnp.ones_like(z), scale=jnp.ones_like(x))
        params = dict(weights=agent.network(x.size).init(key, z)["params"], scaling=scaling)
        agent, bases = agent.replace(**(read_params(config.pretrained, params) if config.pretrained else params)), {}
        for key, (name, layer) in zip(keys, agent.weights.items(), strict=True):
            U, S, Vt = jnp.linalg.svd(layer["kernel"], full_matrices=False)
            r = min(config.lora_rank, S.size)
            bases[name] = (U * S[None])[:, :r], Vt[:r], jax.random.normal(key, (config.lora_size, r, r)) / r
        return agent.replace(bases=bases)

    def network(self, out_dim):
        return MLP((*self.config.hidden_dims, out_dim), activation=nn.tanh)

    def inputs(self, x, action):  # (..., D), (..., A) -> (..., I)
        return jnp.concatenate([getattr(self.env, "features", lambda x: x)(x), action], axis=-1)

    def theta(self):  # at the start of an episode
        tiny = self.config.adapt == "tiny_lora"
        return {name: jnp.zeros(P.shape[:1] if tiny else P.shape[1:]) for name, (_, _, P) in self.bases.items()}

    def insert(self, theta):  # -> all weights, θ among them
        weights = dict(self.weights)
        for name, (left, right, P) in self.bases.items():
            A = jnp.einsum("k,kij->ij", theta[name], P) if self.config.adapt == "tiny_lora" else theta[name]
            weights[name] = {**weights[name], "kernel": weights[name]["kernel"] + left @ A @ right}
        return weights

    def predict(self, weights, x, action):  # (D,), (A,) -> (D,)
        z = (self.inputs(x, action) - self.scaling["centre"]) / self.scaling["spread"]
        return x + self.scaling["scale"] * self.network(x.size).apply({"params": weights}, z)

    def prior(self):
        if not self.config.learn:
            return ekf.Diagonal.create(self.theta(), 0.0)
        low_rank = functools.partial(ekf.LowRank.create, rank=self.config.belief_rank)
        forms = dict(full=ekf.Full.create, diagonal=ekf.Diagonal.create, low_rank=low_rank)
        return forms[self.config.belief](self.theta(), self.config.prior_var)

    def search(self, key, belief, plan, x, truth):  # -> the plan that the next step starts from, action (A,)
        model = functools.partial(self.predict, self.insert(belief.params))
        dynamics = model if truth is None else functools.partial(self.env.dynamics, truth)
        cost = functools.partial(planning.trajectory_cost, dynamics, self.env.cost, self.env.terminal_cost, x)
        return planning.icem(key, cost, plan, *self.env.action_space.bounds, **self.config.planner,
                             return_mode="mean" if truth is None else "best")[:2]

    def learn(self, carry, x, action, next_x):
        """The carry after one transition of one environment."""
        config, zero = self.config, jnp.zeros_like(next_x)  # the filter observes 0 = (g − y) + v: innovation y − g

        def error(theta):  # g − y, (D,)
            return (self.predict(self.insert(theta), x, action) - next_x) / self.scaling["scale"]

        before = carry.belief.predict(noise=carry.drift_var) if config.learn else carry.belief
        if config.learn and config.forgetting < 1:
            before = before.forget(config.forgetting, 10 * config.prior_var * before.mean.size)
        after, info = ekf.update(before, error, zero, carry.R, config.num_linearizations)
        carry = carry._replace(report=dict(
            error=jnp.sqrt(jnp.square(info.innovation).mean()), nll=-info.log_lik, nis=info.nis,
            covered=1.0 * (info.nis < ekf.nis_band(zero.size, 1, 0.9)[1])))  # below the 95% quantile: 0.95 if right
        if config.learn and config.noise_rate:
            carry = carry._replace(R=ekf.adapt_R(carry.R, after, error, zero, config.noise_rate),
                                   drift_var=ekf.adapt_noise(carry.drift_var, before, after, config.noise_rate))
        return carry._replace(belief=after)  # with P = 0 it is the belief before


def read_params(path, like):  # -> weights and scaling; their names and shapes must be those of `like`
    found, due = ({name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
                  for tree in (read_arrays(path), like))
    for name in sorted(found.keys() | due.keys()):
        if found.get(name) != due.get(name):
            raise UserError(f"{path}: {name} has shape {found.get(name)}, the config's network {due.get(name)}")
    return jax.tree.map(jnp.asarray, read_arrays(path))


class Run(NamedTuple):
    agent: Agent
    carry: Carry  # (E, ...)
    env_state: Any
    obs: jax.Array
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True, offers=("cost", "terminal_cost"))
    agent_key, env_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    agent = Agent.create(agent_key, hidden.split(source.env, obs)[0][0], source.env, config)
    run = Run(agent, None, env_state, obs, Clock.start())
    return run._replace(carry=initial_carry(run, source.num_envs))


def initial_carry(run, num_envs):
    agent, config = run.agent, run.agent.config
    plan = planning.initial_carry(*agent.env.action_space.bounds, config.horizon, config.kept_elites)
    R = jnp.full_like(agent.scaling["scale"], config.obs_var)
    report = dict.fromkeys(("error", "nll", "nis", "covered"), jnp.float32(0))
    return repeat(Carry(agent.prior(), R, jnp.float32(config.drift_var), plan, report), num_envs)


def act(run, carry, obs, key):
    x, truth = hidden.split(run.agent.env, obs)  # no truth, unless the environment reveals it
    plan, action = jax.vmap(run.agent.search)(jax.random.split(key, len(obs)), carry.belief, carry.plan, x, truth)
    return carry._replace(plan=plan), action


def observe(run, carry, step):
    x, truth = hidden.split(run.agent.env, step.obs)
    after = jax.vmap(run.agent.learn)(carry, x, step.action, hidden.split(run.agent.env, step.next_obs)[0])
    return after if truth is None else carry._replace(report=after.report)


def train_step(run, key, source, config):
    """One step of every environment: act, step, observe; where an episode ended, the carry starts again."""
    act_key, _, env_key = jax.random.split(key, 3)  # the second is unused; without it, published numbers change
    carry, action = act(run, run.carry, run.obs, act_key)
    env_state, step = source.step(env_key, run.env_state, action)
    carry = observe(run, carry, Transition.of(run.obs, action, step))
    info = jax.tree.map(jnp.mean, carry.report | dict(reward=step.reward))
    carry = restart(ended(step), initial_carry(run, source.num_envs), carry)
    learns = config.learn and not getattr(source.env, "reveal", False)
    clock = run.clock.tick(env_steps=source.num_envs, updates=source.num_envs * learns)
    run = run._replace(carry=carry, env_state=env_state, obs=step.obs, clock=clock)
    return run, info | dict(episode=jax.tree.map(jnp.sum, step.info["episode"]))


def measure(run, key, source, config):
    """`rehearsal`: the return of episodes of `source` with the weights of the moment, which stay fixed."""
    if not config.rehearse:
        return {}
    index = jnp.arange(source.num_envs) % config.num_envs  # whose weights each episode plays with
    carry = jax.tree.map(lambda leaf: leaf[index], run.carry)._replace(plan=initial_carry(run, source.num_envs).plan)
    return {"rehearsal": evaluate(functools.partial(act, run), source, key, carry)[0].mean()}
