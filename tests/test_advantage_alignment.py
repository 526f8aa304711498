"""Advantage Alignment: the aligned advantage as a double sum, where it counts and where not, and a game that it
changes. What is word for word its parent is tested by test_ippo."""
import functools
import inspect
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import advantage_alignment, ippo
from configs import advantage_alignment_ipd
from core.envs import Discrete, make_env
from launchers.train import train
from tests import probes, test_ippo

FILE = "algorithms/advantage_alignment.py"
SUM, BATCH, LOSS, GIFTS, PARENT, REST = (
    "test_the_aligned_advantage_is_the_double_sum", "test_sums_start_afresh_where_an_agent_ends",
    "test_the_aligned_advantage_is_the_actors_alone", "test_gifts_are_for_good_luck",
    "test_without_alignment_it_is_the_parent", "test_the_rest_is_the_parent")
TERM = "own + config.alignment * config.discount * past * others"
PAST = "config.discount * (past + own) * (1.0 - over)"
PLANTED_ERRORS = {  # and the test that has to notice
    "good for the others where it went badly": (FILE, TERM, TERM.replace("own +", "own -"), SUM),
    "the others' past, the own present": (
        FILE, TERM, TERM.replace("past * others", "(past.sum(axis=1, keepdims=True) - past) * own"), SUM),
    "the own past and present": (FILE, TERM, TERM.replace("others", "own"), SUM),
    "each agent is one of the others": (FILE, "keepdims=True) - own", "keepdims=True)", SUM),
    "the others' mean": (FILE, "own.sum(axis=1, keepdims=True) - own", "own.mean(axis=1, keepdims=True) - own", SUM),
    "other copies for other agents": (FILE, "own.sum(axis=1", "own.sum(axis=0", SUM),
    "beta is 1": (FILE, "config.alignment * config.discount", "config.discount", SUM),
    "the factor gamma left out": (FILE, "config.alignment * config.discount", "config.alignment", SUM),
    "the past is not discounted": (FILE, PAST, "(past + own) * (1.0 - over)", SUM),
    "the present is not discounted": (FILE, PAST, "(config.discount * past + own) * (1.0 - over)", SUM),
    "another discount": (FILE, PAST, PAST.replace("discount", "gae_lambda"), SUM),
    "only the last step counts": (FILE, "(past + own)", "own", SUM),
    "the present is past": (FILE, "past * others", "(past + own) * others", SUM),
    "the past goes on": (FILE, PAST, "config.discount * (past + own)", SUM),
    "it starts afresh one step early": (FILE, TERM, TERM.replace("past", "past * (1.0 - over)"), SUM),
    "time runs backwards": (FILE, "(scaled, over))[1]", "(scaled, over), reverse=True)[1]", SUM),
    "copies share their past": (FILE, PAST, PAST.replace("(past + own)", "(past + own).mean(axis=0, keepdims=True)"),
                                SUM),
    "the past is added to the present": (FILE, "return config.discount", "return aligned - own + config.discount", SUM),
    "the sum starts with the first step": (FILE, "jnp.zeros_like(scaled[0])", "scaled[0]", SUM),
    "advantages are not centred": (FILE, "scaled = advantage - advantage.mean(axis=(0, 1), keepdims=True)",
                                   "scaled = advantage", SUM),
    "advantages keep their scale": (FILE, "(advantage.std(axis=(0, 1), keepdims=True) + 1e-8)", "1.0", SUM),
    "agents are standardised together in the sum": (FILE, "advantage.std(axis=(0, 1)", "advantage.std(axis=(0, 1, 2)",
                                                    SUM),
    "each copy is standardised by itself": (FILE, "advantage.mean(axis=(0, 1)", "advantage.mean(axis=(0,)", SUM),
    "a time limit does not end the sum": (FILE, "align(advantage, terminated | truncated, config)",
                                          "align(advantage, terminated | truncated & False, config)", BATCH),
    "a termination does not end the sum": (FILE, "align(advantage, terminated | truncated, config)",
                                           "align(advantage, terminated & False | truncated, config)", BATCH),
    "an agent's own end does not": (FILE, "align(advantage, terminated | truncated, config)",
                                    "align(advantage, (step.terminated | step.truncated)[..., None], config)", BATCH),
    "what is left of the rewards is aligned": (FILE, "align(advantage, term", "align(reward, term", BATCH),
    "the actor has its own advantage": (FILE, 'batch["aligned"] = align', 'batch["unused"] = align', BATCH),
    "the policy follows the own advantage": (FILE, 'advantage = batch["aligned"] - batch["aligned"].mean',
                                             'advantage = batch["advantage"] - batch["advantage"].mean', LOSS),
    "the critic learns the aligned advantage": (FILE, 'target = batch["advantage"]', 'target = batch["aligned"]', LOSS),
    "scaled by the own advantage": (FILE, 'batch["aligned"].std(axis=0', 'batch["advantage"].std(axis=0', LOSS),
    "centred by the own advantage": (FILE, '- batch["aligned"].mean(axis=0', '- batch["advantage"].mean(axis=0', LOSS),
    "agents are standardised together": (FILE, 'batch["aligned"].std(axis=0, keepdims=True)',
                                         'batch["aligned"].std(keepdims=True)', LOSS),
    "copies have one action": (FILE, "action = dist.sample(seed=act_key)", "action = dist.mode()", REST),
    "the learning rate stays": (FILE, "if config.anneal_lr else config.lr", "if False else config.lr", REST),
}
CONFIG = dict(num_envs=16, num_steps=8, env_steps=16 * 8 * 60, hidden_dims=(8,), lr=1e-2, num_minibatches=4)


class Luck(NamedTuple):
    """Two steps. The first one gives each agent 1 or −1 by chance, and each sees its own luck. In the second one each
    gives the other 1 (action 1) or −1 (action 0). Nothing that an agent does changes its own reward."""

    num_agents: int = 2
    max_steps: int = 2
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        return (jax.random.rademacher(key, (2, 1), jnp.float32), jnp.int32(0)), jnp.zeros((2, 1))

    def step(self, key, state, action):
        luck, t = state
        reward = jnp.where(t == 0, luck[:, 0], 2.0 * action[::-1] - 1.0)
        return (luck, t + 1), probes.time_step(luck, reward, terminated=t == 1)


def make_config(**changes):
    config = advantage_alignment.get_config()
    config.update(CONFIG | changes)
    return ml_collections.FrozenConfigDict(config)


@pytest.fixture(autouse=True)
def loose_ranks(strict_ranks):
    with jax.numpy_rank_promotion("allow"):  # distrax broadcasts where it samples
        yield


def start(key, env, config, method=advantage_alignment):
    return jax.jit(lambda key: method.init(key, env, config))(key)


def by_hand(advantage, over, alignment, discount):
    """Over steps, copies and agents in loops: advantage (T, E, N), ends (T, E, N)."""
    advantage = (advantage - advantage.mean(axis=(0, 1))) / advantage.std(axis=(0, 1))
    steps, copies, agents = advantage.shape
    aligned = np.zeros(advantage.shape)
    for t, e, i in np.ndindex(steps, copies, agents):
        past, k = 0.0, t - 1
        while k >= 0 and not over[k, e, i]:  # back to the start of the episode
            past += discount ** (t - k) * advantage[k, e, i]
            k -= 1
        others = sum(advantage[t, e, j] for j in range(agents) if j != i)
        aligned[t, e, i] = advantage[t, e, i] + alignment * discount * past * others
    return aligned


@pytest.mark.parametrize("agents, own_ends", [(2, False), (3, True)])
def test_the_aligned_advantage_is_the_double_sum(agents, own_ends):
    rng, config = np.random.default_rng(agents), make_config(alignment=0.7, discount=0.9, gae_lambda=0.5)
    advantage = rng.normal(size=(9, 4, agents)) * (1 + np.arange(agents)) + 2 - 3 * np.arange(agents)
    over = rng.random((9, 4, agents if own_ends else 1)) < 0.2
    with jax.numpy_rank_promotion("raise"):
        aligned = advantage_alignment.align(jnp.float32(advantage), jnp.array(over), config)
    np.testing.assert_allclose(aligned, by_hand(advantage, over + np.zeros(advantage.shape), 0.7, 0.9), rtol=1e-4,
                               atol=1e-5)
    assert over.any(axis=(1, 2)).sum() > 3


@pytest.mark.parametrize("env", [Luck(), test_ippo.Clocks(), test_ippo.Clocks(deadly=True)],
                         ids=["ends", "limits", "deaths"])
def test_sums_start_afresh_where_an_agent_ends(env):
    """The batch that `update` is given. Clocks: a time limit after three steps; `deadly`: agent 1 ends in each step."""
    config, source = make_config(num_steps=7, num_envs=8, alignment=1.3, discount=0.9), probes.batch(env, 8)
    run = start(jax.random.key(0), source, config)

    class Spy(advantage_alignment.Agent):
        def update(self, batch, key):
            return self, dict(batch=batch)

    @jax.jit
    def spied(run, key):
        rollout_key, _ = jax.random.split(key)
        spy = run._replace(agent=Spy(run.agent.actor_critic, config))
        return (advantage_alignment.train_step(spy, key, source, config)[1]["batch"],
                advantage_alignment.rollout(run, rollout_key, source, config)[1][3])

    with jax.debug_key_reuse(False):
        batch, step = spied(run, jax.random.key(1))
    advantage, aligned = (np.asarray(batch[name], np.float64).reshape(7, 8, 2) for name in ("advantage", "aligned"))
    over = np.array(step.terminated | step.truncated)[..., None] | np.zeros(2, bool)
    over |= np.array(step.info.get("agent_done", False))
    assert over.any() and not over.all()
    np.testing.assert_allclose(aligned, by_hand(advantage, over, 1.3, 0.9), rtol=1e-4, atol=1e-4)


@test_ippo.BOTH
def test_the_aligned_advantage_is_the_actors_alone(share):
    config = make_config(value_coef=0.7, entropy_coef=0.3, clip=0.15, share_params=share)
    agent = start(jax.random.key(0), probes.batch(test_ippo.Game()), config).agent
    raw = test_ippo.a_batch(agent, jnp.full((1, 2, 1), 0.4), Discrete(2))
    raw["aligned"] = 2 * jax.random.normal(jax.random.key(7), (32, 2)) * jnp.array([[1.0, 0.2]]) + 1
    dist, values = agent.actor_critic(raw["obs"])
    losses = []
    for i in range(2):
        batch = {k: np.asarray(v, np.float64)[:, i] for k, v in raw.items()}
        p, v = np.asarray(dist.probs, np.float64)[:, i], np.asarray(values, np.float64)[:, i]
        ratio = p[np.arange(32), raw["action"][:, i]] / np.exp(batch["log_prob"])
        a = (batch["aligned"] - batch["aligned"].mean()) / batch["aligned"].std()
        actor = -np.mean([min(r * x, np.clip(r, 0.85, 1.15) * x) for r, x in zip(ratio, a, strict=True)])
        g, old = batch["advantage"] + batch["value"], batch["value"]
        value = 0.5 * np.mean(np.maximum((v - g) ** 2, (old + np.clip(v - old, -0.15, 0.15) - g) ** 2))
        losses.append(actor + 0.7 * value + 0.3 * (p * np.log(p)).sum(-1).mean())
    loss, _ = agent.loss(agent.actor_critic.params, raw)
    np.testing.assert_allclose(loss, np.mean(losses) if share else np.sum(losses), rtol=1e-4)


def iterate(env, config, iterations, method=advantage_alignment, seed=0):
    source, (init_key, key) = probes.batch(env, config.num_envs), jax.random.split(jax.random.key(seed))
    step = functools.partial(method.train_step, source=source, config=config)
    run = start(init_key, source, config, method)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys)[0])(run, jax.random.split(key, iterations))


def test_gifts_are_for_good_luck():
    """No own reward depends on the own action. Alignment gives where luck was good, and takes where it was not."""
    run = iterate(Luck(), make_config(), 60)
    for luck in ([1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]):
        _, action = advantage_alignment.act(run, (), jnp.array(luck)[None, :, None], None)
        np.testing.assert_array_equal(action[0], np.array(luck) > 0)
    probs = run.agent.actor_critic(jnp.array([[[1.0], [1.0]], [[-1.0], [-1.0]]]), method="actor").probs[..., 1]
    assert (probs[0] > 0.9).all() and (probs[1] < 0.1).all()


@test_ippo.BOTH
def test_without_alignment_it_is_the_parent(share):
    config = make_config(alignment=0.0, share_params=share)
    own, parent = (iterate(Luck(), config, 2, method).agent.actor_critic for method in (advantage_alignment, ippo))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), own.params, parent.params)
    other = iterate(Luck(), make_config(share_params=share), 2).agent.actor_critic
    assert np.abs(jax.tree.leaves(other.params)[0] - jax.tree.leaves(own.params)[0]).max() > 0.02


@pytest.mark.parametrize("name", [
    "ActorCritic", "width", "is_masked", "Agent.create", "Agent.loss", "Agent.update", "Run", "init", "train_step",
    "rollout", "scale", "features", "normalize", "critic", "act", "get_config"])
def test_the_rest_is_the_parent(name):
    """Word for word, so that the tests of the parent are tests of the child."""
    own, parent = (inspect.getsource(operator.attrgetter(name)(module)) for module in (advantage_alignment, ippo))
    for new, old in (('"aligned"] - batch["aligned"]', '"advantage"] - batch["advantage"]'), (
            '(batch["aligned"].std', '(batch["advantage"].std'), ("alignment=nonnegative(1.0),  # β", ""), (
            'batch["aligned"] = align(advantage, terminated | truncated, config)', ""), (
            "iterated_matrix_game\",  # the prisoner's dilemma", 'multi_agent_tracking",')):
        own = own.replace(new, old)
    assert own.split() == parent.split()


def test_seeds_under_vmap_match_seeds_alone():
    config, env = make_config(), probes.batch(Luck(), 16)

    def params(key):
        init_key, key = jax.random.split(key)
        step = functools.partial(advantage_alignment.train_step, source=env, config=config)
        run = advantage_alignment.init(init_key, env, config)
        return jax.lax.scan(step, run, jax.random.split(key, 3))[0].agent.actor_critic.params

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(params))(keys), jax.jit(params)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5), together, alone)


def test_a_column_says_how_much_each_player_cooperates():
    """The environment reports it: of the first player, who defects in two rounds of four, and of the second one."""
    env = make_env("iterated_matrix_game", 1, max_steps=4)
    state, _ = env.reset(jax.random.key(0))
    for action in ([0, 0], [1, 0], [1, 0], [0, 1]):
        state, step = env.step(jax.random.key(1), state, jnp.array([action]))
    np.testing.assert_allclose(step.info["episode"]["cooperates"], [[0.5, 0.75]])


@pytest.mark.slow
def test_players_cooperate(tmp_path):
    """In at least 90% of the rounds of greedy play, and in 50% with drawn actions, where the parent's defect."""
    for alignment in (1.0, 0.0):
        config = advantage_alignment_ipd.get_config()
        config.alignment = alignment
        with jax.debug_key_reuse(False):
            summary = train(config, num_seeds=4, workdir=str(tmp_path / str(alignment)))
        greedy, drawn = (np.array([summary[f"{name}_agent{i}"]["iqm"] for i in (0, 1)])
                         for name in ("cooperates", "train_cooperates"))
        assert (greedy > 0.9).all() and (drawn > 0.5).all() if alignment else (drawn < 0.1).all()
