"""The picture of one tree search: what it tried at the root, and the tree."""
import itertools

import numpy as np

from launchers.runs import figure

UNVISITED = -1


def draw_tree(path, tree):
    """Write the picture of `tree`, one (unbatched) tree of mctx.

    Left, for each action at the root: its share of the visits, and its probability before the search. The number above
    is its value in the tree. Right: a circle is a state that the search reached; its colour is its value. A thick line
    was visited often. The principal line, that of the most visited children, is orange. Only what hangs on the root is
    drawn: from a tree with outcomes of chance mctx takes these out, and what is behind them.
    """
    children, visits = np.asarray(tree.children_index), np.asarray(tree.children_visits)
    place, depth = layout(children)
    value, discount = np.asarray(tree.node_values), np.asarray(tree.children_discounts)
    q = np.asarray(tree.children_rewards) + discount * np.asarray(tree.children_values)
    prior = np.asarray(tree.children_prior_logits[0], np.float64)
    prior = np.exp(prior - prior.max()) / np.exp(prior - prior.max()).sum()
    best = principal(children, visits, q)
    num_actions = len(prior)
    with figure(path, ncols=2, figsize=(11, 4.5), width_ratios=[1, 2]) as (fig, (root, whole)):
        x = np.arange(num_actions)
        root.bar(x - 0.2, visits[0] / max(visits[0].sum(), 1), 0.4, color="tab:blue", label="visits")
        root.bar(x + 0.2, prior, 0.4, color="tab:grey", label="prior")
        for a in np.flatnonzero(visits[0]):
            top = max(visits[0, a] / visits[0].sum(), prior[a])
            root.annotate(f"{q[0, a]:.3g}", (a, top), ha="center", va="bottom", fontsize=8)
        root.set(xlabel="action", xticks=x, ylim=(0, 1.1), title=f"root: value {value[0]:.4g}")
        root.legend()
        for node, action in (edge for edge in np.argwhere(children != UNVISITED) if edge[0] in place):
            child = children[node, action]
            on_line = child in best
            whole.plot([place[node], place[child]], [-depth[node], -depth[child]], zorder=1 + on_line,
                       color="tab:orange" if on_line else "lightgrey", linewidth=0.8 + 0.3 * visits[node, action]**0.5)
            if num_actions <= 9 and len(place) <= 64:
                whole.annotate(f"{action}", ((place[node] + place[child]) / 2, -(depth[node] + depth[child]) / 2),
                               fontsize=7, ha="center", va="center", color="tab:orange" if on_line else "grey",
                               bbox=dict(color="white", pad=1))
        seen = sorted(place)
        dots = whole.scatter([place[n] for n in seen], [-depth[n] for n in seen], c=value[seen], s=40, zorder=3)
        fig.colorbar(dots, ax=whole, label="value")
        whole.set(title=f"{int(visits[0].sum())} simulations, principal line of {len(best) - 1} steps", xticks=[],
                  yticks=-np.arange(max(depth.values()) + 1), ylabel="depth")
        whole.set_yticklabels(range(max(depth.values()) + 1))


def layout(children):
    """{node: x}, {node: depth} of the nodes that hang on the root: leaves side by side, parents over their middle."""
    place, depth, leaves = {}, {}, itertools.count()

    def visit(node, level):
        depth[node] = level
        below = [child for child in children[node] if child != UNVISITED]
        for child in below:
            visit(child, level + 1)
        place[node] = np.mean([place[child] for child in below]) if below else next(leaves)

    visit(0, 0)
    return place, depth


def principal(children, visits, q):
    """The nodes of the principal line, from the root down: each is the most visited child of the one before. Gumbel's
    search often visits two children equally often; then it is the one of higher value."""
    line, node = [0], 0
    while visits[node].any():
        node = int(children[node, np.where(visits[node] == visits[node].max(), q[node], -np.inf).argmax()])
        line.append(node)
    return line
