"""Random errors that change nothing which a test could see, and why. `tests.plant_errors --random` leaves them out.

An entry names the file, the function, the line as it is, the line as it would be. Lines may move; when one changes, a
test says that the entry is stale.
"""
EQUIVALENT = {
    ("core/train_state.py", "TrainState.minimize",
     "return self.replace(params=optax.apply_updates(self.params, updates), opt_state=opt_state), info",
     "return self.replace(params=optax.apply_updates(updates, self.params), opt_state=opt_state), info"):
        "it adds the two",
    ("core/envs/unicycle_pursuit.py", "Env.draw",
     'Circle(evader, 0.25, BLUE, label="evader"), Line([pursuer, nose], REDS[0], 3),',
     'Circle(evader, 0.25, BLUE, label="evader"), Line([pursuer, nose], REDS[1], 3),'):
        "another red",
    ("core/envs/riccati.py", "_implicitly",
     "return P, jax.lax.fori_loop(0, DOUBLINGS, double, (dQ + K.T @ dR @ K + moved + moved.T, F))[0]",
     "return P, jax.lax.fori_loop(1, DOUBLINGS, double, (dQ + K.T @ dR @ K + moved + moved.T, F))[0]"):
        "one doubling less than enough is enough",
    ("algorithms/ppo.py", "Agent.loss",
     "value_loss = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped_value - target)).mean()",
     "value_loss = 0.5 * jnp.maximum(jnp.square(value - target), "
     "jnp.square(clipped_value - jax.lax.stop_gradient(target))).mean()"):
        "a target is data: it has no gradient",
    ("algorithms/ppo.py", "Agent.loss",
     "value_loss = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped_value - target)).mean()",
     "value_loss = 0.5 * jnp.maximum(jnp.square(value - jax.lax.stop_gradient(target)), "
     "jnp.square(clipped_value - target)).mean()"):
        "a target is data: it has no gradient",
    ("core/dataset.py", "ReplayBuffer.add.write",
     "return old.at[index].set(rows, unique_indices=True)", "return old.at[index].set(rows)"):
        "it lets XLA write without looking for indices that occur twice",
    ("core/dataset.py", "ReplayBuffer.sample_trajectories",
     "going_on = ~done.astype(bool)[(oldest + age) % self.capacity]",
     "going_on = ~done.astype(bool)[(oldest + age) % self.size]"):
        "a buffer that is not full has its oldest entry at 0, and ages from its size on count nowhere",
    ("algorithms/icem_online_gradient.py", "Agent.learn",
     "covered=1.0 * (info.nis < ekf.nis_band(zero.size, 1, 0.9)[1])))  # below the 95% quantile: 0.95 if right",
     "covered=1.0 * (info.nis <= ekf.nis_band(zero.size, 1, 0.9)[1])))  # below the 95% quantile: 0.95 if right"):
        "a continuous number is never at its bound",
}
