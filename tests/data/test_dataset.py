"""Samples, blends and batches: exactly once per epoch, right labels, the same batches under any layout."""

import collections
import gc
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import dataset as module
from moetrain.data.dataset import (
    IGNORE,
    BatchIterator,
    BlendedDataset,
    EvalSet,
    Source,
    _Blend,
    _permute,
    _shuffled,
)
from moetrain.data.indexed import IndexedWriter


def write(prefix, lengths, first=0, dtype=np.int32):
    """Documents whose tokens are all different, first, first+1, ..., so that a token tells where it comes
    from.
    """
    with IndexedWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return prefix


def owner_of(lengths, first=0):
    """token -> document number"""
    return {first + i: d for i, d in enumerate(np.repeat(np.arange(len(lengths)), lengths).tolist())}


def check_sample(sample, owner, isolate):
    """One sample against the rules, token by token; real tokens are above 0. Returns them."""
    tokens, labels = sample.tokens.tolist(), sample.labels.tolist()
    used = int(np.count_nonzero(sample.tokens))
    document = position = 0
    for t in range(used):
        if t and isolate and owner[tokens[t]] != owner[tokens[t - 1]]:
            document, position = document + 1, 0
        assert sample.document_ids[t] == document and sample.positions[t] == position
        position += 1
        if labels[t] != IGNORE and isolate:
            assert labels[t] == tokens[t] + 1 and owner[labels[t]] == owner[tokens[t]]
        if t + 1 < used and (not isolate or owner[tokens[t]] == owner[tokens[t + 1]]):
            assert labels[t] == tokens[t + 1]
    return tokens[:used]


lengths_strategy = st.lists(st.integers(0, 25), min_size=1, max_size=30).filter(sum)


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_strategy,
    seq_len=st.integers(1, 17),
    isolate=st.booleans(),
    shuffle=st.booleans(),
    group=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_every_token_once_per_epoch(tmp_path_factory, lengths, seq_len, isolate, shuffle, group, seed):
    """In each epoch every token is an input exactly once; labels, positions and ids obey a per-token
    reference.
    """
    # Token 0 is padding's: real tokens begin at 1.
    prefix = write(tmp_path_factory.mktemp("x") / "a", lengths, first=1)
    owner = owner_of(lengths, first=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP", group)
        data = BlendedDataset(
            [Source("a", prefix)], seq_len, seed, isolate_documents=isolate, shuffle=shuffle
        )
        (windows,) = data.windows_per_epoch
        assert windows == -(-sum(lengths) // seq_len)
        for epoch in range(3):
            seen, predicted = collections.Counter(), collections.Counter()
            for g in range(epoch * windows, (epoch + 1) * windows):
                assert data.locate(g) == (0, epoch, g % windows)
                sample = data[g]
                assert (sample.source, sample.index) == (0, g)
                used = int(np.count_nonzero(sample.tokens))
                assert not sample.tokens[used:].any() and (sample.labels[used:] == IGNORE).all()
                if isolate and 0 < used < seq_len:
                    assert (sample.document_ids[used:] == sample.document_ids[used - 1] + 1).all()
                    assert sample.positions[used:].tolist() == list(range(seq_len - used))
                seen.update(check_sample(sample, owner, isolate))
                predicted.update(sample.labels[sample.labels != IGNORE].tolist())
            assert seen == collections.Counter(range(1, sum(lengths) + 1))
            # Everything is predicted once, but the first token of each document, or of the epoch.
            assert set(predicted.values()) <= {1}
            documents = sum(length > 0 for length in lengths)
            assert len(predicted) == sum(lengths) - (documents if isolate else 1)
            if isolate:
                firsts = {token for token in owner if owner.get(token - 1) != owner[token]}
                assert not firsts & set(predicted)


def reference_in_order(lengths, seq_len, isolate):
    """All windows of documents in file order, written as slowly and plainly as possible."""
    stream = [(token, d) for token, d in owner_of(lengths, first=1).items()]
    for begin in range(0, len(stream), seq_len):
        tokens, labels, positions, ids = [], [], [], []
        for t in range(begin, begin + seq_len):
            real = t < len(stream)
            new = t == begin or (isolate and (stream[t][1] != stream[t - 1][1] if real else t == len(stream)))
            tokens.append(stream[t][0] if real else 0)
            positions.append(0 if new else positions[-1] + 1)
            ids.append((ids[-1] + 1 if ids else 0) if new else ids[-1])
            has_next = t + 1 < len(stream) and (not isolate or stream[t + 1][1] == stream[t][1])
            labels.append(stream[t + 1][0] if has_next else IGNORE)
        yield tokens, labels, positions, ids


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_strategy,
    seq_len=st.integers(1, 17),
    isolate=st.booleans(),
    limit=st.none() | st.integers(1, 9),
)
def test_eval_set_equals_reference(tmp_path_factory, lengths, seq_len, isolate, limit):
    """EvalSet, and BlendedDataset without shuffle, equal the reference field by field."""
    prefix = write(tmp_path_factory.mktemp("x") / "a", lengths, first=1)
    expected = list(reference_in_order(lengths, seq_len, isolate))[:limit]
    evaluation = EvalSet("a", prefix, seq_len, isolate, limit)
    data = BlendedDataset([Source("a", prefix)], seq_len, 0, isolate_documents=isolate, shuffle=False)
    assert len(evaluation) == len(expected)
    for i, fields in enumerate(expected):
        for sample in (evaluation[i], data[i]):
            found = (sample.tokens, sample.labels, sample.positions, sample.document_ids)
            assert tuple(field.tolist() for field in found) == fields
            assert [field.dtype for field in found] == [np.int64, np.int64, np.int64, np.int32]
    for bad in (-1, len(expected)):
        with pytest.raises(IndexError):
            evaluation[bad]


def test_shuffle_depends_on_seed_and_epoch(tmp_path):
    """Another seed or epoch gives another order of windows and other neighbours in them; the same gives the
    same.
    """
    prefix = write(tmp_path / "a", [7] * 300, first=1)

    def epoch(seed, number):
        data = BlendedDataset([Source("a", prefix)], 20, seed)
        (windows,) = data.windows_per_epoch
        return [tuple(data[g].tokens.tolist()) for g in range(number * windows, (number + 1) * windows)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert epoch(0, 0) == orders[0]
    for i in range(3):
        for j in range(i):
            assert len(set(orders[i]) & set(orders[j])) < 10
            assert orders[i] != orders[j]


def test_documents_are_mixed_across_groups(tmp_path, monkeypatch):
    """Beyond one group too, the order differs from the file's; the windows of an epoch come in no order."""
    monkeypatch.setattr(module, "GROUP", 16)
    prefix = write(tmp_path / "a", [10] * 400, first=1)
    data = BlendedDataset([Source("a", prefix)], 10, 0)
    order = [int(data[g].tokens[0]) for g in range(400)]
    assert abs(np.corrcoef(order, range(400))[0, 1]) < 0.2
    assert sum(abs(a - b) <= 10 for a, b in zip(order, order[1:], strict=False)) < 20


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permutations_are_permutations(count, seed):
    """Both shuffles hit every place once."""
    assert sorted(_permute(i, count, seed) for i in range(count)) == list(range(count))
    assert sorted(_shuffled(count, seed).tolist()) == list(range(count))


def test_permutation_is_uniform():
    """Where an item lands, over many seeds, fits a uniform distribution (chi-squared of 9 degrees of
    freedom).
    """
    for item in (0, 1, 9):
        for landing in (
            [_permute(item, 10, seed * 7919) for seed in range(4000)],
            [int(_shuffled(10, seed * 7919)[item]) for seed in range(4000)],
        ):
            counts = np.bincount(landing, minlength=10)
            assert ((counts - 400) ** 2 / 400).sum() < 33.7  # p = 1e-4


def test_order_is_frozen(tmp_path):
    """The order of samples of a fixed data set is fixed: a change would silently break resumed runs."""
    sources = [
        Source("a", write(tmp_path / "a", [5, 3, 9, 4] * 30)),
        Source("b", write(tmp_path / "b", [11] * 20, 1000)),
    ]
    data = BlendedDataset(sources, 8, seed=3, temperature=0.5)
    assert [data.locate(g)[0] for g in range(12)] == [1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    assert [int(data[g].tokens[0]) for g in range(12)] == [
        1112,
        299,
        361,
        1195,
        435,
        1056,
        178,
        155,
        1170,
        559,
        212,
        1109,
    ]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=40),
    seed=st.integers(0, 9),
    start=st.sampled_from([0, 63, 10**6 + 7, 10**12]),
)
def test_shares_of_every_prefix(weights, seed, start):
    """Every prefix holds each source within 4 samples of its share, and numbers its samples without a gap,
    also far out.
    """
    shares = np.array(weights) / sum(weights)
    blend = _Blend(shares.tolist(), seed)
    counts = np.array([blend.count(source, start) for source in range(len(weights))])
    assert counts.sum() == start
    for index in range(start, start + 200):
        source, number = blend.locate(index)
        assert number == counts[source]
        counts[source] += 1
        # 1e-12 of the share is lost to rounding.
        assert np.abs(counts - shares * (index + 1)).max() < 4 + 1e-11 * index
    assert counts.tolist() == [blend.count(source, start + 200) for source in range(len(weights))]


def test_sources_do_not_fall_into_step_with_ranks():
    """With shares 1/2, 1/4, 1/4 and 4 ranks, each rank sees each source in its share, not one source for
    ever.
    """
    blend = _Blend([0.5, 0.25, 0.25], 0)
    counts = np.zeros((4, 3))
    for index in range(16_000):
        counts[index % 4, blend.locate(index)[0]] += 1
    assert np.abs(counts / 4000 - [0.5, 0.25, 0.25]).max() < 0.1


def test_weights_and_temperature(tmp_path):
    """p_i ~ n_i^temperature, default proportional; explicit weights are normalised; both together are
    refused.
    """
    sizes = (1000, 100, 10)
    prefixes = [write(tmp_path / str(size), [size]) for size in sizes]

    def shares(temperature=None, weights=(None,) * 3):
        sources = [
            Source(str(i), prefix, weight)
            for i, (prefix, weight) in enumerate(zip(prefixes, weights, strict=True))
        ]
        return BlendedDataset(sources, 8, 0, temperature=temperature).probabilities

    n = np.array(sizes)
    np.testing.assert_allclose(shares(), n / n.sum(), rtol=1e-11)
    for temperature in (0, 0.3, 1, 2):
        np.testing.assert_allclose(shares(temperature), n**temperature / (n**temperature).sum(), rtol=1e-11)
    np.testing.assert_allclose(shares(weights=(3, 2, 5)), [0.3, 0.2, 0.5], rtol=1e-11)
    with pytest.raises(ValueError, match="exclude each other"):
        shares(1.0, (1, 1, 1))
    for weights in ((1, None, 1), (1, 0, 1), (1, -2, 1), (1, float("nan"), 1), (1, float("inf"), 1)):
        with pytest.raises(ValueError, match="'1': weight is"):
            shares(weights=weights)
    for temperature in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            shares(temperature)


def test_blend_covers_each_source(tmp_path):
    """In a blend each source runs through its own epochs: every token once in each, at its own pace."""
    lengths = {"a": [13] * 9, "b": [40, 2, 5]}
    prefixes = {"a": write(tmp_path / "a", lengths["a"], 1), "b": write(tmp_path / "b", lengths["b"], 1001)}
    data = BlendedDataset(
        [Source(name, prefix, w) for (name, prefix), w in zip(prefixes.items(), (1, 3), strict=True)], 8, 1
    )
    seen = collections.defaultdict(collections.Counter)
    for g in range(400):
        source, epoch, _ = data.locate(g)
        sample = data[g]
        assert sample.source == source
        seen[source, epoch].update(sample.tokens[sample.tokens > 0].tolist())
    for source, (name, first) in enumerate((("a", 1), ("b", 1001))):
        done = data.samples_of(400)[source] // data.windows_per_epoch[source]
        assert done >= 5
        for epoch in range(done):
            assert seen[source, epoch] == collections.Counter(range(first, first + sum(lengths[name])))
    assert data.samples_of(400) == (100, 300)
    assert data.num_tokens == (117, 47)


@pytest.fixture
def blend(tmp_path):
    sources = [
        Source("a", write(tmp_path / "a", [5, 30, 1, 17] * 20, 1), 2.0),
        Source("b", write(tmp_path / "b", [8] * 50, 5001), 1.0),
    ]
    return BlendedDataset(sources, 16, 11)


def global_batches(data, world, steps, start=0, **options):
    """Steps as lists of micro-batches, rows of all ranks in rank order; all ranks run side by side."""
    iterators = [
        BatchIterator(
            data,
            global_batch_size=16,
            micro_batch_size=4 // world,
            dp_rank=rank,
            dp_world=world,
            start_sample=start,
            **options,
        )
        for rank in range(world)
    ]
    out = []
    for _ in range(steps):
        ranks = [next(iterator) for iterator in iterators]
        out.append(
            [
                {key: torch.cat([rank[m][key] for rank in ranks]) for key in ranks[0][m]}
                for m in range(len(ranks[0]))
            ]
        )
    states = {json.dumps(iterator.state()) for iterator in iterators}
    assert len(states) == 1
    for iterator in iterators:
        iterator.close()
    return out, json.loads(states.pop())


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.keys() == y.keys()
            for key in x:
                assert x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]), key


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_do_not_depend_on_ranks_or_prefetch(blend, prefetch):
    """dp = 1, 2, 4, with and without the thread, give the same global micro-batches, over several epochs."""
    expected, state = global_batches(blend, 1, 30, prefetch=0)
    assert state == {"consumed_samples": 480} and blend.locate(479)[1] >= 1
    for world in (1, 2, 4):
        assert_same(global_batches(blend, world, 30, prefetch=prefetch)[0], expected)
    flat = torch.cat([micro["sample_index"] for step in expected for micro in step])
    assert flat.tolist() == list(range(480))
    first = expected[0][0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in first.items()} == {
        "tokens": ((4, 16), torch.int64), "labels": ((4, 16), torch.int64),
        "positions": ((4, 16), torch.int64), "document_ids": ((4, 16), torch.int32),
        "sample_index": ((4,), torch.int64), "source": ((4,), torch.int64),
    }  # fmt: skip
    for row in range(4):
        assert torch.equal(first["tokens"][row], torch.from_numpy(blend[row].tokens))
        assert first["source"][row] == blend[row].source


def test_resume_with_other_ranks(blend):
    """A run stopped in the middle of an epoch and continued on other ranks, with new objects, gets the same
    batches.
    """
    expected, _ = global_batches(blend, 2, 12)
    head, state = global_batches(blend, 4, 5)
    again = BlendedDataset(blend.sources, 16, 11)
    assert again.fingerprint() == blend.fingerprint()
    tail, _ = global_batches(again, 1, 7, start=state["consumed_samples"])
    assert_same(head + tail, expected)


def test_samples_are_pure(blend):
    """A sample does not depend on what was read before: any order, from several threads."""
    expected = [blend[g].tokens.tolist() for g in range(300)]
    again = BlendedDataset(blend.sources, 16, 11)
    found = {}

    def read(part):
        for g in np.random.default_rng(part).permutation(300).tolist():
            found[part, g] = again[g].tokens.tolist()

    threads = [threading.Thread(target=read, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[part, g] == expected[g] for part in range(3) for g in range(300))


def test_state_counts_what_was_given_out(blend):
    """Steps built ahead do not count."""
    with BatchIterator(
        blend, global_batch_size=8, micro_batch_size=4, dp_rank=0, dp_world=2, start_sample=24, prefetch=4
    ) as batches:
        assert batches.state() == {"consumed_samples": 24}
        next(batches)
        while batches._queue.qsize() < 4:
            time.sleep(0.001)
        assert batches.state() == {"consumed_samples": 32}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_end_fills_up_with_blanks(tmp_path, prefetch):
    """The last step of an EvalSet gives every sample once and equally many micro-batches on every rank."""
    evaluation = EvalSet("a", write(tmp_path / "a", [9] * 13, 1), 8)  # 117 tokens: 15 sequences
    indices, labels = [], []
    for rank in range(2):
        with BatchIterator(
            evaluation, global_batch_size=8, micro_batch_size=2, dp_rank=rank, dp_world=2, prefetch=prefetch
        ) as batches:
            steps = list(batches)
            assert batches.state() == {"consumed_samples": 15}
            assert list(batches) == []
        assert [len(step) for step in steps] == [2, 2]
        for micro in (micro for step in steps for micro in step):
            indices += micro["sample_index"].tolist()
            labels += micro["labels"][micro["labels"] != IGNORE].tolist()
            blank = micro["sample_index"] == -1
            assert (micro["labels"][blank] == IGNORE).all() and (micro["source"][blank] == -1).all()
    assert sorted(indices) == [-1, *range(15)]
    assert sorted(labels) == [token for token in range(1, 118) if token % 9 != 1]


class Failing:
    def __getitem__(self, index):
        if index >= 8:
            raise OSError("disk gone")
        return module.Sample(*[np.zeros(4, np.int64)] * 3, np.zeros(4, np.int32), 0, index)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer(prefetch):
    """An error of the thread comes out of `next` in its place, each time, and is never an early end."""
    batches = BatchIterator(
        Failing(), global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_world=1, prefetch=prefetch
    )
    next(batches), next(batches)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(batches)
    assert batches.state() == {"consumed_samples": 8}
    batches.close()


def test_threads_end(blend):
    """Closed or just dropped, with a full queue, an iterator leaves no thread behind."""

    def alive():
        return [thread for thread in threading.enumerate() if thread.name == "data prefetch"]

    options = dict(global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_world=1, prefetch=1)
    batches = BatchIterator(blend, **options)
    next(batches)
    batches.close()
    batches.close()
    assert not alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    batches = BatchIterator(blend, **options)
    assert alive()
    del batches
    gc.collect()
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


@pytest.mark.parametrize(
    "options, text",
    [
        (
            dict(global_batch_size=100),
            r"global_batch_size \(100\).*micro_batch_size \(4\).*\(8\) = 32; nearest: 96 or 128",
        ),
        (dict(global_batch_size=8), r"nearest: 32$"),
        (dict(global_batch_size=0), r"global_batch_size \(0\)"),
        (dict(micro_batch_size=0), r"micro_batch_size \(0\)"),
        (dict(dp_rank=8), r"rank \(8\) must be 0\.\.7"),
        (dict(start_sample=-1), r"start_sample \(-1\)"),
    ],
)
def test_batch_sizes_that_cannot_work(blend, options, text):
    """Each number that can't work is named, with the nearest that would."""
    with pytest.raises(ValueError, match=text):
        BatchIterator(
            blend, **{**dict(global_batch_size=32, micro_batch_size=4, dp_rank=0, dp_world=8), **options}
        )


def test_bad_sources(tmp_path):
    """No sources, equal names, empty files and truncated files are clear errors."""
    prefix = write(tmp_path / "a", [10] * 5)
    with pytest.raises(ValueError, match="at least one"):
        BlendedDataset([], 8, 0)
    with pytest.raises(ValueError, match="'a' is used more than once"):
        BlendedDataset([Source("a", prefix), Source("a", prefix)], 8, 0)
    with pytest.raises(ValueError, match=r"seq_len \(0\)"):
        BlendedDataset([Source("a", prefix)], 0, 0)
    with pytest.raises(ValueError, match="max_sequences"):
        EvalSet("a", prefix, 8, max_sequences=0)
    with pytest.raises(ValueError, match="'e'.*holds no tokens"):
        EvalSet("e", write(tmp_path / "e", [0, 0]), 8)
    os.truncate(tmp_path / "a.bin", 150)
    with pytest.raises(ValueError, match="a.bin: cut short.*expected 200 bytes.*found 150"):
        BlendedDataset([Source("a", prefix)], 8, 0)


def test_tokens_beyond_the_vocabulary(tmp_path):
    """A token id >= vocab_size is found when read and, where PREFIX.json tells, at opening."""
    prefix = write(tmp_path / "a", [10])
    assert EvalSet("a", prefix, 4, vocab_size=10)[2].tokens.tolist() == [8, 9, 0, 0]
    evaluation = EvalSet("a", prefix, 4, vocab_size=9)
    evaluation[0]
    with pytest.raises(ValueError, match=r"'a' .*token id 9, but the model's vocab_size is 9"):
        evaluation[2]
    (tmp_path / "a.json").write_text('{"max_token_id": 9}')
    EvalSet("a", prefix, 4, vocab_size=10)
    with pytest.raises(ValueError, match="vocab_size is 9"):
        BlendedDataset([Source("a", prefix)], 4, 0, vocab_size=9)
    with IndexedWriter(tmp_path / "n", np.int32) as writer:
        writer.add_document(np.array([3, -1]))
    with pytest.raises(ValueError, match="token id -1"):
        EvalSet("n", tmp_path / "n", 4, vocab_size=9)[0]


def test_fingerprint(tmp_path):
    """Equal for equal data elsewhere; different for each setting and for changed tokens, documents, names,
    order.
    """
    write(tmp_path / "a", [10, 20, 30])
    write(tmp_path / "b", [60])
    a, b = Source("a", tmp_path / "a"), Source("b", tmp_path / "b")
    base = BlendedDataset([a, b], 8, 0)
    write(tmp_path / "moved", [10, 20, 30])
    assert BlendedDataset([Source("a", tmp_path / "moved"), b], 8, 0).fingerprint() == base.fingerprint()
    json.dumps(base.describe())
    write(tmp_path / "split", [10, 30, 20])
    write(tmp_path / "other", [10, 20, 30], first=1)
    prints = [base.fingerprint()] + [
        BlendedDataset(sources, *args, **options).fingerprint()
        for sources, args, options in [
            ([b, a], (8, 0), {}),
            ([a], (8, 0), {}),
            ([Source("c", tmp_path / "a"), b], (8, 0), {}),
            ([Source("a", tmp_path / "split"), b], (8, 0), {}),
            ([Source("a", tmp_path / "other"), b], (8, 0), {}),
            ([a, b], (9, 0), {}),
            ([a, b], (8, 1), {}),
            ([a, b], (8, 0), {"isolate_documents": False}),
            ([a, b], (8, 0), {"shuffle": False}),
            ([Source("a", tmp_path / "a", 2.0), Source("b", tmp_path / "b", 1.0)], (8, 0), {}),
        ]
    ]
    assert len(set(prints)) == len(prints)
