"""Memory that a training frees stays in the process until the training ends."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_xmc.training import allocator
from hf_xmc.training.allocator import keep_freed_memory

BLOCK = 64 << 20  # bytes: more than glibc keeps by itself
IN_A_NEW_PROCESS = f"""
import resource, torch
from hf_xmc.training.allocator import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(32):
        torch.ones({BLOCK} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

print(page_faults())
with keep_freed_memory():
    print(page_faults())
    print(resident())
print(resident())
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


def test_freed_memory_is_used_again_until_the_context_ends():
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    script = [sys.executable, "-c", IN_A_NEW_PROCESS]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    faults_before, faults_during, resident_inside, resident_after = map(int, result.stdout.split())
    assert faults_during < faults_before / 4
    assert resident_after < resident_inside - BLOCK / 2


def test_settings_are_taken_back_after_an_error(calls):
    with pytest.raises(RuntimeError, match="stop"), keep_freed_memory():
        raise RuntimeError("stop")
    assert calls == [*allocator.KEEP.items(), *allocator.AFTERWARDS.items(), 0]


def test_the_allocator_is_left_alone_without_glibc(calls, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with keep_freed_memory():
        pass
    assert not calls


@pytest.mark.parametrize("name", allocator.VARIABLES)
def test_the_allocator_is_left_alone_with_settings_of_the_user(name, calls, monkeypatch):
    monkeypatch.setenv(name, "1")
    with keep_freed_memory():
        pass
    assert not calls
