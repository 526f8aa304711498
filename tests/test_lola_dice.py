"""LOLA-DiCE: its derivatives against those of exact values, its parts by hand, and what it finds."""
import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import lola, lola_dice
from core.envs import Batch, Discrete, iterated_matrix_game, make_env
from core.envs.infinite_matrix_game import Env as Infinite
from core.errors import UserError

FILE = "algorithms/lola_dice.py"
HAND, FIRST, SECOND, SHAPED, PLAYED, ADVANTAGE, STEP, CHOICE, CLOCK, PARENT, MISTAKES = (
    "test_derivatives_by_hand", "test_the_gradient_is_that_of_the_exact_value",
    "test_the_mixed_derivative_is_that_of_the_exact_value", "test_shaping_is_the_exact_one_with_many_games",
    "test_games_are_played_by_the_rules", "test_advantages_by_a_loop", "test_an_update_by_its_parts",
    "test_players_choose_as_often_as_they_say", "test_the_clock_counts_what_was_taken", "test_the_rest_is_the_parent",
    "test_mistakes_are_named")
PLANTED_ERRORS = {  # and the test that has to notice
    "□ has no gradient": (FILE, "jnp.exp(x - jax.lax.stop_gradient(x))", "jnp.exp(jax.lax.stop_gradient(x - x))", HAND),
    "□ is not 1": (FILE, "jnp.exp(x - jax.lax.stop_gradient(x))", "jnp.exp(x)", HAND),
    "the first order only": (FILE, "jnp.exp(x - jax.lax.stop_gradient(x))", "1 + x - jax.lax.stop_gradient(x)", HAND),
    "the past is not credited": (FILE, "magic(so_far) - magic(so_far - log_prob)", "magic(log_prob) - 1", HAND),
    "the present is not credited": (FILE, "magic(so_far) - magic(so_far - log_prob)", "magic(so_far - log_prob)", HAND),
    "only one player's actions": (FILE, "-shown)).sum(axis=-1)", "-shown))[..., 0]", HAND),
    "defection for cooperation": (FILE, "jnp.where(games.action == 0, shown, -shown)",
                                  "jnp.where(games.action == 1, shown, -shown)", HAND),
    "no discount": (FILE, "weight = discount ** jnp.arange", "weight = 1.0 ** jnp.arange", HAND),
    "a sum over games": (FILE, ".sum(axis=0).mean()", ".sum(axis=0).sum()", HAND),
    "a mean over rounds": (FILE, ".sum(axis=0).mean()", ".mean()", HAND),
    "past over games": (FILE, "jnp.cumsum(log_prob, axis=0)", "jnp.cumsum(log_prob, axis=1)", HAND),
    "b is not discounted": (FILE, "jnp.eye(5) - discount * follows", "jnp.eye(5) - 0.9 * follows", ADVANTAGE),
    "b is the next reward": (FILE, "jnp.linalg.solve(jnp.eye(5) - discount * follows, earned)", "earned", ADVANTAGE),
    "what came before for what follows": (FILE, '"tes,tez->sz"', '"tes,tez->zs"', ADVANTAGE),
    "the other player's reward": (FILE, "games.reward[..., i]  # (T", "games.reward[..., 1 - i]  # (T", ADVANTAGE),
    "the other player's view": (FILE, "= games.obs[:, :, i], games", "= games.obs[:, :, 1 - i], games", ADVANTAGE),
    "the other player's view of what follows": (FILE, "games.next_obs[:, :, i]", "games.next_obs[:, :, 1 - i]",
                                                ADVANTAGE),
    "nothing for what was never seen": (FILE, "jnp.maximum(seen.sum(axis=(0, 1)), 1.0)", "seen.sum(axis=(0, 1))",
                                        ADVANTAGE),
    "what follows is not expected": (FILE, "reward + discount * then @ value", "reward", ADVANTAGE),
    "what follows is not discounted": (FILE, "reward + discount * then @ value", "reward + then @ value", ADVANTAGE),
    "no baseline": (FILE, "then @ value - seen @ value", "then @ value", ADVANTAGE),
    "no step of the opponent's": (FILE, "logits = logits.at[j].add(self.config.opponent_lr * step)", "pass", SHAPED),
    "its step is a constant": (FILE, "self.config.opponent_lr * step)",
                               "self.config.opponent_lr * jax.lax.stop_gradient(step))", SHAPED),
    "η forgotten": (FILE, "logits.at[j].add(self.config.opponent_lr * step)", "logits.at[j].add(step)", SHAPED),
    "our own step": (FILE, "logits.at[j].add(", "logits.at[i].add(", SHAPED),
    "the opponent climbs our return": (FILE, "(logits, games, j, self.config.discount)[j]",
                                       "(logits, games, i, self.config.discount)[j]", SHAPED),
    "the opponent goes downhill": (FILE, "logits.at[j].add(self", "logits.at[j].subtract(self", SHAPED),
    "games before its steps": (FILE, "games = play(jax.lax.stop_gradient(logits), keys[-1], source)",
        "games = play(jax.lax.stop_gradient(self.logits), keys[-1], source)", STEP),
    "the opponent's return": (FILE, "return objective(logits, games, i,", "return objective(logits, games, j,", STEP),
    "one step too many": (FILE, "for key in keys[:-1]:", "for key in keys:", STEP),
    "no step but the first": (FILE, "for key in keys[:-1]:", "for key in keys[:-1][:1]:", STEP),
    "downhill": (FILE, "logits=self.logits + self.config.lr", "logits=self.logits - self.config.lr", STEP),
    "learning rate forgotten": (FILE, "self.config.lr * slope)", "slope)", STEP),
    "the first player's update for both": (FILE, "keys[i]) for i in (0, 1)])", "keys[i]) for i in (0, 0)])", STEP),
    "players share their games": (FILE, "self.logits[i], i, source, keys[i])", "self.logits[i], i, source, keys[0])",
                                  STEP),
    "copies start from one key": (FILE, "jax.random.split(reset_key, source.num_envs)",
                                  "jnp.broadcast_to(reset_key, (source.num_envs,))",
                                  "test_copies_have_keys_of_their_own"),
    "copies draw from one key": (FILE, "jax.random.split(env_key, source.num_envs)",
                                 "jnp.broadcast_to(env_key, (source.num_envs,))",
                                 "test_copies_have_keys_of_their_own"),
    "rounds draw from one key": (FILE, "jax.random.split(key, source.max_steps))",
                                 "jnp.broadcast_to(key, (source.max_steps,)))", PLAYED),
    "the observation after the action": (FILE, "Games(obs, action,", "Games(ts.obs, action,",
                                         PLAYED),
    "all copies act alike": (FILE, "bernoulli(key, chance)", "bernoulli(key, chance[:1])", PLAYED),
    "they cooperate for defecting": (FILE, "return 1 - jax.random", "return jax.random", CHOICE),
    "a choice without chance": (FILE, "jax.random.bernoulli(key, chance)", "(chance > 0.5)", CHOICE),
    "the likeliest for the drawn action": (FILE, "return (), choose(run.agent.logits, obs, key)",
                                           "return (), choose(1e3 * run.agent.logits, obs, key)", CHOICE),
    "one player's games are counted": (FILE, "steps = 2 * (config", "steps = (config", CLOCK),
    "games of the steps are not counted": (FILE, "(config.lookahead + 1) *", "config.lookahead *", CLOCK),
    "a discount of 1": (FILE, "if config.discount == 1:", "if False:", MISTAKES),
    "any game of two": (FILE, "or source.action_space.n != 2:", "and False:", MISTAKES),
    "one player is enough": (FILE, "actions=(Discrete,), agents=True)", "actions=(Discrete,))", MISTAKES),
}
UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # no player is like the other
OTHER = np.array([0, 1, 3, 2, 4])


def make_config(**changes):
    config = lola_dice.get_config()
    config.update(changes)
    return ml_collections.FrozenConfigDict(config.to_dict())


def some_games(T=4, E=3, seed=0):
    """Games whose rewards and outcomes do not follow from their actions."""
    rng = np.random.default_rng(seed)
    outcome = np.concatenate([np.zeros((1, E), int), rng.integers(1, 5, size=(T, E))])
    obs = np.eye(5)[np.stack([outcome, OTHER[outcome]], axis=-1)]
    games = obs[:-1], rng.integers(2, size=(T, E, 2)), rng.normal(size=(T, E, 2)), obs[1:]
    return lola_dice.Games(*(jnp.asarray(x, y) for x, y in zip(games, (float, int, float, float), strict=True))), games


def advantage_by_hand(games, i, discount):
    """b by repeating its equation until nothing changes."""
    obs, _, reward, next_obs = games
    state, then, value = obs[:, :, i].argmax(-1), next_obs[:, :, i].argmax(-1), np.zeros(5)
    for _ in range(300):
        back = reward[:, :, i] + discount * value[then]
        value = np.array([back[state == s].mean() if (state == s).any() else 0.0 for s in range(5)])
    return reward[:, :, i] + discount * value[then] - value[state]


@pytest.mark.parametrize("i", [0, 1])
def test_advantages_by_a_loop(i):
    games, numbers = some_games(7, 4) if i else some_games(2, 1)  # of the second one most outcomes are never seen
    np.testing.assert_allclose(lola_dice.advantage(games, i, 0.8), advantage_by_hand(numbers, i, 0.8), rtol=1e-4,
                               atol=1e-5)


def test_derivatives_by_hand():
    """J is 0. With A given, the gradient of J is that of Σ γ^t ℓ_t A_t, and its second derivative is Σ γ^t A_t
    (∇w_t ∇w_tᵀ + ∇²w_t − ∇w_{t−1} ∇w_{t−1}ᵀ − ∇²w_{t−1}), ℓ and its derivatives from the sigmoid."""
    games, (obs, action, reward, next_obs) = some_games()
    rng, discount = np.random.default_rng(1), 0.7
    logits = rng.normal(size=(2, 5))
    chance = 1 / (1 + np.exp(-(logits[None, None] * obs).sum(-1)))  # (T, E, 2)
    first = obs * ((action == 0) - chance)[..., None]  # of each player's ℓ_t
    second = -obs * (chance * (1 - chance))[..., None]  # its own second derivative is diagonal
    for i in (0, 1):
        A = advantage_by_hand((obs, action, reward, next_obs), i, discount)
        gradient, hessian = np.zeros(10), np.zeros((10, 10))
        for e in range(3):
            w, curve = np.zeros(10), np.zeros((10, 10))
            for t in range(4):
                before = np.outer(w, w) + curve
                w, curve = w + first[t, e].ravel(), curve + np.diag(second[t, e].ravel())
                gradient += discount**t * first[t, e].ravel() * A[t, e] / 3
                hessian += discount**t * A[t, e] * (np.outer(w, w) + curve - before) / 3
        J = functools.partial(lola_dice.objective, games=games, i=i, discount=discount)
        at = jnp.float32(logits)
        assert abs(float(jax.jit(J)(at))) < 1e-5
        np.testing.assert_allclose(jax.jit(jax.grad(J))(at).ravel(), gradient, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(jax.jit(jax.hessian(J))(at).reshape(10, 10), hessian, rtol=1e-3, atol=1e-5)


@functools.cache
def exact():
    """The value of the infinite game, and its derivatives, at logits where nothing vanishes."""
    logits, values = jax.random.normal(jax.random.key(2), (2, 5)), Infinite(UNEVEN, 0.7).values
    return logits, values


@functools.cache
def estimates():
    """Gradient and mixed second derivative of J_0 and J_1, from 60 times 256 games of 20 rounds."""
    source, (logits, _) = Batch(iterated_matrix_game.Env(UNEVEN, 20), 256), exact()

    def one(key):
        games = lola_dice.play(logits, key, source)
        J = [functools.partial(lola_dice.objective, games=games, i=i, discount=0.7) for i in (0, 1)]
        return (jnp.stack([jax.grad(j)(logits) for j in J]),
                jnp.stack([jax.jacfwd(jax.grad(j))(logits)[0, :, 1] for j in J]))

    keys = jax.random.split(jax.random.key(0), 60)
    return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys))(keys))


def near(found, expected):
    error = found.std(axis=0) / len(found) ** 0.5
    bias = 0.02 * np.abs(expected).max()  # b is a mean over the same games
    assert (np.abs(found.mean(axis=0) - expected) < 4.5 * error + bias).all()
    assert (np.abs(expected) > 4 * error).mean() > 0.5  # and so it says something


def test_the_gradient_is_that_of_the_exact_value():
    logits, values = exact()
    near(estimates()[0], np.asarray(jax.jacrev(values)(logits)))


def test_the_mixed_derivative_is_that_of_the_exact_value():
    logits, values = exact()
    near(estimates()[1], np.asarray(jax.jacfwd(jax.jacrev(values))(logits)[:, 0, :, 1]))


def test_shaping_is_the_exact_one_with_many_games():
    """The gradient through one step of the opponent's, of both players."""
    source, (logits, values) = Batch(iterated_matrix_game.Env(UNEVEN, 20), 512), exact()
    agent = lola_dice.Agent(logits, make_config(opponent_lr=1.5, discount=0.7))

    def lookahead(own, i):
        both = logits.at[i].set(own)
        return values(both.at[1 - i].add(1.5 * jax.jacrev(values)(both)[1 - i, 1 - i]))[i]

    for i in (0, 1):
        slope = jax.jit(lambda keys, i=i: jax.lax.map(
            lambda key: jax.grad(agent.shaped)(logits[i], i, source, jax.random.split(key)), keys))
        near(np.asarray(slope(jax.random.split(jax.random.key(i), 30))), np.asarray(jax.grad(lookahead)(logits[i], i)))


def test_games_are_played_by_the_rules():
    """Rewards and observations follow from the actions; games differ, and rounds differ."""
    source, logits = Batch(iterated_matrix_game.Env(UNEVEN, 6), 50), jnp.zeros((2, 5))
    games = jax.jit(lambda key: lola_dice.play(logits, key, source))(jax.random.key(0))
    obs, action, reward, next_obs = (np.asarray(x) for x in games)
    np.testing.assert_array_equal(next_obs[:-1], obs[1:])
    assert obs.shape == next_obs.shape == (6, 50, 2, 5) and action.shape == reward.shape == (6, 50, 2)
    outcome = 2 * action[..., 0] + action[..., 1]
    np.testing.assert_allclose(reward, np.array(UNEVEN)[outcome])
    seen = np.concatenate([np.zeros((1, 50), int), 1 + outcome[:-1]])
    np.testing.assert_array_equal(obs, np.eye(5)[np.stack([seen, OTHER[seen]], axis=-1)])
    np.testing.assert_array_equal(next_obs[-1, :, 0], np.eye(5)[1 + outcome[-1]])
    assert len(np.unique(outcome, axis=1).T) > 40 and len(np.unique(outcome, axis=0)) == 6


def test_copies_have_keys_of_their_own():
    """Of a game that shows its keys as rewards."""
    class Told:
        max_steps = 2

        def reset(self, key):
            return jax.random.uniform(key), jnp.zeros((2, 5))

        def step(self, key, state, action):
            _, ts = iterated_matrix_game.Env().step(None, iterated_matrix_game.State(0, 0), action)
            return state, ts._replace(reward=jnp.stack([state, jax.random.uniform(key)]))

        action_space = iterated_matrix_game.Env.action_space

    games = jax.jit(lambda key: lola_dice.play(jnp.zeros((2, 5)), key, Batch(Told(), 20)))(jax.random.key(0))
    assert len(np.unique(games.reward[..., 0])) == 20 and len(np.unique(games.reward[..., 1])) == 40


def test_players_choose_as_often_as_they_say():
    logits = jnp.float32([[0.5, -1, 1, 2, -2], [-0.5, 1.5, -1, 0, 3]])
    obs = jnp.eye(5)[jnp.arange(5000) % 5]
    run = lola_dice.Run(lola_dice.Agent(logits, make_config()), None)
    carry, action = lola_dice.act(run, (), jnp.stack([obs, obs], axis=1), jax.random.key(0))
    assert carry == () and action.shape == (5000, 2) and action.dtype == jnp.int32
    found = np.asarray(action == 0).reshape(1000, 5, 2).mean(axis=0).T
    np.testing.assert_allclose(found, jax.nn.sigmoid(logits), atol=0.06)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_an_update_by_its_parts(lookahead):
    """Both players, from games that are drawn again here from the same keys."""
    source = Batch(iterated_matrix_game.Env(UNEVEN, 5), 8)
    config = make_config(lookahead=lookahead, lr=0.7, opponent_lr=0.4, discount=0.8)
    start = jax.random.normal(jax.random.key(1), (2, 5))
    with jax.debug_key_reuse(False):
        agent, info = jax.jit(lambda key: lola_dice.Agent(start, config).update(source, key))(jax.random.key(3))
        keys = jax.random.split(jax.random.key(3), (2, lookahead + 1))
        slopes = []
        for i in (0, 1):
            def value(own, i=i):
                logits = jnp.stack([own, start[1]] if i == 0 else [start[0], own])
                for k in range(lookahead):
                    games = lola_dice.play(jax.lax.stop_gradient(logits), keys[i, k], source)
                    gradient = jax.grad(lambda x: lola_dice.objective(x, games, 1 - i, 0.8))(logits)  # noqa: B023
                    move = jnp.zeros((2, 5)).at[1 - i].set(0.4 * gradient[1 - i])
                    logits = logits + move
                games = lola_dice.play(jax.lax.stop_gradient(logits), keys[i, lookahead], source)
                return lola_dice.objective(logits, games, i, 0.8)

            slopes.append(jax.jit(jax.grad(value))(start[i]))
    np.testing.assert_allclose(agent.logits - start, 0.7 * jnp.stack(slopes), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(info["grad_norm"], np.linalg.norm(slopes), rtol=1e-3)


@pytest.mark.parametrize("name", ["measure", "Run", "TIT_FOR_TAT"])
def test_the_rest_is_the_parent(name):
    """Word for word, so that the tests of the parent are tests of the child."""
    own, parent = (operator.attrgetter(name)(module) for module in (lola_dice, lola))
    if name == "TIT_FOR_TAT":
        np.testing.assert_array_equal(own, parent)
    else:
        assert inspect.getsource(own) == inspect.getsource(parent)


def test_the_clock_counts_what_was_taken():
    source, config = make_env("iterated_matrix_game", 4, max_steps=3), make_config(num_envs=4, lookahead=2)
    run = lola_dice.init(jax.random.key(0), source, config)
    run, _ = jax.jit(lambda run, key: lola_dice.train_step(run, key, source, config))(run, jax.random.key(1))
    assert (run.clock.env_steps, run.clock.updates) == (2 * 3 * 4 * 3, 1)


def test_logits_start_normal():
    source, config = make_env("iterated_matrix_game", 2), make_config(init_std=0.3)
    logits = jax.vmap(lambda key: lola_dice.init(key, source, config).agent.logits)(
        jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(logits.std(axis=0), 0.3, atol=0.03)
    assert len(np.unique(logits)) > 19_000


@pytest.mark.parametrize("lookahead, low, high", [(0, -2.05, -1.9), (1, -1.3, -0.95)])
def test_shaping_finds_cooperation_and_naive_learners_do_not(lookahead, low, high):
    """Exact values per round of what 2 seeds have learnt after 80 updates."""
    source, config = make_env("iterated_matrix_game", 64, max_steps=60), make_config(lookahead=lookahead)

    @jax.jit
    @jax.vmap
    def seed(key):
        init_key, key = jax.random.split(key)
        run, _ = jax.lax.scan(lambda run, key: lola_dice.train_step(run, key, source, config),
                              lola_dice.init(init_key, source, config), jax.random.split(key, 80))
        return 0.04 * Infinite().values(run.agent.logits)

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        values = seed(jax.random.split(jax.random.key(0), 2))
    assert low < values.mean() < high


class Three(iterated_matrix_game.Env):
    """A third action, which no rule of the game knows."""

    action_space = Discrete(3)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="discount = 1"):
        lola_dice.init(jax.random.key(0), make_env("iterated_matrix_game", 1), make_config(discount=1.0))
    with pytest.raises(UserError, match="2x2 games"):
        lola_dice.init(jax.random.key(0), Batch(Three(), 1), make_config())
    for name, words in (("fixed_coplayer", "one agent"), ("infinite_matrix_game", "continuous")):
        with pytest.raises(UserError, match=words):
            lola_dice.init(jax.random.key(0), make_env(name, 1), make_config(env=name))
