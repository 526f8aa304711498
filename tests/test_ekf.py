"""core/ekf.py against textbook filters, batch regression, and the statistics a calibrated belief must have."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import chi2

from core import ekf

PLANTED_ERRORS = {
    "rotated the wrong way": (
        "core/ekf.py", "(sign * cos * tangent)", "(-sign * cos * tangent)",
        "test_eigenvectors_are_those_of_numpy"),
    "largest eigenvalues first": (
        "core/ekf.py", "jnp.argsort(jnp.diagonal(A))]", "jnp.argsort(-jnp.diagonal(A))]",
        "test_eigenvectors_are_those_of_numpy"),
    "half of the pairs never meet": (
        "core/ekf.py", "np.roll(players[1:], 1)", "np.roll(players[1:], 0)",
        "test_eigenvectors_are_those_of_numpy"),
    "innovation sign": (
        "core/ekf.py", "H, obs - pred - H @", "H, pred - obs - H @",
        "test_linear_gaussian_is_the_kalman_filter"),
    "observation counted at every iteration": (
        "core/ekf.py", "(1, num_iterations, again, (start, posterior))\n    return posterior.replace(mean=mean), info",
        "(1, num_iterations, again, (start, posterior))\n    return condition(posterior, "
        "*linearize(h, belief, mean)[1:], 0 * obs, R)[0].replace(mean=mean), info",
        "test_iterations_do_not_count_an_observation_twice"),
    "iterated innovation without the shift": (
        "core/ekf.py", " - H @ (prior - point), R)", ", R)",
        "test_iterated_update_finds_the_maximum_a_posteriori"),
    "Gauss-Newton steps not halved": (
        "core/ekf.py", "0.5 ** jnp.arange(8)", "jnp.ones(8)",
        "test_a_sharply_bent_observation_is_iterated_to_its_maximum_too"),
    "prior forgotten where steps are halved": (
        "core/ekf.py", "residual @ residual + pull @ (mean - prior)", "residual @ residual",
        "test_a_sharply_bent_observation_is_iterated_to_its_maximum_too"),
    "decay not squared": (
        "core/ekf.py", "cov=decay**2 * self.cov", "cov=decay * self.cov",
        "test_linear_gaussian_is_the_kalman_filter"),
    "noise dropped": (
        "core/ekf.py", "self.cov + jnp.diag(noise))", "self.cov)",
        "test_noise_schedule_is_a_value_per_call"),
    "half the gain": (
        "core/ekf.py", "belief.mean + matmul(z, W)", "belief.mean + 0.5 * matmul(z, W)",
        "test_linear_gaussian_is_the_kalman_filter"),
    "the covariance in float32 alone": (
        "core/ekf.py", "- high[name]).astype(dtype) for", "- high[name]).astype(dtype) * (name != 'cov') for",
        "test_observed_variances_in_float32_are_those_of_float64"),
    "the mean in float32 alone": (
        "core/ekf.py", "- high[name]).astype(dtype) for", "- high[name]).astype(dtype) * (name != 'mean') for",
        "test_small_changes_of_a_large_mean_add_up"),
    "computed in float32": (
        "core/ekf.py", "with jax.enable_x64(True):", "with jax.enable_x64(False):",
        "test_observed_variances_in_float32_are_those_of_float64"),
    "no floor": (
        "core/ekf.py", "FLOOR = 2.0**-40", "FLOOR = 0 * 2.0**-40", "test_positive_definite_after_1e5_float32_steps"),
    "a floor that anybody meets": (
        "core/ekf.py", "FLOOR = 2.0**-40", "FLOOR = 2.0**-20",
        "test_observed_variances_in_float32_are_those_of_float64"),
    "the floor not in the gain": (
        "core/ekf.py", "HP + H * added[None]", "HP", "test_what_is_observed_too_well_stays_at_the_floor"),
    "the unobserved counted": (
        "core/ekf.py", "math.log(2 * math.pi) * seen.sum()", "math.log(2 * math.pi) * seen.size",
        "test_a_component_of_infinite_variance_is_as_if_it_were_not_there"),
    "the unobserved in the determinant": (
        "core/ekf.py", "        R = jnp.where(seen, R, 1.0)\n", "",
        "test_a_component_of_infinite_variance_is_as_if_it_were_not_there"),
    "an infinite variance in a matrix": (
        "core/ekf.py", "jnp.where(seen[:, None] & seen[None], R,", "jnp.where(True, R,",
        "test_a_component_of_infinite_variance_is_as_if_it_were_not_there"),
    "what is not observed is read": (
        "core/ekf.py", "*[1] * (x.ndim - 1)), x, 0.0)", "*[1] * (x.ndim - 1)), x, x)",
        "test_a_component_of_infinite_variance_is_as_if_it_were_not_there"),
    "determinant missing from the likelihood": (
        "core/ekf.py", " - information - log_scale,", " - log_scale,",
        "test_linear_gaussian_is_the_kalman_filter"),
    "noise missing from the likelihood": (
        "core/ekf.py", " - information - log_scale,", " - information,",
        "test_linear_gaussian_is_the_kalman_filter"),
    "forgetting inverted": (
        "core/ekf.py", "1.0, 1.0 / factor)", "1.0, factor)",
        "test_forgetting_is_weighted_least_squares"),
    "no trace cap": (
        "core/ekf.py", "jnp.clip(max_trace / belief.var.sum(), 1.0, 1.0 / factor)", "1.0 / factor",
        "test_forgetting_stops_at_the_cap_and_never_shrinks"),
    "trace cap shrinks": (
        "core/ekf.py", "belief.var.sum(), 1.0, 1.0", "belief.var.sum(), 0.0, 1.0",
        "test_forgetting_stops_at_the_cap_and_never_shrinks"),
    "residual before the update": (
        "core/ekf.py", "obs - pred) + spread(", "obs - pred) - spread(",
        "test_measurement_noise_is_found_from_residuals"),
    "process noise from learning": (
        "core/ekf.py", " + posterior.var - pred.var", "",
        "test_process_noise_is_found_from_innovations"),
    "variance for standard deviation": (
        "core/ekf.py", "x * jax.lax.rsqrt(R)", "x / R",
        "test_linear_gaussian_is_the_kalman_filter"),
    "diagonal of the wrong precision": (
        "core/ekf.py", "self.var * jnp.square(H).sum(axis=0)", "self.var * jnp.abs(H).sum(axis=0)",
        "test_diagonal_keeps_the_diagonal_of_the_exact_precision"),
    "low rank keeps the shortest": (
        "core/ekf.py", "eigenvectors(matmul(wide.T, wide))", "eigenvectors(-matmul(wide.T, wide))",
        "test_low_rank_keeps_the_longest_directions_and_the_diagonal"),
    "low rank drops the rest": (
        "core/ekf.py", "self.precision + jnp.square(dropped).sum(axis=1)", "self.precision",
        "test_low_rank_keeps_the_longest_directions_and_the_diagonal"),
    "low rank forgets the factor": (
        "core/ekf.py", "self.factor / jnp.sqrt(scale)", "self.factor / scale",
        "test_low_rank_with_full_rank_is_exact"),
    "low rank noise unscaled": (
        "core/ekf.py", "(precision * noise)[:, None]", "(precision + noise)[:, None]",
        "test_low_rank_with_full_rank_is_exact"),
    "elimination skips a row": (
        "core/ekf.py", "for j in range(i + 1, d):", "for j in range(i + 2, d):",
        "test_elimination_and_lapack_agree_with_numpy"),
}

condition = jax.jit(lambda *args: ekf.condition(*args)[:2])
FORMS = {
    "full": ekf.Full.create,
    "diagonal": ekf.Diagonal.create,
    "low rank": functools.partial(ekf.LowRank.create, rank=3),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def linear_problem(n, d, T, seed=0, dtype=np.float64):
    """H [T, d, n], y [T, d], R [d, d]."""
    rng = np.random.default_rng(seed)
    H, theta, root = rng.normal(size=(T, d, n)), rng.normal(size=n), rng.normal(size=(d, d))
    R = 0.1 * root @ root.T + 0.1 * np.eye(d)
    y = H @ theta + rng.multivariate_normal(np.zeros(d), R, size=T)
    return tuple(x.astype(dtype) for x in (H, y, R))


def kalman(H, y, R, mean, cov, decay=1.0, noise=0.0):
    """The textbook, in float64: also log p(y_1:T)."""
    log_lik = 0.0
    for H_t, y_t in zip(np.float64(H), np.float64(y), strict=True):
        mean, cov = decay * mean, decay**2 * cov + noise * np.eye(len(mean))
        S, nu = H_t @ cov @ H_t.T + R, y_t - H_t @ mean
        K = cov @ H_t.T @ np.linalg.inv(S)
        log_lik -= 0.5 * (nu @ np.linalg.solve(S, nu) + np.linalg.slogdet(2 * np.pi * S)[1])
        mean, cov = mean + K @ nu, cov - K @ S @ K.T
    return mean, cov, log_lik


@functools.partial(jax.jit, static_argnames=("num_iterations",))
def run(belief, H, y, R, decay=1.0, noise=0.0, forgetting=1.0, max_trace=jnp.inf, num_iterations=1):
    def step(belief, observation):
        H, y = observation
        belief = belief.predict(decay, noise).forget(forgetting, max_trace)
        return ekf.update(belief, lambda theta: H @ theta, y, R, num_iterations)

    return jax.lax.scan(step, belief, (H, y))


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_linear_gaussian_is_the_kalman_filter(dtype, tol, correlated):
    n, T = 6, 100
    with jax.enable_x64(dtype == np.float64):
        H, y, R = linear_problem(n, 3, T, dtype=dtype)
        R = R if correlated else np.diag(np.diag(R))
        belief = ekf.Full.create(jnp.zeros(n), 2.0)
        belief, info = run(belief, H, y, jnp.asarray(R if correlated else np.diag(R)), decay=0.99, noise=0.01)
        mean, cov, log_lik = kalman(H, y, np.float64(R), np.zeros(n), 2.0 * np.eye(n), decay=0.99, noise=0.01)
        assert belief.cov.dtype == dtype
        np.testing.assert_allclose(belief.mean, mean, atol=tol)
        np.testing.assert_allclose(belief.cov, cov, atol=tol)
        np.testing.assert_allclose(np.asarray(info.log_lik, np.float64).sum(), log_lik, rtol=tol)


def test_noise_schedule_is_a_value_per_call(x64):
    H, y, R = linear_problem(3, 2, 2)
    belief, var = ekf.Full.create(jnp.zeros(3), 1.0), jnp.array([0.1, 0.2, 0.3])
    cov = belief.predict(noise=var).predict(noise=0.5).cov
    np.testing.assert_allclose(cov, np.diag(1.5 + np.asarray(var)), atol=1e-12)


def test_without_noise_it_is_ridge_regression_and_recursive_least_squares(x64):
    n, T, r, prior = 5, 40, 0.3, 4.0
    H, y, _ = linear_problem(n, 1, T)
    belief, _ = run(ekf.Full.create(jnp.zeros(n), prior), H, y, jnp.array([r]))
    X, Y = H[:, 0], y[:, 0]
    precision = X.T @ X / r + np.eye(n) / prior
    np.testing.assert_allclose(belief.mean, np.linalg.solve(precision, X.T @ Y / r), atol=1e-10)
    np.testing.assert_allclose(belief.cov, np.linalg.inv(precision), atol=1e-10)
    weights, P = np.zeros(n), prior / r * np.eye(n)  # RLS: P in units of the noise
    for x, target in zip(X, Y, strict=True):
        gain = P @ x / (1.0 + x @ P @ x)
        weights, P = weights + gain * (target - x @ weights), P - np.outer(gain, x @ P)
    np.testing.assert_allclose(belief.mean, weights, atol=1e-10)


def test_forgetting_is_weighted_least_squares(x64):
    n, T, r, factor = 4, 60, 0.2, 0.9
    H, y, _ = linear_problem(n, 1, T)
    belief, _ = run(ekf.Full.create(jnp.zeros(n), 1.0), H, y, jnp.array([r]), forgetting=factor)
    X, Y, weight = H[:, 0], y[:, 0], factor ** np.arange(T - 1, -1, -1)
    precision = (X * weight[:, None]).T @ X / r + factor**T * np.eye(n)
    np.testing.assert_allclose(belief.mean, np.linalg.solve(precision, X.T @ (weight * Y) / r), atol=1e-10)
    np.testing.assert_allclose(belief.cov, np.linalg.inv(precision), atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_forgetting_stops_at_the_cap_and_never_shrinks(form):
    belief, (H, y, _) = FORMS[form](jnp.zeros(4), 1.0), linear_problem(4, 2, 500, dtype=np.float32)
    idle = H * np.array([1.0, 1.0, 0.0, 0.0], np.float32)  # half of the parameters are never excited
    excited, _ = run(belief, idle, y, 0.1 * jnp.ones(2), forgetting=0.9, max_trace=8.0)
    np.testing.assert_allclose(excited.var.sum(), 8.0, rtol=0.01)
    assert excited.var[:2].max() < 0.2
    np.testing.assert_allclose(belief.forget(0.5, 6.0).var, 1.5, rtol=1e-6)
    np.testing.assert_allclose(belief.forget(0.5, 2.0).var, 1.0, rtol=1e-6)
    np.testing.assert_allclose(belief.forget(0.5, 100.0).var, 2.0, rtol=1e-6)


def test_order_and_chunks_do_not_matter_on_linear_models(x64):
    n, d, T = 5, 3, 24
    H, y, R = linear_problem(n, d, T)
    belief = ekf.Full.create(jnp.zeros(n), 1.0)
    one_by_one, info = run(belief, H, y, R)
    shuffle = np.random.default_rng(1).permutation(T)
    backwards, _ = run(belief, H[shuffle], y[shuffle], R)
    joint = H.reshape(-1, n)  # all observations as one of T d components
    at_once, joint_info = jax.jit(lambda belief: ekf.update(
        belief, lambda theta: joint @ theta, y.reshape(-1), np.kron(np.eye(T), R)))(belief)
    chunks, _ = run(belief, H.reshape(6, 4 * d, n), y.reshape(6, 4 * d), np.kron(np.eye(4), R))
    for other in (backwards, at_once, chunks):
        np.testing.assert_allclose(other.mean, one_by_one.mean, atol=1e-10)
        np.testing.assert_allclose(other.cov, one_by_one.cov, atol=1e-10)
    np.testing.assert_allclose(info.log_lik.sum(), joint_info.log_lik, rtol=1e-10)  # the chain rule
    np.testing.assert_allclose(info.information.sum(), joint_info.information, rtol=1e-10)


@pytest.mark.parametrize("n, d, rank, r, prior, forgetting", [
    (24, 4, 20, 0.1, 1.0, 1.0),
    (20, 2, 10, 1e-4, 1e4, 1.0),  # eight orders of magnitude between prior and noise
    (8, 2, 5, 0.1, 1.0, 0.999),  # forgetting what is not excited
])
def test_positive_definite_after_1e5_float32_steps(n, d, rank, r, prior, forgetting):
    basis = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0], jnp.float32)

    def step(belief, key):
        H = jax.random.normal(key, (d, rank)) @ basis[:, :rank].T
        belief = belief.forget(forgetting, 1e3 * n * prior) if forgetting < 1.0 else belief
        return ekf.condition(belief, H, jnp.zeros(d), jnp.full(d, r))[0], None

    belief = ekf.Full.create(jnp.zeros(n), prior)
    keys = jax.random.split(jax.random.key(0), 100_000)
    as_in_a_run = {"xla_backend_optimization_level": 3}  # rounding is what this is about, and it is the compiler's
    belief, _ = jax.jit(functools.partial(jax.lax.scan, step), compiler_options=as_in_a_run)(belief, keys)
    cov = whole(belief, "cov")
    np.testing.assert_array_equal(cov, cov.T)
    assert np.linalg.eigvalsh(cov)[0] > 0.0
    if forgetting == 1.0:  # unobservable directions keep their prior variance, up to what a rounded H says about them
        unseen = np.asarray(basis, np.float64)[:, rank:]
        kept = np.diag(unseen.T @ cov @ unseen) / prior
        assert 0.95 < kept.min() and kept.max() < 1.001


def rank_six(T, r=1e-4, n=10, d=2, rank=6):
    """T float32 steps that see six directions of ten. In these six: mean and P of the belief, and in float64; NIS."""
    rng = np.random.default_rng(0)
    basis, theta = np.float32(np.linalg.qr(rng.normal(size=(n, n)))[0][:, :rank]), np.float32(rng.normal(size=n))

    def step(belief, key):
        H_key, v_key = jax.random.split(key)
        H = jax.random.normal(H_key, (d, rank)) @ basis.T
        y = H @ theta + r**0.5 * jax.random.normal(v_key, (d,))
        belief, info = ekf.update(belief, lambda theta: H @ theta, y, jnp.full(d, r))
        return belief, (H, y, info.nis)

    keys = jax.random.split(jax.random.key(0), T)
    belief, data = jax.jit(functools.partial(jax.lax.scan, step))(ekf.Full.create(jnp.zeros(n), 1.0), keys)
    H, y, nis = (np.asarray(x, np.float64) for x in data)
    H, y = H.reshape(-1, n), y.reshape(-1)
    P = np.linalg.inv(np.eye(n) + H.T @ H / r)
    seen = np.linalg.eigh(P)[1][:, :rank].T
    return (seen @ whole(belief, "mean"), seen @ whole(belief, "cov") @ seen.T,
            seen @ (P @ (H.T @ y / r)), seen @ P @ seen.T, nis)


def whole(belief, name):
    return np.asarray(getattr(belief, name), np.float64) + np.asarray(belief.low[name], np.float64)


@pytest.mark.parametrize("T", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_observed_variances_in_float32_are_those_of_float64(T):
    mean, cov, m, P, nis = rank_six(T)
    ratio = np.linalg.eigvals(np.linalg.solve(P, cov)).real  # of the variance in every direction that is seen
    assert 0.99 < ratio.min() and ratio.max() < 1.01
    assert np.abs(mean - m).max() < 0.5 * np.sqrt(P.diagonal().min())
    low, high = ekf.nis_band(2, T, 0.999)
    assert low < nis.mean() < high


def test_small_changes_of_a_large_mean_add_up():
    """Each of a hundred changes of 10⁻⁴ is a tenth of the last place of 10⁴ in float32."""
    belief = ekf.Full.create(jnp.full(1, 1e4), 1e-4)
    for _ in range(100):
        belief, _ = condition(belief, jnp.ones((1, 1)), 10_001 - belief.mean, jnp.ones(1))
    np.testing.assert_allclose(whole(belief, "mean") - 1e4, 1 - 1 / (1 + 100 * 1e-4), rtol=0.02)


def test_what_is_observed_too_well_stays_at_the_floor():
    """θ_0 + θ_1 seen with a variance of 10⁻²⁰: P keeps 2⁻⁴⁰ of its diagonal there, and the belief finds the sum."""
    belief, H = ekf.Full.create(jnp.zeros(2), 1.0), jnp.ones((1, 2))
    for _ in range(3):
        belief, info = condition(belief, H, jnp.ones(1) - H @ belief.mean, jnp.array([1e-20]))
    P = whole(belief, "cov")
    np.testing.assert_allclose(P.sum() / 2, 0.0, atol=2e-12)
    np.testing.assert_allclose(belief.mean, 0.5, rtol=1e-6)
    np.testing.assert_allclose(info.information, 0.5 * np.log(P.trace() * 2.0**-40 / 1e-20), rtol=1e-2)
    assert np.linalg.eigvalsh(P)[0] > -1e-14


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_component_of_infinite_variance_is_as_if_it_were_not_there(form, correlated):
    (H, _, R), nan = linear_problem(5, 3, 1, dtype=np.float32), jnp.array([0.5, jnp.nan, -0.2])
    seen, some = np.array([0, 2]), R if correlated else np.diag(R)
    missing = some.copy()
    missing[(1, 1) if correlated else 1] = np.inf
    belief = FORMS[form](jnp.arange(5.0), 0.7)
    found, info, pull = jax.jit(ekf.condition)(belief, H[0], nan, jnp.asarray(missing))
    without = some[np.ix_(seen, seen)] if correlated else some[seen]
    expected, due, due_pull = jax.jit(ekf.condition)(belief, H[0][seen], nan[seen], jnp.asarray(without))
    for mine, theirs in ((found.mean, expected.mean), (found.var, expected.var), (pull, due_pull), *zip(
            info[1:], due[1:], strict=True)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_unobservable_directions_keep_their_prior_exactly_when_linear(x64):
    H, y, R = linear_problem(6, 2, 500)
    H[:, :, 4:] = H[:, :, :2] * 2.0  # θ_4, θ_5 appear with θ_0, θ_1 alone: two directions are never seen
    belief, _ = run(ekf.Full.create(jnp.zeros(6), 1.0), H, y, R)
    unseen = np.zeros((2, 6))
    unseen[[0, 1], [0, 1]], unseen[[0, 1], [4, 5]] = 2.0, -1.0
    np.testing.assert_allclose(unseen @ belief.cov @ unseen.T, 5.0 * np.eye(2), atol=1e-8)
    np.testing.assert_allclose(unseen @ belief.mean, 0.0, atol=1e-8)


def leak(h, start, gauge, obs, r=0.01):
    """Variance left, of a prior 0.25, in a direction that `h` cannot see at the estimate."""
    belief = ekf.Full.create(jnp.asarray(start), 0.25)
    belief, _ = jax.lax.scan(lambda belief, y: ekf.update(belief, h, y, jnp.array([r])), belief, obs)
    direction = gauge(belief.mean) / jnp.linalg.norm(gauge(belief.mean))
    return direction @ belief.cov @ direction


def test_relinearisation_leaks_into_gauge_directions_and_a_linear_parametrisation_does_not(x64):
    """y = θ_0 θ_1 + v shows a product only. Tangents at moving estimates differ, so an EKF ends up surer of the ratio
    than it can be; in logarithms the gauge is one fixed direction, and keeps its variance."""
    obs = np.log(2.0) + 0.1 * np.random.default_rng(0).normal(size=(200, 1))
    product = leak(lambda x: x[0] * x[1], [0.5, 1.5], lambda m: jnp.array([m[0], -m[1]]), np.exp(obs))
    logarithm = leak(lambda x: x.sum(), [0.0, 0.0], lambda m: jnp.array([1.0, -1.0]), obs)
    np.testing.assert_allclose(logarithm, 0.25, rtol=1e-10)
    assert 0.02 < product < 0.03  # nine tenths lost, to 200 observations that say nothing about the ratio


def test_consistency_nees_and_nis_inside_their_chi_square_bounds():
    runs, n, d, T, q, r = 64, 8, 2, 200, 1e-3, 0.1

    def one(key):
        prior_key, noise_key, H_key, v_key = jax.random.split(key, 4)
        walk = jnp.sqrt(q) * jax.random.normal(noise_key, (T, n))
        truth = jax.random.normal(prior_key, (1, n)) + jnp.cumsum(walk, axis=0)
        H = jax.random.normal(H_key, (T, d, n))
        y = jnp.einsum("tdn,tn->td", H, truth) + jnp.sqrt(r) * jax.random.normal(v_key, (T, d))
        belief, info = run(ekf.Full.create(jnp.zeros(n), 1.0), H, y, jnp.full(d, r), noise=q)
        error = truth[-1] - belief.mean
        return error @ jnp.linalg.solve(belief.cov, error), info.nis, info.innovation

    nees, nis, innovation = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), runs))
    assert np.all(np.abs(chi2.cdf(nees.sum(), runs * n) - 0.5) < 0.475)  # 95 %
    assert np.all(np.abs(chi2.cdf(nis.sum(), runs * T * d) - 0.5) < 0.475)
    white = (innovation[:, 50:-1] * innovation[:, 51:]).mean() / jnp.square(innovation[:, 50:]).mean()
    assert abs(white) < 2.5 / np.sqrt(runs * (T - 51) * d)


def test_iterations_do_not_count_an_observation_twice(x64):
    H, y, R = linear_problem(4, 2, 20)
    beliefs = [run(ekf.Full.create(jnp.zeros(4), 1.0), H, y, R, num_iterations=k) for k in (1, 2, 5)]
    for other, info in beliefs[1:]:
        np.testing.assert_allclose(other.mean, beliefs[0][0].mean, atol=1e-12)
        np.testing.assert_allclose(other.cov, beliefs[0][0].cov, atol=1e-12)
        np.testing.assert_allclose(info.log_lik, beliefs[0][1].log_lik, atol=1e-10)
    scalar, _ = ekf.update(ekf.Full.create(jnp.zeros(1), 1.0), lambda x: x, jnp.ones(1), jnp.ones(1), num_iterations=2)
    np.testing.assert_allclose(scalar.var, 0.5, atol=1e-12)


def test_iterated_update_finds_the_maximum_a_posteriori(x64):
    def h(x):
        return jnp.stack([jnp.sin(x[0]) + x[1], jnp.exp(0.3 * x[1])])

    start, obs, R = jnp.array([0.3, -0.2]), jnp.array([1.2, 1.6]), jnp.array([0.05, 0.02])
    posterior, _ = jax.jit(lambda belief: ekf.update(belief, h, obs, R, num_iterations=12))(ekf.Full.create(start, 0.5))
    neg_log = jax.jit(lambda x: ((x - start) ** 2 / 0.5).sum() + ((obs - h(x)) ** 2 / R).sum())
    best = minimize(neg_log, start, jac=jax.grad(neg_log), tol=1e-12).x
    H = jax.jacobian(h)(jnp.asarray(best))
    np.testing.assert_allclose(posterior.mean, best, atol=1e-6)
    np.testing.assert_allclose(posterior.cov, np.linalg.inv(np.eye(2) / 0.5 + H.T @ np.diag(1 / R) @ H), atol=1e-6)


@pytest.mark.parametrize("form", [ekf.Full, ekf.Diagonal, functools.partial(ekf.LowRank.create, rank=1)])
def test_a_sharply_bent_observation_is_iterated_to_its_maximum_too(x64, form):
    """Undamped Gauss-Newton leaps between the flat ends of this arctangent."""
    def h(x):
        return jnp.arctan(8.0 * x)

    create = getattr(form, "create", form)
    posterior, _ = ekf.update(create(jnp.array([-0.6]), 4.0), h, jnp.array([0.9]), jnp.array([0.3]), num_iterations=40)
    grid = np.linspace(-3, 3, 60_001)
    best = grid[np.argmin((grid + 0.6) ** 2 / 4.0 + (0.9 - np.arctan(8.0 * grid)) ** 2 / 0.3)]
    np.testing.assert_allclose(posterior.mean, [best], atol=2e-3)


def test_last_layer_is_bayesian_linear_regression_on_the_features(x64):
    rng = np.random.default_rng(0)
    hidden, bias = rng.normal(size=(3, 7)), rng.normal(size=7)
    xs, ys, r = rng.normal(size=(50, 3)), rng.normal(size=(50, 2)), 0.3
    head = {"kernel": jnp.zeros((7, 2)), "bias": jnp.zeros(2)}

    def step(belief, data):
        x, y = data
        features = jnp.tanh(x @ hidden + bias)
        return ekf.update(belief, lambda head: features @ head["kernel"] + head["bias"], y, jnp.full(2, r))

    belief, _ = jax.lax.scan(step, ekf.Full.create(head, {"kernel": 2.0, "bias": 0.5}), (xs, ys))
    X = np.column_stack([np.tanh(xs @ hidden + bias), np.ones(50)])
    precision = X.T @ X / r + np.diag([1 / 2.0] * 7 + [1 / 0.5])
    W = np.linalg.solve(precision, X.T @ ys / r)
    np.testing.assert_allclose(belief.params["kernel"], W[:7], atol=1e-10)
    np.testing.assert_allclose(belief.params["bias"], W[7], atol=1e-10)
    np.testing.assert_allclose(belief.var[:2], np.diag(np.linalg.inv(precision))[7], atol=1e-10)  # bias first


@pytest.mark.parametrize("form", FORMS)
def test_no_surprise_and_no_information_change_nothing(form):
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}
    belief = FORMS[form](params, 0.5)
    H = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    still, info = condition(belief, H, jnp.zeros(2), jnp.ones(2))
    np.testing.assert_array_equal(still.mean, belief.mean)
    assert info.nis == 0.0 and np.all(still.var < belief.var)
    for R in (jnp.full(2, 1e20), jnp.full(2, jnp.inf), 1e20 * jnp.eye(2)):
        unmoved, info = condition(belief, H, jnp.ones(2), R)
        np.testing.assert_allclose(unmoved.mean, belief.mean, atol=1e-12)
        np.testing.assert_allclose(unmoved.var, belief.var, rtol=1e-6)
        np.testing.assert_allclose(info.information, 0.0, atol=1e-12)
    half, _ = condition(belief, H, jnp.ones(2), jnp.array([0.1, jnp.inf]))  # the second is missing
    first, _ = condition(belief, H[:1], jnp.ones(1), jnp.array([0.1]))
    np.testing.assert_allclose(half.mean, first.mean, atol=1e-6)
    np.testing.assert_allclose(half.var, first.var, atol=1e-6)


def test_diagonal_keeps_the_diagonal_of_the_exact_precision(x64):
    n, d = 6, 3
    H, y, R = linear_problem(n, d, 1)
    var = np.linspace(0.5, 2.0, n)
    belief = ekf.Diagonal.create(jnp.zeros(n), 1.0).replace(var=jnp.asarray(var))
    belief = belief.predict(decay=0.9, noise=0.1)
    var = 0.81 * var + 0.1
    posterior, info = condition(belief, H[0], y[0], jnp.asarray(R))
    mean, _, log_lik = kalman(H, y, R, np.zeros(n), np.diag(var))  # the mean is exact for a diagonal prior
    precision = np.diag(1.0 / var) + H[0].T @ np.linalg.solve(R, H[0])
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-10)
    np.testing.assert_allclose(1.0 / posterior.var, np.diag(precision), atol=1e-10)
    np.testing.assert_allclose(info.log_lik, log_lik, atol=1e-10)


def test_low_rank_with_full_rank_is_exact(x64):
    n, d, T = 6, 2, 30
    H, y, R = linear_problem(n, d, T)
    settings = dict(decay=0.98, noise=0.02, forgetting=0.95, max_trace=50.0)
    full, info = run(ekf.Full.create(jnp.zeros(n), 1.5), H, y, R, **settings)
    low, low_info = run(ekf.LowRank.create(jnp.zeros(n), 1.5, rank=n), H, y, R, **settings)
    np.testing.assert_allclose(low.mean, full.mean, atol=1e-9)
    np.testing.assert_allclose(low.var, full.var, atol=1e-9)
    np.testing.assert_allclose(low.times(jnp.eye(n)), full.cov, atol=1e-9)
    np.testing.assert_allclose(low_info.log_lik, info.log_lik, atol=1e-9)


def test_low_rank_keeps_the_longest_directions_and_the_diagonal(x64):
    n, d, rank = 8, 2, 3
    H, y, R = linear_problem(n, d, 3)
    belief, _ = run(ekf.LowRank.create(jnp.zeros(n), 1.0, rank), H[:2], y[:2], R)
    posterior, _ = condition(belief, H[2], jnp.asarray(y[2] - H[2] @ belief.mean), jnp.asarray(R))
    before = np.diag(belief.precision) + belief.factor @ belief.factor.T
    exact = before + H[2].T @ np.linalg.solve(R, H[2])
    mean, _, _ = kalman(H[2:], y[2:], R, np.asarray(belief.mean), np.linalg.inv(before))
    after = np.diag(posterior.precision) + posterior.factor @ posterior.factor.T
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-10)
    np.testing.assert_allclose(np.diag(after), np.diag(exact), atol=1e-10)
    longest = np.linalg.eigvalsh(exact - np.diag(belief.precision))[-rank:]
    np.testing.assert_allclose(np.linalg.eigvalsh(posterior.factor.T @ posterior.factor), longest, atol=1e-9)


@pytest.mark.parametrize("correlated", [False, True])
def test_measurement_noise_is_found_from_residuals(correlated):
    true, start = np.array([[0.3, 0.1], [0.1, 0.1]], np.float32), np.float32(2.0) * np.eye(2, dtype=np.float32)
    true, start = (true, start) if correlated else (np.diag(true), np.diag(start))
    root = np.linalg.cholesky(true) if correlated else np.diag(np.sqrt(true))
    rng = np.random.default_rng(0)
    H = rng.normal(size=(5000, 2, 4)).astype(np.float32)
    walk = np.cumsum(0.05 * rng.normal(size=(5000, 4)), axis=0)  # P stays large: prior residuals would be biased
    y = (np.einsum("tdn,tn->td", H, walk) + rng.normal(size=(5000, 2)) @ root.T).astype(np.float32)

    def step(carry, data):
        belief, R = carry
        H, y = data
        belief, _ = ekf.update(belief.predict(noise=0.0025), lambda x: H @ x, y, R)
        R = ekf.adapt_R(R, belief, lambda x: H @ x, y, 0.005)
        return (belief, R), R

    _, R = jax.lax.scan(step, (ekf.Full.create(jnp.zeros(4), 1.0), jnp.asarray(start)), (H, y))
    np.testing.assert_allclose(R[2500:].mean(axis=0), true, atol=0.03)


@pytest.mark.parametrize("start", [np.float32(0.1), np.full(4, 0.1, np.float32)])
def test_process_noise_is_found_from_innovations(start):
    rng = np.random.default_rng(0)
    true = np.broadcast_to(np.float32(0.01), start.shape) if start.ndim == 0 else np.array([0.02, 0.01, 0.0, 0.005])
    H = rng.normal(size=(8000, 2, 4)).astype(np.float32)
    walk = np.cumsum(np.sqrt(true) * rng.normal(size=(8000, 4)), axis=0)
    y = (np.einsum("tdn,tn->td", H, walk) + np.sqrt(0.1) * rng.normal(size=(8000, 2))).astype(np.float32)

    def step(carry, data):
        belief, noise = carry
        H, y = data
        pred = belief.predict(noise=noise)
        belief, _ = ekf.update(pred, lambda x: H @ x, y, jnp.full(2, 0.1))
        noise = ekf.adapt_noise(noise, pred, belief, 0.01)
        return (belief, noise), noise

    _, noise = jax.lax.scan(step, (ekf.Full.create(jnp.zeros(4), 100.0), jnp.asarray(start)), (H, y))
    np.testing.assert_allclose(noise[4000:].mean(axis=0), true, atol=0.002)


@pytest.mark.parametrize("n, d", [(5, 2), (2, 5), (3, 3)])
def test_linearize_equals_the_jacobian_both_ways(n, d, x64):
    A = np.random.default_rng(0).normal(size=(d, n))
    belief = ekf.Full.create({"a": jnp.arange(1.0, n), "b": jnp.ones(())}, 1.0)

    def flat(x):
        return jnp.sin(A @ x)

    pred, H = ekf.linearize(lambda p: flat(jnp.append(p["a"], p["b"])), belief, belief.mean)
    np.testing.assert_allclose(pred, flat(belief.mean), atol=1e-12)
    np.testing.assert_allclose(H, jax.jacobian(flat)(belief.mean), atol=1e-12)


@pytest.mark.parametrize("d", [3, 12])
def test_elimination_and_lapack_agree_with_numpy(d, x64):
    rng = np.random.default_rng(0)
    root, B = rng.normal(size=(d, d, 5)), rng.normal(size=(d, 4, 5))
    S = np.einsum("ikb,jkb->ijb", root, root)
    solved, pivots = ekf.eliminate(jnp.asarray(S), jnp.asarray(B), 1.0)
    for b in range(5):
        L = np.linalg.cholesky(np.eye(d) + S[..., b])
        np.testing.assert_allclose(solved[..., b], np.linalg.solve(L, B[..., b]), atol=1e-9)
        np.testing.assert_allclose(pivots[:, b], np.diag(L) ** 2 - 1.0, atol=1e-9)


def test_tree_of_parameters_there_and_back():
    params = {"A": jnp.arange(6.0).reshape(2, 3), "B": (jnp.ones(()), jnp.arange(2.0))}
    belief = ekf.Full.create(params, {"A": 3.0, "B": (1.0, 2.0)})
    jax.tree.map(np.testing.assert_array_equal, belief.params, params)
    np.testing.assert_array_equal(belief.var, [3.0] * 6 + [1.0] + [2.0] * 2)
    fresh = ekf.Full.create(jax.tree.map(jnp.zeros_like, params), 1.0)  # can replace the old one inside a scan
    reset = jax.tree.map(lambda new, old: jnp.where(True, new, old), fresh, belief)
    np.testing.assert_array_equal(reset.mean, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_vmapped_beliefs_equal_single_ones(form):
    belief = FORMS[form](jnp.zeros(5), 1.0)
    problems = [linear_problem(5, 2, 30, seed, np.float32) for seed in range(3)]
    H, y = np.stack([p[0] for p in problems]), np.stack([p[1] for p in problems])
    R = np.full(2, 0.1, np.float32)

    def after(H, y):
        posterior, _ = run(belief, H, y, R, noise=1e-3)
        return posterior.mean, posterior.var

    many = jax.jit(jax.vmap(after))(H, y)
    for i in range(3):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-5), many, after(H[i], y[i]))


@pytest.mark.parametrize("m", [2, 3, 5, 8, 13])
def test_eigenvectors_are_those_of_numpy(m):
    rng = np.random.default_rng(m)
    A = rng.normal(size=(m, m)) * np.logspace(0, 1.5, m)
    A = np.float32(A.T @ A)
    V = np.asarray(jax.jit(ekf.eigenvectors)(A), np.float64)
    values = np.linalg.eigvalsh(A.astype(np.float64))
    np.testing.assert_allclose(V.T @ V, np.eye(m), atol=1e-5)
    np.testing.assert_allclose(V.T @ A @ V / values[-1], np.diag(values) / values[-1], atol=1e-5)


def test_eigenvectors_of_what_is_diagonal_already():
    np.testing.assert_allclose(np.abs(ekf.eigenvectors(jnp.diag(jnp.array([3.0, 0.0, 2.0])))),
                               [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-6)
