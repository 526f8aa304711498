"""The ring against a Python list, windows against their enumeration, files against what was put into them."""
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.dataset import Dataset, ReplayBuffer, permutation
from core.errors import UserError

FILE = "core/dataset.py"
SAMPLE = "index = jax.random.randint(key, (batch_size,), 0, self.size)\n        return"
PLANTED_ERRORS = {
    "samples of what is empty": (FILE, """(batch_size,), 0, self.size)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(
""", """(batch_size,), 0, self.capacity)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(
""", "test_samples_are_all_entries_that_there_are_and_no_other"),
    "the last one is never drawn": (FILE, """(batch_size,), 0, self.size)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(self""", """(batch_size,), 0, self.size - 1)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(self""", "test_samples_are_all_entries_that_there_are_and_no_other"),
    "low bits overlap": (FILE, "<< bits) | index", "<< (bits - 1)) | index"),
    "a key too many": (FILE, "max(1, (n - 1).bit_length())", "1 + n.bit_length() // 9"),
    "truncation is no end": (FILE, ' | np.asarray(data["truncated"], bool)', ""),
    "termination is no end": (FILE, 'np.asarray(data["terminated"], bool) | ', ""),
    "one step more left": (FILE, "- np.arange(n) + 1", "- np.arange(n) + 2"),
    "one step less left": (FILE, "- np.arange(n) + 1", "- np.arange(n)"),
    "flags stay numbers": (FILE, "np.asarray(data[name]) != 0 for", "data[name] for",
                           "test_flags_of_any_type_are_flags"),
    "shortest first": (FILE, "np.argsort(-left", "np.argsort(left"),
    "last window of an episode lost": (FILE, "(self.left >= length)", "(self.left > length)"),
    "pickles allowed": (FILE, "allow_pickle=False", "allow_pickle=True"),
    "written in place": ("core/files.py", 'path.with_name(f".{path.name}.{os.getpid()}.partial")', "path"),
    "never quite full": (FILE, "(self.size + n, self.capacity)", "(self.size + n, self.capacity - 1)"),
    "grows beyond itself": (FILE, "jnp.minimum(self.size + n, self.capacity)", "self.size + n"),
    "wraps one early": (FILE, "n - kept, n)) % self.capacity", "n - kept, n)) % (self.capacity - 1)"),
    "of too many the first remain": (FILE, "new[n - kept:]", "new[:kept]"),
    "too many land at the wrong place": (FILE, "jnp.arange(n - kept, n)", "jnp.arange(kept)"),
    "write position stays": (FILE, "(self.pos + n) % self.capacity, ", "self.pos, "),
    "window over the write position": (FILE, "0, self.size - span)", "0, self.size)"),
    "window over the write position, with flags": (FILE, "(age < self.size - span)", "(age < self.size)"),
    "newest window lost": (FILE, "(age < self.size - span)", "(age < self.size - span - 1)"),
    "ages from the write position": (FILE, "oldest, span = self.pos - self.size,", "oldest, span = self.pos,"),
    "no end at the last step": (FILE, "(going_on, length - 1, num_envs)", "(going_on, length, num_envs)"),
    "end before the last step": (FILE, "(going_on, length - 1, num_envs)", "(going_on, max(0, length - 2), num_envs)"),
    "environments mixed": (FILE, "num_envs * jnp.arange(length)[:, None]", "jnp.arange(length)[:, None]"),
    "ends of other environments": (FILE, "length - 1, num_envs) &", "length - 1, 1) &"),
    "newest first": (FILE, "num_envs * jnp.arange(length)", "num_envs * jnp.arange(length)[::-1]"),
    "overlap forgotten": (FILE, "return flag & jnp.roll(flag, -(n - width) * stride)", "return flag"),
}
QUICK = settings(max_examples=15, deadline=None, derandomize=True, database=None)
CHI2_999 = {1: 10.8, 2: 13.8, 4: 18.5, 7: 24.3, 9: 27.9, 11: 31.3, 23: 49.7}  # 99.9% quantiles, by degrees of freedom


def assert_uniform(draws):
    """Every value that occurs in `draws` is as probable as every other."""
    _, count = np.unique(draws, return_counts=True)
    quantile = min(v for k, v in CHI2_999.items() if k >= len(count) - 1) if len(count) > 1 else 1.0
    assert np.square(count - count.mean()).sum() / count.mean() < quantile


def transitions(start, n, ends=()):
    """n numbered transitions; those in `ends` finish an episode, every other one by a time limit."""
    number = np.arange(start, start + n)
    done = np.isin(number, ends)
    return dict(obs=dict(image=np.stack([number, -number], 1).astype(np.float32)), number=number.astype(np.int32),
                terminated=done & (number % 2 == 0), truncated=done & (number % 2 == 1))


def numbers(batch):
    """Their numbers, having checked that every leaf tells the same."""
    np.testing.assert_array_equal(batch["obs"]["image"][..., 0], batch["number"])
    np.testing.assert_array_equal(batch["obs"]["image"][..., 1], -batch["number"])
    return np.asarray(batch["number"])


add, sample = jax.jit(ReplayBuffer.add), jax.jit(ReplayBuffer.sample, static_argnums=2)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 8192])
def test_a_permutation_holds_every_index_once(n):
    order = permutation(jax.random.key(n), n)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_all_permutations_are_equally_probable():
    orders = jax.vmap(lambda key: permutation(key, 4))(jax.random.split(jax.random.key(0), 4800))
    codes = np.asarray(orders) @ 4 ** np.arange(4)
    assert len(np.unique(codes)) == 24
    assert_uniform(codes)
    first = jax.vmap(lambda key: permutation(key, 1000)[0])(jax.random.split(jax.random.key(1), 4000))
    assert_uniform(np.asarray(first) // 100)


@QUICK
@given(capacity=st.sampled_from([1, 5, 8]), sizes=st.lists(st.sampled_from([1, 3, 8, 13]), max_size=6))
def test_the_ring_is_the_end_of_a_list(capacity, sizes):
    buffer, model = ReplayBuffer.create(jax.tree.map(lambda x: x[0], transitions(0, 1)), capacity), []
    for n in sizes:
        buffer = add(buffer, transitions(len(model), n))
        model += range(len(model), len(model) + n)
    size = min(len(model), capacity)
    assert (int(buffer.size), int(buffer.pos)) == (size, len(model) % capacity)
    ages = (int(buffer.pos) - size + np.arange(size)) % capacity
    assert numbers(jax.tree.map(lambda x: np.asarray(x)[ages], buffer.data)).tolist() == model[-size:] * (size > 0)
    if size:
        drawn = numbers(sample(buffer, jax.random.key(0), 512))
        assert set(drawn) == set(model[-size:])
        assert_uniform(drawn)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def windows(buffer, length, num_envs, flags):
    done = buffer.data["terminated"] | buffer.data["truncated"] if flags else None
    return buffer.sample_trajectories(jax.random.key(7), 600, length, done, num_envs)


@pytest.mark.parametrize("num_envs, length", [(1, 1), (1, 2), (1, 4), (3, 2), (3, 3)])
@QUICK
@given(steps=st.integers(1, 11), capacity=st.sampled_from([10, 12]), flags=st.booleans(),
       ends=st.sets(st.integers(0, 32), max_size=6))
@example(steps=4, capacity=12, flags=True, ends={4})
def test_windows_are_all_that_are_whole(num_envs, length, steps, capacity, flags, ends):
    """Entry i belongs to environment i % num_envs."""
    buffer, n = ReplayBuffer.create(jax.tree.map(lambda x: x[0], transitions(0, 1)), capacity), num_envs * steps
    for first in range(0, n, num_envs):
        buffer = add(buffer, transitions(first, num_envs, list(ends)))
    there = range(max(0, n - capacity), n)
    whole = [range(first, first + length * num_envs, num_envs) for first in there]
    whole = {tuple(w) for w in whole if w[-1] in there and not (flags and ends & set(w[:-1]))}
    if whole:
        drawn = numbers(windows(buffer, length, num_envs, flags))
        assert drawn.shape == (length, 600)
        assert {tuple(w) for w in drawn.T} == whole
        assert_uniform(drawn[0])


@QUICK
@given(ends=st.sets(st.integers(0, 11)), length=st.sampled_from([1, 2, 5]))
def test_windows_of_a_dataset_are_all_of_its_episodes(ends, length):
    n = 12
    dataset = Dataset.create(transitions(0, n, list(ends)))
    windows = [range(first, first + length) for first in range(n - length + 1)]
    whole = {tuple(w) for w in windows if not ends & set(w[:-1])}
    if not whole:
        with pytest.raises(UserError, match=f"longest episode has {dataset.longest}"):
            dataset.sample_trajectories(jax.random.key(0), 1, length)
        return
    drawn = numbers(dataset.sample_trajectories(jax.random.key(0), 600, length))
    assert {tuple(w) for w in drawn.T} == whole
    assert_uniform(drawn[0])
    assert_uniform(numbers(dataset.sample(jax.random.key(1), 600)))


def test_a_buffer_starts_from_a_dataset():
    dataset = Dataset.create(transitions(0, 4))
    buffer = ReplayBuffer.from_dataset(dataset, 5).add(transitions(4, 2))
    assert numbers(buffer.data).tolist() == [5, 1, 2, 3, 4]
    full = ReplayBuffer.from_dataset(dataset, 4)
    assert (int(full.size), int(full.pos)) == (4, 0)
    with pytest.raises(UserError, match="4 transitions does not fit a buffer of 3"):
        ReplayBuffer.from_dataset(dataset, 3)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_training_on_a_buffer_does_not_copy_it(seeds, rows):
    """Under jit, vmap over seeds, scan and donation; the state keeps its types, so nothing is traced twice."""
    capacity = 10_000
    example = jax.tree.map(lambda x: x[0], transitions(0, 1))

    def train(buffer, key):
        def step(buffer, key):
            buffer = buffer.add(transitions(0, rows))
            return buffer, jax.tree.map(jnp.sum, buffer.sample(key, 8))

        return jax.lax.scan(step, buffer, jax.random.split(key, 10))

    buffers = jax.vmap(lambda _: ReplayBuffer.create(example, capacity))(jnp.arange(seeds))
    keys = jax.random.split(jax.random.key(0), seeds)
    with jax.debug_key_reuse(False):
        if seeds == 1:
            buffers, keys = jax.tree.map(lambda x: x[0], (buffers, keys))
        compiled = jax.jit(train if seeds == 1 else jax.vmap(train), donate_argnums=0).lower(buffers, keys).compile()
        buffers, _ = compiled(buffers, keys)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * seeds * capacity * 14
    np.testing.assert_array_equal(buffers.size, 10 * rows)


def test_files_give_back_what_was_put_into_them(tmp_path):
    data = transitions(0, 6, [2, 3])
    data["obs"]["half"] = np.arange(6, dtype=np.float16)
    dataset, path = Dataset.create(data), tmp_path / "data.npz"
    dataset.save(path)
    again = Dataset.load(path)
    jax.tree.map(np.testing.assert_array_equal, dataset, again)
    assert jax.tree.map(lambda x: x.dtype, dataset) == jax.tree.map(lambda x: x.dtype, again)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    Dataset.create(transitions(0, 6)).save(path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError):
        Dataset.create(transitions(9, 6)).save(path)
    assert path.read_bytes() == before


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_flags_of_any_type_are_flags(kind):
    data = transitions(0, 6, [2, 3])
    dataset = Dataset.create(data | {name: data[name].astype(kind) for name in ("terminated", "truncated")})
    jax.tree.map(np.testing.assert_array_equal, dataset, Dataset.create(data))
    assert dataset.data["terminated"].dtype == dataset.data["truncated"].dtype == bool


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "data.npz"
    Dataset.create(transitions(0, 600)).save(path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[1000] ^= 1
    np.savez(tmp_path / "pickled.npz", terminated=np.array([Bomb()]), truncated=np.zeros(1))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (whole[:700], whole[:-9], bytes(damaged), b"", b"text", pickle.dumps(Bomb()),
                    (tmp_path / "pickled.npz").read_bytes(), (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.npz holds no arrays, or is damaged"):
            Dataset.load(path)


@pytest.mark.parametrize("change, words", [
    (dict(truncated=None), '"truncated" is missing'), (dict(number=np.zeros(5)), '"number" has 5'),
    (dict(obs=dict(image=np.zeros((7, 2)))), '"obs/image" has 7')])
def test_bad_data_are_named(change, words):
    data = {k: v for k, v in (transitions(0, 6) | change).items() if v is not None}
    with pytest.raises(UserError, match=words):
        Dataset.create(data)


def test_samples_are_all_entries_that_there_are_and_no_other():
    """Of a buffer that is filled in part, of one that has wrapped, and of a data set."""
    data = dict(x=jnp.arange(1, 8), terminated=jnp.zeros(7, bool), truncated=jnp.arange(7) == 6)
    empty = ReplayBuffer.create(jax.tree.map(lambda x: x[0], data), 5)
    part, wrapped = empty.add(jax.tree.map(lambda x: x[:3], data)), empty.add(data)
    for source, entries in ((part, {1, 2, 3}), (wrapped, {3, 4, 5, 6, 7}), (Dataset.create(data), set(range(1, 8)))):
        drawn = source.sample(jax.random.key(0), 300)["x"]
        assert set(np.asarray(drawn).tolist()) == entries
