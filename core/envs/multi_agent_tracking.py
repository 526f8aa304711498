"""N double integrators drive to one goal inside a box.

    r_i = Φ_i(s') − Φ_i(s) − 1[p_i' outside],   Φ_i = 1 − |p_i − g| / (2√2 w)

    w half_width, g the goal while the step was taken. No speed cap. The episode terminates when any agent leaves the
    box, which is all that couples the agents, and is truncated at max_steps. An agent that drives to a resting goal
    and stays earns its initial distance / (2√2 w), and no policy earns more.

An agent observes (p_i, v_i, g − p_i), 6 numbers: all that its own reward depends on. `observe_others` appends
(p_j − p_i, v_j − v_i) of every other agent, and the observation is then as complete as the state.
With `goal_switch_every` = k > 0 a new goal is drawn after every k-th step.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.envs import particles
from core.envs.interface import Box, TimeStep
from core.render import GREEN, GREY, PALETTE, Circle, Scene


class State(NamedTuple):
    agents: jax.Array  # [N, 4] x, y, vx, vy
    goal: jax.Array  # [2]
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    num_agents: int = 6
    half_width: float = 1.0
    max_accel: float = 2.0
    dt: float = 0.1
    max_steps: int = 25
    goal_switch_every: int = 0  # steps; 0: the goal rests
    observe_others: bool = False

    @property
    def action_space(self):
        return Box((-self.max_accel,) * 2, (self.max_accel,) * 2)

    def reset(self, key):
        agents, goal = particles.spawn(key, self.num_agents, self.half_width, 0.8 * self.half_width)
        state = State(agents, goal, jnp.int32(0))
        return state, self.observe(state)

    def step(self, key, state, action):
        agents = particles.move(state.agents, action, self.dt, self.max_accel)
        outside = jnp.abs(agents[:, :2]).max(axis=1) > self.half_width
        reward = self.potential(agents, state.goal) - self.potential(state.agents, state.goal) - outside
        t = state.t + 1
        state = State(agents, self.next_goal(key, state.goal, t), t)
        obs, terminated = self.observe(state), outside.any()
        return state, TimeStep(obs, obs, reward, terminated, (t >= self.max_steps) & ~terminated, {})

    def potential(self, agents, goal):
        return 1 - particles.norm(agents[:, :2] - goal[None]) / (2 * 2**0.5 * self.half_width)

    def next_goal(self, key, goal, t):
        if not self.goal_switch_every:
            return goal
        new = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * (0.8 * self.half_width)
        return jnp.where(t % self.goal_switch_every == 0, new, goal)

    def observe(self, state):
        own = jnp.concatenate([state.agents, state.goal[None] - state.agents[:, :2]], axis=1)
        return jnp.concatenate([own, particles.others(state.agents)], axis=1) if self.observe_others else own

    def draw(self, state):
        view, w = 1.15 * self.half_width, self.half_width
        goal = [Circle(state.goal, 0.09 * w, GREEN, filled=False), Circle(state.goal, 0.03 * w, GREEN)]
        agents = [Circle(agent[:2], 0.04 * w, PALETTE[i % len(PALETTE)], label=f"agent {i}")
                  for i, agent in enumerate(state.agents)]
        return Scene((-view, -view), (view, view), [particles.box(w, GREY), *goal, *agents])
