"""Environments of gymnax >= 1.0, by their names there."""
import difflib
import importlib
import sys
import types

import numpy as np

from core.config import check_settings
from core.envs.interface import Box, Discrete, TimeStep
from core.errors import UserError


class Env:
    def __init__(self, name: str, /, **params):
        gymnax = _gymnax(name)
        if name not in gymnax.registered_envs:
            close = difflib.get_close_matches(name, gymnax.registered_envs, n=1)
            hint = f'; did you mean "gymnax/{close[0]}"?' if close else ""
            raise UserError(f'unknown environment "gymnax/{name}"{hint}')
        self.env, defaults = gymnax.make(name)
        check_settings(f"gymnax/{name}", params, vars(defaults))
        self.params = defaults.replace(**params)
        self.max_steps = int(self.params.max_steps_in_episode)
        space = self.env.action_space(self.params)
        self.action_space = Discrete(int(space.n)) if hasattr(space, "n") else _box(space)

    def reset(self, key):
        obs, state = self.env.reset_env(key, self.params)
        return state, obs

    def step(self, key, state, action):
        # step_env, not step: the latter resets by itself. Its reset would be paid for on top of ours.
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        truncated = self.env.is_truncated(state, self.params)
        return state, TimeStep(obs, obs, reward, terminated, truncated & ~terminated, {})

    def draw(self, state):
        """Scene of one state: classic control, the four rooms, and the grids of MinAtar."""
        from core.render import BLACK, BLUE, GREEN, GREY, ORANGE, PALETTE, Circle, Line, Scene

        name = self.env.name
        if name == "CartPole-v1":
            cart, tip = (state.x, 0.0), (state.x + np.sin(state.theta), np.cos(state.theta))
            ground = Line([(-2.4, 0), (2.4, 0)], BLACK)
            return Scene((-2.6, -0.4), (2.6, 1.4), [ground, Line([cart, tip], ORANGE, 6), Circle(cart, 0.15, BLUE)])
        if name == "Pendulum-v1":
            tip = (np.sin(state.theta), np.cos(state.theta))
            return Scene((-1.3, -1.3), (1.3, 1.3), [Line([(0, 0), tip], ORANGE, 8), Circle((0, 0), 0.07, BLACK)])
        if name == "Acrobot-v1":  # both links of length 1, the second angle counts from the first; the line is the goal
            elbow = np.array([np.sin(state.joint_angle1), -np.cos(state.joint_angle1)])
            both = state.joint_angle1 + state.joint_angle2
            tip = elbow + (np.sin(both), -np.cos(both))
            return Scene((-2.2, -2.2), (2.2, 2.2), [
                Line([(-2.2, 1), (2.2, 1)], GREEN, 1), Line([(0, 0), elbow, tip], ORANGE, 8),
                Circle((0, 0), 0.08, BLACK), Circle(elbow, 0.08, BLACK), Circle(tip, 0.08, BLUE)])
        if name in ("MountainCar-v0", "MountainCarContinuous-v0"):
            def hill(x):
                return np.stack([x, 0.45 * np.sin(3 * x) + 0.55], axis=-1)

            road = np.linspace(self.params.min_position, self.params.max_position, 60)
            flag = hill(self.params.goal_position)
            return Scene((-1.3, -0.05), (0.7, 1.35), [
                Line(hill(road), BLACK), Line([flag, flag + (0, 0.2)], GREEN, 3),
                Circle(hill(state.position) + (0, 0.05), 0.05, BLUE)])
        if name == "FourRooms-misc":  # states are (row, column)
            open_cells = np.asarray(self.env.env_map)
            rows, columns = open_cells.shape
            walls = [Circle((x, -y), 0.45, GREY) for y, x in np.argwhere(open_cells == 0)]
            (y, x), (goal_y, goal_x) = np.asarray(state.pos), np.asarray(state.goal)
            return Scene((-0.6, 0.4 - rows), (columns - 0.4, 0.6), [
                *walls, Circle((goal_x, -goal_y), 0.45, GREEN, filled=False), Circle((x, -y), 0.3, BLUE)])
        if name.endswith("MinAtar"):
            grid = np.asarray(self.env.get_obs(state))
            cells = [Circle((x, -y), 0.45, PALETTE[c % len(PALETTE)]) for y, x, c in np.argwhere(grid)]
            return Scene((-0.6, -len(grid) + 0.4), (len(grid) - 0.4, 0.6), cells)
        raise UserError(f'environment "gymnax/{name}" cannot be drawn')


class _Seaborn(types.ModuleType):
    """Stands for seaborn until somebody asks it for something."""

    def __getattr__(self, name):
        return getattr(importlib.import_module("seaborn"), name)


def _gymnax(name):
    # gymnax imports seaborn, with pandas and scipy.stats: most of a second of every start, for colours of one picture.
    ours = sys.modules.setdefault("seaborn", _Seaborn("seaborn"))
    try:
        return importlib.import_module("gymnax")
    except ImportError as error:
        raise UserError(f'"gymnax/{name}" needs the extra `envs`: pip install -e ".[envs]"') from error
    finally:
        if isinstance(ours, _Seaborn):
            del sys.modules["seaborn"]


def _box(space):
    low, high = (np.broadcast_to(bound, space.shape).tolist() for bound in (space.low, space.high))
    return Box(tuple(low), tuple(high))
