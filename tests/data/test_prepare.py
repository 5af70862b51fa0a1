"""Preparation: every input format, what is left out and reported, and that neither workers nor kills change a
byte.
"""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moetrain.data import prepare as module
from moetrain.data.indexed import IndexedReader, read_meta
from moetrain.data.prepare import prepare
from moetrain.data.tokenizer import ByteTokenizer

EOS = 257


def jsonl(path, texts, opener=open, newline="\n"):
    with opener(path, "wb") as file:
        file.write("".join(json.dumps({"text": text}) + newline for text in texts).encode())
    return path


def texts(prefix):
    """Documents as text; checks that each ends with the eos and has no other."""
    reader = IndexedReader(prefix)
    out = []
    for number in range(reader.num_documents):
        ids = reader.document(number).astype(int).tolist()
        assert ids[-1] == EOS and EOS not in ids[:-1]
        out.append(ByteTokenizer().decode(ids))
    return out


def contents(*prefixes):
    return [
        Path(f"{prefix}{suffix}").read_bytes() for prefix in prefixes for suffix in (".bin", ".idx", ".json")
    ]


def words(count, seed=0):
    return [f"document {i} é{'x' * ((i + seed) * 37 % 61)}" for i in range(count)]


def test_text_folder(tmp_path):
    """Folders are walked in order; hidden, foreign, binary, undecodable and empty files are left out and
    counted.
    """
    root = tmp_path / "in"
    for name, content in {
        "b.py": b"print(1)\r\n",
        "a.txt": "\ufeffé".encode(),
        "sub/c.MD": b"# c",
        "sub/deeper/d.txt": b"d",
        ".hidden.txt": b"no",
        ".git/x.txt": b"no",
        "image.png": b"no",
        "nul.txt": b"a\0b",
        "latin.txt": b"\xe9",
        "empty.txt": b"",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "dangling.txt").symlink_to("nowhere")
    report = prepare([root], tmp_path / "out", "byte")
    assert texts(tmp_path / "out") == ["é", "print(1)\r\n", "# c", "d"]
    assert report.skipped == {
        "hidden": 2, "other extension": 1, "not a regular file": 1, "binary file": 1, "not UTF-8": 1,
        "empty document": 1,
    }  # fmt: skip
    assert report.prefixes == {"all": str(tmp_path / "out")}
    assert (report.documents, report.tokens, report.text_bytes) == ({"all": 4}, {"all": 20}, {"all": 16})
    assert report.sources == {str(root): {"files": 7, "documents": 4, "tokens": 20, "text_bytes": 16}}
    assert not (tmp_path / "out.parts").exists()
    prepare([root], tmp_path / "md", "byte", extensions=[".md"])
    assert texts(tmp_path / "md") == ["# c"]


def test_every_format_gives_the_same_documents(tmp_path):
    """txt, jsonl, .gz, .zst (of several frames) and parquet (of several row groups) hold the same text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    expected = words(50)
    plain = jsonl(tmp_path / "a.jsonl", expected)
    jsonl(tmp_path / "b.jsonl.gz", expected, gzip.open)
    raw = plain.read_bytes()
    (tmp_path / "c.jsonl.zst").write_bytes(
        b"".join(zstandard.compress(part) for part in (raw[:700], b"", raw[700:]))
    )
    parquet.write_table(
        pyarrow.table({"id": range(50), "text": expected}), tmp_path / "d.parquet", row_group_size=7
    )
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        report = prepare([tmp_path / name], tmp_path / "out", "byte", unit_bytes=300)
        assert texts(tmp_path / "out") == expected, name
    assert report.units > 3
    names = ["d.parquet", "a.jsonl"]
    prepare([tmp_path / name for name in names], tmp_path / "out", "byte")
    assert texts(tmp_path / "out") == expected * 2


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_byte_ranges_cut_no_line(tmp_path, newline):
    """However small the units of a jsonl file, each line is read exactly once, and the result is the same."""
    expected = words(12)
    path = jsonl(tmp_path / "a.jsonl", expected, newline=newline)
    path.write_bytes(path.read_bytes().rstrip())  # the last line has no end
    prepare([path], tmp_path / "whole", "byte")
    assert texts(tmp_path / "whole") == expected
    # A range may begin in a line, at its first byte, or at its newline.
    line = path.read_bytes().index(b"\n") + 1
    for size in (5, line - 1, line, line + 1, 64, 500):
        prepare([path], tmp_path / "cut", "byte", unit_bytes=size, resume=False)
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_broken_lines_are_named(tmp_path):
    """Each kind of broken line is counted and named with file and line, whatever the cut; good lines all
    survive.
    """
    lines = [
        b'{"text": "one"}',
        b'{"text": ',
        b"",
        b'{"body": "x"}',
        b'{"text": 5}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ""}',
        b"[" * 2000,
        b'{"text": "two"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected = [
        (2, "bad JSON"), (4, "no key 'text'"), (5, "'text' is int, not a string"),
        (6, "object expected, found list"), (7, "not UTF-8"), (8, "lone surrogate"), (10, "bad JSON"),
    ]  # fmt: skip
    for size in (1 << 20, 30):
        report = prepare([path], tmp_path / "out", "byte", unit_bytes=size, resume=False)
        assert texts(tmp_path / "out") == ["one", "two"]
        assert report.broken_lines == len(expected) and report.skipped == {"empty document": 1}
        for example, (line, reason) in zip(report.broken_examples, expected, strict=True):
            assert example.startswith(f"{path}:{line}: ") and reason in example
        with pytest.raises(ValueError, match=r"a.jsonl:2: bad JSON.*strict"):
            prepare([path], tmp_path / "strict", "byte", unit_bytes=size, strict=True)
    path.write_bytes(b"\n".join([lines[0]] * 30 + [b"{"]))
    with pytest.raises(ValueError, match=r"a.jsonl:31: bad JSON"):
        prepare([path], tmp_path / "strict", "byte", unit_bytes=50, strict=True)
    path.write_bytes(b"{\n" * 30 + lines[0])
    report = prepare([path], tmp_path / "out", "byte", unit_bytes=5)
    assert report.broken_lines == 30
    assert [example.split(":")[1] for example in report.broken_examples] == [
        str(line) for line in range(1, 21)
    ]
    assert read_meta(tmp_path / "out")["broken_examples"] == report.broken_examples


def test_long_line_is_left_out(tmp_path, monkeypatch):
    """A line beyond the limit is counted, not held; its neighbours are read. A long text file is refused."""
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    path = jsonl(tmp_path / "a.jsonl", ["one", "x" * 3000, "two", "y" * 90])
    for size in (1 << 20, 10):
        report = prepare([path], tmp_path / "out", "byte", unit_bytes=size, resume=False)
        assert texts(tmp_path / "out") == ["one", "two"]
        assert [example.split(":")[1] for example in report.broken_examples] == ["2", "4"]
    (tmp_path / "b.txt").write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match="b.txt: .* split it"):
        prepare([tmp_path / "b.txt"], tmp_path / "out", "byte")


def test_cut_archives_are_errors(tmp_path):
    """The end of a cut .gz or .zst is not taken for the end of the data; nor is damage inside."""
    zstandard = pytest.importorskip("zstandard")
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    raw = os.urandom(50_000).hex().encode()
    line = b'{"text": "' + raw + b'"}\n'
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", checked)):
        whole = compress(line * 3)
        path = tmp_path / name
        for bad in (
            whole[:-3],
            whole[: len(whole) // 2],
            whole[:2000] + b"\xff" * 64 + whole[2064:],
            b"plain" * 9,
        ):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"{name}: cut short or corrupt"):
                prepare([path], tmp_path / "out", "byte", resume=False)
    assert not (tmp_path / "out.idx").exists()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="a.parquet: not a whole parquet file"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", "byte")


def test_parquet_columns_and_rows(tmp_path):
    """A missing column names those there are; a null is a broken row with its number in the file."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = ["a", "b", None, "d", None]
    parquet.write_table(pyarrow.table({"body": values}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"no column 'text' \(text_key\); it has body"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", "byte")
    report = prepare([tmp_path / "a.parquet"], tmp_path / "out", "byte", text_key="body", unit_bytes=1)
    assert texts(tmp_path / "out") == ["a", "b", "d"]
    assert [example.split("parquet:")[1][0] for example in report.broken_examples] == ["3", "5"]
    with pytest.raises(ValueError, match="a.parquet:3: 'body' is null"):
        prepare(
            [tmp_path / "a.parquet"], tmp_path / "out", "byte", text_key="body", unit_bytes=1, strict=True
        )


def test_workers_change_nothing(tmp_path):
    """1 and 3 processes, and other unit sizes, give byte-identical files, splits and meta included."""
    root = tmp_path / "in"
    root.mkdir()
    for i in range(12):
        (root / f"{i}.txt").write_text(f"file {i} " * i + "end")
    jsonl(root / "z.jsonl", words(200))
    results = []
    for workers, size in ((1, 1 << 20), (3, 500), (1, 3000)):
        seen = []
        out = tmp_path / f"o{workers}{size}" / "x"
        report = prepare(
            [root / "z.jsonl", root], out, "byte", workers=workers, unit_bytes=size, validation_fraction=0.2,
            extensions=[".txt", ".jsonl"], progress=seen.append,
        )  # fmt: skip
        assert report.skipped["repeated file"] == 1
        results.append(contents(f"{out}_train", f"{out}_valid"))
        assert seen[-1].units_done == seen[-1].units_total == report.units == len(seen)
        assert seen[-1].bytes_done == seen[-1].bytes_total
        assert seen[-1].documents == sum(report.documents.values()) == 212
        assert seen[-1].tokens == sum(report.tokens.values())
    assert results[0] == results[1] == results[2]


def test_validation_split(tmp_path):
    """Nothing is lost or doubled, equal texts go together, the seed decides, and new inputs move nothing."""
    expected = words(1000) + words(1000)
    path = jsonl(tmp_path / "a.jsonl", expected)
    report = prepare([path], tmp_path / "a", "byte", validation_fraction=0.1)
    train, valid = texts(tmp_path / "a_train"), texts(tmp_path / "a_valid")
    assert sorted(train + valid) == sorted(expected) and not set(train) & set(valid)
    assert report.documents == {"train": len(train), "valid": len(valid)} and 140 < len(valid) < 260
    assert read_meta(tmp_path / "a_valid")["split"] == "valid"
    prepare([path], tmp_path / "b", "byte", validation_fraction=0.1, seed=-1)
    assert set(texts(tmp_path / "b_valid")) != set(valid)
    more = jsonl(tmp_path / "more.jsonl", words(50, seed=1))
    prepare([more, path], tmp_path / "c", "byte", validation_fraction=0.1)
    assert texts(tmp_path / "c_valid")[-len(valid) :] == valid
    with pytest.raises(ValueError, match="the valid split is empty"):
        prepare([path], tmp_path / "d", "byte", validation_fraction=1e-9)


def test_max_documents_is_the_first_ones(tmp_path):
    """The limit takes the same first documents, and counts them alike, for any workers and unit size."""
    expected = words(100)
    path = jsonl(tmp_path / "a.jsonl", expected)
    path.write_bytes(b"{\n" + path.read_bytes())
    for limit in (1, 31, 32, 33):  # at the end of a unit and inside one
        results = []
        for workers, size in ((1, 1 << 20), (1, 200), (2 if limit == 32 else 1, 300)):
            options = {"max_documents": limit, "workers": workers, "unit_bytes": size, "resume": False}
            report = prepare([path], tmp_path / "o", "byte", **options)
            assert texts(tmp_path / "o") == expected[:limit] and report.documents == {"all": limit}
            assert report.text_bytes["all"] == sum(len(text.encode()) for text in expected[:limit])
            results.append(contents(tmp_path / "o"))
        assert results[0] == results[1] == results[2]
    prepare([path], tmp_path / "o", "byte", max_documents=1000)
    assert texts(tmp_path / "o") == expected


def test_meta(tmp_path):
    """PREFIX.json records the tokenizer, counts and largest id that the files really have."""
    prepare([jsonl(tmp_path / "a.jsonl", ["abc", "é"])], tmp_path / "o", "byte", append_eos=False)
    meta, reader = read_meta(tmp_path / "o"), IndexedReader(tmp_path / "o")
    assert meta["tokenizer"] == ByteTokenizer().to_dict()
    assert (meta["documents"], meta["tokens"], meta["text_bytes"]) == (2, 5, 5)
    assert (meta["vocab_size"], meta["eos_id"], meta["append_eos"]) == (259, 257, False)
    assert meta["max_token_id"] == int(reader.tokens.max()) == 0xC3
    assert reader.dtype == np.uint16


def test_finished_result_is_not_made_again(tmp_path):
    """The same call again does nothing; a changed input, setting or damaged file is noticed."""
    path = jsonl(tmp_path / "a.jsonl", words(20))
    first = prepare([path], tmp_path / "o", "byte")
    before = os.stat(tmp_path / "o.bin").st_mtime_ns
    again = prepare([path], tmp_path / "o", "byte", unit_bytes=100)
    assert os.stat(tmp_path / "o.bin").st_mtime_ns == before and again.units_resumed == again.units
    assert (again.documents, again.tokens, again.sources) == (first.documents, first.tokens, first.sources)
    good = contents(tmp_path / "o")
    os.truncate(tmp_path / "o.bin", 10)
    assert prepare([path], tmp_path / "o", "byte").units_resumed == 0
    assert contents(tmp_path / "o") == good
    prepare([path], tmp_path / "o", "byte", append_eos=False)
    assert contents(tmp_path / "o")[0] != good[0]
    jsonl(path, words(21))
    prepare([path], tmp_path / "o", "byte")
    assert texts(tmp_path / "o") == words(21)
    assert prepare([path], tmp_path / "o", "byte", resume=False).units_resumed == 0


def test_finished_parts_are_used_after_an_error(tmp_path):
    """A run that fails at its last file keeps its parts; the next one reads only what changed."""
    root = tmp_path / "in"
    root.mkdir()
    paths = [jsonl(root / f"{i}.jsonl", words(5, seed=i)) for i in range(4)]
    (root / "9.jsonl").write_text("{")
    with pytest.raises(ValueError, match="9.jsonl:1"):
        prepare([root], tmp_path / "out" / "o", "byte", strict=True)
    assert not list((tmp_path / "out").glob("o.*.tmp"))
    os.remove(root / "9.jsonl")
    jsonl(paths[2], words(6, seed=8))
    # A part that lost its end is made again.
    part = sorted((tmp_path / "out" / "o.parts").glob("*.bin"))[0]
    os.truncate(part, 3)
    report = prepare([root], tmp_path / "out" / "o", "byte", strict=True)
    assert report.units == 4 and report.units_resumed in (2, 3)
    prepare([root], tmp_path / "fresh", "byte", strict=True)
    assert contents(tmp_path / "out" / "o") == contents(tmp_path / "fresh")


SCRIPT = """
import sys
from moetrain.data.prepare import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], "byte", workers=int(sys.argv[3]), unit_bytes=4000,
            validation_fraction=0.1, progress=lambda p: print(p.units_done, flush=True))
"""


def _children(pid):
    out = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            out.append(int(path.parent.name))
    return out


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_resumes(tmp_path, workers):
    """kill -9 in the middle: no output yet, no orphan left, and the next run completes to the same bytes."""
    path = jsonl(tmp_path / "a.jsonl", words(6000))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(path), str(tmp_path / "o"), str(workers)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if int(line) >= 5:
            break
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.glob("o_*.idx"))
    deadline = time.monotonic() + 20
    while (
        alive := [child for child in children if Path(f"/proc/{child}").exists()]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
    report = prepare([path], tmp_path / "o", "byte", unit_bytes=4000, validation_fraction=0.1)
    assert 5 <= report.units_resumed < report.units
    prepare([path], tmp_path / "fresh", "byte", validation_fraction=0.1)
    names = [tmp_path / f"{name}_{split}" for name in ("o", "fresh") for split in ("train", "valid")]
    assert contents(*names[:2]) == contents(*names[2:])


def _hold(parts, ready, release):
    with module._lock(parts):
        ready.set()
        release.wait(30)


def test_one_run_per_output(tmp_path):
    """A second run on the same output is refused while the first lives, not after."""
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "o.parts").mkdir()
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "o.parts", ready, release))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="o.parts is in use"):
        prepare([path], tmp_path / "o", "byte")
    release.set()
    holder.join()
    prepare([path], tmp_path / "o", "byte")


def test_worker_errors_come_through(tmp_path):
    """With processes, a strict error is the same ValueError as without."""
    path = jsonl(tmp_path / "a.jsonl", words(40))
    path.write_bytes(path.read_bytes() + b"{")
    with pytest.raises(ValueError, match="a.jsonl:41: bad JSON"):
        prepare([path], tmp_path / "o", "byte", strict=True, workers=2, unit_bytes=500)


def test_large_vocabulary_is_int32(tmp_path):
    """A Hugging Face tokenizer of 70000 ids is stored as int32 and read back."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "a.jsonl", ["w69999 w1", "w2"])
    prepare([path], tmp_path / "o", str(tmp_path / "tokenizer.json"), eos="</s>", workers=2, unit_bytes=1)
    reader = IndexedReader(tmp_path / "o")
    assert reader.dtype == np.int32
    assert [reader.document(i).tolist() for i in range(2)] == [[69_999, 1, 70_000], [2, 70_000]]
    assert read_meta(tmp_path / "o")["max_token_id"] == 70_000


def test_output_inside_the_input(tmp_path):
    """Our own files below the input folder are neither read nor a reason to start again."""
    jsonl(tmp_path / "a.jsonl", words(30))
    prepare([tmp_path], tmp_path / "o", "byte", unit_bytes=100)
    report = prepare([tmp_path], tmp_path / "o", "byte", unit_bytes=100)
    assert report.units_resumed == report.units and texts(tmp_path / "o") == words(30)


def test_refused_calls(tmp_path):
    """Options and inputs that can't work are named, before anything is written."""
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    for options, text in [
        ({"validation_fraction": 1.0}, r"validation_fraction \(1.0\)"),
        ({"workers": 0}, r"workers \(0\)"),
        ({"max_documents": 0}, r"max_documents \(0\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            prepare([path], tmp_path / "o", "byte", **options)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        prepare([tmp_path / "nowhere"], tmp_path / "o", "byte")
    with pytest.raises(ValueError, match="a prefix is wanted"):
        prepare([path], f"{tmp_path}/", "byte")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no document found"):
        prepare([tmp_path / "empty"], tmp_path / "o", "byte")
    assert not (tmp_path / "o.idx").exists()


@pytest.mark.parametrize("package, name", [("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet")])
def test_missing_extra_is_named(tmp_path, monkeypatch, package, name):
    """Without the optional package the error names the extra to install, before any work."""
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name}: .*pip install 'moetrain\[data\]'"):
        prepare([tmp_path / name], tmp_path / "o", "byte")


def test_input_hash_is_stable(tmp_path):
    """The token file of a fixed input is fixed: a change of format must be meant (and VERSION raised)."""
    path = jsonl(tmp_path / "a.jsonl", words(10))
    prepare([path], tmp_path / "o", "byte", validation_fraction=0.3)
    digest = hashlib.sha256(
        b"".join((tmp_path / f"o_{split}.bin").read_bytes() for split in ("train", "valid"))
    )
    assert digest.hexdigest()[:16] == "fdfeb695d17423d0"


def test_excluded_files_and_folders_are_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "sub/test/c.py", "sub/d.py", "e_test.py"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n" * 3)
    report = prepare([tmp_path / "in"], tmp_path / "out", "byte", extensions=(".py",), exclude=["test", "*/test/*", "*_test.py"])
    assert report.documents["all"] == 2 and report.skipped["excluded"] == 3
