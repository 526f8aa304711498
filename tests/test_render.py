"""Frames are looked at: the right colour at the right pixel for known states; files are read back."""
import importlib
import os
import subprocess
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core import files, render
from core.envs import (
    blocker_goal_seeker,
    cartpole_balance,
    cartpole_swingup,
    damped_pendulum,
    from_gymnax,
    hidden,
    multi_agent_tracking,
    planar_drone_wind,
    pursuit_evasion,
)
from core.envs.interface import TimeStep
from core.errors import UserError
from core.render import BLUE, GREEN, RED, WHITE, Circle, Line, Scene, film, scenes, write_gif, write_mp4

RENDER, PURSUIT, GYMNAX = "core/render.py", "core/envs/pursuit_evasion.py", "core/envs/from_gymnax.py"
WATCHED = "test_a_host_environment_is_filmed_by_its_own_renderer"
PLANTED_ERRORS = {
    "upside down": (RENDER, "- (low[0], high[1])) * (scale, -scale)", "- (low[0], low[1])) * (scale, scale)"),
    "mirrored": (RENDER, "(low[0], high[1])) * (scale, -scale)", "(high[0], high[1])) * (-scale, -scale)"),
    "every ring filled": (RENDER, "if shape.filled else", "if True else"),
    "radius for diameter": (RENDER, "shape.radius * scale", "shape.radius / 2 * scale"),
    "camera follows the first scene": (RENDER, "np.min([s.low for s in scenes], axis=0)", "np.asarray(scenes[0].low)"),
    "endless trails": (RENDER, "paths[max(0, t - trail):t + 1, i]", "paths[:t + 1, i]"),
    "trails look ahead": (RENDER, "paths[max(0, t - trail):t + 1, i]", "paths[t:t + trail, i]"),
    "rewards for returns": (RENDER, "reward.cumsum(axis=0)", "reward"),
    "curves of other agents": (RENDER, "y[:t + 1, i]", "y[:t + 1, -1 - i]"),
    "the future shown": (RENDER, "x[:t + 1], y[:t + 1, i]", "x, y[:, i]"),
    "frames per second inverted": (RENDER, "round(1000 / fps)", "round(10 * fps)"),
    "shapes among the returns": (RENDER, "draw.rectangle([left, 0, left + self.width, self.height], WHITE)", "pass"),
    "a pendulum on its head": ("core/envs/damped_pendulum.py", "-np.cos(state.x[0])", "np.cos(state.x[0])"),
    "half-written file in place": ("core/files.py", "        yield partial\n", "        yield path\n"),
    "variances for deviations": (RENDER, "np.sqrt(np.maximum(values, 0))", "np.maximum(values, 0)"),
    "a pole on its head": ("core/envs/cartpole_swingup.py", "-length * np.cos(angle)])", "length * np.cos(angle)])"),
    "a pole that leans away": ("core/envs/cartpole_balance.py", "position + length * np.sin(angle)",
                               "position - length * np.sin(angle)"),
    "a pole of the wrong length": ("core/envs/cartpole_swingup.py", "2 * np.exp(state.params.log_half_length)",
                                   "2 * self.half_length"),
    "a drone that leans away": ("core/envs/planar_drone_wind.py", "-np.sin(state.x[2])]", "np.sin(state.x[2])]"),
    "the plan of another agent": ("core/envs/unicycle_pursuit.py", "return x[4:6]", "return x[:2]"),
    "an elbow that does not add up": (GYMNAX, "both = state.joint_angle1 + ", "both = "),
    "a car beside the road": (GYMNAX, "hill(state.position) +", "hill(-state.position) +"),
    "rooms transposed": (GYMNAX, "Circle((x, -y), 0.3, BLUE)", "Circle((y, -x), 0.3, BLUE)"),
    "an episode without its last reward": ("launchers/runs.py", "        rewards.append(ts.reward[0])\n", "", WATCHED),
    "the first picture missing": ("launchers/runs.py", "[start.render()], []", "[], []", WATCHED),
    "hit drawn as a miss": (PURSUIT, "RED if hit else ORANGE", "ORANGE if hit else RED"),
}


def at(frame, x, y, low=-1.0, high=1.0):
    """The colour at world coordinates of a frame whose arena is the leftmost square."""
    size = len(frame)
    scale = size / (high - low)
    return tuple(int(c) for c in frame[round((high - y) * scale), round((x - low) * scale)])


def near(frame, x, y, colour, low=-1.0, high=1.0):
    """Whether a thin line of this colour passes within a pixel."""
    scale = len(frame) / (high - low)
    row, column = round((high - y) * scale), round((x - low) * scale)
    return bool((frame[row - 1:row + 2, column - 1:column + 2] == colour).all(axis=-1).any())


def square(*shapes, size=1.0):
    return Scene((-size, -size), (size, size), list(shapes))


def test_shapes_lie_where_they_should():
    frame = film([square(Line([(-0.8, -0.5), (0.8, -0.5)], GREEN, 4), Circle((0.5, 0.25), 0.2, RED),
                         Circle((-0.5, 0.25), 0.2, BLUE, filled=False))])[0]
    assert frame.shape == (384, 384, 3) and frame.dtype == np.uint8
    assert at(frame, 0.5, 0.25) == at(frame, 0.66, 0.25) == at(frame, 0.5, 0.09) == RED
    assert at(frame, 0.73, 0.25) == at(frame, 0.5, 0.48) == WHITE
    assert at(frame, -0.5, 0.25) == WHITE and near(frame, -0.5, 0.445, BLUE) and near(frame, -0.695, 0.25, BLUE)
    assert at(frame, 0, -0.5) == at(frame, -0.75, -0.5) == GREEN and at(frame, 0.9, -0.5) == at(frame, 0, 0.5) == WHITE


def test_the_camera_rests_and_sees_everything():
    still = Circle((0, 0), 0.1, RED)
    frames = film([square(still), square(still, size=2.0), Scene((-1, -2), (3, 2), [still])])
    assert frames.shape == (3, 384, round(384 / 4 * 5), 3)  # x from −2 to 3, y from −2 to 2
    for frame in frames:
        np.testing.assert_array_equal(frame[192, 192], RED)


def test_agents_leave_trails_that_end():
    walk = [square(Circle((-0.9 + 0.05 * t, 0.5), 0.03, BLUE, label="walker"), Circle((0.05 * t, -0.5), 0.03, RED))
            for t in range(21)]
    frame = film(walk, trail=10)[-1]
    assert at(frame, 0.1, 0.5) == BLUE
    near, far = at(frame, 0.0, 0.5), at(frame, -0.3, 0.5)
    assert WHITE > far > near > BLUE  # fading with age
    assert at(frame, -0.5, 0.5) == at(frame, 0.2, 0.5) == WHITE  # older than ten steps; the future
    assert at(frame, 0.065, 0.5) != WHITE  # it reaches the agent, whose radius is 0.03 here
    assert at(frame, 0.9, -0.5) == WHITE  # no label, no trail


def test_returns_grow_beside_the_arena():
    agents = [Circle((0.5, 0), 0.1, RED, label="one"), Circle((-0.5, 0), 0.1, BLUE, label="two")]
    reward = np.float32([[1, -1]] * 10)
    frames = film([square(*agents)] * 11, reward)
    assert frames.shape == (11, 384, 384 + 256, 3)
    panel = frames[:, :, 384:]
    for t, frame in enumerate(panel):
        plot = frame[56:360, 50:]  # below the legend, right of the numbers
        for colour, sign in ((RED, -1), (BLUE, 1)):  # rows grow downwards
            rows, columns = np.nonzero((plot == colour).all(axis=-1))
            assert (t == 0) == (len(rows) == 0)
            if t > 1:
                assert sign * (rows[columns.argmax()] - rows[columns.argmin()]) > 8 * t
                assert abs(columns.max() - 190 * t / 10) < 4
    assert (panel[:, :50] == RED).all(axis=-1).any() and (panel[:, :50] == BLUE).all(axis=-1).any()  # the legend
    assert film([square()] * 3, np.zeros(2)).shape[2] == 640  # one return of no agent in sight


def test_no_shape_reaches_into_the_returns():
    beyond = Line([(-0.5, 0.3), (3.0, 0.3)], GREEN, 4)
    plain, frames = film([square()] * 3, np.ones(2)), film([square(beyond)] * 3, np.ones(2))
    np.testing.assert_array_equal(frames[:, :, 384:], plain[:, :, 384:])
    assert at(frames[0], 0.9, 0.3) == GREEN


HIDDEN = dict(  # environments with a hidden truth, and the agent that it moves
    cartpole_balance="tip", cartpole_swingup="tip", damped_pendulum="pendulum", linear_tracking="system",
    merging_idm="agent", planar_drone_wind="drone", pursuit_evasion_lqr="pursuer", unicycle_pursuit="pursuer")


@pytest.mark.parametrize("name", HIDDEN)
def test_what_hidden_params_move_is_drawn_where_it_is(name):
    env = importlib.import_module(f"core.envs.{name}").Env()
    start, _ = jax.jit(env.reset)(jax.random.key(1))
    ends = name == "cartpole_balance"  # at the edge of the picture
    for far in ((0, 0), (30, 20), (-30, -20))[:1 if ends else 3]:
        state = start._replace(x=(start.x + 0.1 * jnp.arange(start.x.size)).at[:2].add(jnp.float32(far)))
        scene = env.draw(jax.device_get(state))
        agents = {shape.label: shape.centre for shape in scene.shapes if isinstance(shape, Circle) and shape.label}
        np.testing.assert_allclose(agents[HIDDEN[name]], env.place(state.x), rtol=1e-5, atol=1e-6)
        assert all((scene.low < np.asarray(centre)).all() and (centre < np.asarray(scene.high)).all()
                   for centre in agents.values())


def test_poles_and_drones_stand_as_they_should():
    """The tip of an upright pole is above the cart, a tilted one on its side; a drone that climbs to the right leans
    to the right; a longer pole is drawn longer."""
    def shapes(module, x, **options):
        state = hidden.State(jnp.float32(x), module.Env(**options).truth, 0)  # of another truth than the nominal one
        scene = module.Env().draw(jax.device_get(state))
        return {s.label: np.asarray(s.centre) for s in scene.shapes if isinstance(s, Circle) and s.label}, scene.shapes

    for pole, upright in ((cartpole_swingup, [0.3, np.pi, 0, 0]), (cartpole_balance, [0.3, 0, 0, 0])):
        length = 2 * pole.Env().half_length
        np.testing.assert_allclose(shapes(pole, upright)[0]["tip"], [0.3, length], atol=1e-5)
        np.testing.assert_allclose(shapes(pole, upright, half_length=1.0)[0]["tip"], [0.3, 2.0], atol=1e-5)
    fallen = shapes(cartpole_swingup, [0.3, np.pi + 0.5, 0, 0])[0]["tip"][0] - 0.3
    env = cartpole_swingup.Env()
    assert np.sign(fallen) == np.sign(env.place(jnp.float32([0, np.pi + 0.5, 0, 0]))[0]) > 0
    right = shapes(cartpole_balance, [0, 0, 0.2, 0])[0]["tip"]
    assert right[0] > 0.1
    arms = next(np.asarray(s.points) for s in shapes(planar_drone_wind, [0, 5, 0.5, 0, 0, 0])[1]
                if isinstance(s, Line) and s.width == 3)
    thrust = np.asarray(planar_drone_wind.Env().thrust(jnp.float32([0, 5, 0.5, 0, 0, 0]), jnp.ones(2)))[:2] + [0, 9.81]
    assert abs(thrust @ (arms[1] - arms[0])) < 1e-5 and thrust[0] > 0 and arms[0][1] > arms[1][1]


def test_the_pendulum_hangs():
    env = damped_pendulum.Env()
    state, _ = env.reset(jax.random.key(0))
    frame = film([env.draw(jax.device_get(state._replace(x=jnp.float32([0.0, 0.0]))))])[0]
    assert at(frame, 0, -1, low=-1.3, high=1.3) == BLUE and at(frame, 0, -0.5, low=-1.3, high=1.3) == render.BLACK


def test_classic_control_and_rooms_of_gymnax_are_drawn():
    """Known states: an acrobot whose upper link points right and whose lower one points up; a car at the lowest point
    of the valley and one at the flag; an agent and a goal in two rooms."""
    gymnax = pytest.importorskip("gymnax")

    def shapes(name, **state):
        env = from_gymnax.Env(name)
        start = jax.device_get(env.reset(jax.random.key(0))[0])
        return env.draw(start.replace(**{k: np.asarray(v) for k, v in state.items()}))

    scene = shapes("Acrobot-v1", joint_angle1=np.pi / 2, joint_angle2=np.pi / 2)
    goal, arm = (s.points for s in scene.shapes if isinstance(s, Line))
    np.testing.assert_allclose(arm, [(0, 0), (1, 0), (1, 1)], atol=1e-6)
    assert {y for _, y in goal} == {1}  # where gymnax ends the episode: −cos θ_1 − cos(θ_1 + θ_2) > 1
    for name, position, height in (("MountainCarContinuous-v0", -np.pi / 6, 0.1), ("MountainCar-v0", 0.5, 0.9988)):
        scene = shapes(name, position=position)
        car = next(s for s in scene.shapes if isinstance(s, Circle))
        np.testing.assert_allclose(car.centre, (position, height + 0.05), atol=1e-3)
        flag = next(s.points for s in scene.shapes if isinstance(s, Line) and s.colour == GREEN)
        assert flag[0][0] == from_gymnax.Env(name).params.goal_position
    scene = shapes("FourRooms-misc", pos=[1, 3], goal=[8, 9])
    *walls, goal, agent = scene.shapes
    assert goal.centre == (9, -8) and agent.centre == (3, -1) and agent.filled and not goal.filled
    assert len(walls) == 13 * 13 - np.asarray(gymnax.make("FourRooms-misc")[0].env_map).sum()
    assert (0, 0) in [w.centre for w in walls] and agent.centre not in [w.centre for w in walls]


def test_tracking_is_drawn():
    env = multi_agent_tracking.Env(num_agents=2)
    agents = jnp.float32([[0.5, 0.5, 0, 0], [-0.5, -0.5, 0, 0]])
    frame = film([env.draw(jax.device_get(multi_agent_tracking.State(agents, jnp.float32([0.5, -0.5]), 0)))])[0]
    view = dict(low=-1.15, high=1.15)
    assert at(frame, 0.5, 0.5, **view) == render.PALETTE[0] and at(frame, -0.5, -0.5, **view) == render.PALETTE[1]
    assert at(frame, 0.5, -0.5, **view) == GREEN and near(frame, 0.585, -0.5, GREEN, **view)
    assert at(frame, 0.55, -0.5, **view) == at(frame, 0, 0, **view) == WHITE
    assert near(frame, 1, 0.3, render.GREY, **view) and near(frame, -0.3, -1, render.GREY, **view)


@pytest.mark.parametrize("distance, ring", [(0.12, RED), (0.14, render.ORANGE)])
def test_capture_is_drawn(distance, ring):
    env = pursuit_evasion.Env()
    agents = jnp.float32([[-0.5, 0, 0, 0], [0.5 + distance, 0, 0, 0], [0.5, 0, 0, 0]])
    frame = film([env.draw(jax.device_get(pursuit_evasion.State(agents, 0)))])[0]
    view = dict(low=-1.15, high=1.15)
    assert at(frame, 0.5, 0, **view) == BLUE and at(frame, -0.5, 0, **view) == render.REDS[0]
    assert near(frame, 0.5 - 0.12, 0, ring, **view) and near(frame, 0.5, 0.12, ring, **view)
    away = env.draw(jax.device_get(pursuit_evasion.State(agents * 4, 0)))  # who leaves the box stays in the picture
    np.testing.assert_allclose([away.low, away.high], [[-2.15, -1.15], [4 * (0.5 + distance) + 0.15, 1.15]], rtol=1e-5)


def test_scenes_follow_a_trajectory():
    env = blocker_goal_seeker.Env(num_agents=3)
    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 4))[0]
    drawn = scenes(env, states)
    assert len(drawn) == 4
    for scene, agents, goal in zip(drawn, states.agents, states.goal, strict=True):
        labelled = [s for s in scene.shapes if isinstance(s, Circle) and s.label]
        assert [s.label for s in labelled] == ["blocker 0", "blocker 1", "seeker"]
        np.testing.assert_array_equal([s.centre for s in labelled], agents[:, :2])
        np.testing.assert_array_equal(scene.shapes[1].centre, goal)


def test_ellipse_is_a_contour():
    mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.8], [0.8, 0.5]])
    offset = np.asarray(render.ellipse(mean, cov, RED, deviations=3.0).points) - mean
    np.testing.assert_allclose(np.einsum("ki,ij,kj->k", offset, np.linalg.inv(cov), offset), 9.0)


def episode(length):
    env = multi_agent_tracking.Env(max_steps=length, goal_switch_every=25)
    reset_key, key = jax.random.split(jax.random.key(0))

    def step(state, key):
        to_goal = state.goal[None] - state.agents[:, :2]
        state, ts = env.step(key, state, 4 * to_goal - 3 * state.agents[:, 2:])
        return state, (state, ts.reward)

    start = env.reset(reset_key)[0]
    _, (states, reward) = jax.lax.scan(step, start, jax.random.split(key, length))
    return scenes(env, jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), start, states)), np.asarray(reward)


def test_gif_of_two_hundred_frames(tmp_path):
    start = time.process_time()
    frames = film(*episode(199))
    write_gif(tmp_path / "a.gif", frames, fps=20)
    assert time.process_time() - start < 10
    assert len(frames) == 200 and os.path.getsize(tmp_path / "a.gif") < 1_000_000
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (640, 384) and gif.info["loop"] == 0 and gif.info["duration"] == 50
        assert gif.n_frames == 200
        for t in (0, 100, 199):
            gif.seek(t)
            off = np.abs(np.asarray(gif.convert("RGB"), int) - frames[t]).max(axis=-1)
            assert off.mean() < 0.5 and off.max() < 40
    assert os.listdir(tmp_path) == ["a.gif"]


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.gif"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.gif"]


def test_mp4(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = film([square(Circle((0.04 * t - 0.5, 0.5), 0.2, RED, label="one")) for t in range(12)], np.ones(11))
    write_mp4(tmp_path / "a.mp4", frames, fps=10)
    with warnings.catch_warnings(action="ignore"):  # of the fork
        output = subprocess.run([ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "a.mp4", "-f", "rawvideo",
                                 "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    assert b"640x384" in output.stderr and b"10 fps" in output.stderr
    decoded = np.frombuffer(output.stdout, np.uint8).reshape(12, 384, 640, 3)
    assert np.abs(decoded[-1].astype(int) - frames[-1]).mean() < 6
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_host_environment_is_filmed_by_its_own_renderer(monkeypatch):
    """An episode of 3 steps has 3 pictures, of the states before its end; one that makes no pictures is refused."""
    pytest.importorskip("gymnasium")
    from launchers import runs, visualize

    closed = []

    class Simulator:
        state = 0

        def render(self):
            return np.full((40, 60, 3), 50 * self.state, np.uint8)

        def reset(self, seed):
            self.state = 0

        def close(self):
            closed.append(self.state)

    class Host:
        max_steps, spare = 5, [type("Of", (), dict(envs=[Simulator()]))()]

        def reset(self, key):
            return 0, np.zeros((1, 1))

        def step(self, key, state, action):
            self.spare[0].envs[0].state = (state + 1) % 3
            end = np.array([state == 2])
            obs = np.full((1, 1), state + 1.0)
            return state + 1, TimeStep(obs, obs, np.array([1.0 + state]), end, ~end & False, {})

    class Algorithm:
        @staticmethod
        def act(run, carry, obs, key):
            return carry, obs

    monkeypatch.setattr(runs, "make_env", lambda name, num_envs, **kwargs: Host())
    pictures, reward = runs.watch(Algorithm, None, "gymnasium/x", {}, jax.random.key(0))
    assert pictures[:, 0, 0, 0].tolist() == [0, 50, 100] and reward.tolist() == [1.0, 2.0, 3.0]
    assert closed == [0]  # the state after the end
    frames, total = visualize.host_film(pictures, reward, 100)
    assert frames.shape == (3, 100, 150 + 256, 3) and total == 6.0 and frames[2, 50, 70].tolist() == [100] * 3
    monkeypatch.setattr(Simulator, "render", lambda self: None)
    with pytest.raises(UserError, match='"gymnasium/x" cannot be drawn here: its renderer makes no pictures'):
        runs.host_renderer("gymnasium/x", {})
