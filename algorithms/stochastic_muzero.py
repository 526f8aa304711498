"""Stochastic MuZero: search in a learnt model of actions and of chance (Antonoglou et al., 2022,
openreview.net/forum?id=X6D9bAHhBQ1). Child of muzero.py; the diff is the method.

    s⁰ = h(o_t),   p^k, v^k = f(s^k)                                                               Model
    u^k = d(s^k, a_{t+k}),   σ^k, q^k = f'(u^k)      the afterstate: what the action does, before chance does anything
    l_{t+k} = l(o_{t+k}, o_{t+k+1}),   c_{t+k} = 1 at the largest l, else 0: which of num_codes outcomes chance had
    s^{k+1}, r^k, e^k = g(u^k, c_{t+k})
         σ, q are what is predicted of c and of the value; the rest is named as in muzero.py
    π, ν = a tree search from s⁰: actions lead to u, from there outcomes c with the probabilities σ to s    search
    L    = E w Σ_{k≤K} c_k [CE(π_{t+k}, p^k) + CE(φ(z_{t+k}), v^k) + CE(φ(r_{t+k}), r^k) + CE(e_{t+k}, e^k)
                            + CE(φ(z_{t+k}), q^k) + CE(c_{t+k}, σ^k) + β |c_{t+k} − softmax l_{t+k}|²]      Agent.loss
         φ a number as weights of bins; r, e, q, σ and the last term have no k = K

    Where g uses c, the gradient of c is given to softmax l; CE(c, σ) gives l none. z, w, c_k, n: see muzero.py.

    train_step   num_steps times, in every environment: search, take its action or, with probability epsilon, a random
                 one; store o, a, r, the next o, how it ended, π, ν
                 search again from reanalyse · num_envs · num_steps stored o; the new π, ν replace the old ones
                 num_updates times: draw batch_size starts t, one step of AdamW on L, store their new |v⁰ − z_t|^α

Ends: behind a termination there is an absorbing state: value and reward 0, e = 1. No policy and no σ is learnt there;
actions and c are those that the buffer has next. Behind a time limit nothing is learnt. The next episode starts by
itself.
Random: first weights (agent_key), start states (reset_key, env_key), the search (search_key: Dirichlet noise, and the
action by its visits), random actions (explore_key), what is searched again (index_key), minibatches (update_key).
Departures: l sees two observations, the paper's all until then. mctx divides q by the range at each node, the paper by
that in the tree. From muzero.py: epsilon, e, priorities by v⁰, the stored value at a time limit, shared perceptrons, a
learning rate that falls to 0.
Kept: `Run`: model and optimiser, buffer (a row holds one step of all environments), environments and observations,
clock. A checkpoint holds `Run`, the number of the iteration and the sums since the last row of the log. No key is kept:
the launcher makes one from the seed and that number.
Decides: num_simulations, of which about half go to outcomes of chance; num_codes; num_updates for num_envs · num_steps
steps.
Cost: a search takes num_simulations passes of all networks but h and l; an update takes 3 (K + 1).
Expect: configs/stochastic_muzero_2048.py: 66.7 of 66.96 after 30k steps (8 seeds), 25 s a seed on 2 CPU cores;
muzero.py has 56.1.
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core.clock import Clock
from core.config import count, fraction, positive, whole
from core.dataset import ReplayBuffer
from core.envs import Discrete, require
from core.errors import UserError
from core.networks import MLP, patches
from core.returns import from_bins, n_step_returns, to_bins
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="small_2048",
        env_kwargs=dict(side=2),
        num_envs=count(32),
        num_steps=count(8),  # of every env between two rounds of updates
        num_updates=count(32),  # of a round
        env_steps=count(30_000),  # the budget of one seed, over all its envs, random_steps included
        random_steps=count(2048),  # over all envs, before the first update, searched with the first weights
        eval_every=count(5_000),
        eval_episodes=count(256),
        buffer_size=count(50_000),  # steps, over all envs
        batch_size=count(128),
        num_simulations=count(32),
        hidden_dims=count((128,)),  # of every network
        latent_dim=count(64),
        num_codes=count(16),  # outcomes that chance can have
        commitment=positive(0.25),  # β
        channels=whole(0),  # of a convolution; 0: none, for observations that are vectors
        num_bins=count(41),
        value_bound=positive(10.0),  # the bins lie in ± this, after the transform
        lr=positive(2e-3),  # falls linearly to 0 at the end of the budget
        max_grad_norm=positive(5.0),
        weight_decay=positive(1e-4),
        discount=fraction(0.997),  # γ
        unroll=count(5),  # K
        n_step=count(50),  # n
        priority_exponent=fraction(0.5),  # α
        epsilon=fraction(0.1),  # of the actions in training are random: the model knows where mistakes lead to
        reanalyse=fraction(0.0),  # old steps that are searched again, for each new one
    ))


class Model(nn.Module):
    num_actions: int
    hidden_dims: tuple[int, ...]
    latent_dim: int
    num_bins: int
    num_codes: int
    channels: int

    def setup(self):
        self.encoder = nn.Dense(self.channels) if self.channels else None
        self.representation = MLP((*self.hidden_dims, self.latent_dim), final_scale=2**0.5)
        self.prediction = MLP((*self.hidden_dims, self.num_actions + self.num_bins), final_scale=0.01)
        self.decision = MLP((*self.hidden_dims, self.latent_dim))
        self.afterstate_prediction = MLP((*self.hidden_dims, self.num_codes + self.num_bins), final_scale=0.01)
        self.chance_encoder = MLP((*self.hidden_dims, self.num_codes))
        self.dynamics = MLP((*self.hidden_dims, self.latent_dim + self.num_bins + 1))

    def see(self, obs):  # (B, O) or (B, H, W, C) -> (B, I)
        x = obs.astype(jnp.float32)
        if self.channels:
            x = nn.relu(self.encoder(patches(x)))
        return x.reshape(len(x), -1)

    def represent(self, obs):  # -> (B, D)
        return unit(self.representation(self.see(obs)))

    def predict(self, latent):  # (B, D) -> logits of policy (B, A), of value (B, bins)
        return jnp.split(self.prediction(latent), [self.num_actions], axis=-1)

    def decide(self, latent, action):  # (B, D), (B,) -> u (B, D)
        x = jnp.concatenate([latent, jax.nn.one_hot(action, self.num_actions)], axis=-1)
        return unit(latent + self.decision(x))

    def foresee(self, afterstate):  # (B, D) -> logits of c (B, codes), of the value (B, bins)
        return jnp.split(self.afterstate_prediction(afterstate), [self.num_codes], axis=-1)

    def happened(self, obs, next_obs):  # (B, ...) twice -> c with the gradient of softmax l, softmax l: (B, codes)
        both = jnp.concatenate([self.see(obs), self.see(next_obs)], axis=-1)
        soft = jax.nn.softmax(self.chance_encoder(both))
        code = jax.nn.one_hot(soft.argmax(axis=-1), self.num_codes)
        return soft + jax.lax.stop_gradient(code - soft), soft

    def transition(self, afterstate, code):  # (B, D), (B, codes) -> (B, D), logits of r (B, bins), of e (B,)
        x = jnp.concatenate([afterstate, code], axis=-1)
        change, reward, end = jnp.split(self.dynamics(x), [self.latent_dim, self.latent_dim + self.num_bins], axis=-1)
        return unit(afterstate + change), reward, end.squeeze(-1)

    def __call__(self, obs, action):
        latent = self.represent(obs)
        afterstate, (code, _) = self.decide(latent, action), self.happened(obs, obs)
        return self.predict(latent), self.foresee(afterstate), self.transition(afterstate, code)


def unit(x):
    """Stretched so that the smallest number is 0 and the largest 1, in each row."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    return (x - low) / jnp.maximum(high - low, 1e-5)


class Agent(struct.PyTreeNode):
    model: TrainState
    config: Any = struct.field(pytree_node=False)
    masked: bool = struct.field(pytree_node=False)  # the last A numbers of obs say which actions are allowed

    @classmethod
    def create(cls, key, obs, source, config):
        if bool(config.channels) != (obs.ndim == 4):
            raise UserError(f"channels = {config.channels}, but an observation has {obs.ndim - 1} axes")
        model = Model(source.action_space.n, config.hidden_dims, config.latent_dim, config.num_bins, config.num_codes,
                      config.channels)
        updates = (config.env_steps - config.random_steps) // (config.num_envs * config.num_steps) * config.num_updates
        schedule = optax.linear_schedule(config.lr, 0.0, updates)
        tx = optax.flatten(optax.chain(optax.clip_by_global_norm(config.max_grad_norm),
                                       optax.adamw(schedule, weight_decay=config.weight_decay)))
        action = jnp.zeros(len(obs), jnp.int32)
        return cls(TrainState.create(model, key, obs, action, tx=tx), config, getattr(source.env, "masked", False))

    def predict(self, latent, params=None):  # -> logits of policy (B, A), value (B,)
        policy, value = self.model(latent, params=params, method="predict")
        return policy, from_bins(jax.nn.softmax(value), self.config.value_bound)

    def value(self, obs):  # (B, ...) -> (B,)
        return self.predict(self.model(obs, method="represent"))[1]

    def allowed(self, obs, num_actions):  # (B, A): 1 or 0
        return obs[:, -num_actions:] if self.masked else jnp.ones((len(obs), num_actions))

    def search(self, obs, key, noise, temperature):
        """Actions (B,), π (B, A), ν (B,) and the tree. Without `noise` it is the best action of the
        search; where PUCT has visited two equally often, chance decides."""
        latent = self.model(obs, method="represent")
        policy, value = self.predict(latent)
        root = mctx.RootFnOutput(prior_logits=policy, value=value, embedding=latent)
        invalid = 1 - self.allowed(obs, policy.shape[1])

        def decide(agent, key, action, latent):
            afterstate = agent.model(latent, action, method="decide")
            code, value = agent.model(afterstate, method="foresee")
            value = from_bins(jax.nn.softmax(value), agent.config.value_bound)
            return mctx.DecisionRecurrentFnOutput(chance_logits=code, afterstate_value=value), afterstate

        def happen(agent, key, outcome, afterstate):
            code = jax.nn.one_hot(outcome, agent.config.num_codes)
            leaf, reward, end = agent.model(afterstate, code, method="transition")
            reward = from_bins(jax.nn.softmax(reward), agent.config.value_bound)
            discount = agent.config.discount * jax.nn.sigmoid(-end)
            policy, value = agent.predict(leaf)
            return mctx.ChanceRecurrentFnOutput(
                action_logits=policy, value=value, reward=reward, discount=discount), leaf

        found = mctx.stochastic_muzero_policy(
            self, key, root, decide, happen, self.config.num_simulations, invalid,
            dirichlet_fraction=0.25 * noise, temperature=noise * temperature)
        tree = found.search_tree.summary()
        weight = found.action_weights * (tree.visit_counts > 0)
        value = (weight * tree.qvalues).sum(axis=-1) / weight.sum(axis=-1)
        return found.action, found.action_weights, value, found.search_tree

    def loss(self, params, batch):
        # obs, next_obs (K, B, ...), action, reward, end (K, B), policy (K + 1, B, A), target (K + 1, B)
        def encode(_, pair):
            return None, self.model(*pair, params=params, method="happened")

        def unroll(latent, step):
            action, code = step
            halved = 0.5 * (latent + jax.lax.stop_gradient(latent))
            afterstate = self.model(halved, action, params=params, method="decide")
            chance, afterstate_value = self.model(afterstate, params=params, method="foresee")
            latent_next, reward, end = self.model(afterstate, code, params=params, method="transition")
            return latent_next, (latent, chance, afterstate_value, reward, end)

        _, (code, soft) = jax.lax.scan(encode, None, (batch["obs"], batch["next_obs"]))
        latent = self.model(batch["obs"][0], params=params, method="represent")
        latent, (latents, chance, afterstate_value, reward, end) = jax.lax.scan(unroll, latent, (batch["action"], code))
        latents = jnp.concatenate([latents, latent[None]])
        policy, value = self.model(latents, params=params, method="predict")
        code = jax.lax.stop_gradient(code)

        bound, bins = self.config.value_bound, self.config.num_bins
        scale = jnp.full((len(latents), 1), 1 / self.config.unroll).at[0].set(1.0) * batch["weight"][None]
        policy_loss = scale * batch["alive"] * optax.softmax_cross_entropy(policy, batch["policy"])
        target = to_bins(batch["target"], bound, bins)
        value_loss = scale * batch["known"] * optax.softmax_cross_entropy(value, target)
        happened, scale = scale[:-1] * batch["alive"][:-1], scale[:-1] * batch["known"][:-1]
        reward_loss = scale * optax.softmax_cross_entropy(reward, to_bins(batch["reward"], bound, bins))
        end_loss = scale * optax.sigmoid_binary_cross_entropy(end, batch["end"])
        afterstate_loss = scale * optax.softmax_cross_entropy(afterstate_value, target[:-1])
        chance_loss = happened * optax.softmax_cross_entropy(chance, code)
        commitment = self.config.commitment * happened * jnp.square(code - soft).sum(axis=-1)
        losses = dict(policy_loss=policy_loss, value_loss=value_loss, reward_loss=reward_loss, end_loss=end_loss,
                      afterstate_loss=afterstate_loss, chance_loss=chance_loss, commitment=commitment)
        losses = {name: x.sum(axis=0).mean() for name, x in losses.items()}
        error = jnp.abs(from_bins(jax.nn.softmax(value[0]), bound) - batch["target"][0])
        return sum(losses.values()), (losses | dict(value_error=error.mean()), error)


class Run(NamedTuple):
    agent: Agent
    buffer: ReplayBuffer  # each row one step of all environments, leaves (E, ...)
    env_state: Any
    obs: jax.Array  # (E, ...)
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Discrete,))
    agent_key, reset_key, play_key = jax.random.split(key, 3)
    env_state, obs = source.reset(reset_key)
    agent = Agent.create(agent_key, obs, source, config)
    number, flag = jnp.zeros(config.num_envs), jnp.zeros(config.num_envs, bool)
    row = dict(obs=obs, next_obs=obs, action=jnp.zeros(config.num_envs, jnp.int32), reward=number, terminated=flag,
               truncated=flag, next_value=number, policy=jnp.zeros((config.num_envs, source.action_space.n)),
               value=number, priority=number)
    rows, window = config.buffer_size // config.num_envs, config.unroll + config.n_step + 1
    if min(rows, config.random_steps // config.num_envs) < window:
        raise UserError(f"random_steps and buffer_size have to hold {window * config.num_envs} steps at least: "
                        "(unroll + n_step + 1) * num_envs")
    run = Run(agent, ReplayBuffer.create(row, rows), env_state, obs, Clock.start())
    return play(run, play_key, source, config.random_steps // config.num_envs)[0]


def train_step(run, key, source, config):
    play_key, reanalyse_key, update_key = jax.random.split(key, 3)
    run, episode = play(run, play_key, source, config.num_steps)
    run = reanalyse(run, reanalyse_key, config)
    run, info = update(run, update_key, config)
    return run, info | dict(episode=episode)


def play(run, key, source, num_steps):
    """-> run, the sums of info["episode"]."""
    def env_step(run, keys):
        search_key, explore_key, env_key = keys
        action, policy, value, _ = run.agent.search(run.obs, search_key, 1.0, temperature(run))
        action = explore(run.agent, run.obs, action, policy.shape[1], explore_key)
        env_state, step = source.step(env_key, run.env_state, action)
        row = dict(obs=run.obs, next_obs=step.next_obs, action=action, reward=step.reward, terminated=step.terminated,
                   truncated=step.truncated, next_value=run.agent.value(step.next_obs), policy=policy, value=value)
        return run._replace(env_state=env_state, obs=step.obs), (row, step.info["episode"])

    # Without the buffer: this loop would copy it.
    buffer, run = run.buffer, run._replace(buffer=())
    run, (rows, episode) = jax.lax.scan(env_step, run, jax.random.split(key, (num_steps, 3)))
    highest = buffer.data["priority"].max()  # what is new is drawn soon; the first steps of all have 1
    highest = jnp.where(highest > 0, highest, 1.0)
    buffer = buffer.add(rows | dict(priority=jnp.full(rows["value"].shape, highest)))
    return (run._replace(buffer=buffer, clock=run.clock.tick(env_steps=rows["value"].size)),
            jax.tree.map(jnp.sum, episode))


def explore(agent, obs, action, num_actions, key):
    """A random action of those allowed, with probability epsilon."""
    whether_key, which_key = jax.random.split(key)
    random = jax.random.categorical(which_key, jnp.log(agent.allowed(obs, num_actions)))
    return jnp.where(jax.random.uniform(whether_key, action.shape) < agent.config.epsilon, random, action)


def temperature(run):
    """How random the choice of an action is: 1 in the first half of the budget, ½ in the third quarter, then ¼.
    Gumbel's noise is multiplied by it; with PUCT actions are drawn in proportion to visits to the power of 1 / it."""
    progress = run.clock.env_steps / run.agent.config.env_steps
    return jnp.where(progress < 0.5, 1.0, jnp.where(progress < 0.75, 0.5, 0.25))


def reanalyse(run, key, config):
    """Searches stored observations again with the current weights and replaces their π and ν."""
    number = round(config.reanalyse * config.num_envs * config.num_steps)
    if not number:
        return run
    index_key, search_key = jax.random.split(key)
    data = run.buffer.data
    index = jax.random.randint(index_key, (number,), 0, run.buffer.size * config.num_envs)
    index = jnp.divmod(index, config.num_envs)
    _, policy, value, _ = run.agent.search(data["obs"][index], search_key, 1.0, 1.0)
    data = data | dict(policy=data["policy"].at[index].set(policy), value=data["value"].at[index].set(value))
    return run._replace(buffer=run.buffer.replace(data=data))


def update(run, key, config):
    data, size = run.buffer.data, (config.num_updates, config.batch_size)
    row, env, weight = draw(run.buffer, key, size, config)

    def step(carry, start):
        agent, priority = carry
        row, env, weight = start
        batch = targets(data, row, env, config) | dict(weight=weight / weight.max())
        model, (info, error) = agent.model.minimize(agent.loss, batch)
        priority = priority.at[row, env].set((error + 1e-3) ** config.priority_exponent)
        return (agent.replace(model=model), priority), info

    (agent, priority), info = jax.lax.scan(step, (run.agent, data["priority"]), (row, env, weight))
    run = run._replace(agent=agent, buffer=run.buffer.replace(data=data | dict(priority=priority)),
                       clock=run.clock.tick(updates=config.num_updates))
    return run, jax.tree.map(jnp.mean, info)


def draw(buffer, key, shape, config):
    """Starts t of windows: rows, environments and 1 / (N P). K + n steps have to follow a start."""
    newer = (buffer.pos - 1 - jnp.arange(buffer.capacity)) % buffer.capacity
    ready = (newer >= config.unroll + config.n_step) & (newer < buffer.size)
    total = jnp.cumsum(jnp.where(ready[:, None], buffer.data["priority"], 0.0).ravel())
    point = jnp.minimum(total[-1] * jax.random.uniform(key, shape), jnp.nextafter(total[-1], 0.0))
    row, env = jnp.divmod(jnp.searchsorted(total, point, side="right"), config.num_envs)
    count = ready.sum() * config.num_envs
    return row, env, total[-1] / (count * buffer.data["priority"][row, env])


def targets(data, row, env, config):
    """What the unrolls that start at (row, env), both (B,), have to predict; time first."""
    index = (row[None] + jnp.arange(config.unroll + config.n_step + 1)[:, None]) % len(data["value"]), env[None]
    reward, terminated, truncated, value, next_value = (
        data[name][index] for name in ("reward", "terminated", "truncated", "value", "next_value"))
    next_value = jnp.where(truncated, next_value, jnp.roll(value, -1, axis=0))[:-1]
    target = n_step_returns(reward[:-1], next_value, terminated[:-1], truncated[:-1], config.discount, config.n_step)
    now = slice(0, config.unroll + 1)
    index = index[0][now], env[None]
    going_on = ~(terminated | truncated)[now]
    alive = jnp.concatenate([jnp.ones((1, len(row)), bool), jnp.cumprod(going_on[:-1], axis=0, dtype=bool)])
    cut = jnp.cumsum(alive & truncated[now], axis=0)
    known = jnp.concatenate([jnp.ones((1, len(row))), 1.0 - cut[:-1]])
    end = ~alive | terminated[now]
    obs, next_obs, action = (data[name][index][:-1] for name in ("obs", "next_obs", "action"))
    return dict(obs=obs, next_obs=next_obs, action=action, reward=(alive * reward[now])[:-1],
                end=end[:-1].astype(jnp.float32), policy=data["policy"][index], target=alive * target[now],
                alive=alive.astype(jnp.float32), known=known)


def act(run, carry, obs, key):
    """The action of a search without noise. Nothing is carried between steps."""
    return (), run.agent.search(obs, key, 0.0, 0.0)[0]


def search(run, obs, key):
    """The tree by which `act` decides, for its picture."""
    return run.agent.search(obs, key, 0.0, 0.0)[-1]
