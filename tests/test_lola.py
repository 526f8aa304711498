"""LOLA against its equations in float64, by hand and by differentiating the formulas, and its published result."""
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import lola
from core.envs import make_env
from core.envs.infinite_matrix_game import Env
from core.errors import UserError
from core.evaluation import evaluate

LOLA = "algorithms/lola.py"
GAME, FORMULA, MUTUAL, RESULT, TFT = (
    "test_updates_by_hand_in_a_bilinear_game", "test_an_update_is_the_formula", "test_players_may_be_exchanged",
    "test_shaping_finds_cooperation_and_naive_learners_do_not", "test_tit_for_tat_is_known_by_its_signs")
PLANTED_ERRORS = {  # and the test that has to notice
    "no shaping": (LOLA, "step = self.config.opponent_lr * slope[j, j]",
                   "step = self.config.opponent_lr * jax.lax.stop_gradient(slope[j, j])", GAME),
    "the slope of the own value moves, too": (LOLA, "jax.lax.stop_gradient(slope[i, j])", "slope[i, j]", GAME),
    "the opponent's own slope in place of ours": (LOLA, "jax.lax.stop_gradient(slope[i, j])",
                                                  "jax.lax.stop_gradient(slope[j, j])", GAME),
    "the opponent climbs our value": (LOLA, "step = self.config.opponent_lr * slope[j, j]",
                                      "step = self.config.opponent_lr * slope[i, j]", GAME),
    "the opponent's slope by our logits": (LOLA, "step = self.config.opponent_lr * slope[j, j]",
                                           "step = self.config.opponent_lr * slope[j, i]", GAME),
    "the opponent's learning rate forgotten": (LOLA, "step = self.config.opponent_lr * slope[j, j]",
                                               "step = slope[j, j]", GAME),
    "shaping only": (LOLA, "return values(logits)[i] + (jax", "return 0 * values(logits)[i] + (jax", GAME),
    "the opponent's value": (LOLA, "return values(logits)[i] + (jax", "return values(logits)[j] + (jax", GAME),
    "shaping of the wrong sign": (LOLA, "return values(logits)[i] + (jax", "return values(logits)[i] - (jax", GAME),
    "look-ahead: the step stays fixed": (LOLA, "values(logits.at[j].add(step))[i]",
                                         "values(logits.at[j].add(jax.lax.stop_gradient(step)))[i]", GAME),
    "look-ahead: no step": (LOLA, "values(logits.at[j].add(step))[i]", "values(logits)[i]", GAME),
    "look-ahead: our own step": (LOLA, "logits.at[j].add(step)", "logits.at[i].add(step)", GAME),
    "look-ahead: the step is added twice": (LOLA, "logits.at[j].add(step)", "logits.at[j].add(2 * step)", GAME),
    "look-ahead: the opponent climbs our value": (LOLA, "* jax.jacrev(values)(logits)[j, j]",
                                                  "* jax.jacrev(values)(logits)[i, j]", GAME),
    "look-ahead: the opponent's learning rate forgotten": (
        LOLA, "step = self.config.opponent_lr * jax.jacrev(values)(logits)[j, j]",
        "step = jax.jacrev(values)(logits)[j, j]", GAME),
    "look-ahead: the opponent's value": (LOLA, "values(logits.at[j].add(step))[i]", "values(logits.at[j].add(step))[j]",
                                         GAME),
    "naive: the opponent's value": (LOLA, "return values(self.logits.at[i].set(own))[i]",
                                    "return values(self.logits.at[i].set(own))[1 - i]", GAME),
    "naive and taylor exchanged": (LOLA, "dict(naive=self.naive, taylor=self.taylor,",
                                   "dict(naive=self.taylor, taylor=self.naive,", GAME),
    "look-ahead for taylor": (LOLA, "taylor=self.taylor, lookahead=self.lookahead",
                              "taylor=self.lookahead, lookahead=self.taylor", GAME),
    "downhill": (LOLA, "logits=self.logits + self.config.lr", "logits=self.logits - self.config.lr", GAME),
    "learning rate forgotten": (LOLA, "self.config.lr * slope)", "slope)", GAME),
    "the players' updates exchanged": (LOLA, "self.config.lr * slope)", "self.config.lr * slope[::-1])", GAME),
    "the first player's update for both": (LOLA, "for i in (0, 1)])", "for i in (0, 0)])", GAME),
    "the square of the norm": (LOLA, "grad_norm=jnp.sqrt((slope**2).sum())", "grad_norm=(slope**2).sum()", GAME),
    "both players start alike": (LOLA, "jax.random.normal(key, (2, 5))", "jax.random.normal(key, (1, 5)).repeat(2, 0)",
                                 "test_logits_start_normal"),
    "a start of its own size": (LOLA, "config.init_std * jax", "jax", "test_logits_start_normal"),
    "an update counts as a step": (LOLA, "run.clock.tick(updates=1)", "run.clock.tick(1, 1)",
                                   "test_evaluation_pays_the_exact_value"),
    "the players' policies exchanged": (LOLA, "jnp.broadcast_to(run.agent.logits,", "jnp.broadcast_to(run.agent.logits"
                                        "[::-1],", "test_evaluation_pays_the_exact_value"),
    "the reverse of tit-for-tat": (LOLA, "[1, 1, -1, 1, -1]", "[1, 1, 1, -1, -1]", TFT),
    "one sign is enough": (LOLA, ".all(axis=1).mean()", ".any(axis=1).mean()", TFT),
    "both players or none": (LOLA, ".all(axis=1).mean()", ".all().mean()", TFT),
    "any game will do": (LOLA, 'agents=True, offers=("values",)', "agents=True", "test_mistakes_are_named"),
}

UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # no player is like the other
FORMS = "naive", "taylor", "lookahead"


def make_config(**changes):
    config = lola.get_config()
    config.update(changes)
    return ml_collections.FrozenConfigDict(config)


@functools.partial(jax.jit, static_argnames=("form", "values"))
def compiled(logits, payoff, form, lr, opponent_lr, values):
    agent = lola.Agent(logits, SimpleNamespace(form=form, lr=lr, opponent_lr=opponent_lr))
    agent, info = agent.update(values or Env(payoff, 0.9).values)
    return agent.logits - logits, info


def update(logits, payoff, form, lr=1.0, opponent_lr=3.0, values=None):
    """(what is added to the logits, info) in the game of these payoffs, γ = 0.9, or of these values."""
    return compiled(logits, np.float32(payoff), form, lr, opponent_lr, values)


A = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)  # V_i = θ_0ᵀ A_i θ_1 + b_i · θ_1² / 2
B = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)


def bilinear(logits):
    """[2] values whose first and second derivatives are matrices of numbers."""
    return jnp.einsum("a,iab,b->i", logits[0], A, logits[1]) + (B * logits[1][None] ** 2).sum(axis=1) / 2


@pytest.mark.parametrize("form", FORMS)
def test_updates_by_hand_in_a_bilinear_game(form):
    """∂V_i/∂θ_0 = A_i θ_1; ∂V_i/∂θ_1 = A_iᵀ θ_0 + b_i θ_1; ∂²V_i/∂θ_0∂θ_1 = A_i; ∂²V_i/∂θ_1² = diag b_i."""
    x, y = np.random.default_rng(2).normal(size=(2, 5))
    (A0, A1), (b0, b1), lr, eta = np.float64(A), np.float64(B), 0.7, 0.3
    naive = [A0 @ y, A1.T @ x + b1 * y]
    theirs = [A0.T @ x + b0 * y, A1 @ y]  # of V_0 by θ_1, of V_1 by θ_0
    if form == "naive":
        slopes = naive
    elif form == "taylor":
        slopes = [naive[0] + eta * A1 @ theirs[0], naive[1] + eta * A0.T @ theirs[1]]
    else:  # player 0 expects y' = y + η naive_1, and ∂y'/∂x = η A_1ᵀ; player 1 expects x' = x + η naive_0
        ahead, moved = y + eta * naive[1], x + eta * naive[0]
        slopes = [A0 @ ahead + eta * A1 @ (A0.T @ x + b0 * ahead), A1.T @ moved + b1 * y + eta * A0.T @ (A1 @ y)]
    moved, info = update(jnp.float32([x, y]), UNEVEN, form, lr, eta, bilinear)
    np.testing.assert_allclose(moved, lr * np.array(slopes), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(info["grad_norm"], np.linalg.norm(slopes), rtol=1e-4)


@functools.partial(jax.jit, static_argnums=1)
def slopes_of(logits, form, eta):
    """[2, 5] of the formulas, in float64: the second-order term as a product of a Hessian's block and a gradient."""
    values = Env(UNEVEN, 0.9).values
    gradient, hessian = jax.jacfwd(values)(logits), jax.jacfwd(jax.jacfwd(values))(logits)
    if form == "lookahead":
        def first(own):
            return values(jnp.stack([own, logits[1] + eta * jax.jacfwd(values)(logits.at[0].set(own))[1, 1]]))[0]

        def second(own):
            return values(jnp.stack([logits[0] + eta * jax.jacfwd(values)(logits.at[1].set(own))[0, 0], own]))[1]

        return jnp.stack([jax.jacfwd(first)(logits[0]), jax.jacfwd(second)(logits[1])])
    naive = jnp.stack([gradient[0, 0], gradient[1, 1]])
    shaping = jnp.stack([hessian[1, 0, :, 1] @ gradient[0, 1], hessian[0, 1, :, 0] @ gradient[1, 0]])
    return naive + (form == "taylor") * eta * shaping


@pytest.mark.parametrize("form", FORMS)
def test_an_update_is_the_formula(form):
    logits = jax.random.normal(jax.random.key(0), (2, 5))
    moved, _ = update(logits, UNEVEN, form, 0.5, 0.2)
    with jax.enable_x64(True):
        expected = 0.5 * slopes_of(jnp.asarray(np.asarray(logits), jnp.float64), form, 0.2)
    np.testing.assert_allclose(moved, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_players_may_be_exchanged(form):
    """In the game with exchanged players each one does what the other did. Equal players stay equal."""
    logits = jax.random.normal(jax.random.key(1), (2, 5))
    exchanged = tuple(UNEVEN[i][::-1] for i in (0, 2, 1, 3))
    moved, _ = update(logits, UNEVEN, form)
    other, _ = update(logits[::-1], exchanged, form)
    np.testing.assert_allclose(moved, other[::-1], rtol=1e-3, atol=1e-3)
    same, _ = update(jnp.stack([logits[0]] * 2), Env.payoff, form)
    np.testing.assert_allclose(same[0], same[1], rtol=1e-3, atol=1e-3)


def test_the_forms_agree_where_the_opponent_hardly_moves():
    """Both shape; at a small η they differ from naive ascent by less and less."""
    logits = jax.random.normal(jax.random.key(2), (2, 5))
    naive, taylor, ahead = (update(logits, UNEVEN, form, 1.0, 1e-4)[0] for form in FORMS)
    np.testing.assert_allclose(taylor, naive, atol=0.02)
    np.testing.assert_allclose(ahead, naive, atol=0.02)
    assert np.abs(update(logits, UNEVEN, "taylor")[0] - naive).max() > 0.1


def train(num_seeds, updates=200, env=None, **changes):
    source, config = env or make_env("infinite_matrix_game", 1), make_config(**changes)

    def seed(key):
        run = lola.init(key, source, config)
        step = functools.partial(lola.train_step, source=source, config=config)
        return jax.lax.fori_loop(0, updates, lambda i, run: step(run, None)[0], run)

    with jax.debug_key_reuse(False):
        return jax.jit(jax.vmap(seed))(jax.random.split(jax.random.key(0), num_seeds))


@pytest.mark.parametrize("form, low, high, share", [("naive", -2, -1.93, (0, 0.05)), ("taylor", -1.06, -1, (0.93, 1)),
                                                    ("lookahead", -1.12, -1.02, (0.85, 0.98))])
def test_shaping_finds_cooperation_and_naive_learners_do_not(form, low, high, share):
    """Of 128 seeds: the mean value per step of each player, and the share of seeds where both have more than −1.1."""
    run = train(128, form=form)
    values = 0.04 * jax.jit(jax.vmap(Env().values))(run.agent.logits)  # (S, 2)
    assert ((low <= values.mean(axis=0)) & (values.mean(axis=0) <= high)).all()
    assert share[0] <= (values > -1.1).all(axis=1).mean() <= share[1]


@pytest.mark.parametrize("form", FORMS)
def test_nobody_moves_from_the_equilibrium_of_matching_pennies(form):
    payoff = ((1, -1), (-1, 1), (-1, 1), (1, -1))
    np.testing.assert_allclose(update(jnp.zeros((2, 5)), payoff, form)[0], 0, atol=1e-5)
    assert np.abs(update(jnp.ones((2, 5)), payoff, form)[0]).max() > 0.1


def test_evaluation_pays_the_exact_value():
    env, config = make_env("infinite_matrix_game", 3, payoff=UNEVEN, discount=0.9), make_config(form="naive")
    run = lola.init(jax.random.key(3), env, config)
    run, _ = jax.jit(lambda run: lola.train_step(run, None, env, config))(run)
    returns, length = evaluate(functools.partial(lola.act, run), env, jax.random.key(5))
    np.testing.assert_allclose(returns, [0.1 * jax.jit(env.env.values)(run.agent.logits)] * 3, rtol=1e-5)
    np.testing.assert_array_equal(length, 1)
    assert (run.clock.env_steps, run.clock.updates) == (0, 1)


def test_logits_start_normal():
    logits = train(2000, updates=0, init_std=2.0).agent.logits
    assert abs(logits.std() - 2) < 0.05 and abs(logits.mean()) < 0.05 and logits.shape == (2000, 2, 5)
    corr = np.corrcoef(logits[:, 0].ravel(), logits[:, 1].ravel())[0, 1]
    assert abs(corr) < 0.05


def test_tit_for_tat_is_known_by_its_signs():
    env, config = make_env("infinite_matrix_game", 1), make_config()
    titfortat = [3, 1, -1, 2, -2]
    for first, second, share in ((titfortat, titfortat, 1.0), (titfortat, [3, 1, 1, -2, -2], 0.5),
                                 ([-3, 1, -1, 2, -2], [3, 1, -1, 2, 2], 0.0), ([-3, -1, 1, -2, 2], titfortat, 0.5)):
        run = lola.init(jax.random.key(0), env, config)
        run = run._replace(agent=run.agent.replace(logits=jnp.float32([first, second])))
        assert lola.measure(run, None, env, config) == dict(tit_for_tat=share)


def test_a_seed_is_the_same_alone():
    together = train(3, updates=5, form="naive").agent.logits[1]
    env, config = make_env("infinite_matrix_game", 1), make_config(form="naive")

    @jax.jit
    def alone(key):
        run = lola.init(key, env, config)
        return jax.lax.fori_loop(0, 5, lambda i, run: lola.train_step(run, None, env, config)[0], run).agent.logits

    with jax.debug_key_reuse(False):
        np.testing.assert_allclose(alone(jax.random.split(jax.random.key(0), 3)[1]), together, rtol=1e-3, atol=1e-3)


def test_mistakes_are_named():
    for name, words in (("iterated_matrix_game", "values"), ("gymnax/CartPole-v1", "one agent")):
        with pytest.raises(UserError, match=words):
            lola.init(jax.random.key(0), make_env(name, 1), make_config(env=name))
