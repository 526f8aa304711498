"""Copies draw numbers of their own: seeds, environments, agents, ensemble members, particles.

A key that copies share is a valid program with a plausible result. So here copies meet the same observation, for ever:
they differ by what they draw, or not at all.
"""
import dataclasses
import functools
import importlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from core.dataset import Dataset
from core.envs import Batch, Box, Discrete, TimeStep, hidden, make_env
from core.errors import UserError
from core.evaluation import evaluate
from launchers import cli
from launchers import train as launcher
from tests.keys import assert_once, with_keys

ROOT = pathlib.Path(__file__).parents[1]
BATCH, OWN_KEYS = "core/envs/batch.py", "test_environments_and_seeds_act_on_their_own"
SEARCHING = ("muzero", "stochastic_muzero", "alphazero")
UNFOLLOWED = ("stochastic_muzero",)  # PUCT draws in a loop until the last tree is done, the others as often, in vain
SPLIT, SHARED = "jax.random.split(key, len(obs))", "jnp.broadcast_to(key, (len(obs),))"
PLANTED_ERRORS = {
    "environments reset alike": (BATCH, "jax.vmap(env.reset)(jax.random.split(key, num_envs))",
                                 "jax.vmap(env.reset)(jnp.broadcast_to(key, (num_envs,)))",
                                 "test_environments_and_seeds_start_and_step_on_their_own"),
    "environments step alike": (BATCH, "jax.random.split(step_key, self.num_envs)",
                                "jnp.broadcast_to(step_key, (self.num_envs,))",
                                "test_environments_and_seeds_start_and_step_on_their_own"),
    "steps and resets share their keys": (BATCH, "jax.random.split(step_key, self.num_envs)",
                                          "jax.random.split(reset_key, self.num_envs)",
                                          "test_every_key_of_a_method_serves_once[ppo]"),
    "ippo: networks and environments start from one key": (
        "algorithms/ippo.py", "source.reset(env_key)", "source.reset(agent_key)",
        "test_every_key_of_a_method_serves_once[ippo]"),
    **{f"{name}: networks and environments start from one key": (
        f"algorithms/{name}.py", f"source.reset({key})", "source.reset(agent_key)",
        f"test_every_key_of_a_method_serves_once[{name}]")
       for name, key in (("sac", "reset_key"), ("crossq", "reset_key"), ("pqn", "env_key"), ("muzero", "reset_key"),
                         ("alphazero", "reset_key"), ("advantage_alignment", "env_key"))},
    **{f"{name}: the environment draws from the key of the search": (
        f"algorithms/{name}.py", "source.step(env_key,", "source.step(search_key,",
        f"test_every_key_of_a_method_serves_once[{name}]") for name in ("muzero", "alphazero")},
    "muzero: all old steps are searched with the keys that drew them": (
        "algorithms/muzero.py", 'data["obs"][index], search_key,', 'data["obs"][index], index_key,',
        "test_every_key_of_a_method_serves_once[muzero]"),
    "muzero: minibatches are drawn with the key of the search": (
        "algorithms/muzero.py", "update(run, update_key, config)", "update(run, play_key, config)",
        "test_every_key_of_a_method_serves_once[muzero]"),
    "pets: networks and memory draw from one key": (
        "algorithms/pets.py", "Agent.create(agent_key,", "Agent.create(store_key,",
        "test_every_key_of_a_method_serves_once[pets]"),
    "pets: all updates draw the same rows": (
        "algorithms/pets.py", "jax.random.split(key, self.config.num_updates))",
        "jnp.broadcast_to(key, (self.config.num_updates,)))", "test_every_key_of_a_method_serves_once[pets]"),
    **{f"{name}: all updates draw the same rows": (
        f"algorithms/{name}.py", "jax.random.split(key, config.updates_per_step)",
        "jnp.broadcast_to(key, (config.updates_per_step,))", f"test_every_key_of_a_method_serves_once[{name}]")
       for name in ("iql", "bc", "fql", "cql", "cql_discrete")},
    "good_shepherd: noise and trials draw from one key": (
        "algorithms/good_shepherd.py", "(members, trial_key, source)", "(members, noise_key, source)",
        "test_every_key_of_a_method_serves_once[good_shepherd]"),
    "shaper: noise and trials draw from one key": (
        "algorithms/shaper.py", "members, trial_key, source)", "members, noise_key, source)",
        "test_every_key_of_a_method_serves_once[shaper]"),
    "shaper: the environment draws from the key of the policy": (
        "algorithms/shaper.py", "jax.random.split(env_key, source.num_envs)",
        "jax.random.split(act_key, source.num_envs)",
        "test_every_key_of_a_method_serves_once[shaper]"),
    "rebrac: all rounds draw the same rows": (
        "algorithms/rebrac.py", "jax.random.split(key, rounds)", "jnp.broadcast_to(key, (rounds,))",
        "test_every_key_of_a_method_serves_once[rebrac]"),
    "rebrac: all critic updates share their noise": (
        "algorithms/rebrac.py", "jax.random.split(key, self.config.policy_delay)",
        "jnp.broadcast_to(key, (self.config.policy_delay,))", "test_every_key_of_a_method_serves_once[rebrac]"),
    "fql: targets draw the noise of the actor": (
        "algorithms/fql.py", "(self.critic_loss, batch, critic_key)", "(self.critic_loss, batch, actor_key)",
        "test_every_key_of_a_method_serves_once[fql]"),
    "cql: targets draw the actions of the penalty": (
        "algorithms/cql.py", "sample_and_log_prob(next_key)", "sample_and_log_prob(partition_key)",
        "test_every_key_of_a_method_serves_once[cql]"),
    "a policy and its environment share their keys": ("core/evaluation.py", "act(carry, obs, act_key)",
                                                      "act(carry, obs, env_key)",
                                                      "test_every_key_of_an_evaluation_serves_once"),
    "a jump and the drift share their keys": ("core/envs/hidden.py", "add_noise(drift_key,", "add_noise(draw_key,",
                                              "test_every_key_of_an_environment_serves_once[linear_tracking]"),
    "all iterations share their keys": ("launchers/train.py", "jax.random.fold_in(key, i), data)", "key, data)",
                                        "test_every_key_of_a_launched_training_serves_once"),
    "evaluations share their keys with measures": ("launchers/train.py",
        "jax.random.fold_in(jax.random.key(eval_seed), ~seed)", "jax.random.fold_in(jax.random.key(eval_seed), seed)",
        "test_every_key_of_a_launched_training_serves_once"),
    "ekf_lqr: environments plan alike": ("algorithms/ekf_lqr.py", SPLIT, SHARED, f"{OWN_KEYS}[ekf_lqr]"),
    "pets: environments plan alike": ("algorithms/pets.py", SPLIT, SHARED, f"{OWN_KEYS}[pets]"),
    **{f"{name}: environments plan alike": (f"algorithms/{name}.py", SPLIT, SHARED, f"{OWN_KEYS}[{name}]")
       for name in ("icem_online", "icem_online_gradient", "icem_online_lora", "icem_online_refit")},
    **{f"{name}: the environment draws from the key of the policy": (
        f"algorithms/{name}.py", "source.step(env_key,", "source.step(act_key,",
        f"test_every_key_of_a_method_serves_once[{name}]")
       for name in ("icem_online", "icem_online_gradient", "icem_online_lora", "icem_online_refit")},
    "ppo_memory: the environment draws from the key of the policy": (
        "algorithms/ppo_memory.py", "source.step(env_key,", "source.step(act_key,",
        "test_every_key_of_a_method_serves_once[ppo_memory]"),
    "ppo: one action for all": ("algorithms/ppo.py", "action = dist.sample(seed=act_key)",
        "action = dist.mean() + (dist.sample(seed=act_key) - dist.mean())[:1]", f"{OWN_KEYS}[ppo]"),
    "ippo: one noise for all agents": ("algorithms/ippo.py", "action = dist.sample(seed=act_key)",
        "action = dist.mean() + (dist.sample(seed=act_key) - dist.mean())[:, :1]", f"{OWN_KEYS}[ippo]"),
    "ippo: agents start alike": ("algorithms/ippo.py", 'split_rngs={"params": True}', 'split_rngs={"params": False}',
                                 "test_networks_start_on_their_own[ippo]"),
    "pets: one bootstrap for all members": ("algorithms/pets.py",
        "jax.random.randint(key, (len(z), num_members), 0, len(z))",
        "jax.random.randint(key, (len(z), 1), 0, len(z)).repeat(num_members, 1)",
        "test_members_and_particles_of_pets_draw_on_their_own"),
    "pets: particles share their noise": ("algorithms/pets.py", "jax.random.normal(noise_key, (H, P, 1, x.size))",
        "jax.random.normal(noise_key, (H, 1, 1, x.size)).repeat(P, 1)",
        "test_members_and_particles_of_pets_draw_on_their_own"),
}
SEEDS, ENVS, AGENTS, ITERATIONS, RECORD = 2, 3, 2, 2, 16
SEVERAL = ("ippo", "advantage_alignment")  # methods of several agents
GAMES = dict(  # of methods that no other one fits
    lola="infinite_matrix_game", lola_dice="iterated_matrix_game", good_shepherd="learning_coplayer",
    shaper="tabular_coplayer")


class Params(NamedTuple):
    gain: jax.Array


class State(NamedTuple):
    start: jax.Array  # drawn by the reset
    noise: jax.Array  # (T,) drawn by every step
    action: jax.Array  # (T, A) or (T, N, A)
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Witness:
    """Its state keeps what was drawn and done. The observation is zero, whatever happens."""

    agents: int = 0
    reveal: bool = False
    max_steps: int = RECORD
    action_space: Any = Box((-1.0,), (1.0,))
    truth = guess = Params(jnp.float32(0.5))

    @property
    def num_agents(self):
        return self.agents or None

    @property
    def shape(self):
        return (self.agents, *self.action_space.shape) if self.agents else self.action_space.shape

    @property
    def obs(self):
        return jnp.zeros((self.agents, 1) if self.agents else 1)

    def start(self, key):
        return jnp.zeros(1)

    def reset(self, key):
        action = jnp.zeros((RECORD, *self.shape))
        return State(jax.random.normal(key), jnp.zeros(RECORD), action, 0), self.obs

    def step(self, key, state, action):
        noise, done = state.noise.at[state.t].set(jax.random.normal(key)), state.action.at[state.t].set(action)
        reward, never = jnp.zeros(self.obs.shape[:-1]), jnp.array(False)
        step = TimeStep(self.obs, self.obs, reward, never, never, {"params": self.truth})
        return State(state.start, noise, done, state.t + 1), step

    def dynamics(self, params, x, action):
        return 0.5 * x + params.gain * action

    def cost(self, x, action, next_x):
        return jnp.square(action - 0.6).sum()

    def terminal_cost(self, x):
        return jnp.square(x).sum()

    def unknown(self, about):
        return hidden.unknown(self)


class Board(Witness):
    """The same as a game with an observation that it can go on from."""

    masked = True

    def observe(self, game):
        return dict(board=jnp.ones(self.action_space.n), game=game)

    def reset(self, key):
        state, _ = super().reset(key)
        return state, self.observe(state)

    def step(self, key, state, action):
        state, step = super().step(key, state, action)
        return state, step._replace(obs=self.observe(state), next_obs=self.observe(state))

    def move(self, game, action):
        return game, jnp.float32(0), jnp.array(False)


def get_config(name):
    config = importlib.import_module(f"algorithms.{name}").get_config()
    sizes = dict(num_envs=ENVS, num_steps=min(3, config.get("num_steps", 0)), env_steps=64, random_steps=4 * ENVS,
                 num_minibatches=3, num_epochs=2, num_updates=2, horizon=3, kept_elites=2, about="params", window=3,
                 rollout_steps=2, hidden_dims=(4,), critic_dims=(4,), buffer_size=64, batch_size=5, policy_delay=1,
                 unroll=1, n_step=1, num_simulations=2, latent_dim=3, memory_dim=4,
                 num_codes=2, final_epsilon=1.0)
    config.update({key: size for key, size in sizes.items() if key in config})
    if "planner" in config:
        config.planner.update(num_samples=32, num_elites=4, num_iterations=1)
    return ml_collections.FrozenConfigDict(config.to_dict())


ALGORITHMS = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__")
ACTING = [name for name in ALGORITHMS if "env_steps" in get_config(name)]  # others take no step of an environment
ENVIRONMENTS = ["gymnax/CartPole-v1", *sorted(path.stem for path in (ROOT / "core" / "envs").glob("*.py")
                                              if "\nclass Env" in path.read_text() and "from_" not in path.stem)]


@functools.cache
def trained(name) -> tuple[Any, Any, Any]:
    """(runs [S, ...] before training, and after it, all keys that this took, and that acting and measuring take)."""
    algorithm, config = importlib.import_module(f"algorithms.{name}"), get_config(name)
    # Among so many actions no two copies choose the same one.
    choices = dict(action_space=Discrete(100_000)) if name in ("pqn", *SEARCHING) else {}
    source = Batch(Witness(AGENTS if name in SEVERAL else 0, **choices), ENVS)
    if name in GAMES:
        source = make_env(GAMES[name], ENVS)
    if name == "alphazero":
        source = Batch(Board(max_steps=3, **choices), ENVS)
    if "dataset" in config:
        obs = jax.random.normal(jax.random.key(1), (12, 2))
        ends = jnp.arange(12) % 4 == 3
        action, space = obs[:, :1], Box((-1.0,), (1.0,))
        if name == "cql_discrete":
            action, space = jnp.int32(ends), Discrete(2)
        source = Dataset.create(dict(obs=obs, action=action, reward=obs[:, 0], next_obs=obs, terminated=ends,
                                     truncated=~ends & False), space)

    @jax.vmap
    def seed(key):
        init_key, train_key, act_key, measure_key = jax.random.split(key, 4)
        start = algorithm.init(init_key, source, config)
        run, _ = jax.lax.scan(lambda run, key: (algorithm.train_step(run, key, source, config)[0], None),
                              start, jax.random.split(train_key, ITERATIONS))
        carry = algorithm.initial_carry(run, ENVS) if hasattr(algorithm, "initial_carry") else ()
        acted = algorithm.act(run, carry, run.obs, act_key) if name in ACTING else ()
        measured = algorithm.measure(run, measure_key, source, config) if hasattr(algorithm, "measure") else {}
        return start, run, acted, measured

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys, used = jax.random.split(jax.random.key(0), SEEDS), None
        if name not in UNFOLLOWED:
            (start, run, *_), used = jax.jit(with_keys(seed))(keys)
        if name in SEARCHING:  # a search of two rounds is none
            start, run, *_ = jax.jit(seed)(keys)
    return start, run, used


def assert_all_differ(values):
    assert len(np.unique(values)) == np.size(values) > 1


def written(run):
    """The states of all copies [S, E], with the steps that were taken."""
    state = run.env_state.env
    steps = int(state.t.max())
    assert (np.asarray(state.t) == steps).all() and 0 < steps < RECORD
    return state._replace(noise=state.noise[:, :, :steps], action=state.action[:, :, :steps])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_of_a_method_serves_once(name):
    """In copies, seeds and steps, for policies and environments, in training, acting and measuring."""
    if name in UNFOLLOWED:
        pytest.skip("word for word its parent, by test_stochastic_muzero")
    assert_once(trained(name)[2], lifted=name in SEVERAL)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_key_of_an_environment_serves_once(name):
    try:
        env = make_env(name, ENVS, spread=2.0, jump_step=1, drift=0.1, process_noise=0.1, observation_noise=0.1)
    except UserError:  # nothing is hidden in it
        env = make_env(name, ENVS)

    def episode(key):
        reset_key, *keys = jax.random.split(key, 3)
        state, _ = env.reset(reset_key)
        for key in keys:
            action_key, key = jax.random.split(key)
            agents = () if env.num_agents is None else (env.num_agents,)
            state, _ = env.step(key, state, env.action_space.sample(action_key, (ENVS, *agents)))
        return state

    assert_once(with_keys(episode)(jax.random.key(0))[1])


def test_every_key_of_an_evaluation_serves_once():
    """The first two steps of it: a policy and its environment draw from keys of their own."""
    def play(key):
        return evaluate(lambda carry, obs, key: (carry, jax.random.normal(key, (ENVS, 1))), Batch(Witness(), ENVS), key)

    keys = jax.random.split(jax.random.key(0), SEEDS)
    assert_once(jax.jit(with_keys(jax.vmap(play)))(keys)[1])


def test_every_key_of_a_launched_training_serves_once(monkeypatch):
    """In the programs of launchers.train: iterations, evaluations and measures of all seeds."""
    monkeypatch.setattr(cli, "make_env", lambda name, num_envs, **kwargs: Batch(Witness(), num_envs))
    algorithm, config = importlib.import_module("algorithms.icem_online"), get_config("icem_online")
    config = ml_collections.FrozenConfigDict(config.to_dict() | dict(rehearse=True))  # measuring draws, too
    seeds, source = jnp.arange(SEEDS), Batch(Witness(), ENVS)
    init, train, test, measure, info = launcher.programs(algorithm, config, SEEDS, 7, source)

    def whole(seeds):
        run = init(seeds, ())
        totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(info, run, ()))
        run, totals = train(run, (totals, jnp.full(SEEDS, -1)), seeds, (), 0, 2)
        return run, test(run, seeds, ()), measure(run, seeds, ())

    with jax.debug_key_reuse(False):
        assert_once(jax.jit(with_keys(whole))(seeds)[1])


@pytest.mark.parametrize("name", ACTING)
def test_environments_and_seeds_start_and_step_on_their_own(name):
    state = written(trained(name)[1])
    assert state.start.shape == (SEEDS, ENVS)
    assert_all_differ(state.start)
    assert_all_differ(state.noise)


@pytest.mark.parametrize("name", ACTING)
def test_environments_and_seeds_act_on_their_own(name):
    """Agents of a game, too; and each acts anew at every step."""
    assert_all_differ(written(trained(name)[1]).action)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_networks_start_on_their_own(name):
    """No weight occurs twice: not in two seeds, members, agents or layers. (In the widest layer some do, by chance.)"""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(trained(name)[0].agent)[0]}
    weights = [leaf[..., :99, :99].ravel() for path, leaf in leaves.items()
               if "opt_state" not in path and "target_" not in path and ("kernel" in path or "weight_" in path)]
    if not weights:
        pytest.skip("no networks")
    assert_all_differ(np.concatenate(weights))


def test_members_and_particles_of_pets_draw_on_their_own():
    run = jax.tree.map(lambda x: x[0], trained("pets")[1])
    rows = np.asarray(run.memory.data["bootstrap"])[: int(run.memory.size)]
    members = {tuple(column) for column in rows.T}
    assert len(members) == rows.shape[1] > 1
    noise, order = run.agent.chance(jax.random.key(0), run.obs[0])
    assert_all_differ(noise)
    assert len({tuple(row) for row in np.asarray(order)}) > 1
