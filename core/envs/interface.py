"""What every part of the house means by an environment.

One environment, never batched, is any object with

    max_steps                                  the time limit, in steps
    action_space                               Discrete or Box
    reset(key) -> (state, obs)
    step(key, state, action) -> (state, TimeStep)

pure functions of their arguments. `obs` is an array, or a dictionary of arrays. An environment does not reset itself
and knows nothing of its copies: `batch.Batch` does both.
Hidden truth (masses, gains, an opponent's cost) lives inside `state`, so it can differ per copy and per episode.

An environment may offer more. Who uses it:

    num_agents                     N, of a game with several agents: obs (N, ...), reward (N,)     ippo, evaluation
    teams                          (N,) the number of each agent's team: opponents' returns are never added
                                                                                           evaluation, cross-play
    masked                         the last A numbers of obs say which actions are allowed          ippo, muzero
    info["agent_done"]             (N,) agents that ended before the episode did                    ippo
    cost(x, action, next_x), terminal_cost(x)      what a planner minimises; the reward is −cost    all planners
    features(x)                    what a network sees of x, e.g. the sine and cosine of an angle   pets, icem_online
    reveal                         whether obs holds the hidden truth, too (`hidden.split`)         ekf_lqr, icem_online
    unknown(about) -> Unknown      what is hidden, as a belief needs it (`hidden.Unknown`)          ekf_lqr, icem_online
    info["params"]                 the truth that a step obeyed, for measures, never for acting     ekf_lqr
    draw(state) -> Scene           the picture of a state (`core.render`)                           films
    place(x) -> (2,)               where in that picture the hidden truth moves something           films of beliefs
    move(game, action)             the rules of a game for two: the game after, reward of who moves, whether it ended;
                                   obs["game"] is where it starts                                   alphazero
    alternates                     two players move in turn: each step is of the other one          alphazero
    values(logits)                 (2,) what two policies earn in the whole game, exactly, with derivatives         lola
    reports_success                info["success"] says whether a step did what the task is         batch, evaluation
    reports                        names of info whose means over the steps of an episode are columns beside the return,
                                   shaped like the reward                                           batch, evaluation
    on_host                        it is simulated by Python: a run of it is resumed, but not bit for bit    launchers
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import UserError


class TimeStep(NamedTuple):
    obs: jax.Array  # what the policy sees next: the first observation of a new episode after an end
    next_obs: jax.Array  # the true successor of the action, also at an end
    reward: jax.Array
    terminated: jax.Array  # the task ended: nothing follows, bootstrap with 0
    truncated: jax.Array  # a time limit: the episode would have gone on, bootstrap with the value of next_obs
    info: dict[str, Any]


class Transition(NamedTuple):
    """One step as a policy, a buffer or a data set keeps it."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    terminated: jax.Array
    truncated: jax.Array

    @classmethod
    def of(cls, obs: jax.Array, action: jax.Array, step: TimeStep) -> "Transition":
        return cls(obs, action, step.reward, step.next_obs, step.terminated, step.truncated)


def ended(step: TimeStep | Transition) -> jax.Array:
    return step.terminated | step.truncated


class Discrete(NamedTuple):
    """Actions 0 .. n − 1, int32."""

    n: int

    @property
    def shape(self):
        return ()

    @property
    def dtype(self):
        return jnp.int32

    def sample(self, key: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.randint(key, batch, 0, self.n)


class Box(NamedTuple):
    """Real actions in the environment's own units, low <= action <= high. The environment clips.

    Bounds are tuples (A,), or (N, A) where the agents of a game differ.
    """

    low: tuple
    high: tuple

    @property
    def shape(self):
        return np.shape(self.low)[-1:]

    @property
    def dtype(self):
        return jnp.float32

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(self.low), jnp.float32(self.high)

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre, half range), shaped like the bounds; 0 and 1 where there is no bound."""
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        bounded = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        return ((high + low) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)

    def sample(self, key: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
        """[*batch, A]; the last axis of `batch` is that of the agents where bounds are (N, A)."""
        return self.from_unit(jax.random.uniform(key, (*batch, *self.shape), minval=-1.0, maxval=1.0))

    def from_unit(self, action: jax.Array) -> jax.Array:
        """[..., A] in [−1, 1] -> [low, high]; clips."""
        centre, half = (jnp.broadcast_to(x, action.shape) for x in self.scale)
        return centre + half * jnp.clip(action, -1.0, 1.0)

    def clip(self, action: jax.Array) -> jax.Array:
        low, high = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), action.shape) for x in (self.low, self.high))
        return jnp.clip(action, low, high)


def require(env: Any, config: Any, actions: tuple = (Discrete, Box), bounded: bool = False, agents: bool = False,
            offers: tuple[str, ...] = ()) -> None:
    """Raises UserError where a method cannot act in `env`, the batch that `config` names, or a data set from there: its
    kinds of `actions`, and whether they have to be `bounded`; `agents`, whether it plays games of several; `offers`,
    what it needs of those that the table above lists."""
    num_agents = getattr(env, "num_agents", None)  # a data set is of one agent
    lacks = [f'no "{name}"' for name in offers if not hasattr(env.env, name)]
    if (num_agents is not None) != agents:
        lacks.append("several agents" if num_agents is not None else "one agent")
    if getattr(getattr(env, "env", None), "alternates", False) and "move" not in offers:
        lacks.append("two players who move in turn (env_kwargs.opponent names another one)")
    if not isinstance(env.action_space, actions):
        lacks.append("discrete actions" if isinstance(env.action_space, Discrete) else "continuous actions")
    elif bounded and not np.isfinite([env.action_space.low, env.action_space.high]).all():
        lacks.append("actions without bounds")
    if lacks:
        raise UserError(f'{config.algorithm} cannot act in "{config.env}", which has {" and ".join(lacks)}')
