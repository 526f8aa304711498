"""A fork is its parent under another name, and the diff is what was changed since."""
import ast
import json
import os
import shutil
import subprocess
import sys

import pytest

from core.errors import UserError
from launchers import cli, fork
from tests.plant_errors import read_table

ROOT = cli.ROOT
ALGORITHMS = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__")
FILE = "launchers/fork.py"
PLANTED_ERRORS = {
    "no word of the parent": (FILE, "[*lines[:sentence + 1], note, *lines[sentence + 1:]]", "lines"),
    "note within a sentence": (FILE, 'if line.endswith(".")), 0)', 'if line), 0)'),
    "two parents": (FILE, "    if CHILD.search(opening):\n", "    if CHILD.match(opening):\n"),
    "configs of the parent run": (FILE, "rename(text, names)", "text"),
    "configs of all": (FILE, "if stem in own}", "}"),
    "no configs of configs": (FILE, "while len(own) > size:", "if True:"),
    "no default is a method": (FILE, "return taken or {alias", "return {alias"),
    "defaults of the parent": (FILE, "[*aliases, *uses, *taken]", "[*aliases, *uses]"),
    "quotes are letters": (FILE, "node.col_offset + (node in taken)", "node.col_offset"),
    "the shortest family": (FILE, "return max(names, key=len,", "return min(names, key=len,"),
    "configs of the family": (FILE, '             if f"{parent}_".startswith(f"{family(path.stem)}_")}', "}"),
    "other arguments": (FILE, "takes_a_method(parent) - configs_of(parent).keys()", "takes_a_method(parent)"),
    "arguments of strangers": (FILE, 'if f"{name}_".startswith(f"{parent}_") or f"{parent}_".startswith(f"{name}_")}',
                               "if name}"),
    "namesakes renamed": (FILE, 'if node.module in ("algorithms", "configs")', "if node.module"),
    "an alias is a use": (FILE, "for alias in aliases if alias.asname is None", "for alias in aliases"),
    "paths of the parent": (FILE, "m[1] + m[2] + names[m[3]]", "m[0]"),
    "uses of the parent": (FILE, "[*aliases, *uses, *taken]", "[*aliases, *taken]"),
    "characters for bytes": (FILE, "lines[node.lineno - 1].encode(), node.col_offset +",
                             'lines[node.lineno - 1].encode("latin1", "replace"), node.col_offset +'),
    "tests keep their name": (FILE, 'f"test_{names[parent]}", source)', 'f"test_{parent}", source)'),
    "tests of children renamed": (FILE, "(?![a-zA-Z0-9]){longer}", "(?![a-zA-Z0-9])"),
    "over existing files": (FILE, "if (cli.ROOT / name).exists()", "if False"),
    "half a fork": (FILE, "            path.unlink()\n", "            pass\n"),
    "any name": (FILE, "not child.isidentifier() or ", ""),
    "paths are names": (FILE, "    if name not in known:",
                        '    if not (cli.ROOT / "algorithms" / f"{name}.py").exists():'),
    "docstrings count": (FILE, "ast.get_docstring(node) is not None", "False"),
    "diff upside down": (FILE, 'f"-{line}" for line in before', 'f"+{line}" for line in before'),
    "innermost function only": (FILE, "names = [match[1], *names] if match", "names = [match[1]] if match"),
    "siblings are scopes": (FILE, "if depth < indent:", "if depth <= indent:"),
    "long lines whole": (FILE, "if len(line) <= width:", "if True:"),
    "help without flags": ("launchers/cli.py", "    for name in names:  #", "    for name in []:  #",
                           "test_help_lists_the_flags"),
    "one name is enough": (FILE, "len(names) == 2", "names"),
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
CHILD = "tests/test_icem_hat.py"
PLANTED_ERRORS = {"sign": ("algorithms/icem.py", "scale(x) - 1", "scale(x) + 1")}


def test_icem_config():
    assert [icem.get_config(), planning.icem, shooting, other.icem, icem_pendulum.icem, f"{icem}"]
    assert "python -m launchers.train --config=configs/icem_pendulum.py" != "core.icem and icem_hat"
'''
CONFIG_OF_CONFIG = '''"""The same, e.g. --config=configs/icem_drone_long.py:40."""
from configs import icem_drone as base


def get_config(icem_drone="20"):
    return base.get_config() | dict(steps=int(icem_drone))
'''
TAKES_A_METHOD = '''"""Any method: --config=configs/icem_both.py:icem."""
import importlib


def get_config(algorithm="icem_hat", steps="ppo"):
    return importlib.import_module(f"algorithms.{algorithm}").get_config() | dict(steps=steps)
'''
CONFIG = '"""Icem on a pendulum."""\nfrom algorithms import icem\n\n\ndef get_config():\n    return icem.get_config()\n'


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with the method `icem`, three configs of it, one of its child icem_hat, and two that take a method."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for name, text in {
        "algorithms/icem.py": PARENT, "algorithms/icem_hat.py": PARENT, "configs/icem_pendulum.py": CONFIG,
        "core/ekf.py": '"""A filter."""\n',
        "configs/icem_drone.py": CONFIG, "configs/icem_drone_long.py": CONFIG_OF_CONFIG,
        "configs/icem_both.py": TAKES_A_METHOD, "configs/adapt.py": TAKES_A_METHOD.replace("icem_hat", "icem"),
        "configs/adapt_ppo.py": TAKES_A_METHOD.replace("icem_hat", "ppo"), "algorithms/ppo.py": PARENT,
        "configs/icem_hat_drone.py": CONFIG.replace("icem\n", "icem_hat as icem\n"),
        "tests/test_icem.py": TEST}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def files(root):
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}


def test_every_file_under_the_new_name(root, capsys):
    before = files(root)
    fork.fork("icem", "mine")
    new = {name: text for name, text in files(root).items() if name not in before}
    assert new.keys() == {"algorithms/mine.py", "configs/mine_pendulum.py", "configs/mine_drone.py",
                          "configs/mine_drone_long.py", "tests/test_mine.py"}
    assert before.items() <= files(root).items()
    said = capsys.readouterr().out.splitlines()
    assert said[:5] == [f"wrote {name}" for name in (
        "algorithms/mine.py", "configs/mine_drone.py", "configs/mine_drone_long.py", "configs/mine_pendulum.py",
        "tests/test_mine.py")]
    assert said[5:] == [
        "next:", "    python -m launchers.train --config=algorithms/mine.py --smoke",
        "    python -m launchers.train --config=configs/adapt.py:mine --smoke",
        "    python -m launchers.train --config=configs/icem_both.py:mine --smoke",
        "    python -m pytest tests/test_mine.py", "    python -m launchers.fork --diff=mine"]
    assert new["algorithms/mine.py"] == PARENT.replace(
        "(Doe, 2020).\n", "(Doe, 2020).\nChild of icem.py; the diff is the method.\n")
    assert new["configs/mine_drone.py"] == CONFIG.replace("import icem", "import mine").replace("icem.get", "mine.get")
    assert new["configs/mine_drone_long.py"] == CONFIG_OF_CONFIG.replace("icem_drone_", "mine_drone_").replace(
        "import icem_drone", "import mine_drone")
    assert new["tests/test_mine.py"] == '''from algorithms import mine, other
from configs import mine_pendulum
from core import planning
from core.planning import icem as shooting

TEXT = "π, µ", mine.NUMBER
CHILD = "tests/test_icem_hat.py"
PLANTED_ERRORS = {"sign": ("algorithms/mine.py", "scale(x) - 1", "scale(x) + 1")}


def test_mine_config():
    assert [mine.get_config(), planning.icem, shooting, other.icem, mine_pendulum.icem, f"{mine}"]
    assert "python -m launchers.train --config=configs/mine_pendulum.py" != "core.icem and icem_hat"
'''


def test_a_config_that_takes_a_method_goes_with_its_default(root, capsys):
    before = files(root)
    fork.fork("icem_hat", "mine")
    new = {name: text for name, text in files(root).items() if name not in before}
    assert new.keys() == {"algorithms/mine.py", "configs/mine_drone.py", "configs/mine_both.py"}
    assert new["configs/mine_both.py"] == TAKES_A_METHOD.replace('"icem_hat"', '"mine"').replace(
        "configs/icem_both", "configs/mine_both")
    said = capsys.readouterr().out
    assert "configs/adapt.py:mine" in said and "configs/icem_both.py:mine" not in said


def test_a_grandchild_names_its_parent_alone(root):
    fork.fork("icem", "mine")
    fork.fork("mine", "mine_too")
    lines = (root / "algorithms" / "mine_too.py").read_text().splitlines()
    assert lines[1:4] == ["Child of mine.py; the diff is the method.", "", "    x = 1"]


@pytest.mark.parametrize("parent, child", [
    ('"""Short."""\nX = 1\n', '"""Short.\nChild of short.py; the diff is the method."""\nX = 1\n'),
    ('"""Short.\n"""\n', '"""Short.\nChild of short.py; the diff is the method.\n"""\n'),
    ('"""Two\nlines.\n\nMore."""\n', '"""Two\nlines.\nChild of short.py; the diff is the method.\n\nMore."""\n'),
    ('"""A (Doe,\n2020). Child of ppo.py; the diff is the method.\n"""\n',
     '"""A (Doe,\n2020). Child of short.py; the diff is the method.\n"""\n')])
def test_the_parent_is_named_in_the_first_paragraph(parent, child):
    assert fork.with_parent(parent, "short") == child


def test_the_diff_is_what_was_changed(root):
    fork.fork("icem", "mine")
    path = root / "algorithms" / "mine.py"
    same = path.read_text().replace("# a comment", "# another").replace("The numbers.", "All of them.")
    path.write_text(same.replace('"icem"', "'icem'").replace(
        "def act(run, carry, obs, key):\n", "def act(\n    run, carry, obs, key,\n):\n    # Greedy.\n"))
    assert list(fork.difference("mine")) == [" algorithms/mine.py has the code of its parent icem.py"]
    path.write_text(path.read_text().replace("scale(x) - 1", "scale(x) + 1").replace("0.99", "0.9"))
    changes = list(fork.difference("mine"))
    assert [line for line in changes if line[0] != " "] == [
        "@@ get_config @@", "-            discount=0.99,", "+            discount=0.9,",
        "@@ Agent.value @@", "-            x = scale(x) - 1", "+            x = scale(x) + 1"]


@pytest.mark.parametrize("args, words", [
    (("icm", "mine"), 'unknown algorithm "icm"; did you mean "icem"'), (("icem", "my-idea"), '"my-idea" cannot be'),
    (("icem", "class"), '"class" cannot be'), (("../core/ekf", "mine"), 'unknown algorithm "../core/ekf"'),
    (("__init__", "mine"), "unknown algorithm"), (("icem", "../mine"), '"../mine" cannot be'),
    (("icem",), "name a method"), (("icem", "mine", "hers"), "name a method"),
    (("icem", "icem_hat"), "algorithms/icem_hat.py exists already"),
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
    with pytest.raises(UserError, match="icem.py names no parent"):
        list(fork.difference("icem"))
    with pytest.raises(UserError, match='did you mean "icem"'):
        list(fork.difference("icm"))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of this project's files."""
    for folder in ("algorithms", "configs", "core", "launchers", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.gif"))
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("parent", ALGORITHMS)
def test_a_fork_of_every_method_is_about_itself(house, parent):
    before = files(house)
    fork.fork(parent, "my_idea")
    new = {name: text for name, text in files(house).items() if name not in before}
    for name, text in new.items():
        tree = ast.parse(text)
        assert parent not in {alias.name for alias in fork.imports(tree)}, name
        if name.startswith("configs/"):
            assert "my_idea" in text and parent + "_" not in name
    if "tests/test_my_idea.py" in new:
        own, old = (read_table(house / "tests" / f"test_{name}.py") for name in ("my_idea", parent))
        for error, (path, right, *_) in own.items():
            assert path == old[error][0].replace(f"algorithms/{parent}.py", "algorithms/my_idea.py")
            assert (house / path).read_text().count(right) == (house / old[error][0]).read_text().count(old[error][1])
    assert list(fork.difference("my_idea")) == [f" algorithms/my_idea.py has the code of its parent {parent}.py"]


def launch(root, *command, status=0):
    done = subprocess.run([sys.executable, "-m", *command], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
                          capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_a_fork_trains(house):
    said = launch(house, "launchers.fork", "ppo", "my_idea")
    assert "    python -m launchers.train --config=algorithms/my_idea.py --smoke" in said.splitlines()
    launch(house, "launchers.train", "--config=configs/my_idea_cartpole.py", "--smoke", "--workdir=run")
    assert json.loads((house / "run" / "summary.json").read_text())["algorithm"] == "my_idea"


def test_help_lists_the_flags():
    assert "--diff: A fork: print the code in which" in launch(ROOT, "launchers.fork", "--help", status=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parent", ALGORITHMS)
def test_the_tests_of_a_fork_pass(house, parent):
    fork.fork(parent, "my_idea")
    shutil.copy(ROOT / "pytest.ini", house)
    if (house / "tests" / "test_my_idea.py").exists():
        launch(house, "pytest", "-q", "tests/test_my_idea.py")
