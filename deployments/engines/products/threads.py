"""Several threads at one product: each takes a share of its tiles, then the next, until none is left.

The threads wait for work in native code, without Python's interpreter: first at the ready, then, giving way to others
(OpenVINO's threads use the same cores between products), and at last asleep in the kernel (futex), so that an idle
engine costs nothing.

What they share is a `Board`. `tickets` is the number of shares not yet taken: whoever takes it down from above zero has
one and may read the job, which stays until all shares are `finished`; whoever comes late finds no ticket and has
touched nothing.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from deployments.engines.cache_memory import zeros
from deployments.engines.products.jit import I32, I64, VOID, Code, Compiled, constant, i64
from deployments.engines.products.kernels import emit_product, emit_quantize

SHARES = 8  # of a product, for each thread: so many that a thread which was held up takes fewer
ALERT, YIELDING = 200, 1000  # turns of waiting: at the ready until the one, then giving way until the other
THREAD_NAME = "products"
FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 128, 129  # of x86-64 Linux; within one process

# The board, by number of its 8-byte words; what several threads write has a cache line of its own.
TICKETS, FINISHED, WAKEUPS, SLEEPERS, STOPPED = 0, 8, 16, 24, 25
JOB = 32  # kind, shares, items of a share, items; then the arguments:
ARGUMENTS = JOB + 4
WEIGHTS, ACTIVATIONS, VALUES, SCALES, STARTS, RESULT, BLOCKS, ROWS, WIDTH = range(ARGUMENTS, ARGUMENTS + 9)
WORDS = WIDTH + 1
QUANTIZE, PRODUCT = 0, 1


class Q4Threads:
    """Multiplies by matrices with `threads` threads, of which the caller's is one. For one caller at a time. Who made
    it calls `end`: the operations of a graph that refer to it never go away (operation.py)."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        code = native()
        self._multiply = code.multiply
        self._words = zeros(8 * WORDS).view(np.int64)
        self._board = self._words.ctypes.data
        self._scratch: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        workers = [
            threading.Thread(target=code.worker, args=(self._board,), daemon=True, name=THREAD_NAME)
            for _ in range(threads - 1)
        ]
        for thread in workers:
            thread.start()
        self._stop = weakref.finalize(self, _stop, code, self._board, workers, self._words)
        self._matrices: list[npt.NDArray[np.uint8]] = []

    def add(self, tiles: npt.NDArray[np.uint8]) -> int:
        """A matrix to multiply by, in tiles on a 32-byte border (layout.py); its number."""
        self._matrices.append(tiles)
        return len(self._matrices) - 1

    def end(self) -> None:
        """Ends the threads and lets go of the matrices. Nothing can be multiplied any more."""
        self._stop()
        self._matrices.clear()

    def multiply(self, activations: npt.NDArray[np.float32], matrix: int, result: npt.NDArray[np.float32]) -> None:
        """`result` [rows, width] = `activations` [rows, columns], rounded to 8 bits in groups of 64, by the transposed
        weights [width, columns] of a matrix that was added. All contiguous."""
        tiles = self._matrices[matrix]
        rows, columns = activations.shape
        blocks = columns // BLOCK_WEIGHTS
        numbers = rows * blocks
        if self._scratch.size < numbers * (BLOCK_WEIGHTS + 8):
            self._scratch = np.empty(numbers * (BLOCK_WEIGHTS + 8), np.uint8)
        values = self._scratch.ctypes.data
        scales = values + numbers * BLOCK_WEIGHTS
        addresses = tiles.ctypes.data, activations.ctypes.data, values, scales, scales + 4 * numbers, result.ctypes.data
        shares = SHARES * self._threads
        self._words[WEIGHTS : WIDTH + 1] = *addresses, blocks, rows, result.shape[1]
        self._multiply(self._board, -(-rows // shares), len(tiles), -(-len(tiles) // shares))


def _stop(code: _Native, board: int, workers: list[threading.Thread], words: Any) -> None:
    """The code, and the `words` of the board, stay until the last worker has left them."""
    code.stop(board)
    for thread in workers:
        thread.join()


class _Native:
    """Compiled: `multiply`(board, rows of a share, tiles, tiles of a share), `worker`(board), `stop`(board)."""

    def __init__(self) -> None:
        module = ir.Module("q4")
        share = _emit_share(module, emit_quantize(module), emit_product(module))
        _emit_multiply(module, _emit_start(module, share))
        _emit_worker(module, share)
        _emit_stop(module)
        self._compiled = Compiled(module)  # as long as its functions
        self.multiply = self._function("multiply", 3)
        self.worker, self.stop = self._function("worker"), self._function("stop")

    def _function(self, name: str, numbers: int = 0) -> Callable[..., None]:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * numbers)
        return kind(self._compiled.address(name))


@lru_cache(maxsize=1)
def native() -> _Native:
    """Once a process: compiling takes half a second."""
    return _Native()


def _word(b: Code, board: Any, number: int) -> Any:
    return b.bitcast(b.offset(board, 8 * number), I64.as_pointer())


def _get(b: Code, board: Any, number: int) -> Any:
    return b.load(_word(b, board, number))


def _now(b: Code, board: Any, number: int) -> Any:
    """A word that other threads write."""
    return b.load_atomic(_word(b, board, number), "seq_cst", 8)


def _count(b: Code, board: Any, number: int, change: int) -> Any:
    """Adds to a word that other threads write; its value before."""
    return b.atomic_rmw("add", _word(b, board, number), i64(change), "seq_cst")


def _has_tickets(b: Code, board: Any) -> Any:
    return b.icmp_signed(">", _now(b, board, TICKETS), i64(0))


def _is_stopped(b: Code, board: Any) -> Any:
    return b.icmp_signed("!=", _now(b, board, STOPPED), i64(0))


def _emit_share(module: Any, quantize: Any, product: Any) -> Any:
    """share(board): takes shares of the job and does them, until there are none."""
    b = Code(module, "share", 1)
    (board,) = b.arguments
    with b.repeat() as (_, leave):
        ticket = _count(b, board, TICKETS, -1)
        leave(b.icmp_signed("<=", ticket, i64(0)))
        kind, shares, items, all_items = (_get(b, board, JOB + number) for number in range(4))
        begin = b.mul(b.sub(shares, ticket), items)
        end = b.add(begin, items)
        end = b.select(b.icmp_signed("<", end, all_items), end, all_items)
        weights, activations, values, scales, starts, result = (
            b.inttoptr(_get(b, board, number), board.type) for number in range(WEIGHTS, RESULT + 1)
        )
        blocks, rows, width = (_get(b, board, number) for number in (BLOCKS, ROWS, WIDTH))
        with b.if_else(b.icmp_signed("==", kind, i64(QUANTIZE))) as (quantizing, multiplying):
            with quantizing:
                b.call(quantize, [activations, values, scales, starts, blocks, begin, end])
            with multiplying:
                b.call(product, [weights, values, scales, starts, result, blocks, rows, width, begin, end])
        _count(b, board, FINISHED, 1)
    b.ret_void()
    return b.function


def _emit_start(module: Any, share: Any) -> Any:
    """start(board, kind, items, items of a share): does a job with all threads."""
    b = Code(module, "start", 1, 3)
    board, kind, all_items, items = b.arguments
    shares = b.sdiv(b.sub(b.add(all_items, items), i64(1)), items)
    for number, value in enumerate((kind, shares, items, all_items)):
        b.store(value, _word(b, board, JOB + number))
    b.store(i64(0), _word(b, board, FINISHED))
    b.store_atomic(shares, _word(b, board, TICKETS), "seq_cst", 8)
    _emit_wake(b, board)
    b.call(share, [board])
    with b.repeat() as (turns, leave):
        leave(b.icmp_signed("==", _now(b, board, FINISHED), shares))
        _emit_pause(b, turns)
    b.ret_void()
    return b.function


def _emit_multiply(module: Any, start: Any) -> None:
    b = Code(module, "multiply", 1, 3)
    board, rows_of_share, tiles, tiles_of_share = b.arguments
    b.call(start, [board, i64(QUANTIZE), _get(b, board, ROWS), rows_of_share])
    b.call(start, [board, i64(PRODUCT), tiles, tiles_of_share])
    b.ret_void()


def _emit_worker(module: Any, share: Any) -> None:
    """worker(board): does shares of every job, until the board is stopped."""
    b = Code(module, "worker", 1)
    (board,) = b.arguments
    with b.repeat() as (_, leave):
        with b.repeat() as (turns, look_no_more):
            look_no_more(_has_tickets(b, board))
            look_no_more(_is_stopped(b, board))
            _emit_pause(b, turns)
            look_no_more(b.icmp_signed(">=", turns, i64(YIELDING - 1)))
        leave(_is_stopped(b, board))
        with b.if_else(_has_tickets(b, board)) as (work, sleep):
            with work:
                b.call(share, [board])
            with sleep:
                _emit_sleep(b, board)
    b.ret_void()


def _emit_sleep(b: Code, board: Any) -> None:
    """Until there is a job, or the end."""
    seen = b.trunc(_now(b, board, WAKEUPS), I32)
    _count(b, board, SLEEPERS, 1)  # from here on who publishes a job wakes this thread
    with b.if_then(b.not_(b.or_(_has_tickets(b, board), _is_stopped(b, board)))):
        _emit_futex(b, board, FUTEX_WAIT, seen)
    _count(b, board, SLEEPERS, -1)


def _emit_stop(module: Any) -> None:
    b = Code(module, "stop", 1)
    (board,) = b.arguments
    b.store_atomic(i64(1), _word(b, board, STOPPED), "seq_cst", 8)
    _emit_wake(b, board)
    b.ret_void()


def _emit_wake(b: Code, board: Any) -> None:
    _count(b, board, WAKEUPS, 1)
    with b.if_then(b.icmp_signed(">", _now(b, board, SLEEPERS), i64(0))):
        _emit_futex(b, board, FUTEX_WAKE, constant(I32, 1 << 30))


def _emit_futex(b: Code, board: Any, operation: int, value: Any) -> None:
    """futex(2) on the lower half of WAKEUPS, without a timeout."""
    module = b.module
    if "syscall" not in module.globals:
        ir.Function(module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    address = b.offset(board, 8 * WAKEUPS)
    timeout = ir.Constant(board.type, None)
    b.call(module.globals["syscall"], [i64(FUTEX), address, constant(I32, operation), value, timeout])


def _emit_pause(b: Code, turns: Any) -> None:
    with b.if_else(b.icmp_signed("<", turns, i64(ALERT))) as (alert, giving_way):
        with alert:
            b.intrinsic("llvm.x86.sse2.pause", VOID)
        with giving_way:
            b.intrinsic("sched_yield", I32)
