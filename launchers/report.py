"""Keep the README's table true: every row is the summary of a run, with the command that made it.

    python -m launchers.report --run=runs/x      adopt a finished run as the row of its config, and write the table
    python -m launchers.report                   write the table again
"""
import ast
import json
import pathlib
import re
import shlex

from absl import flags

from core.errors import UserError
from core.logging import write
from launchers import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "Folder of a finished run.")
RESULTS = cli.ROOT / "configs" / "results"
BEGIN, END = "<!-- results: written by launchers.report -->\n", "<!-- end of results -->\n"


def adopt(folder):
    """Copy what the table needs of a run into configs/results."""
    folder = pathlib.Path(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} holds no finished run: it has no summary.json")
    summary, provenance = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "provenance"))
    launcher, *args = [arg for arg in provenance["command"] if not arg.startswith("--workdir")]
    config = next(arg.split("=", 1)[1] for arg in args if arg.startswith("--config="))
    command = f"python -m launchers.{pathlib.Path(launcher).stem} {shlex.join(args)}"
    row = summary | dict(command=command, cpus=provenance["cpus"],
                         versions=provenance["versions"])
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / f"{pathlib.Path(config).stem}.json", json.dumps(row, indent=1) + "\n")


def table():
    columns = "method", "paper", "file", "lines", "task", "return: IQM [95% CI]", "seeds", "env steps", "wall-clock"
    lines = [f"| {' | '.join(columns)} | command |", "|---|---|---|--:|---|---|--:|--:|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        row = json.loads(path.read_text())
        source = (cli.ROOT / "algorithms" / f"{row['algorithm']}.py").read_text()
        opening = ast.get_docstring(ast.parse(source)).split("\n\n")[0]
        paper = re.search(r"arXiv:([\d.]+\d)", opening)
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "–"
        errors = [f"; {k.replace('_', ' ')} {score(row[k])}" for k in row if k.endswith("_error")]
        clock = row["train_seconds"] + row["compile_seconds"]
        lines.append("| " + " | ".join([
            re.split(r" \(|,|:", opening)[0], link, f"[{row['algorithm']}.py](algorithms/{row['algorithm']}.py)",
            str(len(source.splitlines())), row["env"],
            f"{score(row['final'])}{''.join(errors)}", str(len(row["seeds"])), f"{row['env_steps']:,}",
            f"{clock:.0f} s", f"`{row['command']}`"]) + " |")
    return "\n".join(lines) + "\n"


def score(summary):
    return f"**{summary['iqm']:.4g}** [{summary['ci95'][0]:.4g}, {summary['ci95'][1]:.4g}]"


def main(_):
    if FLAGS.run:
        adopt(FLAGS.run)
    readme = cli.ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    write(readme, before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    cli.run(main)
