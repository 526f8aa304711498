"""Environments by name: `gymnax/CartPole-v1` and `gymnasium/HalfCheetah-v5` come from there, plain names are ours."""
