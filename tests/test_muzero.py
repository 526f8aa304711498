"""MuZero against its equations by hand, its search on trees whose optimum is known, and on probes."""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import ml_collections
import numpy as np
import optax
import pytest
from flax import struct

from algorithms import muzero
from core.clock import Clock
from core.dataset import ReplayBuffer
from core.envs import Batch, Box, Discrete, TimeStep
from core.errors import UserError
from core.returns import to_bins
from tests import probes

MUZERO = "algorithms/muzero.py"
NETWORK, LOSS, TARGETS, DRAW, REFRESH, SEARCH, IMPROVES, STORED, AGAIN, GREEDY, CLOCK, MASKED = (
    "test_the_networks_by_hand", "test_loss_is_the_equation", "test_targets_by_brute_force",
    "test_starts_are_drawn_by_priority", "test_priorities_are_refreshed", "test_search_finds_the_optimum_of_a_tree",
    "test_gumbel_improves_the_policy_of_tabular_problems", "test_what_is_stored_is_what_was_played",
    "test_old_steps_are_searched_again", "test_evaluation_has_no_noise", "test_the_clock_counts_what_was_taken",
    "test_forbidden_actions_are_never_taken")
OPTIMISER, SIZE = "test_the_optimiser_is_clipped_annealed_adamw", "test_as_many_simulations_as_asked_for"
RANGE, EXPLORES = "test_values_are_divided_by_their_range_in_the_tree", "test_random_actions_are_as_many_as_asked_for"
PLANTED_ERRORS = {  # and the test that has to notice
    "latent states not stretched": (MUZERO, "return (x - low) / jnp.maximum(high - low, 1e-5)", "return x", NETWORK),
    "no residual": (MUZERO, "unit(latent + change)", "unit(change)", NETWORK),
    "the convolution has no activation": (MUZERO, "x = nn.relu(self.encoder(patches(x)))",
                                          "x = self.encoder(patches(x))", NETWORK),
    "bins of the policy": (MUZERO, "jnp.split(self.prediction(latent), [self.num_actions], axis=-1)",
                           "jnp.split(self.prediction(latent), [self.num_bins], axis=-1)[::-1]", NETWORK),
    "all of the gradient": (MUZERO, "halved = 0.5 * (latent + jax.lax.stop_gradient(latent))", "halved = latent", LOSS),
    "none of the gradient": (MUZERO, "halved = 0.5 * (latent + jax.lax.stop_gradient(latent))",
                             "halved = jax.lax.stop_gradient(latent)", LOSS),
    "half of the latent state": (MUZERO, "halved = 0.5 * (latent + jax.lax.stop_gradient(latent))",
                                 "halved = 0.5 * latent", LOSS),
    "all steps weigh alike": (MUZERO, "1 / self.config.unroll).at[0].set(1.0)", "1.0)", LOSS),
    "the first step weighs 1/K": (MUZERO, ".at[0].set(1.0) * batch", " * batch", LOSS),
    "no importance weights": (MUZERO, '.at[0].set(1.0) * batch["weight"][None]',
                              '.at[0].set(1.0) * jnp.ones_like(batch["weight"])[None]', LOSS),
    "policies learnt behind the end": (MUZERO, 'scale * batch["alive"] *', 'scale * batch["known"] *', LOSS),
    "values learnt behind a time limit": (MUZERO, 'value_loss = scale * batch["known"] *', "value_loss = scale *",
                                          LOSS),
    "rewards learnt behind a time limit": (MUZERO, 'scale = scale[:-1] * batch["known"][:-1]', "scale = scale[:-1]",
                                           LOSS),
    "value loss lost": (MUZERO, "value_loss=value_loss, reward_loss", "value_loss=0 * value_loss, reward_loss", LOSS),
    "prediction from the state after": (MUZERO, "return latent_next, (latent, reward, end)",
                                        "return latent_next, (latent_next, reward, end)", LOSS),
    "model of another action": (MUZERO, 'scan(unroll, latent, batch["action"])', 'scan(unroll, latent, batch['
                                '"action"][::-1])', LOSS),
    "priorities of the last state": (MUZERO, 'jax.nn.softmax(value[0]), bound) - batch["target"][0])',
                                     'jax.nn.softmax(value[-1]), bound) - batch["target"][-1])', LOSS),
    "a time limit is an end": (MUZERO, "terminated[:-1], truncated[:-1], config.discount",
                               "terminated[:-1] | truncated[:-1], truncated[:-1], config.discount", TARGETS),
    "sums cross a time limit": (MUZERO, "terminated[:-1], truncated[:-1], config.discount",
                                "terminated[:-1], 0 * truncated[:-1], config.discount", TARGETS),
    "the next episode's value at a time limit": (MUZERO, "next_value = jnp.where(truncated, next_value, jnp.roll("
                                                 "value, -1, axis=0))[:-1]", "next_value = jnp.roll(value, -1, axis=0)"
                                                 "[:-1]", TARGETS),
    "bootstrap from the network": (MUZERO, "next_value = jnp.where(truncated, next_value, jnp.roll(value, -1, axis=0))"
                                   "[:-1]", "next_value = next_value[:-1]", TARGETS),
    "bootstrap from this state": (MUZERO, "jnp.roll(value, -1, axis=0)", "value", TARGETS),
    "one step only": (MUZERO, "config.discount, config.n_step)", "config.discount, 1)", TARGETS),
    "rewards of the next episode": (MUZERO, "reward=(alive * reward[now])[:-1]", "reward=reward[now][:-1]", TARGETS),
    "values of the next episode": (MUZERO, "target=alive * target[now]", "target=target[now]", TARGETS),
    "the absorbing state goes on": (MUZERO, "end = ~alive | terminated[now]", "end = terminated[now]", TARGETS),
    "a time limit is learnt as an end": (MUZERO, "end = ~alive | terminated[now]", "end = ~going_on", TARGETS),
    "an episode ends one step early": (MUZERO, "jnp.concatenate([jnp.ones((1, len(row)), bool), jnp.cumprod(going_on"
                                       "[:-1], axis=0, dtype=bool)])", "jnp.cumprod(going_on, axis=0, dtype=bool)",
                                       TARGETS),
    "nothing known behind a termination": (MUZERO, "alive & truncated[now]", "alive & ~going_on", TARGETS),
    "cut by a limit of the next episode": (MUZERO, "alive & truncated[now]", "truncated[now]", TARGETS),
    "another environment": (MUZERO, "index = index[0][now], env[None]", "index = index[0][now], 0 * env[None]",
                            TARGETS),
    "windows run around the end": (MUZERO, "newer >= config.unroll + config.n_step", "newer >= config.unroll", DRAW),
    "windows of what was never stored": (MUZERO, "& (newer < buffer.size)", "", DRAW),
    "starts drawn alike": (MUZERO, 'jnp.where(ready[:, None], buffer.data["priority"], 0.0)',
                           'jnp.where(ready[:, None], jnp.ones_like(buffer.data["priority"]), 0.0)', DRAW),
    "weights of all rows": (MUZERO, "count = ready.sum() * config.num_envs",
                            "count = buffer.capacity * config.num_envs", DRAW),
    "weights upside down": (MUZERO, 'total[-1] / (count * buffer.data["priority"][row, env])',
                            '(count * buffer.data["priority"][row, env]) / total[-1]', DRAW),
    "weights not divided": (MUZERO, "weight=weight / weight.max()", "weight=weight", REFRESH),
    "priorities stay": (MUZERO, "priority = priority.at[row, env].set((error + 1e-3) ** config.priority_exponent)",
                        "priority = priority", REFRESH),
    "exponent of the priorities": (MUZERO, "(error + 1e-3) ** config.priority_exponent", "error + 1e-3", REFRESH),
    "the same starts every time": (MUZERO, "draw(run.buffer, key, size, config)", "jax.tree.map(lambda x: x[:1]."
                                   "repeat(config.num_updates, 0), draw(run.buffer, key, size, config))", REFRESH),
    "leaves have the parent's value": (MUZERO, "agent.predict(leaf)", "agent.predict(latent)",
                                       "test_leaves_have_their_own_values"),
    "reward not transformed": (MUZERO, "reward = from_bins(jax.nn.softmax(reward), agent.config.value_bound)",
                               "reward = jax.nn.softmax(reward).max(axis=-1)", SEARCH),
    "no discount in the tree": (MUZERO, "discount = agent.config.discount * jax.nn.sigmoid(-end)",
                                "discount = jax.nn.sigmoid(-end)", SEARCH),
    "no termination in the tree": (MUZERO, "agent.config.discount * jax.nn.sigmoid(-end)",
                                   "agent.config.discount + 0 * end", SEARCH),
    "termination upside down": (MUZERO, "jax.nn.sigmoid(-end)", "jax.nn.sigmoid(end)", SEARCH),
    "values divided by their range at a node": (MUZERO, "rescale_values=False) / jnp.maximum(high - low, 1e-2)",
                                                "rescale_values=True)", RANGE),
    "values not divided by their range": (MUZERO, " / jnp.maximum(high - low, 1e-2)", "", RANGE),
    "range with states that were never reached": (MUZERO, "reached = tree.node_visits > 0",
                                                  "reached = tree.node_visits >= 0", RANGE),
    "never a random action": (MUZERO, "< agent.config.epsilon, random, action)", "< 0, random, action)", EXPLORES),
    "always a random action": (MUZERO, "< agent.config.epsilon, random, action)", "< 1, random, action)", EXPLORES),
    "forbidden actions by chance": (MUZERO, "jnp.log(agent.allowed(obs, num_actions))",
                                    "jnp.zeros((len(obs), num_actions))", EXPLORES),
    "one draw for all environments": (MUZERO, "jax.random.uniform(whether_key, action.shape)",
                                      "jax.random.uniform(whether_key, (1,))", EXPLORES),
    "value of the actions not tried": (MUZERO, "found.action_weights * (tree.visit_counts > 0)",
                                       "found.action_weights * (tree.visit_counts >= 0)", IMPROVES),
    "value not normalised": (MUZERO, "(weight * tree.qvalues).sum(axis=-1) / weight.sum(axis=-1)",
                             "(weight * tree.qvalues).sum(axis=-1)", IMPROVES),
    "forbidden and allowed mistaken": (MUZERO, "invalid = 1 - self.allowed(obs, policy.shape[1])",
                                       "invalid = self.allowed(obs, policy.shape[1])", MASKED),
    "the wrong numbers forbid": (MUZERO, "return obs[:, -num_actions:] if", "return obs[:, :num_actions] if", MASKED),
    "observation after the step": (MUZERO, "row = dict(obs=run.obs,", "row = dict(obs=step.obs,", STORED),
    "value of the next episode": (MUZERO, "run.agent.value(step.next_obs)", "run.agent.value(step.obs)", STORED),
    "the network's value for the search's": (MUZERO, "policy=policy, value=value)\n        return",
                                             "policy=policy, value=run.agent.value(run.obs))\n        return", STORED),
    "what is new has the lowest priority": (MUZERO, 'highest = buffer.data["priority"].max()',
                                            'highest = buffer.data["priority"].min()', STORED),
    "the first steps are never drawn": (MUZERO, "jnp.where(highest > 0, highest, 1.0)", "jnp.maximum(highest, 1e-3)",
                                        STORED),
    "the noise stays": (MUZERO, "search(run.obs, search_key, 1.0, temperature(run))",
                        "search(run.obs, search_key, 1.0, 1.0)", "test_noise_falls_in_three_steps"),
    "other observations searched again": (MUZERO, 'data["obs"][index]', 'jnp.roll(data["obs"][index], 1, axis=0)',
                                          AGAIN),
    "old values stay": (MUZERO, 'value=data["value"].at[index].set(value)', 'value=data["value"]', AGAIN),
    "old policies stay": (MUZERO, 'policy=data["policy"].at[index].set(policy)', 'policy=data["policy"]', AGAIN),
    "twice as many searched again": (MUZERO, "round(config.reanalyse * ", "round(2 * config.reanalyse * ", AGAIN),
    "evaluation with noise": (MUZERO, "search(obs, key, 0.0, 0.0)[0]", "search(obs, key, 1.0, 1.0)[0]", GREEDY),
    "gradients not clipped": (MUZERO, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()", OPTIMISER),
    "learning rate stays": (MUZERO, "optax.adamw(schedule,", "optax.adamw(config.lr,", OPTIMISER),
    "a schedule too long": (MUZERO, "(config.env_steps - config.random_steps) // (", "config.env_steps // (",
                            OPTIMISER),
    "a schedule too short": (MUZERO, "(config.num_envs * config.num_steps) * config.num_updates\n",
                             "(config.num_envs * config.num_steps)\n", OPTIMISER),
    "weights do not decay": (MUZERO, "schedule, weight_decay=config.weight_decay", "schedule, weight_decay=0.0",
                             OPTIMISER),
    "all actions considered": (MUZERO, "max_num_considered_actions=self.config.max_considered, ", "", SIZE),
    "one simulation too few": (MUZERO, "self, key, root, step, self.config.num_simulations, invalid,\n                "
                               "max_", "self, key, root, step, self.config.num_simulations - 1, invalid,\n"
                               "                max_", SIZE),
    "no noise at the root": (MUZERO, "dirichlet_fraction=0.25 * noise", "dirichlet_fraction=0.0", SIZE),
    "updates not counted": (MUZERO, "clock=run.clock.tick(updates=config.num_updates)", "clock=run.clock", CLOCK),
    "continuous actions": (MUZERO, "require(source, config, actions=(Discrete,))", "require(source, config)",
                           "test_mistakes_are_named"),
}

SMALL = dict(num_envs=4, num_steps=4, num_updates=3, random_steps=40, env_steps=400, buffer_size=100, batch_size=6,
             num_simulations=4, hidden_dims=(5,), latent_dim=4, num_bins=7, value_bound=3.0, lr=0.01, discount=0.8,
             unroll=2, n_step=3, priority_exponent=0.7, reanalyse=0.5)


@pytest.fixture(autouse=True)
def keys_are_checked_elsewhere():
    """In test_copies. JAX's own check misfires on the tree search, which has branches under vmap."""
    with jax.debug_key_reuse(False):
        yield


def make(env, **changes):
    config = muzero.get_config()
    config.update(SMALL | changes)
    return Batch(env, config.num_envs), ml_collections.FrozenConfigDict(config)


def start(env, **changes):
    env, config = make(env, **changes)
    return jax.jit(functools.partial(muzero.init, source=env, config=config))(jax.random.key(0)), env, config


def shake(run):
    model = run.agent.model
    return run._replace(agent=run.agent.replace(model=model.replace(params=probes.shaken(model.params))))


def mlp(params, x):
    last = len(params) - 1
    for i in range(last + 1):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = x if i == last else np.maximum(x, 0)
    return x


def stretched(x):
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    return (x - low) / (high - low)


class ByHand:
    """The networks in float64."""

    def __init__(self, params, num_actions, latent_dim, num_bins):
        self.params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        self.num_actions, self.latent_dim, self.num_bins = num_actions, latent_dim, num_bins

    def represent(self, obs):
        x = np.asarray(obs, np.float64)
        if "encoder" in self.params:
            kernel = self.params["encoder"]["kernel"].reshape(3, 3, x.shape[-1], -1)
            out = np.zeros((len(x), x.shape[1] - 2, x.shape[2] - 2, kernel.shape[-1]))
            for i in range(out.shape[1]):
                for j in range(out.shape[2]):
                    out[:, i, j] = np.einsum("bijc,ijco->bo", x[:, i:i + 3, j:j + 3], kernel)
            x = np.maximum(out + self.params["encoder"]["bias"], 0)
        return stretched(mlp(self.params["representation"], x.reshape(len(x), -1)))

    def predict(self, latent):
        out = mlp(self.params["prediction"], latent)
        return out[:, :self.num_actions], out[:, self.num_actions:]

    def transition(self, latent, action):
        out = mlp(self.params["dynamics"], np.concatenate([latent, np.eye(self.num_actions)[np.asarray(action)]], 1))
        cut = self.latent_dim + self.num_bins
        return stretched(latent + out[:, :self.latent_dim]), out[:, self.latent_dim:cut], out[:, cut]


@pytest.mark.parametrize("shape", [(7,), (5, 4, 2)], ids=["vector", "image"])
def test_the_networks_by_hand(shape):
    obs, action = jax.random.normal(jax.random.key(0), (6, *shape)) > 0, jnp.arange(6) % 3
    model = muzero.Model(3, (5,), 4, 7, channels=3 if len(shape) > 1 else 0)
    params = probes.shaken(model.init(jax.random.key(1), obs, action)["params"])
    (policy, value), (latent, reward, end) = jax.jit(model.apply)({"params": params}, obs, action)
    hand = ByHand(params, 3, 4, 7)
    start = hand.represent(obs)
    expected = [*hand.predict(start), *hand.transition(start, action)]
    for a, b in zip([policy, value, latent, reward, end], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert latent.min() == 0 and latent.max() == 1
    still = muzero.unit(jnp.ones((2, 3)))  # nothing to stretch
    np.testing.assert_array_equal(still, 0)


def a_batch(seed=1, size=6, unroll=2):
    rng = np.random.default_rng(seed)
    policy = rng.uniform(size=(unroll + 1, size, 3))
    return dict(obs=rng.normal(size=(size, 2)), action=rng.integers(3, size=(unroll, size)),
                reward=rng.normal(size=(unroll, size)), end=rng.integers(2, size=(unroll, size)) * 1.0,
                policy=policy / policy.sum(-1, keepdims=True), target=rng.normal(size=(unroll + 1, size)),
                alive=rng.integers(2, size=(unroll + 1, size)) * 1.0,
                known=rng.integers(2, size=(unroll + 1, size)) * 1.0, weight=rng.uniform(0.2, 1, size=size))


def bins(x, bound=3.0, number=7):
    """Two neighbours of the transformed number."""
    h = np.clip(np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x, -bound, bound)
    place = (h + bound) / (2 * bound) * (number - 1)
    low = int(np.clip(np.floor(place), 0, number - 2))
    weights = np.zeros(number)
    weights[low], weights[low + 1] = 1 - (place - low), place - low
    return weights


def number_of(logits, bound=3.0):
    weights = np.exp(logits - logits.max())
    h = (weights / weights.sum()) @ np.linspace(-bound, bound, len(logits))
    return np.sign(h) * (((np.sqrt(1 + 0.004 * (abs(h) + 1.001)) - 1) / 0.002) ** 2 - 1)


def cross_entropy(weights, logits):
    return -(weights * (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))).sum()


def test_loss_is_the_equation():
    """And its gradient, by finite differences of a loss whose latent states have a frozen half of their own."""
    run, *_ = start(probes.Walk())
    params, batch = probes.shaken(run.agent.model.params), a_batch()
    frozen = []

    def by_hand(params, halves=None):
        hand = ByHand(params, 3, 4, 7)
        latent, total, errors, parts = hand.represent(batch["obs"]), 0.0, [], dict.fromkeys("pvre", 0.0)
        for k in range(3):
            policy, value = hand.predict(latent)
            if halves is None:
                frozen.append(latent)
            entering = latent if halves is None else 0.5 * latent + 0.5 * halves[k]
            if k < 2:
                latent, reward, end = hand.transition(entering, batch["action"][k])
            for b in range(6):
                scale = batch["weight"][b] * (1.0 if k == 0 else 0.5) / 6
                parts["p"] += scale * batch["alive"][k, b] * cross_entropy(batch["policy"][k, b], policy[b])
                parts["v"] += scale * batch["known"][k, b] * cross_entropy(bins(batch["target"][k, b]), value[b])
                if k == 0:
                    errors.append(abs(number_of(value[b]) - batch["target"][0, b]))
                if k < 2 and batch["known"][k, b]:
                    parts["r"] += scale * cross_entropy(bins(batch["reward"][k, b]), reward[b])
                    parts["e"] += scale * np.log1p(np.exp(-end[b] if batch["end"][k, b] else end[b]))
        total = parts["p"] + parts["v"] + parts["r"] + parts["e"]
        return total, parts, errors

    arrays = jax.tree.map(jnp.asarray, batch)
    (loss, (info, error)), grads = jax.jit(jax.value_and_grad(run.agent.loss, has_aux=True))(params, arrays)
    expected, parts, errors = by_hand(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    np.testing.assert_allclose([info[f"{name}_loss"] for name in ("policy", "value", "reward", "end")],
                               list(parts.values()), rtol=1e-3)
    np.testing.assert_allclose(error, errors, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(info["value_error"], np.mean(errors), rtol=1e-3)
    for name in params:  # of one network at a time
        moved = [by_hand({key: jax.tree.map(lambda x, h=h if key == name else 0.0: np.asarray(x, np.float64) + h, value)
                          for key, value in params.items()}, frozen)[0] for h in (-1e-6, 1e-6)]
        slope = sum(float(g.sum()) for g in jax.tree.leaves(grads[name]))
        np.testing.assert_allclose(slope, (moved[1] - moved[0]) / 2e-6, rtol=2e-3, atol=1e-4, err_msg=name)


def a_buffer(rows=12, envs=2, seed=0, added=17):
    """`added` rows of numbers: the oldest were overwritten, so row i of the ring is not the i-th that was added."""
    rng = np.random.default_rng(seed)
    end = rng.integers(6, size=(added, envs))
    data = dict(obs=rng.normal(size=(added, envs, 2)), action=rng.integers(3, size=(added, envs)),
                reward=rng.normal(size=(added, envs)), terminated=end == 0, truncated=end == 1,
                next_value=rng.normal(size=(added, envs)), policy=rng.uniform(size=(added, envs, 3)),
                value=rng.normal(size=(added, envs)), priority=rng.uniform(0.1, 2, size=(added, envs)))
    data = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in data.items()}
    example = jax.eval_shape(lambda: {name: jnp.asarray(x[0]) for name, x in data.items()})
    return data, ReplayBuffer.create(example, rows).add(jax.tree.map(jnp.asarray, data))


@pytest.mark.parametrize("seed", range(4))
def test_targets_by_brute_force(seed):
    """Of every window of the ring, also where it passes its end; with terminations and limits inside."""
    history, buffer = a_buffer(seed=seed)
    _, config = make(probes.Walk(), num_envs=2)
    times = [(t, e) for t in range(5, 17 - 5) for e in range(2)]
    row, env = jnp.array([t % 12 for t, _ in times]), jnp.array([e for _, e in times])
    found = jax.jit(functools.partial(muzero.targets, config=config))(buffer.data, row, env)
    for b, (t, e) in enumerate(times):
        np.testing.assert_array_equal(found["obs"][b], history["obs"][t, e])
        alive, known = True, True
        for k in range(3):
            now = t + k
            value = 0.0
            if alive:
                scale = 1.0
                for j in range(now, now + 3):
                    value += scale * history["reward"][j, e]
                    scale *= 0.8
                    if history["terminated"][j, e]:
                        break
                    if history["truncated"][j, e]:
                        value += scale * history["next_value"][j, e]
                        break
                else:
                    value += scale * history["value"][now + 3, e]
            assert found["alive"][k, b] == alive and found["known"][k, b] == known
            if known:
                np.testing.assert_allclose(found["target"][k, b], value, rtol=1e-4, atol=1e-5)
            if k < 2:
                assert found["action"][k, b] == history["action"][now, e]
                if known:
                    np.testing.assert_allclose(found["reward"][k, b], history["reward"][now, e] if alive else 0.0)
                    assert found["end"][k, b] == (not alive or history["terminated"][now, e])
            np.testing.assert_array_equal(found["policy"][k, b], history["policy"][now, e])
            if alive and history["truncated"][now, e]:
                known = False
            alive &= not (history["terminated"][now, e] or history["truncated"][now, e])


@pytest.mark.parametrize("added", [8, 17])
def test_starts_are_drawn_by_priority(added):
    """Every step is a start, the last of an episode too, as long as K + n steps follow it in the buffer."""
    history, buffer = a_buffer(added=added)
    _, config = make(probes.Walk(), num_envs=2)
    row, env, weight = jax.jit(functools.partial(muzero.draw, shape=(40_000,), config=config))(
        buffer, jax.random.key(0))
    first = max(0, added - 12)
    ready = [(t, e) for t in range(first, added - 5) for e in range(2)]
    total = sum(history["priority"][t, e] for t, e in ready)
    counts = np.zeros((12, 2))
    np.add.at(counts, (np.asarray(row), np.asarray(env)), 1)
    expected = np.zeros((12, 2))
    for t, e in ready:
        expected[t % 12, e] = history["priority"][t, e] / total
    assert any(history["terminated"][t, e] for t, e in ready)
    np.testing.assert_array_equal(counts[expected == 0], 0)
    np.testing.assert_allclose(counts / 40_000, expected, atol=0.01)
    np.testing.assert_allclose(weight, 1 / (len(ready) * expected[row, env]), rtol=1e-4)


def test_priorities_are_refreshed():
    """Those that were drawn, by their error before the step of Adam; the weights are at most 1, in each minibatch."""
    run, env, config = start(probes.Walk(), num_updates=4, batch_size=3)
    run = shake(run)
    priority = jax.random.uniform(jax.random.key(5), run.buffer.data["priority"].shape, minval=0.1, maxval=2.0)
    run = run._replace(buffer=run.buffer.replace(data=run.buffer.data | dict(priority=priority)))
    key, seen = jax.random.key(1), []
    drawn = muzero.draw(run.buffer, jax.random.clone(key), (4, 3), config)
    original = muzero.Agent.loss

    def loss(self, params, batch):
        total, (info, error) = original(self, params, batch)
        jax.debug.callback(lambda *x: seen.append(x), batch["obs"], batch["weight"], error, ordered=True)
        return total, (info, error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muzero.Agent, "loss", loss)
        after, _ = jax.jit(functools.partial(muzero.update, config=config))(run, key)
        jax.effects_barrier()
    expected = np.array(priority)
    assert len(seen) == 4 and len({x[0].tobytes() for x in seen}) == 4
    for row, column, weight, (obs, used, error) in zip(*drawn, seen, strict=True):
        np.testing.assert_array_equal(obs, run.buffer.data["obs"][row, column])
        np.testing.assert_allclose(used, weight / weight.max(), rtol=1e-4)
        expected[np.asarray(row), np.asarray(column)] = (np.asarray(error) + 1e-3) ** 0.7
    np.testing.assert_allclose(after.buffer.data["priority"], expected, rtol=1e-4)
    assert not np.allclose(expected, priority)


class Table(struct.PyTreeNode):
    """Stands for the model: what it knows of a finite problem. A latent state is a number, as is an observation."""

    next_state: Any  # (S, A)
    reward: Any  # (S, A)
    end: Any  # (S, A)
    policy: Any  # (S, A) logits
    value: Any  # (S,)
    bound: float = struct.field(pytree_node=False, default=20.0)

    def __call__(self, x, action=None, params=None, method=None):
        state = x[..., 0].astype(jnp.int32)
        if method == "represent":
            return x
        if method == "predict":
            return self.policy[state], self.logits(self.value[state])
        latent = self.next_state[state, action].astype(jnp.float32)[:, None]
        return latent, self.logits(self.reward[state, action]), jnp.where(self.end[state, action], 30.0, -30.0)

    def logits(self, x):
        return jnp.log(to_bins(x, self.bound, 401) + 1e-12)


def agent_of(table, **changes):
    _, config = make(probes.Walk(), value_bound=table.bound, **changes)
    return muzero.Agent(table, config, False)


def a_tree(depth=3):
    """A binary tree. Only the path 1, 0, 1 has a reward at its end; another way has a smaller one at once, and a third
    one that seems large, behind a termination. Values and policy say nothing."""
    size = 2 ** (depth + 1) - 1
    state = np.arange(size)
    next_state = np.stack([2 * state + 1, 2 * state + 2], axis=1)
    leaves = next_state[:, 0] >= size
    next_state[leaves] = state[leaves, None]
    reward, end = np.zeros((size, 2)), np.repeat(leaves[:, None], 2, axis=1)
    reward[5, 1] = 1.0  # 0 -> 2 -> 5 -> 12
    reward[0, 0] = 0.1
    end[1] = True
    reward[3], reward[4] = 5.0, 5.0  # behind the end of state 1
    return Table(*(jnp.asarray(x) for x in (next_state, jnp.float32(reward), end, np.zeros((size, 2), np.float32),
                                            np.zeros(size, np.float32))))


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_search_finds_the_optimum_of_a_tree(search):
    """0.64 = 0.8² behind two steps is more than 0.1 now, and 5 behind an end is nothing. The value of a state is a mean
    of all simulations, so it stays a little below 0.64; without the discount it would be more."""
    agent = agent_of(a_tree(), search=search, num_simulations=512)
    action, policy, value, tree = jax.jit(lambda obs, key: agent.search(obs, key, 0.0, 0.0))(
        jnp.zeros((1, 1)), jax.random.key(0))
    q = tree.summary().qvalues[0]
    assert action[0] == 1 and policy[0, 1] > 0.7 and 0.5 < q[1] < 0.645
    np.testing.assert_allclose([q[0], policy.sum()], [0.1, 1.0], rtol=1e-4)
    np.testing.assert_allclose(value[0], policy[0] @ q, rtol=1e-4)


def test_leaves_have_their_own_values():
    """The released version of a program that this file replaces took the value of the parent: then nothing differs."""
    tree = a_tree()
    tree = tree.replace(reward=0 * tree.reward, end=jnp.zeros_like(tree.end), value=tree.value.at[2].set(1.0))
    agent = agent_of(tree, num_simulations=2)
    action, _, value, found = jax.jit(lambda obs, key: agent.search(obs, key, 0.0, 0.0))(
        jnp.zeros((1, 1)), jax.random.key(0))
    assert action[0] == 1
    np.testing.assert_allclose(found.summary().qvalues[0], [0.0, 0.8], atol=1e-3)


def tabular(seed, states=4, actions=5):
    """A finite problem with a random policy, whose values are exact."""
    rng = np.random.default_rng(seed)
    next_state, reward = rng.integers(states, size=(states, actions)), rng.normal(size=(states, actions))
    logits = rng.normal(size=(states, actions))
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    moves = np.zeros((states, states))
    np.add.at(moves, (np.arange(states)[:, None], next_state), policy)
    value = np.linalg.solve(np.eye(states) - 0.8 * moves, (policy * reward).sum(1))
    table = Table(jnp.asarray(next_state), jnp.float32(reward), jnp.zeros((states, actions), bool),
                  jnp.float32(logits), jnp.float32(value))
    return table, value, reward + 0.8 * value[next_state]


@pytest.mark.parametrize("num_simulations", [2, 3, 4, 8, 16])
def test_gumbel_improves_the_policy_of_tabular_problems(num_simulations):
    """E q(a) of the action that it takes, and Σ π q of the policy that it teaches, are above v, for every number of
    simulations. Those trees that are one step deep have exact values, so ν is Σ π q over what was tried."""
    search = jax.jit(lambda agent, obs, key: agent.search(obs, key, 1.0, 1.0))
    state = np.repeat(np.arange(4), 1000)
    for seed in range(4):
        table, value, q = tabular(seed)
        agent = agent_of(table, num_simulations=num_simulations)
        action, policy, found, tree = search(agent, jnp.float32(state)[:, None], jax.random.key(seed))
        for q_of_it in (q[state, np.asarray(action)], (np.asarray(policy) * q[state]).sum(1)):
            assert ((q_of_it - value[state]).reshape(4, -1).mean(1) > 0).all()
        if num_simulations == 2:
            weight = np.asarray(policy) * (np.asarray(tree.summary().visit_counts) > 0)
            np.testing.assert_allclose(found, (weight * q[state]).sum(1) / weight.sum(1), atol=2e-3)


def test_values_are_divided_by_their_range_in_the_tree():
    """Two actions end with 10 and 9. Their values differ by 1 of about 9.5, so the search teaches no certainty: the
    odds are exp(σ), σ = 0.1 (50 + visits) · 1 / range."""
    ends = Table(jnp.array([[1, 1], [1, 1]]), jnp.float32([[10, 9], [0, 0]]), jnp.ones((2, 2), bool),
                 jnp.zeros((2, 2)), jnp.zeros(2))
    agent = agent_of(ends, num_simulations=8)
    _, policy, value, tree = jax.jit(lambda obs, key: agent.search(obs, key, 0.0, 0.0))(
        jnp.zeros((1, 1)), jax.random.key(0))
    visits = np.asarray(tree.summary().visit_counts[0])
    values = np.asarray(tree.node_values[0])[np.asarray(tree.node_visits[0]) > 0]
    odds = np.exp(0.1 * (50 + visits.max()) / (values.max() - values.min()))
    np.testing.assert_allclose(policy[0, 0] / policy[0, 1], odds, rtol=2e-2)
    assert 1.5 < odds < 2.5 and 9 < value[0] < 10
    one = jax.tree.map(lambda x: x[0], tree)  # in the middle of a search, when three states are reached
    values = jnp.full(9, 100.0).at[:3].set(jnp.array([-7.0, -9.0, -8.0]))
    one = one.replace(node_values=values, node_visits=jnp.ones(9, jnp.int32).at[3:].set(0))
    plain = mctx.qtransform_completed_by_mix_value(one, 0, rescale_values=False)
    np.testing.assert_allclose(muzero.by_range(one, 0), plain / 2, rtol=1e-5)


def test_random_actions_are_as_many_as_asked_for():
    """Independently in each environment, and only actions that are allowed."""
    run, *_ = start(Guarded(), epsilon=0.3)
    obs = jnp.tile(jnp.float32([[0, 0, 0, 1, 1, 0, 1]]), (4000, 1))
    action = muzero.explore(run.agent, obs, jnp.zeros(4000, jnp.int32), 3, jax.random.key(1))
    np.testing.assert_allclose(np.bincount(action, minlength=3) / 4000, [0.85, 0.0, 0.15], atol=0.02)


class Guarded(NamedTuple):
    """One step. The last three numbers say which actions are allowed; the others are worth more."""

    max_steps: int = 1
    action_space: Any = Discrete(3)
    masked: bool = True

    def reset(self, key):
        allowed = jnp.zeros(3).at[jax.random.randint(key, (), 0, 3)].set(1.0)
        obs = jnp.concatenate([1 - allowed, jnp.ones(1), allowed])
        return obs, obs

    def step(self, key, state, action):
        return state, TimeStep(state, state, 1 - state[4:][action], jnp.array(True), jnp.array(False), {})


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_forbidden_actions_are_never_taken(search):
    run, env, config = start(Guarded(), search=search)
    _, policy, _, _ = jax.jit(lambda run, key: run.agent.search(run.obs, key, 1.0, 1.0))(run, jax.random.key(1))
    taken = run.buffer.data["action"][: run.buffer.size]
    allowed = run.buffer.data["obs"][: run.buffer.size, :, 4:]
    assert taken.size == 40
    np.testing.assert_array_equal(jnp.take_along_axis(allowed, taken[..., None], axis=-1), 1.0)
    np.testing.assert_array_equal(policy > 0, run.obs[:, 4:] > 0)


def test_what_is_stored_is_what_was_played():
    """`num_steps` rows more. Of each: obs and action lead to the next obs, ν and π are those of a search of this obs,
    the value at the end that of the true successor, the priority the highest there was."""
    run, env, config = start(probes.Walk())
    np.testing.assert_array_equal(run.buffer.data["priority"][:10], 1.0)  # of the first steps of all
    run = shake(run)
    priority = run.buffer.data["priority"].at[1, 2].set(3.0)
    run = run._replace(buffer=run.buffer.replace(data=run.buffer.data | dict(priority=priority)))
    key = jax.random.key(7)
    after, episode = jax.jit(lambda run, key: muzero.play(run, key, env, 6))(run, jax.random.clone(key))
    rows = {name: x[10:16] for name, x in after.buffer.data.items()}
    assert run.buffer.size == 10 and after.buffer.size == 16
    state, obs, ends = run.env_state, run.obs, 0
    search = jax.jit(lambda obs, key: run.agent.search(obs, key, 1.0, 1.0))
    for t, (search_key, explore_key, env_key) in enumerate(jax.random.split(key, (6, 3))):
        action, policy, value, _ = search(obs, search_key)
        action = muzero.explore(run.agent, obs, action, 3, explore_key)
        state, step = env.step(env_key, state, action)
        expected = dict(obs=obs, action=action, reward=step.reward, terminated=step.terminated,
                        truncated=step.truncated, next_value=run.agent.value(step.next_obs), policy=policy, value=value)
        for name, x in expected.items():
            np.testing.assert_allclose(rows[name][t], x, rtol=1e-4, atol=1e-5, err_msg=name)
        ends, obs = ends + int((step.terminated | step.truncated).sum()), step.obs
    np.testing.assert_array_equal(rows["priority"], 3.0)
    np.testing.assert_allclose(after.obs, obs, rtol=1e-5)
    assert episode["count"] == ends > 0 and rows["truncated"].any() and rows["terminated"].any()
    assert not np.allclose(rows["value"], jax.vmap(run.agent.value)(rows["obs"]), atol=1e-4)


def test_noise_falls_in_three_steps():
    run, env, config = start(probes.Walk())
    steps = jnp.array([0, 199, 200, 299, 300, 400])
    noise = jax.vmap(lambda steps: muzero.temperature(run._replace(clock=Clock(steps, jnp.int32(0)))))(steps)
    np.testing.assert_array_equal(noise, [1, 1, 0.5, 0.5, 0.25, 0.25])
    # Late in training one state is searched alike more often.
    run = run._replace(obs=jnp.zeros_like(run.obs))
    seen, original = [], muzero.Agent.search

    def search(self, obs, key, noise, temperature):
        seen.append((noise, temperature))
        return original(self, obs, key, noise, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muzero.Agent, "search", search)
        jax.disable_jit()
        jax.eval_shape(lambda run, key: muzero.play(run, key, env, 1), run, jax.random.key(0))
    assert seen[0][0] == 1.0 and not isinstance(seen[0][1], float)


def test_old_steps_are_searched_again():
    """Half as many as are played: 8 draws from 40 steps. Nothing else changes."""
    run, env, config = start(probes.Walk())
    run, key = shake(run), jax.random.key(3)
    index_key, search_key = jax.random.split(jax.random.clone(key))
    after = jax.jit(functools.partial(muzero.reanalyse, config=config))(run, key)
    old, new = run.buffer.data, after.buffer.data
    changed = np.argwhere((old["value"] != new["value"]) & (old["policy"] != new["policy"]).any(-1))
    index = jax.random.randint(index_key, (8,), 0, 40)
    assert {(i // 4, i % 4) for i in index.tolist()} == {tuple(x) for x in changed.tolist()}
    row, column = index // 4, index % 4
    _, policy, value, _ = jax.jit(lambda obs, key: run.agent.search(obs, key, 1.0, 1.0))(
        old["obs"][row, column], search_key)
    for i in range(8):  # of a step that is drawn twice one search stays
        same = [j for j in range(8) if index[j] == index[i]]
        assert min(abs(new["value"][row[i], column[i]] - value[j]) for j in same) < 1e-5
        assert min(abs(new["policy"][row[i], column[i]] - policy[j]).max() for j in same) < 1e-5
    for name in old.keys() - {"value", "policy"}:
        np.testing.assert_array_equal(old[name], new[name])
    without = ml_collections.FrozenConfigDict(config.to_dict() | dict(reanalyse=0.0))
    assert muzero.reanalyse(run, jax.random.key(0), without) is run


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_evaluation_has_no_noise(search):
    """The same action for every key, that which was tried most; with noise one observation has several."""
    run, *_ = start(probes.Walk(), search=search, num_simulations=8)
    run = shake(run)
    obs = jnp.tile(jnp.float32([[1.0, 0.3]]), (64, 1))
    act = jax.jit(lambda run, key: muzero.act(run, (), obs, key))
    actions = [act(run, jax.random.key(i)) for i in range(3)]
    noisy = jax.jit(lambda run, key: run.agent.search(obs, key, 1.0, 1.0))(run, jax.random.key(0))[0]
    assert all(carry == () for carry, _ in actions)
    assert len(np.unique([action for _, action in actions])) == 1 < len(np.unique(noisy))


def test_the_clock_counts_what_was_taken():
    run, env, config = start(probes.Walk())
    assert run.clock == (40, 0) and run.buffer.size == 10
    after, info = jax.jit(functools.partial(muzero.train_step, source=env, config=config))(run, jax.random.key(1))
    assert after.clock == (56, 3) and info["episode"]["count"] > 0
    assert {"policy_loss", "value_loss", "reward_loss", "end_loss", "value_error"} < info.keys()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(info))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), run.agent.model.params, after.agent.model.params)
    assert all(jax.tree.leaves(moved))


def test_the_optimiser_is_clipped_annealed_adamw():
    """By hand, over the whole budget: 22 iterations of 3 updates. With the last one the learning rate is 0."""
    run, *_ = start(probes.Walk(), max_grad_norm=0.01, weight_decay=0.1)
    model = run.agent.model
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(optax.linear_schedule(0.01, 0.0, 66),
                                                                  weight_decay=0.1))
    rng = np.random.default_rng(0)
    steps = [jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), model.params) for _ in range(3)]
    params, state, own, own_state = model.params, tx.init(model.params), model.params, model.opt_state
    step, own_step = jax.jit(tx.update), jax.jit(model.tx.update)
    for i in range(67):
        grads = jax.tree.map(lambda x, i=i: x / (i + 1), steps[i % 3])  # unclipped they would fade
        updates, state = step(grads, state, params)
        own_updates, own_state = own_step(grads, own_state, own)
        params, own = optax.apply_updates(params, updates), optax.apply_updates(own, own_updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), own, params)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(own_updates)) < 1e-8


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_as_many_simulations_as_asked_for(search):
    """And Gumbel's search tries no more actions at the root than it should."""
    table, _, _ = tabular(0)
    agent = agent_of(table, search=search, num_simulations=12, max_considered=2)
    _, policy, _, tree = jax.jit(lambda obs, key: agent.search(obs, key, 1.0, 1.0))(
        jnp.zeros((30, 1)), jax.random.key(0))
    visits = np.asarray(tree.summary().visit_counts)
    np.testing.assert_array_equal(visits.sum(axis=1), 12)
    if search == "gumbel":
        np.testing.assert_array_equal((visits > 0).sum(axis=1), 2)
        assert len(np.unique(visits > 0, axis=0)) > 3  # not the same two every time
    else:
        np.testing.assert_allclose(policy, visits / 12, rtol=1e-5)
        assert len(np.unique(visits, axis=0)) > 1  # noise at the root


LEARNING = dict(num_envs=8, num_steps=4, num_updates=8, env_steps=80 * 32 + 128, random_steps=128, batch_size=32,
                hidden_dims=(16,), latent_dim=8, num_bins=21, value_bound=2.0, lr=0.01, n_step=2, unroll=2,
                discount=0.5, num_simulations=4, buffer_size=1000, reanalyse=0.0)


@functools.cache
def train(env):
    run, env, config = start(env, **LEARNING)
    step = functools.partial(muzero.train_step, source=env, config=config)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(jax.random.key(1), 80))[0]


@pytest.mark.parametrize(("env", "obs", "values"), [
    (probes.Match(), [-1.0, 1.0], [1.0, 1.0]), (probes.Chain(), [0.0, 1.0], [0.5, 1.0]),
    (probes.Clock(), [0.0, 1.0, 2.0], [2.0] * 3)], ids=["match", "chain", "time limit"])
def test_values_are_learnt(env, obs, values):
    """A time limit is not the end: reward 1 for ever has the value 1 / (1 − γ). The model knows how long it lasts."""
    run = train(env)
    obs = jnp.float32(obs)[:, None]
    _, _, value, _ = run.agent.search(obs, jax.random.key(0), 0.0, 0.0)
    np.testing.assert_allclose(value, values, atol=0.15)
    if isinstance(env, probes.Match):
        np.testing.assert_array_equal(muzero.act(run, (), obs, jax.random.key(0))[1], [0, 1])
    model, action = run.agent.model, jnp.zeros(1, jnp.int32)
    if isinstance(env, probes.Chain):  # it ends after the second step, not after the first
        latent, _, first = model(model(obs[:1], method="represent"), action, method="transition")
        assert first[0] < 0 < model(latent, action, method="transition")[2][0]


@pytest.mark.parametrize(("env", "changes", "words"), [
    (probes.Walk(action_space=Box((-1.0,), (1.0,))), {}, "muzero cannot act in .* which has continuous actions"),
    (probes.Walk(), dict(random_steps=20), "random_steps and buffer_size have to hold 24 steps at least"),
    (probes.Walk(), dict(buffer_size=20), "random_steps and buffer_size have to hold 24 steps at least"),
    (probes.Walk(), dict(channels=4), "channels = 4, but an observation has 1 axes")])
def test_mistakes_are_named(env, changes, words):
    env, config = make(env, **changes)
    with pytest.raises(UserError, match=words):
        muzero.init(jax.random.key(0), env, config)
