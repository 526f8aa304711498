"""Files of D4RL: what is read against what was written, and what can be wrong with them."""
import re
import sys

import h5py
import jax
import numpy as np
import pytest

from core import d4rl
from core.dataset import Dataset
from core.envs import make_env
from core.errors import UserError
from launchers import cli

D4RL, CLI = "core/d4rl.py", "launchers/cli.py"
SAME, NEXT, LAST, BAD, WRONG = (
    "test_a_file_gives_back_what_was_put_into_it", "test_successors_that_are_missing_are_those_of_the_next_row",
    "test_a_terminal_state_at_the_end_of_the_file_stays", "test_a_bad_file_is_named",
    "test_data_of_another_environment_are_named")
PLANTED_ERRORS = {  # and the test that has to notice
    "a time limit is an end": (D4RL, "dict(terminated=terminated,", "dict(terminated=terminated | timeout,", SAME),
    "an end is a time limit, too": (D4RL, "truncated=timeout & ~terminated", "truncated=timeout", SAME),
    "numbers of 64 bits": (D4RL, 'x.astype(np.float32) if x.dtype.kind == "f" else x', "x", SAME),
    "stored successors ignored": (D4RL, 'if "next_observations" in stored:', "if False:", SAME),
    "the step at a time limit stays": (D4RL, "x[~last] for", "x for", NEXT),
    "an end is dropped": (D4RL, "last[-1] |= not terminated[-1]", "last[-1] = True", LAST),
    "the last row stays": (D4RL, "last[-1] |= not terminated[-1]", "pass", NEXT),
    "the next episode is the successor": (D4RL, "np.append(last[1:], False) & ~terminated & ~last",
                                          "np.zeros_like(last)", NEXT),
    "the step after a cut is cut": (D4RL, "np.append(last[1:], False)", "np.append(False, last[:-1])", NEXT),
    "an end before a short episode is cut": (D4RL, "& ~terminated & ~last  #", "& ~last  #", LAST),
    "the next episode is the successor of an end": (D4RL, "np.where(terminated.reshape(",
                                                    "np.where(0 * terminated.reshape(", NEXT),
    "the observation before": (D4RL, "np.append(obs[1:], obs[-1:], axis=0))", "np.append(obs[:1], obs[:-1], axis=0))",
                               NEXT),
    "objects are numbers": (D4RL, 'not in "biuf"', 'not in "biufO"', BAD),
    "a key may be missing": (D4RL, "if name not in arrays]", "if False]", BAD),
    "lengths may differ": (D4RL, 'if size != sizes["rewards"]]', "if False]", BAD),
    "anything is a number": (D4RL, "if not np.isfinite(x).all()]", "if False]", BAD),
    "no steps": (D4RL, 'if not len(arrays["rewards"]):', "if False:", BAD),
    "errors of h5py's own": (D4RL, "except (OSError, RuntimeError, KeyError, ValueError)", "except KeyError",
                             "test_a_damaged_file_is_named"),
    "an .npz in the place of an HDF5": (CLI, "READERS[kind](name) if kind else read_arrays(name)", "read_arrays(name)",
                                        WRONG),
    "an action too many": (CLI, 'np.isin(data["action"], np.arange(env.action_space.n)).all()', "True", WRONG),
}
# Episodes: to a terminal state; cut by a time limit; of one step, cut; to a terminal state; where the file ends.
TERMINALS, TIMEOUTS = (2, 7), (4, 5)
N = 10


def rows(**changes):
    """Row i has the observation (i, −i), the action i / 10, the reward i."""
    i = np.arange(N, dtype=np.float64)
    return dict(observations=np.stack([i, -i], axis=1), actions=i[:, None] / 10, rewards=i,
                terminals=np.isin(i, TERMINALS), timeouts=np.isin(i, TIMEOUTS)) | changes


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for name, x in arrays.items():
            if x is not None:
                file[name] = x
    return path


def test_a_file_gives_back_what_was_put_into_it(tmp_path):
    """With stored successors every step stays. A step at which both flags are set is an end."""
    next_observations = rows()["observations"] + 0.5
    timeouts = np.isin(np.arange(N), (*TIMEOUTS, 7))
    extra = {"infos/qpos": np.zeros(N), "metadata/algorithm": np.bytes_("SAC")}
    data = d4rl.read(write(tmp_path / "a.hdf5", rows(next_observations=next_observations, timeouts=timeouts, **extra)))
    assert {name: x.dtype for name, x in data.items()} == dict(
        obs=np.float32, next_obs=np.float32, action=np.float32, reward=np.float32, terminated=bool, truncated=bool)
    np.testing.assert_array_equal(data["obs"], rows()["observations"])
    np.testing.assert_array_equal(data["next_obs"], next_observations)
    np.testing.assert_allclose(data["action"][:, 0], np.arange(N) / 10, rtol=1e-6)
    np.testing.assert_array_equal(data["reward"], np.arange(N))
    np.testing.assert_array_equal(np.flatnonzero(data["terminated"]), TERMINALS)
    np.testing.assert_array_equal(np.flatnonzero(data["truncated"]), TIMEOUTS)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float64])
def test_successors_that_are_missing_are_those_of_the_next_row(kind, tmp_path):
    """Rows 4, 5 and 9 have none. Row 3, before the time limit, is now the truncated one; row 2 is an end and stays one,
    although its successor is another episode's; the episode of row 5 alone is gone; row 8 stops where the file does."""
    flags = {name: rows()[name].astype(kind) for name in ("terminals", "timeouts")}
    data = d4rl.read(write(tmp_path / "a.hdf5", rows(**flags)))
    np.testing.assert_array_equal(data["reward"], [0, 1, 2, 3, 6, 7, 8])
    np.testing.assert_array_equal(data["obs"][:, 0], [0, 1, 2, 3, 6, 7, 8])
    np.testing.assert_array_equal(data["next_obs"], np.array([[1, 2, 2, 4, 7, 7, 9], [-1, -2, -2, -4, -7, -7, -9]]).T)
    np.testing.assert_array_equal(data["reward"][data["terminated"]], TERMINALS)
    np.testing.assert_array_equal(data["reward"][data["truncated"]], [3, 8])
    dataset = Dataset.create(data)
    windows = dataset.sample_trajectories(jax.random.key(0), 200, 2)["reward"].T
    assert {tuple(window) for window in np.asarray(windows).tolist()} == {(0, 1), (1, 2), (6, 7)}


def test_a_terminal_state_at_the_end_of_the_file_stays(tmp_path):
    """Also where the episode after it has one step, which is dropped."""
    data = d4rl.read(write(tmp_path / "a.hdf5", rows(terminals=np.arange(N) == 9, timeouts=np.zeros(N, bool))))
    assert len(data["reward"]) == N and data["terminated"][-1] and not data["truncated"].any()
    data = d4rl.read(write(tmp_path / "b.hdf5", rows(terminals=np.arange(N) == 8, timeouts=np.arange(N) == 9)))
    assert len(data["reward"]) == 9 and data["terminated"][-1] and not data["truncated"].any()


STRINGS = np.array(["x"] * N, h5py.string_dtype())
MISTAKES = {
    'has no "observations"': dict(observations=None), 'has no "timeouts"': dict(timeouts=None),
    "rewards has 10 rows, actions has 9": dict(actions=np.zeros((9, 1))),
    "rewards has 10 rows, next_observations has 11": dict(next_observations=np.zeros((11, 2))),
    "rewards has numbers that are not finite": dict(rewards=np.where(np.arange(N) == 3, np.nan, 0.0)),
    "observations has numbers that are not finite": dict(observations=np.full((N, 2), np.inf)),
    "observations is of type object": dict(observations=STRINGS),
    "actions is of type group": dict(actions=None, **{"actions/left": np.zeros(N)}),
    "terminals is .10, 2.: one number for each step": dict(terminals=np.zeros((N, 2), bool)),
    "holds no steps": {name: x[:0] for name, x in rows().items()},
    "no step has a successor": {name: x[:1] for name, x in rows().items()},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_bad_file_is_named(words, tmp_path):
    path = write(tmp_path / "bad.hdf5", rows(**MISTAKES[words]))
    with pytest.raises(UserError, match=f"bad.hdf5.*{words}") as error:
        d4rl.read(path)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path):
    whole = write(tmp_path / "whole.hdf5", rows()).read_bytes()
    for content in (whole[:200], whole[:-500], b"", b"text"):
        (tmp_path / "bad.hdf5").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.hdf5 is no HDF5 file, or is damaged"):
            d4rl.read(tmp_path / "bad.hdf5")


def test_data_of_another_environment_are_named(tmp_path):
    """By the name that --config.dataset has."""
    path = f"d4rl:{write(tmp_path / 'a.hdf5', rows())}"
    for env, words in (("gymnax/Pendulum-v1", r"obs \(2,\) where the environment has \(3,\)"),
                       ("gymnax/MountainCar-v0", r"action \(1,\) where the environment has \(\)")):
        with pytest.raises(UserError, match=f"{re.escape(path)}: {words}"):
            cli.read_dataset(path, make_env(env, 1))
    counted = f"d4rl:{write(tmp_path / 'b.hdf5', rows(actions=np.arange(N) % 4))}"
    with pytest.raises(UserError, match="action is not always one of the 3 that the environment has"):
        cli.read_dataset(counted, make_env("gymnax/MountainCar-v0", 1))
    data = cli.read_dataset(path, make_env("gymnax/MountainCarContinuous-v0", 1))
    assert data.size == 7 and data.action_space.shape == (1,)
    with pytest.raises(UserError, match=r'no data in "d4rl:nothing\.hdf5"'):
        cli.read_dataset("d4rl:nothing.hdf5", make_env("gymnax/Pendulum-v1", 1))


def test_without_h5py_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"h5py is not installed: pip install -e .\.\[offline\]"):
        d4rl.read("a.hdf5")
