"""The tool that checks the tests, on a project of two functions."""
import pathlib
import subprocess
import sys

import pytest

from tests import plant_errors

TOOL = pathlib.Path(__file__).with_name("plant_errors.py")
FILE = "tests/plant_errors.py"
PLANTED_ERRORS = {
    "a passing suite is a catch": (FILE, '{0: "MISSED", 1: "caught"}', '{0: "caught", 1: "caught"}'),
    "success whatever was missed": (FILE, 'sys.exit(count["caught"] != len(errors))', "sys.exit(0)"),
    "nothing planted at all": (FILE, "write_text(source.replace(right, wrong))", "write_text(source)"),
    "the working tree is broken": (FILE,
        "    source = (folder / path).read_text()", "    folder = ROOT\n    source = (folder / path).read_text()"),
    "a crash of pytest is a catch": (FILE, '.get(status, "BROKEN")', '.get(status, "caught")'),
    "texts that occur twice": (FILE, "source.count(right) != 1", "source.count(right) < 1"),
    "not restored": (FILE, "        (folder / path).write_text(source)\n\n", "        pass\n\n"),
}

TABLES = sorted(path.name for path in TOOL.parent.glob("test_*.py") if "PLANTED_ERRORS" in path.read_text())
CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TEST = """
import calc
HERE = "{}.py".format("calc")
HEAVY = calc.double(1)
PLANTED_ERRORS = {
    "triples": (HERE, "2 * x", "3 * x"),
    "doubles": (HERE, "x / 2", "x * 2"),
    "doubles, in vain": (HERE, "x / 2", "x * 2", "test_double"),
    "no such test": (HERE, "x / 2", "x * 2", "test_none"),
}


def test_double():
    assert calc.double(2) == 4


def test_half():
    assert calc.half(2) == 1
"""


@pytest.fixture
def plant(tmp_path):
    def plant(test, *args, code=CODE):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "__init__.py").touch()
        (tmp_path / "tests" / "plant_errors.py").write_text(TOOL.read_text())
        (tmp_path / "tests" / "test_calc.py").write_text(test)
        (tmp_path / "calc.py").write_text(code)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        command = [sys.executable, "-m", "tests.plant_errors", *(args or ["calc", "--jobs=1"])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (tmp_path / "calc.py").read_text() == code
        verdicts = {line.split(": ", 1)[1].split("  [")[0]: line.split()[0]
                    for line in done.stdout.splitlines() if " s  calc: " in line}
        return done, verdicts

    return plant


def test_caught_missed_and_broken(plant):
    done, verdicts = plant(TEST)
    assert verdicts == {"nothing planted": "passes", "triples": "caught", "doubles": "caught",
                        "doubles, in vain": "MISSED", "no such test": "BROKEN"}
    assert done.returncode == 1
    assert "2 of 4 planted errors caught, 1 missed, 1 broken" in done.stdout


def test_all_caught_is_success(plant):
    sound = "\n".join(line for line in TEST.splitlines() if "vain" not in line and "no such" not in line)
    done, verdicts = plant(sound, "--all", "--jobs=2")
    assert done.returncode == 0 and list(verdicts.values()).count("caught") == 2


def test_tests_that_fail_anyway_prove_nothing(plant):
    done, verdicts = plant(TEST.replace("== 4", "== 5"))
    assert done.returncode == 1 and verdicts == {"nothing planted": "BROKEN"}


@pytest.mark.parametrize("right, wrong, words", [
    ("return", "yield", "'return' occurs 2 times in calc.py"), ("3 * x", "x", "occurs 0 times"),
    ("x / 2", "x /", "no Python any more")])
def test_bad_entries_are_refused(plant, right, wrong, words):
    done, verdicts = plant(TEST.replace("2 * x", right).replace('"3 * x")', f'"{wrong}")'))
    assert done.returncode == 1 and not verdicts and words in done.stderr


@pytest.mark.parametrize("name", TABLES)
def test_every_table_fits_the_code(name):
    table = plant_errors.read_table(TOOL.parent / name)
    bad = {what: words for what, entry in table.items() if (words := plant_errors.complaint(*entry))}
    text = (TOOL.parent / name).read_text()
    for what, (_, right, wrong, *tests) in table.items():
        assert right != wrong, what
        for test in " ".join(tests).split():
            assert f"def {test.split('[')[0]}(" in text, f"{what}: {name} has no {test}"
    assert not bad


def test_unknown_files_are_refused(plant):
    done, _ = plant(TEST, "cal")
    assert done.returncode == 2 and "no tests/test_cal.py" in done.stderr
