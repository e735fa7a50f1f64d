"""Memory that a training frees stays in the process until the training ends."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.tiny import LABELS
from helpers.training import tiny_arguments
from transformers.trainer_callback import CallbackHandler

from hf_xmc import XMCTrainer
from hf_xmc.training import allocator
from hf_xmc.training.allocator import ReturnGrowth, keep_freed_memory

CALLBACKS = CallbackHandler([], None, None, None, None)
BLOCK = 64 << 20  # bytes: more than glibc keeps by itself
IN_A_NEW_PROCESS = f"""
import resource, torch
from transformers.trainer_callback import CallbackHandler
from hf_xmc.training.allocator import keep_freed_memory
callbacks = CallbackHandler([], None, None, None, None)

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(32):
        torch.ones({BLOCK} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

print(page_faults())
with keep_freed_memory(callbacks):
    print(page_faults())
    print(resident())
    step_ends = callbacks.callbacks[0].on_step_end
    step_ends()  # the reference
    torch.ones(16 * {BLOCK} // 4)
    grown = resident()
    step_ends()
    print(grown - resident())
    step_ends()
    torch.ones({BLOCK} // 4)
    little = resident()
    step_ends()
    print(little - resident())
print(resident())
print(len(callbacks.callbacks))
"""  # the heap of this process depends on the tests before


@pytest.fixture
def calls(monkeypatch):
    """The calls of a C library that does nothing but remember them."""
    made = []
    library = SimpleNamespace(mallopt=lambda *given: made.append(given), malloc_trim=made.append)
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.39"))
    return made


def test_freed_memory_is_used_again_until_the_process_grows_or_the_context_ends():
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    script = [sys.executable, "-c", IN_A_NEW_PROCESS]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    faults_before, faults_during, inside, returned, returned_little, after, callbacks = map(int, result.stdout.split())
    assert faults_during < faults_before / 4
    assert after < inside - BLOCK / 2
    assert returned > 15 * BLOCK, "the process grew by a gigabyte"
    assert returned_little < BLOCK / 2, "it grew by little, which is kept"
    assert callbacks == 0


@pytest.mark.parametrize(
    ("sizes", "returns"),
    [
        ((900, 1350, 1412), []),  # MiB; by half, but not by 512
        ((900, 1413), [1]),
        ((2000, 2600, 3000), []),  # by 512, but not by half
        ((2000, 3001), [1]),
        ((2000, 3001, 2800, 4100, 4201), [1, 4]),  # the first step after a return has the new reference
    ],
)
def test_a_process_that_has_grown_by_half_returns_memory(sizes, returns, calls, monkeypatch):
    growth = ReturnGrowth(ctypes.CDLL(None))
    at = []
    for step, size in enumerate(sizes):
        monkeypatch.setattr(allocator, "resident_bytes", lambda size=size: size << 20)
        before = len(calls)
        growth.on_step_end()
        at += [step] * (len(calls) - before)
    assert at == returns


def test_settings_are_taken_back_after_an_error(calls):
    with pytest.raises(RuntimeError, match="stop"), keep_freed_memory(CALLBACKS):
        raise RuntimeError("stop")
    assert calls == [*allocator.KEEP.items(), *allocator.AFTERWARDS.items(), 0]


def test_the_allocator_is_left_alone_without_glibc(calls, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with keep_freed_memory(CALLBACKS):
        assert not CALLBACKS.callbacks
    assert not calls


@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_the_allocator_is_left_alone_with_settings_of_the_user(name, calls, monkeypatch):
    monkeypatch.setenv(name, "1")
    with keep_freed_memory(CALLBACKS):
        assert not CALLBACKS.callbacks
    assert not calls


def test_a_trainer_looks_at_its_memory_after_each_step(monkeypatch, encoder, queries, tmp_path):
    made, seen = [], []
    library = SimpleNamespace(mallopt=lambda *given: made.append(given), malloc_trim=made.append)
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(allocator, "platform", SimpleNamespace(libc_ver=lambda: ("glibc", "2.39")))
    monkeypatch.setattr(allocator, "resident_bytes", lambda: seen.append(len(made)) or 1)
    trainer = XMCTrainer(encoder, tiny_arguments(tmp_path, max_steps=3), queries, labels=LABELS)
    trainer.train()
    assert seen == [len(allocator.KEEP)] * 3
    assert made == [*allocator.KEEP.items(), *allocator.AFTERWARDS.items(), 0]
    assert not any(isinstance(one, ReturnGrowth) for one in trainer.callback_handler.callbacks)
