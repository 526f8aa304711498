"""The picture of a search: where its nodes are, which line is the principal one, and the state that it is of."""
import types
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mctx
import numpy as np
import pytest
from flax import struct

from core.errors import UserError
from launchers import trees, visualize
from tests import probes

TREES, VISUALIZE = "launchers/trees.py", "launchers/visualize.py"
LAYOUT, LINE, DRAWN, STEPS = ("test_parents_stand_over_the_middle_of_their_children", "test_the_principal_line",
                              "test_what_is_drawn", "test_a_search_after_some_steps")
PLANTED_ERRORS = {
    "a parent over its first child": (TREES, "np.mean([place[child] for child in below])", "place[below[0]]", LAYOUT),
    "all on one level": (TREES, "visit(child, level + 1)", "visit(child, level)", LAYOUT),
    "the least visited line": (TREES, "visits[node] == visits[node].max()", "visits[node] == visits[node].min()", LINE),
    "the worst of the most visited": (TREES, "q[node], -np.inf).argmax()", "-q[node], -np.inf).argmax()", LINE),
    "a line without its last state": (TREES, "        line.append(node)\n", "        line.insert(0, node)\n", LINE),
    "values without rewards": (TREES, "q = np.asarray(tree.children_rewards) + ", "q = ", DRAWN),
    "values without discount": (TREES, "discount * np.asarray(tree.children_values)",
                                "np.asarray(tree.children_values)", DRAWN),
    "visits not shared out": (TREES, "visits[0] / max(visits[0].sum(), 1), 0.4", "visits[0], 0.4", DRAWN),
    "logits for a prior": (TREES, "root.bar(x + 0.2, prior,", "root.bar(x + 0.2, tree.children_prior_logits[0],",
                           DRAWN),
    "what hangs on nothing is drawn": (TREES, "if edge[0] in place", "if edge[0] in range(9)",
                                       "test_what_hangs_on_nothing_is_left_out"),
    "the tree of the first state": (VISUALIZE, "        obs = after.obs\n", "        after.obs\n", STEPS),
    "one step too few": (VISUALIZE, "jax.random.split(key, 2 + steps)", "jax.random.split(key, 1 + steps)", STEPS),
}


def a_tree():
    """The root has the children 1 and 2, the node 2 the children 3 and 4; a node 5 was never reached."""
    children = np.full((6, 3), -1)
    children[0, :2], children[2, 1:] = [1, 2], [3, 4]
    visits = np.zeros((6, 3), int)
    visits[0, :2], visits[2, 1:] = [1, 3], [1, 1]
    zeros = np.zeros((6, 3))
    rewards, discounts, values = zeros.copy(), zeros + 0.5, zeros.copy()
    rewards[0], values[0] = [1.0, 2.0, 9.0], [4.0, 6.0, 9.0]
    logits = np.log(np.array([[0.5, 0.3, 0.2]] * 6))
    return types.SimpleNamespace(children_index=children, children_visits=visits, node_values=np.arange(6.0),
                                 children_rewards=rewards, children_discounts=discounts, children_values=values,
                                 children_prior_logits=logits)


def test_parents_stand_over_the_middle_of_their_children():
    place, depth = trees.layout(a_tree().children_index)
    assert place == {0: 0.75, 1: 0.0, 2: 1.5, 3: 1.0, 4: 2.0} and depth == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}


def test_the_principal_line():
    """Of equally often visited children the one with the higher value."""
    tree, q = a_tree(), np.zeros((6, 3))
    q[0] = [9, 1, 1]
    assert trees.principal(tree.children_index, tree.children_visits, q) == [0, 2, 3]
    q[2] = [9, 1, 2]
    assert trees.principal(tree.children_index, tree.children_visits, q) == [0, 2, 4]


def test_what_is_drawn(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    trees.draw_tree(tmp_path / "tree.png", a_tree())
    root, whole = figures[0].axes[:2]
    assert plt.imread(tmp_path / "tree.png").shape[1] > 500
    heights = [bar.get_height() for bar in root.patches]
    np.testing.assert_allclose(heights, [0.25, 0.75, 0.0, 0.5, 0.3, 0.2])
    assert [text.get_text() for text in root.texts] == ["3", "5"]  # 1 + 4 / 2 and 2 + 6 / 2
    assert len(whole.lines) == 4 and sum(line.get_color() == "tab:orange" for line in whole.lines) == 2
    np.testing.assert_array_equal(whole.collections[0].get_array(), [0, 1, 2, 3, 4])
    assert whole.get_title() == "4 simulations, principal line of 2 steps"


def test_what_hangs_on_nothing_is_left_out(tmp_path, monkeypatch):
    """As behind outcomes of chance: node 2 has lost its children, but they have theirs."""
    figures, tree = [], a_tree()
    monkeypatch.setattr(plt, "close", figures.append)
    tree.children_index[2], tree.children_index[3, 0] = -1, 5
    tree.children_visits[2], tree.children_visits[3, 0] = 0, 1
    trees.draw_tree(tmp_path / "tree.png", tree)
    whole = figures[0].axes[1]
    assert len(whole.lines) == 2
    np.testing.assert_array_equal(whole.collections[0].get_array(), [0, 1, 2])


class Found(struct.PyTreeNode):
    obs: jax.Array
    embeddings: Any = ()
    extra_data: Any = ()


def test_a_search_after_some_steps(tmp_path, monkeypatch):
    """Its state is the one that the policy has come to."""
    drawn = []
    algorithm = types.SimpleNamespace(act=lambda run, carry, obs, key: ((), jnp.zeros(len(obs), jnp.int32)),
                                      search=lambda run, obs, key: Found(obs))
    config = types.SimpleNamespace(num_envs=2)
    monkeypatch.setattr(visualize, "policy_of", lambda *_: (
        algorithm, config, (), "probe/Clock", {}, jax.random.key(0)))
    monkeypatch.setattr(visualize, "make_env", probes.make_env)
    monkeypatch.setattr(visualize.cli, "rebind", lambda algorithm, run, env, config: run)
    monkeypatch.setattr(visualize, "draw_tree", lambda path, tree: drawn.append((path, tree.obs)))
    for steps in (None, 2):
        visualize.visualize(run="x", tree=str(tmp_path / "tree.png"), steps=steps)
    assert [path for path, _ in drawn] == [str(tmp_path / "tree.png")] * 2
    np.testing.assert_array_equal([obs for _, obs in drawn], [[0.0], [2.0]])


def test_a_policy_that_does_not_search_is_named(monkeypatch):
    monkeypatch.setattr(visualize, "policy_of", lambda *_: (types.SimpleNamespace(), None, None, "", {}, None))
    with pytest.raises(UserError, match="its policy does not search a tree"):
        visualize.draw_search("runs/x", "x.png", 0, 0, [], 0, False)


def test_a_tree_of_mctx_has_these_fields():
    """The names above are those of mctx's own tree."""
    assert set(vars(a_tree())) <= set(mctx.Tree.__dataclass_fields__)
