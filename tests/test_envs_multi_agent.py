"""The multi-agent environments against hand-computed states and against loops in numpy."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import Batch, blocker_goal_seeker, multi_agent_tracking, particles, pursuit_evasion

OWN = {"tracking": multi_agent_tracking, "pursuit": pursuit_evasion, "blocker": blocker_goal_seeker}
UNUSED = jax.random.key(0)  # where nothing is drawn
NOTHING = np.zeros((3, 2), np.float32)

PARTICLES, TRACKING, PURSUIT = (f"core/envs/{n}.py" for n in ("particles", "multi_agent_tracking", "pursuit_evasion"))
BLOCKER = "core/envs/blocker_goal_seeker.py"
PLANTED_ERRORS = {
    "speed capped before the position moves": (PARTICLES,
        "position + velocity * dt + 0.5 * dt**2 * accel", "position + (velocity + accel * dt) * dt"),
    "no half in the exact step": (PARTICLES, "0.5 * dt**2 * accel", "dt**2 * accel"),
    "actions not clipped": (PARTICLES, "jnp.clip(action, -max_accel, max_accel)", "action"),
    "speed capped per axis": (PARTICLES, "norm(velocity)[:, None]", "jnp.abs(velocity)"),
    "one axis of the wall forgotten": (PARTICLES, "b[..., 0] + b[..., 1]", "b[..., 0] + b[..., 0]"),
    "wall penalty without its ceiling": (PARTICLES, "jnp.minimum(jnp.exp(2 * z - 2), 10.0)", "jnp.exp(2 * z - 2)"),
    "others seen from themselves": (PARTICLES, "agents[None] - agents[:, None]", "agents[:, None] - agents[None]"),
    "potential difference reversed": (TRACKING,
        "self.potential(agents, state.goal) - self.potential(state.agents, state.goal)",
        "self.potential(state.agents, state.goal) - self.potential(agents, state.goal)"),
    "reward at the new goal": (TRACKING, "self.potential(agents, state.goal) -",
        "self.potential(agents, self.next_goal(jax.random.clone(key), state.goal, state.t + 1)) -"),
    "goal moves between switches": (TRACKING, "t % self.goal_switch_every == 0", "t % self.goal_switch_every != 0"),
    "only one wall ends the episode": (TRACKING, "jnp.abs(agents[:, :2]).max(axis=1)", "agents[:, :2].max(axis=1)"),
    "all have to leave": (TRACKING, "outside.any()", "outside.all()"),
    "the fine shared by all": (TRACKING, "state.goal) - outside\n", "state.goal) - outside.any()\n"),
    "time limit one step late": (TRACKING, "t >= self.max_steps", "t > self.max_steps"),
    "end in the box counted twice": (TRACKING, " & ~terminated", ""),
    "rewards of pursuers and evader swapped": (PURSUIT,
        "jnp.append(bonus - 0.1 * distance, 0.1 * distance.sum() - bonus - wall)",
        "jnp.append(0.1 * distance - bonus - wall, bonus - 0.1 * distance.sum())"),
    "order of the agents' rewards reversed": (PURSUIT, "bonus - 0.1 * distance,", "bonus - 0.1 * distance[::-1],"),
    "only the first pursuer catches": (PURSUIT, "distance.min()", "distance[0]"),
    "radius of one body": (PURSUIT, "return self.pursuer_radius + self.evader_radius", "return self.pursuer_radius"),
    "evader's caps to the first agent": (PURSUIT,
        "[[pursuer]] * (self.num_agents - 1) + [[evader]]", "[[evader]] + [[pursuer]] * (self.num_agents - 1)"),
    "time limit terminates": (PURSUIT,
        "jnp.bool_(False), t >= self.max_steps", "t >= self.max_steps, jnp.bool_(False)"),
    "the win and the loss swapped": (BLOCKER,
        "self.win, jnp.where(timeout, -self.win", "-self.win, jnp.where(timeout, self.win"),
    "time-out beats the goal": (BLOCKER,
        "jnp.where(reached, self.win, jnp.where(timeout, -self.win, 0.0))",
        "jnp.where(timeout, -self.win, jnp.where(reached, self.win, 0.0))"),
    "shaping of the wrong sign": (BLOCKER, "outcome - self.shaping", "outcome + self.shaping"),
    "contact rewarded": (BLOCKER, "seeker - contact", "seeker + contact"),
    "time-out interrupts": (BLOCKER, "reached | timeout, jnp.bool_(False)", "reached, timeout"),
}


def loop_move(agents, action, accel, speed, dt=0.1):
    """The equations of motion, one agent and one axis at a time, in double precision."""
    new = np.array(agents, np.float64)
    for i, (x, y, vx, vy) in enumerate(np.array(agents, np.float64)):
        ax, ay = (max(-accel[i], min(accel[i], float(a))) for a in action[i])
        vx_new, vy_new = vx + ax * dt, vy + ay * dt
        scale = min(1.0, speed[i] / ((vx_new**2 + vy_new**2) ** 0.5 + 1e-6))
        new[i] = x + vx * dt + ax * dt * dt / 2, y + vy * dt + ay * dt * dt / 2, vx_new * scale, vy_new * scale
    return new


def loop_wall(position):
    total = 0.0
    for z in np.abs(position):
        total += 0.0 if z < 0.9 else 10 * (z - 0.9) if z < 1 else min(np.exp(2 * z - 2), 10.0)
    return total


def loop_reward(name, old, new, goal, last_step):
    """Rewards of a step from agents `old` to `new`, half_width 1 and default constants."""
    distance = [np.hypot(*(p - new[-1])[:2]) for p in new[:-1]]
    if name == "tracking":
        outside = [max(abs(p[0]), abs(p[1])) > 1 for p in new]
        gain = [np.hypot(*(o[:2] - goal)) - np.hypot(*(n[:2] - goal)) for o, n in zip(old, new, strict=True)]
        return [g / 8**0.5 - o for g, o in zip(gain, outside, strict=True)]
    if name == "pursuit":
        hit = 10.0 if any(d < 0.125 for d in distance) else 0.0
        return [-0.1 * d + hit for d in distance] + [0.1 * sum(distance) - hit - loop_wall(new[-1][:2])]
    before, after = np.hypot(*(old[-1][:2] - goal)), np.hypot(*(new[-1][:2] - goal))
    end = 10.0 if after < 0.1 else -10.0 if last_step else 0.0
    contact = 1.0 if any(d < 0.125 for d in distance) else 0.0
    sides = [-1.0] * (len(new) - 1) + [1.0]
    return [s * (end - 0.01 * (after - before)) - contact - loop_wall(p[:2]) for s, p in zip(sides, new, strict=True)]


def caps(name, n):
    if name == "tracking":
        return [2.0] * n, [np.inf] * n
    return [3.0] * (n - 1) + [4.0], [1.0] * (n - 1) + [1.3]


def make_state(name, agents, goal=(0.0, 0.0), t=0):
    agents, goal, t = jnp.asarray(agents, jnp.float32), jnp.asarray(goal, jnp.float32), jnp.int32(t)
    return OWN[name].State(agents, t) if name == "pursuit" else OWN[name].State(agents, goal, t)


@pytest.mark.parametrize("name, n", [("tracking", 1), ("tracking", 6), ("pursuit", 2), ("pursuit", 3), ("pursuit", 7),
                                     ("blocker", 2), ("blocker", 4)])
def test_steps_are_the_loops(name, n):
    env, rng = OWN[name].Env(num_agents=n), np.random.default_rng(n)
    step = jax.jit(env.step)
    for i in range(40):
        spread = 1.1 if i % 2 else 0.15  # also close enough to touch
        agents = np.float32(rng.uniform(-spread, spread, (n, 4)) * (1, 1, 1.5, 1.5))
        goal, action = np.float32(rng.uniform(-spread, spread, 2)), np.float32(rng.uniform(-6, 6, (n, 2)))
        state, ts = step(UNUSED, make_state(name, agents, goal, t=24 * (i % 3 == 0)), action)
        new = loop_move(agents, action, *caps(name, n))
        np.testing.assert_allclose(state.agents, new, atol=2e-6)
        assert ts.reward.shape == (n,)
        np.testing.assert_allclose(ts.reward, loop_reward(name, np.float64(agents), new, goal, i % 3 == 0), atol=2e-5)


def test_motion_by_hand():
    agents = [[0, 0, 0.5, 0], [0.9, 0.9, 0.8, 0.6], [-0.5, 0.5, 1.2, 0]]
    state, _ = pursuit_evasion.Env().step(UNUSED, make_state("pursuit", agents), np.float32([[9, -9], [3, 0], [9, 0]]))
    np.testing.assert_allclose(state.agents[0], [0.065, -0.015, 0.8, -0.3], atol=1e-6)  # 3, not 9
    speed = np.hypot(1.1, 0.6)  # over the cap: shortened, not turned
    np.testing.assert_allclose(state.agents[1], [0.995, 0.96, 1.1 / speed, 0.6 / speed], atol=1e-5)
    np.testing.assert_allclose(state.agents[2], [-0.36, 0.5, 1.3, 0], atol=1e-5)  # 0.12 + 0.5 · 4 · 0.01


def test_tracking_rewards_by_hand():
    env = multi_agent_tracking.Env(num_agents=3)
    agents = [[0, 0, 1, 0], [-0.5, 0, 0, 1], [0.5, -0.95, 0, -1]]  # towards the goal; across; out at the bottom
    state, ts = env.step(UNUSED, make_state("tracking", agents, (0.5, 0)), NOTHING)
    bound = 2 * 2**0.5
    expected = [0.1 / bound, (1 - 1.01**0.5) / bound, -0.1 / bound - 1]
    np.testing.assert_allclose(ts.reward, expected, atol=1e-6)
    assert ts.terminated and not ts.truncated
    _, ts = env.step(UNUSED, make_state("tracking", [[0, 0, 1, 0], [-0.5, 0, 0, 1], [0.5, -0.85, 0, -1]]), NOTHING)
    assert not ts.terminated


def test_a_return_is_the_distance_gained():
    env = multi_agent_tracking.Env(num_agents=4, max_steps=40)
    state, step = env.reset(jax.random.key(3))[0], jax.jit(env.step)

    def to_goal(state):
        return state.goal[None] - state.agents[:, :2]

    start, total = np.linalg.norm(to_goal(state), axis=1), 0
    for _ in range(40):  # critically damped: never outside, nearly there at the end
        state, ts = step(UNUSED, state, 9 * to_goal(state) - 6 * state.agents[:, 2:])
        total += np.float64(ts.reward)
    left = np.linalg.norm(to_goal(state), axis=1)
    assert ts.truncated and (left < 0.02).all()
    np.testing.assert_allclose(total, (start - left) / 8**0.5, atol=1e-5)


def test_pursuit_rewards_by_hand():
    env = pursuit_evasion.Env()

    def reward(*positions):
        return env.step(UNUSED, make_state("pursuit", [[*p, 0, 0] for p in positions]), NOTHING)[1].reward

    np.testing.assert_allclose(reward((0.3, 0), (0, 0.4), (0, 0)), [-0.03, -0.04, 0.07], atol=1e-6)
    np.testing.assert_allclose(reward((0.3, 0), (0, 0.12), (0, 0)), [9.97, 9.988, -9.958], atol=1e-5)
    np.testing.assert_allclose(reward((0.3, 0), (0, 0.13), (0, 0)), [-0.03, -0.013, 0.043], atol=1e-6)  # just not
    far, wall = 0.1 * np.hypot(0.45, 1.2), 0.5 + np.exp(0.4)  # the evader alone pays for the walls
    np.testing.assert_allclose(reward((0.5, 0), (0.95, 0), (0.95, -1.2)), [-far, -0.12, far + 0.12 - wall], atol=1e-5)
    np.testing.assert_allclose(reward((2, 2), (2, 2), (2, -0.95))[:2], -0.295, atol=1e-6)


def test_wall_penalty_by_hand():
    z = np.float32([[0.89, 0], [0.95, 0], [0, -0.95], [1.0, 0.0], [-1.5, 1.5], [9.0, 0.0]])
    expected = [0, 0.5, 0.5, 1, 2 * np.e, 10]
    np.testing.assert_allclose(particles.wall_penalty(z, 1.0), expected, rtol=1e-4)
    np.testing.assert_allclose(particles.wall_penalty(2 * z, 2.0), expected, rtol=1e-4)


@pytest.mark.parametrize("t, seeker, reward, terminated", [
    (0, (0.5, 0), [0.001, 0.001, -0.001], False),  # drifts 0.1 away from the goal
    (24, (0.5, 0), [10.001, 10.001, -10.001], True),  # out of time
    (0, (-0.05, 0), [-10, -10, 10], True),  # from −0.05 to +0.05: no nearer, but inside
    (24, (-0.05, 0), [-10, -10, 10], True),  # in at the last moment
])
def test_blocker_rewards_by_hand(t, seeker, reward, terminated):
    agents = [[0.8, 0.8, 0, 0], [-0.8, 0.8, 0, 0], [*seeker, 1, 0]]
    _, ts = blocker_goal_seeker.Env(num_agents=3).step(UNUSED, make_state("blocker", agents, t=t), NOTHING)
    np.testing.assert_allclose(ts.reward, reward, atol=1e-6)
    assert ts.terminated == terminated and not ts.truncated


def test_blockers_pay_for_contact_and_walls():
    agents = [[0.5, 0.12, 0, 0], [-0.95, 0, 0, 0], [0.5, 0, 0, 0]]
    _, ts = blocker_goal_seeker.Env(num_agents=3).step(UNUSED, make_state("blocker", agents), NOTHING)
    np.testing.assert_allclose(ts.reward, [-1, -1.5, -1], atol=1e-5)


def test_time_limits():
    far = [[0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0], [-0.5, 0, 0, 0]]
    for name in ("tracking", "pursuit"):
        env = OWN[name].Env(num_agents=3)
        for t, truncated in ((0, False), (23, False), (24, True)):
            state, ts = env.step(UNUSED, make_state(name, far, t=t), NOTHING)
            assert (ts.terminated, ts.truncated, state.t) == (False, truncated, t + 1)
    alone = multi_agent_tracking.Env(num_agents=1)
    _, ts = alone.step(UNUSED, make_state("tracking", [[1, 0, 1, 0]], t=24), NOTHING[:1])
    assert ts.terminated and not ts.truncated


def test_goal_switches():
    env = multi_agent_tracking.Env(num_agents=2, goal_switch_every=3, max_steps=100)
    state, step = env.reset(jax.random.key(1))[0], jax.jit(env.step)
    goals = [state.goal]
    for i in range(12):
        old, (state, ts) = state, step(jax.random.key(i), state, NOTHING[:2] + 1)
        np.testing.assert_allclose(ts.reward, loop_reward("tracking", np.float64(old.agents), np.float64(state.agents),
                                                          np.float64(old.goal), False), atol=1e-6)
        np.testing.assert_allclose(ts.obs[:, 4:6], state.goal[None] - state.agents[:, :2])
        goals.append(state.goal)
    moved = [bool((a != b).any()) for a, b in zip(goals, goals[1:], strict=False)]
    assert moved == [False, False, True] * 4
    keys = jax.random.split(jax.random.key(0), 500)
    draws = jax.vmap(env.next_goal, in_axes=(0, None, None))(keys, jnp.zeros(2), jnp.int32(3))
    assert 0.79 < np.abs(draws).max() < 0.8 and abs(draws.mean()) < 0.05
    resting = multi_agent_tracking.Env(num_agents=2)
    state, step = resting.reset(jax.random.key(1))[0], jax.jit(resting.step)
    for i in range(25):
        state, _ = step(jax.random.key(i), state, NOTHING[:2])
        np.testing.assert_array_equal(state.goal, goals[0])


@pytest.mark.parametrize("name, agents_within", [("tracking", 2.0), ("pursuit", 2.0), ("blocker", 1.8)])
def test_resets(name, agents_within):
    env = OWN[name].Env(half_width=2.0)
    state, obs = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 500))
    position, n = state.agents[..., :2], env.num_agents
    assert 0.99 * agents_within < np.abs(position).max() <= agents_within
    assert not state.agents[..., 2:].any() and not state.t.any()
    assert abs(np.corrcoef(position.reshape(500, 2 * n).T) - np.eye(2 * n)).max() < 0.2  # independent
    if name != "pursuit":
        assert 1.58 < np.abs(state.goal).max() <= 1.6
    assert obs.shape[:2] == (500, n)


@pytest.mark.parametrize("name, n", [("tracking", 3), ("pursuit", 2), ("pursuit", 5), ("blocker", 3)])
def test_observations(name, n):
    env = OWN[name].Env(num_agents=n, observe_others=True) if name == "tracking" else OWN[name].Env(num_agents=n)
    agents, goal = np.float32(np.random.default_rng(0).normal(size=(n, 4))), np.float32([0.3, -0.2])
    state = make_state(name, agents, goal, t=10)
    obs = env.observe(state.agents if name == "pursuit" else state)
    for i in range(n):
        to_goal, left = [goal - agents[i, :2]] * (name != "pursuit"), [[0.6]] * (name == "blocker")
        expected = np.concatenate([agents[i], *to_goal, *left] + [agents[j] - agents[i] for j in range(n) if j != i])
        np.testing.assert_allclose(obs[i], expected, atol=1e-6)
    if name == "tracking":
        np.testing.assert_array_equal(multi_agent_tracking.Env(num_agents=n).observe(state), obs[:, :6])


@pytest.mark.parametrize("name", OWN)
def test_batch(name):
    """Shapes are (E, N, ...), returns are per agent, and next_obs is the true successor at an end."""
    env = Batch(OWN[name].Env(num_agents=3, max_steps=4), 5)
    env_state, obs = env.reset(jax.random.key(0))
    total, ended, step = np.zeros((5, 3)), np.zeros(5, bool), jax.jit(env.step)
    for t in range(4):
        action = env.action_space.sample(jax.random.key(t), (5, 3))
        before, (env_state, ts) = env_state, step(jax.random.key(t), env_state, action)
        states = [jax.tree.map(lambda x, e=e: x[e], before.env) for e in range(5)]
        alone = [env.env.step(UNUSED, state, a)[1] for state, a in zip(states, action, strict=True)]
        np.testing.assert_allclose(ts.next_obs, np.stack([a.obs for a in alone]), atol=1e-6)
        total = total + np.stack([a.reward for a in alone])
        done = ts.terminated | ts.truncated
        np.testing.assert_allclose(ts.info["episode"]["return"], total * done[:, None], atol=1e-5)
        total, ended = total * ~done[:, None], ended | done
        assert ts.obs.shape == obs.shape == (5, 3, obs.shape[-1]) and ts.reward.shape == (5, 3)
        assert done.shape == (5,) and (env_state.env.t[done] == 0).all()
    assert ended.all()


def test_settings_are_those_of_the_docstrings():
    for module, numbers in ((blocker_goal_seeker, (2, 1.0, 3.0, 4.0, 1.0, 1.3, 0.1, 0.125, 0.01, 10.0, 0.1, 25)),
                            (multi_agent_tracking, (6, 1.0, 2.0, 0.1, 25, 0, False)),
                            (pursuit_evasion, (3, 1.0, 3.0, 4.0, 1.0, 1.3, 0.075, 0.05, 0.1, 25))):
        assert dataclasses.astuple(module.Env()) == numbers


def test_agents_and_goals_start_all_over_their_squares():
    keys = jax.random.split(jax.random.key(0), 3000)  # so many that the edges are nearly reached
    agents, goals = jax.vmap(lambda key: particles.spawn(key, 4, 2.0, 0.5))(keys)
    assert (agents[..., 2:] == 0).all()
    for places, half_width in ((agents[..., :2].reshape(-1, 2), 2.0), (goals, 0.5)):
        np.testing.assert_allclose(places.min(0), -half_width, atol=0.03 * half_width)
        np.testing.assert_allclose(places.max(0), half_width, atol=0.03 * half_width)
        np.testing.assert_allclose(places.mean(0), 0, atol=0.15 * half_width)
