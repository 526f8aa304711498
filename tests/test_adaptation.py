"""The table and the figure of adaptation, of made-up runs whose every number is known by construction."""
import json

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.evaluation import iqm
from launchers.adaptation import adaptation
from launchers.compare import compare

ADAPTATION, COMPARE = "launchers/adaptation.py", "launchers/compare.py"
TABLE, GAP = "test_every_number_is_right", "test_without_a_gap_there_is_no_share"
PLANTED_ERRORS = {
    "regret from the start on": (ADAPTATION, "run.regret[-1] - run.regret[at]", "run.regret[-1]", TABLE),
    "the jump a row late": (ADAPTATION, "at, late = jump // span - 1", "at, late = jump // span", TABLE),
    "closed from the jump on": (ADAPTATION, "(jump + within) // span - 1", "jump // span - 1", TABLE),
    "share that is left": (ADAPTATION, "{1 - iqm(late) / iqm(frozen):.0%}", "{iqm(late) / iqm(frozen):.0%}", TABLE),
    "mean of ratios": (ADAPTATION, "iqm(late) / iqm(frozen)", "iqm(late / frozen)", TABLE),
    "seeds resampled apart": (ADAPTATION, "1 - iqm(late[i]) / g for", "1 - iqm(late[i[::-1] - 1]) / g for", TABLE),
    "a share of no gap": (ADAPTATION, "np.percentile(gap, 2.5) <= 0", "iqm(frozen) == 0", GAP),
    "better is not back": (ADAPTATION, "mean < target - 0.1", "np.abs(mean - target) > 0.1", TABLE),
    "10% of nothing": (ADAPTATION, "target - 0.1 * np.abs(best).mean()", "target", TABLE),
    "back at the first good window": (ADAPTATION, "away[-1] + 1 if", "away[0] + 1 if", TABLE),
    "back by a single row": (ADAPTATION, "sliding_window_view(x, rows)", "sliding_window_view(x, 1)", TABLE),
    "who never comes back was never away": (ADAPTATION, "if start < len(mean) else np.inf", "", TABLE),
    "back of the first seed": (ADAPTATION, "np.array([iqm(row) for row in x]) for x", "x[:, 0] for x", TABLE),
    "mean nll": (ADAPTATION, 'np.median(run.metrics["nll"], axis=0)', 'np.mean(run.metrics["nll"], axis=0)', TABLE),
    "coverage at the end": (ADAPTATION, 'run.metrics["covered"].mean(0)', 'run.metrics["covered"][-1]', TABLE),
    "ms of all seeds": (ADAPTATION, 'summary["env_steps"] * len(summary["seeds"])', 'summary["env_steps"]', TABLE),
    "steps of all environments": (ADAPTATION, 'steps = run.metrics["env_steps"][:, 0] / run.config["num_envs"]',
                                  'steps = run.metrics["env_steps"][:, 0]', TABLE),
    "other truths compared": (ADAPTATION, '("env", "env_kwargs", "num_envs")', '("env", "num_envs")',
                              "test_a_mistake_is_one_line"),
    "several episodes as one": (ADAPTATION, 'if metrics["train_episodes"][:-1].any() or', "if",
                                "test_a_mistake_is_one_line"),
    "an end within the last rows": (ADAPTATION, '(metrics["train_episodes"][-1] > config["num_envs"]).any()', "False",
                                    "test_a_mistake_is_one_line"),
    "the oracle is another environment": (ADAPTATION, '.pop("reveal", None)', '.get("reveal", None)', TABLE),
    "differences not paired": (COMPARE, "cell(values[row] - base[start])", "cell(values[row] - base[start].mean())",
                               "test_differences_are_paired"),
    "less the wrong row": (COMPARE, "np.flatnonzero(base_steps == step)[0]", "np.flatnonzero(base_steps > 0)[0]",
                           "test_differences_are_paired"),
    "a row without an evaluation": (COMPARE, "filled = ~np.isnan(metrics[column]).any(axis=1)",
                                    "filled = metrics[column][:, 0] != np.inf", "test_differences_are_paired"),
    "the oracle's error is drawn": (ADAPTATION, '"error", runs[1:])', '"error", runs)', "test_the_figure_is_drawn"),
    "lines and legend disagree": (ADAPTATION, "enumerate(shown, len(runs) - len(shown))", "enumerate(shown)",
                                  "test_the_figure_is_drawn"),
}
SEEDS, STEPS = np.arange(8), np.arange(5, 201, 5)  # a row every 5 steps of 2 environments; the jump is at 100
BEST = -8.0 - np.tile(SEEDS, (40, 1))  # the oracle's reward
WEIGHT = np.linspace(0.5, 1.5, 8)  # of what a seed loses: their IQM is 1


def write(folder, loss, seeds=SEEDS, jump_step=100, ends=(39,), reveal=False):
    """A finished run of two environments whose reward is `loss` [40, 8] below the oracle's; its rows `ends` end both
    episodes."""
    folder.mkdir()
    reward = BEST - loss
    episodes = np.zeros_like(reward)
    np.add.at(episodes, list(ends), 2.0)
    evaluated = np.where(np.arange(40)[:, None] % 20 == 19, SEEDS[None] * 10.0 + loss, np.nan)
    values = dict(
        error=0.1 + np.abs(loss), reward=reward, covered=np.where(STEPS > 100, 1.0, 0.9)[:, None] + 0 * reward,
        nll=np.where(STEPS > 130, 1e3, SEEDS[:, None]).T, train_episodes=episodes, **{"return": evaluated})
    rows = [[2 * step, seed, *("" if np.isnan(v[t, i]) else v[t, i] for v in values.values())]
            for t, step in enumerate(STEPS) for i, seed in enumerate(seeds)]
    text = "\n".join(",".join(map(str, row)) for row in [["env_steps", "seed", *values], *rows])
    (folder / "metrics.csv").write_text(f"{text}\n")
    env_kwargs = dict(jump_step=jump_step) | (dict(reveal=True) if reveal else {})
    (folder / "config.json").write_text(json.dumps(dict(env="x", num_envs=2, env_kwargs=env_kwargs)))
    (folder / "summary.json").write_text(json.dumps(dict(train_seconds=32, env_steps=400, seeds=seeds.tolist())))


def since_jump(before, *parts):
    """Losses [40, 8]: `before` at a step up to the jump, then (until how many steps after it, loss)."""
    loss = np.full_like(BEST, before)
    for until, value in reversed(parts):
        loss[(STEPS > 100) & (STEPS <= 100 + until)] = value
    return loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptation")
    write(folder / "oracle", since_jump(0), reveal=True)
    write(folder / "frozen", WEIGHT * since_jump(2, (100, 4)))
    # Good for a moment, from 5 to 15 steps after the jump, and from 30 on every 10 steps taken together.
    uneven = np.where(STEPS % 10, 1.6, -1.6)[:, None] * (STEPS > 130)[:, None]
    write(folder / "learner", WEIGHT * (since_jump(2, (5, 4), (15, 0), (30, 4), (100, 0.4)) + uneven))
    write(folder / "lucky", since_jump(0, (100, -3)))
    write(folder / "most_fail", since_jump(0, (100, 4)) * (SEEDS < 5))
    write(folder / "two_fail", since_jump(0, (100, 4)) * (SEEDS < 2))
    write(folder / "even", since_jump(0, (100, 1)) * (-1.0) ** SEEDS + 0.1)
    write(folder / "other_seeds", since_jump(0), SEEDS + 1)
    write(folder / "other_truth", since_jump(0), jump_step=50)
    write(folder / "two_episodes", since_jump(0), ends=(20, 39))
    write(folder / "short_episodes", since_jump(0), ends=(39, 39))
    return folder


@pytest.fixture
def launch(folder):
    def launch(runs, **flags):
        return {row["run"]: row for row in adaptation(runs=[str(folder / name) for name in runs.split(",")], **flags)}

    return launch


def numbers(cell):
    return [float(x) for x in cell.replace("[", " ").replace("]", " ").replace(",", " ").replace("%", " ").split()]


def test_every_number_is_right(launch):
    rows = launch("oracle,frozen,learner,lucky,most_fail")
    assert {name: numbers(row["regret"])[0] for name, row in rows.items()} == pytest.approx(
        dict(oracle=0, frozen=600, learner=308, lucky=-300, most_fail=300))
    assert {name: numbers(row["after jump"])[0] for name, row in rows.items()} == pytest.approx(
        dict(oracle=0, frozen=400, learner=108, lucky=-300, most_fail=300))
    assert {name: row["back"] for name, row in rows.items()} == dict(
        oracle="10", frozen="never", learner="40", lucky="10", most_fail="never")
    assert launch("oracle,frozen,two_fail")["two_fail"]["back"] == "10"
    low, high = np.percentile([iqm(600 * WEIGHT[i]) for i in resamples()], [2.5, 97.5])
    assert numbers(rows["frozen"]["regret"])[1:] == pytest.approx([low, high], rel=1e-3)

    # Of the last 50 steps, in which the frozen model loses 200: what is lost in proportion has no uncertainty, paired.
    assert rows["oracle"]["closed"] == "100% [100%, 100%]" and rows["frozen"]["closed"] == "0% [0%, 0%]"
    assert rows["learner"]["closed"] == "90% [90%, 90%]"
    assert numbers(rows["lucky"]["closed"])[0] == pytest.approx(175)
    lost, frozen = 200.0 * (SEEDS < 5), 200 * WEIGHT
    share = [100 - 100 * iqm(lost[i]) / iqm(frozen[i]) for i in resamples()]
    assert numbers(rows["most_fail"]["closed"]) == pytest.approx([25, *np.percentile(share, [2.5, 97.5])], abs=0.51)

    assert numbers(rows["frozen"]["nll"])[0] == 3.5
    assert numbers(rows["frozen"]["covered"]) == pytest.approx([0.95] * 3)
    assert rows["oracle"]["nll"] == rows["oracle"]["covered"] == "–"
    assert {row["ms"] for row in rows.values()} == {"10"}


def resamples():
    return np.random.default_rng(0).choice(8, (2000, 8))


def test_without_a_gap_there_is_no_share(launch):
    rows = launch("oracle,even,learner")
    assert {row["closed"] for row in rows.values()} == {"no gap"}


def test_the_table_is_printed(launch, capsys):
    rows = launch("oracle,frozen,learner", markdown=True)
    header, _, *printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [dict(zip(header, row, strict=True)) for row in printed] == list(rows.values())


def test_the_figure_is_drawn(launch, capsys, tmp_path):
    path = tmp_path / "a.png"
    launch("oracle,frozen,learner", figure=str(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "run"
    assert {line.index(word) for line, word in zip(lines[3:], ("0 [0", "600 [", "308 ["), strict=True)} == {
        lines[2].index("regret")}
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB"), int)
    height, width, _ = picture.shape
    axes = picture[:int(0.8 * height)]  # without the legend
    colours = [(31, 119, 180), (255, 127, 14), (44, 160, 44)]  # of the oracle, the frozen model, the learner
    left, right = ([(np.abs(side - c).max(-1) < 8).sum() > 50 for c in colours]
                   for side in (axes[:, :width // 2], axes[:, width // 2:]))
    assert left == [True, True, True] and right == [False, True, True], (left, right)


@pytest.mark.parametrize("runs, words", [
    ("oracle", "frozen"), ("oracle,frozen,other_seeds", "differ in seed"), ("oracle,frozen,none", "no finished run"),
    ("oracle,frozen,other_truth", "differ in env_kwargs"), ("oracle,two_episodes", "more than one episode"),
    ("oracle,short_episodes", "more than one episode")])
def test_a_mistake_is_one_line(launch, runs, words):
    with pytest.raises(UserError, match=words) as error:
        launch(runs)
    assert "\n" not in str(error.value)


def test_differences_are_paired(folder):
    runs = [str(folder / name) for name in ("frozen", "lucky")]
    cells = compare(runs=runs, at=["200", "400"])
    early, late = 10 * SEEDS + 2 * WEIGHT, 10 * SEEDS + 4 * WEIGHT
    assert [numbers(text)[0] for text in cells[runs[0]]] == pytest.approx([iqm(early), iqm(late)], rel=1e-3)
    own, gaps = cells[runs[1]][:2], cells[runs[1]][2:]
    assert [numbers(text)[0] for text in own] == pytest.approx([35, 32], rel=1e-3)
    low, high = np.percentile([iqm((-3 - 4 * WEIGHT)[i]) for i in resamples()], [2.5, 97.5])
    assert numbers(gaps[1]) == pytest.approx([iqm(-3 - 4 * WEIGHT), low, high], rel=1e-3)
    assert compare(runs=runs)[runs[0]] == cells[runs[0]][1:]
    for flags, words in ((dict(column="retrun"), 'did you mean "return"'), (dict(at=["10"]), "no return at step 10")):
        with pytest.raises(UserError, match=words):
            compare(runs=runs, **flags)
