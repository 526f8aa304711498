from setuptools import setup

# gymnax 1.0.1 imports six without declaring it, and excludes jax >= 0.12: with this extra pip takes an older jax.
envs = ["gymnax>=1.0", "jaxmarl>=0.2", "six"]
mujoco = ["gymnasium[mujoco]>=1.1"]
offline = ["h5py", "minari"]
cluster = ["submitit"]
dev = ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff"]

setup(
    name="monograph",
    version="0.3.0",
    description="One method, one file: a JAX research skeleton for reinforcement learning.",
    license="MIT",
    python_requires=">=3.11",
    packages=["core", "core.envs", "algorithms", "launchers", "configs"],
    install_requires=[
        "jax>=0.10", "jaxlib>=0.10", "flax", "optax", "distrax", "chex", "numpy", "absl-py", "ml_collections",
        "matplotlib", "pillow", "tqdm", "wandb",
    ],
    extras_require=dict(
        envs=envs, mujoco=mujoco, offline=offline, cluster=cluster, dev=dev,
        all=envs + mujoco + offline + cluster + dev,
    ),
)
