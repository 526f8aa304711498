"""Film fresh episodes of a run or of one of its checkpoints: a GIF or an MP4, by the ending of --out.

    python -m launchers.visualize --run=runs/x --out=episode.gif
    python -m launchers.visualize --run=runs/x --out=x.mp4 --seed_index=3 --episodes=4 --set=max_steps=100

Where a policy has a Gaussian belief about the environment's hidden truth, and a plan, the film shows both: at the right
the 2σ ellipses of pairs of unknown numbers φ, less the truth, which is the cross; in the arena, in orange, the 2σ
ellipses of where the plan leads. `--figure` draws what a run with a belief logged while it learnt:

    python -m launchers.visualize --run=runs/joint --out=joint.gif --figure=joint.png --against=runs/perfect

`--tree` draws one tree search of a policy that searches, from the state after `--steps` steps of an episode:

    python -m launchers.visualize --run=runs/muzero --tree=tree.png --steps=20
"""
import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from core import ekf, files, render
from core.envs import make_env
from core.errors import UserError
from core.logging import read_metrics
from launchers import cli
from launchers.runs import drawable, figure, host_film, host_renderer, load, play, regret, watch
from launchers.trees import draw_tree

WRITERS = {".gif": render.write_gif, ".mp4": render.write_mp4}


def visualize(*, run: str, out: str | None = None, figure: str | None = None, against: str | None = None,
              tree: str | None = None, seed_index: int = 0, episodes: int = 1, steps: int | None = None,
              set: list[str] = (), eval_seed: int = 1_000_000, best: bool = False, fps: float = 10.0,
              height: int = 384) -> list[np.ndarray]:
    """Film episodes of a run, or draw what it logged: the returns of the filmed episodes.

    Args:
        run: A run's folder, or one of its checkpoints.
        out: The film to write, .gif or .mp4.
        figure: The picture to write of what a run with a belief logged, .png or .pdf.
        against: The run to which --figure shows the regret, paired by seed.
        tree: The picture to write of a search, .png or .pdf.
        seed_index: Which of the run's seeds.
        episodes: Episodes, one after another.
        steps: Steps of each at most; of --tree, those before the search.
        set: Other settings of the environment: name=value,name=value.
        eval_seed: Fixes the episodes.
        best: The best checkpoint by evaluation return, where no checkpoint is named.
        fps: Frames a second.
        height: Pixels.
    """
    cli.compilation_cache()
    if not out and not figure and not tree:
        raise UserError("say what to make: --out=film.gif, --figure=picture.png, or --tree=picture.png")
    cli.check_output("out", out, *WRITERS)
    cli.check_output("figure", figure, ".png", ".pdf")
    cli.check_output("tree", tree, ".png", ".pdf")
    cli.check_seeds(eval_seed=eval_seed)
    for name, value, least, most in (("episodes", episodes, 1, 1000), ("steps", steps, 1, np.inf), ("fps", fps, 1, 100),
                                     ("height", height, 64, 2160)):
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name}={value}: from {least} to {most}")
    returns = []
    if out:
        returns = film(run, out, seed_index, episodes, steps, set, eval_seed, best, fps, height)
    if figure:
        draw_figure(run, figure, against)
    if tree:
        draw_search(run, tree, seed_index, steps or 0, set, eval_seed, best)
    return returns


def draw_search(folder, path, seed_index, steps, settings, eval_seed, best):
    """Write the picture of a search after `steps` steps of an episode."""
    algorithm, config, run, name, kwargs, key = policy_of(folder, seed_index, settings, eval_seed, best)
    if not hasattr(algorithm, "search"):
        raise UserError(f"{folder}: its policy does not search a tree")
    run = cli.rebind(algorithm, run, make_env(name, config.num_envs, **kwargs), config)
    env = make_env(name, 1, **kwargs)
    reset_key, search_key, *keys = jax.random.split(key, 2 + steps)
    state, obs = env.reset(reset_key)
    step = jax.jit(lambda state, obs, keys: env.step(keys[1], state, algorithm.act(run, (), obs, keys[0])[1]))
    for key in keys:
        state, after = step(state, obs, jax.random.split(key))
        obs = after.obs
    tree = jax.jit(lambda obs, key: algorithm.search(run, obs, key))(obs, search_key)
    draw_tree(path, jax.tree.map(lambda x: x[0], tree.replace(embeddings=(), extra_data=())))
    print(f"{path}: a search after {steps} steps of {name}")


def policy_of(folder, seed_index, settings, eval_seed, best):
    """(algorithm, config, run of one seed, the evaluation environment's name and settings, key of the episodes)."""
    algorithm, config, run, meta = load(folder, best)
    num_seeds = len(jax.tree.leaves(run)[0])
    if not 0 <= seed_index < num_seeds:
        raise UserError(f"--seed_index={seed_index}, but {folder} has {num_seeds} seeds, from 0")
    name, kwargs = cli.eval_settings(config)
    kwargs = {**kwargs, **dict(setting(text) for text in settings)}
    run = jax.tree.map(lambda x: x[seed_index], run)
    return (algorithm, config, run, name, kwargs,
            jax.random.fold_in(jax.random.key(eval_seed), meta["seed"] + seed_index))


def film(folder, out, seed_index, episodes, steps, settings, eval_seed, best, fps, height):
    """Write the film; the returns of its episodes."""
    algorithm, config, run, name, kwargs, key = policy_of(folder, seed_index, settings, eval_seed, best)
    on_host = name.startswith("gymnasium/")
    try:
        env = host_renderer(name, kwargs)[1].close() if on_host else drawable(name, **kwargs)
    except TypeError as error:
        raise UserError(f"--set={','.join(settings)}: {error}") from error
    run = cli.rebind(algorithm, run, make_env(name, config.get("num_envs", 1), **kwargs), config)
    keys = jax.random.split(key, episodes)
    if on_host:
        return save(out, *zip(*(host_film(*watch(algorithm, run, name, kwargs, key, steps), height) for key in keys),
                              strict=True), fps)
    played = [play(algorithm, run, env, key, steps) for key in keys]

    arenas = [render.scenes(env, states) for states, _, _ in played]
    beliefs = [imagine(env, config.get("about", "params"), states, carries) for states, _, carries in played]
    for arena, belief in zip(arenas, beliefs, strict=True):
        for scene, mean, cov in zip(arena, *(belief["future"] if belief else ([], [])), strict=False):
            scene.shapes[:0] = [render.ellipse(mean[k], cov[k], render.ORANGE) for k in range(4, len(mean), 5)]
    arenas = one_camera(arenas)
    frames = [render.film(arena, reward, height) for arena, (_, reward, _) in zip(arenas, played, strict=True)]
    if beliefs[0] and beliefs[0]["phi"]:
        panels = one_camera([panel(belief["phi"]) for belief in beliefs])
        frames = [np.concatenate([left, render.film(right, height=height)], axis=2)
                  for left, right in zip(frames, panels, strict=True)]
    return save(out, frames, [np.asarray(reward).sum(0) for _, reward, _ in played], fps)


def save(out, frames, returns, fps):
    """Write the frames of all episodes as one film; their returns."""
    frames = np.concatenate(frames)
    WRITERS[pathlib.Path(out).suffix](out, frames, fps)
    print(f"{out}: {len(frames)} frames, {pathlib.Path(out).stat().st_size / 1e3:.0f} kB; "
          f"returns {', '.join(str(np.round(x, 2)) for x in returns)}")
    return list(returns)


def one_camera(films):
    """The same corners for all scenes [[Scene]]: frames of one size."""
    low = np.min([scene.low for film in films for scene in film], axis=0)
    high = np.max([scene.high for film in films for scene in film], axis=0)
    return [[scene._replace(low=low, high=high) for scene in film] for film in films]


def imagine(env, about, states, carries):
    """What a policy believes at every state [T + 1], where it has a Gaussian belief about the truth, and a plan:

        phi      {name: (mean [T + 1, 2], cov [T + 1, 2, 2])} of entries of φ, less their truth
        future   mean [T + 1, H, 2] and cov [T + 1, H, 2, 2] of the places that the plan leads to
    """
    if not believes(env, about, carries):
        return None
    unknown = env.unknown(about)

    def places(mean, unravel, x, plan):
        phi = unknown.reduce(unravel(mean))

        def step(x, action):
            x = unknown.dynamics(phi, x, action)
            return x, env.place(x)

        return jax.lax.scan(step, x, plan)[1]

    def push(function, belief, *args):
        """Mean and covariance of function(θ) [..., k] by its Jacobian; what is not θ is taken as certain."""
        J = jax.jacfwd(function)(belief.mean, belief.unravel, *args)
        return function(belief.mean, belief.unravel, *args), jnp.einsum("...ip,pq,...jq->...ij", J, belief.cov, J)

    def look(carry, state):
        mean, cov = push(lambda mean, unravel: unknown.reduce(unravel(mean)), carry.belief)
        error = mean - unknown.truth(state.params)
        pairs = {name: jnp.array(pair) for name, pair in unknown.shown.items()}
        phi = {name: (error[pair], cov[pair[:, None], pair[None]]) for name, pair in pairs.items()}
        return dict(phi=phi, future=push(places, carry.belief, state.x, carry.plan.mean))

    first = jax.tree.map(lambda x: x[:, 0], carries)
    return jax.device_get(jax.jit(jax.vmap(look))(first, states))


def believes(env, about, carries):
    """Whether the carries of a policy hold a belief about the hidden truth of `env`, and a plan."""
    belief = getattr(carries, "belief", None)
    if not hasattr(belief, "cov") or not hasattr(carries, "plan"):
        return False
    if not hasattr(env, "unknown") or not hasattr(env, "place") or env.reveal:
        return False
    like = belief.unravel(jnp.zeros(belief.mean.shape[-1]))  # a network's weights are no Params
    return jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, env.unknown(about).guess)


def panel(of_phi):
    """Scenes of the belief about φ, one for each state."""
    width = 2.5 * max((np.abs(mean[0]) + 2 * np.sqrt(np.diagonal(cov[0]))).max() for mean, cov in of_phi.values())
    length = len(next(iter(of_phi.values()))[0])
    return [render.gaussians({name: (mean[t], cov[t]) for name, (mean, cov) in of_phi.items()}, width,
                             f"belief less truth, 2 standard deviations; width {width:.3g}") for t in range(length)]


def setting(text):
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise UserError(f"--set={text}: not of the form name=value with a number, string or True and False") from None


def draw_figure(folder, path, against):
    """The belief of a run while it learnt, and the reward that it got: medians and quartiles of the seeds."""
    config = files.read(pathlib.Path(folder) / "config.json", algorithm=str, env=str, num_envs=int)
    logged = read_metrics(folder)
    steps, num_seeds = logged["env_steps"][:, 0], logged["seed"].shape[1]
    error = next((name for name in ("gain_error", "parameter_error", "error") if name in logged), None)
    if error is None or "reward" not in logged or "nis" not in logged:
        raise UserError(f"{folder} logged no error, NIS and reward of a belief: nothing for --figure")
    span = np.diff(steps, prepend=0) / config["num_envs"]  # every logged value is a mean over so many steps
    panels = [(logged[error], error.replace("_", " ")), (logged["nll"], "nll") if "nll" in logged else (
        np.cumsum(logged["information"] * span[:, None], axis=0), "nats gained")]
    if against:
        panels.append((regret(folder, against), f"regret to {pathlib.Path(against).name}".replace("$", r"\$")))
    else:
        panels.append((np.cumsum(logged["reward"] * span[:, None], axis=0), "reward so far"))
    env = make_env(config["env"], 1, **config.get("env_kwargs", {}))
    d = jax.eval_shape(env.reset, jax.random.key(0))[1].shape[-1]
    with figure(path, ncols=2, nrows=2, figsize=(9, 6), sharex=True) as (fig, axes):
        (error_ax, nis_ax), others = axes[0], axes[1]
        for ax, (values, title) in zip([error_ax, *others], panels, strict=True):
            low, middle, high = np.percentile(values, [25, 50, 75], axis=1)
            ax.fill_between(steps, low, high, alpha=0.25, linewidth=0)
            ax.plot(steps, middle)
            ax.set_title(title)
            ax.axhline(0, color="grey", linewidth=0.8)
        nis_ax.fill_between(steps, *ekf.nis_band(d, span * config["num_envs"] * num_seeds), color="tab:green",
                            alpha=0.4, step="pre")
        nis_ax.plot(steps, logged["nis"].mean(axis=1))
        nis_ax.set(yscale="log", title=f"NIS, mean of seeds; 95 % band of χ²({d})")
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
        for ax in others:
            ax.set_xlabel("environment steps")
        name = pathlib.Path(folder).name.replace("$", r"\$")
        fig.suptitle(f"{name}: {config['algorithm']} on {config['env']}, {num_seeds} seeds")


if __name__ == "__main__":
    cli.run(visualize)
