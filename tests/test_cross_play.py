"""Cross-play and films, on policies that are known: each seed pushes every agent of it its own way."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import Batch, pursuit_evasion
from core.errors import UserError
from launchers import runs
from launchers.evaluate import play_all_pairs

ENV = pursuit_evasion.Env(num_agents=3)
EVALUATE, RUNS = "launchers/evaluate.py", "launchers/runs.py"
PLANTED_ERRORS = {
    "seeds of the teams exchanged": (EVALUATE, "jax.vmap(jax.vmap(test, (None, 0)), (0, None))",
                                     "jax.vmap(jax.vmap(test, (0, None)), (None, 0))"),
    "actions of the teams exchanged": (EVALUATE, "chosen, ours.shape), ours, theirs)",
                                       "chosen, ours.shape), theirs, ours)"),
    "returns of the teams exchanged": (EVALUATE, "returns[first].sum(), returns[~first].sum()",
                                       "returns[~first].sum(), returns[first].sum()"),
    "one seed plays itself": (EVALUATE, "for m, r in zip(methods, runs, strict=True)]\n\n        def act",
                              "for m, r in zip(methods, runs[:1] * 2, strict=True)]\n\n        def act"),
    "first state not filmed": (RUNS, "jnp.concatenate([jnp.asarray(first)[None], rest])",
                               "jnp.concatenate([rest[:1], rest])"),
    "film goes on after the end": (RUNS, "int(done.argmax()) + 1 if done.any() else len(reward)", "len(reward)"),
}


def act(run, carry, obs, key):
    return carry, jnp.broadcast_to(run, (*obs.shape[:2], 2))


PUSH = SimpleNamespace(act=act)


def returns_of(pursuer, evader, key, episodes=5):
    """The same game by a plain loop: pursuers accelerate by `pursuer`, the evader by `evader`, both components."""
    env = Batch(ENV, episodes)
    step_env = jax.jit(env.step)
    reset_key, key = jax.random.split(key)
    state, _ = env.reset(reset_key)
    action = jnp.broadcast_to(jnp.array([pursuer, pursuer, evader])[None, :, None], (episodes, 3, 2))
    total = 0.0
    for t in range(ENV.max_steps):
        _, env_key = jax.random.split(jax.random.fold_in(key, t))
        state, step = step_env(env_key, state, action)
        total = total + np.asarray(step.reward)
    return total.mean(0)


def test_each_seeds_team_meets_each_of_the_others():
    mine, others = jnp.array([0.5, -1.0]), jnp.array([1.0, 0.0, -2.0])
    got = play_all_pairs(PUSH, mine, PUSH, others, Batch(ENV, 5), jax.random.key(3))
    assert got.shape == (2, 2, 3)
    for i, pursuer in enumerate(mine):
        for j, evader in enumerate(others):
            expected = returns_of(pursuer, evader, jax.random.key(3))
            np.testing.assert_allclose(got[:, i, j], [expected[:2].sum(), expected[2]], rtol=1e-4, atol=1e-4)


def test_without_opponents_there_is_no_cross_play():
    with pytest.raises(UserError, match="teams"):
        no_teams = SimpleNamespace(env=object(), num_envs=1)
        play_all_pairs(PUSH, jnp.zeros(1), PUSH, jnp.zeros(1), no_teams, jax.random.key(0))


@pytest.mark.parametrize("name", ["multi_agent_tracking", "pursuit_evasion"])
def test_an_episode_is_played_from_its_first_state_to_its_last(name):
    env = runs.drawable(name)
    states, reward, _ = runs.play(PUSH, jnp.float32(4.0), env, jax.random.key(0))
    np.testing.assert_array_equal(states.t, np.arange(len(reward) + 1))
    outside = np.abs(np.asarray(states.agents)[:, :, :2]).max((1, 2)) > 1.0
    if name == "multi_agent_tracking":  # pushed out of the box: over before the time limit, and not before that
        assert outside.tolist() == [False] * len(reward) + [True] and len(reward) < env.max_steps
    else:
        assert len(reward) == env.max_steps
    assert len(runs.play(PUSH, jnp.float32(0.0), env, jax.random.key(0), steps=3)[1]) == 3
