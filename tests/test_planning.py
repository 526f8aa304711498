"""Planners against Riccati, the theory of coloured noise, and the algorithms written out plan by plan."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import planning
from core.envs import repeat, restart

FILE = "core/planning.py"
PLANTED_ERRORS = {
    "the second best has to be good": (FILE, "jnp.isfinite(costs[0])", "jnp.isfinite(costs[1])",
                                       "test_the_only_good_plan_is_executed"),
    "plans not shifted": (FILE, "jnp.concatenate([plan[1:], plan[-1:]])", "plan", "test_icem_is_the_algorithm"),
    "elites not shifted": (FILE, "shift(elites[:, :num_kept])", "elites[:, :num_kept]", "test_icem_is_the_algorithm"),
    "stale costs in a new step": (
        FILE, "evaluate(cost_fn, actions), jnp.inf)",
        "jnp.append(evaluate(cost_fn, actions)[:num_samples], costs), jnp.inf)",
        "test_icem_is_the_algorithm"),
    "absent elites compete": (
        FILE, "jnp.isfinite(costs))\n            costs", "costs > 0)\n            costs",
        "test_icem_is_the_algorithm"),
    "last elite action not redrawn": (
        FILE, "jnp.concatenate([carry.elites[:-1], jnp.clip(last_action, *box)])", "carry.elites",
        "test_icem_is_the_algorithm"),
    "kept elites lost": (
        FILE, "actions), costs[:num_kept]", "actions), jnp.inf * jnp.ones(num_kept)",
        "test_icem_is_the_algorithm"),
    "colour of amplitude, not power": (
        FILE, "** (-beta / 2)", "** -beta",
        "test_the_spectrum_of_the_noise_falls_as_its_colour_says"),
    "constant component halved": (
        FILE, "real[edges] *= np.sqrt(2)", "real[edges] *= np.sqrt(1)",
        "test_the_spectrum_of_the_noise_falls_as_its_colour_says"),
    "colour along (time, dimension)": (
        FILE, "(colouring(horizon, beta) @ white).reshape(shape)",
        "(colouring(horizon * action_dim, beta) @ white.reshape(shape).swapaxes(1, 2).reshape(-1, num_plans))."
        "reshape(horizon, -1, num_plans).swapaxes(1, 2)",
        "test_the_spectrum_of_the_noise_falls_as_its_colour_says"),
    "one noise for all dimensions": (
        FILE, "@ white).reshape(shape)", "@ white).reshape(shape)[..., :1].repeat(shape[2], 2)",
        "test_the_spectrum_of_the_noise_falls_as_its_colour_says"),
    "half a normal": (FILE, "bits >> 9", "bits >> 10", "test_normals_are_normal"),
    "momentum the wrong way": (
        FILE, "std = momentum * std + (1 - momentum)", "std = (1 - momentum) * std + momentum",
        "test_icem_is_the_algorithm"),
    "variance for deviation": (FILE, "jnp.sqrt(elite_var)", "elite_var", "test_icem_is_the_algorithm"),
    "worst plans are elites": (
        FILE, "lax.top_k(-costs, num_elites)", "lax.top_k(costs, num_elites)",
        "test_icem_is_the_algorithm"),
    "NaN is a good cost": (
        FILE, "jnp.where(jnp.isfinite(costs), costs, jnp.inf)", "jnp.nan_to_num(costs, nan=-1e-10)",
        "test_a_plan_without_a_finite_cost_is_never_elite"),
    "minus infinity is good": (
        FILE, "jnp.where(jnp.isfinite(costs), costs, jnp.inf)", "jnp.where(jnp.isnan(costs), jnp.inf, costs)",
        "test_a_plan_without_a_finite_cost_is_never_elite"),
    "bad elites weigh in": (
        FILE, "good = jnp.isfinite(costs)\n", "good = jnp.ones_like(costs, bool)\n",
        "test_a_plan_without_a_finite_cost_is_never_elite"),
    "no decay": (FILE, "int(sizes[-1] / decay)", "int(sizes[0])", "test_evaluations_are_as_many_as_the_paper_counts"),
    "fewer than two elites' worth": (
        FILE, "max(2 * num_elites, int", "max(num_elites, int",
        "test_evaluations_are_as_many_as_the_paper_counts"),
    "mean not injected": (FILE, "if i == num_iterations - 1:", "if i == num_iterations:", "test_icem_is_the_algorithm"),
    "bounds forgotten": (
        FILE, "jnp.clip(mean[:, None] + std[:, None] * noise[i], *box)", "mean[:, None] + std[:, None] * noise[i]",
        "test_icem_is_the_algorithm"),
    "modes swapped": (FILE, 'if return_mode == "best"', 'if return_mode == "mean"', "test_icem_is_the_algorithm"),
    "CEM variance unconstrained": (FILE, "jnp.minimum(var, jnp.square(room / 2))", "var", "test_cem_is_the_algorithm"),
    "CEM repeats the last action": (
        FILE, "jnp.concatenate([mean[1:], middle])", "shift(mean)",
        "test_cem_is_the_algorithm"),
    "CEM forgets its momentum": (
        FILE, "return (mean, momentum * var + (1 - momentum) * elite_var)",
        "return (mean, 0.1 * var + 0.9 * elite_var)",
        "test_cem_is_the_algorithm"),
    "init_std forgotten": (
        FILE, "jnp.broadcast_to(init_std * (high - low) / 2", "jnp.broadcast_to(0.5 * (high - low) / 2",
        "test_icem_is_the_algorithm"),
    "noise_beta forgotten": (
        FILE, "coloured_noise(key, noise_beta,", "coloured_noise(key, 2.0,", "test_icem_is_the_algorithm"),
    "decay forgotten": (
        FILE, "population_sizes(num_samples, num_elites, num_iterations, decay)\n",
        "population_sizes(num_samples, num_elites, num_iterations, 1.25)\n", "test_icem_is_the_algorithm"),
    "terminal cost forgotten": (
        FILE, "return total + jax.vmap(terminal_cost)(x)", "return total",
        "test_the_cost_of_a_trajectory_is_the_sum_over_its_steps"),
    "cost of the old state": (
        FILE, "jax.vmap(cost)(x, action, next_x)", "jax.vmap(cost)(x, action, x)",
        "test_the_cost_of_a_trajectory_is_the_sum_over_its_steps"),
}

LOW, HIGH = jnp.float32([-1.0, -2.0]), jnp.float32([1.0, 3.0])
SMALL = dict(num_samples=40, num_elites=6, num_iterations=3)
PLANNERS = {
    "icem": functools.partial(planning.icem, **SMALL),
    "cem": functools.partial(planning.cem, **SMALL, momentum=0.2),
}


def rugged(actions, x=0.3):
    """A cost with many minima, some below zero: [H, N, A] -> [N]."""
    return (jnp.square(actions - x) + 0.5 * jnp.cos(9 * actions)).sum(axis=(0, 2)) + actions[..., 0].prod(axis=0)


def fresh_carry(horizon=6, num_kept=2):
    return planning.initial_carry(LOW, HIGH, horizon, num_kept)


def populations(carry, cost=rugged, key=0, **settings):
    """What icem asks the cost of, iteration by iteration, and what it returns."""
    @jax.jit
    def plan(key, carry):
        seen = []
        cost_fn = lambda actions: seen.append(actions) or cost(actions)  # noqa: E731
        result = planning.icem(key, cost_fn, carry, LOW, HIGH, **(SMALL | settings))
        return seen, result

    return jax.device_get(plan(jax.random.key(key), carry))


def test_evaluations_are_as_many_as_the_paper_counts():
    """40 + 32 + 25 = 97 plans for N = 40, K = 10, three iterations and γ = 1.25; never fewer than 2K in one."""
    seen, _ = populations(fresh_carry(num_kept=3), num_elites=10, num_iterations=3)
    assert [a.shape for a in seen] == [(6, 40 + 3, 2), (6, 32, 2), (6, 25, 2)]
    assert planning.population_sizes(40, 10, 6, 1.25) == (40, 32, 25, 20, 20, 20)
    assert planning.population_sizes(500, 50, 3, 1.0) == (500, 500, 500)


def icem_plan_by_plan(noise, cost, mean, old_elites, init_std, sizes, num_elites, num_kept, momentum):
    """The algorithm with lists of plans [H, A] that grow, as it is published."""
    low, high = np.asarray(LOW), np.asarray(HIGH)
    std, start, kept, best = np.full_like(mean, init_std) * (high - low) / 2, 0, [], []
    for i, size in enumerate(sizes):
        plans = [np.clip(mean + std * noise[:, start + n], low, high) for n in range(size)]
        start += size
        if i == len(sizes) - 1:
            plans[0] = mean
        if i == 0:
            last = [np.clip(mean[-1:] + std[-1:] * noise[-1:, sum(sizes) + n], low, high) for n in range(num_kept)]
            plans += [np.concatenate([p[1:], a]) for p, a in zip(old_elites, last, strict=False)]
        costed = [(float(cost(jnp.asarray(p)[:, None])[0]), p) for p in plans] + (kept if i > 0 else [])
        costed = sorted(costed, key=lambda pair: pair[0])[:num_elites]
        elites, kept = np.stack([p for _, p in costed]), costed[:num_kept]
        mean = momentum * mean + (1 - momentum) * elites.mean(axis=0)
        std = momentum * std + (1 - momentum) * elites.std(axis=0)
        best.append(costed[0][0])
    return mean, elites[0], [p for _, p in kept], best


@pytest.mark.parametrize("beta, decay, num_kept", [(0.0, 1.0, 0), (2.0, 1.25, 2)])
@pytest.mark.parametrize("return_mode", ["best", "mean"])
def test_icem_is_the_algorithm(beta, decay, num_kept, return_mode):
    """Three steps on the same noise. With β = 0, no decay and no kept elites this is CEM with clipping."""
    carry, mean, elites = fresh_carry(num_kept=num_kept), np.zeros((6, 2), np.float32) + np.float32([0, 0.5]), []
    sizes = planning.population_sizes(40, 6, 3, decay)

    @jax.jit
    def plan(key, carry, x):
        return planning.icem(key, functools.partial(rugged, x=x), carry, LOW, HIGH, **SMALL, noise_beta=beta,
                             decay=decay, momentum=0.2, init_std=0.7, return_mode=return_mode)

    for step in range(3):
        key, cost = jax.random.key(step), functools.partial(jax.jit(rugged), x=0.1 * step)
        noise = np.asarray(planning.coloured_noise(jax.random.clone(key), beta, (6, sum(sizes) + num_kept, 2)))
        carry, action, info = plan(key, carry, 0.1 * step)
        mean, best_plan, elites, best = icem_plan_by_plan(noise, cost, mean, elites, 0.7, sizes, 6, num_kept, 0.2)
        np.testing.assert_allclose(info["plan"], best_plan if return_mode == "best" else mean, atol=1e-5)
        np.testing.assert_array_equal(action, info["plan"][0])
        np.testing.assert_allclose(info["cost"], best, atol=1e-4)
        mean = np.concatenate([mean[1:], mean[-1:]])
        np.testing.assert_allclose(carry.mean, mean, atol=1e-5)


def test_plans_stay_in_the_box_and_use_all_of_it():
    seen, (carry, _, _) = populations(fresh_carry(), init_std=5.0)
    seen += populations(carry, init_std=5.0)[0]
    lowest = np.min([a.min(axis=(0, 1)) for a in seen], axis=0)
    highest = np.max([a.max(axis=(0, 1)) for a in seen], axis=0)
    np.testing.assert_array_equal([lowest, highest], [LOW, HIGH])


def test_the_best_cost_never_rises_within_a_plan():
    """A kept elite brings its cost along, so what an iteration knows is never forgotten by the next."""
    plan = jax.jit(lambda key, carry: PLANNERS["icem"](key, rugged, carry, LOW, HIGH))
    carry = fresh_carry(num_kept=1)
    for step in range(30):
        carry, _, info = plan(jax.random.key(step), carry)
        assert (np.diff(info["cost"]) <= 0).all()


@pytest.mark.parametrize("name", PLANNERS)
def test_a_plan_without_a_finite_cost_is_never_elite(name):
    """Whatever the sign of the good costs; even with fewer good plans than elites, and with none at all."""
    @jax.jit
    def plan(bad, limit, offset, mean):
        cost = lambda a: jnp.where(a[0, :, 0] < limit, rugged(a) + offset, bad)  # noqa: E731
        carry = fresh_carry()._replace(mean=jnp.broadcast_to(mean, (6, 2)))
        return PLANNERS[name](jax.random.key(3), cost, carry, LOW, HIGH)

    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for limit, offset in itertools.product((0.0, -0.9), (-1e3, 1e3)):
            carry, action, info = plan(bad, limit, offset, LOW + 0.01)
            assert action[0] < limit and np.isfinite(info["cost"]).all() and np.isfinite(carry.mean).all()
        carry, action, _ = plan(bad, -9.0, 0.0, LOW / 3)
        np.testing.assert_allclose(action, LOW / 3, rtol=1e-6)
        assert not np.isfinite(carry.costs).any()


def test_the_only_good_plan_is_executed():
    """Which the mean of all good ones is, too."""
    def first_action(return_mode):
        cost = lambda a: jnp.where(jnp.arange(a.shape[1]) == 7, 1.0, jnp.inf)  # noqa: E731
        return planning.icem(jax.random.key(0), cost, fresh_carry(), LOW, HIGH, num_samples=20, num_elites=4,
                             num_iterations=1, momentum=0.0, return_mode=return_mode)[1]

    np.testing.assert_allclose(first_action("best"), first_action("mean"), rtol=1e-6)
    assert (first_action("best") != (LOW + HIGH) / 2).all()


def test_fewer_good_plans_than_elites_weigh_alone():
    """Of [H=1, N=4] plans with two good costs and three elites, the moments are those of the two."""
    actions = jnp.float32([1, 5, 2, 7]).reshape(1, 4, 1)
    elites, costs = planning.select(actions, jnp.float32([jnp.inf, -3, jnp.inf, -4]), 3)
    mean, var = planning.moments(elites, costs, jnp.zeros((1, 1)), jnp.ones((1, 1)))
    np.testing.assert_allclose([mean[0, 0], var[0, 0]], [6, 1])
    np.testing.assert_array_equal(costs, [-4, -3, jnp.inf])


def test_what_is_carried_is_one_step_on_and_judged_anew():
    """The first population of the next step ends with the shifted elites, and their old costs do not count."""
    first, (carry, _, _) = populations(fresh_carry())
    second, (_, _, info) = populations(carry, cost=lambda a: rugged(a, x=-0.8) + 50, key=1)
    shifted = second[0][:, 40:]
    for n in range(2):
        source = [np.abs(a[1:] - shifted[:-1, n, None]).max(axis=(0, 2)).min() for a in first]
        assert min(source) < 1e-6
    assert np.abs(shifted[-1] - shifted[-2]).min() > 1e-3  # its last action is a new one
    np.testing.assert_allclose(info["cost"][0], rugged(jnp.asarray(second[0]), x=-0.8).min() + 50, rtol=1e-5)


@pytest.mark.parametrize("name", PLANNERS)
def test_environments_under_vmap_plan_as_alone_and_a_reset_forgets_all(name):
    @jax.jit
    def alone(key, carry, x):
        return PLANNERS[name](key, functools.partial(rugged, x=x), carry, LOW, HIGH)

    @jax.jit
    def plan(keys, carry, x):
        return jax.vmap(alone)(keys, carry, x)

    fresh, x = repeat(fresh_carry(), 2), jnp.float32([0.3, -0.5])
    first, _, _ = plan(jax.random.split(jax.random.key(0), 2), fresh, x)
    reset = restart(jnp.array([True, False]), fresh, first)
    after, action, _ = plan(jax.random.split(jax.random.key(1), 2), reset, x)
    for i, start in enumerate((fresh_carry(), jax.tree.map(lambda leaf: leaf[1], first))):
        expected, expected_action, _ = alone(jax.random.split(jax.random.key(1), 2)[i], start, x[i])
        np.testing.assert_allclose(action[i], expected_action, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-4), after, expected)  # noqa: B023


def riccati(a, b, q, r):
    p = q
    for _ in range(500):
        gain = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        p = q + a.T @ p @ (a - b @ gain)
    return gain, p


@pytest.mark.parametrize("planner, atol", [
    (functools.partial(planning.icem, num_samples=400, num_elites=40, num_iterations=8), 0.05),
    (functools.partial(planning.icem, num_samples=400, num_elites=40, num_iterations=8, return_mode="mean"), 0.04),
    (functools.partial(planning.cem, num_samples=400, num_elites=40, num_iterations=15), 0.005),
], ids=["icem best", "icem mean", "cem"])
def test_the_first_action_is_the_riccati_action(planner, atol):
    """Two coupled masses and two forces; the terminal cost is Riccati's, so a short horizon is exact."""
    a = np.eye(4) + 0.2 * np.eye(4, k=2) - 0.05 * np.eye(4, k=-2)
    b = np.array([[0.02, 0], [0, 0.02], [0.2, 0.05], [0, 0.2]])
    q, r = np.diag([1.0, 2.0, 0.1, 0.1]), np.diag([0.5, 0.3])
    gain, p = riccati(a, b, q, r)
    x0, low, high = np.array([0.6, -0.8, 0.3, 0.2]), jnp.full(2, -2.0), jnp.full(2, 2.0)
    optimal_cost = x0 @ p @ x0
    a, b, q, r, p, x = (jnp.float32(m) for m in (a, b, q, r, p, x0))
    cost_fn = functools.partial(planning.trajectory_cost, lambda x, u: a @ x + b @ u,
                                lambda x, u, _: x @ q @ x + u @ r @ u, lambda x: x @ p @ x, x)
    carry = planning.initial_carry(low, high, 3, 4)
    plan = jax.jit(jax.vmap(lambda key: planner(key, cost_fn, carry, low, high)))
    _, action, info = jax.device_get(plan(jax.random.split(jax.random.key(0), 16)))
    np.testing.assert_allclose(np.abs(action + gain @ x0).mean(axis=0), 0, atol=atol)
    np.testing.assert_allclose(action.mean(axis=0), -gain @ x0, atol=atol / 2)
    np.testing.assert_allclose(info["cost"][:, -1], optimal_cost, rtol=5e-3)


@pytest.mark.parametrize("beta", [0.25, 2.0, 3.5])
def test_the_spectrum_of_the_noise_falls_as_its_colour_says(beta):
    """And neither action dimensions nor plans know of each other."""
    @jax.jit
    def first_population(key):
        seen, low, high = [], jnp.full(2, -1e4), jnp.full(2, 1e4)
        planning.icem(key, lambda actions: seen.append(actions) or actions.sum(axis=(0, 2)),
                      planning.initial_carry(low, high, 30), low, high, num_samples=20_000, num_elites=10,
                      num_iterations=2, decay=1.0, init_std=1e-4, noise_beta=beta)
        return seen[0]  # the mean is not yet among them

    noise = np.asarray(first_population(jax.random.key(5)))  # [H, N, 2]
    power = np.square(np.abs(np.fft.rfft(noise, axis=0))).mean(axis=(1, 2))[1:-1]
    frequency = np.fft.rfftfreq(30)[1:-1]
    assert abs(np.polyfit(np.log(frequency), np.log(power), 1)[0] + beta) < 0.02
    np.testing.assert_allclose(noise.std(), {0.25: 1.03, 2.0: 1.15, 3.5: 1.20}[beta], atol=0.01)
    across = [np.corrcoef(noise[t, :, 0], noise[s, :, 1])[0, 1] for t in (0, 14, 29) for s in (0, 14, 29)]
    between = [np.corrcoef(noise[t, :-1, 0], noise[t, 1:, 0])[0, 1] for t in (0, 14, 29)]
    assert np.abs(across + between).max() < 0.05


@pytest.mark.parametrize("horizon", [7, 30])
def test_the_colouring_matrix_has_the_exact_spectrum(horizon):
    power = np.square(np.abs(np.fft.rfft(planning.colouring(horizon, 2.0), axis=0))).sum(axis=1)
    frequency = np.fft.rfftfreq(horizon)
    exact = np.maximum(frequency, 1 / horizon) ** -2.0
    np.testing.assert_allclose(power / power[1], exact / exact[1], rtol=1e-4)


def test_normals_are_normal():
    z = np.sort(np.asarray(planning.normal(jax.random.key(0), (200, 1000))).ravel())
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.06
    uniform = np.asarray(jax.scipy.stats.norm.cdf(z))
    assert np.abs(uniform - (np.arange(z.size) + 0.5) / z.size).max() < 1.63 / np.sqrt(z.size)  # Kolmogorov, 1%


def test_cem_is_the_algorithm():
    key, low, high = jax.random.key(4), np.asarray(LOW), np.asarray(HIGH)
    start = fresh_carry()._replace(mean=jnp.broadcast_to(LOW + 0.25, (6, 2)))
    carry, action, info = jax.jit(lambda key: PLANNERS["cem"](key, rugged, start, LOW, HIGH))(key)
    noise = np.asarray(jax.random.truncated_normal(jax.random.clone(key), -2.0, 2.0, (3, 6, 40, 2)))
    mean, var = np.asarray(start.mean), np.full((6, 2), np.square(high - low) / 16)
    for white in noise:
        capped = np.minimum(var, np.minimum(np.square((mean - low) / 2), np.square((high - mean) / 2)))
        plans = mean[:, None] + np.sqrt(capped)[:, None] * white
        assert (plans >= low - 1e-5).all() and (plans <= high + 1e-5).all()
        costs = np.asarray(rugged(jnp.asarray(plans)))
        elites = plans[:, np.argsort(costs)[:6]]
        mean, var = 0.2 * mean + 0.8 * elites.mean(axis=1), 0.2 * var + 0.8 * elites.var(axis=1)
    np.testing.assert_allclose(info["plan"], mean, atol=1e-5)
    np.testing.assert_allclose(action, mean[0], atol=1e-5)
    np.testing.assert_allclose(carry.mean, np.concatenate([mean[1:], [(low + high) / 2]]), atol=1e-5)


def test_the_cost_of_a_trajectory_is_the_sum_over_its_steps():
    actions = np.random.default_rng(0).normal(size=(5, 3, 1)).astype(np.float32)
    cost = planning.trajectory_cost(
        lambda x, u: 0.9 * x + jnp.append(u, x[0] * u[0]), lambda x, u, next_x: x[0] * next_x[1] + u[0] ** 2,
        lambda x: 7 * x[1], jnp.float32([1.0, -2.0]), jnp.asarray(actions))
    for n in range(3):
        x, total = np.array([1.0, -2.0]), 0.0
        for u in actions[:, n, 0]:
            next_x = 0.9 * x + np.array([u, x[0] * u])
            x, total = next_x, total + x[0] * next_x[1] + u**2
        np.testing.assert_allclose(cost[n], total + 7 * x[1], rtol=1e-5)
