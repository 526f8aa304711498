"""The tool that checks the tests, on a project of two functions."""
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import mutations, plant_errors
from tests.equivalent_errors import EQUIVALENT

TOOL = pathlib.Path(__file__).with_name("plant_errors.py")
FILE, MUTATIONS = "tests/plant_errors.py", "tests/mutations.py"
VERDICTS, SHOWN = "test_caught_missed_and_broken", "test_random_errors_are_caught_or_shown"
DRAW, ORDER = "test_a_draw_depends_on_the_seed_alone", "test_the_quickest_test_that_calls_the_function_is_first"
PEOPLE = "test_what_is_for_people_stays"
PLANTED_ERRORS = {
    "a passing suite is a catch": (FILE, '{0: "MISSED", 1: "caught"}', '{0: "caught", 1: "caught"}', VERDICTS),
    "success whatever was missed": (FILE, 'return count["caught"] == len(errors)', "return True", VERDICTS),
    "nothing planted at all": (FILE, "write_text(wrong(source))", "write_text(source)", VERDICTS),
    "the working tree is broken": (FILE, "    source = (folder / path).read_text()",
        "    folder = ROOT\n    source = (folder / path).read_text()", VERDICTS),
    "a crash of pytest is a catch": (FILE, '.get(status, "BROKEN")', '.get(status, "caught")', VERDICTS),
    "texts that occur twice": (FILE, "source.count(right) != 1", "source.count(right) < 1",
                               "test_bad_entries_are_refused"),
    "not restored": (FILE, "        (folder / path).write_text(source)\n\n", "        pass\n\n", VERDICTS),
    "equivalent errors count": (FILE, 'if verdict != "equivalent"]', "]",
                                "test_score_leaves_out_what_is_equivalent"),
    "equivalent errors are planted": (FILE, "if error.name in EQUIVALENT:", "if False:", SHOWN),
    "a random error is not missed": (FILE, 'verdict, words = "caught", said', "pass", SHOWN),
    "slow tests first": (FILE, "key=lambda test: (record[test][0], test)", "key=lambda test: (-record[test][0], test)",
                         ORDER),
    "tests that never call the function": (FILE, "if place in calls}", "}", ORDER),
    "the same errors for every seed": (MUTATIONS, "random.Random(seed)", "random.Random(0)", DRAW),
    "text for people is changed": (MUTATIONS, "visit_JoinedStr = visit_Raise = visit_Assert", "visit_Assert", PEOPLE),
    "defaults are changed": (MUTATIONS, '("get_config", "__repr__", "__str__")', '("__repr__", "__str__")', PEOPLE),
    "errors that change nothing": (MUTATIONS, " and is_another_program(sources[error.path], text)", "", DRAW),
    "columns for bytes": (MUTATIONS, "return (data[:self.start] + self.text.encode() + data[self.end:]).decode()",
                          "return source[:self.start] + self.text + source[self.end:]", DRAW),
}

TABLES = sorted(path.name for path in TOOL.parent.glob("test_*.py") if "PLANTED_ERRORS" in path.read_text())
CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TEST = """
import pathlib
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
    assert calc.double(2) == 4 and not pathlib.Path(calc.__file__).with_name(".git").exists()


def test_half():
    assert calc.half(2) == 1
"""


@pytest.fixture
def plant(tmp_path):
    def plant(test, *args, code=CODE, equivalent=()):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / "__init__.py").touch()
        for name in ("plant_errors.py", "mutations.py"):
            shutil.copy(TOOL.with_name(name), tmp_path / "tests" / name)
        (tmp_path / "tests" / "equivalent_errors.py").write_text(f"EQUIVALENT = {equivalent}\n")
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
    done, _ = plant(TEST, "--random=3", "core/cal")
    assert done.returncode == 2 and "no file or folder core/cal" in done.stderr


def test_random_errors_are_caught_or_shown(plant):
    half, code = "return x / 2", "def half(x):\n    return x / 2\n\n\ndef unused(x):\n    return x - 3\n"
    test = "import calc\n\n\ndef test_half():\n    assert calc.half(2) < 1.5\n"
    equivalent = {("calc.py", "half", half, "return x / 3"): "for the sake of the argument"}
    done, _ = plant(test, "--random=99", "--jobs=1", "calc", code=code, equivalent=equivalent)
    words = {line.split(": ", 1)[1].split("  [")[0]: line.split()[0]
             for line in done.stdout.splitlines() if " s  calc.py:" in line}
    of_half = {what.split("->  ")[1]: verdict for what, verdict in words.items() if half in what}
    assert of_half == {"return x": "caught", "return x * 2": "caught", "return x / 1": "caught",
                       "return x / 3": "equivalent", "return x / 4": "MISSED"}
    assert "calc.py:6: sign: return x - 3  ->  return x + 3  [no test calls it]" in done.stdout
    assert f"MISSED calc.py:2 half (constant)\n    - {half}\n    + return x / 4\n" in done.stdout
    missed = list(words.values()).count("MISSED")
    assert done.stdout.splitlines()[-1].split() == ["all", "3", str(missed), "1", f"{3 / (3 + missed):.1%}"]
    assert done.returncode == 1


def errors_of(body, head="import jax\nimport jax.numpy as jnp\n\n\n"):
    return mutations.candidates("some.py", head + body, {"needs": {"a"}})


@pytest.mark.parametrize("kind, line, wrong", [
    ("keyword dropped", "f(x, size=3, keep=True)", ["f(x, keep=True)", "f(x, size=3)"]),
    ("keyword dropped", "needs(a=1, b=2)", ["needs(a=1)"]),
    ("argument dropped", "x.sum(1)", ["x.sum()"]),
    ("argument dropped", "jnp.max(x)", []),
    ("arguments swapped", "f(a + 1, (b), c)", ["f(b, (a + 1), c)", "f(a + 1, (c), b)"]),
    ("arguments swapped", "jnp.minimum(a, b)", []),
    ("branches swapped", "jnp.where(c, a, b)", ["jnp.where(c, b, a)"]),
    ("results swapped", "return a, b", ["return b, a"]),
    ("sign", "(a) - (b)", ["(a) + (b)"]),
    ("sign", "π + a", ["π - a"]),
    ("sign", "f(-a)", ["f(a)"]),
    ("sign", "a * b", ["-a * b"]),
    ("sign", 'name + "text"', []),
    ("product", "a * b / c", ["a / b / c", "a * b * c"]),
    ("term dropped", "a * (b + c)", ["a", "a * (b)"]),
    ("comparison", "a < b", ["a <= b", "a > b"]),
    ("comparison", "a is None", ["a is not None"]),
    ("extremes", "jnp.minimum(a, max(b, c))", ["jnp.maximum(a, max(b, c))", "jnp.minimum(a, min(b, c))"]),
    ("axis", "f(x, axis=1)", ["f(x, axis=0)"]),
    ("axis", "f(x, axis=-1)", ["f(x, axis=0)"]),
    ("constant", "a = 3", ["a = 4", "a = 6", "a = 1"]),
    ("constant", "a = 1e-8", ["a = 1.00000001"]),
    ("constant", "f(True)", ["f(False)"]),
    ("index shifted", "x[0, 1:, :-1, None]", ["x[1, 1:, :-1, None]", "x[0, 2:, :-1, None]", "x[0, 1:, :-2, None]"]),
    ("key shared", "jax.random.split(key, n)", ["jnp.broadcast_to(key, (n,))"]),
    ("key shared", "jax.random.split(key, (n, 2))", ["jnp.broadcast_to(key, (n, 2))"]),
    ("key shared", "belief.split(key, n)", []),
    ("name", "step.next_obs, step.obs", ["step.obs, step.obs", "step.next_obs, step.next_obs"]),
    ("name", "x.mean() + x.std()", ["x.sum() + x.std()", "x.mean() + x.var()"]),
    ("name", "self.mean", []),
    ("name", 'd["next_obs"] - d["obs"]', ['d["obs"] - d["obs"]', 'd["next_obs"] - d["next_obs"]']),
    ("logic", "a & ~b", ["a | ~b", "a & b"]),
    ("logic", "not a and b", ["a and b", "not a or b"]),
    ("condition negated", "a if b else c", ["a if not (b) else c"]),
    ("transpose dropped", "A.T @ B", ["A @ B"]),
    ("gradient", "jax.lax.stop_gradient(x)", ["(x)"]),
])
def test_errors_of_a_kind(kind, line, wrong):
    found = errors_of(f"def f(x, y):\n    {line}\n")
    assert sorted(error.after for error in found if error.kind == kind) == sorted(wrong)
    assert {(error.before, error.function, error.first, error.line) for error in found} <= {(line, "f", 5, 6)}


def test_errors_that_need_more_than_a_line():
    keys = "def f(key):\n    a_key, b_key = split(key)\n    return g(a_key), b_key\n"
    assert [error.after for error in errors_of(keys) if error.kind == "another key"] == [
        "return g(b_key), b_key", "return g(a_key), a_key"]
    config = "def get_config():\n    return dict(lr=positive(1e-3), env=name())\n\n\n@decorated\ndef f(config):\n"
    found = errors_of(config + "    return config.lr, config.env\n")
    assert [error.after for error in found if error.kind == "config key ignored"] == ["return 1e-3, config.env"]
    assert {error.first for error in found} == {9}  # a decorator belongs to its function
    loss = errors_of("class Agent:\n    def loss(self, q):\n        return q - self.v\n")
    assert [error.after for error in loss if error.kind == "gradient"] == ["return jax.lax.stop_gradient(q) - self.v"]
    assert loss[0].function == "Agent.loss"


def test_what_is_for_people_stays():
    assert not errors_of('''
"""a + b, x[0], min"""


class Thing:
    """next_obs"""

    size: Array[1]

    def __repr__(self):
        return f"{1 + 2}"

    @wraps(f, updated=())
    def f(self, x: Box[3]) -> Box[4]:
        """obs - 1"""
        print(1 + 2)  # capacity - 1
        self.title = f"{x[0]}"
        raise self.errors[0]
        raise UserError(f"{self.size - 1} of {x}")


def get_config():
    return dict(lr=1 + 2)
''')


def test_a_draw_depends_on_the_seed_alone():
    source = "ε = 1e-3  # ε\n\n\ndef f(a, b):\n    return a - b * ε < 3 and g(a, b, axis=1)[0], 0x1, 1\n"
    found = mutations.candidates("some.py", source)
    draws = [mutations.draw(found, 8, seed, {"some.py": source}) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    texts = {error.planted(source) for error in draws[0]}
    assert len(texts) == 8 and source not in texts
    for error in draws[0]:
        lines = zip(source.splitlines(), error.planted(source).splitlines(), strict=True)
        changed = [(i, *pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1]]
        assert changed == [(error.line, source.splitlines()[error.line - 1], changed[0][2])]
        assert changed[0][2].strip() == error.after
    everything = mutations.draw(found, 10**6, 0, {"some.py": source})
    assert len(everything) <= len(found)
    assert all(mutations.is_another_program(source, error.planted(source)) for error in everything)


def test_score_leaves_out_what_is_equivalent():
    assert plant_errors.score(["caught", "MISSED", "equivalent", "caught", "caught"]) == 0.75
    assert plant_errors.score(["equivalent"]) == 1.0


def test_the_quickest_test_that_calls_the_function_is_first():
    error = mutations.candidates("a.py", "def f(x):\n    return -x\n")[0]
    record = {"": [0, [["a.py", 0]]], "slow": [2.0, [["a.py", 1]]], "quick": [1.0, [["a.py", 1]]],
              "idle": [0.1, [["a.py", 7]]]}
    assert plant_errors.in_order(record, error) == ["quick", "slow"]
    assert plant_errors.in_order(record, error._replace(first=0)) == ["idle", "quick", "slow"]
    assert plant_errors.in_order(record, error._replace(path="b.py")) == []


def test_names_of_files_and_folders():
    root = TOOL.parents[1]
    assert plant_errors.named(root, "ppo") == plant_errors.named(root, "algorithms/ppo.py") == ["algorithms/ppo.py"]
    assert {"core/ekf.py", "core/envs/batch.py"} < set(plant_errors.named(root, "core/"))
    assert plant_errors.named(root, "po") == []


def test_no_equivalent_error_is_stale():
    root = TOOL.parents[1]
    known = {error.name for path in {name[0] for name in EQUIVALENT}
             for error in mutations.candidates(path, (root / path).read_text())}
    assert not EQUIVALENT.keys() - known and all(EQUIVALENT.values())
