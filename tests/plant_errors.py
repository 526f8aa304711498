"""Plant one-line errors, one at a time, and see whether the tests notice.

    python -m tests.plant_errors ppo returns    # the tables of tests/test_ppo.py and tests/test_returns.py
    python -m tests.plant_errors --all          # of every test file that has one
    python -m tests.plant_errors --random 60 --seed 7 algorithms/ppo core    # errors that tests/mutations.py makes

A table lies at the top level of a test file, made of what needs no import:

    PLANTED_ERRORS = {"what is wrong": ("path/of/file.py", "right text, once in that file", "wrong text"), ...}

A fourth entry, "test_this test_that", runs these tests alone: faster, where one knows who must notice. Each worker
breaks a copy of its own, never the working tree. Exit status 1: an error was missed, or a table or its tests are bad.

Random errors meet the tests of their file: at most three test files, first the one of the same name, then those whose
tables name the file most often, then those that import it. Each is run once with nothing planted, which records what
functions each test calls, so that the quickest test that calls the broken function is the first. A hang is a catch.
Errors that change nothing stand in tests/equivalent_errors.py. Exit status 1: less than 90% of the others were caught.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from tests import mutations
from tests.equivalent_errors import EQUIVALENT

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ROOT / ".pytest_cache" / "programs"  # what tests/conftest.py keeps
RECORDS = ROOT / ".pytest_cache" / "records"  # of tests that passed with nothing planted
OURS = ("algorithms", "configs", "core", "launchers", "tests")
ENOUGH = 0.9  # of random errors
PATIENCE = 150.0  # seconds for one random error


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
    """The files that git tracks or does not ignore, and the programs that were compiled for the tests before."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    for name in os.fsdecode(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for known in PROGRAMS.glob("*/"):
        copy_programs(known, pathlib.Path(f"{folder}.cache"))


def copy_programs(source, target):
    target.mkdir(exist_ok=True)
    for name in {path.name for path in source.glob("*-cache")} - {path.name for path in target.iterdir()}:
        with contextlib.suppress(FileExistsError):
            try:
                os.link(source / name, target / name)
            except OSError:  # another disk
                shutil.copy2(source / name, target / name)


def start_server():
    """Python forks from a process that has imported what core/ and algorithms/ need, and computed nothing yet."""
    imported = set()
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "algorithms").rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    # JAX warns of every fork, for it has threads once it has computed.
    os.environ["PYTHONWARNINGS"] = "ignore:os.fork"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    context = multiprocessing.get_context("forkserver")
    plugins = {plugin.module for plugin in importlib.metadata.entry_points(group="pytest11")}
    imported = {module for module in imported | plugins if module.split(".")[0] not in OURS}
    context.set_forkserver_preload(["pytest", "hypothesis", *sorted(imported)])
    return context


class Recorder:
    """A plugin of pytest: runs the tests that `first` names before the others, starts none after `patience` seconds,
    and may record what each calls."""

    def __init__(self, folder, first, record, patience):
        self.folder, self.record, self.place = f"{folder}/", record, {test: i for i, test in enumerate(first)}
        self.patience, self.began, self.stopped = patience, time.perf_counter(), False
        self.tests = {"": [0.0, set()]}  # {test: [seconds, functions]}; "" is what happens at import

    def functions_into(self, calls):
        def trace(frame, event, arg):
            code = frame.f_code
            if code.co_filename.startswith(self.folder):
                calls.add((code.co_filename[len(self.folder):],
                           0 if code.co_name == "<module>" else code.co_firstlineno))

        sys.settrace(trace if self.record else None)

    def pytest_collection(self):
        self.functions_into(self.tests[""][1])

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.place.get(item.nodeid, len(self.place)))

    def pytest_runtestloop(self, session):
        self.session = session

    def pytest_runtest_logstart(self, nodeid):
        self.tests[nodeid] = [time.perf_counter(), set()]
        self.functions_into(self.tests[nodeid][1])

    def pytest_runtest_logfinish(self, nodeid):
        sys.settrace(None)
        self.tests[nodeid][0] = time.perf_counter() - self.tests[nodeid][0]
        if time.perf_counter() - self.began > self.patience and not self.session.testsfailed:
            self.session.shouldstop = self.stopped = "no more time"


def pytest_in_a_fork(folder, args, first, record, patience):
    """Run by a fork of the server: forgets our modules, which are those of the working tree, and imports `folder`'s."""
    os.setsid()
    os.chdir(folder)
    with open(f"{folder}.out", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    # JAX writes a cache entry in place, so workers that shared one could read halves; bytecode of a file that changes
    # twice in a second would be stale.
    cache, sys.dont_write_bytecode = f"{folder}.cache", True
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ.update(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1", JAX_COMPILATION_CACHE_DIR=cache)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", cache)
    import pytest
    recorder = Recorder(folder, first, record, patience)
    status = pytest.main(["-qx", "-p", "no:cacheprovider", "-m", "not slow", "--tb=no",
                          "-W", "ignore::pytest.PytestAssertRewriteWarning", *args], plugins=[recorder])
    pathlib.Path(f"{folder}.record").write_text(
        json.dumps({test: [seconds, sorted(calls)] for test, (seconds, calls) in recorder.tests.items()}))
    sys.stdout.flush()
    os._exit(0 if recorder.stopped else status)


def run_tests(folder, name, tests="", first=(), record=False, limit=900.0, patience=900.0):
    """(pytest's exit status, its last words, seconds) of tests/test_<name>.py in the copy `folder`."""
    target = f"tests/test_{name}.py"
    args = [f"{target}::{test}" for test in tests.split()] or [target]
    began = time.perf_counter()
    process = SERVER.Process(target=pytest_in_a_fork, args=(str(folder), args, tuple(first), record, patience))
    process.start()
    process.join(limit)
    with contextlib.suppress(ProcessLookupError):  # what it started goes, too
        os.killpg(process.pid, signal.SIGKILL)
    hangs = process.exitcode is None
    process.join()
    lines = pathlib.Path(f"{folder}.out").read_text(errors="replace").strip().splitlines() or [""]
    words = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    status, words = (1, "hangs") if hangs else (abs(process.exitcode), words[0])
    return status, words, time.perf_counter() - began


def plant(folder, path, wrong, *args, **kwargs):
    """`run_tests` while the file at `path` says `wrong(its text)`."""
    source = (folder / path).read_text()
    try:
        (folder / path).write_text(wrong(source))
        return run_tests(folder, *args, **kwargs)
    finally:
        (folder / path).write_text(source)


def report(name, what, verdict, seconds, words=""):
    print(f"{verdict:7} {seconds:6.1f} s  {name}: {what}{f'  [{words}]' if words else ''}", flush=True)
    return verdict


class Workers:
    """Threads with a copy of the tree each."""

    def __init__(self, temp, jobs):
        self.folders, self.copies = queue.SimpleQueue(), [pathlib.Path(temp, f"copy{i}") for i in range(jobs)]
        for folder in self.copies:
            copy_tree(folder)
            self.folders.put(folder)
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def map(self, function, *args):
        def in_a_copy(*args):
            folder = self.folders.get()
            try:
                return function(folder, *args)
            finally:
                self.folders.put(folder)

        return list(self.pool.map(in_a_copy, *args))

    def share_programs(self, folder):
        for other in self.copies:
            copy_programs(pathlib.Path(f"{folder}.cache"), pathlib.Path(f"{other}.cache"))


def plant_tables(workers, tables):
    errors = [(name, what, entry) for name, table in tables.items() for what, entry in table.items()]

    def sound(folder, name):
        status, words, seconds = run_tests(folder, name)
        workers.share_programs(folder)
        return report(name, "nothing planted", "BROKEN" if status else "passes", seconds, words if status else "")

    def planted(folder, error):
        name, what, (path, right, wrong, *tests) = error
        status, words, seconds = plant(folder, path, lambda source: source.replace(right, wrong), name, *tests)
        verdict = {0: "MISSED", 1: "caught"}.get(status, "BROKEN")  # 2 and more: pytest could not run
        return report(name, what, verdict, seconds, words if verdict == "BROKEN" else "")

    began = time.perf_counter()
    verdicts = workers.map(sound, [name for name in tables if tables[name]])
    if "BROKEN" not in verdicts:
        verdicts = workers.map(planted, errors)
    count = {verdict: verdicts.count(verdict) for verdict in ("caught", "MISSED", "BROKEN")}
    print(f"{count['caught']} of {len(errors)} planted errors caught, {count['MISSED']} missed, "
          f"{count['BROKEN']} broken, {time.perf_counter() - began:.0f} s")
    return count["caught"] == len(errors)


def named(root, name):
    """Files of ours: all of the folder `name`, or those called so, with folders before it or without."""
    name = name.rstrip("/").removesuffix(".py")
    files = [*root.glob("*.py"), *(path for folder in OURS for path in (root / folder).rglob("*.py"))]
    paths = sorted(path.relative_to(root).as_posix() for path in files)
    return [path for path in paths if f"/{path}".endswith(f"/{name}.py") or path.startswith(f"{name}/")]


def imports_of(root):
    """{path: paths of our files that it imports}."""
    files = {path.relative_to(root).as_posix(): path for folder in OURS for path in (root / folder).rglob("*.py")}
    graph = {}
    for name, path in files.items():
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        places = [module.replace(".", "/") for module in modules]
        graph[name] = {file for place in places for file in (f"{place}.py", f"{place}/__init__.py") if file in files}
    return graph


def tests_of(path, root, graph, tables):
    """Names of the test files that are most about `path`, three at most."""
    distance, ring = {path: 0}, {path}
    while ring:
        ring = {name for name, imported in graph.items() if name not in distance and imported & ring}
        distance |= {name: max(distance.values()) + 1 for name in ring}
    stem, order = pathlib.Path(path).stem, {}
    for name, table in tables.items():
        entries = sum(entry[0] == path for entry in table.values())
        mentions = (root / f"tests/test_{name}.py").read_text().count(stem.removeprefix("from_"))
        steps = distance.get(f"tests/test_{name}.py", len(graph))
        if entries or mentions or steps < len(graph):
            order[name] = name != stem, -entries, steps, -mentions, name
    return sorted(order, key=order.get)[:3]


def digest(root, name):
    """Of all that the tests of one file depend on: every file of ours but the other test files."""
    files = [path for folder in OURS for path in (root / folder).rglob("*.py") if path.stem[:5] != "test_"]
    texts = [path.read_bytes() for path in [*sorted(files), root / f"tests/test_{name}.py"]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def in_order(record, error):
    """The tests that call the function with the error, quickest first; [] if none does."""
    place = [error.path, error.first]
    if place in record[""][1]:
        reached = record.keys() - {""}
    else:
        reached = {test for test, (_, calls) in record.items() if place in calls}
    return sorted(reached - {""}, key=lambda test: (record[test][0], test))


def plant_random(workers, tables, names, count, seed):
    root = workers.copies[0]
    sources = {path: (root / path).read_text() for name in names for path in named(root, name)}
    graph, locks, records = imports_of(root), collections.defaultdict(threading.Lock), {}
    RECORDS.mkdir(parents=True, exist_ok=True)
    required = mutations.required_arguments((root / path).read_text() for path in graph)
    errors = [error for path, source in sources.items() for error in mutations.candidates(path, source, required)]
    drawn = mutations.draw(errors, count, seed, sources)
    print(f"{len(drawn)} of {len(errors)} errors in {len(sources)} files, seed {seed}")

    def record_of(folder, name):
        """What the tests of one file call, and how long they take with nothing planted; None if they fail."""
        with locks[name]:
            kept = RECORDS / f"{name}-{digest(root, name)}.json"
            if name not in records and kept.exists():
                records[name] = json.loads(kept.read_text())
            elif name not in records:
                status, words, seconds = run_tests(folder, name, record=True)
                workers.share_programs(folder)
                report(name, "nothing planted", "BROKEN" if status else "passes", seconds, words if status else "")
                record = None if status else json.loads(pathlib.Path(f"{folder}.record").read_text())
                records[name] = record and (record, seconds)
                if record:
                    for old in RECORDS.glob(f"{name}-????????????????.json"):
                        old.unlink()
                    kept.write_text(json.dumps(records[name]))
        return records[name]

    def examine(folder, error):
        what = f"{error.kind}: {error.before}  ->  {error.after}"
        if error.name in EQUIVALENT:
            return report(f"{error.path}:{error.line}", what, "equivalent", 0, EQUIVALENT[error.name])
        near = ["render"] if error.function.endswith(".draw") else tests_of(error.path, root, graph, tables)
        orders = {name: in_order(known[0], error) for name in near if (known := record_of(folder, name))}
        verdict, words, seconds = "MISSED", "" if any(orders.values()) else "no test calls it", 0.0
        for name, first in sorted(orders.items(), key=lambda item: not item[1]):  # a test may read what none calls
            if seconds > PATIENCE:
                continue
            known = records[name]
            longest = max(taken for taken, _ in known[0].values())
            limit = 10 + 5 * min(known[1], PATIENCE / 5 + longest)
            status, said, taken = plant(folder, error.path, error.planted, name, first=first, limit=limit,
                                        patience=PATIENCE - seconds)
            seconds += taken
            if status:
                verdict, words = "caught", said
                break
        return report(f"{error.path}:{error.line}", what, verdict, seconds, words)

    began = time.perf_counter()
    verdicts = workers.map(examine, drawn)
    print(f"{time.perf_counter() - began:.0f} s\n")
    return all(records.values()) and summary(drawn, verdicts) >= ENOUGH


def score(verdicts):
    """The fraction of errors that are none of the equivalent and were caught; 1 if there are none."""
    counted = [verdict for verdict in verdicts if verdict != "equivalent"]
    return counted.count("caught") / len(counted) if counted else 1.0


def summary(errors, verdicts):
    """Prints survivors and a table by file."""
    by_file = collections.defaultdict(list)
    for error, verdict in sorted(zip(errors, verdicts, strict=True)):
        by_file[error.path].append(verdict)
        if verdict == "MISSED":
            print(f"MISSED {error.path}:{error.line} {error.function} ({error.kind})\n"
                  f"    - {error.before}\n    + {error.after}")
    print(f"\n{'file':40} caught missed equivalent  score")
    for path, found in [*by_file.items(), ("all", verdicts)]:
        caught, missed, equivalent = (found.count(verdict) for verdict in ("caught", "MISSED", "equivalent"))
        print(f"{path:40} {caught:6} {missed:6} {equivalent:10} {score(found):6.1%}")
    return score(verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="NAME of tests/test_NAME.py; with --random, of files or folders")
    parser.add_argument("--all", action="store_true", help="every test file with a table")
    parser.add_argument("--random", type=int, metavar="N", help="plant N random errors")
    parser.add_argument("--seed", type=int, default=0, help="of the random errors")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args()
    files = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests").glob("test_*.py"))}
    if args.random:
        args.names = args.names or ["algorithms", "core"]
        if unknown := [name for name in args.names if not named(ROOT, name)]:
            parser.error(f"no file or folder {unknown[0]}")
    names = list(files) if args.all or args.random else args.names or parser.error("name a test file, or --all")
    if unknown := [name for name in names if name not in files]:
        parser.error(f"no tests/test_{unknown[0]}.py")
    tables = {name: read_table(files[name]) for name in names}
    if not args.random:
        errors = [(name, what, entry) for name, table in tables.items() for what, entry in table.items()]
        if bad := [f"{name}: {what}: {words}" for name, what, entry in errors if (words := complaint(*entry))]:
            sys.exit("error: " + "\nerror: ".join(bad))
        if empty := [name for name in args.names if not tables[name]]:
            sys.exit(f"error: no PLANTED_ERRORS in tests/test_{empty[0]}.py")

    global SERVER
    SERVER = start_server()
    with tempfile.TemporaryDirectory() as temp:
        workers = Workers(temp, args.jobs)
        good = (plant_random(workers, tables, args.names, args.random, args.seed) if args.random
                else plant_tables(workers, tables))
    sys.exit(not good)


if __name__ == "__main__":
    main()
