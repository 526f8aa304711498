"""The Good Shepherd (Balaguer et al., 2022, arXiv:2202.10135), by an evolution strategy (Salimans et al., 2017,
arXiv:1703.03864).

A co-player learns while they play. The agent's policy stays fixed for a whole trial, so it is chosen for where it leads
the co-player. An evolution strategy compares whole trials and differentiates through nothing:

    ε_i ~ N(0, I), i = 1 … P/2;   ε_{P/2+i} = −ε_i          antithetic pairs                            Agent.draw
    f_i = mean return of a trial with policy θ + σ ε_i, over E trials, the same for all i              trials
    w_i = (rank_i − 1) / (P − 1) − ½                        rank 1 for the lowest f_i, P for the highest shape
    g   = Σ_i w_i ε_i / (P σ)                                                                          Agent.update
    θ  <- θ + α Adam(g)                                                                                Agent.update

    θ mean, the policy's parameters; σ noise_std; P population; E num_envs; α lr. Equal returns share their mean rank.

Here the policy is θ itself: five logits, of a player who remembers one round (core/envs/learning_coplayer.py). The
agent observes the co-player and does not use it: a policy that did would adapt within the trial.

Ends: a trial is one episode. What follows an end does not count.
Random: train_step splits its key into that of ε (noise_key) and that of the trials (trial_key). All members meet the
same co-players, drawn anew in each generation. So two members differ by their policies alone.
Departures: the paper's agent designs mechanisms for many learners; this is the form that Pax calls GS, for one. σ stays
constant, there is no weight decay, and Adam has its usual constants. Values are exact, so no round is sampled.
Kept: `Run`: θ, Adam's moments, the clock. A checkpoint holds `Run`, the number of the iteration and the sums since the
last row of the log.
Decides: noise_std; the co-player's learning_rate.
Cost: one generation plays P · E trials of 100 steps. Each step takes a gradient through four linear equations.
Expect: a return of −64.2, IQM of 8 seeds, after 200 generations of 102,400 steps with configs/good_shepherd_ipd.py:
−0.64 per round, and −1.86 for the co-player. Two that cooperate have −1, two that defect −2. 80 s for all seeds on 2
CPU cores, 180 s where other programs run.
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax.scipy.stats import rankdata

from core.clock import Clock
from core.config import count, positive
from core.envs import Box, ended, require
from core.errors import UserError


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="learning_coplayer",  # the prisoner's dilemma, against a naive learner
        num_envs=count(16),  # E, trials of every member
        updates=count(200),  # generations, the budget of one seed
        eval_every=count(20),  # generations between evaluations
        eval_episodes=count(64),  # trials of the mean
        population=count(64),  # P, even
        noise_std=positive(0.1),  # σ
        lr=positive(0.1),  # α
    ))


class Agent(struct.PyTreeNode):
    mean: jax.Array  # (A,) θ
    opt_state: Any
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, size, config):
        if config.population % 2:
            raise UserError(f"population = {config.population}: has to be even, for pairs")
        mean = jnp.zeros(size)
        return cls(mean, optax.adam(config.lr).init(mean), config)

    def draw(self, key):  # -> (P, A)
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
    require(source, config, actions=(Box,), offers=("reset",))  # by which trials start: none of a host has it
    return Run(Agent.create(source.action_space.shape[0], config), Clock.start())


def train_step(run, key, source, config):
    """One generation."""
    noise_key, trial_key = jax.random.split(key)
    noise = run.agent.draw(noise_key)
    members = run.agent.mean[None] + config.noise_std * noise
    reward, lives = jax.vmap(trials, in_axes=(0, None, None))(members, trial_key, source)  # (P, T, E)
    fitness = reward.sum(axis=1).mean(axis=1)
    agent, info = run.agent.update(noise, fitness)
    return Run(agent, run.clock.tick(lives.sum(), 1)), info | dict(population_return=fitness.mean())


def trials(policy, key, source):
    """One trial in each of the E environments: the rewards, and whether the step was a part of the trial; both (T, E),
    and zero after an end."""
    reset_key, step_key = jax.random.split(key)
    state, _ = jax.vmap(source.env.reset)(jax.random.split(reset_key, source.num_envs))

    def step(carry, keys):
        state, lives = carry
        state, ts = jax.vmap(source.env.step, in_axes=(0, 0, None))(keys, state, policy)
        return (state, lives & ~ended(ts)), (ts.reward * lives, lives)

    keys = jax.random.split(step_key, (source.max_steps, source.num_envs))
    return jax.lax.scan(step, (state, jnp.ones(source.num_envs, bool)), keys)[1]


def act(run, carry, obs, key):
    """The mean, at every step of a trial. Nothing is carried between steps."""
    return (), jnp.broadcast_to(run.agent.mean, (len(obs), run.agent.mean.size))
