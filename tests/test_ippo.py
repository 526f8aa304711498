import functools
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import ippo
from core.envs import Box, Discrete
from tests import probes

IPPO = "algorithms/ippo.py"
LOSS, OWN = "test_loss_is_the_equation_agent_by_agent", "test_agents_with_their_own_parameters_do_not_touch_each_other"
BATCH, CLOCK = "test_advantages_of_every_copy_time_and_agent[own]", "test_a_time_limit_is_not_the_end_but_a_death_is"
TARGETS, GAME = "test_each_agent_finds_its_own_target", "test_matrix_game_reaches_its_equilibrium[own]"
MASK, PAD = "test_a_forbidden_action_is_never_taken[own]", "test_padded_components_are_ignored[own]"
STATISTICS = "test_rewards_and_observations_have_their_own_statistics"
PLANTED_ERRORS = {
    "rewards of the agents swapped": (IPPO, "reward = step.reward  #", "reward = step.reward[..., ::-1]  #", BATCH),
    "one reward for all": (IPPO, "reward = step.reward  #", "reward = 0 * step.reward + step.reward[..., :1]  #", GAME),
    "advantages scaled over all agents": (IPPO, 'batch["advantage"].std(axis=0, keepdims=True)',
                                          'batch["advantage"].std(keepdims=True)', LOSS),
    "advantages centred over all agents": (IPPO, 'batch["advantage"].mean(axis=0, keepdims=True)',
                                           'batch["advantage"].mean(keepdims=True)', LOSS),
    "agents standardised instead of moments": (IPPO, 'batch["advantage"].std(axis=0, keepdims=True)',
                                               'batch["advantage"].std(axis=1, keepdims=True)', LOSS),
    "copies and agents exchanged": (IPPO, "lambda x: x.reshape(-1, *x.shape[2:]), batch), update_key",
                                    "lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[2], *x.shape[3:]), batch), "
                                    "update_key", BATCH),
    "time and agents exchanged in the values": (IPPO, ".reshape(obs.shape[:3])",
                                                ".reshape(obs.shape[2], obs.shape[1], obs.shape[0]).swapaxes(0, 2)",
                                                BATCH),
    "time and copies exchanged in the values": (IPPO, ".reshape(obs.shape[:3])",
                                                ".reshape(obs.shape[1], obs.shape[0], -1).swapaxes(0, 1)", BATCH),
    "mask dropped": (IPPO, "logits=jnp.where(available, out, -1e9)", "logits=out", MASK),
    "mask of the wrong end": (IPPO, "obs[..., -out.shape[-1]:] > 0", "obs[..., :out.shape[-1]] > 0", MASK),
    "mask normalised": (IPPO, "RunningMeanStd.create(obs[0, ..., :obs.shape[-1] - mask_size])",
                        "RunningMeanStd.create(obs[0])", MASK),
    "padded components learn": (IPPO, "mean, std = jnp.where(available, mean, 0.0), jnp.where(available, std, 1.0)",
                                "mean, std = mean, std", PAD),
    "agent's number dropped": (IPPO, "jnp.eye(self.num_agents)[None]", "jnp.zeros((1, 1, self.num_agents))",
                               TARGETS + "[shared]"),
    "parameters shared unasked": (IPPO, "net = MLP if self.share_params", "net = MLP if True", TARGETS + "[own]"),
    "gradients of all clipped as one": (IPPO, "if not config.share_params:", "if False:", OWN),
    "gradients not clipped": (IPPO, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()", OWN),
    "own losses averaged": (IPPO, "else loss.sum(), info", "else loss.mean(), info", LOSS),
    "time limit as termination": (IPPO, "step.terminated[..., None], step.truncated[..., None]",
                                  "ended(step)[..., None], step.truncated[..., None]", CLOCK),
    "termination as time limit": (IPPO, "step.terminated[..., None], step.truncated[..., None]",
                                  "step.truncated[..., None], step.terminated[..., None]", CLOCK),
    "death of an agent ignored": (IPPO, 'step.info.get("agent_done", False)', "False", CLOCK),
    "successor is the reset observation": (IPPO, "critic(run, step.next_obs)", "critic(run, step.obs)", BATCH),
    "one reward scale for all": (IPPO, "(run.reward_scale, reward)", "(run.reward_scale, reward[..., [0, 0]])",
                                 STATISTICS),
    "raw rewards learnt from": (IPPO, "run, reward = scale(run, reward, ended(step), config)",
                                "run, _ = scale(run, reward, ended(step), config)",
                                "test_values_are_learnt_in_units_of_the_returns_deviation"),
    "policy gradient reversed": (IPPO, "actor_loss = -jnp.minimum", "actor_loss = jnp.minimum", LOSS),
    "no gradient through the entropy": (IPPO, "entropy = dist.entropy().mean(axis=0)",
                                        "entropy = jax.lax.stop_gradient(dist.entropy().mean(axis=0))", LOSS),
    "no gradient through the clipped value": (IPPO, 'jnp.clip(value - batch["value"],',
                                              'jnp.clip(jax.lax.stop_gradient(value) - batch["value"],', LOSS),
    "max for min": (IPPO, "-jnp.minimum(ratio", "-jnp.maximum(ratio", LOSS),
    "value not clipped": (IPPO, 'jnp.clip(value - batch["value"], -self.config.clip, self.config.clip)',
                          'value - batch["value"]', LOSS),
    "entropy punished": (IPPO, "- self.config.entropy_coef * entropy", "+ self.config.entropy_coef * entropy", LOSS),
    "log-probability of the wrong action": (IPPO, "dist.log_prob(action), step)", "dist.log_prob(dist.mode()), step)",
                                            BATCH),
    "observation after the step": (IPPO, "(run.obs, action, dist", "(step.obs, action, dist", BATCH),
    "evaluation sees raw observations": (IPPO, "return (), run.agent.actor_critic(normalize(run, obs), ",
                                         "return (), run.agent.actor_critic(obs, ", STATISTICS),
    "initial deviation for its logarithm": (IPPO, "constant(jnp.log(self.init_std))", "constant(self.init_std)",
                                            "test_a_continuous_policy_is_in_units_of_its_box"),
    "standard deviation not in units of the box": (IPPO, "std = half * jnp.broadcast_to", "std = jnp.broadcast_to",
                                                   "test_a_continuous_policy_is_in_units_of_its_box"),
    "another discount for the scale of rewards": (IPPO, "scale.update(reward, done, config.discount)",
                                                  "scale.update(reward, done, config.gae_lambda)", STATISTICS),
    "episodes of all agents added": (IPPO, "lambda x: x.sum((0, 1)), step.info", "lambda x: x.sum(), step.info",
                                     "test_training_returns_are_of_each_agent"),
    "statistics never updated": (IPPO, "run = run._replace(obs_stats=run.obs_stats.update(features(run, obs)))",
                                 "run = run", STATISTICS),
}

YES, NO = jnp.array(True), jnp.array(False)
CONFIG = dict(num_envs=8, num_steps=16, env_steps=8 * 16 * 120, hidden_dims=(16, 16), lr=1e-2, num_minibatches=4)


class Targets(NamedTuple):
    """One step: agent i's best action is its own of opposite targets; both see the same. Rewards differ in scale."""

    num_agents: int = 2
    max_steps: int = 1
    action_space: Box = Box((-1.0,), (1.0,))

    def reset(self, key):
        return (), jnp.zeros((2, 1))

    def step(self, key, state, action):
        reward = -jnp.array([1.0, 100.0]) * jnp.square(action[:, 0] - jnp.array([0.5, -0.5]))
        return (), probes.time_step(jnp.zeros((2, 1)), reward, terminated=YES)


class Game(NamedTuple):
    """One step, a matrix game solved by dominance: the row's first action dominates, the column's answer to it is 1.

    Row's payoffs [[3, 2], [1, 0]], column's [[0, 1], [4, 2]]: the equilibrium (0, 1) pays 2 and 1.
    """

    num_agents: int = 2
    max_steps: int = 1
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        return (), jnp.zeros((2, 1))

    def step(self, key, state, action):
        payoff = jnp.array([[[3.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [4.0, 2.0]]])
        return (), probes.time_step(jnp.zeros((2, 1)), payoff[:, action[0], action[1]], terminated=YES)


class Clocks(NamedTuple):
    """Agent i is paid i + 1 for ever, cut by a time limit after three steps; every copy starts at its own moment.

    The true successor at the limit carries a mark that no first observation has. With `deadly` the second agent is
    dead after each of its steps: its value is its one reward.
    """

    deadly: bool = False
    num_agents: int = 2
    max_steps: int = 3
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        t = jax.random.randint(key, (), 0, 3)
        return t, jnp.full((2, 1), t, jnp.float32)

    def step(self, key, t, action):
        step = probes.time_step(jnp.full((2, 1), t + 1, jnp.float32), jnp.array([1.0, 2.0]), truncated=t + 1 == 3)
        return t + 1, step._replace(info={"agent_done": jnp.array([False, True])} if self.deadly else {})


class Masked(NamedTuple):
    """One step: the action's number is the reward, but each agent has fewer than the three: a mask behind the obs.

    Which are allowed is drawn anew: one of the first two, and for the second agent the last as well.
    """

    masked: bool = True
    num_agents: int = 2
    max_steps: int = 1
    action_space: Discrete = Discrete(3)

    def reset(self, key):
        first = jax.random.bernoulli(key)
        own = jnp.array([[first, ~first, False], [first, ~first, True]]).astype(jnp.float32)
        obs = jnp.concatenate([jnp.ones((2, 2)), own], axis=1)
        return obs, obs

    def step(self, key, obs, action):
        allowed = obs[jnp.arange(2), 2 + action] > 0
        reward = jnp.where(allowed, action.astype(jnp.float32), -1000.0)
        return obs, probes.time_step(obs, reward, terminated=YES)


class Padded(NamedTuple):
    """One step, continuous: the first agent has one component, best at 0.5, the second two, best at −0.5."""

    masked: bool = True
    num_agents: int = 2
    max_steps: int = 1
    action_space: Box = Box((-1.0, -1.0), (1.0, 1.0))

    def reset(self, key):
        obs = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        return (), obs

    def step(self, key, state, action):
        own = jnp.array([[1.0, 0.0], [1.0, 1.0]])
        reward = -(own * jnp.square(action - jnp.array([[0.5], [-0.5]]))).sum(axis=1)
        return (), probes.time_step(self.reset(key)[1], reward, terminated=YES)


def make_config(**changes):
    config = ippo.get_config()
    config.update(CONFIG)
    config.update(changes)
    return ml_collections.FrozenConfigDict(config)


def train(env, config, iterations=None, seed=0):
    env = probes.batch(env, config.num_envs)
    init_key, key = jax.random.split(jax.random.key(seed))
    iterations = config.env_steps // (config.num_envs * config.num_steps) if iterations is None else iterations
    step = functools.partial(ippo.train_step, source=env, config=config)
    run = start(init_key, env, config)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(key, iterations))


def start(key, env, config):
    return jax.jit(lambda key: ippo.init(key, env, config))(key)


@pytest.fixture
def loose_ranks():
    with jax.numpy_rank_promotion("allow"):  # distrax broadcasts where it samples
        yield


pytestmark = pytest.mark.usefixtures("loose_ranks")
BOTH = pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])


@BOTH
def test_each_agent_finds_its_own_target(share):
    """Only the agent's number tells the shared network whose target is meant; scales are 100 apart."""
    run, _ = train(Targets(), make_config(share_params=share, normalize_reward=True))
    np.testing.assert_allclose(ippo.act(run, (), jnp.zeros((1, 2, 1)), None)[1][0, :, 0], [0.5, -0.5], atol=0.06)


@BOTH
def test_matrix_game_reaches_its_equilibrium(share):
    run, _ = train(Game(), make_config(share_params=share))
    obs = jnp.zeros((1, 2, 1))
    np.testing.assert_array_equal(ippo.act(run, (), obs, None)[1], [[0, 1]])
    np.testing.assert_allclose(run.agent.actor_critic(obs, method="critic"), [[2.0, 1.0]], atol=0.15)


@pytest.mark.parametrize("deadly", [False, True], ids=["alive", "deadly"])
def test_a_time_limit_is_not_the_end_but_a_death_is(deadly):
    """Reward r for ever has the value r / (1 − γ), also right before the limit; a dead agent's is its last reward."""
    run, _ = train(Clocks(deadly), make_config(discount=0.5, gae_lambda=0.5))
    obs = jnp.broadcast_to(jnp.arange(3.0)[:, None, None], (3, 2, 1))
    value = run.agent.actor_critic(obs, method="critic")
    np.testing.assert_allclose(value, [[2.0, 2.0 if deadly else 4.0]] * 3, atol=0.15)


@BOTH
def test_advantages_of_every_copy_time_and_agent(share):
    """The batch that `update` is given, against a loop over copies and agents in numpy."""
    config = make_config(num_steps=7, num_minibatches=1, share_params=share, discount=0.9)
    env = probes.batch(Clocks(), 8)
    run = start(jax.random.key(0), env, config)

    class Spy(ippo.Agent):
        def update(self, batch, key):
            return self, dict(batch=batch)

    @jax.jit
    def batch_of(run, key):
        spied = run._replace(agent=Spy(run.agent.actor_critic, config))
        return ippo.train_step(spied, key, env, config)[1]["batch"]

    rollout_key, _ = jax.random.split(jax.random.key(1))
    _, (obs, action, log_prob, step) = jax.jit(lambda run, key: ippo.rollout(run, key, env, config))(run, rollout_key)
    batch = batch_of(run, jax.random.key(1))
    got = {k: np.asarray(v).reshape(7, 8, 2, *v.shape[2:]) for k, v in batch.items()}
    np.testing.assert_array_equal(got["obs"], obs)
    np.testing.assert_array_equal(got["action"], action)
    assert step.truncated.any(axis=0).all() and len(np.unique(np.asarray(obs)[0])) == 3
    for e in range(8):
        value = np.asarray(run.agent.actor_critic(obs[:, e], method="critic"))
        next_value = np.asarray(run.agent.actor_critic(step.next_obs[:, e], method="critic"))
        np.testing.assert_allclose(got["value"][:, e], value, rtol=1e-4, atol=1e-5)
        dist = run.agent.actor_critic(obs[:, e], method="actor")
        np.testing.assert_allclose(got["log_prob"][:, e], dist.log_prob(action[:, e]), rtol=1e-4)
        for i in range(2):
            advantage = 0.0
            for t in reversed(range(7)):
                delta = (1.0, 2.0)[i] + 0.9 * next_value[t, i] - value[t, i]
                advantage = delta + 0.9 * 0.95 * (1 - step.truncated[t, e]) * advantage
                np.testing.assert_allclose(got["advantage"][t, e, i], advantage, rtol=1e-4)


@BOTH
def test_a_forbidden_action_is_never_taken(share):
    run, info = train(Masked(), make_config(share_params=share, normalize_obs=True, env_steps=128 * 60))
    assert info["episode"]["return"].min() >= 0.0  # one forbidden action costs 1000
    key = jax.random.key(3)
    with jax.debug_key_reuse(False):
        obs = jax.vmap(Masked().reset)(jax.random.split(key, 32))[1]
    probs = run.agent.actor_critic(ippo.normalize(run, obs), method="actor").probs
    np.testing.assert_array_equal(np.asarray(probs)[np.asarray(obs[..., 2:]) == 0], 0.0)
    np.testing.assert_array_equal(ippo.normalize(run, obs)[..., 2:], obs[..., 2:])
    best = jnp.stack([jnp.argmax(obs[:, 0, 2:], -1), jnp.full(32, 2)], axis=1)
    np.testing.assert_array_equal(ippo.act(run, (), obs, None)[1], best)


@BOTH
def test_padded_components_are_ignored(share):
    config = make_config(share_params=share)
    run, _ = train(Padded(), config)
    obs = Padded().reset(jax.random.key(0))[1][None]
    action = ippo.act(run, (), obs, None)[1][0]
    np.testing.assert_allclose(action[[0, 1, 1], [0, 0, 1]], [0.5, -0.5, -0.5], atol=0.06)
    batch = a_batch(run.agent, obs, Padded().action_space, 16)
    other = batch | dict(action=batch["action"].at[:, 0, 1].set(0.123))
    log_prob = [run.agent.actor_critic(b["obs"], method="actor").log_prob(b["action"]) for b in (batch, other)]
    ratio = log_prob[0] - log_prob[1]
    own = jax.scipy.stats.norm.logpdf(batch["action"][:, 0, 1]) - jax.scipy.stats.norm.logpdf(0.123)
    np.testing.assert_allclose(ratio[:, 0], own, atol=1e-4)  # the same for every policy
    np.testing.assert_array_equal(ratio[:, 1], 0.0)


def a_batch(agent, obs, space, size=32):
    keys = jax.random.split(jax.random.key(1), 4)
    obs = jnp.broadcast_to(obs[:1], (size, *obs.shape[1:]))
    action = space.sample(keys[1], (size, obs.shape[1]))
    log_prob = agent.actor_critic(obs, method="actor").log_prob(action)
    log_prob = log_prob + 0.3 * jax.random.normal(keys[2], log_prob.shape)
    value, advantage = jax.random.normal(keys[3], (2, *log_prob.shape))
    advantage = advantage * jnp.array([[1.0, 3.0]]) + jnp.array([[0.0, 2.0]])
    return dict(obs=obs, action=action, log_prob=log_prob, value=value, advantage=advantage)


@BOTH
@pytest.mark.parametrize("env", [Game(), Targets()], ids=["discrete", "continuous"])
def test_loss_is_the_equation_agent_by_agent(env, share):
    config = make_config(value_coef=0.7, entropy_coef=0.3, clip=0.15, share_params=share)
    agent = start(jax.random.key(0), probes.batch(env), config).agent
    raw = a_batch(agent, jnp.full((1, 2, 1), 0.4), env.action_space)
    dist, values = agent.actor_critic(raw["obs"])
    losses, parts = [], []
    for i in range(2):
        batch = {k: np.asarray(v, np.float64)[:, i] for k, v in raw.items()}
        if isinstance(dist, distrax.Categorical):
            p = np.asarray(dist.probs, np.float64)[:, i]
            log_prob, entropy = np.log(p[np.arange(32), raw["action"][:, i]]), -(p * np.log(p)).sum(-1).mean()
        else:
            normal = dist.distribution
            mean, std = (np.asarray(x, np.float64)[:, i, 0] for x in (normal.loc, normal.scale))
            log_prob = -0.5 * ((batch["action"][:, 0] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
            entropy = (0.5 * np.log(2 * np.pi * np.e) + np.log(std)).mean()
        ratio = np.exp(log_prob - batch["log_prob"])
        a = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
        actor = -np.mean([min(r * x, np.clip(r, 0.85, 1.15) * x) for r, x in zip(ratio, a, strict=True)])
        g, old, v = batch["advantage"] + batch["value"], batch["value"], np.asarray(values, np.float64)[:, i]
        value = 0.5 * np.mean(np.maximum((v - g) ** 2, (old + np.clip(v - old, -0.15, 0.15) - g) ** 2))
        losses.append(actor + 0.7 * value - 0.3 * entropy)
        parts.append((actor, value, entropy, np.mean(np.abs(ratio - 1) > 0.15)))
    loss, info = agent.loss(agent.actor_critic.params, raw)
    np.testing.assert_allclose(loss, np.mean(losses) if share else np.sum(losses), rtol=1e-4)
    names = ("actor_loss", "value_loss", "entropy", "clipped")
    np.testing.assert_allclose([info[name] for name in names], np.mean(parts, axis=0), rtol=1e-4, atol=1e-5)
    params = agent.actor_critic.params
    slope = jax.jvp(lambda x: agent.loss(x, raw)[0], (params,), (jax.tree.map(jnp.ones_like, params),))[1]
    ends = [agent.loss(jax.tree.map(lambda x, h=h: x + h, params), raw)[0] for h in (-1e-3, 1e-3)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-3, rtol=0.01, atol=1e-3)  # no part of it is cut off


def test_agents_with_their_own_parameters_do_not_touch_each_other():
    """Agent 0's step is the clipped, annealed Adam on its own loss, whatever the other's gradient is."""
    config = make_config(num_epochs=3, num_minibatches=1, env_steps=128 * 2, max_grad_norm=0.05)
    agent = start(jax.random.key(0), probes.batch(Game()), config).agent
    batch = a_batch(agent, jnp.full((1, 2, 1), 0.4), Game().action_space)
    new, _ = jax.jit(ippo.Agent.update)(agent, batch, jax.random.key(1))
    gradient = jax.jit(jax.grad(agent.loss, has_aux=True))
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(optax.linear_schedule(config.lr, 0.0, 6), eps=1e-5))
    @functools.partial(jax.jit, static_argnums=3)
    def adam_step(params, state, grads, i):
        updates, state = tx.update(grads, state)
        return jax.tree.map(lambda param, update: param.at[i].add(update), params, updates), state

    for i in range(2):
        params = agent.actor_critic.params
        state = tx.init(of(params, i))
        for _ in range(3):
            grads = of(gradient(params, batch)[0], i)
            assert sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)) > 0.05**2
            params, state = adam_step(params, state, grads, i)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
                     of(new.actor_critic.params, i), of(params, i))


def of(params, i):
    return jax.tree.map(lambda x: x[i], params)


def test_values_are_learnt_in_units_of_the_returns_deviation():
    run, _ = train(Clocks(), make_config(discount=0.5, gae_lambda=0.5, normalize_reward=True))
    std = np.sqrt(run.reward_scale.stats.var)
    value = run.agent.actor_critic(jnp.ones((1, 2, 1)), method="critic")
    np.testing.assert_allclose(value * std[None], [[2.0, 4.0]], rtol=0.05)


def test_rewards_and_observations_have_their_own_statistics():
    config = make_config(normalize_reward=True, normalize_obs=True, discount=0.5, num_epochs=1, num_minibatches=1)
    run, info = train(Clocks(), config, iterations=30)
    std = np.sqrt(run.reward_scale.stats.var)
    assert run.reward_scale.stats.var.shape == (2,) and std[1] == pytest.approx(2 * std[0], rel=0.02)
    assert std[0] == pytest.approx(np.std([1, 1.5, 1.75]), abs=0.04)  # of discounted sums after one, two, three steps
    assert run.obs_stats.count > 29 * 128 and run.obs_stats.mean.shape == (2, 1)
    np.testing.assert_array_equal(info["clipped"], 0.0)  # of the first epoch: the policy saw what the loss sees
    obs = jnp.full((1, 2, 1), 5.0)
    stats = run.obs_stats.replace(mean=jnp.array([[3.0], [-3.0]]))
    greedy = run.agent.actor_critic(stats(obs), method="actor").logits
    moved = run._replace(obs_stats=stats)
    np.testing.assert_allclose(run.agent.actor_critic(ippo.normalize(moved, obs), method="actor").logits, greedy)
    inputs, apply = [], run.agent.actor_critic.apply_fn
    agent = run.agent.replace(actor_critic=run.agent.actor_critic.replace(
        apply_fn=lambda params, x, method: inputs.append(x) or apply(params, x, method=method)))
    ippo.act(moved._replace(agent=agent), (), obs, None)
    np.testing.assert_array_equal(inputs[0], stats(obs))


@BOTH
def test_seeds_under_vmap_match_seeds_alone(share):
    config, env = make_config(share_params=share), probes.batch(Targets())

    def params(key):
        init_key, key = jax.random.split(key)
        step = functools.partial(ippo.train_step, source=env, config=config)
        run = jax.lax.scan(step, ippo.init(init_key, env, config), jax.random.split(key, 3))[0]
        return run.agent.actor_critic.params

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(params))(keys), jax.jit(params)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5), together, alone)


def test_a_continuous_policy_is_in_units_of_its_box():
    """Each agent of its own box, where they differ."""
    env = Targets(action_space=Box(((-1.0,), (2.0,)), ((1.0,), (8.0,))))
    run = start(jax.random.key(0), probes.batch(env), make_config(init_std=0.4))
    dist = run.agent.actor_critic(run.obs, method="actor").distribution
    np.testing.assert_allclose(dist.scale[:, :, 0], [[0.4, 3 * 0.4]] * 8, rtol=1e-5)
    params = dict(run.agent.actor_critic.params)
    last, layer = max(params["policy"].items())
    half = dict(kernel=0 * layer["kernel"], bias=jnp.full_like(layer["bias"], 0.5))
    params["policy"] = params["policy"] | {last: half}
    mean = run.agent.actor_critic(run.obs, params=params, method="actor").distribution.loc
    np.testing.assert_allclose(mean[:, :, 0], [[0.5, 5 + 1.5]] * 8, rtol=1e-5)
    with jax.debug_key_reuse(False):
        action = env.action_space.sample(jax.random.key(1), (500, 2))
    assert action.shape == (500, 2, 1) and (np.abs(action[:, 0]) <= 1).all()
    assert action[:, 1].min() == pytest.approx(2, abs=0.1) and action[:, 1].max() == pytest.approx(8, abs=0.1)


def test_training_returns_are_of_each_agent():
    env, config = probes.batch(Game()), make_config()
    run = start(jax.random.key(0), env, config)
    after, info = ippo.train_step(run, jax.random.key(1), env, config)
    _, (obs, _, _, step) = ippo.rollout(run, jax.random.split(jax.random.key(1))[0], env, config)
    error = np.asarray(step.reward) - np.asarray(ippo.critic(run, obs))  # every step ends an episode
    explained = 1 - error.var((0, 1)) / np.asarray(step.reward).var((0, 1))  # of each agent
    np.testing.assert_allclose(info["explained_variance"], explained.mean(), rtol=1e-3)
    assert info["episode"]["return"].shape == (2,) and info["episode"]["count"] == 8 * 16
    assert len(set(np.asarray(info["episode"]["return"]))) == 2
    assert run.clock.env_steps == 0 and after.clock.env_steps == 8 * 16
    assert after.clock.updates == config.num_epochs * config.num_minibatches


def test_every_epoch_sees_every_moment_once():
    config = make_config(num_epochs=1, num_minibatches=4, lr=0.0)
    agent = start(jax.random.key(0), probes.batch(Game()), config).agent
    batch = a_batch(agent, jnp.full((1, 2, 1), 0.4), Game().action_space)
    _, info = jax.jit(ippo.Agent.update)(agent, batch, jax.random.key(1))
    _, whole = agent.loss(agent.actor_critic.params, batch)
    np.testing.assert_allclose(info["value_loss"], whole["value_loss"], rtol=1e-5)
    np.testing.assert_allclose(info["clipped"], whole["clipped"], rtol=1e-5)


def test_train_step_is_traced_once():
    config, env, traces = make_config(), probes.batch(Clocks()), []

    @jax.jit
    def step(run, key):
        traces.append(1)
        return ippo.train_step(run, key, env, config)

    run = start(jax.random.key(0), env, config)
    for i in range(3):
        run, _ = step(run, jax.random.key(i))
    assert len(traces) == 1
