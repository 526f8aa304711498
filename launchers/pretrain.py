"""Second stage of a learned model: `launchers.train` of the algorithm that fits a model to the collected data.

    python -m launchers.pretrain --config=configs/x.py --workdir=runs/x          # runs/x/collect/data.npz
    python -m launchers.pretrain --config=configs/x.py --data=minari:cartpole/random-v0 --num_seeds=4

`config.pretrain` holds what differs from that algorithm's own config, `algorithm` ("dynamics" unless it says another)
among it; environment and `hidden_dims` are those of the config. The run in `runs/x/pretrain` is like any other;
`model.npz` beside it holds what the first seed learnt, for `config.pretrained`.
"""
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from core import checkpoint, files
from core.dataset import write_arrays
from core.errors import UserError
from launchers import cli
from launchers.train import train


def pretrain(config, *, workdir: str | None = None, data: str | None = None, seed: int = 0, num_seeds: int = 1,
             resume: bool = False, save_every: float = 30.0, devices: int = 0, smoke: bool = False,
             wandb: Literal["off", "offline", "online"] = "off") -> dict[str, Any]:
    """Fit a model, write its weights to model.npz, and return what summary.json holds.

    Args:
        workdir: Folder of all three stages; by default runs/ and the name of the config.
        data: An .npz or minari:NAME, instead of what collect wrote into workdir.
        seed: First seed: the held out episodes, the first weights and the minibatches.
        num_seeds: Seeds trained together.
        resume: Go on from the newest checkpoint.
        save_every: Seconds between checkpoints, at least.
        devices: Devices to spread the seeds over.
        smoke: Two updates.
        wandb: Mirror the local files to Weights & Biases.
    """
    folder = cli.stage_folder(config, workdir, "pretrain")
    cli.algorithm_of(config)  # which checks the config
    config = settings(config, data or str(folder.parent / "collect" / "data.npz"))
    if (folder / "model.npz").exists():
        raise UserError(f"{folder} holds a finished model: choose another workdir")
    if (folder / "summary.json").exists():  # it was killed between that and its model
        summary = files.read(folder / "summary.json")
    else:
        summary = train(config, seed=seed, num_seeds=num_seeds, workdir=str(folder), resume=resume,
                        save_every=save_every, devices=devices, smoke=smoke, wandb=wandb)
    with files.locked(folder):
        files.sweep(folder)
        write_arrays(folder / "model.npz", trained_params(folder, config, num_seeds))
    print(f"weights {folder / 'model.npz'}")
    return summary


def settings(config, dataset):
    """The config of the algorithm that fits the model."""
    section = cli.section(config, "pretrain").to_dict()
    own = cli.algorithm_named(section.pop("algorithm", "dynamics")).get_config()
    shared = {name: config[name] for name in ("env", "env_kwargs", "hidden_dims") if name in config and name in own}
    for name, value in (shared | section | dict(dataset=dataset)).items():
        if name not in own:
            raise UserError(f'config.pretrain has "{name}", which {own.algorithm} has not; {cli.suggest(name, own)}')
        try:
            own[name] = value
        except TypeError as error:
            raise UserError(f"config.pretrain.{name}: {error}") from error
    return own


def trained_params(folder, config, num_seeds):
    """What the agent of the first seed calls its `params`, as numpy arrays."""
    algorithm, source = cli.algorithm_of(config), cli.source_of(config)
    config = ml_collections.FrozenConfigDict(config)
    init = cli.per_seed(lambda seed: algorithm.init(jax.random.key(seed), source, config), num_seeds)
    tree, _ = checkpoint.restore_newest(folder / "checkpoints", dict(run=jax.eval_shape(init, jnp.arange(num_seeds))))
    return jax.tree.map(lambda x: np.asarray(x[0]), tree["run"].agent.params)


if __name__ == "__main__":
    cli.run(pretrain)
