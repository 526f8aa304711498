"""SHAPER (Khan et al., 2024, arXiv:2312.12568), by an evolution strategy (Salimans et al., 2017, arXiv:1703.03864).
Child of good_shepherd.py; the diff is the method.

A trial is many games against one co-player, which learns after each game. The agent's memory lasts for the whole trial,
over the ends of games, so it can show how the co-player changes. An evolution strategy ranks members by their returns
of whole trials. It needs no gradient:

    h_t = GRU(h_{t−1}, s_t),   π(a | h_t) = softmax(W h_t + b),   h_0 = 0 at the start of a trial     Policy
    ε_i ~ N(0, I), i = 1 … P/2;   ε_{P/2+i} = −ε_i          antithetic pairs                            Agent.draw
    f_i = mean return of a trial with policy θ + σ ε_i, over E trials, against the same E co-players   trials
    w_i = (rank_i − 1) / (P − 1) − ½                        rank 1 for the lowest f_i, P for the highest shape
    g   = Σ_i w_i ε_i / (P σ)                                                                          Agent.update
    θ  <- θ + α Adam(g)                                                                                Agent.update

    θ mean, the weights of the policy; σ noise_std; P population; E num_envs; α lr. Equal returns share their mean rank.
    s_t the last outcome of the running game (core/envs/tabular_coplayer.py). Training and evaluation both draw actions
    from π.

Ends: a trial is one episode. Rewards after its end are ignored.
Random: first weights (init's key). train_step splits its key into that of ε (noise_key) and that of the trials
(trial_key). All members meet the same co-players, and their actions use the same random numbers, drawn anew in each
generation. So two members differ by their policies alone.
Departures: in the paper a member plays many games at once with each co-player, which learns from all of them by PPO,
and the hidden states of these games are averaged. Here they play one game at a time, and the co-player learns from it
by REINFORCE. σ stays constant, there is no weight decay, and Adam has its usual constants.
Kept: `Run`: θ, Adam's moments, the clock. A checkpoint holds `Run`, the number of the iteration and the sums since the
last row of the log.
Decides: noise_std, lr; the co-player's learning_rate.
Cost: one generation plays P · E trials of 2,000 rounds, each with a pass of the GRU.
Expect: a return of −802 in 2,000 rounds, IQM of 8 seeds, after 500 generations of 512,000 rounds with
configs/shaper_ipd.py: −0.40 a round, and −2.51 for the co-player. Two that cooperate have −1, two that defect −2.
9 minutes for all seeds on 2 CPU cores where other programs run.
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import rankdata

from core.clock import Clock
from core.config import count, positive
from core.envs import Discrete, ended, require
from core.errors import UserError
from core.networks import flat


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="tabular_coplayer",  # the prisoner's dilemma, against a naive learner
        num_envs=count(4),  # E, trials of every member
        updates=count(500),  # generations, the budget of one seed
        eval_every=count(50),  # generations between evaluations
        eval_episodes=count(64),  # trials of the mean
        memory_dim=count(16),  # of h
        population=count(64),  # P, even
        noise_std=positive(0.1),  # σ
        lr=positive(0.03),  # α
    ))


class Policy(nn.Module):
    num_actions: int
    memory_dim: int

    @nn.compact
    def __call__(self, memory, obs):  # (E, H), (E, ...) -> (E, H), logits (E, A)
        memory, _ = nn.GRUCell(self.memory_dim)(memory, flat(obs))
        return memory, nn.Dense(self.num_actions)(memory)


class Agent(struct.PyTreeNode):
    mean: jax.Array  # (D,) θ
    opt_state: Any
    policy: Policy = struct.field(pytree_node=False)
    obs_dim: int = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs_dim, num_actions, config):
        if config.population % 2:
            raise UserError(f"population = {config.population}: has to be even, for pairs")
        policy = Policy(num_actions, config.memory_dim)
        mean, _ = ravel_pytree(policy.init(key, jnp.zeros((1, config.memory_dim)), jnp.zeros((1, obs_dim))))
        return cls(mean, optax.adam(config.lr).init(mean), policy, obs_dim, config)

    def weights(self, member):  # (D,) -> as the policy takes them
        examples = jnp.zeros((1, self.config.memory_dim)), jnp.zeros((1, self.obs_dim))
        like = jax.eval_shape(self.policy.init, jax.random.key(0), *examples)
        return ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape), like))[1](member)

    def draw(self, key):  # -> (P, D)
        noise = jax.random.normal(key, (self.config.population // 2, self.mean.size))
        return jnp.concatenate([noise, -noise])

    def update(self, noise, fitness):
        """One step of the mean, by the returns (P,) of the members mean + noise_std · noise."""
        slope = shape(fitness) @ noise / (self.config.population * self.config.noise_std)
        step, opt_state = optax.adam(self.config.lr).update(-slope, self.opt_state)
        return self.replace(mean=self.mean + step, opt_state=opt_state), dict(grad_norm=jnp.linalg.norm(slope))


def shape(fitness):  # (P,) -> (P,)
    return (rankdata(fitness) - 1) / (fitness.size - 1) - 0.5


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Discrete,), offers=("reset",))  # by which trials start: none of a host has it
    obs_dim = jax.eval_shape(lambda key: flat(source.reset(key)[1]), key).shape[1]
    return Run(Agent.create(key, obs_dim, source.action_space.n, config), Clock.start())


def train_step(run, key, source, config):
    """One generation."""
    noise_key, trial_key = jax.random.split(key)
    noise = run.agent.draw(noise_key)
    members = run.agent.mean[None] + config.noise_std * noise
    reward, lives = jax.vmap(trials, in_axes=(None, 0, None, None))(run.agent, members, trial_key, source)
    fitness = reward.sum(axis=1).mean(axis=1)  # of (P, T, E)
    agent, info = run.agent.update(noise, fitness)
    return Run(agent, run.clock.tick(lives.sum(), 1)), info | dict(population_return=fitness.mean())


def trials(agent, member, key, source):
    """One trial in each of the E environments: the rewards, and whether the step was a part of the trial; both (T, E),
    and zero after an end."""
    reset_key, step_key = jax.random.split(key)
    state, obs = jax.vmap(source.env.reset)(jax.random.split(reset_key, source.num_envs))
    memory, weights = jnp.zeros((source.num_envs, agent.config.memory_dim)), agent.weights(member)

    def step(carry, key):
        state, obs, memory, lives = carry
        act_key, env_key = jax.random.split(key)
        memory, logits = agent.policy.apply(weights, memory, obs)
        action = jax.random.categorical(act_key, logits)
        state, ts = jax.vmap(source.env.step)(jax.random.split(env_key, source.num_envs), state, action)
        return (state, ts.obs, memory, lives & ~ended(ts)), (ts.reward * lives, lives)

    keys = jax.random.split(step_key, source.max_steps)
    return jax.lax.scan(step, (state, obs, memory, jnp.ones(source.num_envs, bool)), keys)[1]


def initial_carry(run, num_envs):
    return jnp.zeros((num_envs, run.agent.config.memory_dim))


def act(run, carry, obs, key):
    """An action drawn from π. The carry is the memory, zero at the start of a trial."""
    carry, logits = run.agent.policy.apply(run.agent.weights(run.agent.mean), carry, obs)
    return carry, jax.random.categorical(key, logits)
