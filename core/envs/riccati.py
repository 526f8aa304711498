"""The linear-quadratic regulator of infinite horizon: its cost-to-go P and its gain K, and their derivatives.

    x' = A x + B u,   cost Σ_t x'Q x + u'R u = x_0' P x_0   under   u = −K x
    P = Q + A'P (A − B K),   K = (R + B'P B)⁻¹ B'P A                                      solve, gain

Structured doubling (Chu et al., 2004) makes 2^k steps of value iteration of k doublings, from A, G = B R⁻¹ B', H = Q:

    A <- A W A,   G <- G + A W G A',   H <- H + A'H W A,   W = (I + G H)⁻¹;   H -> P

With H = L L' it is W = I − G L (I + L'G L)⁻¹ L', so that only what is symmetric and positive definite is inverted, by
elimination written out: nothing here calls LAPACK for up to 8 states, and all of it runs under vmap. A becomes the
transition of 2^k steps under the regulator. The doubling ends where that is small (H then changes by its square), and P
is NaN where H still changes after DOUBLINGS of them: A = B = 1 is solved down to Q = 10⁻⁹ R.

Implicitly, with F = A − B K, which is stable:   dP = F'dP F + M,   M = dQ + K'dR K + F'P dF_K + (F'P dF_K)',
dF_K = dA − dB K, or dP = Σ_k F'^k M F^k, again by doubling. No iteration is differentiated.
"""
import jax
import jax.numpy as jnp

from core.ekf import eliminate

DOUBLINGS = 20  # at most: a million steps of value iteration


@jax.custom_jvp
def solve(A: jax.Array, B: jax.Array, Q: jax.Array, R: jax.Array) -> jax.Array:
    """P [n, n] of A [n, n], B [n, m], Q [n, n] >= 0 and R [m, m] > 0."""
    def double(state):
        k, A, G, H, _ = state
        L = root(H)
        GL = G @ L
        solved = eliminate(L.T @ GL, jnp.concatenate([GL.T, L.T], axis=1), 1.0)[0]  # (I + L'G L)^(−½) times L'G and L'
        left, right = jnp.split(solved, 2, axis=1)
        WA = A - left.T @ (right @ A)
        change = symmetric((right @ A).T @ (right @ A))
        return k + 1, A @ WA, symmetric(G + A @ (G - left.T @ left) @ A.T), H + change, jnp.abs(change).max()

    small = jnp.finfo(jnp.result_type(A)).eps ** 0.5
    start = (0, jnp.asarray(A), symmetric(B @ divide(R, B.T)), jnp.asarray(Q), jnp.abs(Q).max())
    _, A, _, P, change = jax.lax.while_loop(
        lambda state: (state[0] < DOUBLINGS) & (jnp.abs(state[1]).max() > small), double, start)
    settled = (jnp.abs(A).max() <= small) | (change <= small * jnp.abs(P).max())
    return jnp.where(settled, P, jnp.nan)


@solve.defjvp
def _implicitly(primals, tangents):
    (A, B, Q, R), (dA, dB, dQ, dR) = primals, tangents
    P = solve(A, B, Q, R)
    K = gain_of(A, B, R, P)
    F = A - B @ K
    moved = F.T @ P @ (dA - dB @ K)

    def double(_, MF):
        M, F = MF
        return M + F.T @ M @ F, F @ F

    return P, jax.lax.fori_loop(0, DOUBLINGS, double, (dQ + K.T @ dR @ K + moved + moved.T, F))[0]


def gain(A: jax.Array, B: jax.Array, Q: jax.Array, R: jax.Array) -> jax.Array:
    """K [m, n]."""
    return gain_of(A, B, R, solve(A, B, Q, R))


def gain_of(A, B, R, P):
    return divide(R + B.T @ P @ B, B.T @ P @ A)


def divide(S: jax.Array, X: jax.Array) -> jax.Array:
    """S⁻¹ X of S [m, m], symmetric and positive definite, and X [m, k]."""
    m = S.shape[0]
    solved = eliminate(S, jnp.concatenate([X, jnp.eye(m, dtype=S.dtype)], axis=1), 0.0)[0]
    return solved[:, -m:].T @ solved[:, :-m]


def root(S: jax.Array) -> jax.Array:
    """L [n, n] of S = L L', S symmetric and at least positive semi-definite: a column of nothing left is zero."""
    columns, tiny = [], S.shape[0] * jnp.finfo(S.dtype).eps * jnp.diagonal(S)
    for i in range(S.shape[0]):
        pivot = S[i, i]
        columns.append(S[i] * jnp.where(pivot > tiny[i], jax.lax.rsqrt(jnp.maximum(pivot, tiny[i])), 0.0))
        S = S - columns[-1][:, None] * columns[-1][None]
    return jnp.stack(columns, axis=1)


def symmetric(S: jax.Array) -> jax.Array:
    return (S + S.T) / 2
