import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import ppo
from core.envs import Box
from core.evaluation import evaluate
from tests import probes

PPO = "algorithms/ppo.py"
LOSS = "test_loss_is_the_equation"
UPDATE = "test_update_is_clipped_annealed_adam_over_every_sample"
FROZEN = "test_statistics_are_frozen_for_rollout_loss_and_evaluation"
GREEDY = "test_evaluation_is_greedy_and_normalised"
LIMIT = "test_a_time_limit_is_not_the_end"
CHAIN = "test_values_of_a_chain"
EPOCH = "test_every_epoch_sees_every_sample_once"
SCALED = "test_rewards_are_scaled_for_learning_and_raw_in_the_statistics"
SUCCESSOR = "test_the_first_update_bootstraps_from_the_true_successor"
PLANTED_ERRORS = {  # and the test that has to notice
    "policy gradient reversed": (PPO, "actor_loss = -jnp.minimum", "actor_loss = jnp.minimum", LOSS),
    "ratio upside down": (PPO, 'dist.log_prob(batch["action"]) - batch["log_prob"]',
                          'batch["log_prob"] - dist.log_prob(batch["action"])', LOSS),
    "a schedule too short": (PPO, "// batch * config.num_epochs * config.num_minibatches",
                             "// batch * config.num_epochs", UPDATE),
    "no gradient through the entropy": (PPO, "entropy = dist.entropy().mean()",
                                        "entropy = self.actor_critic(batch['obs'], method='actor').entropy().mean()",
                                        LOSS),
    "the critic sees raw observations": (PPO, "flat = normalize(run, obs).reshape(", "flat = obs.reshape(",
                                         "test_the_critic_sees_normalised_observations"),
    "standard deviation not in units of the box": (PPO, "half * jnp.exp(self.log_std)[None])",
                                                   "jnp.exp(self.log_std)[None] + 0 * half)", LOSS),
    "mean not in units of the box": (PPO, "centre + half * out, half", "out, half", LOSS),
    "initial deviation for its logarithm": (PPO, "constant(jnp.log(self.init_std))", "constant(self.init_std)", LOSS),
    "updates of one epoch counted": (PPO, "config.num_envs * config.num_steps, config.num_epochs * config.num_minib",
                                     "config.num_envs * config.num_steps, config.num_minib",
                                     "test_the_clock_counts_what_was_taken"),
    "a first-order approximation of KL": (PPO, "(ratio - 1 - log_ratio).mean()", "(-log_ratio).mean()", LOSS),
    "another discount for the scale of rewards": (
        PPO, "update(reward, ended(step), config.discount))", "update(reward, ended(step), config.gae_lambda))",
        SCALED),
    "max for min": (PPO, "-jnp.minimum(ratio", "-jnp.maximum(ratio", LOSS),
    "ratio not clipped": (PPO, "jnp.clip(ratio, 1 - self.config.clip, 1 + self.config.clip)", "ratio", LOSS),
    "value not clipped": (PPO, 'jnp.clip(value - batch["value"], -self.config.clip, self.config.clip)',
                          'value - batch["value"]', LOSS),
    "half of the value loss lost": (PPO, "value_loss = 0.5 * jnp", "value_loss = jnp", LOSS),
    "entropy punished": (PPO, "- self.config.entropy_coef * entropy", "+ self.config.entropy_coef * entropy", LOSS),
    "advantages not standardised": (PPO, ' / (batch["advantage"].std() + 1e-8)', "", LOSS),
    "target forgets the value": (PPO, 'target = batch["advantage"] + batch["value"]',
                                 'target = batch["advantage"]', LOSS),
    "successor is the reset observation": (PPO, "critic(run, step.next_obs)", "critic(run, step.obs)", SUCCESSOR),
    "time limit as termination": (PPO, "step.terminated, step.truncated, config.discount",
                                  "step.terminated | step.truncated, step.truncated, config.discount", LIMIT),
    "termination as time limit": (PPO, "step.terminated, step.truncated, config.discount",
                                  "step.truncated, step.terminated, config.discount", CHAIN),
    "log-probability of the wrong action": (PPO, "dist.log_prob(action), step)",
                                            "dist.log_prob(dist.mode()), step)", FROZEN),
    "observation after the step": (PPO, "(run.obs, action, dist", "(step.obs, action, dist", CHAIN),
    "learning rate stays": (PPO, "optax.linear_schedule(config.lr, 0.0, updates) if config.anneal_lr else config.lr",
                            "config.lr", UPDATE),
    "gradients not clipped": (PPO, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()", UPDATE),
    "clipped elementwise": (PPO, "optax.clip_by_global_norm(config.max_grad_norm)",
                            "optax.clip(config.max_grad_norm)", UPDATE),
    "one epoch only": (PPO, "jax.random.split(key, self.config.num_epochs)", "jax.random.split(key, 1)", UPDATE),
    "same minibatch every time": (PPO, "lambda x: x[index], batch", "lambda x: x[: index.shape[0]], batch", EPOCH),
    "statistics move during the rollout": (PPO, "batch = dict(obs=normalize(run, obs)",
                                           "batch = dict(obs=run.obs_stats.update(obs)(obs)", FROZEN),
    "evaluation sees raw observations": (PPO, "return (), run.agent.actor_critic(normalize(run, obs), ",
                                         "return (), run.agent.actor_critic(obs, ", GREEDY),
    "raw rewards learnt from": (PPO, "reward = run.reward_scale(reward)", "reward = reward", SCALED),
    "statistics never updated": (PPO, "run = run._replace(obs_stats=run.obs_stats.update(obs))", "run = run", FROZEN),
    "evaluation samples": (PPO, 'method="actor").mode()', 'method="actor").sample(seed=key)', GREEDY),
}

CONFIG = dict(num_envs=8, num_steps=16, env_steps=8 * 16 * 150, hidden_dims=(16, 16), lr=1e-2)


def make_config(**changes):
    config = ppo.get_config()
    config.update(CONFIG)
    config.update(changes)
    return ml_collections.FrozenConfigDict(config)


def train(env, config, iterations=None, seed=0):
    env = probes.batch(env, config.num_envs)
    init_key, key = jax.random.split(jax.random.key(seed))
    run = ppo.init(init_key, env, config)
    iterations = config.env_steps // (config.num_envs * config.num_steps) if iterations is None else iterations
    step = functools.partial(ppo.train_step, source=env, config=config)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(key, iterations))


@pytest.fixture
def loose_ranks():
    with jax.numpy_rank_promotion("allow"):  # distrax broadcasts where it samples
        yield


pytestmark = pytest.mark.usefixtures("loose_ranks")


def test_continuous_actions_find_the_target():
    run, _ = train(probes.Target(), make_config())
    np.testing.assert_allclose(ppo.act(run, (), jnp.zeros((1, 1)), None)[1], 0.5, atol=0.05)


def test_discrete_actions_and_their_value():
    run, _ = train(probes.Match(), make_config())
    obs = jnp.array([[-1.0], [1.0]])
    np.testing.assert_array_equal(ppo.act(run, (), obs, None)[1], [0, 1])
    np.testing.assert_allclose(run.agent.actor_critic(obs, method="critic"), 1.0, atol=0.1)


def test_values_of_a_chain():
    run, _ = train(probes.Chain(), make_config(discount=0.5))
    obs = jnp.array([[0.0], [1.0]])
    np.testing.assert_allclose(run.agent.actor_critic(obs, method="critic"), [0.5, 1.0], atol=0.05)


def test_a_time_limit_is_not_the_end():
    """Reward 1 for ever has the value 1 / (1 − γ), also right before the limit."""
    run, _ = train(probes.Clock(), make_config(discount=0.5, gae_lambda=0.5))
    value = run.agent.actor_critic(jnp.array([[0.0], [1.0], [2.0]]), method="critic")
    np.testing.assert_allclose(value, 2.0, atol=0.1)


def test_the_first_update_bootstraps_from_the_true_successor():
    """Then V is still V_old, and the value loss is ½ E[A²]: A by hand, from the critic's opinion of next_obs."""
    config, env = make_config(num_epochs=1, num_minibatches=1, discount=0.9), probes.batch(probes.Clock())
    run, key = ppo.init(jax.random.key(0), env, config), jax.random.key(1)
    _, info = ppo.train_step(run, key, env, config)
    _, (obs, _, _, step) = ppo.rollout(run, jax.random.split(jax.random.clone(key))[0], env, config)
    value, next_value = (np.asarray(ppo.critic(run, x), np.float64) for x in (obs, step.next_obs))
    advantage, later = np.zeros(value.shape), 0.0
    for t in reversed(range(len(value))):
        later = 1.0 + 0.9 * next_value[t] - value[t] + 0.9 * 0.95 * (1.0 - np.asarray(step.truncated[t])) * later
        advantage[t] = later
    np.testing.assert_allclose(info["value_loss"], 0.5 * np.mean(advantage**2), rtol=1e-4)


def a_batch(agent, space):
    keys = jax.random.split(jax.random.key(1), 5)
    obs = jax.random.normal(keys[0], (32, 1))
    action = space.sample(keys[1], (32,))
    log_prob = agent.actor_critic(obs, method="actor").log_prob(action) + 0.3 * jax.random.normal(keys[2], (32,))
    value, advantage = jax.random.normal(keys[3], (2, 32))
    return dict(obs=obs, action=action, log_prob=log_prob, value=value, advantage=advantage)


def mlp(params, x):
    """The network by hand, in float64."""
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.tanh(x) if i + 1 < len(layers) else x
    return x


WIDE = probes.Target(action_space=Box((-1.0,), (5.0,)))  # of centre 2 and half width 3


@pytest.mark.parametrize("env", [probes.Match(), WIDE], ids=["discrete", "continuous"])
def test_loss_is_the_equation(env):
    """And its gradient, by finite differences of the equation, in the direction of every parameter at once."""
    config = make_config(value_coef=0.7, entropy_coef=0.03, clip=0.15, init_std=0.4)
    agent = ppo.init(jax.random.key(0), probes.batch(env), config).agent
    raw = a_batch(agent, env.action_space)
    params, direction = agent.actor_critic.params, jax.tree.map(jnp.ones_like, agent.actor_critic.params)
    loss, info = agent.loss(params, raw)
    expected, ratio = by_hand(params, raw)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(info["clipped"], np.mean(np.abs(ratio - 1) > 0.15), rtol=1e-5)
    np.testing.assert_allclose(info["approx_kl"], np.mean(ratio - 1 - np.log(ratio)), rtol=1e-3)
    slope = jax.jvp(lambda params: agent.loss(params, raw)[0], (params,), (direction,))[1]
    ends = [by_hand(jax.tree.map(lambda x, h=h: np.asarray(x, np.float64) + h, params), raw)[0] for h in (-1e-6, 1e-6)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-3, atol=1e-5)


def by_hand(params, raw):
    """(loss, ratio) of the docstring's equations."""
    batch = {k: np.asarray(v, np.float64) for k, v in raw.items()}
    out, v = mlp(params["policy"], batch["obs"]), mlp(params["value"], batch["obs"])[:, 0]
    if "log_std" not in params:
        p = np.exp(out) / np.exp(out).sum(-1, keepdims=True)
        log_prob = np.log(p[np.arange(32), raw["action"]])
        entropy = -(p * np.log(p)).sum(-1).mean()
    else:
        assert np.allclose(params["log_std"], np.log(0.4), atol=1e-4)
        mean, std = 2 + 3 * out[:, 0], 3 * np.exp(np.asarray(params["log_std"], np.float64))[0]
        log_prob = -0.5 * ((batch["action"][:, 0] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        entropy = 0.5 * np.log(2 * np.pi * np.e) + np.log(std)
    ratio = np.exp(log_prob - batch["log_prob"])
    a = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
    actor = -np.mean([min(r * x, np.clip(r, 0.85, 1.15) * x) for r, x in zip(ratio, a, strict=True)])
    g, old = batch["advantage"] + batch["value"], batch["value"]
    value = 0.5 * np.mean(np.maximum((v - g) ** 2, (old + np.clip(v - old, -0.15, 0.15) - g) ** 2))
    return actor + 0.7 * value - 0.03 * entropy, ratio


def test_the_critic_sees_normalised_observations():
    config = make_config(normalize_obs=True)
    run = ppo.init(jax.random.key(0), probes.batch(probes.Match()), config)
    run = run._replace(obs_stats=run.obs_stats.replace(mean=jnp.full(1, 3.0), var=jnp.full(1, 4.0)))
    obs = jnp.linspace(-1, 1, 6).reshape(2, 3, 1)
    value = mlp(run.agent.actor_critic.params["value"], (np.asarray(obs, np.float64) - 3) / 2)[..., 0]
    np.testing.assert_allclose(ppo.critic(run, obs), value, rtol=1e-4, atol=1e-5)


def test_the_clock_counts_what_was_taken():
    run, _ = train(probes.Match(), make_config(num_epochs=3, num_minibatches=2), iterations=5)
    assert run.clock.env_steps == 5 * 8 * 16 and run.clock.updates == 5 * 3 * 2


def test_the_explained_variance_is_that_of_the_targets():
    """With γ = 0 the target is the reward, and what is not explained is the error of V."""
    config = make_config(discount=0.0)
    env = probes.batch(probes.Match())
    run, key = ppo.init(jax.random.key(0), env, config), jax.random.key(1)
    _, info = ppo.train_step(run, key, env, config)
    _, (obs, _, _, step) = ppo.rollout(run, jax.random.split(jax.random.clone(key))[0], env, config)
    error = np.asarray(step.reward) - np.asarray(ppo.critic(run, obs))
    np.testing.assert_allclose(info["explained_variance"], 1 - error.var() / np.asarray(step.reward).var(), rtol=1e-3)


def agent_of(config):
    return ppo.init(jax.random.key(0), probes.batch(probes.Match()), config).agent


def lr_at_the_end(tx, updates):
    """How far the update after so many moves a parameter."""
    params = jnp.ones(3)
    state = tx.init(params)
    step = jax.jit(lambda state: tx.update(params, state, params))
    for _ in range(updates):
        _, state = step(state)
    return float(jnp.abs(step(state)[0]).max())


def test_update_is_clipped_annealed_adam_over_every_sample():
    """One minibatch an epoch, so the order does not matter: the same steps by hand, on unflattened parameters."""
    config = make_config(num_epochs=3, num_minibatches=1, env_steps=128 * 2, max_grad_norm=0.05)
    longer = make_config(num_epochs=3, num_minibatches=4, env_steps=128 * 2)
    rates = [agent_of(c).actor_critic.tx for c in (config, longer)]
    assert all(lr_at_the_end(tx, n) < 1e-8 < lr_at_the_end(tx, n - 1) for tx, n in zip(rates, (6, 24), strict=True))
    agent = ppo.init(jax.random.key(0), probes.batch(probes.Match()), config).agent
    batch = a_batch(agent, probes.Match().action_space)
    new, _ = agent.update(batch, jax.random.key(1))
    schedule = optax.linear_schedule(config.lr, 0.0, 6)
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(schedule, eps=1e-5))
    params, state = agent.actor_critic.params, tx.init(agent.actor_critic.params)
    for _ in range(3):
        grads = jax.grad(agent.loss, has_aux=True)(params, batch)[0]
        assert sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)) > 0.05**2
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new.actor_critic.params, params)


def test_every_epoch_sees_every_sample_once():
    """With γ irrelevant and a loss that is linear in the sample's index, minibatches add up to the whole."""
    config = make_config(num_epochs=1, num_minibatches=4, lr=0.0)
    agent = ppo.init(jax.random.key(0), probes.batch(probes.Match()), config).agent
    batch = a_batch(agent, probes.Match().action_space)
    _, info = agent.update(batch, jax.random.key(1))
    _, whole = agent.loss(agent.actor_critic.params, batch)
    np.testing.assert_allclose(info["value_loss"], whole["value_loss"], rtol=1e-5)
    np.testing.assert_allclose(info["clipped"], whole["clipped"], rtol=1e-5)


def test_statistics_are_frozen_for_rollout_loss_and_evaluation():
    """In the first epoch of any iteration the ratio is exactly 1, whatever the statistics are about to become."""
    config = make_config(normalize_obs=True, num_epochs=1, num_minibatches=1)
    run, info = train(probes.Clock(), config, iterations=3)
    np.testing.assert_array_equal(info["clipped"], 0.0)
    np.testing.assert_allclose(info["actor_loss"], 0.0, atol=1e-5)
    assert run.obs_stats.count > 3 * 127 and run.obs_stats.mean[0] == pytest.approx(1.0, abs=0.05)
    obs = jnp.array([[5.0]])
    greedy = run.agent.actor_critic(run.obs_stats(obs), method="actor").mode()
    np.testing.assert_array_equal(ppo.act(run, (), obs, None)[1], greedy)


def test_evaluation_is_greedy_and_normalised():
    config = make_config(normalize_obs=True, env_steps=8 * 16 * 40)
    run, _ = train(probes.Target(), config)
    stats = run.obs_stats.replace(mean=jnp.full(1, 3.0))
    obs, run = jnp.zeros((4, 1)), run._replace(obs_stats=stats)
    action = ppo.act(run, (), obs, jax.random.key(0))[1]
    np.testing.assert_allclose(action, run.agent.actor_critic(stats(obs), method="actor").mode())
    returns, length = evaluate(functools.partial(ppo.act, run), probes.batch(probes.Target(), 4), jax.random.key(0))
    np.testing.assert_allclose(returns, -jnp.square(action[:, 0] - 0.5), rtol=1e-5)
    np.testing.assert_array_equal(length, 1)


def test_rewards_are_scaled_for_learning_and_raw_in_the_statistics():
    config = make_config(normalize_reward=True, discount=0.5)
    run, info = train(probes.Chain(), config)
    std = np.sqrt(run.reward_scale.stats.var)
    assert std == pytest.approx(0.5, abs=0.02)  # discounted returns 0 and 1, half of each
    value = run.agent.actor_critic(jnp.array([[0.0], [1.0]]), method="critic")
    np.testing.assert_allclose(value * std, [0.5, 1.0], atol=0.06)
    np.testing.assert_array_equal(info["episode"]["return"], info["episode"]["count"])


def test_seeds_under_vmap_match_seeds_alone():
    config, env = make_config(), probes.batch(probes.Match())

    def params(key):
        init_key, key = jax.random.split(key)
        step = functools.partial(ppo.train_step, source=env, config=config)
        run = jax.lax.scan(step, ppo.init(init_key, env, config), jax.random.split(key, 3))[0]
        return run.agent.actor_critic.params

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(params))(keys), jax.jit(params)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5), together, alone)


def test_train_step_is_traced_once():
    config, env, traces = make_config(), probes.batch(probes.Match()), []

    @jax.jit
    def step(run, key):
        traces.append(1)
        return ppo.train_step(run, key, env, config)

    run = ppo.init(jax.random.key(0), env, config)
    for i in range(3):
        run, _ = step(run, jax.random.key(i))
    assert len(traces) == 1
