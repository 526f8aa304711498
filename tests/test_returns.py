import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.normalize import RewardScale, RunningMeanStd
from core.returns import from_bins, gae, lambda_returns, n_step_returns, to_bins

T, E, DISCOUNT, TRACE = 7, 3, 0.9, 0.8

RETURNS, NORMALIZE = "core/returns.py", "core/normalize.py"
PLANTED_ERRORS = {
    "no bootstrap mask in gae": (RETURNS, "delta = reward + discount * (1.0 - terminated) * next_value - value",
                                 "delta = reward + discount * next_value - value"),
    "advantages leak across a termination": (RETURNS, "discount * trace * (1.0 - terminated) * (1.0 - truncated)",
                                             "discount * trace * (1.0 - truncated)"),
    "advantages leak across a time limit": (RETURNS, "discount * trace * (1.0 - terminated) * (1.0 - truncated)",
                                            "discount * trace * (1.0 - terminated)"),
    "discount forgotten in the trace": (RETURNS, "decay = discount * trace", "decay = trace"),
    "gae runs forwards": (RETURNS, "(delta, decay), reverse=True", "(delta, decay), reverse=False"),
    "lambda return ignores time limits": (RETURNS, "weight = trace * (1.0 - truncated)", "weight = trace"),
    "lambda weights swapped": (RETURNS, "((1.0 - weight) * next_value + weight * target)",
                               "(weight * next_value + (1.0 - weight) * target)"),
    "n-step runs through a time limit": (RETURNS, "jnp.where(truncated.astype(bool), next_value, shifted)", "shifted"),
    "one step too many": (RETURNS, "length=n - 1", "length=n"),
    "bins without the transform": (RETURNS, "h = jnp.clip(jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + EPSILON * x,",
                                   "h = jnp.clip(x,"),
    "transform of half the numbers": (RETURNS, "jnp.clip(jnp.sign(x) * (jnp.sqrt(", "jnp.clip((jnp.sqrt("),
    "slope of the transform forgotten": (RETURNS, "- 1) + EPSILON * x, -bound", "- 1), -bound"),
    "nearest bin only": (RETURNS, "jnp.maximum(1.0 - jnp.abs(jnp.subtract.outer(place, jnp.arange(num_bins))), 0.0)",
                         "1.0 * (jnp.abs(jnp.subtract.outer(place, jnp.arange(num_bins))) <= 0.5)"),
    "bins too far apart": (RETURNS, "* (num_bins - 1) / (2 * bound)  #", "* num_bins / (2 * bound)  #"),
    "numbers outside the bins have no weight": (RETURNS, "+ EPSILON * x, -bound, bound)", "+ EPSILON * x, -1e9, 1e9)"),
    "the inverse loses the sign": (RETURNS, "return jnp.sign(h) * (jnp.square(", "return (jnp.square("),
    "the inverse without its one": (RETURNS, "+ 1)) - 1)\n", "+ 1)))\n"),
    "an inverse of cancelling numbers": (RETURNS, "jnp.square(2 * y / (jnp.sqrt(1 + 4 * EPSILON * y) + 1))",
                                         "jnp.square((jnp.sqrt(1 + 4 * EPSILON * y) - 1) / (2 * EPSILON))"),
    "batch mean not weighted": (NORMALIZE, "delta * (n / count)", "delta"),
    "between-batch variance forgotten": (NORMALIZE, " + delta**2 * (self.count * n / count)", ""),
    "terminal reward opens the next episode": (NORMALIZE, "return jnp.where(done, 0.0, total), total",
                                               "return jnp.where(done, reward, total), total"),
    "return not discounted": (NORMALIZE, "total = discount * total + reward", "total = total + reward"),
}


@pytest.fixture
def rollout():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, T, E)).astype(np.float32)
    terminated = rng.random((T, E)) < 0.25
    truncated = (rng.random((T, E)) < 0.25) & ~terminated
    assert terminated.any() and truncated.any()
    return reward, value, next_value, terminated, truncated


def test_gae_is_the_sum_of_its_definition(rollout):
    reward, value, next_value, terminated, truncated = rollout
    expected = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, e] else next_value[k, e]
                expected[t, e] += weight * (reward[k, e] + DISCOUNT * bootstrap - value[k, e])
                weight *= DISCOUNT * TRACE
                if terminated[k, e] or truncated[k, e]:
                    break
    np.testing.assert_allclose(gae(*rollout, DISCOUNT, TRACE), expected, rtol=1e-5, atol=1e-5)


def test_gae_of_two_hand_computed_episodes():
    """Unit rewards, zero values, γ = λ = 1, ends after steps 3 and 6: what is left of each episode."""
    ends = jnp.array([0, 0, 1, 0, 0, 1.0])[:, None]
    zeros, ones = jnp.zeros((6, 1)), jnp.ones((6, 1))
    np.testing.assert_allclose(gae(ones, zeros, zeros, ends, zeros, 1.0, 1.0)[:, 0], [3, 2, 1, 3, 2, 1])
    np.testing.assert_allclose(gae(ones, zeros, 100 * ones, zeros, ends, 1.0, 0.0)[:, 0], 101)
    np.testing.assert_allclose(gae(ones, zeros, 100 * ends, zeros, ends, 1.0, 1.0)[:, 0], [103, 102, 101] * 2)


def test_lambda_returns_are_advantages_plus_values(rollout):
    """Where V(s'_t) is the V(s_{t+1}) of a running episode, both say the same."""
    reward, value, next_value, terminated, truncated = rollout
    running = ~(terminated | truncated)[:-1]
    next_value = np.concatenate([np.where(running, value[1:], next_value[:-1]), next_value[-1:]])
    targets = lambda_returns(reward, next_value, terminated, truncated, DISCOUNT, TRACE)
    advantage = gae(reward, value, next_value, terminated, truncated, DISCOUNT, TRACE)
    np.testing.assert_allclose(targets, advantage + value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_n_step_returns_are_the_sum_of_their_definition(rollout, n):
    reward, _, next_value, terminated, truncated = rollout
    expected = np.zeros((T, E))
    for e in range(E):
        for t in range(T):
            for k in range(t, min(t + n, T)):
                expected[t, e] += DISCOUNT ** (k - t) * reward[k, e]
                if terminated[k, e] or truncated[k, e]:
                    break
            expected[t, e] += DISCOUNT ** (k - t + 1) * (0.0 if terminated[k, e] else next_value[k, e])
    targets = n_step_returns(reward, next_value, terminated, truncated, DISCOUNT, n)
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_those_of_all_batches_together():
    data = np.random.default_rng(0).normal(3.0, 2.0, (4, 50, 2)).astype(np.float32) * np.array([1, 10], np.float32)
    stats = RunningMeanStd.create(jnp.zeros(2))
    for scale, batch in enumerate(data, 1):
        stats = jax.jit(RunningMeanStd.update)(stats, batch * scale)
    everything = (data * np.arange(1, 5, dtype=np.float32)[:, None, None]).reshape(-1, 2)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, everything.var(0), rtol=1e-4)
    standard = np.clip((everything - everything.mean(0)) / everything.std(0), -10, 10)
    np.testing.assert_allclose(stats(jnp.asarray(everything)), standard, rtol=1e-3, atol=1e-3)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    rng = np.random.default_rng(0)
    reward, done = rng.normal(1.0, 5.0, (2, 40, 3)).astype(np.float32), rng.random((2, 40, 3)) < 0.2
    scale, totals, running = RewardScale.create((3,)), [], np.zeros(3)
    for r, d in zip(reward, done, strict=True):
        scale = scale.update(r, d, DISCOUNT)
        for t in range(40):
            running = DISCOUNT * running + r[t]
            totals.append(running.copy())
            running = np.where(d[t], 0.0, running)
    np.testing.assert_allclose(scale(reward[0]), np.clip(reward[0] / np.std(totals), -10, 10), rtol=1e-3)
    np.testing.assert_allclose(scale.discounted_return, running, rtol=1e-4)


def h(x):
    x = np.asarray(x, np.float64)
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x


def test_bins_hold_a_number_and_give_it_back():
    """Weights of the two neighbours of h(x), whose mean it is; to 1e-6 of a number from −370 to 370."""
    x = np.concatenate([[0.0, 1e-3, -1e-3, 1.0, -1.0, 370.0, -370.0], np.random.default_rng(0).normal(size=50) * 50])
    weights = np.asarray(jax.jit(lambda x: to_bins(x, 20.0, 81))(jnp.float32(x)), np.float64)
    support = np.linspace(-20, 20, 81)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(weights @ support, h(x), atol=2e-5)
    assert ((weights > 0).sum(axis=-1) <= 2).all()
    assert (np.abs(support - h(x)[:, None])[weights > 1e-6] < 0.5).all()
    back = jax.jit(lambda weights: from_bins(weights, 20.0))(jnp.float32(weights))
    np.testing.assert_allclose(back, x, rtol=2e-5, atol=2e-5)


def test_numbers_beyond_the_bins_are_the_last_bin():
    weights = to_bins(jnp.float32([1e4, -1e4]), 5.0, 11)
    np.testing.assert_array_equal(weights, np.eye(11)[[10, 0]])


def test_the_inverse_is_exact_for_small_numbers():
    """Of a spread of weights it is h⁻¹ of their mean, not the mean of h⁻¹; h⁻¹ by bisection in float64."""
    weights = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (200, 21)))
    mean = np.asarray(weights, np.float64) @ np.linspace(-0.1, 0.1, 21)
    low, high = np.full(200, -10.0), np.full(200, 10.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = np.where(h(middle) < mean, middle, low), np.where(h(middle) < mean, high, middle)
    np.testing.assert_allclose(from_bins(weights, 0.1), low, atol=2e-6)
