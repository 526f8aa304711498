"""AlphaZero against its equations by hand, and in TicTacToe, every game of which can be looked at."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import alphazero
from core.dataset import ReplayBuffer
from core.envs import make_env
from core.errors import UserError
from tests import probes

pytest.importorskip("pgx")

ZERO = "algorithms/alphazero.py"
LOSS, TARGETS, DRAW, SEARCH, STORED, GREEDY, CLOCK = (
    "test_loss_is_the_equation", "test_targets_by_brute_force", "test_starts_are_those_whose_game_has_ended",
    "test_search_finds_the_winning_and_the_saving_move", "test_what_is_stored_is_what_was_played",
    "test_evaluation_has_no_noise", "test_the_clock_counts_what_was_taken")
EXPLORES, SCALE = "test_random_moves_are_as_many_as_asked_for", "test_values_count_as_they_are"
PLANTED_ERRORS = {  # and the test that has to notice
    "the value is not between −1 and 1": (ZERO, "jnp.tanh(out[:, -1])", "out[:, -1]", LOSS),
    "value loss lost": (ZERO, "return policy_loss + value_loss", "return policy_loss", LOSS),
    "sum for mean": (ZERO, 'jnp.square(batch["target"] - value).mean()', 'jnp.square(batch["target"] - value).sum()',
                     LOSS),
    "the next player is a friend": (ZERO, "jnp.where(ended, 0.0, -1.0)", "jnp.where(ended, 0.0, 1.0)", SEARCH),
    "a game goes on behind its end": (ZERO, "jnp.where(ended, 0.0, -1.0)", "jnp.where(ended, -1.0, -1.0)", SEARCH),
    "outcome of a friend": (ZERO, "nothing, terminated, nothing, -1.0, longest)", "nothing, terminated, nothing, 1.0, "
                            "longest)", TARGETS),
    "one move only": (ZERO, "nothing, -1.0, longest)", "nothing, -1.0, 1)", TARGETS),
    "outcome of the next game": (ZERO, "n_step_returns(reward, nothing, terminated,", "n_step_returns(reward, nothing, "
                                 "nothing,", TARGETS),
    "outcome of the last move": (ZERO, "-1.0, longest)[0]", "-1.0, longest)[-1]", TARGETS),
    "another environment": (ZERO, '% len(data["reward"]), env[None]', '% len(data["reward"]), 0 * env[None]', TARGETS),
    "games that go on": (ZERO, "randint(row_key, shape, longest - 1, buffer.size)",
                         "randint(row_key, shape, 0, buffer.size)", DRAW),
    "the oldest is left out": (ZERO, "longest - 1, buffer.size)", "longest - 1, buffer.size - 1)", DRAW),
    "the first environment only": (ZERO, "randint(env_key, shape, 0, config.num_envs)",
                                   "randint(env_key, shape, 0, 1)", DRAW),
    "boards after the move": (ZERO, 'row = dict(board=run.obs["board"]', 'row = dict(board=step.obs["board"]', STORED),
    "evaluation with noise": (ZERO, "run.agent.search(obs, key, 0.0)[0]", "run.agent.search(obs, key, 1.0)[0]", GREEDY),
    "training without noise": (ZERO, "run.agent.search(run.obs, search_key, 1.0)",
                               "run.agent.search(run.obs, search_key, 0.0)", STORED),
    "never a random move": (ZERO, "< agent.config.epsilon, random, action)", "< 0, random, action)", EXPLORES),
    "always a random move": (ZERO, "< agent.config.epsilon, random, action)", "< 1, random, action)", EXPLORES),
    "forbidden moves by chance": (ZERO, 'jnp.log(obs["board"][:, -num_actions:])', 'jnp.zeros_like(obs["board"][:, '
                                  '-num_actions:])', EXPLORES),
    "one draw for all environments": (ZERO, "jax.random.uniform(whether_key, action.shape)",
                                      "jax.random.uniform(whether_key, (1,))", EXPLORES),
    "values divided by their range": (ZERO, "rescale_values=False, value_scale=0.5", "value_scale=0.5", SCALE),
    "the search's own scale of values": (ZERO, "gumbel_scale=noise,\n            qtransform=by_outcome)",
                                         "gumbel_scale=noise)", SCALE),
    "values twice as heavy": (ZERO, "value_scale=0.5", "value_scale=1.0", SCALE),
    "gradients not clipped": (ZERO, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()",
                              "test_the_optimiser_is_clipped_adamw"),
    "weights do not decay": (ZERO, "config.lr, weight_decay=config.weight_decay", "config.lr, weight_decay=0.0",
                             "test_the_optimiser_is_clipped_adamw"),
    "updates not counted": (ZERO, "clock=run.clock.tick(updates=config.num_updates)", "clock=run.clock", CLOCK),
    "any environment": (ZERO, 'actions=(Discrete,), offers=("move",))', "actions=(Discrete,))",
                        "test_mistakes_are_named"),
}

SMALL = dict(num_envs=4, num_steps=3, num_updates=3, random_steps=48, env_steps=400, buffer_size=100, batch_size=6,
             num_simulations=8, hidden_dims=(8,), lr=0.01)


@pytest.fixture(autouse=True)
def keys_are_checked_elsewhere():
    """In test_copies. JAX's own check misfires on the tree search, which has branches under vmap."""
    with jax.debug_key_reuse(False):
        yield


@functools.cache
def env_of(**settings):
    return make_env("pgx/tic_tac_toe", 4, **settings)


def start(**changes):
    config = alphazero.get_config()
    config.update(SMALL | changes)
    config, env = ml_collections.FrozenConfigDict(config), env_of(reveal=True)
    return jax.jit(functools.partial(alphazero.init, source=env, config=config))(jax.random.key(0)), env, config


def test_loss_is_the_equation():
    run, *_ = start()
    params, rng = probes.shaken(run.agent.network.params), np.random.default_rng(1)
    policy = rng.uniform(size=(6, 9))
    batch = dict(board=rng.integers(2, size=(6, 27)).astype(np.float32), target=rng.integers(-1, 2, size=6) * 1.0,
                 policy=policy / policy.sum(1, keepdims=True))
    out = np.asarray(batch["board"], np.float64)
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), params["MLP_0"])
    out = np.maximum(out @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
    out = out @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    logits = out[:, :9] - np.log(np.exp(out[:, :9]).sum(1, keepdims=True))
    policy_loss = -(batch["policy"] * logits).sum(1).mean()
    value_loss = np.mean((batch["target"] - np.tanh(out[:, 9])) ** 2)
    loss, info = jax.jit(run.agent.loss)(params, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose([loss, info["policy_loss"], info["value_loss"]],
                               [policy_loss + value_loss, policy_loss, value_loss], rtol=1e-4)


def a_buffer(rows=20, envs=2, added=27):
    """Games of at most 9 moves, in an environment one after another."""
    rng = np.random.default_rng(3)
    reward, terminated = np.zeros((added, envs), np.float32), np.zeros((added, envs), bool)
    for e in range(envs):
        t = -1
        while t < added:
            t += rng.integers(5, 10)
            if t < added:
                terminated[t, e], reward[t, e] = True, rng.integers(2)
    data = dict(board=rng.normal(size=(added, envs, 3)).astype(np.float32), reward=reward, terminated=terminated,
                policy=rng.uniform(size=(added, envs, 9)).astype(np.float32))
    example = jax.eval_shape(lambda: {name: jnp.asarray(x[0]) for name, x in data.items()})
    return data, ReplayBuffer.create(example, rows).add(jax.tree.map(jnp.asarray, data))


def test_targets_by_brute_force():
    """1 for the winner's moves, −1 for the loser's, 0 for those of a draw; also where the ring passes its end."""
    history, buffer = a_buffer()
    times = [(t, e) for t in range(7, 19) for e in range(2)]
    row, env = jnp.array([t % 20 for t, _ in times]), jnp.array([e for _, e in times])
    found = jax.jit(lambda row, env: alphazero.targets(buffer.data, row, env, 9))(row, env)
    outcomes = []
    for t, e in times:
        end = t + int(history["terminated"][t:, e].argmax())
        outcomes.append(float(history["reward"][end, e]) * (1 if (end - t) % 2 == 0 else -1))
    assert set(outcomes) == {-1.0, 0.0, 1.0}
    np.testing.assert_allclose(found["target"], outcomes)
    for name in ("board", "policy"):
        np.testing.assert_array_equal(found[name], [history[name][t, e] for t, e in times])


def test_starts_are_those_whose_game_has_ended():
    """All rows but the 8 newest, which may belong to games that go on."""
    _, buffer = a_buffer()
    _, _, config = start()
    config = ml_collections.FrozenConfigDict(config.to_dict() | dict(num_envs=2))
    row, env = jax.jit(lambda key: alphazero.draw(buffer, key, (4000,), 9, config))(jax.random.key(0))
    counts = np.zeros((20, 2))
    np.add.at(counts, (np.asarray(row), np.asarray(env)), 1)
    expected = np.zeros((20, 2))
    expected[[t % 20 for t in range(7, 19)]] = 4000 / 24
    np.testing.assert_array_equal(counts > 0, expected > 0)
    np.testing.assert_allclose(counts, expected, atol=60)


def after(*moves):
    """Observations (1, ...) of a game."""
    env = env_of(reveal=True).env
    game = env.reset(jax.random.key(0))[0]
    for action in moves:
        game, _, _ = jax.jit(env.move)(game, action)
    return jax.tree.map(lambda x: x[None], env.observe(game))


def test_search_finds_the_winning_and_the_saving_move():
    """With a network that knows nothing. The fields are numbered by rows: 0 1 2 / 3 4 5 / 6 7 8."""
    run, *_ = start(num_simulations=200, max_considered=9)
    search = jax.jit(lambda obs: run.agent.search(obs, jax.random.key(0), 0.0))
    for moves, best in (((0, 3, 1, 4), 2),  # three in a row
                        ((0, 4, 8, 3), 5),  # else the other one has 3 4 5
                        ((4, 0, 8, 2), 1),  # else 0 1 2
                        ((0, 8, 2, 1, 6), 4)):  # the other one wins at 3 or 4: who plays 4 stops one, and loses later
        action, policy, tree = search(after(*moves))
        if moves != (0, 8, 2, 1, 6):
            assert action[0] == best
        np.testing.assert_array_equal(policy[0, jnp.array(moves)], 0.0)
        np.testing.assert_allclose(policy.sum(), 1.0, rtol=1e-5)
    action, _, tree = search(after(0, 3, 1, 4))
    np.testing.assert_allclose(tree.summary().qvalues[0, 2], 1.0, atol=1e-5)  # nothing follows a win
    _, _, tree = search(after(0, 3, 1, 4, 8))  # the other one can win now, by 5
    np.testing.assert_allclose(tree.summary().qvalues[0, 5], 1.0, atol=1e-5)
    assert tree.summary().qvalues[0, 7] < 0  # else this one wins, by 2


def test_what_is_stored_is_what_was_played():
    run, env, _ = start()
    key = jax.random.key(7)
    later, episode = jax.jit(lambda run, key: alphazero.play(run, key, env, 8))(run, jax.random.clone(key))
    rows = {name: x[12:20] for name, x in later.buffer.data.items()}
    assert run.buffer.size == 12 and later.buffer.size == 20
    state, obs, ends = run.env_state, run.obs, 0
    search = jax.jit(lambda obs, key: run.agent.search(obs, key, 1.0))
    for t, (search_key, explore_key, env_key) in enumerate(jax.random.split(key, (8, 3))):
        action, policy, _ = search(obs, search_key)
        action = alphazero.explore(run.agent, obs, action, 9, explore_key)
        state, step = jax.jit(env.step)(env_key, state, action)
        np.testing.assert_array_equal(rows["board"][t], obs["board"])
        np.testing.assert_allclose(rows["policy"][t], policy, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(rows["reward"][t], step.reward)
        np.testing.assert_array_equal(rows["terminated"][t], step.terminated)
        ends, obs = ends + int(step.terminated.sum()), step.obs
    np.testing.assert_array_equal(later.obs["board"], obs["board"])
    assert episode["count"] == ends > 0


def test_random_moves_are_as_many_as_asked_for():
    """Independently in each environment, and only moves that are allowed."""
    run, *_ = start(epsilon=0.3)
    obs = jax.tree.map(lambda x: jnp.repeat(x, 7000, axis=0), after(4, 0))
    action = alphazero.explore(run.agent, obs, jnp.ones(7000, jnp.int32), 9, jax.random.key(1))
    share = np.full(9, 0.3 / 7)
    share[1], share[[0, 4]] = 0.7 + 0.3 / 7, 0.0
    np.testing.assert_allclose(np.bincount(action, minlength=9) / 7000, share, atol=0.015)


def test_values_count_as_they_are():
    """Not divided by their range at the node: the logits that the search adds are (50 + visits) q / 2, less a number
    that all moves share."""
    run, *_ = start(num_simulations=20)
    _, policy, tree = jax.jit(lambda obs: run.agent.search(obs, jax.random.key(0), 0.0))(after(0, 4, 8))
    tree = jax.tree.map(lambda x: x[0], tree)
    added, visits = alphazero.by_outcome(tree, 0), tree.children_visits[0]
    first, second = np.argsort(-np.asarray(visits), kind="stable")[:2]
    assert visits[second] > 0
    q = tree.children_rewards[0] + tree.children_discounts[0] * tree.children_values[0]
    np.testing.assert_allclose(added[first] - added[second], (50 + visits.max()) * (q[first] - q[second]) / 2,
                               rtol=1e-3, atol=1e-4)
    assert abs(q[first] - q[second]) > 1e-3
    logits = tree.children_prior_logits[0] + added
    np.testing.assert_allclose(policy[0, first] / policy[0, second], jnp.exp(logits[first] - logits[second]), rtol=1e-3)


def test_evaluation_has_no_noise():
    run, *_ = start()
    obs = jax.tree.map(lambda x: jnp.repeat(x, 64, axis=0), after(4))
    act = jax.jit(lambda key: alphazero.act(run, (), obs, key))
    actions = [act(jax.random.key(i)) for i in range(2)]
    noisy = jax.jit(lambda key: run.agent.search(obs, key, 1.0)[0])(jax.random.key(0))
    assert all(carry == () for carry, _ in actions)
    assert len(np.unique([action for _, action in actions])) == 1 < len(np.unique(noisy))


def test_the_clock_counts_what_was_taken():
    run, env, config = start()
    assert run.clock == (48, 0)
    later, info = jax.jit(functools.partial(alphazero.train_step, source=env, config=config))(run, jax.random.key(1))
    assert later.clock == (60, 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(info))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), run.agent.network.params, later.agent.network.params)
    assert all(jax.tree.leaves(moved))


def test_the_optimiser_is_clipped_adamw():
    run, *_ = start(max_grad_norm=0.01, weight_decay=0.1)
    network = run.agent.network
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.01, weight_decay=0.1))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), network.params)
    params, state, own, own_state = network.params, tx.init(network.params), network.params, network.opt_state
    for scale in (1.0, 0.1):  # clipped they are the same
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, grads)
        updates, state = tx.update(scaled, state, params)
        own_updates, own_state = network.tx.update(scaled, own_state, own)
        params, own = optax.apply_updates(params, updates), optax.apply_updates(own, own_updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own, params)


def lost_games(act, env, first):
    """How many of all games are lost that can be played against `act`, which moves first or second: every answer of
    the opponent is tried, so no player can do better against it."""
    games, lost = jax.tree.map(lambda x: x[None], env.reset(jax.random.key(0))[0]), 0
    move, observe = jax.jit(jax.vmap(env.move)), jax.vmap(env.observe)
    for ply in range(9):
        if (ply % 2 == 0) == first:
            action = act(observe(games))
        else:
            parent, action = np.nonzero(np.asarray(games.legal_action_mask))
            games = jax.tree.map(lambda x, parent=parent: x[parent], games)
        games, reward, ended = move(games, jnp.asarray(action))
        if (ply % 2 == 0) != first:
            lost += int((reward > 0).sum())
        games = jax.tree.map(lambda x, ended=ended: x[~np.asarray(ended)], games)
        if not len(games.current_player):
            break
    return lost


def test_all_games_are_counted():
    """Against a player that takes the first free field every way to lose is found: by hand, as lists of moves."""
    env = env_of(reveal=True).env
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]

    def count(moves, first):
        for player in (0, 1):
            if any(set(line) <= set(moves[player::2]) for line in lines):
                return int((player == 0) != first)
        free = [x for x in range(9) if x not in moves]
        if not free:
            return 0
        mine = (len(moves) % 2 == 0) == first
        return sum(count([*moves, x], first) for x in (free[:1] if mine else free))

    for first in (True, False):
        found = lost_games(lambda obs: obs["board"][:, 18:].argmax(axis=1), env, first)
        assert found == count([], first) > 0


@pytest.mark.slow
def test_tic_tac_toe_is_never_lost():
    """By the weights of configs/alphazero_tic_tac_toe.py, from either side, whatever the opponent does."""
    from configs import alphazero_tic_tac_toe
    from launchers.train import programs

    config = ml_collections.FrozenConfigDict(alphazero_tic_tac_toe.get_config().to_dict())
    source = make_env(config.env, config.num_envs, **config.env_kwargs)
    init, train, *_ = programs(alphazero, config, 1, 0, source)
    run = jax.jit(init)(jnp.zeros(1, jnp.int32), ())
    iterations = (config.env_steps - config.random_steps) // (config.num_envs * config.num_steps)
    step = functools.partial(alphazero.train_step, source=source, config=config)
    run = jax.tree.map(lambda x: x[0], run)
    run = jax.jit(lambda run, keys: jax.lax.scan(lambda run, key: (step(run, key)[0], None), run, keys)[0])(
        run, jax.random.split(jax.random.key(1), iterations))
    act = jax.jit(lambda obs: alphazero.act(run, (), obs, jax.random.key(0))[1])
    assert [lost_games(act, source.env, first) for first in (True, False)] == [0, 0]


@pytest.mark.parametrize(("env", "words"), [
    (lambda: env_of(), "alphazero needs the game in its observations: env_kwargs.reveal=True"),
    (lambda: probes.batch(probes.Match(), 4), 'alphazero cannot act in .* which has no "move"')])
def test_mistakes_are_named(env, words):
    config = alphazero.get_config()
    config.update(SMALL)
    with pytest.raises(UserError, match=words):
        alphazero.init(jax.random.key(0), env(), ml_collections.FrozenConfigDict(config))
