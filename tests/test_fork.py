"""A fork is its parent under another name, and the diff is what was changed since."""
import os
import shutil
import subprocess
import sys

import pytest

from core.errors import UserError
from launchers import cli, fork
from tests.plant_errors import read_table

ROOT = cli.ROOT
FILE = "launchers/fork.py"
PLANTED_ERRORS = {
    "no word of the parent": (FILE, '"".join([first, note, *rest])', '"".join([first, *rest])'),
    "two parents": (FILE, "        rest.pop(0)\n", "        pass\n"),
    "configs of the parent run": (FILE, "rename(text, names)", "text"),
    "configs of all": (FILE, "if parent in imported(ast.parse(text))", "if text"),
    "namesakes renamed": (FILE, 'if node.module in ("algorithms", "configs")', "if node.module"),
    "paths of the parent": (FILE, "m[1] + m[2] + names[m[3]]", "m[0]"),
    "uses of the parent": (FILE, "sorted([*modules.values(), *uses]", "sorted([*modules.values()]"),
    "characters for bytes": (FILE, "lines[node.lineno - 1].encode(), node.col_offset",
                             'lines[node.lineno - 1].encode("latin1", "replace"), node.col_offset'),
    "tests keep their name": (FILE, 'f"test_{names[parent]}", source)', 'f"test_{parent}", source)'),
    "over existing files": (FILE, "if (cli.ROOT / name).exists()", "if False"),
    "half a fork": (FILE, "            path.unlink()\n", "            pass\n"),
    "any name": (FILE, "not child.isidentifier() or ", ""),
    "docstrings count": (FILE, "ast.get_docstring(node) is not None", "False"),
    "diff upside down": (FILE, 'f"-{line}" for line in before', 'f"+{line}" for line in before'),
    "innermost function only": (FILE, "names = [match[1], *names] if match", "names = [match[1]] if match"),
    "siblings are scopes": (FILE, "if depth < indent:", "if depth <= indent:"),
    "long lines whole": (FILE, "if len(line) <= width:", "if True:"),
}

PARENT = '''"""A method (Doe, 2020).

    x = 1
"""
from core.planning import icem as shooting
from core.returns import gae  # a comment


def get_config():
    """The numbers."""
    return dict(algorithm="icem", discount=0.99, lr=0.001, num_elites=10, num_samples=100, horizon=15, noise=2.0)


class Agent:
    def value(self, x):
        def scale(y):
            return 2 * y

        for _ in range(3):
            x = scale(x) - 1
        return x


def act(run, carry, obs, key):
    return shooting(run, obs, key), gae
'''
TEST = '''from algorithms import icem, other
from configs import icem_pendulum
from core import planning
from core.planning import icem as shooting

TEXT = "π, µ", icem.NUMBER
PLANTED_ERRORS = {"sign": ("algorithms/icem.py", "scale(x) - 1", "scale(x) + 1")}


def test_icem_config():
    assert [icem.get_config(), planning.icem, shooting, other.icem, icem_pendulum.icem, f"{icem}"]
    assert "python -m launchers.train --config=configs/icem_pendulum.py" != "core.icem and icem_hat"
'''
CONFIG = '"""Icem on a pendulum."""\nfrom algorithms import icem\n\n\ndef get_config():\n    return icem.get_config()\n'


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with the method `icem`, two configs of its own and one of a method called icem_hat."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for name, text in {
        "algorithms/icem.py": PARENT, "algorithms/icem_hat.py": PARENT, "configs/icem_pendulum.py": CONFIG,
        "configs/icem_drone.py": CONFIG, "configs/icem_hat_drone.py": CONFIG.replace("icem\n", "icem_hat as icem\n"),
        "tests/test_icem.py": TEST}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def files(root):
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}


def test_every_file_under_the_new_name(root):
    before = files(root)
    said = fork.fork("icem", "mine")
    new = {name: text for name, text in files(root).items() if name not in before}
    assert new.keys() == {
        "algorithms/mine.py", "configs/mine_pendulum.py", "configs/mine_drone.py", "tests/test_mine.py"}
    assert before.items() <= files(root).items()
    assert {f"wrote {name}" for name in new} < set(said)
    assert new["algorithms/mine.py"] == PARENT.replace(
        "(Doe, 2020).\n", "(Doe, 2020).\nChild of icem.py; the diff is the method.\n")
    assert new["configs/mine_drone.py"] == CONFIG.replace("import icem", "import mine").replace("icem.get", "mine.get")
    assert new["tests/test_mine.py"] == '''from algorithms import mine, other
from configs import mine_pendulum
from core import planning
from core.planning import icem as shooting

TEXT = "π, µ", mine.NUMBER
PLANTED_ERRORS = {"sign": ("algorithms/mine.py", "scale(x) - 1", "scale(x) + 1")}


def test_mine_config():
    assert [mine.get_config(), planning.icem, shooting, other.icem, mine_pendulum.icem, f"{mine}"]
    assert "python -m launchers.train --config=configs/mine_pendulum.py" != "core.icem and icem_hat"
'''


def test_a_grandchild_names_its_parent_alone(root):
    fork.fork("icem", "mine")
    fork.fork("mine", "mine_too")
    lines = (root / "algorithms" / "mine_too.py").read_text().splitlines()
    assert lines[1:4] == ["Child of mine.py; the diff is the method.", "", "    x = 1"]
    (root / "algorithms" / "short.py").write_text('"""Short."""\nX = 1\n')
    fork.fork("short", "longer")
    assert (root / "algorithms" / "longer.py").read_text() == (
        '"""Short.\nChild of short.py; the diff is the method.\n"""\nX = 1\n')


def test_the_diff_is_what_was_changed(root):
    fork.fork("icem", "mine")
    path = root / "algorithms" / "mine.py"
    same = path.read_text().replace("# a comment", "# another").replace("The numbers.", "All of them.")
    path.write_text(same.replace('"icem"', "'icem'").replace(
        "def act(run, carry, obs, key):\n", "def act(\n    run, carry, obs, key,\n):\n    # Greedy.\n"))
    assert list(fork.difference("mine")) == [" algorithms/mine.py does what its parent icem.py does"]
    path.write_text(path.read_text().replace("scale(x) - 1", "scale(x) + 1").replace("0.99", "0.9"))
    changes = list(fork.difference("mine"))
    assert [line for line in changes if line[0] != " "] == [
        "@@ get_config @@", "-            discount=0.99,", "+            discount=0.9,",
        "@@ Agent.value @@", "-            x = scale(x) - 1", "+            x = scale(x) + 1"]


@pytest.mark.parametrize("args, words", [
    (("icm", "mine"), 'unknown algorithm "icm"; did you mean "icem"'), (("icem", "my-idea"), '"my-idea" cannot be'),
    (("icem", "class"), '"class" cannot be'), (("icem", "icem_hat"), "algorithms/icem_hat.py exists already"),
    (("icem", "hers"), "tests/test_hers.py exists already")])
def test_refusals_leave_nothing_behind(root, args, words):
    (root / "tests" / "test_hers.py").touch()
    before = files(root)
    with pytest.raises(UserError, match=words):
        fork.fork(*args)
    assert files(root) == before


def test_a_full_disk_leaves_nothing_behind(root):
    before = files(root)
    with pytest.raises(OSError):
        fork.write({"algorithms/mine.py": "1", "configs/mine.py": "2", "nowhere/test_mine.py": "3"})
    assert files(root) == before


def test_no_parent_no_diff(root):
    with pytest.raises(UserError, match="icem.py has no parent"):
        list(fork.difference("icem"))
    with pytest.raises(UserError, match='did you mean "icem"'):
        list(fork.difference("icm"))


def test_a_fork_trains(tmp_path):
    for folder in ("algorithms", "configs", "core", "launchers", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}

    def launch(*command):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = launch("launchers.fork", "ppo", "my_idea")
    assert "    python -m launchers.train --config=algorithms/my_idea.py --smoke" in said.splitlines()
    launch("launchers.train", "--config=configs/my_idea_cartpole.py", "--smoke", "--workdir=run")
    assert '"algorithm": "my_idea"' in (tmp_path / "run" / "summary.json").read_text()
    table = read_table(tmp_path / "tests" / "test_my_idea.py")
    assert table
    for path, right, *_ in table.values():
        assert path == "algorithms/my_idea.py" and (tmp_path / path).read_text().count(right) == 1
    assert launch("launchers.fork", "--diff", "my_idea") == " algorithms/my_idea.py does what its parent ppo.py does\n"
