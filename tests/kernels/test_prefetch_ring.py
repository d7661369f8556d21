"""The prefetching ring: compiled, and in plain Python, which is what it has to do."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace_kernels import prefetch
from fasttrace_kernels.prefetch import Part, PrefetchRing, host_status, make_ring

ROOT = Path(__file__).parents[2]


def compiled(*arguments):
    # Not a skip: whoever runs the tests has built it, or believes to have.
    assert host_status().loaded, host_status().sentence
    ring = make_ring(*arguments)
    assert not isinstance(ring, PrefetchRing)
    return ring


FORMS = {"compiled": compiled, "python": PrefetchRing}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


class Memory:
    """Sites of several sizes in bytes; every byte is random. Slots begin as zeros."""

    def __init__(self, sizes=(1, 97, 4096), calls=6, slots=2):
        generator = torch.Generator().manual_seed(0)
        self.slots = slots
        self.kept = [
            torch.randint(1, 256, (calls, size), dtype=torch.uint8, generator=generator)
            for size in sizes
        ]
        self.staged = [torch.zeros(slots, size, dtype=torch.uint8) for size in sizes]

    def parts(self):
        return [Part.of(kept, staged) for kept, staged in zip(self.kept, self.staged, strict=True)]

    def holds(self, call):
        pairs = zip(self.kept, self.staged, strict=True)
        return all(torch.equal(kept[call], staged[call % self.slots]) for kept, staged in pairs)


def outcome(run, *arguments):
    try:
        run(*arguments)
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)
    return "done"


def test_a_run(form):
    """As a cache uses it, twice; between the runs other rows are kept."""
    memory = Memory()
    ring = form(memory.parts())
    for _ in range(2):
        ring.prefetch(0)
        for call in range(6):
            if call < 5:
                ring.prefetch(call + 1)
            ring.wait(call)
            assert memory.holds(call)
            ring.release(call)
        for kept in memory.kept:
            kept += 1
    ring.close()


def test_a_held_slot_is_left_alone(form):
    memory = Memory()
    ring = form(memory.parts())
    for call in (0, 2, 1):
        ring.prefetch(call)
    ring.wait(0)
    ring.wait(1)  # which had asked for the other slot after call 2
    assert memory.holds(0)
    assert memory.holds(1)
    ring.release(0)
    ring.wait(2)
    assert memory.holds(2)
    ring.close()


COMMANDS = st.lists(
    st.tuples(st.sampled_from(["prefetch", "wait", "release"]), st.integers(-1, 6)), max_size=40
)


@settings(max_examples=150, deadline=None)
@given(
    slots=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=3),
    commands=COMMANDS,
)
def test_compiled_equals_python(slots, sizes, commands):
    """The same answers to the same commands, errors included, and the same bytes."""
    sides = [
        (memory := Memory(sizes, 6, slots), form(memory.parts(), slots)) for form in FORMS.values()
    ]
    asked = {slot: [] for slot in range(slots)}  # the calls of each slot, the holder first
    for command, call in commands:
        queue = asked[call % slots]
        if command == "wait" and call in queue[1:]:
            continue  # it would wait for ever
        answers = [outcome(getattr(ring, command), call) for _, ring in sides]
        assert answers[0] == answers[1], (command, call)
        known = call in queue
        kept = 0 <= call < 6
        assert (answers[0] == "done") == (kept and known == (command != "prefetch"))
        if answers[0] != "done":
            assert answers[0][0] is (RuntimeError if kept else ValueError)
        elif command == "prefetch":
            queue.append(call)
        elif command == "release":
            queue.remove(call)
        else:
            assert all(memory.holds(call) for memory, _ in sides)
    # What is released is not touched any more; what is held keeps its bytes.
    for queue in asked.values():
        for call in queue[:1]:
            for memory, ring in sides:
                ring.wait(call)
                assert memory.holds(call)
    for _, ring in sides:
        ring.close()


GOOD = [(4096, 48, 8192, 32)]
WRONG = {
    "no slot": (GOOD, 0, "slots is 0; at least 1 is needed"),
    "no parts": ([], 2, "there are no parts"),
    "kept nowhere": ([(0, 48, 8192, 32)], 2, "part 0: its kept rows are at address 0"),
    "kept below": ([(-8, 48, 8192, 32)], 2, "part 0: its kept rows are at address -8"),
    "slots below": ([*GOOD, (4096, 48, -1, 32)], 2, "part 1: its slots are at address -1"),
    "odd slots": (
        [(4096, 48, 8192, 33)],
        2,
        "part 0: expected bytes of 2 slots of one size, got 33",
    ),
    "no slot bytes": (
        [(4096, 48, 8192, 0)],
        2,
        "part 0: expected bytes of 2 slots of one size, got 0",
    ),
    "negative slots": (
        [(4096, 48, 8192, -32)],
        2,
        "part 0: expected bytes of 2 slots of one size, got -32",
    ),
    "part of a call": (
        [(4096, 40, 8192, 32)],
        2,
        "part 0: expected kept bytes of calls of 16 each, got 40",
    ),
    "negative kept": (
        [(4096, -48, 8192, 32)],
        2,
        "part 0: expected kept bytes of calls of 16 each, got -48",
    ),
    "other calls": (
        [*GOOD, (4096, 64, 8192, 32)],
        2,
        "part 1 keeps 4 calls, but part 0 keeps 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_memory(form, name):
    parts, slots, words = WRONG[name]
    with pytest.raises(ValueError, match="^prefetch_ring: ") as caught:
        form([Part(*part) for part in parts], slots)
    assert str(caught.value) == f"prefetch_ring: {words}"


def test_tensors_that_are_no_plain_memory():
    kept, staged = torch.zeros(6, 4), torch.zeros(2, 4)
    for arguments, words in (
        ((kept.T, staged), "kept must be contiguous and on the CPU"),
        ((kept, staged.to("meta")), "staged must be contiguous and on the CPU"),
        ((kept, staged.half()), "kept is torch.float32, but its slots are torch.float16"),
    ):
        with pytest.raises(ValueError, match=words):
            Part.of(*arguments)


def test_a_mapped_file(form, tmp_path):
    """Kept rows may lie in a file."""
    path = tmp_path / "kept"
    path.write_bytes(bytes(range(1, 13)) * 1000)
    staged = torch.zeros(2, 3000, dtype=torch.uint8)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        ring = form([(ctypes.addressof(view), 12000, staged.data_ptr(), 6000)])
        for call in range(4):
            ring.prefetch(call)
            ring.wait(call)
            assert bytes(staged[call % 2]) == mapped[3000 * call : 3000 * (call + 1)]
            ring.release(call)
        ring.close()
        del view


def test_releasing_ends_a_copy():
    """And only then are its memory and its slot free; seen with a copy that can be held up."""
    memory = Memory(sizes=(8,))
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def copy(to, start, size):
        begun.set()
        assert go_on.wait(20)
        ctypes.memmove(to, start, size)
        ended.append(True)

    ring = PrefetchRing(memory.parts(), 2, copy)
    ring.prefetch(3)
    assert begun.wait(20)
    threading.Timer(0.05, go_on.set).start()
    ring.release(3)
    assert ended == [True]
    with pytest.raises(RuntimeError, match="call 3 was not asked for"):
        ring.wait(3)
    ring.close()


def test_a_copy_that_fails():
    """In Python; the compiled ring's is in prefetch_ring_stress.cpp."""
    memory = Memory()

    def copy(to, start, size):
        if start == memory.kept[1][3].data_ptr():
            raise OSError("the disk is gone")
        ctypes.memmove(to, start, size)

    ring = PrefetchRing(memory.parts(), 2, copy)
    ring.prefetch(2)
    ring.wait(2)
    assert memory.holds(2)
    ring.prefetch(3)
    words = "prefetch_ring: the copy of call 3 failed: OSError: the disk is gone"
    for command, call in (("wait", 3), ("wait", 2), ("prefetch", 4)):
        assert outcome(getattr(ring, command), call) == (RuntimeError, words)
    ring.release(3)
    ring.close()


def python(script, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


SETUP = """
import ctypes, mmap, threading
from fasttrace_kernels.prefetch import PrefetchRing, make_ring
CALLS, SIZE = 6, 64 << 20
def address(region):
    return ctypes.addressof(ctypes.c_char.from_buffer(region))
kept, staged = mmap.mmap(-1, CALLS * SIZE), mmap.mmap(-1, 2 * SIZE)
ring = {form}([(address(kept), CALLS * SIZE, address(staged), 2 * SIZE)])
def unmap():
    kept.close()
    staged.close()
"""
ENDINGS = {
    "closed": "for call in range(4): ring.prefetch(call)\nring.close(); unmap()",
    "dropped": "for call in range(4): ring.prefetch(call)\ndel ring; unmap()",
    "released": """
kept[1 << 20] = 1  # early in a call, but not where memcpy may end
ring.prefetch(0)
while not staged[1 << 20]: pass  # so it is being copied
ring.release(0); unmap()
""",
    "left open": """
for region in (kept, staged): ctypes.pythonapi.Py_IncRef(ctypes.py_object(region))
for call in range(4): ring.prefetch(call)
""",
    "closed by two": """
for call in range(4): ring.prefetch(call)
other = threading.Thread(target=ring.close)
other.start(); ring.close(); unmap(); other.join()
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["make_ring", "PrefetchRing"])
def test_no_copy_outlives_the_ring(name, ending):
    """64 MiB calls whose memory is unmapped at once: a late copy would end the process.

    Where the ring is left open its memory stays, and the process has to end all the same.
    """
    python(SETUP.format(form=name) + ENDINGS[ending])


WAITING = """
ring.prefetch(0); ring.wait(0)
ring.prefetch(2)
waiting = threading.Thread(target=ring.wait, args=(2,))
waiting.start()
while not {started}: pass
steps = sum(1 for _ in range(1_000_000))  # this thread runs while the other one waits
assert waiting.is_alive()
ring.release(0)
waiting.join()
print(steps)
"""


@pytest.mark.parametrize("name", ["make_ring", "PrefetchRing"])
def test_other_threads_run_while_one_waits(name):
    """In a process of its own: were the GIL held, nothing there would go on, not even a timeout."""
    assert python(SETUP.format(form=name) + WAITING.format(started="waiting.ident")) == "1000000\n"


CLOSING = """
told = []
def outcome(run, call):
    try:
        run(call)
    except RuntimeError as error:
        return str(error)
ring.prefetch(0); ring.wait(0)
ring.prefetch(2)
waiting = threading.Thread(target=lambda: told.append(outcome(ring.wait, 2)))
waiting.start()
waiting.join(0.1)
assert not told
ring.close()
waiting.join()
ring.close()
told += [outcome(command, 0) for command in (ring.prefetch, ring.wait, ring.release)]
assert told == 4 * ["prefetch_ring: it is closed"], told
"""


@pytest.mark.parametrize("name", ["make_ring", "PrefetchRing"])
def test_closing(name):
    """Who waits is told of it, and whoever comes later."""
    python(SETUP.format(form=name) + CLOSING)


def test_without_the_compiled_module():
    script = "print(type(ring).__module__)"
    assert python(SETUP.format(form="make_ring") + script) == "fasttrace_kernels._host\n"
    off = python(SETUP.format(form="make_ring") + script, FASTTRACE_NO_EXT="1")
    assert off == "fasttrace_kernels.prefetch\n"


def test_a_module_that_was_not_built_is_explained(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(prefetch.importlib, "import_module", missing)
    status = host_status.__wrapped__()
    assert not status.loaded
    assert "not built, or not for this Python (No module named" in status.sentence


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizers, tmp_path):
    program = tmp_path / "stress"
    built = subprocess.run(
        [
            *("c++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"),
            *(f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"),
            *("-I", str(ROOT / "csrc"), str(ROOT / "csrc/prefetch_ring.cpp")),
            *(str(Path(__file__).with_name("prefetch_ring_stress.cpp")), "-o", str(program)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find -l" in built.stderr or "cannot find lib" in built.stderr:
        pytest.skip(f"this compiler has no library for -fsanitize={sanitizers}")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
