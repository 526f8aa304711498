"""Boxes, discrete actions and ends by hand: bounds that are not symmetric, differ by agent, or do not exist."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import Batch, Box, Discrete, TimeStep, Transition, ended, make_env
from core.evaluation import evaluate, score
from launchers.train import means_of

BATCH, COUNTS = "core/envs/batch.py", "test_a_batch_counts_each_episode_and_starts_it_anew"
INTERFACE, EVALUATION = "core/envs/interface.py", "core/evaluation.py"
REPORTS = "test_what_an_environment_reports_is_a_mean_over_each_episode"
PLANTED_ERRORS = {
    "lengths go on": (BATCH, "where(done, 0, length), success, sums)", "length, success, sums)", COUNTS),
    "lengths start with the end": (BATCH, "where(done, 0, length), success, sums)",
                                   "where(done, length, 0), success, sums)",
                                   COUNTS),
    "returns go on": (BATCH, "where(done, 0.0, total),", "total,", COUNTS),
    "the running return is told": (BATCH, '"return": where(done, total, 0.0)', '"return": total', COUNTS),
    "the reward of the end is lost": (BATCH, "env_state.episode_return + step.reward",
                                      "env_state.episode_return + where(done, 0.0, step.reward)", COUNTS),
    "success goes on": (BATCH, "success & done, success & ~done", "success & done, success",
                        "test_a_batch_counts_the_success_of_an_episode"),
    "success before the end": (BATCH, "success & done, success & ~done", "success, success & ~done",
                               "test_a_batch_counts_the_success_of_an_episode"),
    "success of the last step": (BATCH, 'env_state.episode_success | step.info["success"]', 'step.info["success"]',
                                 "test_a_batch_counts_the_success_of_an_episode"),
    "sums go on": (BATCH, "where(done, 0.0, x) for name, x in sums", "x for name, x in sums", REPORTS),
    "sums before the end": (BATCH, "where(done, jax.vmap(jnp.divide)(x, length), 0.0)",
                            "jax.vmap(jnp.divide)(x, length)", REPORTS),
    "what is reported is added": (BATCH, "jax.vmap(jnp.divide)(x, length)", "x", REPORTS),
    "the last step alone is reported": (BATCH, "env_state.episode_sums[name] + step.info[name]", "step.info[name]",
                                        REPORTS),
    "the second episode is reported, too": (EVALUATION, 'where(alive, ts.info["episode"][name], 0.0)',
                                            'ts.info["episode"][name]', REPORTS),
    "agents are reported as one": (EVALUATION, "x[:, n] for name", "x.mean(axis=1) for name", REPORTS),
    "agents are reported in the other order": (EVALUATION, "x[:, n] for name", "x[:, -1 - n] for name", REPORTS),
    "training reports sums": ("launchers/train.py", "(x.T / count).T", "x", REPORTS),
    "an open box has the scale of its bound": (INTERFACE, "np.isfinite(low) & np.isfinite(high)", "np.isfinite(low)",
                                               "test_bounds_and_scales"),
    "from the low bound": (INTERFACE, "return centre + half * jnp.clip", "return centre - half * jnp.clip",
                           "test_actions_are_put_into_the_box"),
    "gymnax: a fall for a time limit": ("core/envs/from_gymnax.py", "terminated, truncated & ~terminated, {}",
                                        "truncated & ~terminated, terminated, {}",
                                        "test_a_pole_of_gymnax_falls_or_runs_out_of_time"),
    "a time limit is no end": (INTERFACE, "return step.terminated | step.truncated", "return step.terminated",
                               "test_a_transition_keeps_the_true_successor_and_both_ends"),
}
BOX, AGENTS = Box((-1.0, 2.0), (5.0, 3.0)), Box(((0.0,), (-4.0,)), ((1.0,), (-2.0,)))


def test_bounds_and_scales():
    np.testing.assert_array_equal(BOX.bounds, [[-1, 2], [5, 3]])
    np.testing.assert_array_equal(BOX.scale, [[2, 2.5], [3, 0.5]])
    np.testing.assert_array_equal(AGENTS.scale, [[[0.5], [-3]], [[0.5], [1]]])
    half_open = Box((-np.inf, 0.0, -3.0), (1.0, np.inf, 5.0))
    np.testing.assert_array_equal(half_open.scale, [[0, 0, 1], [1, 1, 4]])
    assert BOX.shape == (2,) and AGENTS.shape == (1,) and Discrete(3).shape == ()
    assert BOX.dtype == jnp.float32 and Discrete(3).dtype == jnp.int32


def test_actions_are_put_into_the_box():
    unit = jnp.float32([[-1, -1], [0, 0.5], [3, 3]])
    np.testing.assert_allclose(BOX.from_unit(unit), [[-1, 2], [2, 2.75], [5, 3]], rtol=1e-6)
    np.testing.assert_allclose(BOX.clip(jnp.float32([[-9, 9], [4, 2.5]])), [[-1, 3], [4, 2.5]])
    np.testing.assert_allclose(AGENTS.clip(jnp.float32([[[2], [0]], [[0.5], [-9]]])), [[[1], [-2]], [[0.5], [-4]]])


@pytest.mark.parametrize("box, batch", [(BOX, (4000,)), (AGENTS, (4000, 2))])
def test_samples_fill_the_box(box, batch):
    drawn = np.asarray(box.sample(jax.random.key(0), batch))
    low, high = np.asarray(box.low), np.asarray(box.high)
    assert drawn.shape == (*batch, *box.shape)
    np.testing.assert_allclose(drawn.min(0), low, atol=0.02 * (high - low).max())
    np.testing.assert_allclose(drawn.max(0), high, atol=0.02 * (high - low).max())
    np.testing.assert_allclose(drawn.mean(0), (low + high) / 2, atol=0.1 * (high - low).max())


def test_every_discrete_action_is_drawn():
    assert sorted(set(np.asarray(Discrete(4).sample(jax.random.key(0), (99,))).tolist())) == [0, 1, 2, 3]


def test_a_transition_keeps_the_true_successor_and_both_ends():
    step = TimeStep(obs=1.0, next_obs=2.0, reward=3.0, terminated=jnp.bool_(False), truncated=jnp.bool_(True), info={})
    kept = Transition.of(0.0, 5.0, step)
    assert kept == Transition(obs=0.0, action=5.0, reward=3.0, next_obs=2.0, terminated=False, truncated=True)
    assert ended(step) and ended(step._replace(terminated=True, truncated=False))
    assert not ended(step._replace(truncated=jnp.bool_(False)))


class Arrives:
    """Dictionaries for observations; success in the step that the action names, of episodes of three steps."""

    max_steps, action_space, reports_success = 3, Discrete(4), True

    def reset(self, key):
        return jnp.int32(0), self.seen(0)

    def seen(self, t):
        return dict(place=jnp.float32(t), image=jnp.full((2, 2), t, jnp.uint8))

    def step(self, key, t, action):
        obs, over = self.seen(t + 1), t + 1 >= 3
        return t + 1, TimeStep(obs, obs, 1.0, jnp.bool_(False), over, {"success": t + 1 == action})


def test_a_batch_counts_the_success_of_an_episode():
    """Copy 0 arrives in the first step, copy 1 in the last one, copy 2 never; of the next episode only copy 1."""
    batch, keys = Batch(Arrives(), 3), jax.random.split(jax.random.key(0), 7)
    state, obs = batch.reset(keys[6])
    found, seen = [], [obs]
    for i, key in enumerate(keys[:6]):
        state, step = batch.step(key, state, jnp.array([1, 3, 0]) * jnp.array([i < 3, 1, 1]))
        found.append(step.info["episode"]["success"])
        seen.append(step.obs)
    np.testing.assert_array_equal(np.argwhere(found), [[2, 0], [2, 1], [5, 1]])
    np.testing.assert_array_equal([obs["place"][0] for obs in seen], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal([obs["image"][2, 1, 1] for obs in seen], [0, 1, 2, 0, 1, 2, 0])
    assert (step.next_obs["image"] == 3).all() and step.next_obs["image"].dtype == jnp.uint8
    returns, length, told = evaluate(lambda carry, obs, key: (carry, jnp.array([1, 3, 0])), batch, jax.random.key(1))
    np.testing.assert_array_equal(told["success"], [True, True, False])


class Steps:
    """It pays the number of its step, and ends after two of them (copy 0) or three; an obs is that number."""

    max_steps, action_space = 3, Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, key, t, action):
        obs, over = jnp.full(1, t + 1, jnp.float32), t + 1 >= 3 - action
        return t + 1, TimeStep(obs, obs, t + 1.0, over & (action > 0), over & (action == 0), {})


def test_a_batch_counts_each_episode_and_starts_it_anew():
    batch, keys = Batch(Steps(), 2), jax.random.split(jax.random.key(0), 7)
    state, obs = batch.reset(keys[6])
    counts, lengths, returns, seen = [], [], [], [obs]
    for key in keys[:6]:
        state, step = batch.step(key, state, jnp.array([1, 0]))  # copy 0 always ends early
        episode = step.info["episode"]
        counts.append(episode["count"])
        lengths.append(episode["length"])
        returns.append(episode["return"])
        seen.append(step.obs)
    np.testing.assert_array_equal(np.array(counts).T, [[0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1]])
    np.testing.assert_array_equal(np.array(lengths).T, [[0, 2, 0, 2, 0, 2], [0, 0, 3, 0, 0, 3]])
    np.testing.assert_array_equal(np.array(returns).T, [[0, 3, 0, 3, 0, 3], [0, 0, 6, 0, 0, 6]])
    np.testing.assert_array_equal(np.array(seen)[..., 0].T, [[0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 0, 1, 2, 0]])
    np.testing.assert_array_equal(step.next_obs[:, 0], [2, 3])
    np.testing.assert_array_equal([step.terminated, step.truncated], [[True, False], [False, True]])


class Counts(Steps):
    """It reports its step and ten times that, shaped like the reward: of each of two agents, or of one."""

    def __init__(self, agents):
        self.reports = "late", "later"
        if agents:
            self.num_agents, self.teams = 2, (0, 1)

    def step(self, key, t, action):
        t, step = super().step(key, t, action if action.ndim == 0 else action[0])
        scale = 1.0 if action.ndim == 0 else jnp.array([1.0, -2.0])
        return t, step._replace(reward=scale * t, info=dict(late=scale * t, later=10 * scale * t))


@pytest.mark.parametrize("agents", [0, 2])
def test_what_an_environment_reports_is_a_mean_over_each_episode(agents):
    """Copy 0 ends after two steps, copy 1 after three: means 1.5 and 2."""
    batch, action = Batch(Counts(agents), 2), jnp.array([[1, 1], [0, 0]]) if agents else jnp.array([1, 0])
    scale = np.array([1.0, -2.0]) if agents else np.array(1.0)
    keys, told = jax.random.split(jax.random.key(0), 7), []
    state, _ = batch.reset(keys[6])
    for key in keys[:6]:
        state, step = batch.step(key, state, action)
        told.append(step.info["episode"])
    due = np.multiply.outer([[0, 0], [1.5, 0], [0, 2], [1.5, 0], [0, 0], [1.5, 2]], scale)
    np.testing.assert_allclose([x["late"] for x in told], due)
    np.testing.assert_allclose([x["later"] for x in told], 10 * due)
    _, _, seen = evaluate(lambda carry, obs, key: (carry, 2 * action), batch, jax.random.key(1))
    np.testing.assert_allclose(seen["late"], np.multiply.outer([1, 2], scale))  # copy 0 ends in every step
    returns, length, seen = evaluate(lambda carry, obs, key: (carry, action), batch, jax.random.key(1))
    np.testing.assert_allclose(seen["late"], np.multiply.outer([1.5, 2], scale))
    row = score(returns, length, (0, 1) if agents else None, seen)
    sums = {name: np.sum([x[name] for x in told], axis=(0, 1))[None] for name in told[0]}
    means = means_of(dict(episode=sums), 6, (0, 1) if agents else None)
    for i, factor in enumerate(np.atleast_1d(scale)):
        column = f"later_agent{i}" if agents else "later"
        assert row[column] == pytest.approx(10 * factor * 1.75) and column.replace("later", "late") in row
        assert means[f"train_{column}"] == pytest.approx(10 * factor * (3 * 1.5 + 2 * 2) / 5)


@pytest.mark.parametrize("limit, last, flags", [(500, 12, (True, False)), (4, 4, (False, True))])
def test_a_pole_of_gymnax_falls_or_runs_out_of_time(limit, last, flags):
    env, key = make_env("gymnax/CartPole-v1", 1, max_steps_in_episode=limit).env, jax.random.key(0)
    (state, _), steps = env.reset(key), []
    while not (steps and ended(steps[-1])):
        state, step = jax.jit(env.step)(key, state, 0)
        steps.append(step)
    assert (step.terminated, step.truncated) == flags and 3 < len(steps) <= last
