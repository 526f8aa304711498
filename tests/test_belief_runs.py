"""Runs of a method that learns within its episode, on disk: resumed, filmed with their belief, and drawn."""
import csv
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from algorithms import ekf_lqr
from core import ekf, planning, render
from core.envs import cartpole_swingup, linear_tracking, pursuit_evasion_lqr
from core.errors import UserError
from launchers import runs
from launchers.train import train
from launchers.visualize import believes, imagine, visualize

RUNS, VISUALIZE, EKF, RENDER, TRAIN = (
    "launchers/runs.py", "launchers/visualize.py", "core/ekf.py", "core/render.py", "launchers/train.py")
FILM, IMAGINED, ASKED = (
    "test_an_episode_is_filmed_with_its_belief", "test_what_is_filmed_is_the_belief_pushed_through_the_plan",
    "test_the_seed_that_is_asked_for_is_filmed")
PLANTED_ERRORS = {
    "gains for losses": (RUNS, '(other["reward"] - mine["reward"])', '(mine["reward"] - other["reward"])',
                         "test_regret_is_paired"),
    "regret to other seeds": (RUNS, 'for name in ("seed", "env_steps"):', 'for name in ("env_steps",):',
                              "test_regret_is_paired"),
    "regret of a row": (RUNS, "return np.cumsum((other", "return (lambda x, axis: x)((other",
                        "test_regret_is_paired"),
    "band of one NIS": (EKF, "chi2.ppf(p, count * d) / count", "chi2.ppf(p, d)", "test_the_band_holds_the_mean_nis"),
    "band of one observation each": (EKF, "chi2.ppf(p, count * d)", "chi2.ppf(p, count)",
                                     "test_the_band_holds_the_mean_nis"),
    "band on one side": (EKF, "((1 - coverage) / 2, (1 + coverage) / 2)", "(1 - coverage, coverage)",
                         "test_the_band_holds_the_mean_nis"),
    "film of the first seed": (VISUALIZE, "run = jax.tree.map(lambda x: x[seed_index], run)",
                               "run = jax.tree.map(lambda x: x[0], run)", ASKED),
    "the same episodes of every seed": (VISUALIZE, 'meta["seed"] + seed_index)', 'meta["seed"])', ASKED),
    "settings not heeded": (VISUALIZE, "{**kwargs, **dict(setting(text) for text in settings)}", "{**kwargs}", FILM),
    "belief of the last step only": (VISUALIZE, "{name: (mean[t], cov[t])", "{name: (mean[-1], cov[-1])", FILM),
    "steps not heeded": (
        VISUALIZE, "play(algorithm, run, env, key, steps)", "play(algorithm, run, env, key, None)", ASKED),
    "nothing in the arena": (VISUALIZE, "range(4, len(mean), 5)", "range(0)", FILM),
    "a camera for each episode": (VISUALIZE, "arenas = one_camera(arenas)", "pass", FILM),
    "played before it is refused": (
        VISUALIZE, "        env = host_renderer(name, kwargs)",
        "        play(algorithm, run, make_env(name, 1, **kwargs).env, None); env = host_renderer(name, kwargs)",
        "test_what_cannot_be_drawn_is_not_played"),
    "film of another plan": (VISUALIZE, "state.x, carry.plan.mean)", "state.x, 0 * carry.plan.mean)", IMAGINED),
    "film of variances alone": (VISUALIZE, "cov[pair[:, None], pair[None]]", "jnp.diag(cov[pair, pair])", IMAGINED),
    "film of the belief, not its error": (VISUALIZE, "(error[pair], cov", "(mean[pair], cov", IMAGINED),
    "film of a shrunken cloud": (VISUALIZE, "J, belief.cov, J)", "J, belief.cov @ belief.cov, J)", IMAGINED),
    "weights of a network are filmed": (
        VISUALIZE, "return jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, env.unknown(about).guess)",
        "return True", "test_only_a_belief_about_the_truth_is_filmed"),
    "who knows believes": (VISUALIZE, "or env.reveal", "", "test_only_a_belief_about_the_truth_is_filmed"),
    "the belief is lost on resume": (
        TRAIN, 'return State(stored["run"], stored["totals"], meta)',
        'return State(stored["run"]._replace(carry=state.run.carry), stored["totals"], meta)',
        "test_killed_within_an_episode_and_resumed_it_is_the_same_run"),
    "one colour for all": (RENDER, "PALETTE[i % len(PALETTE)]", "PALETTE[0]",
                           "test_gaussians_lie_around_their_cross"),
    "one deviation": (RENDER, "deviations: float = 2.0", "deviations: float = 1.0",
                      "test_gaussians_lie_around_their_cross"),
}


def tiny():
    config = ekf_lqr.get_config()
    config.env_kwargs.update(max_steps=18, process_noise=0.1)
    config.update(env_steps=21, eval_every=21, log_every=7, horizon=5, kept_elites=2)
    config.planner.update(num_samples=16, num_elites=4, num_iterations=1)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two seeds: their training episodes end after 18 of 21 steps. There is a checkpoint of every row."""
    folder = tmp_path_factory.mktemp("belief_runs") / "whole"
    with jax.debug_key_reuse(False):
        train(tiny(), num_seeds=2, seed=3, workdir=str(folder), save_every=0.0)
    return folder


def test_killed_within_an_episode_and_resumed_it_is_the_same_run(folder):
    victim = folder.with_name("victim")
    shutil.copytree(folder, victim)
    first, *later = sorted((victim / "checkpoints").iterdir())  # it was killed before the later ones were there
    for path in [*later, victim / "summary.json"]:
        path.unlink()
    with jax.debug_key_reuse(False):
        train(tiny(), num_seeds=2, seed=3, workdir=str(victim), resume=True)
    assert 0 < int(first.stem.split("_")[1]) < 18
    assert (victim / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    mine, theirs = ({name: value for name, value in np.load(newest(path)).items() if name != "meta.json"}
                    for path in (victim, folder))
    assert mine.keys() == theirs.keys() and len(mine) > 5
    for name, value in mine.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def newest(folder):
    return sorted((folder / "checkpoints").iterdir())[-1]


def test_an_episode_is_filmed_with_its_belief(folder, capsys):
    """Two of them, as short as --set makes them, in a box so small that the players leave it on different sides."""
    out = folder.with_name("a.gif")
    returns = visualize(run=str(folder), out=str(out), height=200, set=["max_steps=12", "half_width=0.6"],
                        episodes=2)
    assert "26 frames" in (printed := capsys.readouterr().out) and f"{returns[0]:.1f}"[:-1] in printed
    assert returns[0] != returns[1]
    frames = read(out)
    assert frames.shape[:2] == (26, 200) and frames.shape[2] != 200 + 256 + 200
    belief, arena = frames[:, :, -200:], frames[:, :, :-456]
    assert all((belief[t] != belief[t + 1]).any() and (arena[t] != arena[t + 1]).any() for t in range(25))
    size = [extent(frame, render.PALETTE[1]) for frame in belief[:, 30:]]
    assert size[12] < size[0] == size[13]  # the belief has shrunk, and starts afresh
    assert near(arena, render.ORANGE).any()


def test_the_seed_that_is_asked_for_is_filmed(folder, monkeypatch):
    """By its own arrays, in episodes that are not those of the first one, and only so many steps of them."""
    played, (algorithm, config, run, meta) = [], runs.load(folder)
    run = run._replace(clock=run.clock._replace(env_steps=jnp.array([10, 11])))

    def play(algorithm, run, env, key, steps):
        played.append((int(run.clock.env_steps), jax.random.key_data(key), steps))
        raise InterruptedError

    monkeypatch.setattr("launchers.visualize.load", lambda *_: (algorithm, config, run, meta))
    monkeypatch.setattr("launchers.visualize.play", play)
    for index in (0, 1):
        with pytest.raises(InterruptedError):
            visualize(run=str(folder), out="a.gif", seed_index=index, steps=5)
    (first, key, steps), (second, other, _) = played
    assert (first, second, steps) == (10, 11, 5) and (key != other).any()


def read(path):
    with Image.open(path) as gif:
        frames = []
        for t in range(gif.n_frames):
            gif.seek(t)
            frames.append(np.asarray(gif.convert("RGB"), int))
    return np.stack(frames)


def near(frame, colour):
    return np.abs(frame - colour).max(axis=-1) < 40


def extent(frame, colour):
    columns = np.flatnonzero(near(frame, colour).any(axis=0))
    return columns.max() - columns.min()


def test_what_cannot_be_drawn_is_not_played(folder, monkeypatch):
    def play(*_):
        raise AssertionError("an episode was played")

    monkeypatch.delattr(pursuit_evasion_lqr.Env, "draw")
    monkeypatch.setattr("launchers.visualize.play", play)
    with pytest.raises(UserError, match="cannot be drawn"):
        visualize(run=str(folder), out="a.gif")


@pytest.mark.parametrize("about, env", [("cost", pursuit_evasion_lqr.Env()), ("params", linear_tracking.Env())])
def test_what_is_filmed_is_the_belief_pushed_through_the_plan(about, env):
    """Against a loop over the plan, and its derivative by differences."""
    unknown, key = env.unknown(about), jax.random.key(5)
    belief = ekf.Full.create(unknown.guess, 0.1)
    root = jax.random.normal(key, belief.cov.shape)
    mean = belief.mean + 0.1 * jax.random.normal(jax.random.key(6), belief.mean.shape)
    belief = belief.replace(mean=mean, cov=0.1 * root @ root.T)
    plan = planning.initial_carry(*env.action_space.bounds, 20, 0)
    plan = plan._replace(mean=jax.random.normal(jax.random.key(7), plan.mean.shape))
    state, _ = env.reset(jax.random.key(8))
    carry = ekf_lqr.Carry(belief, plan, *(jnp.zeros(()) for _ in range(3)))
    seen = imagine(env, about, *(jax.tree.map(lambda x: x[None], tree) for tree in (state,)),
                   jax.tree.map(lambda x: x[None, None], carry))

    @jax.jit
    @jax.vmap
    def leads(theta):
        def step(x, action):
            x = unknown.dynamics(unknown.reduce(belief.unravel(theta)), x, action)
            return x, env.place(x)

        return jax.lax.scan(step, state.x, plan.mean)[1], unknown.reduce(belief.unravel(theta))

    shifts = 1e-2 * jnp.eye(mean.size)
    (up, phi_up), (down, phi_down), (there, phi) = (leads(theta) for theta in (
        mean[None] + shifts, mean[None] - shifts, mean[None]))
    P = np.asarray(belief.cov, np.float64)
    J, G = (np.moveaxis(np.asarray(a - b, np.float64), 0, -1) / 2e-2 for a, b in ((up, down), (phi_up, phi_down)))
    (place, cov), expected = seen["future"], np.einsum("hip,pq,hjq->hij", J, P, J)
    np.testing.assert_allclose(place[0], there[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cov[0] / expected.max(), expected / expected.max(), atol=0.02)
    error, whole = phi[0] - unknown.truth(env.truth), G @ P @ G.T
    for name, (i, j) in unknown.shown.items():
        np.testing.assert_allclose(seen["phi"][name][0][0], [error[i], error[j]], rtol=1e-3)
        block = [[whole[i, i], whole[i, j]], [whole[j, i], whole[j, j]]]
        np.testing.assert_allclose(seen["phi"][name][1][0], block, rtol=0.02, atol=1e-3 * np.abs(whole).max())


def test_only_a_belief_about_the_truth_is_filmed():
    env, hiding_nothing = cartpole_swingup.Env(), cartpole_swingup.Env(reveal=True)
    belief, weights = ekf.Full.create(env.guess, 1.0), ekf.Full.create(dict(kernel=jnp.ones((2, 3))), 1.0)
    diagonal = ekf.Diagonal.create(env.guess, 1.0)
    table = [(env, belief, True), (env, weights, False), (env, diagonal, False), (hiding_nothing, belief, False)]
    for env, b, filmed in table:
        assert believes(env, "params", types.SimpleNamespace(belief=b, plan=0)) == filmed
    assert not believes(env, "params", types.SimpleNamespace(belief=belief)) and not believes(env, "params", ())


def test_the_figure_is_drawn_with_and_without_regret(folder):
    frozen, picture = shutil.copytree(folder, folder.with_name("frozen")), folder.with_name("a.png")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    with open(frozen / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | dict(nis=0, information=0) for row in rows)  # who does not learn
    for kwargs in (dict(run=str(folder), against=str(frozen)), dict(run=str(frozen))):
        assert visualize(**kwargs, figure=str(picture)) == []
        assert np.asarray(Image.open(picture)).std() > 10


@pytest.mark.parametrize("kwargs, words", [
    ({}, "--out"), (dict(out="a.txt"), "a.txt"), (dict(out="a.gif", set=["wind=3"]), "wind"),
    (dict(out="a.gif", set=["wind"]), "name=value"), (dict(out="a.gif", seed_index=2), "2 seeds"),
    (dict(out="a.gif", episodes=0), "--episodes=0")])
def test_a_mistake_is_named(folder, kwargs, words):
    with pytest.raises(UserError, match=words):
        visualize(run=str(folder), **kwargs)


def test_regret_is_paired(tmp_path):
    def write(name, seeds, rewards):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(num_envs=2)))
        rows = "".join(f"{steps},{seed},{value}\n" for steps, row in zip((10, 30), rewards, strict=True)
                       for seed, value in zip(seeds, row, strict=True))
        (tmp_path / name / "metrics.csv").write_text("env_steps,seed,reward\n" + rows)
        return tmp_path / name

    mine, best = write("mine", [0, 1], [[-5, -7], [1, 1]]), write("best", [0, 1], [[-1, -6], [1, 3]])
    np.testing.assert_array_equal(runs.regret(mine, best), [[4 * 5, 1 * 5], [4 * 5, 1 * 5 + 2 * 10]])
    with pytest.raises(UserError, match="seed"):
        runs.regret(mine, write("other", [1, 2], [[-1, -6], [1, 3]]))


def test_the_band_holds_the_mean_nis():
    """Of filters that are right: their NIS are χ²(d)."""
    nis = np.random.default_rng(0).chisquare(3, (20_000, 5)).mean(axis=1)
    low, high = ekf.nis_band(3, 5)
    assert np.mean(nis < low) == pytest.approx(0.025, abs=0.004)
    assert np.mean(nis > high) == pytest.approx(0.025, abs=0.004)


def test_gaussians_lie_around_their_cross():
    named = dict(a=(np.array([0.5, 0.0]), 0.01 * np.eye(2)), b=(np.array([-0.4, -0.4]), np.diag([0.01, 0.04])))
    frame = render.film([render.gaussians(named, 2.0, "caption")], height=200)[0].astype(int)
    for (mean, cov), colour in zip(named.values(), render.PALETTE, strict=False):
        rows, columns = np.nonzero(near(frame[40:], colour))
        centre, deviations = 100 * (mean * (1, -1) + 1), np.sqrt(np.diagonal(cov))
        for pixels, middle, deviation in zip((columns, rows + 40), centre, deviations, strict=True):
            ends = middle - 200 * deviation, middle + 200 * deviation
            assert (pixels.min(), pixels.max()) == pytest.approx(ends, abs=2)
        assert near(frame[:40, :30], colour).any()  # its name
    assert (frame[100, :40] < 230).all() and (frame[45:60, 100] < 230).all()  # the cross
    assert near(frame[185:], render.BLACK).any()
