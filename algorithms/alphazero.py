"""AlphaZero: search in the rules of the game (Silver et al., 2018, doi.org/10.1126/science.aar6404).
Child of muzero.py; the diff is the method.

    p, v = f(s)                                                                                    Network
         s the board as the player sees it whose turn it is; p, v what is predicted of policy and outcome
    π    = a tree search from s, whose transitions are the rules of the game                       search
         the next value belongs to the other player: the discount is −1, and 0 where the game ended
    z_t  = r_t − r_{t+1} + r_{t+2} − …  to the end of the game: its outcome for the player who moves at t  targets
    L    = E [CE(π_t, p) + (z_t − v)²]                                                             Agent.loss

    train_step   num_steps times, in every environment: search, take its move or, with probability epsilon, a random
                 one; store s, r, whether it ended, π. Both players are this agent
                 num_updates times: draw batch_size starts t, uniform; one step of Adam on L

Ends: at the end of a game nothing follows; there is no time limit. The next game starts by itself.
Random: first weights (agent_key), who starts (reset_key, env_key), Gumbel noise (search_key), random moves
(explore_key), minibatches (update_key).
Departures: Gumbel's search (Danihelka et al., 2022) and its policy; the paper's has Dirichlet noise at the root and
teaches the visits. epsilon is ours. A perceptron sees the board; no symmetry is used. Weights decay by AdamW, at a
constant rate.
Kept: `Run`: network and optimiser, buffer (a row holds one move of all environments), games and observations, clock. A
checkpoint holds `Run`, the number of the iteration and the sums since the last row of the log. No key is kept: the
launcher makes one from the seed and that number.
Decides: num_simulations; num_updates for num_envs · num_steps moves.
Cost: a search takes num_simulations passes of f and moves of the game; an update takes 3 of f.
Expect: configs/alphazero_tic_tac_toe.py: 0.94 against a greedy player after 200k moves (4 seeds; a win has 1, a loss
−1); three of them lose to nobody.
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
from core.config import count, fraction, positive
from core.dataset import ReplayBuffer
from core.envs import Discrete, require
from core.errors import UserError
from core.networks import MLP
from core.returns import n_step_returns
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="pgx/tic_tac_toe",
        env_kwargs=dict(reveal=True),  # the game is in obs: the search goes on from it
        eval_env_kwargs=dict(opponent="greedy"),  # in training both players are this agent
        num_envs=count(64),
        num_steps=count(8),  # of every env between two rounds of updates
        num_updates=count(16),  # of a round
        env_steps=count(200_000),  # the budget of one seed, over all its envs, random_steps included
        random_steps=count(2048),  # over all envs, before the first update, searched with the first weights
        eval_every=count(20_000),
        eval_episodes=count(256),
        buffer_size=count(50_000),  # moves, over all envs
        batch_size=count(256),
        num_simulations=count(32),
        max_considered=count(16),  # moves that the search tries at the root
        epsilon=fraction(0.1),  # of the moves in training are random: no opening is forgotten
        hidden_dims=count((128, 128)),
        lr=positive(2e-3),
        max_grad_norm=positive(5.0),
        weight_decay=positive(1e-4),
    ))


class Network(nn.Module):
    num_actions: int
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, board):  # (B, O) -> logits of policy (B, A), value in (−1, 1) (B,)
        out = MLP((*self.hidden_dims, self.num_actions + 1), final_scale=0.01)(board)
        return out[:, :-1], jnp.tanh(out[:, -1])


class Agent(struct.PyTreeNode):
    network: TrainState
    config: Any = struct.field(pytree_node=False)
    env: Any = struct.field(pytree_node=False)  # one copy of the environment, for its rules

    @classmethod
    def create(cls, key, obs, source, config):
        tx = optax.flatten(optax.chain(optax.clip_by_global_norm(config.max_grad_norm),
                                       optax.adamw(config.lr, weight_decay=config.weight_decay)))
        network = Network(source.action_space.n, config.hidden_dims)
        return cls(TrainState.create(network, key, obs["board"], tx=tx), config, source.env)

    def search(self, obs, key, noise):
        """Actions (B,), π (B, A) and the tree. Without `noise` the same state gives the same action."""
        policy, value = self.network(obs["board"])
        root = mctx.RootFnOutput(prior_logits=policy, value=value, embedding=obs["game"])
        invalid = 1 - obs["board"][:, -policy.shape[1]:]

        def step(agent, key, action, game):
            game, reward, ended = jax.vmap(agent.env.move)(game, action)
            obs = jax.vmap(agent.env.observe)(game)
            policy, value = agent.network(obs["board"])
            allowed = obs["board"][:, -policy.shape[1]:]
            policy = jnp.where(allowed > 0, policy, jnp.finfo(policy.dtype).min)
            discount = jnp.where(ended, 0.0, -1.0)
            return mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=policy, value=value), game

        found = mctx.gumbel_muzero_policy(
            self, key, root, step, self.config.num_simulations, invalid,
            max_num_considered_actions=self.config.max_considered, gumbel_scale=noise,
            qtransform=by_outcome)
        return found.action, found.action_weights, found.search_tree

    def loss(self, params, batch):  # board (B, O), policy (B, A), target (B,)
        policy, value = self.network(batch["board"], params=params)
        policy_loss = optax.softmax_cross_entropy(policy, batch["policy"]).mean()
        value_loss = jnp.square(batch["target"] - value).mean()
        return policy_loss + value_loss, dict(policy_loss=policy_loss, value_loss=value_loss)


def by_outcome(tree, node):
    """The q-transform of Gumbel's search: (q + 1) / 2 lies in [0, 1], and its weight c_scale is 1, as in the paper."""
    return mctx.qtransform_completed_by_mix_value(tree, node, rescale_values=False, value_scale=0.5)


class Run(NamedTuple):
    agent: Agent
    buffer: ReplayBuffer  # each row one move of all environments, leaves (E, ...)
    env_state: Any
    obs: Any  # "board" (E, O), and "game", the state of the rules
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Discrete,), offers=("move",))
    agent_key, reset_key, play_key = jax.random.split(key, 3)
    env_state, obs = source.reset(reset_key)
    if not isinstance(obs, dict):
        raise UserError(f'{config.algorithm} needs the game in its observations: env_kwargs.reveal=True')
    agent = Agent.create(agent_key, obs, source, config)
    number, flag = jnp.zeros(config.num_envs), jnp.zeros(config.num_envs, bool)
    row = dict(board=obs["board"], reward=number, terminated=flag,
               policy=jnp.zeros((config.num_envs, source.action_space.n)))
    rows, window = config.buffer_size // config.num_envs, source.max_steps
    if min(rows, config.random_steps // config.num_envs) < window:
        raise UserError(f"random_steps and buffer_size have to hold {window * config.num_envs} steps at least: "
                        f"a game of {window} moves in each of num_envs")
    run = Run(agent, ReplayBuffer.create(row, rows), env_state, obs, Clock.start())
    return play(run, play_key, source, config.random_steps // config.num_envs)[0]


def train_step(run, key, source, config):
    play_key, update_key = jax.random.split(key)
    run, episode = play(run, play_key, source, config.num_steps)
    run, info = update(run, update_key, source.max_steps, config)
    return run, info | dict(episode=episode)


def play(run, key, source, num_steps):
    """-> run, the sums of info["episode"]."""
    def env_step(run, keys):
        search_key, explore_key, env_key = keys
        action, policy, _ = run.agent.search(run.obs, search_key, 1.0)
        action = explore(run.agent, run.obs, action, policy.shape[1], explore_key)
        env_state, step = source.step(env_key, run.env_state, action)
        row = dict(board=run.obs["board"], reward=step.reward, terminated=step.terminated, policy=policy)
        return run._replace(env_state=env_state, obs=step.obs), (row, step.info["episode"])

    # Without the buffer: this loop would copy it.
    buffer, run = run.buffer, run._replace(buffer=())
    run, (rows, episode) = jax.lax.scan(env_step, run, jax.random.split(key, (num_steps, 3)))
    return (run._replace(buffer=buffer.add(rows), clock=run.clock.tick(env_steps=rows["reward"].size)),
            jax.tree.map(jnp.sum, episode))


def explore(agent, obs, action, num_actions, key):
    """A random move of those allowed, with probability epsilon."""
    whether_key, which_key = jax.random.split(key)
    random = jax.random.categorical(which_key, jnp.log(obs["board"][:, -num_actions:]))
    return jnp.where(jax.random.uniform(whether_key, action.shape) < agent.config.epsilon, random, action)


def update(run, key, longest, config):
    row, env = draw(run.buffer, key, (config.num_updates, config.batch_size), longest, config)

    def step(agent, start):
        network, info = agent.network.minimize(agent.loss, targets(run.buffer.data, *start, longest))
        return agent.replace(network=network), info

    agent, info = jax.lax.scan(step, run.agent, (row, env))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.num_updates))
    return run, jax.tree.map(jnp.mean, info)


def draw(buffer, key, shape, longest, config):
    """Rows and environments of moves, uniform among those whose game has ended in the buffer for certain."""
    row_key, env_key = jax.random.split(key)
    age = jax.random.randint(row_key, shape, longest - 1, buffer.size)  # the newest row has age 0
    return (buffer.pos - 1 - age) % buffer.capacity, jax.random.randint(env_key, shape, 0, config.num_envs)


def targets(data, row, env, longest):
    """What is learnt of the moves at (row, env), both (B,)."""
    index = (row[None] + jnp.arange(longest)[:, None]) % len(data["reward"]), env[None]
    reward, terminated = data["reward"][index], data["terminated"][index]
    nothing = jnp.zeros_like(reward)
    outcome = n_step_returns(reward, nothing, terminated, nothing, -1.0, longest)[0]
    return dict(board=data["board"][row, env], policy=data["policy"][row, env], target=outcome)


def act(run, carry, obs, key):
    """The move of a search without noise. Nothing is carried between steps."""
    return (), run.agent.search(obs, key, 0.0)[0]


def search(run, obs, key):
    """The tree by which `act` decides, for its picture."""
    return run.agent.search(obs, key, 0.0)[-1]
