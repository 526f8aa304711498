"""A network learns a linear system from flights to a goal, and within an episode that the true one turns and pushes
otherwise; judged by another goal: in episodes of their own, and by `rehearsal` with the weights of the moment."""
from algorithms import icem_online

PLAIN = dict(a=((1.0, 0.0, 0.1, 0.0), (0.0, 1.0, 0.0, 0.1), (0.0, 0.0, 0.95, 0.0), (0.0, 0.0, 0.0, 0.95)),
             b=((0.005, 0.0), (0.0, 0.005), (0.1, 0.0), (0.0, 0.1)))
COUPLED = dict(a=((1.0, 0.0, 0.1, 0.0), (0.0, 1.0, 0.0, 0.1), (0.0, 0.0, 0.95, 0.3), (0.0, 0.0, -0.3, 0.95)),
               b=((0.007, 0.005), (-0.005, 0.007), (0.12, 0.08), (-0.08, 0.12)))


def get_config():
    config = icem_online.get_config()
    config.update(env="linear_tracking", env_steps=150, eval_every=150, rehearse=True)
    config.env_kwargs = COUPLED | dict(max_steps=151, reveal=False)  # goes on when the last rehearsal is played
    config.eval_env_kwargs = dict(goal=(-5.0, -5.0, 0.0, 0.0), max_steps=100)
    config.update(hidden_dims=(32, 32), adapt="all", prior_var=0.01, obs_var=1e-3, horizon=15)
    config.planner.num_samples = 100
    config.collect.update(episodes=100, num_envs=20)
    config.collect.env_kwargs = PLAIN | dict(max_steps=100, start_width=15.0, reveal=True)
    return config
