from setuptools import setup

# gymnax 1.0.1 imports six without declaring it, and excludes jax >= 0.12: with this extra pip takes an older jax.
envs = ["gymnax>=1.0", "jaxmarl>=0.2", "six"]
mujoco = ["gymnasium[mujoco]>=1.1"]
# dm_control 1.0.50 asks MuJoCo 4 for what that no longer has. Meta-World 3.1 asks for one old version of MuJoCo.
dm_control = ["dm_control", "shimmy[dm-control]", "mujoco<4"]
metaworld = ["metaworld>=3.1"]
brax = ["brax"]
playground = ["playground"]
board = ["pgx"]
offline = ["h5py", "minari"]
cluster = ["submitit"]
dev = ["h5py", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff"]

setup(
    name="monograph",
    version="0.7.0",
    description="One method, one file: a JAX research skeleton for reinforcement learning.",
    license="MIT",
    python_requires=">=3.11",
    packages=["core", "core.envs", "algorithms", "launchers", "configs"],
    install_requires=[
        "jax>=0.10", "jaxlib>=0.10", "flax", "optax", "distrax", "chex", "numpy", "absl-py", "ml_collections",
        "matplotlib", "mctx", "pillow", "tqdm", "wandb",
    ],
    extras_require=dict(
        envs=envs, board=board, mujoco=mujoco, dm_control=dm_control, metaworld=metaworld, brax=brax,
        playground=playground, offline=offline, cluster=cluster, dev=dev,
        all=envs + mujoco + board + offline + cluster + dev,
    ),
)
