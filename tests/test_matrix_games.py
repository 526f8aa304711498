"""Matrix games against loops in float64: the closed form is its power series, and played games earn what it says."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ppo_ipd_tft
from core.envs import Batch, fixed_coplayer, infinite_matrix_game, iterated_matrix_game, make_env
from core.errors import UserError
from core.evaluation import evaluate, score
from launchers.runs import load
from launchers.train import train

INFINITE, ITERATED, FIXED = (f"core/envs/{name}.py" for name in (
    "infinite_matrix_game", "iterated_matrix_game", "fixed_coplayer"))
SERIES, SLOPES, ANCHORS = ("test_the_value_is_its_power_series", "test_slopes_are_finite_differences",
                           "test_known_pairs_of_policies")
ROUNDS, PLAYED, STEP = ("test_rounds_by_hand", "test_played_games_earn_what_the_series_says",
                        "test_a_step_is_the_whole_game")
RULES = "test_co_players_answer_by_their_rules"
PLANTED_ERRORS = {  # and the test that has to notice
    "the second player sees with the first one's eyes": (INFINITE, "logits[1, OTHER_VIEW]", "logits[1]", SERIES),
    "the first player sees with the second one's eyes": (
        INFINITE, "jnp.stack([logits[0], logits[1, OTHER_VIEW]])", "jnp.stack([logits[0, OTHER_VIEW], logits[1]])",
        SERIES),
    "both players have the first one's policy": (INFINITE, "logits[1, OTHER", "logits[0, OTHER", SERIES),
    "the first round is that after DD": (INFINITE, "chance[:, 1:], chance[:, 0])", "chance[:, :4], chance[:, 4])",
                                         SERIES),
    "transitions transposed": (INFINITE, "self.discount * chance[:, 1:]", "self.discount * chance[:, 1:].T", SERIES),
    "a discount of its own": (INFINITE, "self.discount * chance", "0.96 * chance", SERIES),
    "CD and DC exchanged": (INFINITE, "cooperate[0] * defect[1],\n                            defect[0] * cooperate[1]",
                            "defect[0] * cooperate[1],\n                            cooperate[0] * defect[1]", SERIES),
    "payoffs of the players exchanged": (INFINITE, "jnp.array(self.payoff, logits.dtype))",
                                         "jnp.array(self.payoff, logits.dtype)[:, ::-1])", SERIES),
    "one player's payoff for both": (INFINITE, "jnp.array(self.payoff, logits.dtype))",
                                     "jnp.array(self.payoff, logits.dtype)[:, :1].repeat(2, 1))", SERIES),
    "each player's defection for the other's": (INFINITE, "jax.nn.sigmoid(-logits)", "jax.nn.sigmoid(-logits[::-1])",
                                                SERIES),
    "no slope through defection": (INFINITE, "jax.nn.sigmoid(-logits)",
                                   "jax.nn.sigmoid(-jax.lax.stop_gradient(logits))", SLOPES),
    "no slope through the first round": (INFINITE, "chance[:, 1:], chance[:, 0])",
                                         "chance[:, 1:], jax.lax.stop_gradient(chance[:, 0]))", SLOPES),
    "elimination leaves the pivot's row": (INFINITE, "table[:, k] - unit", "table[:, k]",
                                           "test_elimination_solves_linear_equations"),
    "elimination without division": (INFINITE, "table[k] / table[k, k])", "table[k])",
                                     "test_elimination_solves_linear_equations"),
    "slopes of the transposed equations": (INFINITE, "eliminate(A.T, b)", "eliminate(A, b)", SLOPES),
    "sums for values per step": (INFINITE, "(1 - self.discount) * self.values(action)", "self.values(action)", STEP),
    "divided twice": (INFINITE, "return (rounds[:, None] * ", "return (1 - self.discount) * (rounds[:, None] * ",
                      SERIES),
    "the whole game is cut by a time limit": (INFINITE, "jnp.bool_(True), jnp.bool_(False)",
                                              "jnp.bool_(False), jnp.bool_(True)", STEP),
    "a discount of 1": (INFINITE, "if not self.discount < 1:", "if not self.discount < 9:",
                        "test_settings_that_cannot_be_are_named"),
    "both players see the first one's view": (ITERATED, "jnp.array(OTHER_VIEW)[outcome]", "outcome", ROUNDS),
    "DC and DD exchanged for the second player": (ITERATED, "[0, 1, 3, 2, 4]", "[0, 1, 3, 4, 2]", ROUNDS),
    "actions exchanged": (ITERATED, "1 + 2 * action[0] + action[1]", "1 + 2 * action[1] + action[0]", ROUNDS),
    "the payoff of the next outcome": (ITERATED, "[outcome - 1]", "[outcome % 4]", ROUNDS),
    "payoff of the round before": (ITERATED, "jnp.float32(self.payoff)[outcome - 1]",
                                   "jnp.float32(self.payoff)[state.outcome - 1]", ROUNDS),
    "rewards exchanged": (ITERATED, "[outcome - 1], self", "[outcome - 1][::-1], self", ROUNDS),
    "the last round is not paid": (ITERATED, "TimeStep(obs, obs, reward,",
                                   "TimeStep(obs, obs, reward * (t < self.max_steps),", ROUNDS),
    "start is seen after the last round": (ITERATED, "TimeStep(obs, obs, reward,",
                                           "TimeStep(obs, self.observe(outcome * (t < self.max_steps)), reward,",
                                           ROUNDS),
    "an observation that is one round old": (ITERATED, "obs = jnp.float32(self.payoff)[outcome - 1], self.observe(outc"
                                             "ome)", "obs = jnp.float32(self.payoff)[outcome - 1], self.observe("
                                             "state.outcome)", ROUNDS),
    "a time limit is an end": (ITERATED, "jnp.bool_(False), t >= self.max_steps", "t >= self.max_steps, jnp.bool_("
                               "False)", ROUNDS),
    "one round more": (ITERATED, "t >= self.max_steps", "t > self.max_steps", ROUNDS),
    "rounds counted in a byte": (ITERATED, "State(jnp.int32(0), jnp.int32(0))", "State(jnp.int32(0), jnp.int8(0))",
                                 "test_more_rounds_than_a_byte_counts"),
    "who defects cooperates": (ITERATED, "1.0 - action", "1.0 * action", "test_more_rounds_than_a_byte_counts"),
    "tit-for-tat begins with a defection": (FIXED, "tit_for_tat=(1.0, 1.0, 0.0", "tit_for_tat=(0.0, 1.0, 0.0", RULES),
    "tit-for-tat copies itself": (FIXED, "tit_for_tat=(1.0, 1.0, 0.0, 1.0, 0.0)",
                                  "tit_for_tat=(1.0, 1.0, 1.0, 0.0, 0.0)", RULES),
    "grim forgives": (FIXED, "grim=(1.0, 1.0, 0.0, 0.0, 0.0)", "grim=(1.0, 1.0, 0.0, 1.0, 0.0)", RULES),
    "the co-player has the agent's view": (FIXED, "self.game.observe(state.outcome)[1]",
                                           "self.game.observe(state.outcome)[0]", RULES),
    "the agent has the co-player's view": (FIXED, "obs=step.obs[0], next_obs=step.next_obs[0]",
                                           "obs=step.obs[1], next_obs=step.next_obs[1]", RULES),
    "the agent earns the co-player's payoff": (FIXED, "reward=step.reward[0]", "reward=step.reward[1]", RULES),
    "the co-player does the opposite": (FIXED, "jax.random.bernoulli(key, chance), 0, 1)",
                                        "jax.random.bernoulli(key, chance), 1, 0)", RULES),
    "the two act for each other": (FIXED, "jnp.stack([action, answer])", "jnp.stack([answer, action])", RULES),
    "the random co-player is not": (FIXED, "random=(0.5,) * 5", "random=(1.0,) * 5",
                                    "test_a_random_co_player_cooperates_half_of_the_time"),
    "any name is a co-player": (FIXED, "if self.coplayer not in RULES:", "if False:",
                                "test_settings_that_cannot_be_are_named"),
    "payoffs of its own": (FIXED, "iterated_matrix_game.Env(self.payoff, self.max_steps)",
                           "iterated_matrix_game.Env(max_steps=self.max_steps)", RULES),
    "a time limit of its own": (FIXED, "iterated_matrix_game.Env(self.payoff, self.max_steps)",
                                "iterated_matrix_game.Env(self.payoff)", RULES),
    "opponents' returns are added": (ITERATED, "action_space, reports = 2, (0, 1)", "action_space, reports = 2, (0, 0)",
                                     PLAYED),
}

DILEMMA = ((-1, -1), (-3, 0), (0, -3), (-2, -2))
PLUS = ((2, 2), (0, 3), (3, 0), (1, 1))  # the dilemma with payoffs above 0
STAG, CHICKEN = ((4, 4), (1, 3), (3, 1), (2, 2)), ((0, 0), (-1, 1), (1, -1), (-2, -2))
SEXES = ((3, 2), (0, 0), (0, 0), (2, 3))
PENNIES = ((1, -1), (-1, 1), (-1, 1), (1, -1))
UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # nothing in it is like anything else
C, D, U = (1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (0.5,) * 5
TFT, GRIM, CONTRARY = (1, 1, 0, 1, 0), (1, 1, 0, 0, 0), (0, 0, 1, 0, 1)


def outcomes(first, second):
    """(p_0 [4], P [4, 4]) from both players' probabilities to cooperate: at the start, after CC, CD, DC, DD."""
    def joint(p, q):
        return [p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)]

    rows = [joint(first[1 + 2 * a + b], second[1 + 2 * b + a]) for a in (0, 1) for b in (0, 1)]
    return np.array(joint(first[0], second[0]), float), np.array(rows, float)


def series(first, second, payoff, discount, rounds):
    """[2] the sum of discounted payoffs over so many rounds, one after the other."""
    chance, transition = outcomes(first, second)
    total = np.zeros(2)
    for t in range(rounds):
        total += discount**t * chance @ np.array(payoff, float)
        chance = chance @ transition
    return total


def probabilities(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def logits_of(*policies):
    """That cooperate with these probabilities, to 1e-9 where they are 0 or 1."""
    p = np.clip(np.array(policies, float), 1e-9, 1 - 1e-9)
    return jnp.float32(np.log(p) - np.log1p(-p))


@pytest.mark.parametrize("payoff, discount", [(DILEMMA, 0.96), (UNEVEN, 0.9), (UNEVEN, 0.99), (UNEVEN, 0.3)])
def test_the_value_is_its_power_series(payoff, discount):
    env = infinite_matrix_game.Env(payoff, discount)
    logits = 2 * jax.random.normal(jax.random.key(0), (8, 2, 5))
    values = jax.jit(jax.vmap(env.values))(logits)
    expected = [series(*probabilities(x), payoff, discount, 4000) for x in logits]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5 / (1 - discount))


@pytest.mark.parametrize("payoff, discount, first, second, expected", [
    (DILEMMA, 0.96, C, C, (-1, -1)), (DILEMMA, 0.96, D, D, (-2, -2)), (DILEMMA, 0.96, TFT, TFT, (-1, -1)),
    (DILEMMA, 0.96, TFT, D, (-2.04, -1.92)), (DILEMMA, 0.96, U, U, (-1.5, -1.5)), (DILEMMA, 0.96, D, U, (-1, -2.5)),
    (DILEMMA, 0.96, GRIM, CONTRARY, (-0.1968, -2.8416)),  # CD, DD, then DC for ever
    (PLUS, 0.99, C, C, (2, 2)), (PLUS, 0.99, D, D, (1, 1)), (PLUS, 0.99, D, C, (3, 0)), (PLUS, 0.99, TFT, TFT, (2, 2)),
    (PLUS, 0.99, TFT, D, (0.99, 1.02)), (STAG, 0.9, D, C, (3, 1)), (CHICKEN, 0.9, C, D, (-1, 1)),
    (SEXES, 0.9, D, D, (2, 3)), (SEXES, 0.5, U, U, (1.25, 1.25)), (PENNIES, 0.96, U, TFT, (0, 0))])
def test_known_pairs_of_policies(payoff, discount, first, second, expected):
    env = infinite_matrix_game.Env(payoff, discount)
    values = (1 - discount) * env.values(logits_of(first, second))
    np.testing.assert_allclose(values, expected, atol=1e-5)
    exchanged = infinite_matrix_game.Env(tuple(pair[::-1] for pair in np.array(payoff)[[0, 2, 1, 3]]), discount)
    np.testing.assert_allclose((1 - discount) * exchanged.values(logits_of(second, first)), expected[::-1], atol=1e-5)


def test_slopes_are_finite_differences():
    env, logits = infinite_matrix_game.Env(UNEVEN, 0.9), jax.random.normal(jax.random.key(1), (2, 5))
    slopes = jax.jit(jax.jacrev(env.values))(logits)
    h = 1e-5
    for i, j in itertools.product(range(2), range(5)):
        ends = []
        for sign in (-1, 1):
            moved = np.array(logits, np.float64)
            moved[i, j] += sign * h
            ends.append(series(*probabilities(moved), UNEVEN, 0.9, 400))
        np.testing.assert_allclose(slopes[:, i, j], (ends[1] - ends[0]) / (2 * h), rtol=1e-3, atol=1e-4)


def test_what_one_wins_the_other_loses_in_matching_pennies():
    env = infinite_matrix_game.Env(PENNIES)
    values = jax.jit(jax.vmap(env.values))(3 * jax.random.normal(jax.random.key(2), (16, 2, 5)))
    np.testing.assert_allclose(values.sum(axis=1), 0, atol=1e-4)
    assert np.abs(values).max() > 1


def test_elimination_solves_linear_equations():
    rng = np.random.default_rng(0)
    for _ in range(5):
        A, b = rng.normal(size=(4, 4)), rng.normal(size=4)
        A += np.diag(np.sign(np.diag(A)) * np.abs(A).sum(axis=0))
        x = infinite_matrix_game.solve(jnp.float32(A), jnp.float32(b))
        np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=1e-3, atol=1e-5)


def test_a_step_is_the_whole_game():
    env = make_env("infinite_matrix_game", 3, payoff=UNEVEN, discount=0.9)
    logits = jax.random.normal(jax.random.key(3), (3, 2, 5))
    state, obs = env.reset(jax.random.key(0))
    _, step = env.step(jax.random.key(1), state, logits)
    values = [0.1 * series(*probabilities(x), UNEVEN, 0.9, 400) for x in logits]
    np.testing.assert_allclose(step.reward, values, rtol=1e-4, atol=1e-5)
    assert step.terminated.all() and not step.truncated.any() and obs.shape == step.next_obs.shape == (3, 2, 1)
    assert env.max_steps == 1 and env.num_agents == 2 and env.env.teams == (0, 1)
    np.testing.assert_array_equal(step.info["episode"]["length"], 1)


def test_settings_that_cannot_be_are_named():
    wrong = [dict(payoff=((-1, -1), (-3, 0), (0, -3))), dict(payoff=(-1, -3, 0, -2)), dict(payoff=((-1,),) * 4),
             dict(payoff=((0, 0, 0),) * 4), dict(payoff=((0, float("inf")),) * 4), dict(payoff=(("a", 0),) * 4),
             dict(payoff=((True, 0),) * 4), dict(payoff="nan"), dict(payoff=3)]
    for name, other in (("infinite_matrix_game", [dict(discount=1.0), dict(discount=1.5), dict(discount=-0.1)]),
                        ("iterated_matrix_game", [dict(max_steps=0), dict(max_steps=2.5)])):
        for settings in wrong + other:
            with pytest.raises(UserError, match=f'{[*settings][0]} = .* of environment "{name}"'):
                make_env(name, 1, **settings)
    with pytest.raises(UserError, match='coplayer = "tit" is none of tit_for_tat, grim'):
        make_env("fixed_coplayer", 1, coplayer="tit")
    as_json = make_env("iterated_matrix_game", 1, payoff=[[0, 1], [2, 3], [4, 5], [6, 7]])
    _, step = as_json.step(jax.random.key(0), as_json.reset(jax.random.key(1))[0], jnp.array([[1, 0]]))
    np.testing.assert_array_equal(step.reward, [[4, 5]])


def test_rounds_by_hand():
    env = iterated_matrix_game.Env(UNEVEN, max_steps=5)
    state, obs = env.reset(jax.random.key(0))
    assert obs.argmax(axis=1).tolist() == [0, 0] and obs.shape == (2, 5) and (obs.sum(axis=1) == 1).all()
    seen, rewards, ends = [], [], []
    for action in ([0, 0], [0, 1], [1, 0], [1, 1], [0, 1]):
        state, step = env.step(jax.random.key(0), state, jnp.array(action, jnp.int32))
        np.testing.assert_array_equal(step.obs, step.next_obs)
        assert (step.obs.sum(axis=1) == 1).all() and step.reward.dtype == jnp.float32
        seen.append(step.obs.argmax(axis=1).tolist())
        rewards.append(step.reward.tolist())
        ends.append((bool(step.terminated), bool(step.truncated)))
    assert seen == [[1, 1], [2, 3], [3, 2], [4, 4], [2, 3]]
    assert rewards == [[0.5, -1], [-3, 2], [4, -0.25], [-2, 1.5], [-3, 2]]
    assert ends == [(False, False)] * 4 + [(False, True)]


def test_more_rounds_than_a_byte_counts():
    env = Batch(iterated_matrix_game.Env(max_steps=300), 2)
    returns, length, told = jax.jit(lambda key: evaluate(
        lambda carry, obs, key: (carry, jnp.array([[0, 0], [1, 0]])), env, key))(jax.random.key(0))
    np.testing.assert_array_equal(length, 300)
    np.testing.assert_array_equal(told["cooperates"], [[1, 1], [0, 1]])
    np.testing.assert_array_equal(returns, [[-300, -300], [0, -900]])


def play(policies, env, episodes, key):
    """Returns [E, 2] and lengths [E] of fixed policies (2, 5), which act by what each player observes."""
    def act(carry, obs, key):
        chance = (obs * jnp.float32(policies)[None]).sum(axis=-1)
        return carry, 1 - jax.random.bernoulli(key, chance).astype(jnp.int32)

    return jax.jit(lambda key: evaluate(act, Batch(env, episodes), key)[:2])(key)


@pytest.mark.parametrize("first, second", [(TFT, TFT), (TFT, D), (GRIM, CONTRARY), (C, D), (CONTRARY, TFT), (GRIM, D)])
def test_rules_without_chance_earn_exactly_what_the_series_says(first, second):
    returns, length = play((first, second), iterated_matrix_game.Env(UNEVEN, 12), 2, jax.random.key(0))
    np.testing.assert_allclose(returns, [series(first, second, UNEVEN, 1, 12)] * 2, rtol=1e-6)
    np.testing.assert_array_equal(length, 12)


def test_played_games_earn_what_the_series_says():
    """Of policies that draw their actions: within four standard errors."""
    policies = np.array([[0.3, 0.9, 0.2, 0.6, 0.1], [0.8, 0.7, 0.4, 0.05, 0.5]])
    returns, length = play(policies, iterated_matrix_game.Env(UNEVEN, 9), 4000, jax.random.key(4))
    error = np.std(returns, axis=0) / 4000**0.5
    expected = series(*policies, UNEVEN, 1, 9)
    assert (np.abs(returns.mean(axis=0) - expected) < 4 * error).all() and (error < 0.11).all()
    row = score(returns, length, iterated_matrix_game.Env.teams)
    np.testing.assert_allclose([row["return_team0"], row["return_team1"]], returns.mean(axis=0), rtol=1e-5)
    assert "return" not in row


def test_the_closed_form_is_what_long_games_earn():
    """Discounted payoffs of played games, cut where γ^t is 1e-9."""
    policies = np.array([[0.3, 0.9, 0.2, 0.6, 0.1], [0.8, 0.7, 0.4, 0.05, 0.5]])
    env = Batch(iterated_matrix_game.Env(UNEVEN, 40), 3000)

    def round_(state, key):
        env_state, obs = state
        act_key, env_key = jax.random.split(key)
        defects = 1 - jax.random.bernoulli(act_key, (obs * jnp.float32(policies)[None]).sum(axis=-1)).astype(jnp.int32)
        env_state, step = env.step(env_key, env_state, defects)
        return (env_state, step.obs), step.reward

    rewards = jax.jit(lambda key, keys: jax.lax.scan(round_, env.reset(key), keys)[1])(
        jax.random.key(5), jax.random.split(jax.random.key(6), 30))
    sums = (0.5 ** np.arange(30)[:, None, None] * np.asarray(rewards)).sum(axis=0)
    closed = infinite_matrix_game.Env(UNEVEN, 0.5).values(logits_of(*policies))
    assert (np.abs(sums.mean(axis=0) - closed) < 4 * sums.std(axis=0) / 3000**0.5).all()


@pytest.mark.parametrize("coplayer, answers", [
    ("tit_for_tat", "CDDCCD"), ("grim", "CDDDDD"), ("always_cooperate", "CCCCCC"), ("always_defect", "DDDDDD")])
def test_co_players_answer_by_their_rules(coplayer, answers):
    """Against an agent that plays D, D, C, C, D, C."""
    env = fixed_coplayer.Env(coplayer, UNEVEN, max_steps=6)
    state, obs = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(obs, [1, 0, 0, 0, 0])
    for t, (own, other) in enumerate(zip("DDCCDC", answers, strict=True)):
        state, step = env.step(jax.random.key(t), state, jnp.int32("CD".index(own)))
        outcome = ["CC", "CD", "DC", "DD"].index(own + other)
        assert step.reward == UNEVEN[outcome][0] and not step.terminated and step.truncated == (t == 5)
        np.testing.assert_array_equal(step.obs, np.eye(5)[outcome + 1])
        np.testing.assert_array_equal(step.next_obs, step.obs)


def test_a_random_co_player_cooperates_half_of_the_time():
    env = Batch(fixed_coplayer.Env("random", max_steps=25), 400)
    returns, _ = jax.jit(lambda key: evaluate(
        lambda carry, obs, key: (carry, jnp.zeros(400, jnp.int32)), env, key))(jax.random.key(7))
    assert abs(returns.mean() / 25 + 2) < 4 * 1.5 / 10_000**0.5  # -1 or -3, a round
    assert 4 < returns.std() < 6  # 5, where every round is drawn anew


@pytest.mark.slow
@pytest.mark.parametrize("coplayer, a_round", [("tit_for_tat", -1), ("always_defect", -2), ("always_cooperate", 0)])
def test_ppo_finds_the_best_answer(coplayer, a_round, tmp_path):
    """And goes on to cooperate with tit-for-tat in at least 95% of the rounds where it draws its actions."""
    config = ppo_ipd_tft.get_config()
    config.env_kwargs.coplayer = coplayer
    with jax.debug_key_reuse(False):
        summary = train(config, num_seeds=4, workdir=str(tmp_path / "run"))
    assert np.abs(np.array(summary["final"]["per_seed"]) / 100 - a_round).max() <= 0.05
    _, _, run, _ = load(str(tmp_path / "run"))
    with jax.numpy_rank_promotion("allow"):
        cooperates = jax.vmap(lambda run: run.agent.actor_critic(jnp.eye(5), method="actor").probs[1, 0])(run)
    assert (cooperates >= 0.95).all() if coplayer == "tit_for_tat" else (cooperates <= 0.05).all()
