"""2048 on a small board against a second writing of its rules in plain Python, and against its best player."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import make_env, small_2048
from core.errors import UserError

ENV = "core/envs/small_2048.py"
RULES, SPAWN, EPISODE, SEEN = ("test_moves_against_plain_python", "test_where_tiles_appear",
                               "test_episodes_are_games", "test_what_is_seen")
PLANTED_ERRORS = {  # and the test that has to notice
    "tiles at the far side join first": (ENV, "for i in range(board.shape[1] - 1):", "for i in reversed(range("
                                        "board.shape[1] - 1)):", RULES),
    "gaps stay": (ENV, "    return together(board), reward", "    return board, reward", RULES),
    "empty cells join": (ENV, "& (board[:, i] > 0)", "", RULES),
    "reward of the tiles that were there": (ENV, "2.0 ** board[:, i]", "2.0 ** (board[:, i] - 1)", RULES),
    "boards not turned back": (ENV, "jnp.rot90(new, -k)", "jnp.rot90(new, k)", RULES),
    "order lost": (ENV, "jnp.argsort(board == 0, axis=1, stable=True)", "jnp.argsort(-board, axis=1)", RULES),
    "moves that change nothing are allowed": (ENV, "(moves(board)[0] != board[None])", "(moves(board)[0] >= 0)", SEEN),
    "the highest tile is not seen": (ENV, "self.highest + 1)", "self.highest)", SEEN),
    "a tile on a tile": (ENV, "jnp.where(board.ravel() == 0, 0.0, -jnp.inf)", "jnp.zeros(board.size)", SPAWN),
    "as many fours as twos": (ENV, "< 0.9, 1, 2)", "< 0.5, 1, 2)", SPAWN),
    "a tile in the first empty cell": (ENV, "jax.random.categorical(cell_key, jnp.where(board.ravel() == 0, 0.0, "
                                       "-jnp.inf))", "(board.ravel() == 0).argmax()", SPAWN),
    "a tile after a move that changes nothing": (ENV, "jnp.where((board != state.board).any(), spawn(key, board), "
                                                 "board)", "spawn(key, board)", SPAWN),
    "one tile at the start": (ENV, "for spawn_key in jax.random.split(key):", "for spawn_key in jax.random.split(key)"
                              "[:1]:", SPAWN),
    "the same tile twice at the start": (ENV, "spawn(spawn_key, board)", "spawn(jax.random.split(key)[0], board)",
                                         SPAWN),
    "the game never ends": (ENV, "over = obs[-4:].sum() == 0", "over = obs[-4:].sum() < 0", EPISODE),
    "a time limit at the end of a game": (ENV, "(t >= self.max_steps) & ~over", "(t >= self.max_steps) | over",
                                          EPISODE),
}


def slide_left(row):
    """Python lists; -> the row after it and its reward."""
    tiles, after, reward = [x for x in row if x], [], 0
    while tiles:
        first = tiles.pop(0)
        if tiles and tiles[0] == first:
            tiles.pop(0)
            first, reward = first + 1, reward + 2 ** (first + 1)
        after.append(first)
    return after + [0] * (len(row) - len(after)), reward


def plain_move(board, action):
    """Tuple of rows; left, up, right, down."""
    rows = [list(row) for row in (zip(*board, strict=True) if action % 2 else board)]
    rows = [row[::-1] for row in rows] if action >= 2 else rows
    moved = [slide_left(row) for row in rows]
    rows = [row[::-1] if action >= 2 else row for row, _ in moved]
    return tuple(tuple(row) for row in (zip(*rows, strict=True) if action % 2 else rows)), sum(r for _, r in moved)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_moves_against_plain_python(side):
    boards = np.random.default_rng(side).integers(0, 4, (200, side, side))
    after, reward = jax.jit(jax.vmap(small_2048.moves))(jnp.int32(boards))
    for i, board in enumerate(boards.tolist()):
        for action in range(4):
            expected, points = plain_move(board, action)
            np.testing.assert_array_equal(after[i, action], expected)
            assert reward[i, action] == points


def test_where_tiles_appear():
    """In an empty cell, each alike, a 4 one time in ten; none where the move changed nothing; two at the start."""
    env = small_2048.Env(side=3)
    state = small_2048.State(jnp.int32([[1, 0, 0], [2, 0, 0], [1, 3, 0]]), jnp.int32(0))
    step = jax.jit(jax.vmap(lambda key, action: env.step(key, state, action)[0].board, in_axes=(0, None)))
    right = np.asarray(step(jax.random.split(jax.random.key(0), 20_000), 2))
    fixed = np.array([[0, 0, 1], [0, 0, 2], [0, 1, 3]])
    new = right - fixed
    np.testing.assert_array_equal(new[:, fixed > 0], 0)
    assert ((new > 0).sum(axis=(1, 2)) == 1).all()
    np.testing.assert_allclose((new > 0).mean(axis=0)[fixed == 0], 0.2, atol=0.015)
    np.testing.assert_allclose((new == 2).sum(axis=(1, 2)).mean(), 0.1, atol=0.01)
    left = step(jax.random.split(jax.random.key(1), 100), 0)
    np.testing.assert_array_equal(left, jnp.broadcast_to(state.board, (100, 3, 3)))
    keys = jax.random.split(jax.random.key(2), 20_000)
    first = np.asarray(jax.jit(jax.vmap(lambda key: env.reset(key)[0].board))(keys))
    assert ((first > 0).sum(axis=(1, 2)) == 2).all()
    np.testing.assert_allclose((first > 0).mean(axis=0), 2 / 9, atol=0.015)
    np.testing.assert_allclose((first == 2).mean(axis=(1, 2)).sum() * 9 / len(first) / 2, 0.1, atol=0.01)


def test_what_is_seen():
    """The number of every cell as zeros and a one, then which moves change the board."""
    env = small_2048.Env(side=2)
    obs = env.observe(jnp.int32([[0, 1], [5, 1]]))
    cells = np.asarray(obs[:-4]).reshape(4, 6)
    np.testing.assert_array_equal(cells, np.eye(6)[[0, 1, 5, 1]])
    np.testing.assert_array_equal(obs[-4:], [1, 1, 0, 1])
    np.testing.assert_array_equal(env.observe(jnp.int32([[1, 2], [2, 1]]))[-4:], 0.0)


def test_episodes_are_games():
    """They end where no move is left, and nowhere else; a time limit is told from that."""
    step, played = play(make_env("small_2048", 300, side=2, max_steps=7), 20)
    over = np.asarray(step.next_obs[..., -4:].sum(axis=-1) == 0)
    np.testing.assert_array_equal(step.terminated, over)
    np.testing.assert_array_equal(step.truncated, (played >= 7) & ~over)
    assert over.any() and step.truncated.any()


def play(env, num_steps):
    """Random allowed moves: every TimeStep, and how many steps its episode then had."""
    def one(carry, key):
        state, obs = carry
        act_key, env_key = jax.random.split(key)
        action = jax.random.categorical(act_key, jnp.log(obs[:, -4:]))
        after, step = env.step(env_key, state, action)
        return (after, step.obs), (step, state.episode_length + 1)

    keys = jax.random.split(jax.random.key(1), num_steps)
    return jax.jit(lambda key: jax.lax.scan(one, env.reset(key), keys))(jax.random.key(0))[1]


def best_return(choose):
    """Of the board of 2 x 2, by dynamic programming: `choose` makes one number of a list of (reward, value)."""
    @functools.cache
    def value(board):
        after = [plain_move(board, action) for action in range(4)]
        options = [(reward, reward + chance(new)) for new, reward in after if new != board]
        return choose(options) if options else 0.0

    @functools.cache
    def chance(board):
        free = [i for i in range(4) if board[i // 2][i % 2] == 0]
        return sum(p * value(put(board, i, tile)) for i in free for tile, p in ((1, 0.9), (2, 0.1))) / len(free)

    empty = ((0, 0), (0, 0))
    total = sum(p * q * value(put(put(empty, i, a), j, b)) for i, j in itertools.permutations(range(4), 2)
                for a, p in ((1, 0.9), (2, 0.1)) for b, q in ((1, 0.9), (2, 0.1))) / 12
    return total, value


def put(board, cell, tile):
    flat = [x for row in board for x in row]
    flat[cell] = tile
    return tuple(flat[:2]), tuple(flat[2:])


def test_the_returns_that_its_page_names():
    def greedy(options):
        most = max(reward for reward, _ in options)
        return np.mean([value for reward, value in options if reward == most])

    best, value = best_return(lambda options: max(v for _, v in options))
    assert value.cache_info().currsize == 662
    assert round(best, 2) == 66.96
    assert round(best_return(greedy)[0], 2) == 24.04
    random, _ = best_return(lambda options: np.mean([v for _, v in options]))
    assert round(random, 2) == 19.66

    # and the environment is that game
    step, _ = play(make_env("small_2048", 500, side=2), 400)
    episode = step.info["episode"]
    np.testing.assert_allclose(episode["return"].sum() / episode["count"].sum(), random, rtol=0.03)


def test_a_board_of_another_size_is_refused():
    with pytest.raises(UserError, match="side = 5 of small_2048: one of 2, 3, 4"):
        make_env("small_2048", 1, side=5)
