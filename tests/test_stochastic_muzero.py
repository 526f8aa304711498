"""Stochastic MuZero: what differs from its parent by hand, its search where chance decides, and on a probe."""
import functools
import inspect
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import struct

from algorithms import muzero, stochastic_muzero
from core.envs import Batch, Discrete, TimeStep
from core.returns import to_bins
from tests import test_muzero
from tests.probes import Walk, shaken
from tests.test_muzero import bins, cross_entropy, mlp, stretched

FILE = "algorithms/stochastic_muzero.py"
NETWORK, LOSS, TARGETS, SEARCH, STORED, PARENT, LEARNS = (
    "test_the_networks_by_hand", "test_loss_is_the_equation", "test_targets_have_pairs_of_observations",
    "test_search_waits_for_chance", "test_the_true_successor_is_stored", "test_the_rest_is_the_parent",
    "test_chance_is_learnt")
PLANTED_ERRORS = {  # and the test that has to notice
    "the afterstate forgets the state": (FILE, "unit(latent + self.decision(x))", "unit(self.decision(x))", NETWORK),
    "the afterstate forgets the action": (FILE, "jax.nn.one_hot(action, self.num_actions)], axis=-1)\n        return",
                                          "0 * jax.nn.one_hot(action, self.num_actions)], axis=-1)\n        return",
                                          NETWORK),
    "the next state forgets the afterstate": (FILE, "unit(afterstate + change)", "unit(change)", NETWORK),
    "the outcome is seen before it happens": (FILE, "[self.see(obs), self.see(next_obs)]",
                                              "[self.see(obs), self.see(obs)]", NETWORK),
    "soft outcomes": (FILE, "return soft + jax.lax.stop_gradient(code - soft), soft", "return soft, soft", NETWORK),
    "no gradient for the encoder": (FILE, "return soft + jax.lax.stop_gradient(code - soft), soft",
                                    "return jax.lax.stop_gradient(code), soft", LOSS),
    "the encoder learns to be foreseen": (FILE, "        code = jax.lax.stop_gradient(code)\n", "", LOSS),
    "outcomes of chance from the state": (FILE, 'self.model(afterstate, params=params, method="foresee")',
                                          'self.model(halved, params=params, method="foresee")', LOSS),
    "outcomes in the wrong order": (FILE, '(batch["action"], code))', '(batch["action"], code[::-1]))', LOSS),
    "all of the gradient": (FILE, "halved = 0.5 * (latent + jax.lax.stop_gradient(latent))", "halved = latent", LOSS),
    "afterstates have the next value": (FILE, "(afterstate_value, target[:-1])", "(afterstate_value, target[1:])",
                                        LOSS),
    "outcomes learnt behind the end": (FILE, 'happened, scale = scale[:-1] * batch["alive"][:-1]',
                                       'happened, scale = scale[:-1] * batch["known"][:-1]', LOSS),
    "no commitment": (FILE, "self.config.commitment * happened", "0 * happened", LOSS),
    "commitment without its weight": (FILE, "self.config.commitment * happened", "happened", LOSS),
    "chance loss lost": (FILE, "chance_loss=chance_loss", "chance_loss=0 * chance_loss", LOSS),
    "afterstate loss lost": (FILE, "afterstate_loss=afterstate_loss", "afterstate_loss=0 * afterstate_loss", LOSS),
    "the observation for its successor": (FILE, 'for name in ("obs", "next_obs", "action")',
                                          'for name in ("obs", "obs", "action")', TARGETS),
    "observations one step late": (FILE, "(data[name][index][:-1] for name in", "(data[name][index][1:] for name in",
                                   TARGETS),
    "afterstates have no value": (FILE, "chance_logits=code, afterstate_value=value)",
                                  "chance_logits=code, afterstate_value=0 * value)", SEARCH),
    "outcomes alike": (FILE, "chance_logits=code, afterstate", "chance_logits=0 * code, afterstate", SEARCH),
    "no discount in the tree": (FILE, "discount = agent.config.discount * jax.nn.sigmoid(-end)",
                                "discount = jax.nn.sigmoid(-end)", SEARCH),
    "no termination in the tree": (FILE, "agent.config.discount * jax.nn.sigmoid(-end)",
                                   "agent.config.discount + 0 * end", SEARCH),
    "reward not transformed": (FILE, "reward = from_bins(jax.nn.softmax(reward), agent.config.value_bound)",
                               "reward = jax.nn.softmax(reward).max(axis=-1)", SEARCH),
    "leaves have no value": (FILE, "action_logits=policy, value=value,", "action_logits=policy, value=0 * value,",
                             SEARCH),
    "value of the whole tree": (FILE, "value = (weight * tree.qvalues).sum(axis=-1) / weight.sum(axis=-1)",
                                "value = tree.value", SEARCH),
    "noise in evaluation": (FILE, "dirichlet_fraction=0.25 * noise", "dirichlet_fraction=0.25", SEARCH),
    "the start of the next episode": (FILE, "row = dict(obs=run.obs, next_obs=step.next_obs,",
                                      "row = dict(obs=run.obs, next_obs=step.obs,", STORED),
    "networks and environments start from one key": (FILE, "source.reset(reset_key)", "source.reset(agent_key)",
                                                     PARENT),
    "the environment draws from the key of the search": (FILE, "source.step(env_key,", "source.step(search_key,",
                                                         PARENT),
    "gradients not clipped": (FILE, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()", PARENT),
    "learning rate stays": (FILE, "optax.adamw(schedule,", "optax.adamw(config.lr,", PARENT),
    "windows run around the end": (FILE, "newer >= config.unroll + config.n_step", "newer >= config.unroll", PARENT),
    "priorities stay": (FILE, "priority = priority.at[row, env].set((error + 1e-3) ** config.priority_exponent)",
                        "priority = priority", PARENT),
    "a time limit is an end": (FILE, "terminated[:-1], truncated[:-1], config.discount",
                               "terminated[:-1] | truncated[:-1], truncated[:-1], config.discount", TARGETS),
}


keys_are_checked_elsewhere = test_muzero.keys_are_checked_elsewhere


class ByHand(test_muzero.ByHand):
    """The networks in float64."""

    num_codes = 5

    def decide(self, latent, action):
        out = mlp(self.params["decision"], np.concatenate([latent, np.eye(self.num_actions)[np.asarray(action)]], 1))
        return stretched(latent + out)

    def foresee(self, afterstate):
        out = mlp(self.params["afterstate_prediction"], afterstate)
        return out[:, :self.num_codes], out[:, self.num_codes:]

    def happened(self, obs, next_obs):
        out = mlp(self.params["chance_encoder"], np.concatenate([obs, next_obs], axis=1).astype(np.float64))
        soft = np.exp(out - out.max(axis=1, keepdims=True))
        soft = soft / soft.sum(axis=1, keepdims=True)
        return np.eye(self.num_codes)[soft.argmax(axis=1)], soft

    def transition(self, afterstate, code):
        out = mlp(self.params["dynamics"], np.concatenate([afterstate, code], 1))
        cut = self.latent_dim + self.num_bins
        return stretched(afterstate + out[:, :self.latent_dim]), out[:, self.latent_dim:cut], out[:, cut]


def make(env, **changes):
    config = stochastic_muzero.get_config()
    config.update({k: v for k, v in test_muzero.SMALL.items() if k in config} | dict(num_codes=5) | changes)
    config.env_kwargs = {}
    return Batch(env, config.num_envs), ml_collections.FrozenConfigDict(config)


@functools.cache
def start(env, **changes):
    env, config = make(env, **changes)
    init = functools.partial(stochastic_muzero.init, source=env, config=config)
    return jax.jit(init)(jax.random.key(0)), env, config


def test_the_networks_by_hand():
    obs, next_obs = jax.random.normal(jax.random.key(0), (2, 40, 6))
    action = jnp.arange(40) % 3
    model = stochastic_muzero.Model(3, (5,), 4, 7, num_codes=5, channels=0)
    params = shaken(model.init(jax.random.key(1), obs, action)["params"])

    def everything(params):
        def of(method, *args):
            return model.apply({"params": params}, *args, method=method)

        latent = of("represent", obs)
        afterstate, (code, soft) = of("decide", latent, action), of("happened", obs, next_obs)
        return *of("predict", latent), afterstate, *of("foresee", afterstate), code, soft, *of(
            "transition", afterstate, code)

    hand = ByHand(params, 3, 4, 7)
    latent = hand.represent(obs)
    afterstate, (code, soft) = hand.decide(latent, action), hand.happened(obs, next_obs)
    expected = [*hand.predict(latent), afterstate, *hand.foresee(afterstate), code, soft,
                *hand.transition(afterstate, code)]
    for a, b in zip(jax.jit(everything)(params), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert len(np.unique(code.argmax(axis=1))) > 2


def test_loss_is_the_equation():
    """And its gradient by finite differences: half of each latent state is frozen, and so is what a code has more than
    its softmax."""
    run, *_ = start(Walk())
    params, batch, rng = shaken(run.agent.model.params), test_muzero.a_batch(), np.random.default_rng(2)
    batch = batch | dict(obs=rng.normal(size=(2, 6, 2)), next_obs=rng.normal(size=(2, 6, 2)))
    frozen = []

    def by_hand(params, at=None):
        hand = ByHand(params, 3, 4, 7)
        codes = [hand.happened(batch["obs"][k], batch["next_obs"][k]) for k in range(2)]
        latent, parts = hand.represent(batch["obs"][0]), dict.fromkeys("pvreuco", 0.0)
        for k in range(3):
            policy, value = hand.predict(latent)
            if k < 2:
                code, soft = codes[k]
                if at is None:
                    frozen.append((latent, code, soft))
                old_latent, old_code, old_soft = frozen[k]
                afterstate = hand.decide(0.5 * latent + 0.5 * old_latent, batch["action"][k])
                chance, afterstate_value = hand.foresee(afterstate)
                latent, reward, end = hand.transition(afterstate, old_code + soft - old_soft)
            for b in range(6):
                scale = batch["weight"][b] * (1.0 if k == 0 else 0.5) / 6
                target = bins(batch["target"][k, b])
                parts["p"] += scale * batch["alive"][k, b] * cross_entropy(batch["policy"][k, b], policy[b])
                parts["v"] += scale * batch["known"][k, b] * cross_entropy(target, value[b])
                if k < 2 and batch["known"][k, b]:
                    parts["r"] += scale * cross_entropy(bins(batch["reward"][k, b]), reward[b])
                    parts["e"] += scale * np.log1p(np.exp(-end[b] if batch["end"][k, b] else end[b]))
                    parts["u"] += scale * cross_entropy(target, afterstate_value[b])
                if k < 2 and batch["alive"][k, b]:
                    parts["c"] += scale * cross_entropy(old_code[b], chance[b])
                    parts["o"] += 0.25 * scale * np.square(old_code[b] - soft[b]).sum()
        return sum(parts.values()), parts

    arrays = jax.tree.map(jnp.asarray, batch)
    (loss, (info, _)), grads = jax.jit(jax.value_and_grad(run.agent.loss, has_aux=True))(params, arrays)
    expected, parts = by_hand(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    names = [f"{name}_loss" for name in ("policy", "value", "reward", "end", "afterstate", "chance")]
    np.testing.assert_allclose([info[name] for name in [*names, "commitment"]], list(parts.values()), rtol=1e-3)
    for name in params:  # of one network at a time
        moved = [by_hand({key: jax.tree.map(lambda x, h=h if key == name else 0.0: np.asarray(x, np.float64)
                                            + h * np.cos(np.arange(x.size)).reshape(x.shape), value)
                          for key, value in params.items()}, frozen)[0] for h in (-1e-6, 1e-6)]
        slope = sum(float((g * np.cos(np.arange(g.size)).reshape(g.shape)).sum())
                    for g in jax.tree.leaves(grads[name]))
        np.testing.assert_allclose(slope, (moved[1] - moved[0]) / 2e-6, rtol=3e-3, atol=2e-4, err_msg=name)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(grads["chance_encoder"])) > 1e-3


def test_targets_have_pairs_of_observations():
    """Those of every step of the unroll, and else what the parent has."""
    _, config = make(Walk(), num_envs=2)
    parent = test_muzero.make(Walk(), num_envs=2)[1]
    rng = np.random.default_rng(0)
    _, buffer = test_muzero.a_buffer()
    data = buffer.data | dict(next_obs=jnp.float32(rng.normal(size=buffer.data["obs"].shape)))
    row, env = (jnp.array(x) for x in zip(*((t % 12, e) for t in range(5, 12) for e in range(2)), strict=True))
    found = jax.jit(functools.partial(stochastic_muzero.targets, config=config))(data, row, env)
    expected = jax.jit(functools.partial(muzero.targets, config=parent))(data, row, env)
    for name in expected.keys() - {"obs"}:
        np.testing.assert_array_equal(found[name], expected[name])
    assert data["truncated"][row, env].any() and data["terminated"][row, env].any()
    for k in range(2):
        for name in ("obs", "next_obs"):
            np.testing.assert_array_equal(found[name][k], data[name][(row + k) % 12, env])


class Table(struct.PyTreeNode):
    """Stands for the model: three bets. A latent state is a number, an afterstate 10 state + action, an outcome 0 or 1.

    In state 0 action 0 has 0.45 for certain. Action 1 leads to state 1 or 2, where action 0 or 1 has 1: whoever looks
    first gets it. Action 2 has 3 one time in ten. All ends with the reward."""

    def __call__(self, x, other=None, params=None, method=None):
        number = x[..., 0].astype(jnp.int32)
        if method == "represent":
            return x
        if method == "predict":
            policy, value = jnp.float32([0.1, 0.0, -0.1]), jnp.float32([0.3, 0.6, 0.6, -5.0])
            return jnp.tile(policy[None], (len(x), 1)), self.logits(value[number])
        if method == "decide":
            return 10 * x + other[:, None]
        chance = jnp.where(number == 2, 0.1, 0.5)  # of outcome 1
        if method == "foresee":
            value = jnp.where(number == 1, 0.8, jnp.where(number < 3, 0.4, 0.0))
            return jnp.log(jnp.stack([1 - chance, chance], axis=-1)), self.logits(value)
        outcome = other.argmax(axis=-1)
        state = jnp.where(number == 1, 1 + outcome, 3)
        reward = jnp.where(number == 0, 0.45, jnp.where(number == 2, 3.0 * outcome, 0.0))
        reward = jnp.where((number == 10) | (number == 21), 1.0, reward)
        return state.astype(jnp.float32)[:, None], self.logits(reward), jnp.where(number == 1, -30.0, 30.0)

    def logits(self, x):
        return jnp.log(to_bins(x, 20.0, 401) + 1e-12)


def test_search_waits_for_chance():
    """0.8 · 1 is more than 0.45 for certain. A model without chance would find ½ behind action 1, whichever follows;
    one that hopes for the best outcome would take action 2."""
    _, config = make(Walk(), value_bound=20.0, num_simulations=2000, num_codes=2)
    agent = stochastic_muzero.Agent(Table(), config, False)
    search = jax.jit(lambda obs, key: agent.search(obs, key, 0.0, 0.0))
    action, policy, value, tree = search(jnp.zeros((1, 1)), jax.random.key(0))
    q, visits = tree.summary().qvalues[0], np.asarray(tree.summary().visit_counts[0])
    assert action[0] == 1 and policy.shape == (1, 3) and policy[0, 1] > 0.7
    np.testing.assert_allclose(q[0], 0.45, atol=0.01)
    assert 0.6 < q[1] < 0.8 and 0.15 < q[2] < 0.4
    np.testing.assert_allclose(value[0], (policy[0] * q).sum(), rtol=1e-4)
    assert visits.sum() == 2000
    nodes = tree.embeddings.is_decision_node[0] & (tree.node_visits[0] > 0)
    states = tree.embeddings.state_embedding[0, nodes, 0].astype(int)
    np.testing.assert_allclose(tree.raw_values[0, nodes], np.array([0.3, 0.6, 0.6, -5.0])[states], rtol=1e-3)
    again = search(jnp.zeros((1, 1)), jax.random.key(1))[1]
    np.testing.assert_array_equal(again, policy)
    _, config = make(Walk(), value_bound=20.0, num_simulations=1, num_codes=2)
    agent = stochastic_muzero.Agent(Table(), config, False)
    _, _, value, _ = jax.jit(lambda obs, key: agent.search(obs, key, 0.0, 0.0))(jnp.zeros((1, 1)), jax.random.key(0))
    np.testing.assert_allclose(value, 0.4, rtol=1e-3)  # of the afterstate that was reached first


def test_the_true_successor_is_stored():
    run, env, config = start(Walk())
    after, _ = jax.jit(lambda run, key: stochastic_muzero.play(run, key, env, 6))(run, jax.random.key(3))
    rows = {name: np.asarray(x[10:16]) for name, x in after.buffer.data.items()}
    ended = rows["terminated"] | rows["truncated"]
    assert ended.any() and not ended.all()
    going_on = ~ended[:-1]
    np.testing.assert_allclose(rows["next_obs"][:-1][going_on], rows["obs"][1:][going_on], rtol=1e-5)
    np.testing.assert_array_equal(rows["next_obs"][..., 0], rows["obs"][..., 0] + 1)  # the steps, also at the end
    np.testing.assert_allclose(rows["reward"], rows["next_obs"][..., 1], rtol=1e-5)
    np.testing.assert_allclose(rows["next_value"], jax.vmap(run.agent.value)(jnp.asarray(rows["next_obs"])),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [
    "Agent.create", "Agent.predict", "Agent.value", "Agent.allowed", "unit", "Run", "init", "train_step", "play",
    "explore", "temperature", "reanalyse", "update", "draw", "act", "search"])
def test_the_rest_is_the_parent(name):
    """Word for word, so that the tests of the parent are tests of the child."""
    own, parent = (inspect.getsource(operator.attrgetter(name)(module)) for module in (stochastic_muzero, muzero))
    for more in ("next_obs=obs, ", "next_obs=step.next_obs, ", "config.num_codes,"):
        own = own.replace(more, "")
    assert own.split() == parent.split()


class Bet(NamedTuple):
    """A coin is thrown after the first action; then the action that names its side has reward 1. First action 1 leaves
    the game with 0.6 at once."""

    max_steps: int = 2
    action_space: Any = Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(2)

    def step(self, key, state, action):
        coin = jax.random.bernoulli(key).astype(jnp.int32)
        reward = jnp.where(state == 0, 0.6 * action, jnp.where(action == state - 1, 1.0, 0.0))
        end = (state > 0) | (action == 1)
        obs = jnp.where(state == 0, jnp.eye(2)[coin], jnp.zeros(2))
        return 1 + coin, TimeStep(obs, obs, reward, end, jnp.bool_(False), {})


def test_chance_is_learnt():
    """With γ = 0.8 waiting for the coin is worth 0.8. Both outcomes have a code, foreseen with ½."""
    changes = dict(num_envs=8, num_steps=4, num_updates=8, env_steps=100 * 32 + 128, random_steps=128, batch_size=32,
                   hidden_dims=(16,), latent_dim=8, num_bins=21, value_bound=2.0, lr=0.01, n_step=2, unroll=2,
                   discount=0.8, num_simulations=8, buffer_size=1000, reanalyse=0.0)
    run, env, config = start(Bet(), **changes)
    step = functools.partial(stochastic_muzero.train_step, source=env, config=config)
    train = jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))
    run, _ = train(run, jax.random.split(jax.random.key(1), 100))
    obs = jnp.float32([[0, 0], [1, 0], [0, 1]])
    action = stochastic_muzero.act(run, (), obs, jax.random.key(0))[1]
    np.testing.assert_array_equal(action, [0, 0, 1])
    model = run.agent.model
    code, _ = model(obs[:1].repeat(2, 0), obs[1:], method="happened")
    assert code[0].argmax() != code[1].argmax()
    afterstate = model(model(obs[:1], method="represent"), jnp.zeros(1, jnp.int32), method="decide")
    foreseen = jax.nn.softmax(model(afterstate, method="foresee")[0])[0]
    np.testing.assert_allclose(foreseen @ code.T, [0.5, 0.5], atol=0.15)
    _, _, value, _ = run.agent.search(obs, jax.random.key(0), 0.0, 0.0)
    np.testing.assert_allclose(value, [0.8, 1.0, 1.0], atol=0.15)
