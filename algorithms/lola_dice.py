"""LOLA-DiCE (Foerster et al., 2018, arXiv:1802.05098): opponents are shaped in games that are sampled round by round.
Child of lola.py; the diff is the method.

Two players learn at once. Each one supposes that its opponent takes K gradient steps, and differentiates through these
steps. Each knows the policy of the other. All values are estimated from games that both play. For player i, with the
opponent j:

    π_i(C | s) = σ(θ_{i,s}), s the last outcome as player i sees it: start, CC, CD, DC or DD          choose
    □(x)   = exp(x − ⊥x)                 ⊥ stops the gradient: □ is 1, and its gradient is that of x    magic
    J_i    = mean over the games of Σ_{t≥0} γ^t [□(w_t) − □(w_{t−1})] A_{i,t},   w_{−1} = 0            objective
             w_t = Σ_{u≤t} log π_i(a_{i,u}) + log π_j(a_{j,u})
    A_i,t  = r_{i,t} + γ b(s_{t+1}) − b(s_t)                                                           advantage
             b(s) = mean of r_i + γ b(s') over all rounds after s; 0 where s was not seen
    θ'_j   <- θ'_j + η ∂J_j(θ_i, θ'_j)/∂θ'_j   K times, from θ_j, each with new games                  Agent.shaped
    θ_i    <- θ_i + α ∂J_i(θ_i, θ'_j)/∂θ_i     with new games of θ_i and θ'_j, also through θ'_j       Agent.update

    θ_i logits; α lr, η opponent_lr; K lookahead. Actions, A and b are constants to a gradient. The number J is 0. Its
    derivatives of any order estimate those of the expected discounted return. Their bias falls with the number of
    games, because b comes from the same games. With K = 0 each player climbs its own return: a naive learner.

Ends: games end by their time limit only, max_steps. After the last round, γ b stands for what would follow.
Random: init draws the logits from key. Agent.update splits its key by player and by estimate, so no game is used twice;
`play` splits by round, then into the key of the actions and those of the copies.
Departures: the paper's J_i is Σ_t γ^t □(w_t) r_{i,t}, with a baseline term. It reduces the noise of first derivatives,
and hardly that of second ones. This J_i is that of Loaded DiCE (Farquhar et al., 2019, arXiv:1909.10549). Its advantage
looks one round ahead: that is enough as long as both players remember one round only. b solves its five equations; the
paper's baseline is learnt. The authors' code has K = 2, η = 0.1 for 64 games, and starts from random logits. α, γ, 64
games and 150 rounds are the same there.
Kept: `Run`: the logits of both players, the clock. A checkpoint holds `Run`, the number of the iteration and the sums
since the last row of the log. The clock counts a step for each round of each game, also of the supposed ones.
Decides: lookahead; opponent_lr; lr; num_envs, the games of an estimate.
Cost: an update plays 2 (K + 1) · num_envs games of max_steps rounds. The gradient of each player passes through K inner
gradients.
Expect: −163 and −166 in 150 rounds, IQM of 16 seeds, after 200 updates with configs/lola_dice_ipd.py: −1.09 and −1.10
a round. Without a look-ahead −300. 18 s for all seeds on 2 CPU cores, after 7 s of compilation.
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from core.clock import Clock
from core.config import count, fraction, positive, whole
from core.envs import Discrete, require
from core.errors import UserError

TIT_FOR_TAT = np.array([1, 1, -1, 1, -1])  # signs of logits: first round, after CC, CD, DC, DD; own action first


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="iterated_matrix_game",  # the prisoner's dilemma
        env_kwargs=dict(max_steps=150),
        num_envs=count(64),  # games of an estimate
        updates=count(200),  # the budget of one seed
        eval_every=count(50),  # updates between evaluations
        eval_episodes=count(64),
        lookahead=whole(1),  # K
        lr=positive(0.2),  # α
        opponent_lr=positive(0.3),  # η, the step size that a player supposes its opponent to have
        discount=fraction(0.96),  # γ
        init_std=positive(0.01),  # of the logits at the start: almost even chances
    ))


class Agent(struct.PyTreeNode):
    """Both players."""

    logits: jax.Array  # (2, 5)
    config: Any = struct.field(pytree_node=False)

    def shaped(self, own, i, source, keys):
        """J_i after the opponent's supposed steps; `keys` of K + 1 estimates."""
        logits, j = self.logits.at[i].set(own), 1 - i
        for key in keys[:-1]:
            games = play(jax.lax.stop_gradient(logits), key, source)
            step = jax.grad(objective)(logits, games, j, self.config.discount)[j]
            logits = logits.at[j].add(self.config.opponent_lr * step)
        games = play(jax.lax.stop_gradient(logits), keys[-1], source)
        return objective(logits, games, i, self.config.discount)

    def update(self, source, key):
        """One step of both players, each from the logits that the other one had before it."""
        keys = jax.random.split(key, (2, self.config.lookahead + 1))
        slope = jnp.stack([jax.grad(self.shaped)(self.logits[i], i, source, keys[i]) for i in (0, 1)])
        return self.replace(logits=self.logits + self.config.lr * slope), dict(grad_norm=jnp.sqrt((slope**2).sum()))


class Games(NamedTuple):
    """Of all copies, time first."""

    obs: jax.Array  # (T, E, 2, 5) as each player sees the last outcome
    action: jax.Array  # (T, E, 2)
    reward: jax.Array  # (T, E, 2)
    next_obs: jax.Array  # (T, E, 2, 5)


def play(logits, key, source):
    """One game in every copy."""
    reset_key, key = jax.random.split(key)
    state, obs = jax.vmap(source.env.reset)(jax.random.split(reset_key, source.num_envs))

    def step(carry, key):
        state, obs = carry
        act_key, env_key = jax.random.split(key)
        action = choose(logits, obs, act_key)
        state, ts = jax.vmap(source.env.step)(jax.random.split(env_key, source.num_envs), state, action)
        return (state, ts.obs), Games(obs, action, ts.reward, ts.next_obs)

    return jax.lax.scan(step, (state, obs), jax.random.split(key, source.max_steps))[1]


def choose(logits, obs, key):  # (2, 5), (E, 2, 5) -> (E, 2): 0 cooperates, 1 defects
    chance = jax.nn.sigmoid((logits[None] * obs).sum(axis=-1))
    return 1 - jax.random.bernoulli(key, chance).astype(jnp.int32)


def objective(logits, games, i, discount):
    """J_i."""
    shown = (logits[None, None] * games.obs).sum(axis=-1)
    log_prob = jax.nn.log_sigmoid(jnp.where(games.action == 0, shown, -shown)).sum(axis=-1)  # (T, E) of both players
    so_far = jnp.cumsum(log_prob, axis=0)
    weight = discount ** jnp.arange(len(log_prob), dtype=jnp.float32)[:, None]
    return (weight * (magic(so_far) - magic(so_far - log_prob)) * advantage(games, i, discount)).sum(axis=0).mean()


def magic(x):
    return jnp.exp(x - jax.lax.stop_gradient(x))


def advantage(games, i, discount):
    """A_i (T, E)."""
    seen, then, reward = games.obs[:, :, i], games.next_obs[:, :, i], games.reward[..., i]  # (T, E, 5) twice, (T, E)
    number = jnp.maximum(seen.sum(axis=(0, 1)), 1.0)  # (5,) of rounds after each outcome
    follows = jnp.einsum("tes,tez->sz", seen, then) / number[:, None]
    earned = jnp.einsum("tes,te->s", seen, reward) / number
    value = jnp.linalg.solve(jnp.eye(5) - discount * follows, earned)
    return reward + discount * then @ value - seen @ value


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Discrete,), agents=True)
    if jax.eval_shape(source.reset, key)[1].shape[1:] != (2, 5) or source.action_space.n != 2:
        raise UserError(f'{config.algorithm} plays 2x2 games; "{config.env}" is none')
    if config.discount == 1:
        raise UserError("discount = 1: has to be below 1")
    return Run(Agent(config.init_std * jax.random.normal(key, (2, 5)), config), Clock.start())


def train_step(run, key, source, config):
    """One update."""
    agent, info = run.agent.update(source, key)
    steps = 2 * (config.lookahead + 1) * source.num_envs * source.max_steps
    return Run(agent, run.clock.tick(steps, 1)), info


def act(run, carry, obs, key):
    """Actions drawn from the policies of both players. Nothing is carried between steps."""
    return (), choose(run.agent.logits, obs, key)


def measure(run, key, source, config):
    """The share of the two players whose likelier action is that of tit-for-tat, in the first round and after CC, CD,
    DC and DD."""
    return dict(tit_for_tat=(jnp.sign(run.agent.logits) == TIT_FOR_TAT[None]).all(axis=1).mean())
