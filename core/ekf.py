"""Gaussian belief over unknown parameters: extended Kalman filtering, and the information an observation will bring.

    θ_t = γ θ_{t−1} + w,  w ~ N(0, Q)                                                  predict
    y   = h(θ) + v,       v ~ N(0, R)                                                  update
    H   = ∂h/∂θ at m⁻,    ν = y − h(m⁻),   S = H P⁻ H' + R,   K = P⁻ H' S⁻¹            linearize, condition
    m   = m⁻ + K ν,       P = (I − K H) P⁻ (I − K H)' + K R K'
    log p(y) = −½ (ν' S⁻¹ ν + log det S + d log 2π),   NIS = ν' S⁻¹ ν ~ χ²(d) if the belief is right
    I(θ; y)  = ½ log det(I + R⁻¹ H P⁻ H')                                              information

    m mean [n], P cov [n, n], y obs [d], γ decay, Q noise, d ≪ n.

A belief is one of three forms with the same methods, so that they can be exchanged in a config:

    Full       P [n, n]                          exact on linear models; O(n² d)
    Diagonal   P = diag(var)                     VD-EKF (Chang et al., 2022): the best diagonal precision; O(n d²)
    LowRank    P⁻¹ = diag(precision) + W W'      LO-FI (Chang et al., 2023, arXiv:2305.19535), W [n, r]; O(n (r + d)²)

Any of them can be a belief about the last layer of a network alone: `Full.create(params["Dense_2"], 1.0)` with
h = `lambda head: net({**params, "Dense_2": head}, x)`. Then h is linear and `Full` is exact. All functions here
are pure.

A belief computes in float64 and is kept in two float32 halves, `mean` and `low["mean"]`, `cov` and `low["cov"]`, also
where JAX is set to float32. In float32 alone a direction that is observed 10⁵ times next to one that is never observed
gets a variance thousands of times too large, and small changes of the mean are rounded away. Two halves hold a variance
that is 10⁻¹² of that of its neighbours (FLOOR); what is observed better than that stays there.

Where h is not linear, the Jacobians at two estimates differ, and the variance shrinks in directions that no observation
tells anything about. Example: y = θ_0 θ_1 says nothing about the ratio θ_0 / θ_1, and yet its variance shrinks
(tests/test_ekf.py). Choose parameters without such directions.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Unravel:
    """From the flat vector [n] back to the tree. Equal for equal trees, unlike `ravel_pytree`'s closure, so that a
    fresh belief and an old one can meet in a `where` or a scan."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, flat: jax.Array) -> Any:
        leaves = jnp.split(flat, np.cumsum([math.prod(shape) for shape in self.shapes])[:-1])
        return self.treedef.unflatten(leaf.reshape(shape) for leaf, shape in zip(leaves, self.shapes, strict=True))


class Info(NamedTuple):
    """How well the belief before an observation predicted it."""

    innovation: jax.Array  # [d], ν
    nis: jax.Array  # ν' S⁻¹ ν, d on average
    log_lik: jax.Array  # log N(y; h(m⁻), S)
    information: jax.Array  # nats gained about θ


def double(function: Callable) -> Callable:
    """`function` of a belief and numbers, computed in float64: its arguments are made wide, and its results narrow."""
    def is_belief(x):
        return isinstance(x, Belief)

    def widen(x):
        if not is_belief(x):
            return jnp.asarray(x, float)
        arrays = {name: getattr(x, name).astype(float) + low for name, low in x.low.items()}
        return x.replace(**arrays, low=jax.tree.map(jnp.zeros_like, arrays))

    def narrow(x, dtype):
        if not is_belief(x):
            return x.astype(dtype)
        high = {name: getattr(x, name).astype(dtype) for name in x.low}
        return x.replace(**high, low={name: (getattr(x, name) - high[name]).astype(dtype) for name in high})

    @functools.wraps(function)
    def wide(belief, *args, **kwargs):
        with jax.enable_x64(True):
            args, kwargs = jax.tree.map(widen, ((belief, *args), kwargs), is_leaf=is_belief)
            result = function(*args, **kwargs)
            return jax.tree.map(lambda x: narrow(x, belief.mean.dtype), result, is_leaf=is_belief)

    return wide


class Full(struct.PyTreeNode):
    mean: jax.Array  # [n]
    cov: jax.Array  # [n, n]
    low: dict[str, jax.Array]  # what float32 cuts off of these two
    unravel: Unravel = struct.field(pytree_node=False)

    @classmethod
    def create(cls, params: Any, var: Any) -> "Full":
        """`var`: prior variance, one number or a tree of them whose structure is a prefix of `params`."""
        mean, var, unravel = ravel(params, var)
        return cls(mean, jnp.diag(var), dict(mean=jnp.zeros_like(mean), cov=jnp.zeros_like(jnp.diag(var))), unravel)

    @property
    def params(self) -> Any:
        return self.unravel(self.mean)

    @property
    def var(self) -> jax.Array:
        return jnp.diagonal(self.cov, axis1=-2, axis2=-1)

    @double
    def predict(self, decay: jax.Array | float = 1.0, noise: jax.Array | float = 0.0) -> "Full":
        """P⁻ = γ² P + diag(noise), `noise` a number or [n]."""
        noise = jnp.broadcast_to(noise, self.mean.shape)
        return self.replace(mean=decay * self.mean, cov=decay**2 * self.cov + jnp.diag(noise))

    @double
    def forget(self, factor: jax.Array | float, max_trace: jax.Array | float) -> "Full":
        """P⁻ = P / factor. What is not observed would grow without bound, so tr P stops at `max_trace`."""
        return self.replace(cov=self.cov * inflation(self, factor, max_trace))

    def times(self, H: jax.Array) -> jax.Array:
        """H P: [d, n] -> [d, n]."""
        return matmul(H, self.cov)

    def shrink(self, H: jax.Array, W: jax.Array, K: jax.Array) -> "Full":
        """P⁻ -> P for whitened rows H [d, n] (R = I), where W'W = K S K' and K [d, n] is the gain's transpose."""
        return self.replace(cov=self.cov - gram(W))

    def support(self, H: jax.Array, HP: jax.Array) -> tuple["Full", jax.Array]:
        """P + α diag P, and H times it, with the least α >= 0 that gives every row h of H a variance h'P h >= FLOOR
        h'(diag P) h.

        Rounding errors are about 2⁻⁴⁸ of the diagonal. They add up over the steps, and P stays positive definite only
        if what is observed keeps a variance well above them.
        """
        whole = matmul(jnp.square(H), self.var)
        share = jnp.where(whole > 0, (HP * H).sum(axis=1) / jnp.where(whole > 0, whole, 1.0), 1.0)
        added = jnp.maximum(FLOOR - share.min(), 0.0) * self.var
        return self.replace(cov=self.cov + jnp.diag(added)), HP + H * added[None]


class Diagonal(struct.PyTreeNode):
    mean: jax.Array  # [n]
    var: jax.Array  # [n]
    low: dict[str, jax.Array]
    unravel: Unravel = struct.field(pytree_node=False)

    @classmethod
    def create(cls, params: Any, var: Any) -> "Diagonal":
        mean, var, unravel = ravel(params, var)
        return cls(mean, var, dict(mean=jnp.zeros_like(mean), var=jnp.zeros_like(var)), unravel)

    @property
    def params(self) -> Any:
        return self.unravel(self.mean)

    @double
    def predict(self, decay: jax.Array | float = 1.0, noise: jax.Array | float = 0.0) -> "Diagonal":
        return self.replace(mean=decay * self.mean, var=decay**2 * self.var + noise)

    @double
    def forget(self, factor: jax.Array | float, max_trace: jax.Array | float) -> "Diagonal":
        return self.replace(var=self.var * inflation(self, factor, max_trace))

    def times(self, H: jax.Array) -> jax.Array:
        return H * self.var[None]

    def shrink(self, H: jax.Array, W: jax.Array, K: jax.Array) -> "Diagonal":
        """The posterior's precision is diag(1/var) + H'H; its diagonal is kept (least KL(q‖p) among diagonals)."""
        return self.replace(var=self.var / (1.0 + self.var * jnp.square(H).sum(axis=0)))


class LowRank(struct.PyTreeNode):
    mean: jax.Array  # [n]
    precision: jax.Array  # [n], Υ
    factor: jax.Array  # [n, r], W
    low: dict[str, jax.Array]
    unravel: Unravel = struct.field(pytree_node=False)

    @classmethod
    def create(cls, params: Any, var: Any, rank: int) -> "LowRank":
        mean, var, unravel = ravel(params, var)
        arrays = dict(mean=mean, precision=1.0 / var, factor=jnp.zeros((mean.size, rank), mean.dtype))
        return cls(**arrays, low=jax.tree.map(jnp.zeros_like, arrays), unravel=unravel)

    @property
    def params(self) -> Any:
        return self.unravel(self.mean)

    @property
    @double
    def var(self) -> jax.Array:
        return 1.0 / self.precision - jnp.square(self.root()).sum(axis=0)

    def root(self) -> jax.Array:
        """U [r, n] of P = diag(1/Υ) − U'U (Woodbury): U = C^(−½) W' Υ⁻¹, C = I + W' Υ⁻¹ W."""
        scaled = self.factor / self.precision[:, None]
        return eliminate(matmul(self.factor.T, scaled), scaled.T, 1.0)[0]

    @double
    def predict(self, decay: jax.Array | float = 1.0, noise: jax.Array | float = 0.0) -> "LowRank":
        """Exact: γ² (Υ + W W')⁻¹ + diag(noise) is again the inverse of a diagonal plus rank r."""
        precision = 1.0 / (decay**2 / self.precision + noise)
        scaled = self.factor / self.precision[:, None]
        inner = matmul(scaled.T, self.factor * (precision * noise)[:, None])
        factor = decay * precision[:, None] * eliminate(inner, scaled.T, 1.0)[0].T
        return self.replace(mean=decay * self.mean, precision=precision, factor=factor)

    @double
    def forget(self, factor: jax.Array | float, max_trace: jax.Array | float) -> "LowRank":
        scale = inflation(self, factor, max_trace)
        return self.replace(precision=self.precision / scale, factor=self.factor / jnp.sqrt(scale))

    def times(self, H: jax.Array) -> jax.Array:
        U = self.root()
        return H / self.precision[None] - matmul(matmul(H, U.T), U)

    def shrink(self, H: jax.Array, W: jax.Array, K: jax.Array) -> "LowRank":
        """The new precision Υ + [W, H'] [W, H']' keeps its r largest directions; the rest leaves its diagonal in Υ."""
        wide = jnp.concatenate([self.factor, H.T], axis=1)  # [n, r + d]
        wide = matmul(wide, eigenvectors(matmul(wide.T, wide)))  # orthogonal columns, the shortest first
        dropped, factor = wide[:, : H.shape[0]], wide[:, H.shape[0] :]
        return self.replace(precision=self.precision + jnp.square(dropped).sum(axis=1), factor=factor)


Belief = Full | Diagonal | LowRank
FLOOR = 2.0**-40  # of its coordinates' variances, the least that a direction keeps


def linearize(h: Callable[[Any], jax.Array], belief: Belief, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h(θ) [d] and H = ∂h/∂θ [d, n] at `mean` [n]; `h` takes the tree. Backwards if d < n, else forwards."""
    def flat(mean):
        return h(belief.unravel(mean)).reshape(-1)

    d, n = jax.eval_shape(flat, mean).size, mean.size
    if d < n:
        pred, pullback = jax.vjp(flat, mean)
        return pred, jax.vmap(pullback)(jnp.eye(d, dtype=pred.dtype))[0]
    pred, push = jax.linearize(flat, mean)
    return pred, jax.vmap(push, out_axes=1)(jnp.eye(n, dtype=mean.dtype))


def update(
    belief: Belief, h: Callable[[Any], jax.Array], obs: jax.Array, R: jax.Array, num_iterations: int = 1
) -> tuple[Belief, Info]:
    """Condition on y = h(θ) + v, `obs` y [d]. `R`: variances [d] or covariance [d, d] of v. A component of infinite
    variance is not observed: it changes nothing and is not counted, whatever its `obs`.

    With `num_iterations` > 1 (iterated EKF, Bell & Cathey, 1993) h is linearised again at the new mean m_i, and the
    *prior* is conditioned again on y − h(m_i) − H_i (m⁻ − m_i): the observation counts once. Each of these Gauss-Newton
    steps is halved until it lowers the cost |y − h(m)|²_R⁻¹ + |m − m⁻|²_P⁻¹. A linear h needs no halving.
    """
    prior = belief.mean

    def gauss_newton(point):
        pred, H = linearize(h, belief, point)
        return condition(belief, H, obs - pred - H @ (prior - point), R)

    posterior, info, pull = gauss_newton(prior)
    if num_iterations == 1:
        return posterior, info

    def cost(mean, pull):  # pull = P⁻¹ (mean − prior)
        residual, _ = whiten(R, obs - h(belief.unravel(mean)).reshape(-1))
        return residual @ residual + pull @ (mean - prior)

    def shorten(start, end):
        step = jnp.append(0.5 ** jnp.arange(8), 0.0).astype(prior.dtype)
        points = jax.tree.map(lambda a, b: a[None] + step[:, None] * (b - a)[None], start, end)
        costs = jax.vmap(cost)(*points)
        best = jnp.argmin(jnp.where(jnp.isnan(costs), jnp.inf, costs))
        return jax.tree.map(lambda x: x[best], points)

    def again(_, carry):
        point, _ = carry
        posterior, _, pull = gauss_newton(point[0])
        return shorten(point, (posterior.mean, pull)), posterior

    start = shorten((prior, jnp.zeros_like(prior)), (posterior.mean, pull))
    (mean, _), posterior = jax.lax.fori_loop(1, num_iterations, again, (start, posterior))
    return posterior.replace(mean=mean), info


def condition(belief: Belief, H: jax.Array, innovation: jax.Array, R: jax.Array) -> tuple[Belief, Info, jax.Array]:
    """The update for H [d, n] and ν [d], where S = H P H' + R; and H' S⁻¹ ν [n] = P⁻¹ (m − m⁻)."""
    posterior, info, pull = _condition(belief, H, innovation, R)
    return posterior, info._replace(innovation=innovation), pull


@double
def _condition(belief, H, innovation, R):
    d, n = H.shape
    white, log_scale = whiten(R, jnp.concatenate([H, innovation[:, None]], axis=1))
    H, nu = white[:, :n], white[:, n:]
    HP = belief.times(H)
    if isinstance(belief, Full):
        belief, HP = belief.support(H, HP)
    solved, excess = eliminate(matmul(HP, H.T), jnp.concatenate([HP, nu, jnp.eye(d, dtype=H.dtype)], axis=1), 1.0)
    W, z, root = solved[:, :n], solved[:, n], solved[:, n + 1 :]  # S^(−½) times HP, ν and I
    information, nis = 0.5 * jnp.log1p(excess).sum(), jnp.square(z).sum()
    info = Info(innovation, nis, -0.5 * nis - information - log_scale, information)
    posterior = belief.shrink(H, W, matmul(root.T, W))
    return posterior.replace(mean=belief.mean + matmul(z, W)), info, matmul(matmul(z, root), H)


@double
def spread(belief: Belief, H: jax.Array) -> jax.Array:
    """H P H' [d, d]."""
    return matmul(belief.times(H), H.T)


def adapt_R(R: jax.Array, posterior: Belief, h: Callable[[Any], jax.Array], obs: jax.Array, rate: float) -> jax.Array:
    """R ← R + rate (e e' + H P H' − R), with the residual e = y − h(m) *after* the update: E[e e'] = R − H P H'."""
    pred, H = linearize(h, posterior, posterior.mean)
    found = jnp.outer(obs - pred, obs - pred) + spread(posterior, H)
    return (1 - rate) * R + rate * (jnp.diagonal(found) if R.ndim == 1 else found)


def adapt_noise(noise: jax.Array, pred: Belief, posterior: Belief, rate: float) -> jax.Array:
    """Process noise, a number or [n], from what innovations move: E[(K ν)²] = diag(P⁻ − P) if it is right.

        q ← max(q + rate ((m − m⁻)² + diag(P − P⁻)), 0),   averaged over parameters where q is one number
    """
    surprise = jnp.square(posterior.mean - pred.mean) + posterior.var - pred.var
    return jnp.maximum(noise + rate * (surprise.mean() if jnp.ndim(noise) == 0 else surprise), 0.0)


def nis_band(d: int, count: np.ndarray, coverage: float = 0.95) -> list[np.ndarray]:
    """The interval of the mean of `count` NIS of d components if the belief is right: their sum is χ²(count · d)."""
    from scipy.stats import chi2  # here, because importing it takes half a second

    return [chi2.ppf(p, count * d) / count for p in ((1 - coverage) / 2, (1 + coverage) / 2)]


def information(
    cov: jax.Array, H: jax.Array, R: jax.Array, task: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Nats [...] that observing H θ + v will bring, and the covariance [n, n, ...] after it.

        I(θ; y)    = ½ log det(I + R⁻¹ H P H') = ½ Σ_i log1p(pivot_i)
        I(g'θ; y)  = −½ log(g' P⁺ g / g' P g)         about the one direction g = `task` [n, ...] that matters

    `cov` [n, n] or [n, n, ...], `H` [d, n, ...], `R` [d] or [d, d]. The batch (a planner's samples) is *last*, on the
    minor axis, and every operation runs along it. Carried through a scan over the horizon, the covariance gives the
    joint information by the chain rule. A caller that ignores it gets the independent one, and its program does not
    compute the covariance.
    Where only f(θ) [k] enters an observation F f + v, H = ∂f/∂θ and R = (F' R⁻¹ F)⁻¹ [k, k] say the same in k rows;
    where θ enters f only through G(θ), so do H = ∂f/∂G and cov = ∂G/∂θ P (∂G/∂θ)', which is found once per plan.
    """
    n = H.shape[1]
    H, _ = whiten(R, H)
    HP = dot(H, cov)
    right = HP if task is None else jnp.concatenate([HP, dot(HP, task[None])], axis=1)
    solved, excess = eliminate(dot(HP, H), right, 1.0)
    downdate = sum(row[:n, None] * row[None, :n] for row in solved)
    posterior = cov.reshape(cov.shape + (1,) * (downdate.ndim - cov.ndim)) - downdate
    if task is None:
        return 0.5 * jnp.log1p(excess).sum(axis=0), posterior
    total = dot(dot(task[None], cov), task[None])[0, 0]  # g' P g
    explained = jnp.square(solved[:, n]).sum(axis=0) / total
    return -0.5 * jnp.log1p(-jnp.minimum(explained, 1.0 - jnp.finfo(total.dtype).eps)), posterior


def dot(A: jax.Array, B: jax.Array) -> jax.Array:
    """A B' [d, m, ...] of A [d, n, ...] and B [m, n] or [m, n, ...], for each of a batch on the last axes.

    Few columns are added one by one, which XLA vectorises along the batch on a CPU; a reduction it does not."""
    n = A.shape[1]
    if B.ndim == 2:
        return jnp.stack([jnp.tensordot(B, row, 1) for row in A])
    if n > 32:
        return (A[:, None] * B[None]).sum(axis=2)
    return sum(A[:, None, j] * B[None, :, j] for j in range(n))


def eliminate(S: jax.Array, B: jax.Array, unit: float) -> tuple[jax.Array, jax.Array]:
    """L⁻¹ B [d, m, ...] for unit · I + S = L L', S [d, d, ...] positive semi-definite, and L's squared diagonal less
    `unit` [d, ...]; that is >= 0 in exact arithmetic and is kept so.

    Gaussian elimination written out, on the minor axes: five times faster than LAPACK's calls for small d.
    """
    d = S.shape[0]
    if d > 8:
        S, B = (jnp.moveaxis(x, (0, 1), (-2, -1)) for x in (S, B))
        L = jnp.linalg.cholesky(S + jnp.broadcast_to(unit * jnp.eye(d, dtype=S.dtype), S.shape))
        solved = jax.lax.linalg.triangular_solve(L, B, left_side=True, lower=True)
        pivots = jnp.square(jnp.diagonal(L, axis1=-2, axis2=-1)) - unit
        return jnp.moveaxis(solved, (-2, -1), (0, 1)), jnp.moveaxis(pivots, -1, 0)
    rows, pivots = list(jnp.concatenate([S, B], axis=1)), []
    for i in range(d):
        pivots.append(jnp.maximum(rows[i][i], 0.0))
        rows[i] = rows[i] * jax.lax.rsqrt(unit + pivots[i])[None]
        for j in range(i + 1, d):
            rows[j] = rows[j] - rows[i][j][None] * rows[i]
    return jnp.stack([row[d:] for row in rows]), jnp.stack(pivots)


def matmul(A: jax.Array, B: jax.Array) -> jax.Array:
    """A B without a dtype of the result, which vmap, outside of `double`, would make float32."""
    return jax.lax.dot(A, B, precision="highest")


def whiten(R: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R^(−½) x for R [d] or [d, d] and x [d, ...]; and ½ log det(2π R). Rows of infinite variance become 0 in x, and
    the determinant is that of the others."""
    seen = jnp.isfinite(R if R.ndim == 1 else jnp.diagonal(R))
    x = jnp.where(seen.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)
    constant = 0.5 * math.log(2 * math.pi) * seen.sum()
    if R.ndim == 1:
        R = jnp.where(seen, R, 1.0)
        return x * jax.lax.rsqrt(R).reshape(-1, *[1] * (x.ndim - 1)), 0.5 * jnp.log(R).sum() + constant
    R = jnp.where(seen[:, None] & seen[None], R, jnp.eye(len(R), dtype=R.dtype))
    root, pivots = eliminate(R, jnp.eye(len(R), dtype=R.dtype), 0.0)
    return (matmul(root, x) if x.ndim <= 2 else jnp.tensordot(root, x, 1)), 0.5 * jnp.log(pivots).sum() + constant


def gram(A: jax.Array) -> jax.Array:
    """A'A [n, n] of A [d, n]. Few rows are summed entry by entry, in one pass over memory with what follows."""
    if A.shape[0] > 8:
        product = matmul(A.T, A)
        return 0.5 * (product + product.T)
    return sum(row[:, None] * row[None] for row in A)


def eigenvectors(A: jax.Array) -> jax.Array:
    """Of a symmetric A [m, m], as columns [m, m], those of the smallest eigenvalues first.

    Jacobi's rotations, the disjoint pairs of a round at once. LAPACK's calls, batched by vmap, can wait for ever for
    the threads they run on (jaxlib 0.10, few cores).
    """
    m = len(A)
    index, players, partners = np.arange(m), np.arange(m + m % 2), []
    for _ in players[1:]:  # a round robin: the first meets the last, and so on; then all but one move on a place
        partner = players[::-1][np.argsort(players)][:m]
        partners.append(np.where(partner < m, partner, index))  # of an odd number, one rests
        players = np.append(players[:1], np.roll(players[1:], 1))
    swaps, signs = np.eye(m, dtype=A.dtype)[np.array(partners)], np.sign(np.array(partners) - index[None])

    def rotate(state, now):
        (A, V), (swap, sign) = state, now
        diagonal, off = jnp.diagonal(A), (A * swap).sum(1)
        tau = sign * (matmul(swap, diagonal) - diagonal) / jnp.where(off == 0, 1.0, 2 * off)
        tangent = jnp.where(tau < 0, -1.0, 1.0) / (jnp.abs(tau) + jnp.sqrt(1 + tau**2))
        tangent = jnp.where((off == 0) | (sign == 0), 0.0, tangent)
        cos = jax.lax.rsqrt(1 + tangent**2)
        J = jnp.diag(cos) + (sign * cos * tangent)[:, None] * swap * (1 - jnp.eye(m, dtype=A.dtype))
        return (matmul(matmul(J.T, A), J), matmul(V, J)), None

    rounds = np.tile(swaps, (7, 1, 1)), np.tile(signs.astype(A.dtype), (7, 1))
    (A, V), _ = jax.lax.scan(rotate, (A, jnp.eye(m, dtype=A.dtype)), rounds)
    return V[:, jnp.argsort(jnp.diagonal(A))]


def inflation(belief: Belief, factor: jax.Array | float, max_trace: jax.Array | float) -> jax.Array:
    return jnp.clip(max_trace / belief.var.sum(), 1.0, 1.0 / factor)


def ravel(params: Any, var: Any) -> tuple[jax.Array, jax.Array, Unravel]:
    """Mean [n], variance [n], and the way back."""
    leaves, treedef = jax.tree.flatten(params)
    var = jax.tree.leaves(jax.tree.broadcast(var, params))
    var = [jnp.broadcast_to(jnp.asarray(v, leaf.dtype), leaf.shape) for v, leaf in zip(var, leaves, strict=True)]
    mean, var = (jnp.concatenate([leaf.reshape(-1) for leaf in tree]) for tree in (leaves, var))
    return mean, var, Unravel(treedef, tuple(leaf.shape for leaf in leaves))
