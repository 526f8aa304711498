"""The cart-pole of PETS, swung up from scratch: 200 random steps, then ten episodes with a fit before each."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="cartpole_swingup", env_kwargs=dict(process_noise=0.0), env_steps=2200)
    return config
