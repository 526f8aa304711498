"""Write the tables of README.md and docs/ from the rows in configs/results. Nobody types a number into a table.

    python -m launchers.report --run=runs/x      # a finished run becomes the row of its config; write the tables
    python -m launchers.report                   # write the tables again

README.md has one line a method. docs/published.json names the row and the published number for it. docs/<method>.md has
all rows of a method. A child that has no page has its rows on the page of its parent. A table stands between the lines
BEGIN and END. All files are read and checked before the first one is written.
"""
import ast
import html
import json
import math
import pathlib
import re
import shlex
from typing import Any, NamedTuple

from core import files
from core.errors import UserError
from launchers import cli

BEGIN, END = "<!-- results: written by launchers.report -->\n", "<!-- end of results -->\n"
CHILD = re.compile(r"Child of (\w+)\.py")
NUMBER = int | float
FIELDS = dict(algorithm=str, env=str, seeds=list, env_steps=int, final=dict, compile_seconds=NUMBER,
              train_seconds=NUMBER, command=str, device=str, cpus=int, versions=dict)


def report(*, run: str | None = None, name: str | None = None) -> None:
    """Write the tables of README.md and docs/; with a run, make it a row first.

    Args:
        run: Folder of a finished run.
        name: Name of its row, if not the name of its config.
    """
    if run is None and name is not None:
        raise UserError(f"name = {name} names the row of a run: say which with --run")
    results = cli.ROOT / "configs" / "results"
    rows = {path.stem: check(files.read(path), path) for path in sorted(results.glob("*.json"))}
    texts = {}
    if run is not None:
        name, row = adopt(pathlib.Path(run), name)
        rows[name] = row
        texts[results / f"{name}.json"] = text_of_row(row)
    methods = {row["algorithm"]: method_of(row["algorithm"]) for row in rows.values()}
    for page in sorted({page_of(method) for method in methods.values()}):
        path = cli.ROOT / "docs" / f"{page}.md"
        own = {name: row for name, row in sorted(rows.items()) if page_of(methods[row["algorithm"]]) == page}
        text = files.text_of(path) if path.exists() else f"# {method_of(page).title}\n\n{BEGIN}{END}"
        texts[path] = put(text, table(own), path)
    readme = cli.ROOT / "README.md"
    texts[readme] = put(files.text_of(readme), headlines(rows, methods), readme)
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        files.write(path, text)


# ---- rows

def text_of_row(row: dict) -> str:
    """JSON, but a list of numbers is one line: a row may have 1,000 seeds."""
    return re.sub(r'\[([^][{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]",
                  json.dumps(row, indent=1)) + "\n"


def adopt(folder: pathlib.Path, name: str | None) -> tuple[str, dict]:
    """The name and the row of a finished run: its summary, and how to repeat it."""
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} holds no finished run: it has no summary.json")
    summary, provenance = files.read(folder / "summary.json"), files.read(folder / "provenance.json")
    if summary.get("smoke"):
        raise UserError(f"{folder} is a smoke run: its numbers mean nothing")
    launcher, args, config = command_of(provenance, folder / "provenance.json")
    stage = "" if launcher in ("train", "finetune") else f"_{launcher}"  # of one config, so its rows need two names
    name = name or re.sub(r"\W", "_", config.rpartition("/")[2].replace(".py", "", 1)) + stage
    if not re.fullmatch(r"\w+", name):
        raise UserError(f'"{name}" cannot be the name of a row: use letters, digits and _')
    row = summary | {k: provenance.get(k) for k in ("commit", "python", "cpus", "versions")}
    row["command"] = f"python -m launchers.{launcher} {shlex.join(args)}"
    return name, check(row, folder)


def command_of(provenance: dict, path: pathlib.Path) -> tuple[str, list[str], str]:
    """(launcher, its arguments without the folder, the file of the config)."""
    argv = provenance.get("command")
    if not isinstance(argv, list) or not argv or not all(isinstance(arg, str) for arg in argv):
        raise UserError(f"{path} does not say which command made the run")
    config = re.search(r"--?config[= ](\S+)", " ".join(argv[1:]))
    launcher = pathlib.Path(argv[0]).stem
    if config is None or not (cli.ROOT / "launchers" / f"{launcher}.py").is_file():
        raise UserError(f"{path}: the run was not made by a launcher with --config, so nobody can repeat it from a row")
    where = r"--?(workdir=.*|resume|noresume|resume=.*)"  # neither changes a number
    args = [arg for arg, last in zip(argv[1:], argv, strict=False)
            if not re.fullmatch(where, arg) and "workdir" not in (arg.lstrip("-"), last.lstrip("-"))]
    return launcher, args, config[1]


def check(row: dict, path: pathlib.Path) -> dict:
    """`row`, if it has all that a table needs."""
    for field, kind in FIELDS.items():
        if not isinstance(row.get(field), kind) or isinstance(row[field], bool) or row[field] in ("", []):
            raise UserError(f"{path}: {field} is missing or damaged")
    names = row.get("score", ["return"])
    if not isinstance(names, list) or not names or not all(isinstance(label, str) for label in names):
        raise UserError(f"{path}: score is damaged: it is a list of names")
    for label, value in {**scores(row), **errors(row)}.items():
        one = len(row["seeds"]) == 1  # and no interval
        numbers = [value.get("iqm"), *(one * [0, 0] or value.get("ci95") or [])] if isinstance(value, dict) else []
        if len(numbers) != 3 or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise UserError(f"{path}: {label} is no {{mean, iqm, ci95, per_seed}}")
    name = row["algorithm"]
    if not name.isidentifier() or name == "__init__" or not (cli.ROOT / "algorithms" / f"{name}.py").is_file():
        raise UserError(f'{path}: "{name}" is no file of algorithms/')
    return row


def scores(row: dict) -> dict[str, Any]:
    """{label: four keys}: one score, or one of each team. Returns of opponents are never added."""
    if "iqm" in row["final"]:
        return {row.get("score", ["return"])[0]: row["final"]}
    return {label.removeprefix("return_"): value for label, value in row["final"].items()} or {"final": None}


def errors(row: dict) -> dict[str, Any]:
    return {label: row[label] for label in row if label.endswith("_error") and label not in scores(row)}


# ---- methods and their pages

class Method(NamedTuple):
    name: str
    title: str
    paper: str | None  # its number at arXiv
    parent: str | None
    lines: int


def method_of(name: str) -> Method:
    path = cli.ROOT / "algorithms" / f"{name}.py"
    if not name.isidentifier() or not path.is_file():
        raise UserError(f'"{name}" is no file of algorithms/')
    source = path.read_text()
    opening = (ast.get_docstring(ast.parse(source)) or name).split("\n\n")[0]
    paper, parent = re.search(r"arXiv:([\d.]+\d)", opening), CHILD.search(opening)
    return Method(name, re.split(r" \(|,|:|\.(?:\s|$)", opening)[0], paper and paper[1], parent and parent[1],
                  len(source.splitlines()))


def page_of(method: Method) -> str:
    """The method's own page in docs/, or that of the nearest ancestor that has one."""
    ancestor, passed = method, {method.name}
    while not (cli.ROOT / "docs" / f"{ancestor.name}.md").exists():
        if ancestor.parent is None or ancestor.parent in passed:
            return method.name
        ancestor = method_of(ancestor.parent)
        passed.add(ancestor.name)
    return ancestor.name


# ---- tables

def put(text: str, table: str, path: pathlib.Path) -> str:
    """`text` with the table between BEGIN and END."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} needs each of these lines once, in this order: {BEGIN.strip()} {END.strip()}")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def headlines(rows: dict, methods: dict) -> str:
    """One line a method, and the published number beside ours."""
    path = cli.ROOT / "docs" / "published.json"
    columns = "method", "file", "task", "score: IQM [95% CI]", "seeds", "env steps", "wall-clock", "published"
    lines = []
    for name, entry in files.read(path).items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("row", "published")):
            raise UserError(f'{path}: {name} needs "row" and "published"')
        if re.search(r"[<|\n]", entry["published"]):  # it may hold a link, but no HTML and no end of its cell
            raise UserError(f"{path}: {name}: published holds one of < | and a line break")
        row = rows.get(entry["row"])
        if row is None or row["algorithm"] != name:
            raise UserError(f"{path}: {name} names {entry['row']}, and configs/results has no such row of {name}")
        method, label = methods[name], entry.get("measure")
        if label is not None and label not in errors(row):
            raise UserError(f"{path}: the row {entry['row']} has no measure {label}")
        cell = f"{words(label)} {score(row[label], row)}" if label else score_cell(row)
        lines.append([f"[{escape(method.title)}](docs/{page_of(method)}.md)",
                      f"[{name}.py](algorithms/{name}.py), {method.lines} lines", escape(row["env"]), cell,
                      len(row["seeds"]), steps(row["env_steps"]), clock(row), entry["published"]])
    return markdown(columns, lines)


def table(rows: dict) -> str:
    """All rows of one page, then the machines and the versions of packages that they were made with."""
    several = len({row["algorithm"] for row in rows.values()}) > 1
    columns = "task", "score: IQM [95% CI]", "seeds", "env steps", "updates", "wall-clock", "command"
    lines, machines = [], {}
    for name, row in rows.items():
        line = [escape(row["env"]), "; ".join([score_cell(row), *(
            f"{words(label)} {score(value, row)}" for label, value in errors(row).items())]),
            len(row["seeds"]), steps(row["env_steps"]), steps(row.get("updates")), clock(row), code(row["command"])]
        lines.append([f"[{row['algorithm']}.py](../algorithms/{row['algorithm']}.py)", *line] if several else line)
        machines.setdefault(machine(row), []).append(code(name))
    made = [f"{'All rows' if len(machines) == 1 else ', '.join(names)}: {where}." for where, names in machines.items()]
    return markdown(("file", *columns) if several else columns, lines) + "\n" + "  \n".join(made) + "\n"


def markdown(columns: tuple, lines: list) -> str:
    rule = ["--:" if column in ("seeds", "env steps", "updates", "wall-clock") else "---" for column in columns]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [columns, rule, *lines])


def score_cell(row: dict) -> str:
    parts = scores(row)
    if list(parts) == ["return"]:
        return score(parts["return"], row)
    return "; ".join(f"{words(label)} {score(value, row)}" for label, value in parts.items())


def score(value: dict, row: dict) -> str:
    """The interquartile mean of the seeds and its 95% interval. One seed has no interval."""
    if len(row["seeds"]) == 1:
        return f"**{value['iqm']:.4g}** (1 seed)"
    return f"**{value['iqm']:.4g}** [{value['ci95'][0]:.4g}, {value['ci95'][1]:.4g}]"


def steps(count: int | None) -> str:
    return f"{count:,}" if type(count) is int and count else "–"


def clock(row: dict) -> str:
    return f"{row['compile_seconds'] + row['train_seconds']:.0f} s"


def machine(row: dict) -> str:
    device = f"{row['cpus']} CPU cores" if row["device"] == "cpu" else f"{row['device']}, {row['cpus']} CPU cores"
    python = {"Python": row["python"]} if row.get("python") else {}
    versions = {name: version for name, version in {**python, **row["versions"]}.items() if version}
    return escape(f"{device}; {', '.join(f'{name} {version}' for name, version in versions.items())}")


def words(label: str) -> str:  # parameter_error, team0 -> parameter error, team 0
    return escape(re.sub(r"(?<=[a-z])(?=\d)", " ", label.replace("_", " ")))


def escape(text: str) -> str:
    """`text` as Markdown that shows it and nothing else: no HTML, no cell border, no end of the table."""
    text = html.escape(" ".join(text.split()))
    return re.sub(r"[\\`*\[\]|~!]|(?<!\w)_|_(?!\w)", lambda match: f"&#{ord(match[0])};", text)


def code(text: str) -> str:
    plain = not re.search(r"[`|<>\s]", text.replace(" ", "")) and text.strip()
    return f"`{text}`" if plain else f"<code>{escape(text)}</code>"


if __name__ == "__main__":
    cli.run(report)
