"""N − 1 pursuers and, as the last agent, one faster evader: double integrators in a box that only it must mind.

    pursuer i:  r_i = −0.1 d_i + 10 hit
    evader:     r   = +0.1 Σ_i d_i − 10 hit − Σ_axes b(|x| / w)

    d_i distance of pursuer i to the evader after the step, hit = any d_i < the sum of the two radii, paid to all at
    every step in contact, b particles.wall_penalty. Nothing terminates; the episode is truncated at max_steps.

Agent i observes (p_i, v_i) and (p_j − p_i, v_j − v_i) of all others, the evader last: 4 N numbers, the whole state.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import particles
from core.envs.interface import Box, TimeStep
from core.render import BLUE, GREY, ORANGE, RED, REDS, Circle, Scene


class State(NamedTuple):
    agents: jax.Array  # [N, 4] x, y, vx, vy; the evader last
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    num_agents: int = 3
    half_width: float = 1.0
    pursuer_max_accel: float = 3.0
    evader_max_accel: float = 4.0
    pursuer_max_speed: float = 1.0
    evader_max_speed: float = 1.3
    pursuer_radius: float = 0.075
    evader_radius: float = 0.05
    dt: float = 0.1
    max_steps: int = 25

    @property
    def teams(self):
        return (0,) * (self.num_agents - 1) + (1,)

    @property
    def action_space(self):
        """One space for all, as wide as the strongest agent's; each is clipped to its own cap."""
        high = max(self.pursuer_max_accel, self.evader_max_accel)
        return Box((-high,) * 2, (high,) * 2)

    @property
    def capture_radius(self):
        return self.pursuer_radius + self.evader_radius

    def reset(self, key):
        agents, _ = particles.spawn(key, self.num_agents, self.half_width, 0.0)
        return State(agents, jnp.int32(0)), self.observe(agents)

    def step(self, key, state, action):
        agents = particles.move(state.agents, action, self.dt,
                                self.caps(self.pursuer_max_accel, self.evader_max_accel),
                                self.caps(self.pursuer_max_speed, self.evader_max_speed))
        distance = particles.norm(agents[:-1, :2] - agents[-1:, :2])
        bonus = jnp.where(distance.min() < self.capture_radius, 10.0, 0.0)
        wall = particles.wall_penalty(agents[-1, :2], self.half_width)
        reward = jnp.append(bonus - 0.1 * distance, 0.1 * distance.sum() - bonus - wall)
        t, obs = state.t + 1, self.observe(agents)
        return State(agents, t), TimeStep(obs, obs, reward, jnp.bool_(False), t >= self.max_steps, {})

    def caps(self, pursuer, evader):
        return np.float32([[pursuer]] * (self.num_agents - 1) + [[evader]])

    def observe(self, agents):
        return jnp.concatenate([agents, particles.others(agents)], axis=1)

    def draw(self, state):
        position, w = state.agents[:, :2], self.half_width
        low = np.minimum(-1.15 * w, position.min(axis=0) - 0.15)  # pursuers may leave the box
        high = np.maximum(1.15 * w, position.max(axis=0) + 0.15)
        hit = np.linalg.norm(position[:-1] - position[-1], axis=1).min() < self.capture_radius
        ring = Circle(position[-1], self.capture_radius, RED if hit else ORANGE, filled=False)
        pursuers = [Circle(p, self.pursuer_radius, REDS[i % len(REDS)], label=f"pursuer {i}")
                    for i, p in enumerate(position[:-1])]
        evader = Circle(position[-1], self.evader_radius, BLUE, label="evader")
        return Scene(low, high, [particles.box(w, GREY), ring, *pursuers, evader])
