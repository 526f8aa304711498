"""Plant the errors that a test file lists, one at a time, and see whether its tests notice.

    python -m tests.plant_errors ppo returns    # the tables of tests/test_ppo.py and tests/test_returns.py
    python -m tests.plant_errors --all          # of every test file that has one

A table lies at the top level of a test file, made of what needs no import:

    PLANTED_ERRORS = {"what is wrong": ("path/of/file.py", "right text, once in that file", "wrong text"), ...}

A fourth entry, "test_this test_that", runs these tests alone: faster, where one knows who must notice. Each worker
breaks a copy of its own, never the working tree. Exit status 1: an error was missed, or a table or its tests are bad.
"""
import argparse
import ast
import concurrent.futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]


def read_table(path):
    """PLANTED_ERRORS of a test file, or {}: executes only the assignments that its imports are not needed for."""
    names = {}
    for node in ast.parse(path.read_text()).body:
        targets = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if not isinstance(node, ast.Assign):
            continue
        try:
            exec(compile(ast.Module([node], []), path, "exec"), names)
        except Exception as error:
            if "PLANTED_ERRORS" in targets:
                sys.exit(f"error: {path}: PLANTED_ERRORS needs more than plain assignments: {error}")
    return names.get("PLANTED_ERRORS", {})


def complaint(path, right, wrong, tests=""):
    """What is bad about one entry of a table, or None."""
    source = (ROOT / path).read_text() if (ROOT / path).is_file() else None
    if source is None:
        return f"{path} does not exist"
    if source.count(right) != 1:
        return f"{right!r} occurs {source.count(right)} times in {path}"
    try:
        ast.parse(source.replace(right, wrong))
    except SyntaxError as error:
        return f"{path} is no Python any more: {error}"


def copy_tree(folder):
    """The files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    for name in os.fsdecode(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder, name, tests=""):
    """(pytest's exit status, its last words, seconds) of tests/test_<name>.py in the copy `folder`."""
    target = f"tests/test_{name}.py"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "not slow", "--tb=no"]
    command += [f"{target}::{test}" for test in tests.split()] or [target]
    # JAX writes a cache entry in place, so workers that shared one could read halves; bytecode of a file that changes
    # twice in a second would be stale.
    env = dict(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1",
               JAX_COMPILATION_CACHE_DIR=f"{folder}.cache", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=900)
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        status, words = done.returncode, [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    except subprocess.TimeoutExpired:
        status, words = 1, ["hangs"]
    return status, words[0], time.perf_counter() - began


def plant(folder, name, path, right, wrong, tests=""):
    source = (folder / path).read_text()
    try:
        (folder / path).write_text(source.replace(right, wrong))
        return run_tests(folder, name, tests)
    finally:
        (folder / path).write_text(source)


def report(name, what, verdict, seconds, words=""):
    print(f"{verdict:7} {seconds:6.1f} s  {name}: {what}{f'  [{words}]' if words else ''}", flush=True)
    return verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="NAME of tests/test_NAME.py")
    parser.add_argument("--all", action="store_true", help="every test file with a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args()
    files = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests").glob("test_*.py"))}
    names = list(files) if args.all else args.names or parser.error("name a test file, or --all")
    if unknown := [name for name in names if name not in files]:
        parser.error(f"no tests/test_{unknown[0]}.py")
    tables = {name: read_table(files[name]) for name in names}
    errors = [(name, what, entry) for name, table in tables.items() for what, entry in table.items()]
    if bad := [f"{name}: {what}: {words}" for name, what, entry in errors if (words := complaint(*entry))]:
        sys.exit("error: " + "\nerror: ".join(bad))
    if empty := [name for name in args.names if not tables[name]]:
        sys.exit(f"error: no PLANTED_ERRORS in tests/test_{empty[0]}.py")

    with tempfile.TemporaryDirectory() as temp, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folders = queue.SimpleQueue()
        for i in range(args.jobs):
            copy_tree(pathlib.Path(temp, f"copy{i}"))
            folders.put(pathlib.Path(temp, f"copy{i}"))

        def in_a_copy(function, *args):
            folder = folders.get()
            try:
                return function(folder, *args)
            finally:
                folders.put(folder)

        def sound(name):
            status, words, seconds = in_a_copy(run_tests, name)
            return report(name, "nothing planted", "BROKEN" if status else "passes", seconds, words if status else "")

        def planted(error):
            name, what, entry = error
            status, words, seconds = in_a_copy(plant, name, *entry)
            verdict = {0: "MISSED", 1: "caught"}.get(status, "BROKEN")  # 2 and more: pytest could not run
            return report(name, what, verdict, seconds, words if verdict == "BROKEN" else "")

        began = time.perf_counter()
        verdicts = list(pool.map(sound, [name for name in tables if tables[name]]))
        if "BROKEN" not in verdicts:
            verdicts = list(pool.map(planted, errors))
        count = {verdict: verdicts.count(verdict) for verdict in ("caught", "MISSED", "BROKEN")}
        print(f"{count['caught']} of {len(errors)} planted errors caught, {count['MISSED']} missed, "
              f"{count['BROKEN']} broken, {time.perf_counter() - began:.0f} s")
        sys.exit(count["caught"] != len(errors))


if __name__ == "__main__":
    main()
