"""CrossQ against its equations by hand: batch renormalisation, the joint pass, the delayed actor."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import crossq
from core.envs import Batch
from core.envs.interface import Box, Discrete
from core.errors import UserError
from tests.test_sac import LEARNING, SMALL, Chain, Goals, Line, a_batch, assert_close, stored

CROSSQ = "algorithms/crossq.py"
NORM, MOVED, ACTS, LOSSES, ORDER, DELAY, STARTS, STORED, WARM, GREEDY = (
    "test_in_training_a_layer_is_renormalised", "test_running_statistics_follow_the_batches",
    "test_in_act_mode_a_layer_uses_its_running_statistics", "test_losses_and_gradients_are_the_equations",
    "test_an_update_takes_its_steps_in_order", "test_the_actor_learns_every_third_time",
    "test_networks_start_as_the_config_says", "test_what_is_stored_is_what_happened",
    "test_random_steps_come_first_and_count", "test_acting_is_greedy_in_act_mode_and_in_the_environments_units")
PLANTED_ERRORS = {  # and the test that has to notice
    "statistics from the target half only": (CROSSQ, "x.mean(axis=0), x.var(axis=0)",
                                             "x[len(x) // 2:].mean(axis=0), x[len(x) // 2:].var(axis=0)", NORM),
    "no renormalisation": (CROSSQ, "(x - mean[None]) / batch_std[None] * r + d", "(x - mean[None]) / batch_std[None]",
                           NORM),
    "shift forgotten": (CROSSQ, "/ batch_std[None] * r + d", "/ batch_std[None] * r", NORM),
    "ratio upside down": (CROSSQ, "jnp.clip(batch_std / std, 1 /", "jnp.clip(std / batch_std, 1 /", NORM),
    "ratio unbounded below": (CROSSQ, "std, 1 / self.config.r_max, self.config.r_max)", "std, 0, self.config.r_max)",
                              NORM),
    "ratio unbounded above": (CROSSQ, "std, 1 / self.config.r_max, self.config.r_max)",
                              "std, 1 / self.config.r_max, jnp.inf)", NORM),
    "shift unbounded": (CROSSQ, "-self.config.d_max, self.config.d_max)", "-jnp.inf, jnp.inf)", NORM),
    "shift in units of the batch": (CROSSQ, "jnp.clip((mean - stats.mean) / std, ",
                                    "jnp.clip((mean - stats.mean) / batch_std, ", NORM),
    "gradient through ratio and shift": (CROSSQ, "jax.lax.stop_gradient(v)[None] for v", "v[None] for v", NORM),
    "no warm-up": (CROSSQ, "stats.passes >= self.config.renorm_after", "stats.passes >= 0", NORM),
    "warm-up one pass too long": (CROSSQ, "stats.passes >= self.config", "stats.passes > self.config", NORM),
    "scale forgotten": (CROSSQ, "x * scale[None] + bias[None], stats", "x + bias[None], stats", NORM),
    "momentum upside down": (CROSSQ, "keep = self.config.norm_momentum", "keep = 1 - self.config.norm_momentum", MOVED),
    "deviation for a variance": (CROSSQ, "+ (1 - keep) * var, stats", "+ (1 - keep) * batch_std, stats", MOVED),
    "passes are not counted": (CROSSQ, "stats.passes + 1)", "stats.passes)", MOVED),
    "act mode without a mean": (CROSSQ, "x = (x - stats.mean[None]) / std[None]", "x = x / std[None]", ACTS),
    "inputs not normalised": (CROSSQ, "x, layer = BatchRenorm(self.config)(x, layer, train)",
                              "x, layer = BatchRenorm(self.config)(x, layer, train) if moved else (x, layer)", LOSSES),
    "critics share their statistics": (CROSSQ, "in_axes=(None, 0, None)", "in_axes=(None, None, None)", LOSSES),
    "two passes": (CROSSQ, "both, stats = self.critic(obs, action, self.critic_stats, train=True, params=params)",
                   "q, stats = self.critic(batch['obs'], batch['action'], self.critic_stats, train=True, params=params)"
                   "; both = jnp.concatenate([q, self.critic(batch['next_obs'], next_action, self.critic_stats, "
                   "train=True)[0]], axis=1)", LOSSES),
    "joint pass in act mode": (CROSSQ, "self.critic_stats, train=True, params=params)", "self.critic_stats, "
                               "train=False, params=params)", LOSSES),
    "halves swapped": (CROSSQ, "q, next_q = jnp.split(both", "next_q, q = jnp.split(both", LOSSES),
    "gradient through the target": (CROSSQ, "jax.lax.stop_gradient(target)[None]", "target[None]", LOSSES),
    "next action in train mode": (CROSSQ, "return self.actor(obs, self.actor_stats)[0]",
                                  "return self.actor(obs, self.actor_stats, train=True)[0]", LOSSES),
    "the policy's critic in train mode": (CROSSQ, 'self.critic(batch["obs"], action, self.critic_stats)[0]',
                                          'self.critic(batch["obs"], action, self.critic_stats, train=True)[0]',
                                          LOSSES),
    "the policy learns in act mode": (CROSSQ, 'batch["obs"], self.actor_stats, train=True, params',
                                      'batch["obs"], self.actor_stats, params', LOSSES),
    "entropy punished": (CROSSQ, "next_q.min(axis=0) - self", "next_q.min(axis=0) + self", LOSSES),
    "the larger critic": (CROSSQ, "next_q.min(axis=0)", "next_q.max(axis=0)", LOSSES),
    "a termination goes on": (CROSSQ, '(1.0 - batch["terminated"]) * next_v', "next_v", LOSSES),
    "the policy avoids reward": (CROSSQ, "* log_prob - q).mean()", "* log_prob + q).mean()", LOSSES),
    "sign of the temperature": (CROSSQ, "(entropy - target_entropy), ()", "(target_entropy - entropy), ()", LOSSES),
    "critic's statistics do not move": (CROSSQ, "critic=critic, critic_stats=stats, updates", "critic=critic, updates",
                                        ORDER),
    "actor's statistics do not move": (CROSSQ, "actor=actor, actor_stats=stats, temp", "actor=actor, temp", ORDER),
    "the temperature does not move": (CROSSQ, "actor_stats=stats, temperature=temperature)", "actor_stats=stats)",
                                      ORDER),
    "adam_b1 forgotten": (CROSSQ, "optax.adam(config.lr, b1=config.adam_b1)", "optax.adam(config.lr)", ORDER),
    "the policy learns from the old critic": (CROSSQ, "lambda: agent.update_actor(", "lambda: agent.replace(critic="
                                              "self.critic).update_actor(", ORDER),
    "every update moves the actor": (CROSSQ, "agent.updates % self.config.policy_delay == 0", "agent.updates > 0",
                                     DELAY),
    "the actor first": (CROSSQ, "agent.updates % self.config.policy_delay == 0",
                        "self.updates % self.config.policy_delay == 0", DELAY),
    "both branches under vmap": (CROSSQ, "due = any_of(agent.updates", "due = (agent.updates", DELAY),
    "the actor's widths for the critic's": (CROSSQ, "(*self.config.critic_dims, 1)", "(*self.config.hidden_dims, 1)",
                                            STARTS),
    "deviation clipped after use": (CROSSQ, "jnp.clip(log_std, *self.config.log_std_bounds)", "log_std", STARTS),
    "the observation after the reset": (CROSSQ, "next_obs=step.next_obs", "next_obs=step.obs", STORED),
    "a time limit is an end": (CROSSQ, "terminated=step.terminated.astype", "terminated=(step.terminated | step."
                               "truncated).astype", STORED),
    "random steps of every environment": (CROSSQ, "config.random_steps // source.num_envs", "config.random_steps",
                                          WARM),
    "evaluation in units of the network": (CROSSQ, "return (), run.agent.action_space.from_unit(run.agent.policy(obs)."
                                           "mode())", "return (), run.agent.policy(obs).mode()", GREEDY),
    "evaluation samples": (CROSSQ, "run.agent.policy(obs).mode()", "run.agent.policy(obs).sample_and_log_prob(key)[0]",
                           GREEDY),
}

OWN = SMALL | dict(critic_dims=(6, 3), norm_momentum=0.8, renorm_after=1, r_max=1.5, d_max=0.5, adam_b1=0.6)
del OWN["tau"]


def make(env=None, **changes):
    config = crossq.get_config()
    config.update(OWN | changes)
    return Batch(env or Line(), config.num_envs), ml_collections.FrozenConfigDict(config)


def an_agent(config, env):
    """All parameters and statistics differ; renormalisation is on."""
    _, obs = env.reset(jax.random.key(5))
    agent = jax.jit(lambda key: crossq.Agent.create(key, obs, env.action_space, config))(jax.random.key(0))
    noise = np.random.default_rng(0)

    def shake(tree):
        return jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape).astype(np.float32), tree)

    def stats_of(layers):
        return tuple(crossq.Stats(shake(s.mean), 0.5 + 0.3 * jnp.abs(shake(s.var)), s.passes + 1) for s in layers)

    states = {name: getattr(agent, name).replace(params=shake(getattr(agent, name).params))
              for name in ("actor", "critic", "temperature")}
    return agent.replace(**states, actor_stats=stats_of(agent.actor_stats), critic_stats=stats_of(agent.critic_stats))


def renorm(x, stats, params, train, config):
    """One layer by hand: (normalised x, moved statistics)."""
    std = jnp.sqrt(stats.var + 1e-3)
    if not train:
        return params["scale"] * (x - stats.mean) / std + params["bias"], stats
    m, v = x.sum(axis=0) / len(x), ((x - x.mean(axis=0)) ** 2).sum(axis=0) / len(x)
    s = jnp.sqrt(v + 1e-3)
    r = jax.lax.stop_gradient(jnp.minimum(jnp.maximum(s / std, 1 / config.r_max), config.r_max))
    d = jax.lax.stop_gradient(jnp.minimum(jnp.maximum((m - stats.mean) / std, -config.d_max), config.d_max))
    early = stats.passes < config.renorm_after
    r, d = jnp.where(early, 1.0, r), jnp.where(early, 0.0, d)
    mu = config.norm_momentum
    moved = crossq.Stats(mu * stats.mean + (1 - mu) * m, mu * stats.var + (1 - mu) * v, stats.passes + 1)
    return params["scale"] * ((x - m) / s * r + d) + params["bias"], jax.lax.stop_gradient(moved)


def network(params, x, stats, train, config):
    moved = []
    for i, layer in enumerate(stats):
        x, layer = renorm(x, layer, params[f"BatchRenorm_{i}"], train, config)
        moved.append(layer)
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = jnp.maximum(x, 0) if i + 1 < len(stats) else x
    return x, tuple(moved)


def critics(params, obs, action, stats, train, config):
    (stacked,) = params.values()
    pairs = [network(*(jax.tree.map(lambda x, i=i: x[i], tree) for tree in (stacked, jnp.concatenate(
        [obs, action], axis=1)[None].repeat(2, axis=0), stats)), train, config) for i in range(2)]
    return jnp.stack([q[:, 0] for q, _ in pairs]), jax.tree.map(lambda *x: jnp.stack(x), *(s for _, s in pairs))


def policy(params, obs, noise, stats, train, config):
    (layers,) = params.values()
    out, moved = network(layers, obs, stats, train, config)
    mean, log_std = jnp.split(out, 2, axis=1)
    log_std = jnp.minimum(log_std, 2.0)  # as log_std_bounds say
    u = mean + jnp.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.tanh(u), (normal + 2 * jnp.log(jnp.cosh(u))).sum(axis=1), moved


@pytest.fixture
def loose_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


LAYER = dict(scale=jnp.float32([2.0, 0.5, 1.0]), bias=jnp.float32([0.1, -1.0, 0.0]))


def a_layer():
    """Columns whose ratio and shift are within their bounds, above and below them."""
    x = jax.random.normal(jax.random.key(0), (8, 3)) * jnp.float32([[0.9, 9.0, 0.1]]) + jnp.float32([[0.1, 3.0, -3.0]])
    return x, crossq.Stats(jnp.float32([0.1, -0.3, 0.2]), jnp.float32([1.5, 0.7, 1.0]), jnp.int32(1))


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_in_training_a_layer_is_renormalised(passes, loose_ranks):
    """And its gradient by the input: nothing flows through r and d."""
    _, config = make()
    x, stats = a_layer()
    ratio, shift = x.std(axis=0) / np.sqrt(stats.var), (x.mean(axis=0) - stats.mean) / np.sqrt(stats.var)
    assert 0.7 < ratio[0] < 0.9 and 0.1 < shift[0] < 0.45  # within their bounds
    stats, weight = stats._replace(passes=jnp.int32(passes)), jax.random.normal(jax.random.key(1), (8, 3))

    def ours(x):
        return crossq.BatchRenorm(config).apply({"params": LAYER}, x, stats, True)[0]

    def theirs(x):
        return renorm(x, stats, LAYER, True, config)[0]

    for out, expected in zip(*(jax.jit(jax.value_and_grad(lambda x, f=f: (weight * f(x)).sum()))(x) for f in (
            ours, theirs)), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_running_statistics_follow_the_batches(loose_ranks):
    _, config = make()
    x, stats = a_layer()
    moved = crossq.BatchRenorm(config).apply({"params": LAYER}, x, stats, True)[1]
    np.testing.assert_allclose(moved.mean, 0.8 * stats.mean + 0.2 * np.mean(x, axis=0), rtol=1e-5)
    np.testing.assert_allclose(moved.var, 0.8 * stats.var + 0.2 * np.var(x, axis=0), rtol=1e-4)
    assert moved.passes == 2


def test_in_act_mode_a_layer_uses_its_running_statistics(loose_ranks):
    """The output of a row does not depend on the other rows, and nothing moves."""
    _, config = make()
    x, stats = a_layer()
    out, same = crossq.BatchRenorm(config).apply({"params": LAYER}, x, stats, False)
    expected = LAYER["scale"] * (x - stats.mean) / np.sqrt(stats.var + 1e-3) + LAYER["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert_close(same, stats, rtol=0)


def test_losses_and_gradients_are_the_equations(loose_ranks):
    env, config = make()
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)
    noise, alpha = jax.random.normal(jax.random.clone(key), (6, 2)), jnp.exp(agent.temperature.params["log"])
    critic_stats, actor_stats = agent.critic_stats, agent.actor_stats

    def critic_by_hand(params):
        next_action, next_log_prob, _ = policy(agent.actor.params, batch["next_obs"], noise, actor_stats, False, config)
        both, moved = critics(params, jnp.concatenate([batch["obs"], batch["next_obs"]]),
                              jnp.concatenate([batch["action"], next_action]), critic_stats, True, config)
        soft = jax.lax.stop_gradient(jnp.minimum(both[0, 6:], both[1, 6:])) - alpha * next_log_prob
        y = batch["reward"] + 0.9 * jnp.where(batch["terminated"] == 1, 0.0, soft)
        info = dict(q=both[:, :6].mean(), entropy=-next_log_prob.mean())
        return 0.5 * ((both[0, :6] - y) ** 2).mean() + 0.5 * ((both[1, :6] - y) ** 2).mean(), (moved, info)

    def actor_by_hand(params):
        action, log_prob, moved = policy(params, batch["obs"], noise, actor_stats, True, config)
        q, _ = critics(agent.critic.params, batch["obs"], action, critic_stats, False, config)
        return (alpha * log_prob - jnp.minimum(q[0], q[1])).mean(), (moved, -log_prob.mean())

    for loss, by_hand, params in ((agent.critic_loss, critic_by_hand, agent.critic.params),
                                  (agent.actor_loss, actor_by_hand, agent.actor.params)):
        with jax.numpy_rank_promotion("raise"):
            (value, (moved, info)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                params, batch, jax.random.clone(key))
        (expected, (stats, known)), slopes = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        assert_close(moved, stats)
        assert_close(grads, slopes, atol=1e-5)
        if loss == agent.critic_loss:
            np.testing.assert_allclose(info.pop("critic_loss"), value, rtol=1e-6)
        assert_close(info, known)
    value, slope = jax.value_and_grad(lambda params: agent.temperature_loss(params, jnp.float32(0.3))[0])(
        agent.temperature.params)
    np.testing.assert_allclose(value, alpha * (0.3 + 2 * 0.7), rtol=1e-5)
    np.testing.assert_allclose(slope["log"], value, rtol=1e-5)


def test_an_update_takes_its_steps_in_order():
    """Critic, then from the new critic the actor, then the temperature, each by plain Adam."""
    env, config = make(policy_delay=1)
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)
    new, info = jax.jit(agent.update)(batch, jax.random.clone(key))
    critic_key, actor_key = jax.random.split(key)

    def adam(params, loss, *args):
        tx = optax.adam(2e-3, b1=0.6)
        opt_state = tx.init(params)
        grads, info = jax.jit(jax.grad(loss, has_aux=True))(params, *args)
        return optax.apply_updates(params, tx.update(grads, opt_state)[0]), grads, info

    def assert_moved(state, params, grads):
        """A bias before a normalisation has no gradient. Adam makes full steps of what rounding leaves of it."""
        assert_close(state.opt_state[0].mu, jax.tree.map(lambda g: 0.4 * g, grads), rtol=1e-3, atol=1e-5)
        assert_close(*(jax.tree.map(lambda x, g: jnp.where(jnp.abs(g) > 1e-4, x, 0.0), tree, grads)
                       for tree in (state.params, params)))

    critic, grads, (stats, _) = adam(agent.critic.params, agent.critic_loss, batch, critic_key)
    assert_moved(new.critic, critic, grads)
    assert_close(new.critic_stats, stats)
    halfway = agent.replace(critic=new.critic, critic_stats=stats)
    actor, grads, (stats, entropy) = adam(agent.actor.params, halfway.actor_loss, batch, actor_key)
    assert_moved(new.actor, actor, grads)
    assert_close(new.actor_stats, stats)
    temperature, *_ = adam(agent.temperature.params, agent.temperature_loss, entropy)
    assert_close(new.temperature.params, temperature)
    np.testing.assert_allclose(info["temperature"], np.exp(temperature["log"]), rtol=1e-5)
    again = jax.jit(new.update)(batch, jax.random.key(4))[0]  # the first moment has b1 in it
    first, second = (jax.jit(jax.grad(a.critic_loss, has_aux=True))(a.critic.params, batch, k)[0] for a, k in (
        (agent, jax.random.split(jax.random.key(3))[0]), (new, jax.random.split(jax.random.key(4))[0])))
    assert_close(again.critic.opt_state[0].mu, jax.tree.map(lambda a, b: 0.6 * 0.4 * a + 0.4 * b, first, second),
                 rtol=1e-3, atol=1e-5)


def test_the_actor_learns_every_third_time():
    """Under a vmap over seeds, too, and there the other two times cost nothing of it."""
    env, config = make(policy_delay=3)
    agent, batch, calls = an_agent(config, env), a_batch(), []
    agents = jax.tree.map(lambda x: jnp.stack([x, x]), agent)
    update_actor = crossq.Agent.update_actor

    def counted(self, batch, key):
        jax.debug.callback(lambda: calls.append(1))
        return update_actor(self, batch, key)

    with pytest.MonkeyPatch.context() as patch, jax.debug_key_reuse(False):
        patch.setattr(crossq.Agent, "update_actor", counted)
        update = jax.jit(jax.vmap(lambda agent, key: agent.update(batch, key)[0]))
        for i in range(1, 8):
            new = update(agents, jax.random.split(jax.random.key(i), 2))
            jax.block_until_ready(new)
            jax.effects_barrier()
            same = all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (
                (new.actor, new.actor_stats, new.temperature), (agents.actor, agents.actor_stats, agents.temperature))),
                strict=True))
            assert same == (i % 3 > 0) and (len(calls) > 0) == (i % 3 == 0)
            assert (new.updates == i).all()
            agents = new
            calls.clear()


def test_networks_start_as_the_config_says():
    env, config = make(log_std_bounds=(-1.5, 0.5))
    _, obs = env.reset(jax.random.key(5))
    agent = jax.jit(lambda key: crossq.Agent.create(key, obs, env.action_space, config))(jax.random.key(0))
    np.testing.assert_allclose(agent.temperature(), 0.4, rtol=1e-6)
    (critic,), (actor,) = agent.critic.params.values(), agent.actor.params.values()
    assert [critic[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(2, 4, 6), (2, 6, 3), (2, 3, 1)]
    assert [actor[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [(2, 5), (5, 4), (4, 4)]
    for width, layer in zip((4, 6, 3), agent.critic_stats, strict=True):
        np.testing.assert_array_equal(layer.mean, np.zeros((2, width)))
        np.testing.assert_array_equal(layer.var, np.ones((2, width)))
        np.testing.assert_array_equal(layer.passes, [0, 0])
    assert [layer.mean.shape for layer in agent.actor_stats] == [(2,), (5,), (4,)]
    dist = agent.policy(1e4 * jax.random.normal(jax.random.key(1), (50, 2)))
    assert -1.5 <= dist.log_std.min() and dist.log_std.max() == 0.5


@functools.cache
def started():
    env, config = make()
    init_key, key = jax.random.split(jax.random.key(0))
    run = jax.jit(functools.partial(crossq.init, source=env, config=config))(init_key)
    return run, *jax.jit(functools.partial(crossq.train_step, source=env, config=config))(run, key)


def test_what_is_stored_is_what_happened():
    _, run, _ = started()
    data, centre, half = stored(run), np.float32([1, 1]), np.float32([2, 4])
    np.testing.assert_allclose(data["next_obs"], data["obs"] + 0.5 * (centre + half * data["action"]), atol=1e-5)
    falls = np.float32(data["obs"][:3, 0] > 0)
    np.testing.assert_array_equal(data["terminated"][:6], [0, 0, 0, *falls])
    assert set(data["terminated"]) == {0.0, 1.0}


def test_random_steps_come_first_and_count():
    """13 of them in three environments are four each; then two steps in each, and two updates for each of these."""
    run, after, info = started()
    assert run.clock == (12, 0) and run.buffer.size == 12
    assert after.clock == (18, 12) and after.buffer.size == 18
    assert after.agent.updates == after.agent.critic.opt_state[0].count == 12
    assert after.agent.actor.opt_state[0].count == after.agent.temperature.opt_state[0].count == 4
    assert np.isfinite([info[name] for name in ("critic_loss", "q", "entropy", "temperature")]).all()
    mode = run.agent.policy(stored(after)["obs"][12:15]).mode()
    assert (np.abs(stored(after)["action"][12:15] - mode) > 1e-3).all()


def test_acting_is_greedy_in_act_mode_and_in_the_environments_units():
    _, run, _ = started()
    obs = jax.random.normal(jax.random.key(2), (4, 2))
    together = crossq.act(run, (), obs, jax.random.key(0))[1]
    alone = crossq.act(run, (), obs[:1], jax.random.key(1))[1]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-5)  # no batch statistics
    unit = (np.asarray(together) - 1) / np.float32([2, 4])
    np.testing.assert_allclose(unit, run.agent.policy(obs).mode(), rtol=1e-4, atol=1e-5)


def train(env, iterations, **changes):
    sizes = {k: v for k, v in LEARNING.items() if k != "tau"}
    env, config = make(env, **(sizes | dict(critic_dims=(32, 32), norm_momentum=0.9, r_max=3.0, d_max=5.0) | changes))
    init_key, key = jax.random.split(jax.random.key(0))
    step = functools.partial(crossq.train_step, source=env, config=config)
    run = jax.jit(functools.partial(crossq.init, source=env, config=config))(init_key)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(key, iterations))[0]


def test_the_best_action_is_found():
    """Of observations that are a dictionary: the goal itself."""
    run = train(Goals(), 250, policy_delay=2)
    obs = dict(goal=jnp.float32([[-0.4], [0.0], [0.4]]), state=jnp.zeros((3, 2)))
    np.testing.assert_allclose(crossq.act(run, (), obs, None)[1], obs["goal"], atol=0.12)


def test_a_time_limit_is_not_the_end():
    """Reward 1 for ever has the value 1 / (1 − γ) = 2, with next to no temperature."""
    run = train(Chain(True), 500, discount=0.5, init_temperature=1e-4)
    q = run.agent.critic(jnp.zeros((1, 1)), jnp.zeros((1, 1)), run.agent.critic_stats)[0]
    np.testing.assert_allclose(q, 2.0, atol=0.1)


@pytest.mark.parametrize(("space", "words"), [
    (Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_crossq_cannot_act_in(space, words):
    env, config = make(Line(action_space=space))
    with pytest.raises(UserError, match=f"crossq cannot act in .* which has {words}"):
        crossq.init(jax.random.key(0), env, config)
