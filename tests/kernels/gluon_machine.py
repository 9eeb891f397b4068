"""Runs a warp-specialized Gluon kernel for Hopper on the CPU, its partitions in threads that take turns by chance.

Copies and products that the hardware does on its own happen late, at a moment chosen by chance as well; mbarriers count
arrivals and bytes. What one partition may do to another is found out this way: reading what is not there yet,
overwriting what is still read, waiting for ever. What the compiler does within a partition is not.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gluon_memory import Barrier, Block, Descriptor, Pointer, Region, Shared, block
from torch import Tensor
from triton.experimental.gluon import language as gluon_language


class _Stop(BaseException):
    """Ends the threads of a machine that has failed."""


class _Fiber:
    """A thread that runs while the machine lets it."""

    def __init__(self, machine: Machine, program: int, call: Callable[[], None]) -> None:
        self.program, self.priority, self.stores = program, machine.random.random(), 0
        self.ready: Callable[[], bool] = lambda: True
        self.done, self.go = False, threading.Semaphore(0)

        def run() -> None:
            self.go.acquire()
            machine.local.fiber = self
            try:
                if not machine.stopped:
                    call()
            except _Stop:
                pass
            except BaseException as error:
                machine.error = error
            self.done = True
            machine.back.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


class Machine:
    """Runs one grid. Who is faster than whom changes now and then, by chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.local, self.back = threading.local(), threading.Semaphore(0)
        self.fibers: list[_Fiber] = []
        self.events: list[tuple[float, Callable[[], None]]] = []
        self.stopped, self.error = False, None  # type: bool, BaseException | None

    def run(self, kernel: Any, grid: int, arguments: Sequence[Any]) -> None:
        """Launch a `gluon.jit` function of a module of such."""
        self.grid = grid
        function = self._translate(kernel)
        for program in range(grid):
            self.fibers.append(_Fiber(self, program, lambda: function(*arguments)))
        try:
            while not all(fiber.done for fiber in self.fibers):
                self._step()
            assert not self.events, "the kernel ended before what it began"
        finally:
            self.stopped = True
            for fiber in self.fibers:
                if not fiber.done:
                    fiber.go.release()
                fiber.thread.join()

    def _step(self) -> None:
        able = [fiber for fiber in self.fibers if not fiber.done and fiber.ready()]
        assert able or self.events, "all wait for each other"
        if self.random.random() < 0.05:
            for fiber in self.fibers:
                fiber.priority = self.random.random()
        fiber = max(able, key=lambda fiber: fiber.priority, default=None)
        event = max(self.events, key=lambda event: event[0], default=None)
        if fiber is None or (event is not None and event[0] > fiber.priority):
            assert event is not None
            self.events.remove(event)
            event[1]()
            return
        fiber.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run at least until `ready`."""
        fiber = self.local.fiber
        fiber.ready = ready
        self.back.release()
        fiber.go.acquire()
        if self.stopped:
            raise _Stop

    def later(self, event: Callable[[], None]) -> None:
        self.events.append((self.random.random(), event))

    def _translate(self, kernel: Any) -> Callable[..., None]:
        """The function behind `kernel`, with what it calls and its constants, in terms of this machine."""
        modules: dict[str, dict[str, Any]] = {}

        def translate(function: types.FunctionType) -> types.FunctionType:
            module = function.__module__
            if module not in modules:
                names = modules[module] = {}
                for name, value in function.__globals__.items():
                    if isinstance(value, gluon_language.constexpr):
                        value = value.value
                    elif hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                        value = translate(value.fn)
                    names[name] = value
                names |= self._names()
            return types.FunctionType(function.__code__, modules[module], function.__name__, function.__defaults__)

        return translate(kernel.fn)

    def _names(self) -> dict[str, Any]:
        """What the kernel's module knows by these names."""

        def make(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Any:
            return value if isinstance(value, Pointer) else block(value, dtype).expand(*shape).clone()

        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
            offset, inside = pointer.places(mask)
            return torch.where(inside, pointer.memory[torch.where(inside, offset, 0)], other).as_subclass(Block)

        def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
            offset, inside = pointer.places(mask)
            pointer.memory[offset[inside]] = torch.as_tensor(value, dtype=pointer.memory.dtype).broadcast_to(
                offset.shape
            )[inside]

        def atomic_add(pointer: Pointer, value: int, sem: str = "acq_rel") -> Tensor:
            self.pause()
            before = load(pointer).clone()
            store(pointer, before + value)
            return before

        def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
            if layout == "mbarrier":
                barriers = [Barrier() for _ in range(shape[0])]
                return types.SimpleNamespace(index=lambda i: barriers[int(i)])
            return Shared(self.pause, dtype, shape)

        def warp_specialize(partitions: Sequence[tuple[Any, Sequence[Any]]], warps: Any, registers: Any) -> None:
            program = self.local.fiber.program
            begun = [_Fiber(self, program, lambda f=function, given=given: f(*given)) for function, given in partitions]
            self.fibers += begun
            self.pause(lambda: all(fiber.done for fiber in begun))

        def wait(barrier: Barrier, phase: Any) -> None:
            assert int(phase) in (0, 1)
            self.pause(lambda: barrier.parity != int(phase))

        def arrive(barrier: Barrier, count: int) -> None:
            self.pause()
            barrier.arrive(count)
            self.pause()

        def async_load(source: Descriptor, place: Sequence[Any], barrier: Barrier, region: Region) -> None:
            self.pause()
            cell = region.cell
            assert not cell.writing, "written twice"
            assert not cell.readers, "written while it is read"
            cell.writing = True
            cell.spoil()

            def land() -> None:
                cell.value, cell.writing = source.read(place), False
                barrier.complete(source.block_type.nbytes)

            self.later(land)

        def async_store(target: Descriptor, place: Sequence[Any], region: Region) -> None:
            fiber, cell = self.local.fiber, region.cell
            fiber.stores += 1
            cell.readers += 1

            def leave() -> None:
                target.write(place, cell.value)
                fiber.stores -= 1
                cell.readers -= 1

            self.later(leave)
            self.pause()

        def multiply(a: Any, b: Region, total: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
            read = [x.cell for x in (a, b) if isinstance(x, Region)]
            found = types.SimpleNamespace(value=None)
            for cell in read:
                assert not cell.writing, "read while it is written"
                cell.readers += 1

            def finish() -> None:
                left = a.look() if isinstance(a, Region) else a
                product = left.double() @ b.look().double()
                found.value = (product + total if use_acc else product).to(total.dtype)
                for cell in read:
                    cell.readers -= 1

            self.later(finish)
            self.pause()
            return found

        def finish_product(pending: int, deps: Sequence[Any]) -> Any:
            self.pause(lambda: deps[0].value is not None)
            return deps[0].value

        def largest(x: Any, axis: int) -> Any:
            return x if isinstance(x, Pointer) else x.amax(axis)

        def larger(x: Any, y: Any) -> Tensor:
            return torch.maximum(torch.as_tensor(x), torch.as_tensor(y))

        def smaller(x: Any, y: Any) -> Tensor:
            return torch.minimum(torch.as_tensor(x), torch.as_tensor(y))

        def highest(x: Tensor, column: Tensor) -> Tensor:
            unsigned = x.view(torch.int32).long() & 0xFFFFFFFF
            return x.gather(1, unsigned.argmin(1, True))[:, 0]

        def nothing(*_: Any, **__: Any) -> None:
            pass

        language = types.SimpleNamespace(
            program_id=lambda axis: block(self.local.fiber.program), num_programs=lambda axis: self.grid,
            static_range=range, load=load, store=store, atomic_add=atomic_add, full=make, where=torch.where,
            zeros=lambda shape, dtype, layout=None: make(shape, 0, dtype), zeros_like=torch.zeros_like,
            arange=lambda start, end, layout=None: block(range(start, end)), max=largest,
            sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2, maximum=larger,
            minimum=smaller, convert_layout=lambda x, layout: x, float32=torch.float32,
            int8=torch.int8, int32=torch.int32, int64=torch.int64, allocate_shared_memory=allocate,
            warp_specialize=warp_specialize, BlockedLayout=nothing, SwizzledSharedLayout=nothing,
            NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing,
        )  # fmt: skip
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "mbarrier", init=Barrier.init, wait=wait, arrive=arrive,
            expect=lambda barrier, size: barrier.arrive(1, size),
        )  # fmt: skip
        tma = types.SimpleNamespace(store_wait=lambda pending: self.pause(self._stored()))
        return {
            "gl": language, "mbarrier": mbarrier, "tma": tma, "async_load": async_load, "async_store": async_store,
            "warpgroup_mma": multiply, "warpgroup_mma_wait": finish_product, "fence_async_shared": nothing,
            "thread_barrier": self.pause,
            "_rescale": lambda x, factor: x * factor[:, None], "_highest": highest,
        }  # fmt: skip

    def _stored(self) -> Callable[[], bool]:
        fiber = self.local.fiber
        return lambda: fiber.stores == 0
