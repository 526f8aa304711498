"""PETS: plan through an ensemble of probabilistic networks (Chua et al., 2018, arXiv:1805.12114).

    z  = (features(x), u),  z̃ = (z − m) / s            m, s: mean and deviation of z in memory     inputs, standardise
    x' = x + μ_b(z̃) + σ_b(z̃) ε,  ε ~ N(0, I)           member b of B                               Ensemble, predict
    L  = Σ_b mean_i Σ_d ((μ_b − Δ)² e^(−ℓ_b) + ℓ_b)    ℓ = log σ², Δ = x' − x; mean_i: over a       loss
         + κ Σ_d (ℓ_max − ℓ_min) + ½ λ Σ_l |W_l|²      minibatch of b's bootstrap; W_l: kernel of layer l
    ℓ <- ℓ_max − softplus(ℓ_max − ℓ),  then  ℓ <- ℓ_min + softplus(ℓ − ℓ_min);  bounds are learnt  Ensemble
    J(u_1:H) = mean_p [Σ_t c(x_t^p, u_t, x_{t+1}^p) + c_H(x_{H+1}^p)]                              expected_cost
         All P particles start at x. Member b moves particles number b P/B to (b + 1) P/B − 1. Number p takes the
         p-th ε. TSinf: a particle keeps its number, and so its member. TS1: before each step, the first one too, a
         random permutation renumbers the particles. A particle is lost when any |z̃_t| >= far; a plan with a lost
         particle or with a cost that is not finite has infinite cost.
    u = first action of the mean plan of a search for min J, by iCEM or CEM (core.planning)        plan, act

    x state, u action, x' true successor; c, c_H costs of the environment, given to PETS; D size of x; H horizon,
    P num_particles, B num_members, λ weight_decay, κ bound_coef.

    init         take random_steps random steps and add them to memory
    train_step   fit: m, s of all memory; then num_updates Adam steps from the weights so far
                 num_steps times, in every environment: plan, step; where an episode ended, start a new plan
                 test: error, nll and coverage of the new transitions, from which no member has learnt yet
                 add them to memory; each member draws as many of them, with replacement, for its bootstrap

Ends: episodes and plans go on from one train_step to the next. A transition that ends an episode, by a fall or by the
time limit, is used like any other (the true successor). The planner does not know that episodes end.
Random: first weights (agent_key), start states (reset_key, env_key), random steps (play_key), bootstraps (store_key),
minibatches (fit_key). At every step each environment has its own ε and permutations (chance_key), the same for all
plans of a search, and its own samples (search_key).
Kept: `Run` is the checkpoint: agent, memory, environments, plans (`carry`), clock (counts of steps and updates).
Departures, the paper's way in brackets: a fit every num_steps steps (after every episode); num_updates minibatches
drawn with replacement (5 epochs); a bootstrap drawn once, from the new transitions (from all, at every fit); shared ε
and permutations (new ones for each plan), so costs differ by actions only; `far` (a NaN costs 1e6); CEM without early
stop; one λ (one for each layer); Σ_d, as in the paper's formula (their code: the mean over d, so κ and λ weigh D times
more there). By default iCEM that executes its mean (iCEM's paper: the cheapest sample), two layers, fewer samples and
particles; configs/pets_paper.py has the authors' numbers.
Decides: num_steps, where episodes can end early: in configs/pets_balance.py, with a fit every 50 steps, the pole fell
once in 1,000 steps (one seed); with a fit after every episode, 200 was first reached at trial 5 (10 seeds). Then
planner.num_samples (on the cart-pole with the true model, 100 plans a step score 178, 400 in each of 5 iterations 182),
horizon and num_updates (both not measured).
Cost: planning dominates. One action simulates 100 plans (40 + 3 kept, 32, 25), each P x H network evaluations: 12,500,
about 20 ms on a CPU core. One fit takes num_updates x B x batch_size (160,000), with gradients.
Expect: configs/pets_cartpole.py: about 177 after 10 episodes (best with the true model: 183); 40 s a seed, 2 CPU cores.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core import planning
from core.clock import Clock
from core.config import choice, count, fraction, nonnegative, positive, rising, whole
from core.dataset import ReplayBuffer
from core.envs import Box, ended, repeat, require, restart
from core.errors import UserError
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",
        env_kwargs=dict(),  # its own settings
        num_envs=count(1),
        num_steps=count(200),  # of every environment, between two fits
        env_steps=count(2200),  # the budget of one seed, over all its environments, random_steps included
        random_steps=whole(200),  # before the first fit
        eval_every=count(2200),
        eval_episodes=count(3),
        log_every=count(200),
        num_members=count(5),  # B
        hidden_dims=count((200, 200)),
        weight_decay=nonnegative(2.5e-4),  # λ
        log_var_bounds=rising((-10.0, 0.5)),  # ℓ_min and ℓ_max at the start
        bound_coef=nonnegative(0.01),  # κ
        lr=positive(1e-3),
        num_updates=count(1000),  # of a fit
        batch_size=count(32),  # of each member
        min_std=positive(1e-6),  # an input that varies less keeps its scale
        propagation=choice("tsinf", "ts1"),
        num_particles=count(5),  # P
        far=positive(100.0),  # standard deviations
        horizon=count(25),  # H
        search=choice("icem", "cem"),  # `planner` holds its keywords
        planner=dict(num_samples=count(40), num_elites=count(10), num_iterations=count(3), momentum=fraction(0.1),
                     decay=positive(1.25),  # of num_samples, from iteration to iteration
                     init_std=positive(0.5),  # in half-widths of the action box
                     noise_beta=nonnegative(2.0)),
        kept_elites=whole(3),  # 0 for cem
        smoke=dict(num_steps=10, num_updates=10, random_steps=20, horizon=5, planner=dict(num_samples=8, num_elites=4)),
    ))


class Ensemble(nn.Module):
    """(B, M, I) -> mean and log-variance (B, M, D) of x' − x; member b sees row b."""

    num_members: int
    hidden_dims: tuple[int, ...]
    out_dim: int
    log_var_bounds: tuple[float, float]

    @nn.compact
    def __call__(self, z):
        for i, dim in enumerate((*self.hidden_dims, 2 * self.out_dim)):
            init = nn.initializers.truncated_normal(0.5 / z.shape[-1] ** 0.5)  # as in the paper
            weight = self.param(f"weight_{i}", init, (self.num_members, z.shape[-1], dim))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.num_members, 1, dim))
            z = jnp.einsum("bmi,bij->bmj", z, weight) + bias
            z = nn.silu(z) if i < len(self.hidden_dims) else z
        mean, log_var = jnp.split(z, 2, axis=-1)
        low, high = (self.param(f"{name}_log_var", nn.initializers.constant(bound), (1, 1, self.out_dim))
                     for name, bound in zip(("min", "max"), self.log_var_bounds, strict=True))
        log_var = high - nn.softplus(high - log_var)
        return mean, low + nn.softplus(log_var - low)


class Agent(struct.PyTreeNode):
    dynamics: TrainState
    centre: jax.Array  # m (I,)
    spread: jax.Array  # s (I,)
    env: Any = struct.field(pytree_node=False)  # one copy of the environment: its costs, features and action space
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, env, z, x, config):
        net = Ensemble(config.num_members, config.hidden_dims, x.size, config.log_var_bounds)
        dynamics = TrainState.create(net, key, repeat(z[None], config.num_members), tx=optax.adam(config.lr))
        return cls(dynamics, jnp.zeros(z.size), jnp.ones(z.size), env, config)

    def standardise(self, z):
        return (z - self.centre[None, None]) / self.spread[None, None]

    def predict(self, z, params=None):
        """Mean and log-variance (B, M, D) of the change of x, from (B, M, I)."""
        return self.dynamics(self.standardise(z), params=params)

    def loss(self, params, z, change):
        """(B, M, I) and (B, M, D): each member its own rows."""
        mean, log_var = self.predict(z, params)
        nll = (jnp.square(mean - change) * jnp.exp(-log_var) + log_var).sum(-1).mean(-1).sum()
        bounds = self.config.bound_coef * (params["max_log_var"] - params["min_log_var"]).sum()
        decay = 0.5 * sum(jnp.square(value).sum() for name, value in params.items() if name.startswith("weight"))
        return nll + bounds + self.config.weight_decay * decay, {"loss": nll}

    def fit(self, key, memory):
        filled = (jnp.arange(memory.capacity) < memory.size)[:, None]
        centre, spread = (statistic(memory.data["z"], axis=0, where=filled) for statistic in (jnp.mean, jnp.std))
        agent = self.replace(centre=centre, spread=jnp.where(spread < self.config.min_std, 1.0, spread))

        def update(dynamics, key):
            slot = jax.random.randint(key, (self.config.num_members, self.config.batch_size), 0, memory.size)
            row = memory.data["bootstrap"][slot, jnp.arange(self.config.num_members)[:, None]]
            return dynamics.minimize(agent.loss, memory.data["z"][row], memory.data["change"][row])

        dynamics, info = jax.lax.scan(update, self.dynamics, jax.random.split(key, self.config.num_updates))
        return agent.replace(dynamics=dynamics), jax.tree.map(jnp.mean, info)

    def test(self, z, change):
        """The mixture of members, taken as one normal, on (N, I) and (N, D): root mean square error, negative log
        likelihood a dimension, and the share of changes in its central 95%."""
        mean, log_var = self.predict(repeat(z, self.config.num_members))
        var, error = jnp.exp(log_var).mean(0) + mean.var(0), change - mean.mean(0)
        nll = 0.5 * (jnp.square(error) / var + jnp.log(2 * jnp.pi * var))
        inside = jnp.square(error) < 1.96**2 * var
        return {"error": jnp.sqrt(jnp.square(error).mean()), "nll": nll.mean(), "coverage": inside.mean()}

    def chance(self, key, x):
        """Of one search: ε (H, P, 1, D), and the permutation of the particles before each step (H, P)."""
        noise_key, deal_key = jax.random.split(key)
        H, P = self.config.horizon, self.config.num_particles
        return (jax.random.normal(noise_key, (H, P, 1, x.size)),
                jnp.argsort(jax.random.uniform(deal_key, (H, P)), axis=1))

    def expected_cost(self, actions, x, chance):
        """J of plans (H, N, A) from x (D,): (N,)."""
        (_, N, A), B, P, D = actions.shape, self.config.num_members, self.config.num_particles, x.size

        def step(particles, now):
            (x, lost, total), (action, noise, order) = particles, now
            if self.config.propagation == "ts1":
                x = x[order]  # lost and total stay where they are: only their mean over all particles is used
            action = jnp.broadcast_to(action, (P, N, A))
            z = inputs(self.env, x, action).reshape(B, P // B * N, -1)  # row b: the particles of member b, in all plans
            lost = lost | ~(jnp.abs(self.standardise(z)) < self.config.far).all(-1).reshape(P, N)
            mean, log_var = (v.reshape(P, N, D) for v in self.predict(z))
            next_x = x + mean + jnp.exp(0.5 * log_var) * noise
            return (next_x, lost, total + jax.vmap(jax.vmap(self.env.cost))(x, action, next_x)), None

        start = (jnp.broadcast_to(x, (P, N, D)), jnp.zeros((P, N), bool), jnp.zeros((P, N)))
        (x, lost, total), _ = jax.lax.scan(step, start, (actions, *chance))
        total = total + jax.vmap(jax.vmap(self.env.terminal_cost))(x)
        return jnp.where(lost, jnp.inf, total).mean(axis=0)

    def plan(self, carry, x, key):
        """For one environment in x (D,): the next carry, and the first action of the mean plan. The cheapest sample
        exploits model error, so the mean is executed."""
        chance_key, search_key = jax.random.split(key)
        cost = functools.partial(self.expected_cost, x=x, chance=self.chance(chance_key, x))
        search = functools.partial(planning.icem, return_mode="mean") if self.config.search == "icem" else planning.cem
        carry, action, _ = search(search_key, cost, carry, *self.env.action_space.bounds, **self.config.planner)
        return carry, action


def inputs(env, x, action):
    """z (..., I) of (..., D) and (..., A): of angles their sine and cosine, if the environment has `features`."""
    features = getattr(env, "features", lambda x: x)
    return jnp.concatenate([features(x), action], axis=-1)


def remember(key, memory, z, change):
    """Add (N, ...) transitions. Each member draws N of them, with replacement; b learns from rows bootstrap[:, b]."""
    num_members = memory.data["bootstrap"].shape[1]
    rows = memory.size + jax.random.randint(key, (len(z), num_members), 0, len(z))
    return memory.add(dict(z=z, change=change, bootstrap=rows))


class Run(NamedTuple):
    agent: Agent
    memory: ReplayBuffer  # z (C, I), change (C, D), bootstrap (C, B)
    env_state: Any
    obs: jax.Array  # (E, D)
    carry: planning.Carry  # (E, ...)
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True, offers=("cost", "terminal_cost"))
    if config.num_particles % config.num_members:
        raise UserError(f"num_particles = {config.num_particles} is no multiple of num_members = {config.num_members}")
    if ("init_std" in config.planner) != (config.search == "icem"):
        raise UserError(f'search = "{config.search}", but `planner` holds the keywords of the other search')
    agent_key, reset_key, play_key, store_key = jax.random.split(key, 4)
    env_state, obs = source.reset(reset_key)
    z, bootstrap = inputs(source.env, obs[0], jnp.zeros(source.action_space.shape)), jnp.zeros(config.num_members, int)
    memory = ReplayBuffer.create(dict(z=z, change=obs[0], bootstrap=bootstrap), config.env_steps)
    agent, steps = Agent.create(agent_key, source.env, z, obs[0], config), config.random_steps // source.num_envs
    run = Run(agent, memory, env_state, obs, (), Clock.start(steps * source.num_envs))
    run = run._replace(carry=initial_carry(run, source.num_envs))  # it reads the agent from the run

    def explore(run, carry, obs, key):
        return carry, source.action_space.sample(key, (source.num_envs,))

    run, z, change, _ = play(run, play_key, source, steps, explore)
    return run._replace(memory=remember(store_key, memory, z, change))


def train_step(run, key, source, config):
    fit_key, play_key, store_key = jax.random.split(key, 3)
    agent, info = run.agent.fit(fit_key, run.memory)
    run, z, change, episode = play(run._replace(agent=agent), play_key, source, config.num_steps, act)
    clock = run.clock.tick(env_steps=len(z), updates=config.num_updates)
    run = run._replace(memory=remember(store_key, run.memory, z, change), clock=clock)
    return run, info | agent.test(z, change) | dict(episode=episode)


def play(run, key, source, num_steps, policy):
    """-> run, z and change of the transitions (T E, ...), the sums of info["episode"]."""
    def env_step(run, keys):
        act_key, env_key = keys
        carry, action = policy(run, run.carry, run.obs, act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        carry = restart(ended(step), initial_carry(run, source.num_envs), carry)
        data = inputs(source.env, run.obs, action), step.next_obs - run.obs
        return run._replace(env_state=env_state, obs=step.obs, carry=carry), (data, step.info["episode"])

    run, (data, episode) = jax.lax.scan(env_step, run, jax.random.split(key, (num_steps, 2)))
    return run, *(v.reshape(-1, v.shape[-1]) for v in data), jax.tree.map(jnp.sum, episode)


def act(run, carry, obs, key):
    """obs (E, D) -> carry (E, ...), action (E, A)."""
    return jax.vmap(run.agent.plan)(carry, obs, jax.random.split(key, len(obs)))


def initial_carry(run, num_envs):
    config, box = run.agent.config, run.agent.env.action_space.bounds
    return repeat(planning.initial_carry(*box, config.horizon, config.kept_elites), num_envs)
