"""iCEM online: plan through a model that goes on learning within the episode, by whatever moves whichever weights.

    y = (x' − x) / σ = g(θ; z) + v,  v ~ N(0, R)      z = standardised (features of x, u), σ scale of changes    predict
      model="mlp"           g a network, pretrained or not
      model="residual"      g = (f(x, u) − x) / σ + network, f the nominal physics
      model="physics"       g = (f(θ; x, u) − x) / σ, θ the environment's hidden Params

    θ, what moves; the other weights stay                                                                       placed
      adapt="all"           every weight
      adapt="last_layer"    those of the last layer, in which g is linear
      adapt="lora_xs"       A of every W + U_r S_r A V_r', W = U S V' (LoRA-XS, Bałazy et al., 2024, arXiv:2405.17604)
      adapt="tiny_lora"     v of A = Σ_k v_k P_k, each P_k random and fixed

    after every step, θ moves to                                                                                 learn
      learner="none"        itself;  "oracle": itself, but plans are made with the truth
      learner="gradient"    where `num_updates` steps of Adam on |y − g|² over the last `window` transitions lead
      learner="ekf"         the mean of N(m, P) given the newest transition (core.ekf: belief=full, diagonal, low_rank)
                            where before it P <- (P + drift_var I) / forgetting;  noise_rate > 0 adapts R and drift_var
      learner="refit"       the mean of the prior given the last `window` transitions

On the last layer, with a full belief, "ekf" is exact Bayesian linear regression, and recursive least squares where it
forgets. Every episode starts from the pretrained weights. The plan is certainty equivalent: iCEM (core.planning) on
x + σ g(m; z), with the environment's cost, which is known.

Pretraining is Adam on |y − g|², by launchers.pretrain from what launchers.collect stored.

Expect: configs/adapt_cartpole.py, 99% of what a jump of the constants costs a frozen model won back within 50 steps.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core import ekf, planning
from core.dataset import read_arrays
from core.envs.batch import where
from core.errors import check_choices
from core.networks import MLP
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",
        env_kwargs=dict(),  # its own settings
        num_envs=1,  # each with its own truth, weights and plan
        num_steps=1,  # of the episode in one train_step, always
        env_steps=200,
        eval_every=5,
        eval_steps=0,  # of an episode with the weights of the moment, at every evaluation: `goal_cost`
        eval_env_kwargs=dict(),  # settings that differ in it
        model="mlp",  # or residual, physics
        hidden=(64, 64),
        pretrained="",  # file of weights; none: as they are drawn
        adapt="last_layer",  # or all, lora_xs, tiny_lora
        lora_rank=8,  # r
        lora_size=16,  # of v
        learner="ekf",  # or none, oracle, gradient, refit
        belief="full",  # or diagonal, low_rank
        belief_rank=8,  # of low_rank
        prior_var=0.1,  # P_0 = prior_var · I
        obs_var=1e-3,  # R = obs_var · I
        num_linearizations=1,  # of g in one update; physics is so curved that it takes 4
        forgetting=1.0,
        drift_var=0.0,
        noise_rate=0.0,
        window=50,
        num_updates=5,
        lr=1e-3,
        horizon=25,
        num_samples=40,
        num_elites=10,
        num_iterations=3,
        population_decay=1.25,  # of iCEM, from iteration to iteration
        kept_elites=3,
        init_std=0.5,  # of the box
        noise_beta=2.0,
        action_noise=0.0,  # standard deviation of what is added to the plan's action, in half widths of the box
        collect=dict(episodes=20, num_envs=10, learner="oracle", action_noise=0.3),  # else as above
        pretrain=dict(num_updates=10_000, batch_size=64, lr=1e-3, holdout=0.2),
    ))


class Model(struct.PyTreeNode):
    """What pretraining makes."""

    dynamics: TrainState
    scaling: dict  # centre (I,) and spread (I,) of z, scale (D,) of changes

    @property
    def params(self):
        return dict(weights=self.dynamics.params, scaling=self.scaling)


def pretrain_init(key, data, env, config):
    """`data`: transitions (N, …), to which z and changes are scaled."""
    z, change = inputs(data["obs"], data["action"], env), data["next_obs"] - data["obs"]
    spread, scale = (jnp.where(std < 1e-6, 1.0, std) for std in (z.std(0), change.std(0)))
    tx = optax.adam(optax.cosine_decay_schedule(config.pretrain.lr, config.pretrain.num_updates))
    return Model(TrainState.create(network(config, scale), key, z[0], tx=tx),
                 dict(centre=z.mean(0), spread=spread, scale=scale))


def pretrain_step(model, key, data, env, config):
    index = jax.random.randint(key, (config.pretrain.batch_size,), 0, len(data["obs"]))
    batch = jax.tree.map(lambda v: v[index], data)

    def loss_fn(weights):
        loss = jnp.square(errors(model.params | {"weights": weights}, batch, env, config)).sum(-1).mean()
        return loss, {"loss": loss}

    dynamics, info = model.dynamics.minimize(loss_fn)
    return model.replace(dynamics=dynamics), info


def pretrain_test(model, data, env, config):
    return {"error": jnp.sqrt(jnp.square(errors(model.params, data, env, config)).mean())}


def network(config, x):
    return MLP((*config.hidden, x.size), activation=nn.tanh)


def inputs(x, action, env):
    """(..., D) and (..., A): of angles their sine and cosine, if the environment says so."""
    features = getattr(env.env, "features", lambda x: x)
    return jnp.concatenate([features(x), action], axis=-1)


def predict(params, x, action, env, config):
    """The next x of (D,) and (A,): x + σ g."""
    weights, scaling = params["weights"], params["scaling"]
    if config.model == "physics":
        return env.env.dynamics(weights, x, action)
    z = (inputs(x, action, env) - scaling["centre"]) / scaling["spread"]
    nominal = env.env.dynamics(env.env.guess, x, action) if config.model == "residual" else x
    return nominal + scaling["scale"] * network(config, x).apply({"params": weights}, z)


def error(params, seen, env, config):
    """g − y of one transition: (D,)."""
    return (predict(params, seen["obs"], seen["action"], env, config) - seen["next_obs"]) / params["scaling"]["scale"]


def errors(params, seen, env, config):
    """The same of transitions (N, …): (N, D)."""
    return jax.vmap(functools.partial(error, env=env, config=config), (None, 0))(params, seen)


class Fixed(NamedTuple):
    """What does not move within an episode."""

    params: dict  # weights and scaling
    bases: dict  # of every layer: U_r S_r (I, r), V_r' (r, O), P (K, r, r)


def fixed_part(key, env, config):
    _, obs = jax.eval_shape(env.reset, jax.random.key(0))
    x, (net_key, *keys) = jnp.zeros(obs.shape[1:]), jax.random.split(key, 2 + len(config.hidden))
    z, bases = inputs(x, jnp.zeros(env.action_space.shape), env), {}
    scaling = dict(centre=jnp.zeros_like(z), spread=jnp.ones_like(z), scale=jnp.ones_like(x))
    if config.model == "physics":
        return Fixed(dict(weights=env.env.guess, scaling=scaling), bases)
    params = dict(weights=network(config, x).init(net_key, z)["params"], scaling=scaling)
    if config.pretrained:
        params = jax.tree.map(jnp.asarray, read_arrays(config.pretrained))
    layers = params["weights"].items() if "lora" in config.adapt else ()
    for key, (name, layer) in zip(keys, layers, strict=False):
        U, S, Vt = jnp.linalg.svd(layer["kernel"], full_matrices=False)
        r = min(config.lora_rank, S.size)
        bases[name] = (U * S[None])[:, :r], Vt[:r], jax.random.normal(key, (config.lora_size, r, r)) / r
    return Fixed(params, bases)


def start_of(fixed, config):
    """θ at the start of an episode, a tree."""
    weights, last = fixed.params["weights"], f"Dense_{len(config.hidden)}"
    if config.adapt == "all":
        return weights
    if config.adapt == "last_layer":
        return {last: weights[last]}
    return {k: jnp.zeros(P.shape[:1] if config.adapt == "tiny_lora" else P.shape[1:])
            for k, (_, _, P) in fixed.bases.items()}


def placed(theta, fixed, config):
    """The params, θ among their weights."""
    if config.adapt == "all":
        return fixed.params | {"weights": theta}
    weights = dict(fixed.params["weights"])
    for name, value in theta.items():
        if config.adapt == "last_layer":
            weights[name] = value
            continue
        left, right, P = fixed.bases[name]
        A = jnp.einsum("k,kij->ij", value, P) if config.adapt == "tiny_lora" else value
        weights[name] = {**weights[name], "kernel": weights[name]["kernel"] + left @ A @ right}
    return fixed.params | {"weights": weights}


class Mind(NamedTuple):
    """What learning within an episode remembers, of one environment."""

    belief: ekf.Belief  # about θ
    R: jax.Array  # (D,)
    drift_var: jax.Array
    opt_state: Any
    window: dict  # the last transitions (W, …), the newest last
    known: jax.Array  # (W,), whether there was one


def prior(fixed, env, config):
    """The mind at the start of an episode."""
    theta, scale = start_of(fixed, config), fixed.params["scaling"]["scale"]
    if config.learner not in ("ekf", "refit"):
        belief = ekf.Diagonal.create(theta, 0.0)
    elif config.belief == "low_rank":
        belief = ekf.LowRank.create(theta, config.prior_var, config.belief_rank)
    else:
        belief = (ekf.Full if config.belief == "full" else ekf.Diagonal).create(theta, config.prior_var)
    state, action = (jnp.zeros((config.window, *shape)) for shape in (scale.shape, env.action_space.shape))
    return Mind(belief, jnp.full_like(scale, config.obs_var), jnp.float32(config.drift_var),
                optax.adam(config.lr).init(belief.mean), dict(obs=state, action=action, next_obs=state),
                jnp.zeros(config.window, bool))


def learn(mind, seen, fixed, env, config):
    """The mind after one more transition, and how well it had foreseen that."""
    def missed(theta, seen):
        return error(placed(theta, fixed, config), seen, env, config)

    def absorb(belief, seen, R):  # that g + v − y was 0
        h = functools.partial(missed, seen=seen)
        return ekf.update(belief, h, jnp.zeros_like(R), R, config.num_linearizations)

    window = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), mind.window, seen)
    mind = mind._replace(window=window, known=jnp.append(mind.known[1:], True))
    before = mind.belief.predict(noise=mind.drift_var) if config.learner == "ekf" else mind.belief
    if config.learner == "ekf" and config.forgetting < 1:  # up to ten times the prior, where nothing is learnt
        before = before.forget(config.forgetting, 10 * config.prior_var * before.mean.size)
    after, info = absorb(before, seen, mind.R)
    if config.learner == "ekf":
        mind = mind._replace(belief=after)
    if config.learner == "ekf" and config.noise_rate:
        h = functools.partial(missed, seen=seen)
        mind = mind._replace(R=ekf.adapt_R(mind.R, after, h, jnp.zeros_like(mind.R), config.noise_rate),
                             drift_var=ekf.adapt_noise(mind.drift_var, before, after, config.noise_rate))
    if config.learner == "refit":
        R = mind.R[None] + jnp.where(mind.known, 0.0, jnp.inf)[:, None]
        start = prior(fixed, env, config).belief
        belief, _ = jax.lax.scan(lambda belief, row: (absorb(belief, *row)[0], None), start, (window, R))
        mind = mind._replace(belief=belief)
    if config.learner == "gradient":
        mind = descend(mind, fixed, env, config)
    return mind, dict(error=jnp.sqrt(jnp.square(info.innovation).mean()), nll=-info.log_lik, nis=info.nis,
                      covered=info.nis < ekf.nis_band(mind.R.size, 1, 0.9)[1])  # as are 95% of right ones


def descend(mind, fixed, env, config):
    def loss(mean):
        miss = errors(placed(mind.belief.unravel(mean), fixed, config), mind.window, env, config)
        return jnp.square(miss).sum(-1).mean(where=mind.known)

    def update(state, _):
        mean, opt_state = state
        updates, opt_state = optax.adam(config.lr).update(jax.grad(loss)(mean), opt_state)
        return (mean + updates, opt_state), None

    start = mind.belief.mean, mind.opt_state
    (mean, opt_state), _ = jax.lax.scan(update, start, None, length=config.num_updates)
    return mind._replace(belief=mind.belief.replace(mean=mean), opt_state=opt_state)


def decide(key, mind, plan, x, truth, fixed, env, config):
    """The next action, and what the next search starts from. One environment."""
    params, single = placed(mind.belief.params, fixed, config), env.env

    def dynamics(x, action):
        known = config.learner == "oracle"
        return single.dynamics(truth, x, action) if known else predict(params, x, action, env, config)

    cost = functools.partial(planning.trajectory_cost, dynamics, single.cost, single.terminal_cost, x)
    exact = config.learner == "oracle" or config.model == "physics"  # the best plan is best at fooling a network
    plan, action, _ = planning.icem(
        key, cost, plan, *env.action_space.bounds, num_samples=config.num_samples, num_elites=config.num_elites,
        num_iterations=config.num_iterations, init_std=config.init_std, noise_beta=config.noise_beta,
        decay=config.population_decay, return_mode="best" if exact else "mean")
    return plan, action


class Run(NamedTuple):
    fixed: Fixed
    mind: Mind  # (E, …)
    plan: planning.Carry  # (E, …)
    env_state: Any
    obs: jax.Array
    last: dict  # the newest transition, (E, …)
    score: jax.Array  # (E,), return of the episode so far


def init(key, env, config):
    check_choices(config, model=("mlp", "residual", "physics"), adapt=("all", "last_layer", "lora_xs", "tiny_lora"),
                  learner=("none", "oracle", "gradient", "ekf", "refit"), belief=("full", "diagonal", "low_rank"))
    fixed_key, env_key = jax.random.split(key)
    fixed = fixed_part(fixed_key, env, config)
    mind, _ = fresh(fixed, env, config)
    return start(env_key, fixed, mind, env, config)


def start(key, fixed, mind, env, config):
    """A run at the start of an episode."""
    (env_state, obs), (_, plan) = env.reset(key), fresh(fixed, env, config)
    no, action = jnp.zeros(env.num_envs, bool), jnp.zeros((env.num_envs, *env.action_space.shape))
    last = dict(obs=obs, action=action, next_obs=obs, reward=1.0 * no, terminated=no, truncated=no)
    return Run(fixed, mind, plan, env_state, obs, last, 0.0 * last["reward"])


def fresh(fixed, env, config):
    """Mind and plan at the start of an episode, (E, …)."""
    plan = planning.initial_carry(*env.action_space.bounds, config.horizon, config.kept_elites)
    first = prior(fixed, env, config), plan
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (env.num_envs, *leaf.shape)), first)


def train_step(run, key, env, config):
    """One step of every environment: plan, act, observe, learn."""
    run = interact(run, key, env, config)
    seen = {name: run.last[name] for name in ("obs", "action", "next_obs")}
    mind, info = jax.vmap(functools.partial(learn, fixed=run.fixed, env=env, config=config))(run.mind, seen)
    first = fresh(run.fixed, env, config)
    mind, plan = jax.tree.map(functools.partial(where, over(run.last)), first, (mind, run.plan))
    return run._replace(mind=mind, plan=plan), jax.tree.map(jnp.mean, info | {"reward": run.last["reward"]})


def interact(run, key, env, config):
    """The run after one step of which nothing is learnt."""
    plan_key, noise_key, env_key = jax.random.split(key, 3)
    truth = run.env_state.env.params if config.learner == "oracle" else None
    choose = functools.partial(decide, fixed=run.fixed, env=env, config=config)
    plan, action = jax.vmap(choose)(jax.random.split(plan_key, env.num_envs), run.mind, run.plan, run.obs, truth)
    half = (env.action_space.bounds[1] - env.action_space.bounds[0])[None] / 2
    noise = config.action_noise * half * jax.random.normal(noise_key, action.shape)
    action = env.action_space.clip(action + noise)
    env_state, step = env.step(env_key, run.env_state, action)
    score = jnp.where(over(run.last), 0.0, run.score) + step.reward
    last = dict(obs=run.obs, action=action, next_obs=step.next_obs, reward=step.reward, terminated=step.terminated,
                truncated=step.truncated)
    return run._replace(plan=plan, env_state=env_state, obs=step.obs, last=last, score=score)


def over(last):
    return last["terminated"] | last["truncated"]


def measure(run, key, env, config):
    """The return of the episode so far and, with `eval_steps`, the cost of another with the weights of now."""
    if not config.eval_steps:
        return {"return": run.score.mean()}
    reset_key, key = jax.random.split(key)
    other = start(reset_key, run.fixed, run.mind, env, config)
    keys = jax.random.split(key, config.eval_steps)
    other, _ = jax.lax.scan(lambda run, key: (interact(run, key, env, config), None), other, keys)
    return {"return": run.score.mean(), "goal_cost": -other.score.mean()}
