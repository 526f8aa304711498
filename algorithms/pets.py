"""PETS: plan through an ensemble of probabilistic networks (Chua et al., 2018, arXiv:1805.12114).

    x' = x + μ_b(z) + σ_b(z) ε,  ε ~ N(0, I)         member b of B; z = standardised (features of x, u)       predict
    L  = Σ_b mean_i Σ_d ((μ_b − Δ)² e^(−s_b) + s_b)  Δ = x' − x, s = log σ²                                   loss
         + 0.01 Σ_d (s_max − s_min) + λ ½ Σ |W|²     the mean over i is that of b's own bootstrap of the data
         s <- s_max − softplus(s_max − s);  s <- s_min + softplus(s − s_min);  both bounds are learnt         Ensemble
    J(u_1:H) = mean_p Σ_t c(x_p,t, u_t, x_p,t+1)     P particles a plan, each moved by one member       expected_cost
         TSinf: always by the same;  TS1: dealt anew at every step, P / B to each member
    Every episode: fit on all data, from the weights so far; then at every step do the first action       train_step
    of the plan whose J is least, by CEM or iCEM (core.planning); store the episode.

    B num_members, P num_particles, H horizon, λ weight_decay, c the environment's cost, which is known.

Episodes are judged by their raw return; `return` is the mean of the last `score_episodes`, as single ones swing. An
episode that no member has seen is a test of them, before it is stored: `error`, `nll` and `coverage` of its changes.

Departures: all plans of a search share ε and the dealing of TS1, so that plans differ by what they do, not by their
luck. A bootstrap is drawn once, when an episode is stored, from that episode. `num_updates` to a fit, of
minibatches drawn with replacement, instead of epochs; one λ for all layers; CEM has no early stop. A plan of which a
particle is not finite, or further than FAR from the data, is worth nothing, however good the model believes it to be.
The planner does not know that episodes end: a cost says by itself what an end is worth.

Expect: configs/pets_cartpole.py, 177.1 [176.7, 177.5] over episodes 8 to 10, 10 seeds, 40 s a seed on two cores.
"""
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core import planning
from core.errors import UserError, check_choices
from core.evaluation import ended
from core.train_state import TrainState

FAR = 100.0  # standard deviations of the data


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",
        env_kwargs=dict(),  # its own settings
        num_envs=1,  # episodes between two fits
        num_steps=200,  # the longest that an episode may be
        env_steps=2000,
        random_steps=200,  # before the first plan, on top of env_steps
        eval_every=200,
        score_episodes=3,  # whose mean is `return`
        num_members=5,
        hidden=(200, 200),  # the paper: 3 layers
        weight_decay=2.5e-4,
        lr=1e-3,
        num_updates=1000,
        batch_size=32,  # of each member
        propagation="tsinf",  # or ts1
        num_particles=5,  # the paper: 20
        planner="icem",  # or cem, the paper's: 400 samples, 40 elites, 5 iterations
        horizon=25,
        num_samples=40,
        num_elites=10,
        num_iterations=3,
        momentum=0.1,  # of mean and variance, from iteration to iteration
        population_decay=1.25,  # this and what follows: icem only
        kept_elites=3,
        init_std=0.5,  # of the box
        noise_beta=2.0,
        smoke=dict(num_steps=10, num_updates=10, random_steps=20),  # what --smoke shrinks, besides the budget
    ))


class Ensemble(nn.Module):
    """(B, M, I) -> mean and log-variance (B, M, D): each member on its own M rows."""

    num_members: int
    hidden: tuple[int, ...]
    out_dim: int

    @nn.compact
    def __call__(self, z):
        for i, dim in enumerate((*self.hidden, 2 * self.out_dim)):
            init = nn.initializers.truncated_normal(0.5 / z.shape[-1] ** 0.5)
            weight = self.param(f"weight_{i}", init, (self.num_members, z.shape[-1], dim))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.num_members, 1, dim))
            z = jnp.einsum("bmi,bij->bmj", z, weight) + bias
            z = nn.silu(z) if i < len(self.hidden) else z
        mean, log_var = jnp.split(z, 2, axis=-1)
        highest = self.param("max_log_var", nn.initializers.constant(0.5), (1, 1, self.out_dim))
        lowest = self.param("min_log_var", nn.initializers.constant(-10.0), (1, 1, self.out_dim))
        log_var = highest - nn.softplus(highest - log_var)
        return mean, lowest + nn.softplus(log_var - lowest)


class Memory(NamedTuple):
    """What happened, in order. Rows from `size` on are empty."""

    z: jax.Array  # (C, I)
    change: jax.Array  # (C, D)
    bootstrap: jax.Array  # (B, C): entry (b, i) is the row that member b learns from in place of row i
    size: jax.Array


class Agent(struct.PyTreeNode):
    dynamics: TrainState
    centre: jax.Array  # (I,), of z in memory
    spread: jax.Array  # (I,), its standard deviation

    @classmethod
    def create(cls, key, z, change, config):
        net = Ensemble(config.num_members, tuple(config.hidden), change.size)
        example = jnp.broadcast_to(z, (config.num_members, 1, z.size))
        dynamics = TrainState.create(net, key, example, tx=optax.adam(config.lr))
        return cls(dynamics, jnp.zeros(z.size), jnp.ones(z.size))

    def standardise(self, z):
        return (z - self.centre[None, None]) / self.spread[None, None]

    def predict(self, z, params=None):
        """Mean and log-variance (B, M, D) of the change of x, from (B, M, I)."""
        return self.dynamics(self.standardise(z), params=params)

    def loss(self, params, z, change, config):
        """(B, M, I) and (B, M, D), each member's own."""
        mean, log_var = self.predict(z, params)
        nll = (jnp.square(mean - change) * jnp.exp(-log_var) + log_var).sum(-1).mean(-1).sum()
        bounds = 0.01 * (params["max_log_var"] - params["min_log_var"]).sum()
        decay = sum(0.5 * jnp.square(value).sum() for name, value in params.items() if name.startswith("weight"))
        return nll + bounds + config.weight_decay * decay, {"loss": nll}

    def fit(self, key, memory, config):
        """Standardise to the data so far, then `num_updates` steps of every member on its bootstrap."""
        known = (jnp.arange(len(memory.z)) < memory.size)[:, None]
        spread = memory.z.std(0, where=known)
        agent = self.replace(centre=memory.z.mean(0, where=known), spread=jnp.where(spread < 1e-6, 1.0, spread))

        def update(dynamics, key):
            slot = jax.random.randint(key, (config.num_members, config.batch_size), 0, memory.size)
            row = jnp.take_along_axis(memory.bootstrap, slot, axis=1)
            return dynamics.minimize(agent.loss, memory.z[row], memory.change[row], config)

        dynamics, info = jax.lax.scan(update, self.dynamics, jax.random.split(key, config.num_updates))
        return agent.replace(dynamics=dynamics), jax.tree.map(jnp.mean, info)


def inputs(x, action, env):
    """z of (..., D) and (..., A): of angles their sine and cosine, if the environment says so."""
    features = getattr(env.env, "features", lambda x: x)
    return jnp.concatenate([features(x), action], axis=-1)


def remember(key, memory, z, change, happened):
    """Append those of the (N, ...) transitions that happened, and draw each member's bootstrap of them for good."""
    (num_members, capacity), count = memory.bootstrap.shape, happened.sum()
    row = jnp.where(happened, memory.size + jnp.cumsum(happened) - 1, capacity)  # the others are dropped
    drawn = memory.size + jax.random.randint(key, (num_members, len(happened)), 0, count)
    return Memory(memory.z.at[row].set(z, mode="drop"), memory.change.at[row].set(change, mode="drop"),
                  memory.bootstrap.at[:, row].set(drawn, mode="drop"), memory.size + count)


def draw(key, x, config):
    """What one search leaves to chance: ε (H, P, 1, D), and who is dealt to whom (H, P), permutations."""
    noise_key, deal_key = jax.random.split(key)
    H, P = config.horizon, config.num_particles
    return (jax.random.normal(noise_key, (H, P, 1, x.size)),
            jnp.argsort(jax.random.uniform(deal_key, (H, P)), axis=1))


def expected_cost(actions, x, chance, agent, env, config):
    """J of plans (H, N, A) from x (D,): (N,)."""
    (_, N, A), B, P, D = actions.shape, config.num_members, config.num_particles, x.size

    def step(carry, now):
        (x, lost, total), (action, noise, deal) = carry, now
        if config.propagation == "ts1":  # member b moves particles b P/B to (b + 1) P/B − 1
            x, lost, total = x[deal], lost[deal], total[deal]
        action = jnp.broadcast_to(action, (P, N, A))
        z = inputs(x, action, env).reshape(B, P // B * N, -1)
        lost = lost | ~(jnp.abs(agent.standardise(z)) < FAR).all(-1).reshape(P, N)
        mean, log_var = (v.reshape(P, N, D) for v in agent.predict(z))
        next_x = x + mean + jnp.exp(0.5 * log_var) * noise
        return (next_x, lost, total + jax.vmap(jax.vmap(env.env.cost))(x, action, next_x)), None

    start = (jnp.broadcast_to(x, (P, N, D)), jnp.zeros((P, N), bool), jnp.zeros((P, N)))
    (x, lost, total), _ = jax.lax.scan(step, start, (actions, *chance))
    total = total + jax.vmap(jax.vmap(env.env.terminal_cost))(x)
    return jnp.where(lost, jnp.inf, total).mean(axis=0)


def decide(plan, x, key, agent, env, config):
    """One environment's next action, the first of the search's mean: its best sample is best at fooling a model."""
    chance_key, search_key = jax.random.split(key)
    chance = draw(chance_key, x, config)
    cost = functools.partial(expected_cost, x=x, chance=chance, agent=agent, env=env, config=config)
    settings = {k: config[k] for k in ("num_samples", "num_elites", "num_iterations", "momentum")}
    if config.planner == "icem":
        settings |= dict(init_std=config.init_std, noise_beta=config.noise_beta, decay=config.population_decay,
                         return_mode="mean")
    search = planning.icem if config.planner == "icem" else planning.cem
    plan, action, _ = search(search_key, cost, plan, *env.action_space.bounds, **settings)
    return plan, action


def play(agent, key, env, config):
    """One episode in every environment: z, change and whether they happened, (T E, ...), and returns (E,)."""
    (reset_key, key), E = jax.random.split(key), env.num_envs
    env_state, obs = env.reset(reset_key)
    plan = planning.initial_carry(*env.action_space.bounds, config.horizon, config.kept_elites)
    plan = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (E, *leaf.shape)), plan)
    z = inputs(obs, jnp.zeros((E, *env.action_space.shape)), env)
    record = [jnp.zeros((config.num_steps, *v.shape), v.dtype) for v in (z, obs, jnp.zeros(E, bool))]
    choose = jax.vmap(functools.partial(decide, agent=agent, env=env, config=config))

    def going_on(state):
        t, alive, *_ = state
        return (t < config.num_steps) & alive.any()

    def step(state):
        t, alive, env_state, obs, plan, total, record = state
        act_key, env_key = jax.random.split(jax.random.fold_in(key, t))
        plan, action = choose(plan, obs, jax.random.split(act_key, E))
        env_state, step = env.step(env_key, env_state, action)
        now = inputs(obs, action, env), step.next_obs - obs, alive
        record = [old.at[t].set(new) for old, new in zip(record, now, strict=True)]
        total = total + jnp.where(alive, step.reward, 0.0)
        return t + 1, alive & ~ended(step), env_state, step.obs, plan, total, record

    start = (jnp.int32(0), jnp.ones(E, bool), env_state, obs, plan, jnp.zeros(E), record)
    *_, total, record = jax.lax.while_loop(going_on, step, start)
    return [v.reshape(-1, *v.shape[2:]) for v in record], total


def wander(key, env, config):
    """`random_steps` of random actions, episode after episode: z and change, (N, ...)."""
    def step(state, key):
        (env_state, obs), (act_key, env_key) = state, jax.random.split(key)
        action = env.action_space.sample(act_key, (env.num_envs,))
        env_state, step = env.step(env_key, env_state, action)
        return (env_state, step.obs), (inputs(obs, action, env), step.next_obs - obs)

    reset_key, key = jax.random.split(key)
    _, data = jax.lax.scan(step, env.reset(reset_key), jax.random.split(key, config.random_steps // env.num_envs))
    return [v.reshape(-1, v.shape[-1]) for v in data]


class Run(NamedTuple):
    agent: Agent
    memory: Memory
    returns: jax.Array  # of the last `score_episodes`, NaN before there were as many
    best_return: jax.Array
    test: dict  # of the last fit, on the episode that followed it


def init(key, env, config):
    check_choices(config, propagation=("ts1", "tsinf"), planner=("cem", "icem"))
    if config.num_particles % config.num_members:
        raise UserError(f"num_particles = {config.num_particles} is no multiple of num_members = {config.num_members}")
    agent_key, data_key, store_key = jax.random.split(key, 3)
    z, change = wander(data_key, env, config)
    empty = [jnp.zeros((len(z) + config.env_steps, v.shape[1])) for v in (z, change)]
    memory = Memory(*empty, jnp.zeros((config.num_members, len(empty[0])), jnp.int32), jnp.int32(0))
    memory = remember(store_key, memory, z, change, jnp.ones(len(z), bool))
    test = dict.fromkeys(("error", "nll", "coverage"), jnp.float32(0))
    returns = jnp.full(config.score_episodes, jnp.nan)
    return Run(Agent.create(agent_key, z[0], change[0], config), memory, returns, -jnp.float32(jnp.inf), test)


def train_step(run, key, env, config):
    """One fit, and one episode in every environment."""
    fit_key, play_key, store_key = jax.random.split(key, 3)
    agent, info = run.agent.fit(fit_key, run.memory, config)
    episode, total = play(agent, play_key, env, config)
    returns = jnp.append(run.returns[1:], total.mean())
    best, memory = jnp.maximum(run.best_return, returns[-1]), remember(store_key, run.memory, *episode)
    return Run(agent, memory, returns, best, examine(agent, *episode)), info


def examine(agent, z, change, happened):
    """Of the mixture of members, taken as one normal, on (N, ...) transitions: root mean square error, negative log
    likelihood a dimension, and how many changes lie in the central 95%."""
    mean, log_var = agent.predict(jnp.broadcast_to(z, (len(agent.dynamics.params["bias_0"]), *z.shape)))
    var, error = jnp.exp(log_var).mean(0) + mean.var(0), change - mean.mean(0)
    nll = 0.5 * (jnp.square(error) / var + jnp.log(2 * jnp.pi * var))
    inside = jnp.square(error) < 1.96**2 * var
    mse, nll, coverage = (jnp.mean(v, where=happened[:, None]) for v in (jnp.square(error), nll, inside))
    return {"error": jnp.sqrt(mse), "nll": nll, "coverage": coverage}


def measure(run, key, env, config):
    """What a run of this method is judged by, at this moment."""
    scores = {"return": jnp.nanmean(run.returns), "episode_return": run.returns[-1], "best_return": run.best_return}
    return scores | run.test
