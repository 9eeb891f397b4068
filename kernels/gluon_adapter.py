"""Names of Gluon that differ between the releases of Triton that are supported (3.6 and newer)."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
