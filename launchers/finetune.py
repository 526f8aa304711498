"""Third stage of a learned model: `launchers.train`, with all its flags, from the weights that pretrain wrote.

    python -m launchers.finetune --config=configs/x.py --workdir=runs/x --num_seeds=32     # runs/x/finetune
"""
from absl import flags

from core.errors import UserError
from launchers import cli, train

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(train)


def main(argv):
    folder, config = cli.stage_folder("finetune"), FLAGS.config
    weights = folder.parent / "pretrain" / "model.npz"
    if "pretrained" not in config:
        raise UserError(f'algorithm "{config.algorithm}" cannot start from stored weights: it has no key "pretrained"')
    if not weights.exists():
        raise UserError(f"no weights in {weights}: run launchers.pretrain first")
    config.pretrained, FLAGS.workdir = str(weights), str(folder)
    train.main(argv)


if __name__ == "__main__":
    cli.run(main)
