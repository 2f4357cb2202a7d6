"""The cache of results: what its keys tell apart, and that nothing stale or damaged is ever believed."""

import hashlib
import io
import os
from dataclasses import replace

import pytest
import torch

from retract.benchmarks.content_cache import content_hash, data_hash, load_or_compute, state_hash
from retract.benchmarks.data import load


def test_hash_of_content_and_not_of_its_place_in_memory():
    values = torch.arange(24).view(2, 3, 4)
    assert content_hash(values) == content_hash(values.clone())
    assert content_hash(values.transpose(0, 1)) == content_hash(values.transpose(0, 1).contiguous())
    assert len(content_hash()) == 64


def test_hash_tells_contents_apart():
    values = torch.arange(6)
    others = [(values.view(2, 3),), (values.view(3, 2),), (values.int(),), (values[:5], values[5:]), (values + 1,)]
    texts = [("a", "b"), ("atext 1;b",), ("atext;b",), ("ab", "c"), ("a", "bc"), ("abc",), (), ("",)]
    special = [
        (torch.tensor(1.0),),
        (torch.tensor(-0.0),),
        (torch.tensor(0.0),),
        (torch.empty(0),),
        (torch.empty(0, 2),),
    ]
    halves = [(torch.tensor([1.0], dtype=dtype),) for dtype in (torch.float16, torch.bfloat16)]
    hashes = [content_hash(*parts) for parts in [(values,), *others, *texts, *special, *halves]]
    assert len(set(hashes)) == len(hashes)


def test_hash_of_a_state_includes_the_names():
    a, b = torch.zeros(2), torch.ones(2)
    assert state_hash({"a": a, "b": b}) == state_hash({"a": a.clone(), "b": b.clone()})
    assert len({state_hash({"a": a, "b": b}), state_hash({"b": a, "a": b}), state_hash({"a": b, "b": a})}) == 3


def test_hash_of_data_sees_every_part():
    data = load("digits")
    changed = data.test_images.clone()
    changed[-1, 0, -1, -1] ^= 1
    others = [
        replace(data, test_images=changed),
        replace(data, train_labels=data.train_labels.roll(1)),
        replace(data, test_labels=data.test_labels.roll(1)),
        replace(data, classes=data.classes[::-1]),
        replace(data, mean=(1.0,)),
        replace(data, flip=True),
        data.subset(100),
    ]
    assert len({data_hash(each) for each in [data, *others]}) == 8
    assert data_hash(data) == data_hash(load("digits"))


class Work:
    """Something to compute that counts how often it was."""

    def __init__(self, value=1.0):
        self.times, self.value = 0, value

    def __call__(self):
        self.times += 1
        return {"tensor": torch.full((3,), self.value, dtype=torch.float64), "number": self.value}


def only_file(cache):
    (path,) = (path for path in cache.rglob("*") if path.is_file())
    return path


def test_computed_once(own_cache):
    work = Work()
    first, second = (load_or_compute("things", "k" * 64, work) for _ in range(2))
    assert work.times == 1
    assert only_file(own_cache).parent == own_cache / "things"
    for contents in (first, second):
        assert contents["number"] == 1 and contents["tensor"].dtype == torch.float64
        assert contents["tensor"].tolist() == [1, 1, 1]


def test_keys_and_kinds_are_apart(own_cache):
    for value, (kind, key) in enumerate([("a", "k" * 64), ("b", "k" * 64), ("a", "l" * 64), ("a", "k" * 63 + "l")]):
        assert load_or_compute(kind, key, Work(value))["number"] == value


@pytest.mark.parametrize("where", [0, 31, 32, 200, -1])
def test_a_changed_byte_is_noticed(own_cache, where):
    load_or_compute("things", "k", Work(1))
    path = only_file(own_cache)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert load_or_compute("things", "k", Work(2))["number"] == 2
    assert load_or_compute("things", "k", Work(3))["number"] == 2  # what was damaged is replaced


@pytest.mark.parametrize("length", [0, 10, 32, 300])
def test_a_truncated_file_is_noticed(own_cache, length):
    load_or_compute("things", "k", Work(1))
    path = only_file(own_cache)
    path.write_bytes(path.read_bytes()[:length])
    assert load_or_compute("things", "k", Work(2))["number"] == 2


def test_a_whole_file_of_another_key_is_not_believed(own_cache):
    load_or_compute("things", "k", Work(1))
    path = only_file(own_cache)
    path.rename(path.with_name("l.pt"))
    assert load_or_compute("things", "l", Work(2))["number"] == 2


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_a_whole_file_of_something_else_is_not_believed(own_cache, capsys):
    """A later version may lay files out otherwise, and a stranger may put a pickle that runs there."""
    buffer = io.BytesIO()
    torch.save({"key": "k", "contents": Harmful()}, buffer)
    load_or_compute("things", "k", Work(1))
    path = only_file(own_cache)
    for body in (b"no archive", buffer.getvalue()):
        path.write_bytes(hashlib.sha256(body).digest() + body)
        assert load_or_compute("things", "k", Work(2))["number"] == 2
    assert not capsys.readouterr().out


def test_the_first_of_two_processes_decides(own_cache):
    def slow():
        load_or_compute("things", "k", Work(1))  # the other process, which ends while this one computes
        return Work(2)()

    assert load_or_compute("things", "k", slow)["number"] == 1


def test_a_failed_write_leaves_nothing(own_cache, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert load_or_compute("things", "k", Work(1))["number"] == 1
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made(own_cache):
    (own_cache / "things").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert load_or_compute("things", "k", Work(1))["number"] == 1


def test_an_error_of_the_computation_is_passed_on(own_cache):
    def fail():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        load_or_compute("things", "k", fail)
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
