"""PETS against its equations by hand, on a line whose best actions are known."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import pets
from configs import pets_paper
from core import planning
from core.dataset import ReplayBuffer
from core.envs import Batch, Box, TimeStep, make_env, repeat
from core.errors import UserError
from core.evaluation import evaluate

PETS, PLANNING = "algorithms/pets.py", "core/planning.py"
LOSS, EQUATION, COST, PLAY, STEP, FIT, LOST, BOOTSTRAP, MIXTURE, PLAN, ACT = (
    "test_loss_is_the_equation", "test_expected_cost_is_the_equation", "test_particles_keep_or_change_their_member",
    "test_what_is_remembered_is_what_happened", "test_a_step_fits_then_plays_then_is_tested_then_remembers",
    "test_a_fit_learns_mean_and_noise", "test_a_plan_with_a_lost_particle_has_infinite_cost",
    "test_a_bootstrap_is_drawn_once_from_the_new_transitions", "test_the_test_is_of_the_mixture",
    "test_the_planner_is_what_the_config_says", "test_environments_act_by_chances_of_their_own")
PLANTED_ERRORS = {  # and the test that has to notice
    "sign of the log-variance": (PETS, "jnp.exp(-log_var) + log_var", "jnp.exp(log_var) + log_var", LOSS),
    "no reward for certainty": (PETS, "jnp.exp(-log_var) + log_var)", "jnp.exp(-log_var))", LOSS),
    "mean over members": (PETS, ".sum(-1).mean(-1).sum()", ".sum(-1).mean(-1).mean()", LOSS),
    "bounds pushed apart": (PETS, 'params["max_log_var"] - params["min_log_var"]',
                            'params["min_log_var"] - params["max_log_var"]', LOSS),
    "bound_coef forgotten": (PETS, "self.config.bound_coef * ", "0.01 * ", LOSS),
    "no gradient through the bounds": (PETS, "return nll + bounds +", "return nll + jax.lax.stop_gradient(bounds) +",
                                       LOSS),
    "weight_decay forgotten": (PETS, "self.config.weight_decay * decay", "2.5e-4 * decay", LOSS),
    "biases decay": (PETS, 'name.startswith("weight")', 'name.startswith(("weight", "bias"))', LOSS),
    "log-variance unbounded above": (PETS, "high - nn.softplus(high - log_var)", "log_var", LOSS),
    "log-variance unbounded below": (PETS, "low + nn.softplus(log_var - low)", "log_var", LOSS),
    "inputs not standardised": (PETS, "return self.dynamics(self.standardise(z), params=params)",
                                "return self.dynamics(z, params=params)", LOSS),
    "bounds start elsewhere": (PETS, "config.hidden_dims, x.size, config.log_var_bounds)",
                               "config.hidden_dims, x.size, (-10.0, 0.5))",
                               "test_the_network_starts_as_the_config_says"),
    "predicts the next state": (PETS, "next_x = x + mean + ", "next_x = mean + ", COST),
    "members move each other's particles": (PETS, ".reshape(B, P // B * N, -1)",
                                            ".reshape(P // B * N, B, -1).swapaxes(0, 1)", EQUATION),
    "TS1 is TSinf": (PETS, 'config.propagation == "ts1"', 'config.propagation == "ts2"', COST),
    "TSinf is TS1": (PETS, 'config.propagation == "ts1"', 'config.propagation != "ts2"', COST),
    "dealt with replacement": (PETS, "jnp.argsort(jax.random.uniform(deal_key, (H, P)), axis=1)",
                               "jax.random.randint(deal_key, (H, P), 0, P)", EQUATION),
    "one permutation": (PETS, "jax.random.uniform(deal_key, (H, P))",
                        "jnp.tile(jax.random.uniform(deal_key, (1, P)), (H, 1))", EQUATION),
    "particles without noise": (PETS, "jnp.exp(0.5 * log_var) * noise", "0 * noise", COST),
    "variance for a deviation": (PETS, "jnp.exp(0.5 * log_var) * noise", "jnp.exp(log_var) * noise", COST),
    "best particle for the mean": (PETS, "jnp.where(lost, jnp.inf, total).mean(axis=0)",
                                   "jnp.where(lost, jnp.inf, total).min(axis=0)", COST),
    "cost of the state before": (PETS, "(self.env.cost))(x, action, next_x)", "(self.env.cost))(x, action, x)", COST),
    "terminal cost forgotten": (PETS, "total = total + jax.vmap(jax.vmap(self.env.terminal_cost))(x)", "", COST),
    "diverging plans count": (PETS, "jnp.where(lost, jnp.inf, total)", "total", LOST),
    "far forgotten": (PETS, "< self.config.far", "< 100", LOST),
    "lost for one step": (PETS, "lost = lost | ~", "lost = ~", LOST),
    "NaN is the best cost": (PLANNING, "jnp.where(jnp.isfinite(costs), costs, jnp.inf)",
                             "jnp.where(jnp.isfinite(costs), costs, -jnp.inf)", LOST),
    "elites by argmax": (PLANNING, "lax.top_k(-costs, num_elites)", "lax.top_k(costs, num_elites)",
                         "test_it_learns_to_stand_at_its_goal"),
    "one bootstrap for all": (PETS, "jax.random.randint(key, (len(z), num_members), 0, len(z))",
                              "jax.random.randint(key, (len(z), 1), 0, len(z)).repeat(num_members, 1)", BOOTSTRAP),
    "bootstrap of the first rows": (PETS, "rows = memory.size + jax", "rows = jax", BOOTSTRAP),
    "bootstrap ignored": (PETS, 'row = memory.data["bootstrap"][slot, jnp.arange(self.config.num_members)[:, None]]',
                          "row = slot", "test_a_fit_keeps_to_each_members_bootstrap"),
    "bootstrap of another member": (PETS, "[slot, jnp.arange(self.config.num_members)[:, None]]", "[slot, 0]",
                                    "test_a_fit_keeps_to_each_members_bootstrap"),
    "standardised to empty rows": (PETS, 'statistic(memory.data["z"], axis=0, where=filled)',
                                   'statistic(memory.data["z"], axis=0)', FIT),
    "tiny spread": (PETS, "jnp.where(spread < self.config.min_std, 1.0, spread)", "spread", FIT),
    "min_std forgotten": (PETS, "spread < self.config.min_std", "spread < 1e-6", FIT),
    "transitions across resets": (PETS, "step.next_obs - run.obs", "step.obs - run.obs", PLAY),
    "action of nobody": (PETS, "inputs(source.env, run.obs, action), s", "inputs(source.env, run.obs, 0 * action), s",
                         PLAY),
    "plans of the last episode": (PETS, "restart(ended(step), initial_carry(run, source.num_envs), carry)", "carry",
                                  PLAY),
    "a fresh plan at every step": (PETS, "restart(ended(step), initial", "restart(ended(step) | True, initial", PLAY),
    "plans forgotten": (PETS, "carry, action = policy(run, run.carry, run.obs, act_key)",
                        "carry, action = run.carry, policy(run, run.carry, run.obs, act_key)[1]", PLAY),
    "fit on the test data": (PETS, "agent, info = run.agent.fit(fit_key, run.memory)\n",
                             "agent, info = run.agent.fit(fit_key, run.memory.replace(size=run.memory.size + 2))\n",
                             STEP),
    "plays before it is fitted": (PETS, "play(run._replace(agent=agent), play_key", "play(run, play_key", STEP),
    "random steps are free": (PETS, "Clock.start(steps * source.num_envs)", "Clock.start(0)", STEP),
    "updates are not counted": (PETS, "updates=config.num_updates", "updates=1", STEP),
    "num_updates forgotten": (PETS, "jax.random.split(key, self.config.num_updates)", "jax.random.split(key, 3)", FIT),
    "weights start afresh": (PETS, "jax.lax.scan(update, self.dynamics, ",
                             "jax.lax.scan(update, jax.tree.map(jnp.zeros_like, self.dynamics), ",
                             "test_a_fit_starts_from_the_weights_so_far"),
    "members agree to disagree": (PETS, "jnp.exp(log_var).mean(0) + mean.var(0)", "jnp.exp(log_var).mean(0)", MIXTURE),
    "68% for 95%": (PETS, "1.96**2 * var", "1.0 * var", MIXTURE),
    "the cheapest sample": (PETS, 'return_mode="mean"', 'return_mode="best"', PLAN),
    "always iCEM": (PETS, 'if self.config.search == "icem" else', 'if self.config.search != "ice" else', PLAN),
    "kept_elites forgotten": (PETS, "config.horizon, config.kept_elites)", "config.horizon, 3)", PLAN),
    "chances shared with the search": (PETS, "self.chance(chance_key, x)", "self.chance(search_key, x)", PLAN),
    "one key for all environments": (PETS, "jax.random.split(key, len(obs))",
                                     "jnp.broadcast_to(key, (len(obs),))", ACT),
    "the bounds of nobody": (PETS, "*self.env.action_space.bounds, **self", "-jnp.ones(1), jnp.ones(1), **self", PLAN),
}


class Line(NamedTuple):
    """A point moved by its action; the cost is its distance from 1, and its effort. An episode ends after `end` steps,
    or one more if it starts above 0."""

    end: int = 100
    max_steps: int = 5
    goal: float = 1.0
    final: float = 10.0
    action_space: Box = Box((-1.0,), (1.5,))

    def reset(self, key):
        x = jax.random.uniform(key, (1,), minval=-0.1, maxval=0.1)
        return (x, jnp.where(x[0] > 0, self.end + 1, self.end), jnp.int32(0)), x

    def step(self, key, state, action):
        x, end, t = state[0] + 0.5 * action, state[1], state[2] + 1
        reward = -self.cost(state[0], action, x)
        return (x, end, t), TimeStep(x, x, reward, t >= end, (t >= self.max_steps) & (t < end), {})

    def cost(self, x, action, next_x):
        return jnp.square(next_x[0] - self.goal) + 0.1 * jnp.square(action[0])

    def terminal_cost(self, x):
        return self.final * x[0]


SMALL = dict(num_steps=5, env_steps=18, random_steps=8, hidden_dims=(8,), num_members=2, num_particles=4, num_updates=4,
             horizon=3, kept_elites=1, planner=dict(num_samples=8, num_elites=3, num_iterations=1))


def make(env=None, num_envs=1, **changes):
    config = pets.get_config()
    config.update(SMALL | changes)
    if config.search == "cem":
        config.planner = {k: config.planner[k] for k in ("num_samples", "num_elites", "num_iterations", "momentum")}
    return Batch(env or Line(), num_envs), ml_collections.FrozenConfigDict(config)


def an_agent(env, config, seed=0):
    """With weights, biases and bounds that are all different, and a scale that is not one."""
    key, x = jax.random.key(seed), jnp.zeros(1)
    agent = pets.Agent.create(key, env.env, jnp.zeros(2), x, config)
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


def memory_of(capacity, z=None, change=None, bootstrap=None, num_members=2):
    """Empty, or of these rows."""
    example = dict(z=jnp.zeros(2), change=jnp.zeros(1), bootstrap=jnp.zeros(num_members, jnp.int32))
    memory = ReplayBuffer.create(example, capacity)
    return memory if z is None else memory.add(dict(z=z, change=change, bootstrap=bootstrap))


def started(env, config):
    """A run, and its compiled train_step."""
    init, step = compiled(env, config)
    return init(jax.random.key(0)), step


@functools.cache
def programs(single, num_envs, config):
    env = Batch(single, num_envs)
    return (jax.jit(lambda key: pets.init(key, env, config)),
            jax.jit(lambda run, key: pets.train_step(run, key, env, config)))


def compiled(env, config):
    return programs(env.env, env.num_envs, config)


fit = jax.jit(pets.Agent.fit)


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
    env, config = make(weight_decay=0.1, bound_coef=0.3)
    agent = an_agent(env, config)
    params = dict(agent.dynamics.params)
    params["weight_1"] = 5 * params["weight_1"]
    params["min_log_var"] += 9  # so that both bounds matter
    z, change = jax.random.normal(jax.random.key(1), (2, 6, 2)), jax.random.normal(jax.random.key(2), (2, 6, 1))
    loss, info = jax.jit(agent.loss)(params, z, change)
    nll = 0.0
    for b in range(2):
        scaled = (np.asarray(z[b], np.float64) - np.asarray(agent.centre)) / np.asarray(agent.spread)
        mean, s = network(params, b, scaled)
        nll += (((mean - np.asarray(change[b])) ** 2 * np.exp(-s) + s).sum(-1)).mean()
    bounds = 0.3 * (np.asarray(params["max_log_var"]) - np.asarray(params["min_log_var"])).sum()
    decay = 0.05 * sum(np.square(np.asarray(params[f"weight_{i}"], np.float64)).sum() for i in range(2))
    np.testing.assert_allclose(info["loss"], nll, rtol=1e-4)
    np.testing.assert_allclose(loss - info["loss"], bounds + decay, rtol=1e-3)
    value = jax.jit(lambda params: agent.loss(params, z, change)[0])
    for name in params:  # no part of it is cut off from a parameter
        direction = {key: jnp.ones_like(x) * (key == name) for key, x in params.items()}
        slope = jax.jvp(value, (params,), (direction,))[1]
        ends = [value(jax.tree.map(lambda x, d, h=h: x + h * d, params, direction)) for h in (-1e-3, 1e-3)]
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-3, rtol=0.02, atol=0.02)


def test_the_network_starts_as_the_config_says():
    env, config = make(log_var_bounds=(-3.0, 1.5), hidden_dims=(64, 32))
    params = pets.Agent.create(jax.random.key(0), env.env, jnp.zeros(2), jnp.zeros(1), config).dynamics.params
    assert (params["min_log_var"] == -3).all() and (params["max_log_var"] == 1.5).all()
    shapes = {name: value.shape for name, value in params.items() if name.startswith("weight")}
    assert shapes == dict(weight_0=(2, 2, 64), weight_1=(2, 64, 32), weight_2=(2, 32, 2))
    np.testing.assert_allclose(params["weight_1"].std(), 0.88 * 0.5 / 8, rtol=0.05)  # cut at two deviations


def test_a_network_sees_the_features_of_its_environment():
    env = make_env("cartpole_swingup", 1)
    z = pets.inputs(env.env, jnp.float32([0.1, 0.2, 0.3, 0.4]), jnp.float32([0.5]))
    np.testing.assert_allclose(z, [np.sin(0.2), np.cos(0.2), 0.1, 0.3, 0.4, 0.5], rtol=1e-6)


def test_a_fit_learns_mean_and_noise():
    """Of a change with a known mean and a noise that grows with x; a second input hardly varies."""
    env, config = make(num_members=3, hidden_dims=(32, 32), num_updates=1500, batch_size=64, min_std=0.01)
    key = jax.random.key(0)

    def data(key, n):
        x_key, noise_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (n, 1), minval=-1.0, maxval=1.0)
        std = 0.05 + 0.2 * jnp.square(x)
        z = jnp.concatenate([1000 * x, 7 + 0.001 * x], axis=1)  # far from standard
        return z, jnp.sin(3 * x) + std * jax.random.normal(noise_key, (n, 1)), std

    agent_key, data_key, test_key, store_key, fit_key = jax.random.split(key, 5)
    z, change, _ = data(data_key, 1000)
    memory = pets.remember(store_key, memory_of(1500, num_members=3), z, change)
    agent = pets.Agent.create(agent_key, env.env, z[0], change[0], config)
    agent, _ = fit(agent, fit_key, memory)
    np.testing.assert_allclose(agent.centre, np.mean(z, 0), rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(agent.spread, [np.std(z[:, 0]), 1.0], rtol=1e-3)
    z, change, std = data(test_key, 4000)
    mean, log_var = agent.predict(repeat(z, 3))
    assert np.abs(mean.mean(0) - jnp.sin(3e-3 * z[:, :1])).mean() < 0.02
    np.testing.assert_allclose(np.sqrt(np.exp(log_var).mean(0)).mean(), std.mean(), rtol=0.15)
    quiet = np.abs(z[:, 0]) < 300
    assert np.exp(0.5 * log_var)[:, quiet].mean() < 0.5 * np.exp(0.5 * log_var)[:, ~quiet].mean()
    assert 0.85 < agent.test(z, change)["coverage"] < 0.98


def test_a_fit_keeps_to_each_members_bootstrap():
    """Two members, two transitions that contradict each other, one for each."""
    env, config = make(num_updates=600, lr=1e-2)
    memory = memory_of(4, jnp.zeros((2, 2)), jnp.array([[1.0], [-1.0]]), jnp.array([[0, 1], [0, 1]]))
    agent, _ = fit(an_agent(env, config), jax.random.key(0), memory)
    mean, _ = agent.predict(jnp.zeros((2, 1, 2)))
    np.testing.assert_allclose(mean[:, 0, 0], [1.0, -1.0], atol=0.1)


def test_a_fit_starts_from_the_weights_so_far():
    env, config = make(num_updates=1, lr=1e-6)
    agent = an_agent(env, config)
    fitted, _ = fit(agent, jax.random.key(0), memory_of(2, jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.zeros((2, 2), int)))
    for before, after in zip(*map(jax.tree.leaves, (agent.dynamics.params, fitted.dynamics.params)), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-5)


def test_a_bootstrap_is_drawn_once_from_the_new_transitions():
    z = jnp.stack([jnp.arange(90.0)] * 2, axis=1)
    first = pets.remember(jax.random.key(0), memory_of(200, num_members=3), z, z[:, :1])
    both = pets.remember(jax.random.key(1), first, 1000 + z, z[:, :1])
    assert (first.size, both.size) == (90, 180)
    np.testing.assert_array_equal(both.data["z"][:180, 0], np.concatenate([np.arange(90), 1000 + np.arange(90)]))
    np.testing.assert_array_equal(first.data["bootstrap"][:90], both.data["bootstrap"][:90])
    for rows, low in ((both.data["bootstrap"][:90], 0), (both.data["bootstrap"][90:180], 90)):
        assert rows.min() >= low and rows.max() < low + 90
        assert all(0.55 < len(set(row.tolist())) / 90 < 0.72 for row in rows.T)  # 1 − 1/e of them, on average
        assert not np.array_equal(rows[:, 0], rows[:, 1])


@pytest.mark.parametrize("propagation", ["tsinf", "ts1"])
def test_expected_cost_is_the_equation(propagation):
    """Against a loop over plans, particles and steps in float64."""
    env, config = make(propagation=propagation)
    agent, P, N, H = an_agent(env, config), 4, 3, 3
    actions = jax.random.uniform(jax.random.key(1), (H, N, 1), minval=-1.0)
    noise, orders = chance = agent.chance(jax.random.key(2), jnp.zeros(1))
    costs = jax.jit(agent.expected_cost)(actions, jnp.full(1, 0.3), chance)
    expected = np.zeros(N)
    for n in range(N):
        particles = [(0.3, 0.0)] * P  # state and cost so far
        for t in range(H):
            if propagation == "ts1":
                particles = [particles[p] for p in orders[t]]
            for p, (x, cost) in enumerate(particles):
                u = float(actions[t, n, 0])
                z = (np.array([[x, u]], np.float64) - np.asarray(agent.centre)) / np.asarray(agent.spread)
                mean, s = network(agent.dynamics.params, p // 2, z)
                x += mean.item() + np.exp(s.item() / 2) * float(noise[t, p, 0, 0])
                particles[p] = x, cost + (x - 1) ** 2 + 0.1 * u**2
        expected[n] = np.mean([cost + 10 * x for x, cost in particles])
    np.testing.assert_allclose(costs, expected, rtol=1e-4)
    assert noise.shape == (H, P, 1, 1) and all(sorted(order.tolist()) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 1 and len(set(noise.ravel().tolist())) == H * P


@pytest.mark.parametrize("propagation", ["tsinf", "ts1"])
def test_particles_keep_or_change_their_member(propagation):
    """Members that always add 1, and 3. What is dealt sums to the same, but spreads less and less far."""
    env, config = make(propagation=propagation, num_particles=8)
    agent = constant(an_agent(env, config), [1.0, 3.0], -1e2)
    actions = jnp.zeros((3, 2, 1))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    def costs_of(key, actions, x, agent):
        noise, orders = agent.chance(key, x)
        return agent.expected_cost(actions, x, (noise[:len(actions)], orders[:len(actions)]))

    with jax.debug_key_reuse(False):  # it misfires under vmap
        keys = jax.random.split(jax.random.key(0), 2000)
        costs = costs_of(keys, actions, jnp.zeros(1), agent)
        end = 10 * 3 * 2  # terminal cost of the mean, which is 2 a step
        keeps = np.mean([sum((t * change - 1) ** 2 for t in (1, 2, 3)) for change in (1, 3)]) + end
        deals = sum((2 * t - 1) ** 2 + t for t in (1, 2, 3)) + end  # the variance of a member's change is 1
        np.testing.assert_allclose(costs[:, 0], costs[:, 1], rtol=1e-5)
        np.testing.assert_allclose(costs.mean(), keeps if propagation == "tsinf" else deals, rtol=0.01)
        if propagation == "tsinf":
            np.testing.assert_allclose(costs, keeps, rtol=1e-5)
        one = costs_of(keys, actions[:1], jnp.zeros(1), agent)
        np.testing.assert_allclose(one, (0 + 4) / 2 + 20, rtol=1e-5)  # exactly P / B each
        noisy = constant(an_agent(env, config), [0.0, 0.0], np.log(0.25))
        costs = costs_of(keys, actions[:1], jnp.ones(1), noisy)
        np.testing.assert_allclose(costs.mean(), 0.25 + 10, rtol=0.01)


def test_a_plan_with_a_lost_particle_has_infinite_cost():
    """Models in which a push to the right flies off, or breaks, for a huge reward; a push to the left earns little."""
    class Greedy(Line):
        def cost(self, x, action, next_x):
            return -jnp.abs(next_x[0])

        def terminal_cost(self, x):
            return jnp.zeros(())

    env, config = make(Greedy(), num_envs=2, hidden_dims=(2,), far=300.0,
                       planner=dict(num_samples=200, num_elites=8, num_iterations=2))
    agent = constant(an_agent(env, config), [0.0, 0.0], -1e2)
    agent = agent.replace(centre=jnp.zeros(2), spread=jnp.ones(2))
    cost, act = jax.jit(pets.Agent.expected_cost), jax.jit(pets.Agent.plan)
    carry = planning.initial_carry(*env.action_space.bounds, 3, 1)
    for broken in (1e3, 1e38):
        params = dict(agent.dynamics.params)
        # hidden unit 0 is max(u, 0), about, and unit 1 max(−u, 0)
        params["weight_0"] = jnp.stack([jnp.array([[0.0, 0.0], [200.0, -200.0]])] * 2)
        params["weight_1"] = jnp.stack([jnp.array([[broken, 0.0], [0.01, 0.0]])] * 2)
        wild = agent.replace(dynamics=agent.dynamics.replace(params=params))
        chance = agent.chance(jax.random.key(0), jnp.zeros(1))
        right, left = cost(wild, jnp.stack([jnp.ones((3, 1)), -jnp.ones((3, 1))], axis=1), jnp.zeros(1), chance)
        assert not np.isfinite(right) and -100 < left < 0
        assert act(wild, carry, jnp.zeros(1), jax.random.key(1))[1] < -0.5
    # Members that add 0, and 40 or 400: at the third step, the state before it is within 300, or at 800. TS1 deals on.
    for change, lost in ((40.0, False), (140.0, False), (160.0, True)):
        still = constant(agent, [0.0, change], -1e2)
        assert np.isfinite(cost(still, jnp.zeros((3, 1, 1)), jnp.zeros(1), chance)[0]) != lost
    _, config = make(Greedy(), num_envs=2, hidden_dims=(2,), far=300.0, propagation="ts1")
    back = constant(agent.replace(config=config), [500.0, -500.0], -1e2)  # whoever flew off may return
    noise, _ = chance
    swap = jnp.array([[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 3]])
    assert not np.isfinite(cost(back, jnp.zeros((3, 1, 1)), jnp.zeros(1), (noise, swap))[0])


def test_what_is_remembered_is_what_happened():
    """Three environments whose episodes end after three or four steps; plans restart there and nowhere else."""
    env, config = make(Line(end=3), num_envs=3, num_steps=10, random_steps=12, env_steps=72)

    def plan(agent, carry, x, key):
        return carry._replace(mean=carry.mean + 1), carry.mean[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pets.Agent, "plan", plan)
        run, step = jax.jit(lambda key: pets.init(key, env, config))(jax.random.key(0)), jax.jit(
            lambda run, key: pets.train_step(run, key, env, config))
        infos = []
        for key in jax.random.split(jax.random.key(1), 2):
            run, info = step(run, key)
            infos.append(info["episode"])
    z, change = (np.asarray(run.memory.data[name])[:72].reshape(24, 3, -1) for name in ("z", "change"))
    np.testing.assert_allclose(change[..., 0], 0.5 * z[..., 1], atol=1e-6)  # the true successor, also at an end
    random = z[:4, :, 1]
    assert len(np.unique(random)) == 12 and random.min() < -0.5 and 0.5 < random.max() <= 1.5
    assert run.memory.size == 72
    returns = []
    for e in range(3):
        starts = np.flatnonzero(np.abs(z[1:, e, 0] - z[:-1, e, 0] - change[:-1, e, 0]) > 1e-5) + 1
        starts = [0, *starts.tolist(), 24]
        for first, last in zip(starts[:-1], starts[1:], strict=True):
            length = 4 if z[first, e, 0] > 0 else 3
            assert last - first == length or last == 24
            steps, x = np.arange(first, last), z[first:last, e, 0] + change[first:last, e, 0]
            planned = steps >= 4
            np.testing.assert_allclose(z[steps, e, 1][planned], 0.25 + np.arange(planned.sum()), rtol=1e-5)
            if last - first == length and last > 4:
                returns.append(-(np.square(x - 1) + 0.1 * np.square(z[steps, e, 1])).sum())
    assert sum(int(info["count"]) for info in infos) == len(returns)
    np.testing.assert_allclose(sum(float(info["return"]) for info in infos), sum(returns), rtol=1e-4)


def test_a_step_fits_then_plays_then_is_tested_then_remembers():
    env, config = make(num_envs=2, env_steps=28)
    run, step = started(env, config)
    assert run.memory.size == 8 == run.clock.env_steps and run.clock.updates == 0
    for i, key in enumerate(jax.random.split(jax.random.key(1), 2)):
        before, fit_key = run, jax.random.split(jax.random.clone(key), 3)[0]
        run, info = step(before, key)
        old, size = np.asarray(before.memory.data["z"][:before.memory.size]), int(before.memory.size)
        np.testing.assert_allclose(run.agent.centre, old.mean(0), rtol=1e-4, atol=1e-5)
        z, change = (run.memory.data[name][size:size + 10] for name in ("z", "change"))
        for name, value in run.agent.test(z, change).items():
            np.testing.assert_allclose(info[name], value, rtol=1e-4)
        fitted, _ = fit(before.agent, fit_key, before.memory)
        np.testing.assert_allclose(run.agent.dynamics.params["bias_1"], fitted.dynamics.params["bias_1"], rtol=1e-4)
        assert (run.clock.env_steps, run.clock.updates) == (8 + 10 * (i + 1), 4 * (i + 1))
    assert run.memory.size == 28 == run.memory.capacity
    first, play_key = z[:2], jax.random.split(jax.random.clone(key), 3)[1]  # which agent chose the first actions
    act_key = jax.random.split(play_key, (5, 2))[0, 0]
    _, action = jax.jit(pets.act)(run, before.carry, before.obs, act_key)
    np.testing.assert_allclose(first[:, 1], action[:, 0], rtol=1e-3, atol=1e-4)


def test_the_test_is_of_the_mixture():
    """Members that say 0 and 2, each with variance 1: together 1, with variance 2."""
    env, config = make()
    agent = constant(an_agent(env, config), [0.0, 2.0], 0.0)
    test = agent.test(jnp.zeros((3, 2)), jnp.array([[1.0], [1 + 2.7], [1 + 2.8]]))
    error = np.array([0.0, 2.7, 2.8])
    np.testing.assert_allclose(test["error"], np.sqrt(np.mean(error**2)), rtol=1e-5)
    np.testing.assert_allclose(test["nll"], np.mean(error**2 / 4 + 0.5 * np.log(4 * np.pi)), rtol=1e-5)
    np.testing.assert_allclose(test["coverage"], 2 / 3, rtol=1e-5)  # 1.96 √2 = 2.77


@pytest.mark.parametrize("search", ["icem", "cem"])
def test_the_planner_is_what_the_config_says(search):
    settings = dict(num_samples=9, num_elites=4, num_iterations=2, momentum=0.3)
    own = dict(decay=1.5, init_std=0.4, noise_beta=1.1) if search == "icem" else {}
    env, config = make(search=search, planner=settings | own, horizon=4, kept_elites=2)
    calls, key = [], jax.random.key(0)

    def searched(key, cost, carry, low, high, **settings):
        calls.append((key, cost, low, high, settings))
        return carry, carry.mean[0], {}

    run = pets.Run(an_agent(env, config), None, None, None, None, None)
    carry = pets.initial_carry(run, 3)
    assert carry.mean.shape == (3, 4, 1) and carry.elites.shape == (3, 4, 2, 1) and (carry.mean == 0.25).all()
    with pytest.MonkeyPatch.context() as patch, jax.debug_key_reuse(False):
        patch.setattr(planning, search, searched)
        run.agent.plan(jax.tree.map(lambda leaf: leaf[0], carry), jnp.zeros(1), key)
        (search_key, cost, low, high, passed), = calls
        assert passed == settings | own | (dict(return_mode="mean") if search == "icem" else {})
        assert (low, high) == (-1.0, 1.5)
        noise, _ = run.agent.chance(search_key, jnp.zeros(1))
        assert not np.array_equal(noise, cost.keywords["chance"][0])


def test_environments_act_by_chances_of_their_own():
    env, config = make(planner=dict(num_iterations=2))
    run = pets.Run(an_agent(env, config), None, None, None, None, None)
    carry, obs = pets.initial_carry(run, 3), jnp.zeros((3, 1))
    _, action = jax.jit(pets.act)(run, carry, obs, jax.random.key(0))
    assert action.shape == (3, 1) and len(np.unique(action)) == 3


@pytest.mark.parametrize("search", ["icem", "cem"])
def test_it_learns_to_stand_at_its_goal(search):
    """From the cost alone; a policy also knows the goal of the environment in which it is evaluated."""
    env, config = make(Line(final=0.0), search=search, num_updates=300, random_steps=40, env_steps=50, lr=3e-3,
                       hidden_dims=(16,), planner=dict(num_samples=64, num_elites=8, num_iterations=3))
    run, step = started(env, config)
    for key in jax.random.split(jax.random.key(1), 2):
        run, info = step(run, key)
    assert info["episode"]["count"] == 1 and info["error"] < 0.1
    assert info["episode"]["return"] > -0.6  # 0.06 + 0.225 of the first step, 0.1 · 0.25 of the second
    if search == "icem":
        other = Batch(Line(final=0.0, goal=-0.4), 3)
        like = jax.eval_shape(lambda key: pets.init(key, other, config), jax.random.key(0))
        run = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(run))
        test = jax.jit(lambda run, key: evaluate(
            functools.partial(pets.act, run), other, key, pets.initial_carry(run, 3)))
        assert (test(run, jax.random.key(5))[0] > -0.3).all()  # 0.064 is possible; to stand at 1 costs ten


def test_seeds_under_vmap_match_seeds_alone():
    env, config = make(num_envs=2, env_steps=28)

    @jax.jit
    @jax.vmap
    def learnt(key, train_key):
        return pets.train_step(pets.init(key, env, config), train_key, env, config)

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        run, info = learnt(jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.key(1), 3))
    init, step = compiled(env, config)
    alone = step(init(jax.random.split(jax.random.key(0), 3)[1]), jax.random.split(jax.random.key(1), 3)[1])
    z = run.memory.data["z"]
    for a, b in zip(jax.tree.leaves((z, info)), jax.tree.leaves((alone[0].memory.data["z"], alone[1])), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-4)
    assert len(np.unique(z[:, 8:18, 1])) == 30


def test_particles_that_no_member_gets_are_named():
    env, config = make(num_particles=3)
    with pytest.raises(UserError, match="num_particles = 3 is no multiple of num_members = 2"):
        pets.init(jax.random.key(0), env, config)


def test_a_search_takes_its_own_keywords_only():
    config = pets.get_config()
    config.search = "cem"
    with pytest.raises(UserError, match='search = "cem", but `planner` holds the keywords of the other search'):
        pets.init(jax.random.key(0), make_env("cartpole_swingup", 1), ml_collections.FrozenConfigDict(config))
    config = pets_paper.get_config()
    config.search = "icem"
    with pytest.raises(UserError, match='search = "icem"'):
        pets.init(jax.random.key(0), make_env("cartpole_swingup", 1), ml_collections.FrozenConfigDict(config))
