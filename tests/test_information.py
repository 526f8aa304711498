"""`ekf.information` against stacked log-determinants and the entropies of joint Gaussians."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import ekf

PLANTED_ERRORS = {
    "half missing": (
        "core/ekf.py", "return 0.5 * jnp.log1p(excess).sum", "return jnp.log1p(excess).sum",
        "test_joint_information_is_the_stacked_log_determinant"),
    "covariance not downdated": (
        "core/ekf.py", "(downdate.ndim - cov.ndim)) - downdate", "(downdate.ndim - cov.ndim)) - 0 * downdate",
        "test_joint_information_is_the_stacked_log_determinant"),
    "noise forgotten": (
        "core/ekf.py", "    H, _ = whiten(R, H)\n", "    whiten(R, H)\n",
        "test_joint_information_is_the_stacked_log_determinant"),
    "wrong side of the correlated noise": (
        "core/ekf.py", "jnp.tensordot(root, x, 1)", "jnp.tensordot(root.T, x, 1)",
        "test_joint_information_is_the_stacked_log_determinant"),
    "logarithm of a rounded sum": (
        "core/ekf.py", "return 0.5 * jnp.log1p(excess)", "return 0.5 * jnp.log(1.0 + excess)",
        "test_little_information_is_not_rounded_away_in_float32"),
    "task ratio inverted": (
        "core/ekf.py", "explained = jnp.square", "explained = -jnp.square",
        "test_task_aware_information_is_the_mutual_information_with_the_task"),
    "task column in the downdate": (
        "core/ekf.py", "row[:n, None] * row[None, :n]", "row[-n:, None] * row[None, -n:]",
        "test_task_aware_information_is_the_mutual_information_with_the_task"),
    "last pivot missing": (
        "core/ekf.py", "for row in rows]), jnp.stack(pivots)", "for row in rows]), jnp.stack(pivots).at[-1].set(0.0)",
        "test_joint_information_is_the_stacked_log_determinant"),
    "one parameter left out": (
        "core/ekf.py", "j] for j in range(n))", "j] for j in range(1, n))",
        "test_joint_information_is_the_stacked_log_determinant"),
    "many parameters added up wrongly": (
        "core/ekf.py", "(A[:, None] * B[None]).sum(axis=2)", "(A[:, None] * B[None]).mean(axis=2)",
        "test_joint_information_is_the_stacked_log_determinant"),
    "task variance from the posterior": (
        "core/ekf.py", "total = dot(dot(task[None], cov)", "total = dot(dot(task[None], posterior)",
        "test_task_aware_information_is_the_mutual_information_with_the_task"),
    "realised information scaled": (
        "core/ekf.py", "information, nis = 0.5 *", "information, nis = 1.0 *",
        "test_predicted_information_is_what_the_update_then_realises"),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


information = jax.jit(ekf.information)


def problem(n, d, T, samples, seed=0):
    """cov [n, n], H [T, d, n, samples], R [d, d]."""
    rng = np.random.default_rng(seed)
    root, noise_root = rng.normal(size=(n, n)), rng.normal(size=(d, d))
    return root @ root.T / n, rng.normal(size=(T, d, n, samples)), 0.2 * noise_root @ noise_root.T + 0.1 * np.eye(d)


def log_det(x):
    return np.linalg.slogdet(x)[1]


def stacked(cov, H, R):
    """½ log det(I + R⁻¹ J P J') of all rows J [T d, n] together."""
    J = H.reshape(-1, H.shape[-1])
    noise = np.kron(np.eye(len(H)), R)
    return 0.5 * (log_det(J @ cov @ J.T + noise) - log_det(noise))


def joint(cov, H, R, task=None):
    """Σ_t over the horizon, covariance carried: H [T, d, n, samples] -> nats [samples], cov [n, n, samples]."""
    def step(cov, H):
        nats, cov = information(cov, H, R, task)
        return cov, nats

    cov = jnp.broadcast_to(cov[:, :, None], (*cov.shape, H.shape[-1]))
    cov, nats = jax.lax.scan(step, cov, H)
    return nats.sum(axis=0), cov


@pytest.mark.parametrize("n, d", [(8, 2), (24, 4), (5, 1), (40, 2), (6, 10)])
def test_joint_information_is_the_stacked_log_determinant(n, d):
    T, samples = 7, 3
    cov, H, R = problem(n, d, T, samples)
    for noise, matrix in ((R, R), (np.diag(R), np.diag(np.diag(R)))):
        nats, posterior = joint(jnp.asarray(cov), jnp.asarray(H), jnp.asarray(noise))
        for i in range(samples):
            J = H[..., i].reshape(-1, n)
            expected = np.linalg.inv(np.linalg.inv(cov) + J.T @ np.linalg.solve(np.kron(np.eye(T), matrix), J))
            np.testing.assert_allclose(nats[i], stacked(cov, H[..., i], matrix), rtol=1e-9)
            np.testing.assert_allclose(posterior[..., i], expected, atol=1e-9)


def test_independent_information_is_one_step_at_the_frozen_covariance_and_never_less_than_joint():
    cov, H, R = problem(8, 2, 10, 4)
    independent = sum(information(jnp.asarray(cov), jnp.asarray(H_t), jnp.asarray(R))[0] for H_t in H)
    for i in range(4):
        expected = sum(stacked(cov, H_t[None, ..., i], R) for H_t in H)
        np.testing.assert_allclose(independent[i], expected, rtol=1e-10)
    assert np.all(independent > joint(jnp.asarray(cov), jnp.asarray(H), jnp.asarray(R))[0])


def test_repeating_one_action_is_credited_once():
    """d = 1: T observations of the same direction are one observation with T-fold precision."""
    cov, H, _ = problem(5, 1, 1, 1)
    T, r = 20, 0.1
    nats, _ = joint(jnp.asarray(cov), jnp.asarray(np.repeat(H, T, axis=0)), jnp.array([r]))
    h = H[0, 0, :, 0]
    np.testing.assert_allclose(nats[0], 0.5 * np.log1p(T * h @ cov @ h / r), rtol=1e-10)


def test_task_aware_information_is_the_mutual_information_with_the_task():
    n, d, T, samples = 6, 2, 5, 3
    cov, H, R = problem(n, d, T, samples)
    g = np.random.default_rng(1).normal(size=(n, samples))
    nats, posterior = joint(jnp.asarray(cov), jnp.asarray(H), jnp.asarray(R), jnp.asarray(g))
    frozen, left = information(jnp.asarray(cov), jnp.asarray(H[0]), jnp.asarray(R), jnp.asarray(g))
    _, plain = information(jnp.asarray(cov), jnp.asarray(H[0]), jnp.asarray(R))
    np.testing.assert_allclose(left, plain, atol=1e-12)  # what is learnt does not depend on what matters
    for i in range(samples):
        for rows, value in ((H[..., i].reshape(-1, n), nats[i]), (H[0, ..., i], frozen[i])):
            both = np.vstack([rows, g[:, i]])  # I(z; y) = ½ log(det Σ_y var z / det Σ_yz)
            noise = np.kron(np.eye(len(rows) // d), R)
            joint_cov = both @ cov @ both.T
            joint_cov[:-1, :-1] += noise
            expected = 0.5 * (log_det(joint_cov[:-1, :-1]) + np.log(joint_cov[-1, -1]) - log_det(joint_cov))
            np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.all(nats < joint(jnp.asarray(cov), jnp.asarray(H), jnp.asarray(R))[0])  # a part of θ, a part of the nats


def test_task_fully_learnt_stays_finite():
    g = jnp.ones((3, 1))
    nats, _ = information(jnp.eye(3), g[None, :, :], jnp.array([1e-30]), g)
    assert np.isfinite(nats).all() and nats[0] > 15.0


def test_two_rows_and_eight_gains_say_what_the_whole_next_state_and_twenty_parameters_do():
    """Pursuit: only the pursuer's acceleration −G(θ) e depends on θ, so d = 2 and n = 8 stand for 8 and 20."""
    dt, r = 0.1, 0.1
    A = np.block([[np.eye(2), dt * np.eye(2)], [np.zeros((2, 2)), np.eye(2)]])
    B = np.vstack([0.5 * dt**2 * np.eye(2), dt * np.eye(2)])

    def gain(theta):
        Q, R = (root @ root.T for root in (theta[:16].reshape(4, 4), theta[16:].reshape(2, 2)))
        return jnp.linalg.solve(R + B.T @ Q @ B, B.T @ Q)

    def next_state(theta, e):
        return jnp.concatenate([jnp.zeros(4), A @ e - B @ (gain(theta) @ e)])

    rng = np.random.default_rng(0)
    theta, root, e = rng.normal(size=20), rng.normal(size=(20, 20)), rng.normal(size=4)
    cov = root @ root.T / 20
    J = jax.jacobian(next_state)(theta, e)
    jac = jax.jacobian(gain)(theta).reshape(8, 20)
    H = jnp.kron(jnp.eye(2), -e[None])  # acceleration [2] by gain [8]
    effective = jnp.full(2, r / (dt**2 + dt**4 / 4))  # (B' R⁻¹ B)⁻¹
    nats, _ = information(jac @ cov @ jac.T, H, effective)
    np.testing.assert_allclose(nats, stacked(cov, np.asarray(J)[None], r * np.eye(8)), rtol=1e-10)


def test_little_information_is_not_rounded_away_in_float32():
    H = jnp.full((2, 3), 1e-5, jnp.float32)
    nats, _ = information(jnp.eye(3, dtype=jnp.float32), H, jnp.full(2, 0.1, jnp.float32))
    np.testing.assert_allclose(nats, 0.5 * 2 * 3e-10 / 0.1, rtol=1e-5)


def test_without_batch_with_batch_and_vmapped_agree():
    cov, H, R = (jnp.asarray(x) for x in problem(7, 3, 1, 4))
    nats, posterior = information(cov, H[0], R)
    mapped, mapped_cov = jax.vmap(lambda H: information(cov, H, R), in_axes=2)(H[0])
    np.testing.assert_allclose(nats, mapped, atol=1e-12)
    np.testing.assert_allclose(posterior, jnp.moveaxis(mapped_cov, 0, -1), atol=1e-12)
    single, single_cov = information(cov, H[0, ..., 1], R)
    assert single.shape == () and single_cov.shape == (7, 7)
    np.testing.assert_allclose(single, nats[1], atol=1e-12)


def test_predicted_information_is_what_the_update_then_realises():
    cov, H, R = (jnp.asarray(x) for x in problem(6, 2, 1, 1))
    belief = ekf.Full.create(jnp.zeros(6), 1.0).replace(cov=cov)
    nats, left = information(cov, H[0, ..., 0], R)
    posterior, info, _ = jax.jit(ekf.condition)(belief, H[0, ..., 0], jnp.ones(2), R)
    np.testing.assert_allclose(info.information, nats, rtol=1e-10)
    np.testing.assert_allclose(posterior.cov, left, atol=1e-10)
    np.testing.assert_allclose(nats, 0.5 * (log_det(cov) - log_det(posterior.cov)), rtol=1e-10)
