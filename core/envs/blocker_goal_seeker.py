"""N − 1 blockers keep, and the last agent, the faster seeker, drives, to a goal.

    seeker:     r = −k Δd ± 10 − contact − Σ_axes b(|x| / w)
    blocker i:  r = +k Δd ∓ 10 − contact − Σ_axes b(|x_i| / w)

    Δd change of the seeker's distance to the goal, contact = 1 where any blocker is closer than contact_radius to the
    seeker, b particles.wall_penalty. The ±10 come at the end: the upper sign when the seeker is within goal_radius of
    the goal, the lower one when time has run out.

Both ends terminate: running out of time decides the game, it does not interrupt it. So an agent observes, beside
(p_i, v_i, g − p_i) and (p_j − p_i, v_j − v_i) of all others with the seeker last, the share of time left: 4 N + 3.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import particles
from core.envs.interface import Box, TimeStep
from core.render import BLUE, GREEN, GREY, REDS, Circle, Scene


class State(NamedTuple):
    agents: jax.Array  # [N, 4] x, y, vx, vy; the seeker last
    goal: jax.Array  # [2]
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    num_agents: int = 2
    half_width: float = 1.0
    blocker_max_accel: float = 3.0
    seeker_max_accel: float = 4.0
    blocker_max_speed: float = 1.0
    seeker_max_speed: float = 1.3
    goal_radius: float = 0.1
    contact_radius: float = 0.125
    shaping: float = 0.01  # k
    win: float = 10.0
    dt: float = 0.1
    max_steps: int = 25

    @property
    def teams(self):
        return (0,) * (self.num_agents - 1) + (1,)

    @property
    def action_space(self):
        """One space for all, as wide as the strongest agent's; each is clipped to its own cap."""
        high = max(self.blocker_max_accel, self.seeker_max_accel)
        return Box((-high,) * 2, (high,) * 2)

    def reset(self, key):
        agents, goal = particles.spawn(key, self.num_agents, 0.9 * self.half_width, 0.8 * self.half_width)
        state = State(agents, goal, jnp.int32(0))
        return state, self.observe(state)

    def step(self, key, state, action):
        agents = particles.move(state.agents, action, self.dt,
                                self.caps(self.blocker_max_accel, self.seeker_max_accel),
                                self.caps(self.blocker_max_speed, self.seeker_max_speed))
        t = state.t + 1
        distance = particles.norm(agents[-1, :2] - state.goal)
        reached, timeout = distance < self.goal_radius, t >= self.max_steps
        outcome = jnp.where(reached, self.win, jnp.where(timeout, -self.win, 0.0))
        seeker = outcome - self.shaping * (distance - particles.norm(state.agents[-1, :2] - state.goal))
        contact = particles.norm(agents[:-1, :2] - agents[-1:, :2]).min() < self.contact_radius
        sign = np.float32([-1.0] * (self.num_agents - 1) + [1.0])
        reward = sign * seeker - contact - particles.wall_penalty(agents[:, :2], self.half_width)
        state = State(agents, state.goal, t)
        obs = self.observe(state)
        return state, TimeStep(obs, obs, reward, reached | timeout, jnp.bool_(False), {})

    def caps(self, blocker, seeker):
        return np.float32([[blocker]] * (self.num_agents - 1) + [[seeker]])

    def observe(self, state):
        left = jnp.full((self.num_agents, 1), 1 - state.t / self.max_steps)
        relative_goal = state.goal[None] - state.agents[:, :2]
        return jnp.concatenate([state.agents, relative_goal, left, particles.others(state.agents)], axis=1)

    def draw(self, state):
        position, view = state.agents[:, :2], 1.15 * self.half_width
        goal = Circle(state.goal, self.goal_radius, GREEN, filled=False)
        ring = Circle(position[-1], self.contact_radius, GREY, filled=False)
        blockers = [Circle(p, 0.06 * self.half_width, REDS[i % len(REDS)], label=f"blocker {i}")
                    for i, p in enumerate(position[:-1])]
        seeker = Circle(position[-1], 0.05 * self.half_width, BLUE, label="seeker")
        box = particles.box(self.half_width, GREY)
        return Scene((-view, -view), (view, view), [box, goal, ring, *blockers, seeker])
