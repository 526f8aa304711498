"""The cart-pole of PETS with the numbers of its authors (kchua/handful-of-trials): 1,000,000 network evaluations an
action, which needs a GPU. `num_updates` is the mean of their 5 epochs over ten episodes. Their loss takes the
mean over the dimensions of x where ours takes the sum, so their κ and λ weigh as many times more."""
from algorithms import pets


def get_config():
    config = pets.get_config()
    config.update(env="cartpole_swingup", env_steps=2200, hidden_dims=(500, 500, 500), num_updates=172)
    config.update(num_particles=20, horizon=25, search="cem", kept_elites=0)
    config.planner = dict(num_samples=400, num_elites=40, num_iterations=5, momentum=0.1)
    config.smoke.update(hidden_dims=(8, 8, 8), num_particles=5)
    return config
