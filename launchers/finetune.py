"""Third stage of a learned model: `launchers.train` from the weights that pretrain wrote.

    python -m launchers.finetune --config=configs/x.py --workdir=runs/x --num_seeds=32     # runs/x/finetune
"""
from typing import Any, Literal

import ml_collections

from core.errors import UserError
from launchers import cli
from launchers.train import train


def finetune(config, *, workdir: str | None = None, seed: int = 0, num_seeds: int = 1, eval_seed: int = 1_000_000,
             resume: bool = False, save_every: float = 30.0, devices: int = 0, smoke: bool = False,
             wandb: Literal["off", "offline", "online"] = "off") -> dict[str, Any]:
    """Train all seeds from stored weights and return what summary.json holds.

    Args:
        workdir: Folder of all three stages; by default runs/ and the name of the config.
        seed: First seed.
        num_seeds: Seeds trained together.
        eval_seed: Fixes the evaluation episodes.
        resume: Go on from the newest checkpoint.
        save_every: Seconds between checkpoints, at least.
        devices: Devices to spread the seeds over.
        smoke: Shrink the budget to seconds.
        wandb: Mirror the local files to Weights & Biases.
    """
    folder = cli.stage_folder(config, workdir, "finetune")
    weights = folder.parent / "pretrain" / "model.npz"
    if "pretrained" not in config:
        raise UserError(f'algorithm "{config.algorithm}" cannot start from stored weights: it has no key "pretrained"')
    if not weights.exists():
        raise UserError(f"no weights in {weights}: run launchers.pretrain first")
    config = ml_collections.ConfigDict(config.to_dict() | dict(pretrained=str(weights)))
    return train(config, seed=seed, num_seeds=num_seeds, eval_seed=eval_seed, workdir=str(folder), resume=resume,
                 save_every=save_every, devices=devices, smoke=smoke, wandb=wandb)


if __name__ == "__main__":
    cli.run(finetune)
