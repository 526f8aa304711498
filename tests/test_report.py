"""Tables from rows made by hand: every cell is one that a person computed."""
import json

import pytest

from core import files
from core.errors import UserError
from launchers import cli, report

FILE = "launchers/report.py"
PLANTED_ERRORS = {
    "words in one line": (FILE, r'''r'\[([^][{}"]*)\]''', r'''r'\[([^]]*)\]''', "test_a_list_of_numbers_is_one_line"),
    "smoke runs count": (FILE, 'if summary.get("smoke"):', "if False:"),
    "teams are one": (FILE, 'return {label.removeprefix("return_"): value for label, value in row["final"].items()}',
                      'return {"return": list(row["final"].values())[0]}'),
    "name of the score": (FILE, 'row.get("score", ["return"])[0]', '"return"'),
    "one seed has an interval": (FILE, 'if len(row["seeds"]) == 1:', "if False:"),
    "interval upside down": (FILE, "[{value['ci95'][0]:.4g}, {value['ci95'][1]:.4g}]",
                             "[{value['ci95'][1]:.4g}, {value['ci95'][0]:.4g}]"),
    "mean for iqm": (FILE, "**{value['iqm']:.4g}** [", "**{value['mean']:.4g}** ["),
    "no compile time": (FILE, "row['compile_seconds'] + row['train_seconds']", "row['train_seconds']"),
    "other folders in the command": (FILE, "workdir=.*|", ""),
    "resume in the command": (FILE, "|resume|noresume", ""),
    "name without the argument": (FILE, '.replace(".py", "", 1)', '.split(".py")[0]'),
    "stages share a row": (FILE, 'else f"_{launcher}"', 'else ""'),
    "any name is an algorithm": (FILE, '    if not name.isidentifier() or name == "__init__"',
                                 '    if name == "x" and name == "__init__"'),
    "paths are names of algorithms": (FILE, 'if not name.isidentifier() or name == "__init__" or not', "if not"),
    "true is a number": (FILE, " or isinstance(row[field], bool)", ""),
    "html passes": (FILE, 'html.escape(" ".join(text.split()))', '" ".join(text.split())'),
    "pipes pass": (FILE, r"\[\]|~!]", r"\[\]~!]"),
    "code holds anything": (FILE, "return f\"`{text}`\" if plain", "return f\"`{text}`\" if text"),
    "children on pages of their own": (FILE, "    return ancestor.name\n", "    return method.name\n"),
    "rows of all methods": (FILE, '[row["algorithm"]]) == page}', '[row["algorithm"]])}'),
    "errors are not shown": (FILE, 'if label.endswith("_error")', 'if label.endswith("_errors")'),
    "two tables": (FILE, "if text.count(BEGIN) != 1", "if text.count(BEGIN) < 1"),
    "ends before it begins": (FILE, " or text.index(BEGIN) > text.index(END)", ""),
    "headline of another": (FILE, ' or row["algorithm"] != name:', ":"),
    "machines told once for all": (FILE, "'All rows' if len(machines) == 1", "'All rows' if machines"),
    "infinity is a number": (FILE, " and math.isfinite(number)", ""),
    "html in a published number": (FILE, 'if re.search(r"[<|\\n]", entry["published"]):', "if False:"),
    "name without a run": (FILE, "if run is None and name is not None:", "if False:"),
}

BEGIN, END = report.BEGIN, report.END
PPO = '"""Proximal Policy Optimization (Schulman et al., 2017, arXiv:1707.06347).\n\nMore."""\nX = 1\n'
CHILD = '"""PPO with a twist: another loss.\nChild of ppo.py; the diff is the method."""\n'
FOUR = dict(mean=10.0, iqm=12.34567, ci95=[11.0, 13.5], per_seed=[9.0, 12.0])
ROW = dict(algorithm="ppo", env="gymnax/CartPole-v1", seeds=[0, 1], env_steps=499712, updates=15616, score=["return"],
           final=FOUR, compile_seconds=9.6, train_seconds=18.7, device="cpu", cpus=2, python="3.11.7",
           versions={"jax": "0.10.2", "gymnax": None}, command="python -m launchers.train --config=configs/ppo_x.py")
COLUMNS = ("| task | score: IQM [95% CI] | seeds | env steps | updates | wall-clock | command |\n"
           "| --- | --- | --: | --: | --: | --: | --- |\n")
LINE = ("| gymnax/CartPole-v1 | **12.35** [11, 13.5] | 2 | 499,712 | 15,616 | 28 s "
        "| `python -m launchers.train --config=configs/ppo_x.py` |\n")
MADE = "\nAll rows: 2 CPU cores; Python 3.11.7, jax 0.10.2.\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with one method, one row of it, and the pages that the tables stand in."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for name, text in {
        "algorithms/ppo.py": PPO, "algorithms/twist.py": CHILD, "launchers/train.py": "",
        "launchers/pretrain.py": "",
        "README.md": f"a\n{BEGIN}{END}b\n",
        "docs/ppo.md": f"# PPO\n{BEGIN}old\n{END}more\n", "configs/results/ppo_x.json": json.dumps(ROW),
        "docs/published.json": json.dumps({"ppo": {"row": "ppo_x", "published": "490 ± 6, CleanRL"}})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def add(root, name, **changes):
    (root / "configs" / "results" / f"{name}.json").write_text(json.dumps(ROW | changes))


def page(root, name="docs/ppo.md"):
    return (root / name).read_text()


def finished_run(root, **changes):
    folder = root / "runs" / "x"
    folder.mkdir(parents=True)
    summary = {k: v for k, v in ROW.items() if k not in ("command", "cpus", "python", "versions")}
    (folder / "summary.json").write_text(json.dumps(summary | dict(smoke=False, length=FOUR) | changes))
    (folder / "provenance.json").write_text(json.dumps(dict(
        command=["/home/me/launchers/train.py", "--config=configs/ppo_y.py:10", "--config.lr=1e-3", "--workdir=runs/x",
                 "--workdir", "runs/x", "--resume", "--num_seeds=2"],
        commit="abc", python="3.11.7", cpus=2, versions={"jax": "0.10.2"})))
    return folder


def test_one_row(root):
    report.report()
    assert page(root) == f"# PPO\n{BEGIN}{COLUMNS}{LINE}{MADE}{END}more\n"
    assert page(root, "README.md") == (
        f"a\n{BEGIN}| method | file | task | score: IQM [95% CI] | seeds | env steps | wall-clock | published |\n"
        "| --- | --- | --- | --- | --: | --: | --: | --- |\n"
        "| [Proximal Policy Optimization](docs/ppo.md) | [ppo.py](algorithms/ppo.py), 4 lines | gymnax/CartPole-v1 "
        f"| **12.35** [11, 13.5] | 2 | 499,712 | 28 s | 490 ± 6, CleanRL |\n{END}b\n")
    report.report()
    assert page(root).count(LINE) == 1


@pytest.mark.parametrize("changes, cells", [
    (dict(seeds=[3]), "| **12.35** (1 seed) | 1 |"),
    (dict(seeds=[3], final=FOUR | dict(ci95=None)), "| **12.35** (1 seed) | 1 |"),
    (dict(final=dict(return_team0=FOUR, return_team1=FOUR | dict(iqm=-5.0, ci95=[-6, -4])),
          score=["return_team0", "return_team1"]), "| team 0 **12.35** [11, 13.5]; team 1 **-5** [-6, -4] | 2 |"),
    (dict(score=["nll"]), "| nll **12.35** [11, 13.5] | 2 |"),
    (dict(gain_error=FOUR, length=FOUR), "| **12.35** [11, 13.5]; gain error **12.35** [11, 13.5] | 2 |"),
    (dict(score=["test_error"], test_error=FOUR), "| test error **12.35** [11, 13.5] | 2 |"),
    (dict(env_steps=0, updates=5000), "| – | 5,000 |"), (dict(updates=None), "| 499,712 | – |")])
def test_cells(root, changes, cells):
    add(root, "ppo_x", **changes)
    report.report()
    assert cells in page(root)


def test_a_run_becomes_a_row(root):
    report.report(run=str(finished_run(root)))
    row = json.loads((root / "configs" / "results" / "ppo_y_10.json").read_text())
    assert row["command"] == "python -m launchers.train --config=configs/ppo_y.py:10 --config.lr=1e-3 --num_seeds=2"
    assert (row["commit"], row["final"], row["length"]) == ("abc", FOUR, FOUR)
    assert page(root).count("| gymnax/CartPole-v1 |") == 2
    assert f"`{row['command']}`" in page(root)
    report.report(run=str(root / "runs" / "x"), name="slow")
    assert (root / "configs" / "results" / "slow.json").exists()


def test_a_list_of_numbers_is_one_line():
    """Words and what is inside a list of words stay as they are."""
    row = dict(seeds=[0, 1, 2], final=dict(per_seed=[0.5, -1e-5, None], iqm=1.0), score=["a  [b,", "c\n"], none=[])
    text = report.text_of_row(row)
    assert json.loads(text) == row
    assert '"seeds": [0, 1, 2],\n' in text and '"per_seed": [0.5, -1e-05, null],\n' in text


def test_a_stage_before_training_has_a_row_of_its_own(root):
    path = finished_run(root, score=["nll"], env_steps=0) / "provenance.json"
    path.write_text(path.read_text().replace("train.py", "pretrain.py"))
    report.report(run=str(path.parent))
    assert (root / "configs" / "results" / "ppo_y_10_pretrain.json").exists()
    assert "| nll **12.35** [11, 13.5] | 2 | – | 15,616 | 28 s | `python -m launchers.pretrain --config" in page(root)


def test_pages(root):
    add(root, "twist", algorithm="twist")
    report.report()
    assert "| file | task |" in page(root) and "| [twist.py](../algorithms/twist.py) | gymnax" in page(root)
    (root / "docs" / "twist.md").write_text(f"{BEGIN}{END}")
    report.report()
    assert page(root) == f"# PPO\n{BEGIN}{COLUMNS}{LINE}{MADE}{END}more\n"
    assert page(root, "docs/twist.md") == f"{BEGIN}{COLUMNS}{LINE}{MADE}{END}"
    (root / "algorithms" / "alone.py").write_text('"""Alone, of no family."""\n')
    add(root, "alone", algorithm="alone")
    report.report()
    assert page(root, "docs/alone.md") == f"# Alone\n\n{BEGIN}{COLUMNS}{LINE}{MADE}{END}"


def test_machines_are_told_once(root):
    add(root, "ppo_gpu", device="NVIDIA H100", cpus=16)
    report.report()
    assert ("`ppo_gpu`: NVIDIA H100, 16 CPU cores; Python 3.11.7, jax 0.10.2.  \n"
            "`ppo_x`: 2 CPU cores; Python 3.11.7, jax 0.10.2.\n") in page(root)


def test_a_headline_may_be_a_measure(root):
    add(root, "ppo_x", gain_error=FOUR | dict(iqm=0.5))
    entry = {"row": "ppo_x", "measure": "gain_error", "published": "1"}
    (root / "docs" / "published.json").write_text(json.dumps({"ppo": entry}))
    report.report()
    assert "| gain error **0.5** [11, 13.5] | 2 |" in page(root, "README.md")


@pytest.mark.parametrize("text", ["<script>x</script>", "a | b", END.strip(), "a\nb\n| c |", "`x` <b>", "![x](y)",
                                  "[x](javascript:y)", "*x* _y_ ~z~"])
def test_text_from_a_folder_is_only_text(root, text):
    add(root, "ppo_x", env=text, command=f"python {text}", versions={text: text}, device=text)
    report.report()
    made = page(root)
    assert made.startswith(f"# PPO\n{BEGIN}") and made.endswith(f"{END}more\n") and made.count(END.strip()) == 1
    line = made.split("\n")[4]
    assert line.startswith("| ") and line.count("|") == 8
    for sign in ("<script", "<b>", "![", "](", "*x*", "~z~", " _y_"):
        assert sign not in made.replace("<code>", "").replace(f"`python {text}`", "")
    report.report()
    assert page(root) == made


@pytest.mark.parametrize("changes, words", [
    (dict(algorithm="../launchers/train"), '"../launchers/train" is no file of algorithms/'),
    (dict(algorithm="sac"), '"sac" is no file'), (dict(algorithm="__init__"), '"__init__" is no file'),
    (dict(env_steps=True), "env_steps is missing or damaged"),
    (dict(env=None), "env is missing"), (dict(seeds=[]), "seeds is missing"), (dict(final=3.0), "final is missing"),
    (dict(final={}), "final is no"), (dict(final={"return_team0": 3}), "team0 is no"),
    (dict(final=FOUR | dict(ci95=None)), "return is no"), (dict(final=FOUR | dict(iqm="<b>")), "return is no"),
    (dict(final=FOUR | dict(iqm=float("inf"))), "return is no"), (dict(env_steps=10**30), "z.json is damaged"),
    (dict(gain_error=1.0), "gain_error is no"),
    (dict(score="return"), "score is damaged")])
def test_damaged_rows_are_named_and_nothing_is_written(root, changes, words):
    add(root, "z", **changes)
    before = page(root), page(root, "README.md")
    with pytest.raises(UserError, match=words) as error:
        report.report()
    assert "z.json" in str(error.value) and "\n" not in str(error.value)
    assert (page(root), page(root, "README.md")) == before


@pytest.mark.parametrize("name, text, words", [
    ("summary.json", '{"a', "summary.json is damaged"), ("summary.json", "[]", "summary.json is damaged"),
    ("summary.json", b"\x80", "summary.json is damaged"), ("summary.json", None, "no summary.json"),
    ("provenance.json", None, "provenance.json does not exist"),
    ("provenance.json", "{}", "does not say which command"),
    ("provenance.json", '{"command": ["/x/notebook.py", "--config=configs/x.py"]}', "not made by a launcher"),
    ("provenance.json", '{"command": ["/x/train.py", "--seed=1"]}', "not made by a launcher")])
def test_damaged_runs_are_named(root, name, text, words):
    path = finished_run(root) / name
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = page(root)
    with pytest.raises(UserError, match=words) as error:
        report.report(run=str(path.parent))
    assert "\n" not in str(error.value)
    assert page(root) == before and len(list((root / "configs" / "results").iterdir())) == 1


def test_refusals(root):
    row = root / "configs" / "results" / "ppo_x.json"
    before = row.read_bytes(), page(root)
    with pytest.raises(UserError, match="smoke run"):
        report.report(run=str(finished_run(root, smoke=True)), name="ppo_x")
    assert (row.read_bytes(), page(root)) == before
    with pytest.raises(UserError, match="say which with --run"):
        report.report(name="x")
    (root / "runs" / "x" / "summary.json").write_text(json.dumps(ROW))
    with pytest.raises(UserError, match='"../x" cannot be the name'):
        report.report(run=str(root / "runs" / "x"), name="../x")


@pytest.mark.parametrize("name, text, words", [
    ("README.md", "no markers", "README.md needs each of these lines"),
    ("README.md", f"{END}{BEGIN}", "README.md needs"), ("docs/ppo.md", f"{BEGIN}{BEGIN}{END}", "ppo.md needs"),
    ("docs/published.json", "{", "published.json is damaged"),
    ("docs/published.json", '{"ppo": {"row": "y", "published": "1"}}', "ppo names y, and configs/results has no such"),
    ("docs/published.json", '{"sac": {"row": "ppo_x", "published": "1"}}', "sac names ppo_x, and configs/results has"),
    ("docs/published.json", '{"ppo": {"row": "ppo_x"}}', 'ppo needs "row" and "published"'),
    ("docs/published.json", '{"ppo": {"row": [], "published": "1"}}', 'ppo needs "row" and "published"'),
    ("docs/published.json", '{"ppo": {"row": "ppo_x", "published": "<b>"}}', "published holds one of"),
    ("docs/published.json", '{"ppo": {"row": "ppo_x", "published": "1 | 2"}}', "published holds one of"),
    ("docs/published.json", '{"ppo": {"row": "ppo_x", "published": "1", "measure": "x"}}', "has no measure x")])
def test_damaged_pages_are_named_and_nothing_is_written(root, name, text, words):
    (root / name).write_text(text)
    before = page(root), page(root, "README.md")
    with pytest.raises(UserError, match=words):
        report.report(run=str(finished_run(root)))
    assert (page(root), page(root, "README.md")) == before and len(list((root / "configs" / "results").iterdir())) == 1


def test_the_project_s_own_rows_make_tables():
    for path in sorted((cli.ROOT / "configs" / "results").glob("*.json")):
        assert report.table({path.stem: report.check(files.read(path), path)}).startswith("| task |")
