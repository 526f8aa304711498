"""Runs of a method that learns within its episode, on disk: resumed, filmed as they ran, and drawn."""
import csv
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from core import ekf, render
from core.errors import UserError
from launchers import runs

ROOT = pathlib.Path(__file__).parents[1]
RUNS, VISUALIZE, EKF, RENDER, TRAIN = (
    "launchers/runs.py", "launchers/visualize.py", "core/ekf.py", "core/render.py", "launchers/train.py")
AGAIN = "test_a_run_is_computed_again_bit_for_bit"
PLANTED_ERRORS = {
    "replay from other keys": (RUNS, "jax.random.fold_in(jax.random.key(seed), 1), i)",
                               "jax.random.fold_in(jax.random.key(seed), 1), i + 1)", AGAIN),
    "replay of the first seed": (RUNS, "run = jax.tree.map(lambda x: x[index], run)",
                                 "run = jax.tree.map(lambda x: x[0], run)", AGAIN),
    "replay without its start": (RUNS, "jnp.concatenate([first[None], rest]), look(run), rest)",
                                 "jnp.concatenate([rest[:1], rest]), look(run), rest)", AGAIN),
    "gains for losses": (RUNS, 'other["return"] - mine["return"]', 'mine["return"] - other["return"]',
                         "test_regret_is_paired"),
    "regret to other seeds": (RUNS, 'for name in ("seed", "env_steps"):', 'for name in ("env_steps",):',
                              "test_regret_is_paired"),
    "band of one NIS": (EKF, "chi2.ppf(p, count * d) / count", "chi2.ppf(p, d)", "test_the_band_holds_the_mean_nis"),
    "band of one observation each": (EKF, "chi2.ppf(p, count * d)", "chi2.ppf(p, count)",
                                     "test_the_band_holds_the_mean_nis"),
    "band on one side": (EKF, "((1 - coverage) / 2, (1 + coverage) / 2)", "(1 - coverage, coverage)",
                         "test_the_band_holds_the_mean_nis"),
    "a film of what imagines nothing": (VISUALIZE, 'if learns_as_it_is_judged and not hasattr(algorithm, "imagine"):',
                                        "if False:", "test_what_imagines_nothing_is_not_filmed"),
    "film goes on after the end": (VISUALIZE, "*(restarts + 1), ", "", "test_the_first_episode_is_filmed"),
    "belief of the last step only": (VISUALIZE, "{name: (mean[t], cov[t])", "{name: (mean[-1], cov[-1])",
                                     "test_the_first_episode_is_filmed"),
    "steps not heeded": (VISUALIZE, "(FLAGS.steps or len(runs.obs)) + 1", "len(runs.obs) + 1",
                         "test_the_first_episode_is_filmed"),
    "nothing in the arena": (VISUALIZE, "range(4, len(mean), 5)", "range(0)", "test_the_first_episode_is_filmed"),
    "the belief is lost on resume": (
        TRAIN, "run, meta = checkpoint.restore_newest(folder, run)",
        "belief, (run, meta) = run.belief, checkpoint.restore_newest(folder, run); run = run._replace(belief=belief)",
        "test_killed_within_an_episode_and_resumed_it_is_the_same_run"),
    "one colour for all": (RENDER, "PALETTE[i % len(PALETTE)]", "PALETTE[0]",
                           "test_gaussians_lie_around_their_cross"),
    "one deviation": (RENDER, "deviations: float = 2.0", "deviations: float = 1.0",
                      "test_gaussians_lie_around_their_cross"),
}
CONFIG = """
from algorithms import ekf_lqr


def get_config():
    config = ekf_lqr.get_config()
    config.env_kwargs = dict(max_steps=18, process_noise=0.1)
    config.update(env_steps=21, eval_every=7, horizon=5, num_samples=16, num_elites=4, kept_elites=2, num_iterations=2)
    return config
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`python -m launchers.<name> …`, in a folder that stays for all tests here."""
    folder = tmp_path_factory.mktemp("belief_runs")
    (folder / "tiny.py").write_text(CONFIG)
    settings = dict(JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"), PYTHONPATH=str(ROOT))

    def program(*args):
        return subprocess.run([sys.executable, *map(str, args)], cwd=folder, text=True, capture_output=True,
                              env={**os.environ, **settings})

    def launch(name, *args):
        return program("-m", f"launchers.{name}", *args)

    launch.folder, launch.program = folder, program
    return launch


@pytest.fixture(scope="module")
def run(launch):
    """Two seeds; their episodes end after 18 of 21 steps, their last checkpoints are of steps 14 and 21."""
    done = launch("train", "--config=tiny.py", "--num_seeds=2", "--seed=3", "--workdir=whole")
    assert done.returncode == 0, done.stderr
    return launch.folder / "whole"


@pytest.fixture(scope="module")
def again(run):
    """The run of the second seed, and what it imagined."""
    algorithm, config, _, _ = runs.load(run)
    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        return runs.replay(algorithm, config, [3, 4], 1)


def test_killed_within_an_episode_and_resumed_it_is_the_same_run(run, launch):
    victim = launch.folder / "victim"
    shutil.copytree(run, victim)
    shutil.rmtree(victim / "checkpoints" / "step_000000000021")  # killed before it was there, after step 14
    (victim / "summary.json").unlink()
    done = launch("train", "--config=tiny.py", "--num_seeds=2", "--seed=3", "--workdir=victim", "--resume")
    assert done.returncode == 0, done.stderr
    assert (victim / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    (_, _, mine, meta), (_, _, theirs, _) = runs.load(victim), runs.load(run)
    assert meta["iteration"] == 21 and float(np.abs(mine.belief.mean).max()) > 0
    for name, (a, b) in named_pairs(mine, theirs):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def named_pairs(mine, theirs):
    leaves, others = jax.tree.flatten_with_path(mine)[0], jax.tree.leaves(theirs)
    return [(jax.tree_util.keystr(name), (a, b)) for (name, a), b in zip(leaves, others, strict=True)]


def test_a_run_is_computed_again_bit_for_bit(run, again):
    _, _, stored, _ = runs.load(run)
    trajectory, _ = again
    assert trajectory.env_state.episode_length[:, 0].tolist() == [*range(18), *range(4)]
    for name, (a, b) in named_pairs(trajectory, stored):
        assert a[-1].tobytes() == np.asarray(b[1]).tobytes(), name
    with open(run / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "4"]
    for row in rows:
        assert trajectory.measures["gain_error"][int(row["env_steps"])] == pytest.approx(float(row["gain_error"]))


def test_the_first_episode_is_filmed(run, again, launch):
    done = launch("visualize", "--run=whole", "--out=a.gif", "--seed_index=1", "--height=200")
    assert done.returncode == 0 and "18 frames" in done.stdout and "note" not in done.stdout, done
    assert f"{again[0].env_state.episode_return[17, 0]:.1f}"[:-1] in done.stdout
    frames = read(launch.folder / "a.gif")
    assert frames.shape == (18, 200, 200 + 256 + 200, 3)
    belief, arena = frames[:, :, -200:], frames[:, :, :200]
    assert all((belief[t] != belief[t + 1]).any() and (arena[t] != arena[t + 1]).any() for t in range(17))
    size = [extent(frame, render.PALETTE[1]) for frame in belief[:, 30:]]
    assert size[-1] < size[0]  # the belief has shrunk
    assert near(arena, render.ORANGE).any()
    assert launch("visualize", "--run=whole", "--out=b.gif", "--steps=4").returncode == 0
    assert len(read(launch.folder / "b.gif")) == 5


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


def test_the_figure_is_drawn_with_and_without_regret(run, launch):
    frozen = shutil.copytree(run, launch.folder / "frozen")
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    with open(frozen / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | dict(nis=0, information=0) for row in rows)  # who does not learn
    for args in (["--run=whole", "--against=frozen"], ["--run=frozen"]):
        done = launch("visualize", *args, "--figure=a.png")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert np.asarray(Image.open(launch.folder / "a.png")).std() > 10


@pytest.mark.parametrize("args, words", [
    ([], "--out"), (["--out=a.gif", "--set=max_steps=3"], "as it ran"),
    (["--figure=a.png", "--against=none"], "none/metrics.csv")])
def test_a_mistake_is_one_line(run, launch, args, words):
    done = launch("visualize", "--run=whole", *args)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_what_imagines_nothing_is_not_filmed(run, launch):
    program = "import runpy; from algorithms import ekf_lqr; del ekf_lqr.imagine; " \
              "runpy.run_module('launchers.visualize', run_name='__main__', alter_sys=True)"
    done = launch.program("-c", program, "--run=whole", "--out=a.gif")
    assert done.returncode == 2 and "imagine" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_regret_is_paired(tmp_path):
    def write(name, seeds, returns):
        (tmp_path / name).mkdir()
        rows = "".join(f"10,{seed},{value}\n" for seed, value in zip(seeds, returns, strict=True))
        (tmp_path / name / "metrics.csv").write_text("env_steps,seed,return\n" + rows)
        return tmp_path / name

    mine, best = write("mine", [0, 1], [-5, -7]), write("best", [0, 1], [-1, -6])
    np.testing.assert_array_equal(runs.regret(mine, best), [[4, 1]])
    with pytest.raises(UserError, match="seed"):
        runs.regret(mine, write("other", [1, 2], [-1, -6]))


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
