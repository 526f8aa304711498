"""The stationary regulator against SciPy, value iteration and differences, in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from core.envs import riccati

RICCATI = "core/envs/riccati.py"
PLANTED_ERRORS = {
    "too few doublings": (RICCATI, "DOUBLINGS = 20", "DOUBLINGS = 12"),
    "unsettled, and silent": (RICCATI, "jnp.where(settled, P, jnp.nan)", "P"),
    "settled if the transition is small alone": (RICCATI, " | (change <= small * jnp.abs(P).max())", ""),
    "ends too early": (RICCATI, "jnp.abs(state[1]).max() > small", "jnp.abs(state[1]).max() > small**0.1"),
    "H downdated": (RICCATI, "H + change, jnp.abs", "H - change, jnp.abs"),
    "G not whitened": (RICCATI, "A @ (G - left.T @ left) @ A.T", "A @ G @ A.T"),
    "A of one step": (RICCATI, "return k + 1, A @ WA,", "return k + 1, A @ A,"),
    "derivative without R": (RICCATI, "dQ + K.T @ dR @ K + moved", "dQ + moved"),
    "derivative without the gain": (RICCATI, "P @ (dA - dB @ K)", "P @ dA"),
    "derivative of one side": (RICCATI, "moved + moved.T", "moved"),
    "derivative without the loop closed": (RICCATI, "F = A - B @ K", "F = A"),
    "derivative of one step": (RICCATI, "M + F.T @ M @ F, F @ F", "M + F.T @ M @ F, F"),
    "gain of the present state": (RICCATI, "B.T @ P @ A)", "B.T @ P)"),
    "nothing left is something": (RICCATI, "jnp.where(pivot > tiny[i],", "jnp.where(pivot > -1,"),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(n, m, seed, rank=None):
    """A stabilisable, detectable one with an unstable A; Q of `rank`, coupled, R correlated."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A = 1.1 * A / np.abs(np.linalg.eigvals(A)).max()
    C, D = rng.normal(size=(n, rank or n)), rng.normal(size=(m, m))
    return A, rng.normal(size=(n, m)), C @ C.T, D @ D.T + 0.1 * np.eye(m)


def double_integrator(q, r, dt=0.1):
    return np.array([[1, dt], [0, 1]]), np.array([[dt**2 / 2], [dt]]), np.diag(q), np.array([[r]])


CASES = [problem(1, 1, 0), problem(2, 1, 1), problem(4, 2, 2), problem(4, 2, 3, rank=1), problem(10, 3, 4),
         double_integrator((10.0, 1.0), 0.1), double_integrator((1e-3, 1e-3), 1.0), double_integrator((1.0, 0.0), 10.0),
         (np.diag([1.0, 0.5]), np.eye(2), np.diag([1e-3, 1.0]), np.eye(2))]  # two systems apart


@pytest.mark.parametrize("case", CASES)
def test_it_solves_the_riccati_equation(case):
    P, K = jax.jit(lambda *case: (riccati.solve(*case), riccati.gain(*case)))(*case)
    A, B, Q, R = case
    expected = scipy.linalg.solve_discrete_are(A, B, Q, R)
    np.testing.assert_allclose(P, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    gain = np.linalg.solve(R + B.T @ expected @ B, B.T @ expected @ A)
    np.testing.assert_allclose(K, gain, rtol=1e-8, atol=1e-8 * np.abs(gain).max())


def outputs(x, case):
    """All that there is to differentiate, of symmetric changes."""
    A, B, Q, R = jax.tree.map(jnp.add, tuple(case), x)
    case = A, B, (Q + Q.T) / 2, (R + R.T) / 2
    return jnp.concatenate([riccati.solve(*case).ravel(), riccati.gain(*case).ravel()])


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5]])  # Q > 0, which a small change leaves so
def test_the_derivative_is_that_of_differences(case):
    rng = np.random.default_rng(0)
    direction = tuple(rng.normal(size=x.shape) for x in case)
    zero = tuple(np.zeros_like(x) for x in case)
    f = jax.jit(outputs)
    _, slope = jax.jit(lambda x, dx: jax.jvp(lambda x: outputs(x, case), (x,), (dx,)))(zero, direction)
    ahead, behind = (f(tuple(sign * 1e-5 * d for d in direction), case) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6 * np.abs(slope).max())


def iterated(A, B, Q, R, steps):
    def step(P, _):
        K = jnp.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
        return Q + A.T @ P @ (A - B @ K), None

    P, _ = jax.lax.scan(step, Q, None, steps)
    return P


def test_the_gradient_is_that_of_value_iteration_and_the_jacobian_too():
    case = double_integrator((10.0, 1.0), 0.1)
    weight = np.random.default_rng(0).normal(size=(2, 2))

    def loss(solver, log_q, log_r, A):
        return jnp.sum(weight * solver(A, jnp.asarray(case[1]), jnp.diag(jnp.exp(log_q)), jnp.exp(log_r)[None, None]))

    args = jnp.log(jnp.array([10.0, 1.0])), jnp.log(0.1), jnp.asarray(case[0])
    unrolled = jax.jit(jax.grad(lambda *args: loss(lambda *case: iterated(*case, 300), *args), (0, 1, 2)))(*args)
    for differentiate in (jax.grad, jax.jacfwd):
        implicit = jax.jit(differentiate(lambda *args: loss(riccati.solve, *args), (0, 1, 2)))(*args)
        for mine, theirs in zip(implicit, unrolled, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)


def test_many_are_solved_at_once_and_float32_does():
    cases = [double_integrator((10.0**a, 10.0**b), 1.0) for a in (-2, 0, 2) for b in (-2, 0, 2)]
    stacked = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*cases, strict=True)]
    K = jax.jit(jax.vmap(riccati.gain))(*stacked)
    assert K.dtype == jnp.float32
    for mine, (A, B, Q, R) in zip(K, cases, strict=True):
        P = scipy.linalg.solve_discrete_are(A, B, Q, R)
        np.testing.assert_allclose(mine, np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A), rtol=2e-3)


@pytest.mark.parametrize("dtype, tol", [(np.float32, 2e-3), (np.float64, 1e-8)])
@pytest.mark.parametrize("q", [1e-3, 1e-9])
def test_a_regulator_at_the_margin_is_solved_too(q, dtype, tol):
    """A = B = R = 1: P² = q P + q, and dP/dq = (P + 1) / (2 P − q)."""
    P = (q + np.sqrt(q**2 + 4 * q)) / 2
    one = jnp.ones((1, 1), dtype)
    found, slope = jax.jit(jax.value_and_grad(lambda q: riccati.solve(one, one, q * one, one)[0, 0]))(dtype(q))
    np.testing.assert_allclose(found, P, rtol=tol)
    np.testing.assert_allclose(slope, (P + 1) / (2 * P - q), rtol=tol)


def test_what_has_not_settled_is_not_a_number():
    """A cost too small, or a state that grows and that nothing moves; what stays and costs nothing has P = 0."""
    one, solve = jnp.ones((1, 1)), jax.jit(riccati.solve)
    assert np.isnan(solve(one, one, 1e-16 * one, one)).all()
    assert np.isnan(solve(1.5 * one, 0 * one, one, one)).all()
    apart = jnp.diag(jnp.array([1.5, 0.5]))  # one of two systems
    assert np.isnan(solve(apart, jnp.array([[0.0], [1.0]]), jnp.eye(2), one)).all()
    idle = solve(jnp.diag(jnp.array([0.5, 1.0])), jnp.array([[1.0], [0.0]]), jnp.diag(jnp.array([2.0, 0.0])), one)
    P = np.roots([1.0, 1 - 0.25 - 2.0, -2.0]).max()  # P = 2 + P / 4 − (P / 2)² / (1 + P)
    np.testing.assert_allclose(idle, np.diag([P, 0.0]), rtol=1e-8, atol=1e-12)


def test_nothing_of_it_is_lapack():
    case = [jnp.asarray(x) for x in CASES[2]]
    text = jax.jit(jax.vmap(jax.jacfwd(riccati.gain, (2, 3)), (0, None, None, None))).lower(case[0][None], *case[1:])
    assert "custom_call" not in text.as_text()
