"""The threads of the kernels: every part of a loop is done once, and nothing is read before it is there."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.native
from model.config import ModelConfig
from model.mixing import ExpertBank
from model.native import Kernels
from model.native.compiler import NativeUnavailable, _compiler
from tests.model.native.inputs import random_of

# Three loops one after the other: how often each number came, what neighbours had written before a wait, and a sum.
LOOPS = """
#include "team.h"
extern "C" void three_loops(int threads, long total, long some, long* seen, long* sums, long* again) {
    Team::here().run(threads, [&](Member& member) {
        member.each(total, some, [&](long i) { ++seen[i]; });
        member.wait();
        member.each(total, some, [&](long i) { sums[i] = seen[i] + seen[total - 1 - i]; });
        member.wait();
        member.each(total, 0, [&](long i) { again[i] += sums[total - 1 - i]; });
    });
}
"""
Call = Callable[..., None]


@pytest.fixture(scope="module")
def three_loops(tmp_path_factory: pytest.TempPathFactory) -> Call:
    try:
        compiler = _compiler()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("team")
    (folder / "loops.cpp").write_text(LOOPS)
    headers = Path(model.native.__file__).parent
    flags = ["-O2", "-fopenmp", "-fPIC", "-shared", "-std=c++17", f"-I{headers}"]
    subprocess.run([compiler, *flags, "-o", str(folder / "loops.so"), str(folder / "loops.cpp")], check=True)
    found: Call = ctypes.CDLL(str(folder / "loops.so")).three_loops
    return found


def _looped(call: Call, threads: int, total: int, some: int) -> list[list[int]]:
    seen, sums, again = ((ctypes.c_long * max(total, 1))() for _ in range(3))
    call(threads, ctypes.c_long(total), ctypes.c_long(some), seen, sums, again)
    return [list(counts)[:total] for counts in (seen, sums, again)]


@given(st.integers(1, 9), st.integers(0, 400), st.integers(0, 50))
@settings(deadline=None, max_examples=300)
def test_each_number_comes_once_and_waits_are_kept(three_loops: Call, threads: int, total: int, some: int) -> None:
    assert _looped(three_loops, threads, total, some) == [[1] * total, [2] * total, [2] * total]


def test_threads_that_have_gone_to_sleep_are_woken(three_loops: Call) -> None:
    for pause in (0.0, 0.001, 0.002, 0.003, 0.02) * 8:
        time.sleep(pause)  # about as long as they look on
        assert _looped(three_loops, 3, 50, 1) == [[1] * 50, [2] * 50, [2] * 50]


def test_callers_at_the_same_time_do_not_meet(three_loops: Call) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: _looped(three_loops, 1 + n % 4, 60, n % 7), range(400)))
    assert all(counts == [[1] * 60, [2] * 60, [2] * 60] for counts in found)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_threads(kernels: Kernels, threads: Callable[[int], None]) -> None:
    config = ModelConfig(
        vocab_size=8, n_positions=6, n_embd=64, n_layer=1, n_head=1, group_size=2, n_expert=24, expert_size=96
    )
    bank = ExpertBank(config).requires_grad_(False).bfloat16()
    bank.initialize(1, 1)
    mixes = random_of(24, 5, 64)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(kernels.bank(mixes, bank).clone())
    assert all(torch.equal(other, found[0]) for other in found[1:])


FORK = """
import os, signal, torch
from model.native import open_kernels
kernels = open_kernels()
torch.set_num_threads(3)
x, weight, bias = torch.randn(64, 512), torch.randn(512, 512), torch.zeros(512)
before = kernels.linear(x, weight, bias)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(kernels.linear(x, weight, bias), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(kernels.linear(x, weight, bias), before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch elsewhere does not outlive a fork")
@pytest.mark.usefixtures("kernels")
def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
