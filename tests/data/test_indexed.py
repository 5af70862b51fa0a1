"""The .bin/.idx format: our own round trip, both ways with Megatron, and damaged files."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrain.data.indexed import HEADER, IndexedReader, IndexedWriter, best_dtype, read_meta


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.asarray(document, dtype=np.int64))
    return prefix


def same(reader, documents):
    return reader.num_documents == len(documents) and all(
        np.array_equal(reader.document(i), document) for i, document in enumerate(documents)
    )


DOCUMENTS = [[1, 2, 3], [], [65535], list(range(1000)), []]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 65535)), max_size=12),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    """What is written is read, document by document and as one array; empty documents and empty files too."""
    reader = IndexedReader(write(tmp_path_factory.mktemp("x") / "a.b", documents, dtype))
    assert reader.dtype == dtype and same(reader, documents)
    assert reader.tokens.tolist() == [token for document in documents for token in document]
    starts = np.concatenate(([0], np.cumsum([len(document) for document in documents]))).astype(int)
    assert reader.document_starts(0, len(documents) + 1).tolist() == starts.tolist()
    assert reader.document_starts(0, len(documents), 3).tolist() == starts[:-1][::3].tolist()


def test_chunked_index(tmp_path, monkeypatch):
    """The index is written, checked and joined in chunks: chunk borders change nothing."""
    write(tmp_path / "a", DOCUMENTS * 3)
    monkeypatch.setattr("moetrain.data.indexed.CHUNK", 4)
    write(tmp_path / "b", DOCUMENTS * 3)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    reader = IndexedReader(tmp_path / "b")
    with IndexedWriter(tmp_path / "c", np.uint16) as writer:
        writer.append(reader, max_documents=9)
        writer.append(reader)
    assert same(IndexedReader(tmp_path / "c"), (DOCUMENTS * 3)[:9] + DOCUMENTS * 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(tmp_path, dtype):
    """megatron.core.datasets sees the same dtype, documents and tokens."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = megatron.IndexedDataset(str(write(tmp_path / "x", DOCUMENTS, dtype)))
    assert theirs.index.dtype == dtype and len(theirs) == len(DOCUMENTS)
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    for i, document in enumerate(DOCUMENTS):
        assert theirs[i].tolist() == document


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(tmp_path, dtype):
    """Files of Megatron's builder, with documents of several sequences, are read; with one sequence each,
    byte-equal.
    """
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    assert same(IndexedReader(tmp_path / "m"), DOCUMENTS)
    write(tmp_path / "x", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"x{suffix}").read_bytes()

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=dtype)
    for sequences in ([[1, 2], [3]], [[4, 5, 6]], [], [[7], [8, 9], [10]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "s.idx"))
    reader = IndexedReader(tmp_path / "s")
    assert reader.num_sequences == 6 and same(reader, [[1, 2, 3], [4, 5, 6], [], [7, 8, 9, 10]])


def test_best_dtype_is_megatrons():
    """Same choice as Megatron at the border."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (1, 65499, 65500, 65536, 200000):
        assert best_dtype(size) is megatron.DType.optimal_dtype(size)


def test_every_cut_is_found(tmp_path):
    """A .bin or .idx cut at any byte, or with bytes too many, is a ValueError with file and both sizes."""
    write(tmp_path / "x", [[1, 2, 3], [4]])
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"x{suffix}"
        whole = path.read_bytes()
        for size in [*range(len(whole)), len(whole) + 1]:
            path.write_bytes((whole + b"\0")[:size])
            with pytest.raises(ValueError, match=rf"x\{suffix}: cut short.*expected.*\d+.*found {size}\b"):
                IndexedReader(tmp_path / "x")
        path.write_bytes(whole)
    IndexedReader(tmp_path / "x")


def test_corrupt_index(tmp_path):
    """Wrong magic, version, dtype, lengths, offsets and documents are refused, each by name."""
    write(tmp_path / "x", [[1, 2, 3], [4], [5]])
    path = tmp_path / "x.idx"
    whole = path.read_bytes()
    after = HEADER.size
    for place, value, text in [
        (0, b"X", "not a Megatron index"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", "dtype code 7"),
        (18, struct.pack("<Q", 1 << 60), "cut short or corrupt"),
        (after, struct.pack("<i", 2), "sequence 1 of 3"),
        (after + 8, struct.pack("<i", -1), "sequence 2 of 3 has length -1"),
        (after + 12 + 8, struct.pack("<q", 4), "has length 1 and offset 4, expected offset 6"),
        (after + 36, struct.pack("<q", 1), r"span sequences 1\.\.3"),
        (after + 36 + 24, struct.pack("<q", 9), r"span sequences 0\.\.9"),
        (after + 36 + 8, struct.pack("<q", 3), "backwards"),
    ]:
        path.write_bytes(whole[:place] + value + whole[place + len(value) :])
        with pytest.raises(ValueError, match=f"x.idx: .*{text}"):
            IndexedReader(tmp_path / "x")
    path.write_bytes(whole + bytes(3))
    with pytest.raises(ValueError, match="multimodal"):
        IndexedReader(tmp_path / "x")
    with pytest.raises(ValueError, match="y.idx: no such file; a data set is named by its prefix"):
        IndexedReader(tmp_path / "y")


def test_nothing_appears_before_the_end(tmp_path):
    """An unfinished or failed writer leaves no final file, and an earlier pair as it was."""
    write(tmp_path / "x", [[1, 2]])
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_document(np.array([9]))
    assert same(IndexedReader(tmp_path / "x"), [[1, 2]])
    writer.abort()
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.array([9]))
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]
    assert same(IndexedReader(tmp_path / "x"), [[1, 2]])


def test_replacing_never_pairs_old_with_new(tmp_path, monkeypatch):
    """At every rename of `finalize` there is a whole pair or no index at all; stale meta does not survive."""
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_document(np.array([1]))
    writer.finalize({"a": 1})
    assert read_meta(tmp_path / "x") == {"a": 1}
    rename, seen = os.replace, []

    def watch(source, target):
        seen.append((tmp_path / "x.idx").exists())
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write(tmp_path / "x", [[2], [3]])
    assert seen == [False, False] and read_meta(tmp_path / "x") is None
    assert same(IndexedReader(tmp_path / "x"), [[2], [3]])


def test_refused_input(tmp_path):
    """Ids that do not fit, wrong shapes and dtypes, and joining different dtypes are ValueErrors."""
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    for document in ([65536], [-1]):
        with pytest.raises(ValueError, match="do not fit uint16"):
            writer.add_document(np.array(document))
    with pytest.raises(ValueError, match="1-d integers, found 1-d float64"):
        writer.add_document(np.array([1.0]))
    with pytest.raises(ValueError, match="found 2-d"):
        writer.add_document(np.array([[1]]))
    with pytest.raises(ValueError, match="can't be joined"):
        writer.append(IndexedReader(write(tmp_path / "y", [[1]], np.int32)))
    with pytest.raises(ValueError, match="can't be stored as float32"):
        IndexedWriter(tmp_path / "z", np.float32)
    writer.abort()
    with pytest.raises(IndexError, match="document 1 of 1"):
        IndexedReader(tmp_path / "y").document(1)


def test_broken_meta(tmp_path):
    """PREFIX.json that is no JSON object is an error with its name."""
    for text in ("{", "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json"):
            read_meta(tmp_path / "x")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """Its last page would read as zeros; the reader says so, and is content when the bytes are there again."""
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.arange(1, 100, dtype=np.uint16))
    reader = IndexedReader(tmp_path / "x")
    reader.check()
    whole = (tmp_path / "x.bin").read_bytes()
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(50)
        assert reader.tokens[60] == 0
        with pytest.raises(ValueError, match=r"x\.bin: cut short .* expected 198 bytes .*, found 50"):
            reader.check()
        file.write(whole)
    reader.check()
    (tmp_path / "x.bin").unlink()  # a mapped file that is removed stays as it was
    reader.check()
