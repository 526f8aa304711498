"""Tournaments: ratings against closed forms, and matches between players whose result is known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import alphazero, lola, ppo, ppo_memory
from core.envs import fixed_coplayer, iterated_matrix_game, make_env
from core.errors import UserError
from launchers.train import train

pytest.importorskip("pgx")

from core.envs.from_pgx import Env  # noqa: E402
from launchers import matches  # noqa: E402
from launchers import tournament as launcher  # noqa: E402

FILE, MATCHES = "launchers/tournament.py", "launchers/matches.py"
ELO, FORM, HALF, SIDES, KNOWN, SEEDS, NAMED, OPENING, ROUNDS, MEMORY, LOGITS = (
    "test_two_players_have_the_ratings_of_the_formula", "test_ratings_are_the_most_likely_ones",
    "test_a_player_without_noise_halves_the_points_with_itself", "test_the_side_decides_where_a_player_moves",
    "test_every_game_is_played_to_its_end", "test_seeds_meet_their_like", "test_mistakes_are_named",
    "test_an_opening_has_its_moves", "test_rounds_between_rules_by_hand", "test_a_memory_lasts_for_the_game",
    "test_policies_of_two_players_take_their_seat")
PLANTED_ERRORS = {  # and the test that has to notice
    "a scale of 200": (FILE, "rating[:, None]) / 400))", "rating[:, None]) / 200))", ELO),
    "no draw more": (FILE, "gradient = (won - (games + 1) * expected)", "gradient = (won - games * expected)", ELO),
    "one game of each pairing": (FILE, "won, slope, rating = points * games +", "won, slope, rating = points +", ELO),
    "the last has 0": (FILE, "return rating\n", "return rating - rating[-1]\n", ELO),
    "a player loses to a weaker one": (FILE, "(rating[None] - rating[:, None])", "(rating[:, None] - rating[None])",
                                       ELO),
    "one step of Newton": (FILE, "for _ in range(100):", "for _ in range(1):", FORM),
    "sides not exchanged": (MATCHES, "[games.current_player, 1 - games.current_player]",
                            "[games.current_player, games.current_player]", HALF),
    "other openings for the other side": (MATCHES, "jax.tree.map(lambda x: jnp.concatenate([x, x]), games)",
                                          "jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), games)", HALF),
    "the other one moves": (MATCHES, "jnp.where(games.current_player == side,",
                            "jnp.where(games.current_player != side,", SIDES),
    "reward of the other": (MATCHES, "after.rewards, side[:, None]", "after.rewards, 1 - side[:, None]", KNOWN),
    "reward of who moved first": (MATCHES, "after.rewards, side[:, None]", "after.rewards, 0 * side[:, None]", KNOWN),
    "points from −1 to 1": (MATCHES, "points = (1 + total.mean()) / 2", "points = total.mean()", KNOWN),
    "a game stops early": (MATCHES, "any_of(~state[1].terminated)", "~any_of(state[1].terminated)", KNOWN),
    "one move of the opening": (MATCHES, "jax.random.split(opening_key, opening)",
                                "jax.random.split(opening_key, min(opening, 1))", OPENING),
    "all games alike": (MATCHES, "keys = jax.random.split(key, num_games // 2)\n        action",
                        "keys = jnp.broadcast_to(key, (num_games // 2,))\n        action", OPENING),
    "row and column exchanged": (FILE, "table[:, i, j], table[:, j, i] = (", "table[:, j, i], table[:, i, j] = (",
                                 SEEDS),
    "one key for all seeds": (FILE, "jnp.arange(game.num_seeds))", "0 * jnp.arange(game.num_seeds))", SEEDS),
    "a score over rows": (FILE, "else table.mean(axis=2)", "else table.mean(axis=1)", "test_a_tournament_in_rounds"),
    "nobody meets itself": (FILE, "entrants[:i] if game.board else entrants[:i + 1]", "entrants[:i]",
                            "test_a_tournament_in_rounds"),
    "different games": (MATCHES, "same = own.env == config.env if board", "same = True if board", NAMED),
    "different payoffs": (MATCHES, "and payoff(own) == payoff(config)", "", NAMED),
    "the most seeds": (MATCHES, "num_seeds = min(", "num_seeds = max(",
                       "test_a_tournament_in_rounds"),
    "seats not exchanged back": (MATCHES, "(here + there[::-1]) / 2", "(here + there) / 2", ROUNDS),
    "one order of seats": (MATCHES, "return (here + there[::-1]) / 2", "return here", LOGITS),
    "the view of the first seat": (MATCHES, "own = obs[:, seat]", "own = obs[:, 0]", ROUNDS),
    "rules that never choose": (MATCHES, "jax.random.bernoulli(key, chance), 0, 1)", "chance > 0.5, 0, 1)", ROUNDS),
    "defection for cooperation": (MATCHES, "jax.random.bernoulli(key, chance), 0, 1)",
                                  "jax.random.bernoulli(key, chance), 1, 0)", ROUNDS),
    "both players draw alike": (MATCHES, "obs, keys[seat])", "obs, keys[0])", ROUNDS),
    "the memory starts afresh": (MATCHES, "return (state, ts.obs, carries), ts.reward.mean(axis=0)",
                                 "return (state, ts.obs, before[2]), ts.reward.mean(axis=0)", MEMORY),
    "rounds see the first observation": (MATCHES, "return (state, ts.obs, carries), ts.reward",
                                         "return (state, obs, carries), ts.reward", ROUNDS),
    "the first player's policy in both seats": (MATCHES, "action[:, seat]", "action[:, 0]", LOGITS),
    "the first player's logits in both seats": (MATCHES, "key)[1][:, seat]", "key)[1][:, 0]", LOGITS),
    "the sum of all rounds": (MATCHES, "return rewards.mean(axis=0)", "return rewards.sum(axis=0)", ROUNDS),
}


@pytest.fixture(autouse=True)
def keys_are_checked_elsewhere():
    """JAX's own check misfires on the tree search, which has branches under vmap."""
    with jax.debug_key_reuse(False):
        yield


def player(moves):
    """A player whose move is the first allowed one of `moves`, an order of the nine fields. It sees the board alone."""
    class Player:
        @staticmethod
        def act(run, carry, obs, key):
            allowed = obs[:, -9:][:, jnp.array(moves)]
            return carry, jnp.array(moves)[allowed.argmax(axis=1)]

    return matches.Kind(Player, "", "board")


FORWARD, MIDDLE = player(range(9)), player((4, 0, 8, 2, 6, 1, 7, 3, 5))
RANDOM, GREEDY = (matches.Kind(None, rule, "game") for rule in ("random", "greedy"))


def points(kind, other, games=64, opening=2, seed=0):
    env = Env("tic_tac_toe", reveal=True)
    match = jax.jit(lambda key: matches.board_match(env, games, opening, kind, other, (), (), key))
    first, second = match(jax.random.key(seed))
    assert first + second == 1
    return float(first)


def test_two_players_have_the_ratings_of_the_formula():
    """With 30 of 40 points and one draw more, the odds are 30.5 to 10.5."""
    ratings = launcher.elo(np.array([[0.5, 0.25], [0.75, 0.5]]), 40)
    np.testing.assert_allclose(ratings, [0, 400 * np.log10(30.5 / 10.5)], rtol=1e-9)
    ratings = launcher.elo(np.array([[0.5, 0.0], [1.0, 0.5]]), 1000)
    np.testing.assert_allclose(ratings, [0, 400 * np.log10(1000.5 / 0.5)], rtol=1e-6)


def test_ratings_are_the_most_likely_ones():
    """Points that ratings explain give these ratings back. Where no ratings do, the likelihood falls to all sides."""
    true = np.array([0, -700, 250, 900.0])
    chance = 1 / (1 + 10 ** ((true[None] - true[:, None]) / 400))
    np.testing.assert_allclose(launcher.elo(chance, 10**7), true, atol=1)

    points = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])

    def likelihood(ratings):
        total = 0.0
        for i in range(3):
            for j in range(3):
                if i != j:
                    won = points[i, j] * 20 + 0.5
                    total -= won * np.log(1 + 10 ** ((ratings[j] - ratings[i]) / 400))
        return total

    best = launcher.elo(points, 20)
    for shift in (np.eye(3)[1], np.eye(3)[2], np.array([0, 1, -1])):
        assert likelihood(best) > max(likelihood(best + shift), likelihood(best - shift))


def test_a_player_without_noise_halves_the_points_with_itself():
    """Both sides of each opening are played, so what one side wins the other loses."""
    assert points(FORWARD, FORWARD, opening=1) == points(MIDDLE, MIDDLE, opening=3) == 0.5


def test_the_side_decides_where_a_player_moves():
    """From the empty board. The third order beats the fourth from both sides."""
    orders = [tuple(range(9)), (4, 0, 8, 2, 6, 1, 7, 3, 5), (2, 1, 8, 0, 3, 4, 7, 6, 5), (5, 3, 8, 1, 7, 2, 0, 6, 4)]
    results = {(a, b): by_hand(a, b) for a in orders for b in orders if a < b}
    assert {0.5, 1.0} <= {max(result, 1 - result) for result in results.values()}
    for (first, second), result in results.items():
        assert points(player(first), player(second), opening=0) == result


def by_hand(first, second):
    """The points of the first of two orders of fields, mean of both sides."""
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    total = 0.0
    for starts in (0, 1):
        stones, orders, turn, result = (set(), set()), (first, second), starts, 0.5
        while len(stones[0] | stones[1]) < 9:
            field = next(f for f in orders[turn] if f not in stones[0] | stones[1])
            stones[turn].add(field)
            if any(set(line) <= stones[turn] for line in lines):
                result = 1.0 - turn
                break
            turn = 1 - turn
        total += result / 2
    return total


def test_every_game_is_played_to_its_end():
    """Greedy against random play, in 2,000 games: 70 to 80 percent of the points; turned around, the rest."""
    strong, weak = points(GREEDY, RANDOM, 2000, 0), points(RANDOM, GREEDY, 2000, 0)
    assert 0.70 < strong < 0.82 and 0.18 < weak < 0.30
    assert abs(points(RANDOM, RANDOM, 2000, 0) - 0.5) < 0.03


def test_an_opening_has_its_moves():
    """Three stones lie on the boards that a player sees first, and not the same three on all of them."""
    seen = []

    class Watch:
        @staticmethod
        def act(run, carry, obs, key):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), obs)
            return carry, obs[:, -9:].argmax(axis=1)

    points(matches.Kind(Watch, "", "board"), FORWARD, 32, 3)
    first = min(seen, key=lambda obs: -obs[:, -9:].sum())
    assert (first[:, -9:].sum(axis=1) == 6).all()
    assert len(np.unique(first[:16], axis=0)) > 10 and len(np.unique(first[:, -9:], axis=0)) > 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of two seeds, against the greedy player."""
    folder, config = tmp_path_factory.mktemp("runs") / "two", ppo.get_config()
    config.env_kwargs = dict(opponent="greedy")
    config.update(env="pgx/tic_tac_toe", num_envs=4, num_steps=8, env_steps=160, eval_every=32, eval_episodes=2)
    with jax.debug_key_reuse(False):
        train(config, num_seeds=2, workdir=str(folder), save_every=0.0, keep=4)
    return folder


def test_seeds_meet_their_like(run, tmp_path, capsys):
    """Each seed has points of its own; checkpoints of one run are players; the picture is there."""
    kept = sorted((run / "checkpoints").glob("*.npz"))
    assert [int(path.stem.split("_")[1]) for path in kept][-4:] == [2, 3, 4, 5]
    picture = tmp_path / "elo.png"
    found = launcher.tournament(players=["random", str(kept[0]), str(run), "greedy"], games=16, picture=str(picture))
    points, ratings = found["table"], found["score"]
    assert points.shape == (2, 4, 4) and ratings.shape == (2, 4) and picture.stat().st_size > 10_000
    np.testing.assert_allclose(points + points.swapaxes(1, 2), 1.0)
    assert (ratings[:, 0] == 0).all() and (points[0] != points[1]).any() and points[:, 3, 0].mean() > 0.6
    assert points[0, 0, 3] != points[1, 0, 3]  # also of two rules, whose noise is all that differs
    assert f"two {int(kept[0].stem.split('_')[1])} " in capsys.readouterr().out


def test_a_search_from_the_game_plays():
    """It sees the game, too. Its moves have no noise, so it halves the points with itself."""
    config, env = alphazero.get_config(), make_env("pgx/tic_tac_toe", 4, reveal=True)
    config.update(num_envs=4, random_steps=48, buffer_size=100, num_simulations=8, hidden_dims=(8,))
    zero = jax.jit(functools.partial(alphazero.init, source=env, config=ml_collections.FrozenConfigDict(config)))(
        jax.random.key(0))
    kind = matches.Kind(alphazero, "", "game")
    match = jax.jit(lambda run, key: matches.board_match(env.env, 16, 2, kind, kind, run, run, key))
    np.testing.assert_array_equal(match(zero, jax.random.key(1)), 0.5)


def test_mistakes_are_named(run, monkeypatch):
    for flag, value in (("games", 3), ("games", 0), ("opening", -1), ("eval_seed", -1), ("picture", "x.doc")):
        with pytest.raises(UserError, match=f"{flag}"):
            launcher.tournament(players=["random", str(run)], **{flag: value})

    def load(player):  # a run by its name: what it is, its number of seeds
        name, num_seeds = player.split("-")
        algorithm = ppo_memory if name == "memory" else ppo
        env = dict(pole="gymnax/CartPole-v1", four="pgx/connect_four", tft="fixed_coplayer", chicken="fixed_coplayer",
                   spread="jaxmarl/MPE_simple_spread_v3").get(name, "pgx/tic_tac_toe")
        config = dict(algorithm=name, env=env, num_envs=2)
        if name == "chicken":
            config["env_kwargs"] = dict(payoff=((0, 0), (-1, 1), (1, -1), (-5, -5)))
        return algorithm, ml_collections.FrozenConfigDict(config), dict(x=np.zeros(int(num_seeds))), {}

    with pytest.raises(UserError, match='"grimm" is no run; rules are .*grim'):
        launcher.tournament(players=["grimm", str(run)])
    monkeypatch.setattr(matches, "load", load)
    monkeypatch.setattr(matches.pathlib.Path, "exists", lambda path: True)
    for players, word in (("random,greedy", "a run"), ("three-2", "three-2"), ("three-2,four-2", "four-2.*connect"),
                          ("pole-2,random", "pole-2.*CartPole"), ("memory-2,three-2", "memory"),
                          ("tft-2,greedy", "greedy.*tit_for_tat"), ("four-2,grim", "grim.*random, greedy"),
                          ("tft-2,chicken-2", "chicken-2"), ("tft-2,three-2", "three-2.*tft-2"),
                          ("spread-2,random", "spread-2.*MPE")):
        with pytest.raises(UserError, match=word):
            launcher.tournament(players=players.split(","))


UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # no player is like the other


def rule(name):
    return matches.Kind(None, name, "own")


def rounds(kind, other, games=400, payoff=UNEVEN, runs=((), ()), max_steps=20):
    """What both earn in a round, from the launcher."""
    env = iterated_matrix_game.Env(payoff, max_steps)
    with jax.debug_key_reuse(False):
        return np.asarray(jax.jit(lambda key: matches.round_match(env, games, kind, other, *runs, key))(
            jax.random.key(0)))


def chain(first, second, max_steps=20, payoff=UNEVEN):
    """What both earn in a round, in these seats, from their probabilities to cooperate after start, CC, CD, DC, DD, own
    action first: by the distribution of outcomes."""
    state, earned = np.eye(5)[0], np.zeros(2)
    for _ in range(max_steps):
        after = np.zeros(5)
        for s in range(5):
            p, q = first[s], second[[0, 1, 3, 2, 4][s]]
            after[1:] += state[s] * np.array([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)])
        state, earned = after, earned + after[1:] @ np.array(payoff)
    return earned / max_steps


@pytest.mark.parametrize("first, second", [("tit_for_tat", "always_defect"), ("grim", "random"), ("random", "random"),
                                           ("always_cooperate", "tit_for_tat"), ("random", "tit_for_tat")])
def test_rounds_between_rules_by_hand(first, second):
    chances = [fixed_coplayer.RULES[name] for name in (first, second)]
    expected = (chain(*chances) + chain(*chances[::-1])[::-1]) / 2
    np.testing.assert_allclose(rounds(rule(first), rule(second)), expected, atol=0.12)


def test_a_memory_lasts_for_the_game():
    """A player that cooperates in the first five rounds only, by its memory; against one that always cooperates."""
    class Counts:
        @staticmethod
        def initial_carry(run, num_envs):
            return jnp.zeros(num_envs, jnp.int32)

        @staticmethod
        def act(run, carry, obs, key):
            assert obs.shape == (4, 5)
            return carry + 1, jnp.where(carry < 5, 0, 1)

    found = rounds(matches.Kind(Counts, "", "own"), rule("always_cooperate"), games=8)
    defects = np.array([UNEVEN[2], UNEVEN[1][::-1]]).mean(axis=0)
    np.testing.assert_allclose(found, 0.25 * np.mean([UNEVEN[0], UNEVEN[0][::-1]], axis=0) + 0.75 * defects, rtol=1e-5)


def test_policies_of_two_players_take_their_seat():
    """The first player of `Both` cooperates where it cooperated, the second one always defects; `Logits` says the same
    by logits. Both see the outcome in the view of each seat."""
    class Both:
        @staticmethod
        def act(run, carry, obs, key):
            first = jnp.where((obs[:, 0] * jnp.float32([1, 1, 1, 0, 0])[None]).sum(axis=1) > 0, 0, 1)
            return carry, jnp.stack([first, jnp.ones_like(first)], axis=1)

    class Logits:
        @staticmethod
        def act(run, carry, obs, key):
            return carry, 40 * jnp.broadcast_to(jnp.float32([[1, 1, 1, -1, -1], [-1] * 5]), (len(obs), 2, 5))

    first, second, tft = [1, 1, 1, 0, 0], [0] * 5, list(fixed_coplayer.RULES["tit_for_tat"])
    expected = (chain(first, tft) + chain(tft, second)[::-1]) / 2
    for kind in (matches.Kind(Both, "", "both"), matches.Kind(Logits, "", "logits")):
        np.testing.assert_allclose(rounds(kind, rule("tit_for_tat"), games=4), expected, rtol=1e-5)


def test_a_tournament_in_rounds(tmp_path, monkeypatch):
    """Of a run of LOLA, whose logits are known to the test, and two rules."""
    folder, config = tmp_path / "lola", lola.get_config()
    config.update(updates=2, eval_every=2, init_std=3.0)
    with jax.debug_key_reuse(False):
        train(config, num_seeds=2, workdir=str(folder), save_every=0.0)
    picture = tmp_path / "matrix.png"
    found = launcher.tournament(players=["tit_for_tat", str(folder), "always_defect"], games=256, picture=str(picture))
    table, score = found["table"], found["score"]
    _, _, run, _ = matches.load(str(folder))
    prison = functools.partial(chain, max_steps=100, payoff=iterated_matrix_game.Env.payoff)
    for seed, logits in enumerate(1 / (1 + np.exp(-np.float64(run.agent.logits)))):
        defect = [0.0] * 5
        both = (prison(logits[0], defect) + prison(defect, logits[1])[::-1]) / 2
        np.testing.assert_allclose([table[seed, 1, 2], table[seed, 2, 1]], both, atol=0.06)
        own = prison(*logits).mean()
        np.testing.assert_allclose(table[seed, 1, 1], own, atol=0.1)
    np.testing.assert_allclose(table[:, 0, 0], -1)
    np.testing.assert_allclose(table[:, 2, 2], -2)
    np.testing.assert_allclose([table[0, 0, 2], table[0, 2, 0]], [-2.01, -1.98], rtol=1e-5)
    np.testing.assert_allclose(score, table.mean(axis=2))
    assert picture.stat().st_size > 10_000

    def first_seed(player):
        algorithm, config, run, meta = load(str(folder))
        return algorithm, config, jax.tree.map(lambda x: x[:1], run) if player == "a/b/one" else run, meta

    load = matches.load
    monkeypatch.setattr(matches.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(matches, "load", first_seed)  # the other run then has more seeds than are played
    assert launcher.tournament(players=["a/b/one", str(folder)], games=4)["table"].shape == (1, 2, 2)
