import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import pets
from core.envs import Batch, Box, TimeStep
from core.errors import UserError

PETS, PLANNING = "algorithms/pets.py", "core/planning.py"
LOSS, COST, EPISODE, STEP, FIT, LOST = (
    "test_loss_is_the_equation", "test_particles_keep_or_change_their_member", "test_an_episode_is_what_happened",
    "test_a_step_fits_then_plays_then_is_tested_then_remembers", "test_a_fit_learns_mean_and_noise",
    "test_plans_that_leave_the_data_are_worth_nothing")
PLANTED_ERRORS = {  # and the test that has to notice
    "sign of the log-variance": (PETS, "jnp.exp(-log_var) + log_var", "jnp.exp(log_var) + log_var", LOSS),
    "no reward for certainty": (PETS, "jnp.exp(-log_var) + log_var)", "jnp.exp(-log_var))", LOSS),
    "mean over members": (PETS, ".sum(-1).mean(-1).sum()", ".sum(-1).mean(-1).mean()", LOSS),
    "bounds pushed apart": (PETS, 'params["max_log_var"] - params["min_log_var"]',
                            'params["min_log_var"] - params["max_log_var"]', LOSS),
    "biases decay": (PETS, 'name.startswith("weight")', 'name.startswith(("weight", "bias"))', LOSS),
    "log-variance unbounded above": (PETS, "highest - nn.softplus(highest - log_var)", "log_var", LOSS),
    "log-variance unbounded below": (PETS, "lowest + nn.softplus(log_var - lowest)", "log_var", LOSS),
    "predicts the next state": (PETS, "next_x = x + mean + ", "next_x = mean + ", COST),
    "members see each other's particles": (PETS, ".reshape(B, P // B * N, -1)",
                                           ".reshape(P // B * N, B, -1).swapaxes(0, 1)",
                                           "test_expected_cost_is_the_equation"),
    "TS1 is TSinf": (PETS, 'config.propagation == "ts1"', 'config.propagation == "ts2"', COST),
    "TSinf is TS1": (PETS, 'config.propagation == "ts1"', 'config.propagation != "ts2"', COST),
    "dealt with replacement": (PETS, "jnp.argsort(jax.random.uniform(deal_key, (H, P)), axis=1)",
                               "jax.random.randint(deal_key, (H, P), 0, P)", COST),
    "particles without noise": (PETS, "jnp.exp(0.5 * log_var) * noise", "0 * noise", COST),
    "variance for a deviation": (PETS, "jnp.exp(0.5 * log_var) * noise", "jnp.exp(log_var) * noise", COST),
    "best particle for the mean": (PETS, "jnp.where(lost, jnp.inf, total).mean(axis=0)",
                                   "jnp.where(lost, jnp.inf, total).min(axis=0)", COST),
    "cost of the state before": (PETS, "(env.env.cost))(x, action, next_x)", "(env.env.cost))(x, action, x)", COST),
    "terminal cost forgotten": (PETS, "total = total + jax.vmap(jax.vmap(env.env.terminal_cost))(x)", "", COST),
    "diverging plans count": (PETS, "jnp.where(lost, jnp.inf, total)", "total", LOST),
    "NaN is the best cost": (PLANNING, "jnp.where(jnp.isfinite(costs), costs, jnp.inf)",
                             "jnp.where(jnp.isfinite(costs), costs, -jnp.inf)", LOST),
    "elites by argmax": (PLANNING, "lax.top_k(-costs, num_elites)", "lax.top_k(costs, num_elites)",
                         "test_it_learns_to_stand_at_its_goal"),
    "one bootstrap for all": (PETS, "jax.random.randint(key, (num_members, len(happened)), 0, count)",
                              "jax.random.randint(key, (1, len(happened)), 0, count)",
                              "test_a_bootstrap_is_drawn_once_from_its_own_episode"),
    "bootstrap of the first rows": (PETS, "drawn = memory.size + jax", "drawn = jax",
                                    "test_a_bootstrap_is_drawn_once_from_its_own_episode"),
    "bootstrap ignored": (PETS, "row = jnp.take_along_axis(memory.bootstrap, slot, axis=1)", "row = slot",
                          "test_a_fit_keeps_to_each_members_bootstrap"),
    "standardised to empty rows": (PETS, "memory.z.mean(0, where=known)", "memory.z.mean(0)", FIT),
    "tiny spread": (PETS, "jnp.where(spread < 1e-6, 1.0, spread)", "spread", FIT),
    "inputs not standardised": (PETS, "return self.dynamics(self.standardise(z), params=params)",
                                "return self.dynamics(z, params=params)", LOSS),
    "transitions across resets": (PETS, "step.next_obs - obs, alive", "step.obs - obs, alive", EPISODE),
    "what happened after the end": (PETS, "row = jnp.where(happened, ", "row = jnp.where(True, ",
                                    "test_a_bootstrap_is_drawn_once_from_its_own_episode"),
    "alive after the end": (PETS, "alive & ~ended(step), env_state", "alive, env_state", EPISODE),
    "reward after the end": (PETS, "jnp.where(alive, step.reward, 0.0)", "step.reward", EPISODE),
    "stale plan": (PETS, "plan, action = choose(plan, obs", "_, action = choose(plan, obs",
                   "test_plans_are_carried_through_an_episode_and_not_beyond"),
    "random steps across resets": (PETS, "(inputs(obs, action, env), step.next_obs - obs)",
                                   "(inputs(obs, action, env), step.obs - obs)",
                                   "test_random_steps_go_on_after_an_end"),
    "fit on the test data": (PETS, "agent, info = run.agent.fit(fit_key, run.memory, config)\n",
                             "agent, info = run.agent.fit(fit_key, run.memory._replace(size=run.memory.size + 2), "
                             "config)\n", STEP),
    "tested before it is fitted": (PETS, "best, examine(agent, *episode)", "best, examine(run.agent, *episode)", STEP),
    "weights start afresh": (PETS, "jax.lax.scan(update, self.dynamics, ",
                             "jax.lax.scan(update, jax.tree.map(jnp.zeros_like, self.dynamics), ",
                             "test_a_fit_starts_from_the_weights_so_far"),
    "members agree to disagree": (PETS, "jnp.exp(log_var).mean(0) + mean.var(0)", "jnp.exp(log_var).mean(0)",
                                  "test_the_test_is_of_the_mixture"),
    "68% for 95%": (PETS, "1.96**2 * var", "1.0 * var", "test_the_test_is_of_the_mixture"),
    "score of all episodes": (PETS, "jnp.append(run.returns[1:], total.mean())",
                              "jnp.append(run.returns[:-1], total.mean())", STEP),
}


class Line(NamedTuple):
    """A point moved by its action; the cost is its distance from 1. `end` steps, and one more if it starts above 0."""

    end: int = 100
    max_steps: int = 5
    action_space: Box = Box((-1.0,), (1.0,))

    def reset(self, key):
        x = jax.random.uniform(key, (1,), minval=-0.1, maxval=0.1)
        return (x, jnp.where(x[0] > 0, self.end + 1, self.end), jnp.int32(0)), x

    def step(self, key, state, action):
        x, end, t = state[0] + 0.5 * action, state[1], state[2] + 1
        reward = -self.cost(state[0], action, x)
        return (x, end, t), TimeStep(x, x, reward, t >= end, (t >= self.max_steps) & (t < end), {})

    def cost(self, x, action, next_x):
        return jnp.square(next_x[0] - 1)

    def terminal_cost(self, x):
        return 10 * x[0]


SMALL = dict(num_steps=5, env_steps=10, random_steps=8, hidden=(8,), num_members=2, num_particles=4, num_updates=3,
             horizon=3, num_samples=8, num_elites=3, num_iterations=1, kept_elites=1, score_episodes=2)


def make(env=None, num_envs=1, **changes):
    config = pets.get_config()
    config.update(SMALL | changes)
    return Batch(env or Line(), num_envs), ml_collections.FrozenConfigDict(config)


def an_agent(env, config, seed=0):
    """With weights, biases and bounds that are all different, and a scale that is not one."""
    key, x = jax.random.key(seed), jnp.zeros(1)
    agent = pets.Agent.create(key, pets.inputs(x, x, env), x, config)
    leaves, treedef = jax.tree.flatten(agent.dynamics.params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    dynamics = agent.dynamics.replace(params=treedef.unflatten(leaves))
    return agent.replace(dynamics=dynamics, centre=jnp.array([0.1, -0.2]), spread=jnp.array([0.5, 2.0]))


def constant(agent, change, log_var):
    """The agent whose member b always predicts change[b], with the log-variance wanted."""
    params = jax.tree.map(jnp.zeros_like, agent.dynamics.params)
    last = max(name for name in params if name.startswith("bias"))
    params[last] = jnp.stack([jnp.array([[c, log_var]]) for c in change])
    bounds = dict(max_log_var=jnp.full((1, 1, 1), 1e3), min_log_var=jnp.full((1, 1, 1), -1e3))
    return agent.replace(dynamics=agent.dynamics.replace(params=params | bounds))


def softplus(x):
    return np.logaddexp(x, 0)


def network(params, b, z):
    """Member b by itself, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = z @ params["weight_0"][b] + params["bias_0"][b]
    out = hidden / (1 + np.exp(-hidden)) @ params["weight_1"][b] + params["bias_1"][b]
    mean, log_var = out[:, :1], out[:, 1:]
    high, low = params["max_log_var"][0], params["min_log_var"][0]
    log_var = high - softplus(high - log_var)
    return mean, low + softplus(log_var - low)


def test_loss_is_the_equation():
    env, config = make(weight_decay=0.1)
    agent = an_agent(env, config)
    params = dict(agent.dynamics.params)
    params["weight_1"] = 5 * params["weight_1"]
    params["min_log_var"] += 9  # so that both bounds matter
    z, change = jax.random.normal(jax.random.key(1), (2, 6, 2)), jax.random.normal(jax.random.key(2), (2, 6, 1))
    loss, info = jax.jit(agent.loss, static_argnums=3)(params, z, change, config)
    nll = 0.0
    for b in range(2):
        scaled = (np.asarray(z[b], np.float64) - np.asarray(agent.centre)) / np.asarray(agent.spread)
        mean, s = network(params, b, scaled)
        nll += (((mean - np.asarray(change[b])) ** 2 * np.exp(-s) + s).sum(-1)).mean()
    bounds = 0.01 * (np.asarray(params["max_log_var"]) - np.asarray(params["min_log_var"])).sum()
    decay = 0.05 * sum(np.square(np.asarray(params[f"weight_{i}"], np.float64)).sum() for i in range(2))
    np.testing.assert_allclose(info["loss"], nll, rtol=1e-4)
    np.testing.assert_allclose(loss - info["loss"], bounds + decay, rtol=1e-3)


def test_a_fit_learns_mean_and_noise():
    """Of a change with a known mean and a noise that grows with x; a third input never varies."""
    env, config = make(num_members=3, hidden=(32, 32), num_updates=1500, batch_size=64)
    key = jax.random.key(0)

    def data(key, n):
        x_key, noise_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (n, 1), minval=-1.0, maxval=1.0)
        std = 0.05 + 0.2 * jnp.square(x)
        z = jnp.concatenate([1000 * x, jnp.full((n, 1), 7.0)], axis=1)  # far from standard
        return z, jnp.sin(3 * x) + std * jax.random.normal(noise_key, (n, 1)), std

    agent_key, data_key, test_key, store_key, fit_key = jax.random.split(key, 5)
    z, change, _ = data(data_key, 1000)
    memory = pets.Memory(jnp.zeros((1500, 2)), jnp.zeros((1500, 1)), jnp.zeros((3, 1500), jnp.int32), jnp.int32(0))
    memory = pets.remember(store_key, memory, z, change, jnp.ones(1000, bool))
    agent = pets.Agent.create(agent_key, z[0], change[0], config)
    agent, _ = jax.jit(pets.Agent.fit, static_argnums=3)(agent, fit_key, memory, config)
    np.testing.assert_allclose(agent.centre, np.mean(z, 0), rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(agent.spread, [np.std(z[:, 0]), 1.0], rtol=1e-3)
    z, change, std = data(test_key, 4000)
    mean, log_var = agent.predict(jnp.broadcast_to(z, (3, *z.shape)))
    assert np.abs(mean.mean(0) - jnp.sin(3e-3 * z[:, :1])).mean() < 0.02
    np.testing.assert_allclose(np.sqrt(np.exp(log_var).mean(0)).mean(), std.mean(), rtol=0.15)
    quiet = np.abs(z[:, 0]) < 300
    assert np.exp(0.5 * log_var)[:, quiet].mean() < 0.5 * np.exp(0.5 * log_var)[:, ~quiet].mean()
    coverage = pets.examine(agent, z, change, jnp.ones(4000, bool))["coverage"]
    assert 0.85 < coverage < 0.98


def test_a_fit_keeps_to_each_members_bootstrap():
    """Two members, two transitions that contradict each other, one for each."""
    env, config = make(num_updates=600, hidden=(8,), lr=1e-2)
    memory = pets.Memory(jnp.zeros((4, 2)), jnp.array([[1.0], [-1.0], [9.0], [9.0]]),
                         jnp.array([[0, 0, 2, 2], [1, 1, 2, 2]]), jnp.int32(2))
    agent = an_agent(env, config)
    agent, _ = jax.jit(pets.Agent.fit, static_argnums=3)(agent, jax.random.key(0), memory, config)
    mean, _ = agent.predict(jnp.zeros((2, 1, 2)))
    np.testing.assert_allclose(mean[:, 0, 0], [1.0, -1.0], atol=0.1)


def test_a_fit_starts_from_the_weights_so_far():
    env, config = make(num_updates=1, lr=1e-6)
    agent = an_agent(env, config)
    memory = pets.Memory(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.zeros((2, 2), jnp.int32), jnp.int32(2))
    fitted, _ = jax.jit(pets.Agent.fit, static_argnums=3)(agent, jax.random.key(0), memory, config)
    for before, after in zip(*map(jax.tree.leaves, (agent.dynamics.params, fitted.dynamics.params)), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-5)


def test_a_bootstrap_is_drawn_once_from_its_own_episode():
    memory = pets.Memory(jnp.zeros((200, 1)), jnp.zeros((200, 1)), jnp.zeros((3, 200), jnp.int32), jnp.int32(0))
    happened = jnp.arange(120) % 4 != 3
    first = pets.remember(jax.random.key(0), memory, jnp.arange(120.0)[:, None], jnp.ones((120, 1)), happened)
    both = pets.remember(jax.random.key(1), first, 1000 + jnp.arange(120.0)[:, None], jnp.ones((120, 1)), happened)
    assert (first.size, both.size) == (90, 180)
    np.testing.assert_array_equal(both.z[:90, 0], np.arange(120)[happened])
    np.testing.assert_array_equal(both.z[90:180, 0], 1000 + np.arange(120)[happened])
    np.testing.assert_array_equal(both.z[180:], 0)
    np.testing.assert_array_equal(first.bootstrap[:, :90], both.bootstrap[:, :90])
    for rows, low in ((both.bootstrap[:, :90], 0), (both.bootstrap[:, 90:180], 90)):
        assert rows.min() >= low and rows.max() < low + 90
        assert all(0.55 < len(set(row.tolist())) / 90 < 0.72 for row in rows)  # 1 − 1/e of them, on average
        assert not np.array_equal(rows[0], rows[1])


def test_expected_cost_is_the_equation():
    """Against a loop over plans, particles and steps in float64."""
    env, config = make()
    agent, B, P, N, H = an_agent(env, config), 2, 4, 3, 3
    actions = jax.random.uniform(jax.random.key(1), (H, N, 1), minval=-1.0)
    noise, deals = chance = pets.draw(jax.random.key(2), jnp.zeros(1), config)
    costs = pets.expected_cost(actions, jnp.full(1, 0.3), chance, agent, env, config)
    expected = np.zeros((P, N))
    for p, n in np.ndindex(P, N):
        x = 0.3
        for t in range(H):
            z = (np.array([[x, actions[t, n, 0]]], np.float64) - np.asarray(agent.centre)) / np.asarray(agent.spread)
            mean, s = network(agent.dynamics.params, p // (P // B), z)
            x += mean.item() + np.exp(s.item() / 2) * float(noise[t, p, 0, 0])
            expected[p, n] += (x - 1) ** 2
        expected[p, n] += 10 * x
    np.testing.assert_allclose(costs, expected.mean(0), rtol=1e-4)
    assert noise.shape == (H, P, 1, 1) and all(sorted(deal.tolist()) == [0, 1, 2, 3] for deal in deals)


@pytest.mark.parametrize("propagation", ["tsinf", "ts1"])
def test_particles_keep_or_change_their_member(propagation):
    """Members that always add 1, and 3. What is dealt sums to the same, but spreads less and less far."""
    env, config = make(propagation=propagation, num_particles=8, num_members=2)
    agent = constant(an_agent(env, config), [1.0, 3.0], -1e2)
    actions = jnp.zeros((3, 2, 1))

    def costs_of(keys, actions, x, agent):
        def cost(key):
            return pets.expected_cost(actions, x, pets.draw(key, x, config), agent, env, config)

        with jax.debug_key_reuse(False):  # it misfires under vmap
            return jax.jit(jax.vmap(cost))(keys)

    keys = jax.random.split(jax.random.key(0), 300)
    costs = costs_of(keys, actions, jnp.zeros(1), agent)
    end = 10 * 3 * 2  # terminal cost of the mean, which is 2 a step
    keeps = np.mean([sum((t * change - 1) ** 2 for t in (1, 2, 3)) for change in (1, 3)]) + end
    deals = sum((2 * t - 1) ** 2 + t for t in (1, 2, 3)) + end  # the variance of a member's change is 1
    np.testing.assert_allclose(costs[:, 0], costs[:, 1], rtol=1e-5)
    np.testing.assert_allclose(costs.mean(), keeps if propagation == "tsinf" else deals, rtol=0.01)
    if propagation == "tsinf":
        np.testing.assert_allclose(costs, keeps, rtol=1e-5)
    _, config = make(propagation=propagation, num_particles=8, num_members=2, horizon=1)
    one = costs_of(keys[:4], actions[:1], jnp.zeros(1), agent)
    np.testing.assert_allclose(one, (0 + 4) / 2 + 20, rtol=1e-5)  # exactly P / B each
    noisy = constant(an_agent(env, config), [0.0, 0.0], np.log(0.25))
    costs = costs_of(jax.random.split(jax.random.key(1), 2000), actions[:1], jnp.ones(1), noisy)
    np.testing.assert_allclose(costs.mean(), 0.25 + 10, rtol=0.01)


def test_plans_that_leave_the_data_are_worth_nothing():
    """A model that believes whoever pushes right to fly off, or to break, for a huge reward; left is worth little."""
    class Greedy(Line):
        def cost(self, x, action, next_x):
            return -jnp.abs(next_x[0])

        def terminal_cost(self, x):
            return jnp.zeros(())

    for broken, search_key in ((1e3, jax.random.key(1)), (1e38, jax.random.key(2))):
        env, config = make(Greedy(), num_samples=64, num_elites=8, num_iterations=3, hidden=(2,))
        agent = constant(an_agent(env, config), [0.0, 0.0], -1e2)
        params = dict(agent.dynamics.params)
        # hidden unit 0 is max(u, 0), about, and unit 1 max(−u, 0)
        params["weight_0"] = jnp.stack([jnp.array([[0.0, 0.0], [200.0, -200.0]])] * 2)
        params["weight_1"] = jnp.stack([jnp.array([[broken, 0.0], [0.01, 0.0]])] * 2)
        agent = agent.replace(dynamics=agent.dynamics.replace(params=params), centre=jnp.zeros(2), spread=jnp.ones(2))
        x, chance = jnp.zeros(1), pets.draw(jax.random.key(0), jnp.zeros(1), config)
        cost = functools.partial(pets.expected_cost, x=x, chance=chance, agent=agent, env=env, config=config)
        right, left = cost(jnp.stack([jnp.ones((3, 1)), -jnp.ones((3, 1))], axis=1))
        assert not np.isfinite(right) and -100 < left < 0
        plan = pets.planning.initial_carry(*env.action_space.bounds, 3, 1)
        decide = jax.jit(functools.partial(pets.decide, agent=agent, env=env, config=config))
        _, action = decide(plan, jnp.zeros(1), search_key)
        assert action < -0.5


def test_an_episode_is_what_happened():
    """Three at once, which end after three or four steps, before the time limit."""
    env, config = make(Line(end=3), num_envs=3)
    agent = an_agent(env, config)
    play = jax.jit(functools.partial(pets.play, env=env, config=config))
    (z, change, happened), total = play(agent, jax.random.key(1))
    z, change, happened = z.reshape(5, 3, 2), change.reshape(5, 3), happened.reshape(5, 3)
    lengths = np.where(z[0, :, 0] > 0, 4, 3)
    assert len(set(lengths.tolist())) == 2
    np.testing.assert_array_equal(happened, np.arange(5)[:, None] < lengths)
    for e, length in enumerate(lengths):
        x, action, moved = z[:length, e, 0], z[:length, e, 1], change[:length, e]
        np.testing.assert_allclose(moved, 0.5 * action, atol=1e-6)
        np.testing.assert_allclose(x[1:], x[:-1] + moved[:-1], atol=1e-6)
        np.testing.assert_allclose(total[e], -np.square(x + moved - 1).sum(), rtol=1e-5)


def test_plans_are_carried_through_an_episode_and_not_beyond():
    """Whatever was learnt, the first search of an episode starts from the middle of the box, the next ones do not."""
    env, config = make(num_steps=3)
    agent, seen = an_agent(env, config), []

    def decide(plan, x, key, **_):
        return plan._replace(mean=plan.mean + 1), plan.mean[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pets, "decide", decide)
        for seed in (0, 1):
            (z, _, _), _ = jax.jit(functools.partial(pets.play, env=env, config=config))(agent, jax.random.key(seed))
            seen.append(z[:, 1])
    np.testing.assert_array_equal(seen, [[0, 1, 2], [0, 1, 2]])


def test_random_steps_go_on_after_an_end():
    env, config = make(Line(end=3), num_envs=2, random_steps=16)
    z, change = jax.jit(functools.partial(pets.wander, env=env, config=config))(jax.random.key(0))
    assert len(z) == 16
    np.testing.assert_allclose(change, 0.5 * z[:, 1:], atol=1e-6)
    assert len(set(z[:, 1].tolist())) == 16 and np.abs(z[:, 1]).max() <= 1


def test_a_step_fits_then_plays_then_is_tested_then_remembers():
    env, config = make()
    init_key, key = jax.random.split(jax.random.key(0))
    run = jax.jit(functools.partial(pets.init, env=env, config=config))(init_key)
    step = jax.jit(functools.partial(pets.train_step, env=env, config=config))
    assert run.memory.size == 8 and np.isnan(pets.measure(run, None, env, config)["return"])
    totals = []
    for step_key in jax.random.split(key, 2):
        before = run
        run, _ = step(before, step_key)
        old, new = np.asarray(before.memory.z[:before.memory.size]), slice(int(before.memory.size), None)
        np.testing.assert_allclose(run.agent.centre, old.mean(0), rtol=1e-4, atol=1e-5)
        episode = run.memory.z[new][:5], run.memory.change[new][:5], jnp.ones(5, bool)
        for name, value in pets.examine(run.agent, *episode).items():
            np.testing.assert_allclose(run.test[name], value, rtol=1e-4)
        totals.append(-np.square(episode[0][:, 0] + episode[1][:, 0] - 1).sum())
        scores = pets.measure(run, None, env, config)
        np.testing.assert_allclose(scores["return"], np.mean(totals), rtol=1e-5)
        np.testing.assert_allclose(scores["episode_return"], totals[-1], rtol=1e-5)
        np.testing.assert_allclose(scores["best_return"], max(totals), rtol=1e-5)
    assert run.memory.size == 18 == len(run.memory.z)


def test_the_test_is_of_the_mixture():
    """Members that say 0 and 2, each with variance 1: together 1, with variance 2."""
    env, config = make()
    agent = constant(an_agent(env, config), [0.0, 2.0], 0.0)
    change = jnp.array([[1.0], [1 + 2.7], [1 + 2.8], [1e6]])
    test = pets.examine(agent, jnp.zeros((4, 2)), change, jnp.arange(4) < 3)
    error = np.array([0.0, 2.7, 2.8])
    np.testing.assert_allclose(test["error"], np.sqrt(np.mean(error**2)), rtol=1e-5)
    np.testing.assert_allclose(test["nll"], np.mean(error**2 / 4 + 0.5 * np.log(4 * np.pi)), rtol=1e-5)
    np.testing.assert_allclose(test["coverage"], 2 / 3, rtol=1e-5)  # 1.96 √2 = 2.77


@pytest.mark.parametrize("planner", ["icem", "cem"])
def test_it_learns_to_stand_at_its_goal(planner):
    """Knowing nothing but the cost: from 0, half a step at a time, the least possible cost is 0.25 and then nothing."""
    class Goal(Line):
        def terminal_cost(self, x):
            return jnp.zeros(())

    env, config = make(Goal(), planner=planner, num_updates=400, num_samples=64, num_elites=8, num_iterations=4,
                       random_steps=40, hidden=(16,), lr=3e-3)
    init_key, key = jax.random.split(jax.random.key(0))
    run = jax.jit(functools.partial(pets.init, env=env, config=config))(init_key)
    step = jax.jit(functools.partial(pets.train_step, env=env, config=config))
    for step_key in jax.random.split(key, 2):
        run, _ = step(run, step_key)
    assert pets.measure(run, None, env, config)["episode_return"] > -0.4
    assert run.test["error"] < 0.05


def test_seeds_under_vmap_match_seeds_alone():
    env, config = make()

    def learnt(key):
        init_key, key = jax.random.split(key)
        run = pets.init(init_key, env, config)
        run, _ = pets.train_step(run, key, env, config)
        return run.memory.z, pets.measure(run, None, env, config)

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(learnt))(keys), jax.jit(learnt)(keys[1])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes, culprit", [
    (dict(propagation="ts2"), 'propagation = "ts2" is none of ts1, tsinf'),
    (dict(planner="mppi"), 'planner = "mppi"'),
    (dict(num_particles=3), "num_particles = 3 is no multiple of num_members = 2")])
def test_wrong_settings_are_named(changes, culprit):
    env, config = make(**changes)
    with pytest.raises(UserError, match=culprit):
        pets.init(jax.random.key(0), env, config)
