"""Environments of hidden truth: their physics against NumPy in other words, their options against statistics."""
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from core import planning
from core.envs import Batch, cartpole_swingup, hidden, unicycle_pursuit
from core.errors import UserError

NAMES = ["cartpole_balance", "cartpole_swingup", "damped_pendulum", "linear_tracking", "merging_idm",
         "planar_drone_wind", "pursuit_evasion_lqr", "unicycle_pursuit"]
BALANCE, CARTPOLE, PENDULUM, LINEAR, MERGING, DRONE, LQR, UNICYCLE = [f"core/envs/{name}.py" for name in NAMES]
HIDDEN = "core/envs/hidden.py"
PLANTED_ERRORS = {
    "LQR velocities start at random": (
        LQR, "[evader, jnp.zeros(2), pursuer, jnp.zeros(2)]",
        "[evader, pursuer, jnp.zeros(4)]", "test_the_lqr_numbers"),
    "LQR chases where the evader will be": (
        LQR, "px + pvx * ahead - ex,", "px + pvx * ahead - ex - evx * dt,", "test_the_lqr_pursuer_minimises_its_cost"),
    "LQR flees": (LQR, "(-sum(g * e", "(sum(g * e", "test_the_lqr_numbers"),
    "LQR gain transposed": (
        LQR, "[[d, -b12], [-b21, a]]", "[[a, -b12], [-b21, d]]", "test_the_lqr_pursuer_minimises_its_cost"),
    "LQR axes exchanged": (
        LQR, "q.reshape(2, 2).T)", "q.reshape(2, 2))", "test_the_lqr_pursuer_of_infinite_horizon"),
    "LQR of infinite horizon looks ahead": (
        LQR, "0.0 if self.infinite_horizon else self.dt", "self.dt", "test_the_lqr_pursuer_of_infinite_horizon"),
    "LQR of infinite horizon, control for free": (
        LQR, "r[:, None, None]", "0.01 * r[:, None, None]", "test_the_lqr_pursuer_of_infinite_horizon"),
    "LQR cost sign": (LQR, "return -((x[0] - x[4]) ** 2) - (", "return (x[0] - x[4]) ** 2 + (", "test_the_lqr_numbers"),
    "pendulum semi-implicit": (
        PENDULUM, "angle + self.dt * spin, spin",
        "angle + self.dt * (spin + self.dt * torque / jnp.exp(params.log_inertia)), spin", "test_the_pendulum_numbers"),
    "pendulum inertia multiplies": (
        PENDULUM, "jnp.exp(-params.log_inertia)", "jnp.exp(params.log_inertia)", "test_the_pendulum_numbers"),
    "pendulum weight sign": (
        PENDULUM, "- self.weight * jnp.sin", "+ self.weight * jnp.sin", "test_the_pendulum_numbers"),
    "linear goal forgotten": (LINEAR, "x - jnp.float32(self.goal)", "x", "test_the_linear_numbers"),
    "IDM approach sign": (MERGING, "heed * (speed - vx)", "heed * (vx - speed)", "test_the_merging_numbers"),
    "IDM attention inverted": (MERGING, "(reach - jnp.abs(py", "(jnp.abs(py", "test_the_merging_numbers"),
    "IDM two reaches": (MERGING, "reach: float = 1.75", "reach: float = 2.0", "test_the_reach_is_one_number"),
    "IDM car reverses": (
        MERGING, "jnp.maximum(speed + accel * dt, 0.0)", "speed + accel * dt", "test_the_merging_numbers"),
    "merging behind is fine": (MERGING, "off_road + behind", "off_road", "test_the_merging_violations"),
    "unicycle aims one step short": (
        UNICYCLE, "ex + 2 * dt * evx - px", "ex + dt * evx - px", "test_the_unicycle_solves_its_problem"),
    "unicycle derivative through nothing": (
        UNICYCLE, "turn = turn - slope(turn) / jax.lax",
        "turn = turn - 0 * slope(turn) / jax.lax", "test_the_unicycle_solves_its_problem"),
    "unicycle derivative by the bound": (
        UNICYCLE, "jnp.clip(curvature, 0.1 * bound, bound)", "bound", "test_the_unicycle_solves_its_problem"),
    "drone wind torque sign": (
        DRONE, "(wind_y * jnp.sin(x[2]) - wind_x", "(wind_y * jnp.sin(x[2]) + wind_x", "test_the_drone_numbers"),
    "drone explicit Euler": (DRONE, "x[:3] + self.dt * velocity", "x[:3] + self.dt * x[3:]", "test_the_drone_numbers"),
    "balance is a point mass": (BALANCE, "4 / 3 - share", "1 - share", "test_the_balance_numbers"),
    "balance centrifugal sign": (
        BALANCE, "+ share * half * spin**2 * sin", "- share * half * spin**2 * sin", "test_the_balance_numbers"),
    "balance force on the cart alone": (
        BALANCE, "action[0] / (cart + pole)", "action[0] / cart", "test_the_balance_numbers"),
    "balance pays after the fall": (
        BALANCE, "-standing(next_x)", "-standing(x)", "test_the_balance_ends_where_it_falls"),
    "balance in degrees": (BALANCE, "np.pi / 15", "12.0", "test_the_balance_ends_where_it_falls"),
    "balance falls to one side": (
        BALANCE, "(jnp.abs(angle) <", "(angle <", "test_the_balance_ends_where_it_falls"),
    "balance rolls out of the rail": (
        BALANCE, "(jnp.abs(position) < MAX_POSITION) & ", "", "test_the_balance_ends_where_it_falls"),
    "balance a fall at the limit counted twice": (
        BALANCE, "step.truncated & ~fallen", "step.truncated", "test_the_balance_ends_where_it_falls"),
    "balance never ends": (
        BALANCE, "terminated=fallen", "terminated=fallen & False", "test_the_balance_ends_where_it_falls"),
    "cart-pole coupling sign": (CARTPOLE, "-moment * cos", "moment * cos", "test_the_cartpole_numbers"),
    "cart-pole centrifugal sign": (
        CARTPOLE, "- moment * sin * spin**2", "+ moment * sin * spin**2", "test_the_cartpole_keeps_its_energy"),
    "cart-pole is a point mass": (
        CARTPOLE, "(1 + INERTIA_RATIO) * moment", "moment", "test_the_cartpole_keeps_its_energy"),
    "cart-pole Euler": (
        CARTPOLE, "advance(state, slope, self.dt)",
        "advance(state, k1, self.dt)", "test_the_cartpole_keeps_its_energy"),
    "cart-pole reward of the old state": (
        CARTPOLE, "position, angle, _, _ = next_x", "position, angle, _, _ = x", "test_the_cartpole_numbers"),
    "reward is the cost": (
        HIDDEN, "reward = -env.cost(", "reward = env.cost(", "test_a_step_obeys_the_truth[damped_pendulum]"),
    "actions not clipped": (
        HIDDEN, "env.action_space.clip(action), state.t + 1",
        "action, state.t + 1", "test_a_step_obeys_the_truth[damped_pendulum]"),
    "episodes one step longer": (
        HIDDEN, "t >= env.max_steps", "t > env.max_steps", "test_a_step_obeys_the_truth[damped_pendulum]"),
    "the step obeys tomorrow's truth": (
        HIDDEN, "env.dynamics(obeyed, state.x, action)",
        "env.dynamics(change(jax.random.clone(params_key), env, obeyed, t), state.x, action)",
        "test_a_jump_comes_when_it_is_told"),
    "blur moves the world": (
        HIDDEN, "return state, TimeStep(obs",
        "return state._replace(x=obs), TimeStep(obs", "test_noise_has_its_deviation"),
    "jump a step late": (HIDDEN, "t == env.jump_step", "t == env.jump_step + 1", "test_a_jump_comes_when_it_is_told"),
    "jump and jump again": (HIDDEN, "t == env.jump_step", "t >= env.jump_step", "test_a_jump_comes_when_it_is_told"),
    "drift of one number for all": (
        HIDDEN, "add_noise(drift_key, flat, env.drift)",
        "add_noise(drift_key, flat[:1], env.drift) - flat[:1] + flat", "test_a_drift_is_a_random_walk"),
    "draws only larger": (HIDDEN, "minval=-limit", "minval=0 * limit", "test_the_truth_is_drawn_within_its_spread"),
    "a jump that never comes": (
        HIDDEN, "if env.jump_step >= env.max_steps:", "if env.jump_step > env.max_steps:",
        "test_a_jump_after_the_end_is_refused"),
    "the jump is checked nowhere": (
        LINEAR, "__post_init__, reset, step, unknown = hidden.check,", "_, reset, step, unknown = hidden.check,",
        "test_a_jump_after_the_end_is_refused"),
    "yesterday's truth revealed": (
        HIDDEN, "obs = observation(env, obs_key, state)",
        "obs = observation(env, obs_key, state._replace(params=obeyed))",
        "test_what_is_revealed_is_what_the_next_step_obeys"),
    "revealed truth is blurred": (
        HIDDEN, "return jnp.append(x, flatten(state.params)) if env.reveal else x",
        "obs = jnp.append(state.x, flatten(state.params)) if env.reveal else state.x\n"
        "    return add_noise(jax.random.clone(key), obs, env.observation_noise)",
        "test_what_is_revealed_is_what_the_next_step_obeys"),
    "the logged truth is tomorrow's": (
        HIDDEN, '{"params": obeyed}', '{"params": state.params}', "test_what_is_revealed_is_what_the_next_step_obeys"),
    "errors cancel": (HIDDEN, "return jnp.abs(flatten(params) - flatten(truth)).sum()",
        "return jnp.abs((flatten(params) - flatten(truth)).sum())", "test_the_unknown_is_a_system"),
    "the gain's rows exchanged": (
        LQR, "lambda phi, x, action: self.pursue(phi.reshape(2, 4), x, action)",
        "lambda phi, x, action: self.pursue(phi.reshape(2, 4)[::-1], x, action)", "test_the_unknown_is_a_system"),
    "R unlike one": (LQR, "Params(log_q, jnp.zeros(2))", "Params(log_q, jnp.ones(2))", "test_the_unknown_is_a_system"),
    "drone ground for free": (DRONE, "+ ground", "+ 0 * ground", "test_the_drone_numbers"),
    "drone ground above": (DRONE, "jax.nn.sigmoid(-5 * x[1])", "jax.nn.sigmoid(5 * x[1])", "test_the_drone_numbers"),
    "never drawn": (
        HIDDEN, "draw(params_key, env.truth, env.spread)",
        "draw(params_key, env.truth, 1.0)", "test_every_episode_has_a_truth_of_its_own"),
}


def make(name, **options):
    return importlib.import_module(f"core.envs.{name}").Env(**options)


def start(name, seed=0, **options):
    """An environment and a state away from its start."""
    env = make(name, **options)
    state, _ = jax.jit(env.reset)(jax.random.key(seed))
    push = 0.3 * jax.random.normal(jax.random.key(seed + 100), state.x.shape)
    return env, state._replace(x=state.x + push)


def some_action(env, seed=0):
    low, high = np.float32(env.action_space.low), np.float32(env.action_space.high)
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_obeys_the_truth(name):
    env, state = start(name)
    beyond = jnp.float32(env.action_space.high) * 3 + 1
    clipped = jnp.float32(env.action_space.high)

    @jax.jit  # one program a system: to compile is what a test here costs
    def program(state):
        first = env.step(jax.random.key(1), state, beyond)
        last = env.step(jax.random.key(2), state._replace(t=jnp.int32(env.max_steps - 1)), clipped)
        x = env.dynamics(env.truth, state.x, clipped)
        return first, last, x, env.cost(state.x, clipped, x), env.dynamics(env.guess, state.x, clipped)

    (new, step), (_, last), expected, cost, guessed = program(state)
    np.testing.assert_allclose(new.x, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(step.obs, new.x)
    np.testing.assert_array_equal(step.next_obs, new.x)
    np.testing.assert_allclose(step.reward, -cost, rtol=1e-4)
    assert new.t == 1 and not step.terminated and not step.truncated
    assert last.truncated and not last.terminated
    assert jax.tree.structure(env.guess) == jax.tree.structure(env.truth)
    assert np.isfinite(guessed).all()
    jax.tree.map(np.testing.assert_array_equal, step.info["params"], env.truth)


@pytest.mark.parametrize("name, about", [*((name, "params") for name in NAMES),
                                         ("pursuit_evasion_lqr", "gain"), ("pursuit_evasion_lqr", "cost")])
def test_the_unknown_is_a_system(name, about):
    """Its φ moves the state as Params do, no error is left of the truth, and its indices are of φ and x. Also many
    at once, each with a truth of its own: a population of beliefs is a vmap away."""
    (env, state), unknown = start(name), make(name).unknown(about)
    xs = state.x[None] + 0.1 * jax.random.normal(jax.random.key(3), (3, *state.x.shape))
    actions = jnp.stack([some_action(env, i) for i in range(3)])
    every = unknown.informative == tuple(range(state.x.size))  # nothing to ask of a Jacobian
    jacobian = (lambda *_: jnp.eye(state.x.size)) if every else jax.jacfwd(unknown.dynamics)

    @jax.jit
    def program(xs, actions):
        params = jax.vmap(lambda key: hidden.draw(key, env.truth, 1.5))(jax.random.split(jax.random.key(0), 3))
        phi = jax.vmap(unknown.truth)(params)
        one = jax.tree.map(lambda leaf: leaf[2], params)
        opposite = phi[2] + jnp.where(jnp.arange(phi[2].size) == 0, 0.5, -0.5 * (jnp.arange(phi[2].size) == 1))
        return (jax.vmap(unknown.dynamics)(phi, xs, actions)[2], env.dynamics(one, xs[2], actions[2]),
                unknown.error(phi[2], one), unknown.error(opposite, one), unknown.reduce(unknown.guess),
                unknown.truth(env.guess), jacobian(phi[2], xs[2], actions[2]))

    moved, expected, none, some, guess, same, J = program(xs, actions)
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(guess, same, rtol=1e-6)
    assert none < 1e-6 and some > 0.01  # also where two differences have opposite signs
    assert unknown.error_name == ("gain_error" if name == "pursuit_evasion_lqr" else "parameter_error")
    assert all(max(pair) < guess.size for pair in unknown.shown.values()) and max(unknown.informative) < state.x.size
    assert np.linalg.matrix_rank(J) == np.linalg.matrix_rank(J[np.array(unknown.informative)])
    with pytest.raises(UserError, match="params"):
        env.unknown("weather")


def test_steps_of_many_are_those_of_one():
    env = make("damped_pendulum", spread=1.5, drift=0.1, process_noise=0.1, observation_noise=0.1, jump_step=1)
    keys, split = jax.random.split(jax.random.key(1), 3), jax.random.split(jax.random.key(1), 3)
    state, _ = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 3))
    together, alone = jax.jit(jax.vmap(env.step))(keys, state, jnp.ones((3, 1))), jax.jit(env.step)
    for i in range(3):
        one = alone(split[i], jax.tree.map(lambda leaf: leaf[i], state), jnp.ones(1))  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), together, one)  # noqa: B023


def test_every_episode_has_a_truth_of_its_own():
    env = Batch(make("damped_pendulum", spread=2.0, max_steps=2), 50)
    state, obs = env.reset(jax.random.key(0))
    first, step = np.asarray(state.env.params.log_inertia), jax.jit(env.step)
    state, _ = step(jax.random.key(1), state, jnp.zeros((50, 1)))
    np.testing.assert_array_equal(state.env.params.log_inertia, first)
    state, last = step(jax.random.key(2), state, jnp.zeros((50, 1)))
    assert last.truncated.all() and (state.env.params.log_inertia != first).all() and (state.env.t == 0).all()
    np.testing.assert_array_equal(last.obs, obs)
    assert (last.next_obs != last.obs).any(axis=1).all()


def params_of(env, num_steps, seed=0):
    """The truth at the start of each of num_steps + 1 steps, flat: [T + 1, n]."""
    state, _ = env.reset(jax.random.key(seed))
    truths = [state.params]
    step = jax.jit(env.step)
    for t in range(num_steps):
        state, _ = step(jax.random.key(1000 * seed + t), state, some_action(env))
        truths.append(state.params)
    return np.stack([jax.flatten_util.ravel_pytree(p)[0] for p in truths])


def test_the_truth_is_drawn_within_its_spread():
    env = make("merging_idm", spread=2.0)
    draws = jax.jit(jax.vmap(lambda key: env.reset(key)[0].params))(jax.random.split(jax.random.key(0), 4000))
    offset = np.stack(draws, axis=1) - np.stack(env.truth)
    limit = np.log(2)
    assert -limit <= offset.min() < -0.99 * limit and 0.99 * limit < offset.max() <= limit
    np.testing.assert_allclose(offset.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(offset.std(axis=0), limit / np.sqrt(3), rtol=0.03)
    assert np.abs(np.corrcoef(offset.T) - np.eye(4)).max() < 0.06
    np.testing.assert_array_equal(np.diff(params_of(env, 3), axis=0), 0)


def test_a_jump_comes_when_it_is_told():
    """After two steps: the third transition is the first one that obeys the new truth."""
    jumped = params_of(make("cartpole_swingup", jump_step=2, jump_by=(("log_pole_mass", 0.7),)), 4)
    np.testing.assert_allclose(np.diff(jumped, axis=0), np.outer([0, 1, 0, 0], [0, 0.7, 0, 0, 0, 0]), atol=1e-6)
    env = make("merging_idm", jump_step=2, spread=1.5)
    drawn = params_of(env, 4)
    assert (np.diff(drawn, axis=0) != 0).tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
    assert np.abs(drawn - np.stack(env.truth)).max() <= np.log(1.5) + 1e-6
    state = env.reset(jax.random.key(0))[0]._replace(t=jnp.int32(1))
    new, _ = env.step(jax.random.key(1), state, some_action(env))
    np.testing.assert_allclose(new.x, env.dynamics(state.params, state.x, some_action(env)), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_jump_after_the_end_is_refused(name):
    make(name, jump_step=9, max_steps=10)
    for step in (10, 11):
        with pytest.raises(UserError, match=f"jump_step = {step}"):
            make(name, jump_step=step, max_steps=10)


def test_what_is_revealed_is_what_the_next_step_obeys():
    """In the middle of a drift; and nothing else changes: not x, not the truth, not the rewards."""
    options = dict(spread=1.5, drift=0.1, process_noise=0.1, observation_noise=0.1)

    def episode(env):
        def step(state, key):
            new, ts = env.step(key, state, jnp.ones(2))
            return new, (state, ts)

        state, obs = env.reset(jax.random.key(0))
        _, (states, ts) = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 3))
        return states, jnp.concatenate([obs[None], ts.obs]), ts

    env = make("linear_tracking", reveal=True, **options)
    states, obs, ts = jax.jit(lambda: episode(env))()
    same, x, hiding = jax.jit(lambda: episode(make("linear_tracking", **options)))()
    jax.tree.map(np.testing.assert_array_equal, (states, ts.reward), (same, hiding.reward))
    split = hidden.split(env, obs)
    np.testing.assert_array_equal(split[0], x)
    for obeyed in (states.params, ts.info["params"], hiding.info["params"]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:-1], b, rtol=1e-6), split[1], obeyed)
    np.testing.assert_array_equal(ts.next_obs, ts.obs)
    assert hidden.split(make("linear_tracking"), x) == (x, None)
    np.testing.assert_array_equal(hidden.split(env, obs[0])[1].a, states.params.a[0])


def test_a_drift_is_a_random_walk():
    steps = np.diff(params_of(make("linear_tracking", drift=0.05), 60), axis=0)
    np.testing.assert_allclose(steps.std(), 0.05, rtol=0.06)
    assert abs(steps.mean()) < 0.006 and steps.std(axis=0).min() > 0.03


def test_noise_has_its_deviation():
    env, state = start("pursuit_evasion_lqr", process_noise=0.2, observation_noise=0.5)
    step = jax.jit(jax.vmap(lambda key: env.step(key, state, jnp.ones(2))))
    new, seen = step(jax.random.split(jax.random.key(0), 4000))
    moved = np.asarray(new.x) - np.asarray(env.dynamics(env.truth, state.x, jnp.ones(2)))
    blur = np.asarray(seen.obs) - np.asarray(new.x)
    np.testing.assert_allclose(moved.std(axis=0), 0.2, rtol=0.05)
    np.testing.assert_allclose(blur.std(axis=0), 0.5, rtol=0.05)
    assert np.abs(np.corrcoef(np.concatenate([moved, blur], axis=1).T) - np.eye(16)).max() < 0.07
    first = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(np.std(first[1] - first[0].x), 0.5, rtol=0.03)
    np.testing.assert_array_equal(first[0].x[:, [2, 3, 6, 7]], 0)


# pursuit_evasion_lqr

def test_the_lqr_pursuer_minimises_its_cost():
    env, state = start("pursuit_evasion_lqr", q=(10.0, 8.0, 1.0, 2.0), r=(0.1, 0.3))
    x, dt = np.asarray(state.x, np.float64), 0.1
    a = np.block([[np.eye(2), dt * np.eye(2)], [np.zeros((2, 2)), np.eye(2)]])
    b = np.vstack([dt**2 / 2 * np.eye(2), dt * np.eye(2)])
    q, r = np.diag([10.0, 8.0, 1.0, 2.0]), np.diag([0.1, 0.3])
    chase = scipy.optimize.minimize(lambda u: (a @ x[4:] + b @ u - x[:4]) @ q @ (a @ x[4:] + b @ u - x[:4]) + u @ r @ u,
                                    np.zeros(2), method="BFGS", options=dict(gtol=1e-9)).x
    u = np.array([1.5, -0.5])
    expected = np.concatenate([a @ x[:4] + b @ u, a @ x[4:] + b @ chase])
    np.testing.assert_allclose(env.dynamics(env.truth, state.x, jnp.float32(u)), expected, rtol=1e-4, atol=1e-4)
    gain = np.linalg.inv(r + b.T @ q @ b) @ b.T @ q
    np.testing.assert_allclose(env.gain_of(env.truth), gain, rtol=1e-5, atol=1e-7)
    half = np.random.default_rng(0).normal(size=(4, 4)) + 2 * np.eye(4)
    full = half @ half.T, np.array([[0.4, 0.1], [0.1, 0.3]])
    expected = np.linalg.solve(full[1] + b.T @ full[0] @ b, b.T @ full[0])
    np.testing.assert_allclose(env.gain(*map(jnp.float32, full)), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(env.gain_error(1.1 * env.gain_of(env.truth), env.truth), 0.1, rtol=1e-4)


def test_the_lqr_pursuer_of_infinite_horizon():
    """Against SciPy, for diagonal and for full matrices; the gap alone is fed back."""
    env, state = start("pursuit_evasion_lqr", q=(10.0, 8.0, 1.0, 2.0), r=(0.1, 0.3), infinite_horizon=True)
    a = np.kron([[1, 0.1], [0, 1]], np.eye(2))
    b = np.kron([[0.005], [0.1]], np.eye(2))

    def gain(q, r):
        p = scipy.linalg.solve_discrete_are(a, b, q, r)
        return np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)

    diagonal = gain(np.diag([10.0, 8.0, 1.0, 2.0]), np.diag([0.1, 0.3]))
    np.testing.assert_allclose(jax.jit(env.gain_of)(env.truth), diagonal, rtol=1e-3, atol=1e-5)
    half = np.random.default_rng(0).normal(size=(4, 4)) + 2 * np.eye(4)
    full = half @ half.T, np.array([[0.4, 0.1], [0.1, 0.3]])
    np.testing.assert_allclose(jax.jit(env.gain)(*map(jnp.float32, full)), gain(*full), rtol=1e-3, atol=1e-3)
    x, u = np.asarray(state.x, np.float64), np.array([1.5, -0.5])
    expected = np.concatenate([a @ x[:4] + b @ u, a @ x[4:] - b @ diagonal @ (x[4:] - x[:4])])
    moved = jax.jit(env.dynamics)(env.truth, state.x, jnp.float32(u))
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-3)


def test_the_lqr_numbers():
    """Gains worked out by hand: 0.005 · 10 / (0.1 + 0.005² · 10 + 0.1²) = 0.4535, 0.1 / 0.11025 = 0.9070."""
    env = make("pursuit_evasion_lqr")
    np.testing.assert_allclose(env.gain_of(env.truth), [[0.4535147, 0, 0.9070295, 0], [0, 0.4535147, 0, 0.9070295]],
                               rtol=1e-5)
    np.testing.assert_allclose(env.gain_of(env.guess)[0], [0.0049505, 0, 0.0990074, 0], rtol=1e-3)
    x, u = jnp.float32([1, 2, 0.5, -1, 4, -2, 1, 0]), jnp.float32([1.0, -2.0])
    # A x_p − x_e = (4.1 − 1, −2 − 2, 1 − 0.5, 0 + 1) = (3.1, −4, 0.5, 1); a_p = −(1.85941, −0.90703)
    ax, ay = -(0.4535147 * 3.1 + 0.9070295 * 0.5), -(0.4535147 * -4 + 0.9070295 * 1)
    expected = [1.055, 1.89, 0.6, -1.2, 4.1 + 0.005 * ax, -2 + 0.005 * ay, 1 + 0.1 * ax, 0.1 * ay]
    np.testing.assert_allclose(env.dynamics(env.truth, x, u), expected, rtol=1e-5)
    np.testing.assert_allclose(env.cost(x, u, x), -(9 + 16) + 10 * 5 + 5, rtol=1e-6)
    np.testing.assert_allclose(env.terminal_cost(x), -25, rtol=1e-6)
    starts = np.asarray(jax.vmap(env.start)(jax.random.split(jax.random.key(0), 1000)))
    np.testing.assert_array_equal(starts[:, [2, 3, 6, 7]], 0)
    np.testing.assert_allclose(starts[:, [0, 1, 4, 5]].std(axis=0), 10 / np.sqrt(3), rtol=0.06)


# linear_tracking, damped_pendulum

def test_the_linear_numbers():
    env = make("linear_tracking")
    x, u = jnp.float32([1, -1, 2, 3]), jnp.float32([1.0, 2.0])
    expected = [1 + 0.2 + 0.06 + 0.005 + 0.002, -1 - 0.03 + 0.3 - 0.0008 + 0.01,
                1.84 + 0.15 + 0.1 + 0.04, -0.08 + 2.64 - 0.015 + 0.2]
    np.testing.assert_allclose(env.dynamics(env.truth, x, u), expected, rtol=1e-5)
    np.testing.assert_allclose(env.cost(x, u, x), 1 + 36 + 4 + 9 + 5, rtol=1e-6)
    np.testing.assert_allclose(env.terminal_cost(x), 50, rtol=1e-6)
    np.testing.assert_allclose(env.parameter_error(env.guess, env.truth), 0.847, atol=5e-4)
    np.testing.assert_array_equal(env.start(jax.random.key(0)), 0)
    wide = jax.vmap(make("linear_tracking", start_width=15.0).start)(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(wide[:, :2].std(axis=0), 15 / np.sqrt(3), rtol=0.06)
    np.testing.assert_array_equal(wide[:, 2:], 0)


def test_the_pendulum_numbers():
    env = make("damped_pendulum", damping=0.4, inertia=2.0)
    x, u = jnp.float32([np.pi / 6, 2.0]), jnp.float32([3.0])
    spin = 2 + 0.05 * (3 - 0.4 * 2 - 9.81 * 0.5) / 2  # explicit Euler: the old spin moves the angle
    np.testing.assert_allclose(env.dynamics(env.truth, x, u), [np.pi / 6 + 0.1, spin], rtol=1e-5)
    np.testing.assert_allclose(env.cost(x, u, x), (5 * np.pi / 6) ** 2 + 0.4 + 0.09, rtol=1e-5)
    np.testing.assert_allclose(env.terminal_cost(x), (5 * np.pi / 6) ** 2 + 0.4, rtol=1e-5)
    np.testing.assert_allclose(env.parameter_error(env.guess, env.truth), 0.2 + 1.5, rtol=1e-5)


# merging_idm

def test_the_merging_numbers():
    env = make("merging_idm")
    dynamics, headway, braking, alertness, reach = jax.jit(env.dynamics), 2.0, 3.0, 3.0, 1.75
    for x in ([20.0, -1.2, 11.0, 0.5, 12.0, 9.0], [8.0, -3.5, 12.0, 0.0, 15.0, 10.0], [5.0, 0.1, 0.05, -1.0, 1.0, 0.1]):
        px, py, vx, vy, car, speed = x
        u = np.array([-1.0, 0.5])
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        heed = sigmoid(-alertness * (abs(py) - reach)) * sigmoid(px - car)
        gap = np.log1p(np.exp(heed * (px - car - 5) + (1 - heed) * 1000 - 0.1)) + 0.1 if heed > 0.5 else \
            heed * (px - car - 5) + (1 - heed) * 1000
        desired = 2 + speed * headway + speed * heed * (speed - vx) / (2 * np.sqrt(2 * braking))
        accel = 2 * (1 - (speed / 10) ** 4 - (desired / gap) ** 2)
        expected = [px + 0.1 * vx - 0.005, py + 0.1 * vy + 0.0025, max(vx - 0.1, 0), vy + 0.05,
                    car + 0.1 * speed + 0.005 * accel, max(speed + 0.1 * accel, 0)]
        np.testing.assert_allclose(dynamics(env.truth, jnp.float32(x), jnp.float32(u)), expected, rtol=1e-4)
    assert expected[2] == 0  # the agent's car has come to rest, and does not go backwards
    env = make("merging_idm", headway=60.0, alertness=20.0, reach=5.0)
    stuck = env.dynamics(env.truth, jnp.float32([10.0, 0.0, 0, 0, 1.0, 0.1]), jnp.zeros(2))
    assert stuck[5] == 0  # the other one brakes harder than it has speed left, and neither does it


def test_the_merging_violations():
    env = make("merging_idm")
    table = [(20.0, 0.5, 0), (10.0, 0.5, 2), (14.0, 1.5, 1), (5.0, 0.5, 1), (5.0, -1.5, 0), (5.0, -7.1, 1),
             (20.0, 3.6, 1), (16.9, 1.9, 1), (17.1, 1.9, 0)]
    for px, py, count in table:
        car = 12.0
        x, u = jnp.float32([px, py, 12.0, 2.0, car, 10.0]), jnp.float32([1.0, -1.0])
        assert env.violations(x) == count, (px, py)
        np.testing.assert_allclose(env.cost(x, u, x), py**2 + 40 + 0.4 + 0.02 + 5e6 * count, rtol=1e-5)
        np.testing.assert_allclose(env.terminal_cost(x), 1e4 * py**2 + 5e6 * count, rtol=1e-5)


def test_the_reach_is_one_number():
    """Near the lane, the world's car and a learner with the true parameters yield alike, with no d left over."""
    env = make("merging_idm")
    np.testing.assert_allclose(np.exp(env.truth.log_reach), 1.75, rtol=1e-6)
    np.testing.assert_allclose(env.parameter_error(env.guess, env.truth), 1.5 + 2 + 2 + 1.25, rtol=1e-5)


# unicycle_pursuit

def best_chase(w, x, dt=0.1):
    """The whole problem of four controls, minimised by BFGS from rest: the first (a, ω)."""
    ex, ey, evx, evy, px, py, speed, heading = np.asarray(x, np.float64)

    def cost(controls):
        p, s, h, total = np.array([px, py]), speed, heading, 0.1 * speed**2
        for k, (a, turn) in enumerate(controls.reshape(2, 2), start=1):
            p, s, h = p + dt * s * np.array([np.cos(h), np.sin(h)]), s + dt * a, h + dt * turn
            miss = p - np.array([ex + k * dt * evx, ey + k * dt * evy])
            total += w * miss @ miss + 0.2 * (a**2 + turn**2) + 0.1 * s**2
        return total

    return scipy.optimize.minimize(cost, np.zeros(4), method="BFGS", options=dict(gtol=1e-8)).x[:2]


@pytest.mark.parametrize("x", [
    [-5, -5, 0, 0, 5, 5, 0, 0], [-3, 2, 1, -1, 1, 1, 2, 0.5], [-3, 2, 1, -1, 1, 1, 4, 2.5],
    [4, 0, 0, 1, 0, 0, -2, 0.3], [-18, 12, 0, 0, 5, -9, 3, 1.9]])
def test_the_unicycle_solves_its_problem(x):
    env, x = make("unicycle_pursuit"), jnp.float32(x)
    w, u, dt = 2.0, jnp.float32([1.0, -2.0]), 0.1
    accel, turn = best_chase(w, x)
    ex, ey, evx, evy, px, py, speed, heading = np.asarray(x, np.float64)
    expected = [ex + dt * evx + 0.005, ey + dt * evy - 0.01, evx + 0.1, evy - 0.2, px + dt * speed * np.cos(heading),
                py + dt * speed * np.sin(heading), speed + dt * accel, heading + dt * turn]
    np.testing.assert_allclose(jax.jit(env.dynamics)(env.truth, x, u), expected, rtol=1e-3, atol=1e-4)
    upper, lower = best_chase(w * 1.02, x), best_chase(w / 1.02, x)
    slope = dt * (upper - lower) / (2 * np.log(1.02))
    for differentiate in (jax.jacfwd, jax.jacrev):
        got = jax.jit(differentiate(env.dynamics))(env.truth, x, u).log_eagerness
        np.testing.assert_allclose(got[6:], slope, rtol=0.01, atol=2e-4)
        np.testing.assert_array_equal(got[:6], 0)


def test_the_unicycle_numbers():
    env = make("unicycle_pursuit")
    x, u = jnp.float32([1, 2, 0.5, -1, 4, -2, 1, 0]), jnp.float32([1.0, -2.0])
    np.testing.assert_allclose(env.cost(x, u, x), -25 + 50 + 5, rtol=1e-6)
    np.testing.assert_allclose(env.terminal_cost(x), -25, rtol=1e-6)
    np.testing.assert_allclose(env.parameter_error(env.guess, env.truth), 1.0, rtol=1e-5)
    assert unicycle_pursuit.EFFORT == 0.2 and unicycle_pursuit.SLOWNESS == 0.1


# planar_drone_wind

def test_the_drone_numbers():
    env = make("planar_drone_wind", wind=5.0, direction=float(np.arctan2(-3, 4)), drag=0.3)
    x, u = jnp.float32([1, 2, 0.4, -1, 0.5, 2]), jnp.float32([6.0, 7.0])
    accel = np.array([13 * np.sin(0.4) + 4, 13 * np.cos(0.4) - 9.81 - 3,
                      2.5 * 1 + 3 * (-3 * np.sin(0.4) - 4 * np.cos(0.4))])
    velocity = np.array([-1, 0.5, 2]) + 0.02 * accel
    expected = np.concatenate([np.array([1, 2, 0.4]) + 0.02 * velocity, velocity])
    np.testing.assert_allclose(env.dynamics(env.truth, x, u), expected, rtol=1e-5)
    np.testing.assert_allclose(env.thrust(x, u) + env.residual(env.truth, x), accel, rtol=1e-5)
    np.testing.assert_allclose(env.features(x), [-1, 0.5, 0.4], rtol=1e-6)
    tracking = 1 + 64 + 0.16 + 0.5 + 0.125 + 4
    np.testing.assert_allclose(env.terminal_cost(x), tracking, rtol=1e-5)
    np.testing.assert_allclose(env.cost(x, u, x), tracking + 0.85 + 1e3 / (1 + np.exp(10)), rtol=1e-5)
    assert env.cost(env.start(jax.random.key(0)), u, x) < 100  # 81 of it for the way to the goal
    fallen = x.at[1].set(-100.0)
    np.testing.assert_allclose(env.cost(fallen, u, x) - env.terminal_cost(fallen), 1000.85, rtol=1e-5)
    np.testing.assert_allclose(np.exp(make("planar_drone_wind").guess.log_wind), 5, rtol=1e-5)


# cartpole_balance

def test_the_balance_numbers():
    """The two equations as one linear system in the accelerations, float64."""
    cart, pole, half, force = 1.5, 0.4, 0.7, 8.0
    env = make("cartpole_balance", cart_mass=cart, pole_mass=pole, half_length=half, force=force)
    dynamics = jax.jit(env.dynamics)
    for x, u in (([0.3, -1.0, 0.9, 3.0], -0.6), ([0.0, 0.5, -2.5, -4.0], 1.0)):
        _, speed, angle, spin = x
        moment = pole * half
        mass = [[cart + pole, moment * np.cos(angle)], [moment * np.cos(angle), 4 / 3 * moment * half]]
        accel, turn = np.linalg.solve(mass, [force * u + moment * np.sin(angle) * spin**2,
                                             moment * 9.8 * np.sin(angle)])
        expected = np.array(x) + 0.02 * np.array([speed, accel, spin, turn])
        np.testing.assert_allclose(dynamics(env.truth, jnp.float32(x), jnp.float32([u])), expected, rtol=2e-6)
    np.testing.assert_allclose(np.exp(make("cartpole_balance").truth), [1, 0.1, 0.5, 10], rtol=1e-6)
    starts = np.asarray(jax.vmap(env.start)(jax.random.split(jax.random.key(0), 1000)))
    np.testing.assert_allclose([starts.min(0), starts.max(0)], [[-0.05] * 4, [0.05] * 4], atol=1e-3)


@pytest.mark.parametrize("x, fallen", [
    ([2.39, 0, 0, 0], False), ([2.39, 1, 0, 0], True), ([-2.39, -1, 0, 0], True), ([0, 0, 0.205, 0], False),
    ([0, 0, 0.2, 1], True), ([0, 0, -0.2, -1], True), ([2.41, -1, 0, 0], False), ([0, 0, 0.22, -1], False)])
def test_the_balance_ends_where_it_falls(x, fallen):
    """Of the next state, on both sides, and never by the time limit too."""
    env, step = make("cartpole_balance"), jax.jit(make("cartpole_balance").step)
    state, _ = env.reset(jax.random.key(0))
    for t in (0, 199):
        _, last = step(jax.random.key(1), state._replace(x=jnp.float32(x), t=jnp.int32(t)), jnp.zeros(1))
        assert (last.terminated, last.truncated, last.reward) == (fallen, t == 199 and not fallen, 1 - fallen)


# cartpole_swingup

def cartpole_slope(x, u, cart=10.471976, pole=5.018585, half=0.3, gain=100.0, drag=1.0, friction=1.0):
    """The two equations as one linear system in the accelerations, float64."""
    _, angle, speed, spin = x
    moment = pole * half
    mass = np.array([[cart + pole, -moment * np.cos(angle)],
                     [-moment * np.cos(angle), 0.18874907 / (5.018585 * 0.09) * pole * half**2 + pole * half**2]])
    force = np.array([gain * u - drag * speed - moment * np.sin(angle) * spin**2,
                      -friction * spin - pole * 9.81 * half * np.sin(angle)])
    return np.array([speed, spin, *np.linalg.solve(mass, force)])


def cartpole_energy(x, cart=10.471976, pole=5.018585, half=0.3):
    """Kinetic and potential, from the velocity of the pole's centre."""
    position, angle, speed, spin = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    across, up = speed - half * np.cos(angle) * spin, half * np.sin(angle) * spin
    inertia = 0.18874907 / (5.018585 * 0.09) * pole * half**2
    return 0.5 * (cart * speed**2 + pole * (across**2 + up**2) + inertia * spin**2) - pole * 9.81 * half * np.cos(angle)


def simulate(env, x, actions):
    def step(x, action):
        x = env.dynamics(env.truth, x, action)
        return x, x

    return np.concatenate([x[None], jax.jit(lambda x, a: jax.lax.scan(step, x, a)[1])(x, actions)])


def test_the_cartpole_numbers():
    env = make("cartpole_swingup", cart_mass=8.0, pole_mass=3.0, half_length=0.4, gain=70.0, cart_damping=0.5,
               pole_damping=2.0)
    x, u, h = np.array([0.3, 2.0, -1.0, 3.0]), 1.7, 0.02
    slope = functools.partial(cartpole_slope, u=u, cart=8.0, pole=3.0, half=0.4, gain=70.0, drag=0.5, friction=2.0)
    state = x
    for _ in range(2):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(jax.jit(env.dynamics)(env.truth, jnp.float32(x), jnp.float32([u])), state, rtol=2e-5)
    tip = state[0] - 0.6 * np.sin(state[1]), -0.6 * np.cos(state[1])
    reward = np.exp(-(tip[0] ** 2 + (tip[1] - 0.6) ** 2) / 0.36) - 0.01 * u**2
    cost = env.cost(jnp.float32(x), jnp.float32([u]), jnp.float32(state))
    np.testing.assert_allclose(-cost, reward, rtol=1e-4)
    assert env.terminal_cost(jnp.float32(x)) == 0
    np.testing.assert_allclose(env.features(jnp.float32(x)), [np.sin(2), np.cos(2), 0.3, -1, 3], rtol=1e-6)
    np.testing.assert_allclose(-env.cost(jnp.zeros(4), jnp.zeros(1), jnp.float32([0, np.pi, 0, 0])), 1, rtol=1e-6)


def test_the_cartpole_keeps_its_energy():
    none = 1e-12  # a logarithm is hidden, so no damping at all has to be very little
    env = make("cartpole_swingup", cart_damping=none, pole_damping=none)
    path = simulate(env, jnp.float32([0.0, 2.5, 0.5, -1.0]), jnp.zeros((200, 1)))
    np.testing.assert_allclose(cartpole_energy(path), cartpole_energy(path[0]), atol=0.01)
    assert np.ptp(path[:, 1]) > 2  # it did swing
    env = make("cartpole_swingup", dt=0.0005, substeps=1)
    path = simulate(env, jnp.float32([0.0, 2.5, 0.5, -1.0]), jnp.full((2000, 1), 0.2))
    work = 100 * 0.2 * (path[-1, 0] - path[0, 0])
    heat = 0.0005 * (np.square(path[:, 2]) + np.square(path[:, 3])).sum()
    np.testing.assert_allclose(cartpole_energy(path)[-1] - cartpole_energy(path)[0], work - heat, atol=0.05)


@pytest.mark.slow
def test_the_planner_swings_the_cartpole_up_with_the_true_model():
    """146 plans a step; 97 score 177 to 179, 2,000 score 182, and the ceiling is 183."""
    env = cartpole_swingup.Env()
    low, high = jnp.full(1, -3.0), jnp.full(1, 3.0)

    def step(loop, key):
        state, carry = loop
        cost_fn = functools.partial(planning.trajectory_cost, functools.partial(env.dynamics, state.params), env.cost,
                                    env.terminal_cost, state.x)
        plan_key, env_key = jax.random.split(key)
        carry, action, _ = planning.icem(plan_key, cost_fn, carry, low, high, num_samples=60, num_elites=10,
                                         num_iterations=3)
        state, timestep = env.step(env_key, state, action)
        return (state, carry), timestep.reward

    @jax.jit
    @jax.vmap
    def episode(key):
        reset_key, key = jax.random.split(key)
        loop = env.reset(reset_key)[0], planning.initial_carry(low, high, 25, 3)
        return jax.lax.scan(step, loop, jax.random.split(key, env.max_steps))[1].sum()

    with jax.debug_key_reuse(False):
        returns = np.asarray(episode(jax.random.split(jax.random.key(0), 4)))
    assert returns.mean() >= 178 and returns.max() < 183.5, returns


MUJOCO = """
<mujoco>
  <option gravity="0 0 -9.81" integrator="RK4" timestep="0.02"/>
  <worldbody>
    <body name="cart">
      <joint type="slide" axis="1 0 0" damping="1"/>
      <geom type="capsule" size="0.1 0.1" density="1000" contype="0" conaffinity="0"/>
      <body name="pole">
        <joint type="hinge" axis="0 1 0" damping="1"/>
        <geom type="capsule" fromto="0 0 0 0 0 -0.6" size="0.049" density="1000" contype="0" conaffinity="0"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


def test_the_cartpole_is_that_of_mujoco():
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(MUJOCO)
    data = mujoco.MjData(model)
    env = cartpole_swingup.Env()
    np.testing.assert_allclose(model.body_mass[1:], [env.cart_mass, env.pole_mass], rtol=1e-6)
    x = np.array([0.1, 0.3, -0.2, 0.5])
    actions = np.random.default_rng(0).uniform(-3, 3, (60, 1)).astype(np.float32)
    data.qpos[:], data.qvel[:] = x[:2], x[2:]
    expected = [x]
    for action in actions:
        data.qfrc_applied[0] = 100 * action[0]
        for _ in range(2):
            mujoco.mj_step(model, data)
        expected.append(np.concatenate([data.qpos, data.qvel]))
    got = simulate(env, jnp.float32(x), jnp.asarray(actions))
    np.testing.assert_allclose(got[:20], expected[:20], atol=1e-4)
    np.testing.assert_allclose(got, expected, atol=5e-3)


NUMBERS = dict(  # of the environments as their sources have them, in the order of the settings
    cartpole_balance=(1.0, 0.1, 0.5, 10.0, 0.02, 200),
    cartpole_swingup=(10.471976, 5.018585, 0.3, 100.0, 1.0, 1.0, 0.6, 0.02, 2, 200),
    damped_pendulum=(0.5, 1.0, 9.81, 5.0, 0.05, 400),
    linear_tracking=(((1.0, 0.0, 0.1, 0.02), (0.0, 1.0, -0.015, 0.1), (0.0, 0.0, 0.92, 0.05), (0.0, 0.0, -0.04, 0.88)),
                     ((0.005, 0.001), (-0.0008, 0.005), (0.1, 0.02), (-0.015, 0.1)), (0.0, 5.0, 0.0, 0.0), 0.0, 2.0,
                     1.0, 90),
    merging_idm=(2.0, 3.0, 3.0, 1.75, 10.0, 2.0, 2.0, 5.0, 0.0, 5e6, 1e4, 0.1, 300),
    planar_drone_wind=(10.0, 0.0, 0.2, 1.0, 0.1, 0.25, 9.81, 20.0, (0.0, 10.0, 0.0, 0.0, 0.0, 0.0),
                       (1.0, 1.0, 1.0, 0.5, 0.5, 1.0), 1000.0, 0.02, 300),
    pursuit_evasion_lqr=((10.0, 10.0, 1.0, 1.0), (0.1, 0.1), 2.0, 10.0, 10.0, False, 0.1, 250),
    unicycle_pursuit=(2.0, 2.0, 10.0, 12, 0.1, 100))
OFF = dict(spread=1.0, jump_step=0, jump_by=(), drift=0.0, process_noise=0.0, observation_noise=0.0, reveal=False)


@pytest.mark.parametrize("name", NUMBERS)
def test_settings_are_those_of_the_source(name):
    settings = dataclasses.asdict(importlib.import_module(f"core.envs.{name}").Env())
    assert settings.items() >= OFF.items()
    assert tuple(value for key, value in settings.items() if key not in OFF) == NUMBERS[name]


def test_a_merge_starts_where_it_should():
    start = importlib.import_module("core.envs.merging_idm").Env().start(jax.random.key(0))
    np.testing.assert_array_equal(start, [8.0, -3.5, 12.0, 0.0, 15.0, 10.0])


@pytest.mark.parametrize("name", ["cartpole_swingup", "planar_drone_wind"])
def test_features_are_those_of_each_state_of_a_batch(name):
    env = importlib.import_module(f"core.envs.{name}").Env()
    size = jax.eval_shape(env.start, jax.random.key(0)).size
    states = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, size)))
    each = [[env.features(x) for x in row] for row in states]
    np.testing.assert_allclose(env.features(states), np.array(each), rtol=1e-6)
