"""Native code that is written as LLVM's intermediate representation and compiled when it is needed, by llvmlite.

What the kernels share: types, addresses, loops, and how a module becomes functions. Everything is emitted as it is to
run: no pass of LLVM's optimizer is applied but those of code generation, at their first level, since what is unrolled
by hand here is slower once it has been rearranged (a product of 4 rows half as fast, at level 3 with passes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

I8, I16, I32, I64, F16, F32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.HalfType(), ir.FloatType())
VOID, POINTER = ir.VoidType(), I8.as_pointer()


def vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def constant(kind: Any, value: int | float) -> Any:
    """Of a number's type, or a vector of which each lane is `value`."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def i64(value: int) -> Any:
    return constant(I64, value)


class Code(ir.IRBuilder):  # type: ignore[misc]  # llvmlite has no types
    """Writes a function's instructions, one after the other; addresses are in bytes."""

    def __init__(self, module: Any, name: str, arguments: int, numbers: int = 0, inline: bool = True) -> None:
        """A function of so many addresses, followed by so many i64, that returns nothing."""
        kind = ir.FunctionType(VOID, [POINTER] * arguments + [I64] * numbers)
        function = ir.Function(module, kind, name)
        if not inline:
            function.attributes.add("noinline")
        super().__init__(function.append_basic_block("entry"))

    @property
    def arguments(self) -> Any:
        return self.function.args

    def offset(self, base: Any, *factors: Any) -> Any:
        """`base` and as many bytes as the factors' product."""
        return self.gep(base, [self.times(*factors)])

    def times(self, *factors: Any) -> Any:
        """The product of i64 and plain numbers."""
        product, *rest = (i64(factor) if isinstance(factor, int) else factor for factor in factors)
        for factor in rest:
            product = self.mul(product, factor)
        return product

    def read(self, address: Any, kind: Any, align: int) -> Any:
        return self.load(self.bitcast(address, kind.as_pointer()), align=align)

    def write(self, value: Any, address: Any, align: int) -> None:
        self.store(value, self.bitcast(address, value.type.as_pointer()), align=align)

    def spread(self, value: Any, lanes: int) -> Any:
        """A vector of which each lane is `value`."""
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.insert_element(undefined, value, constant(I32, 0))
        return self.shuffle_vector(first, undefined, constant(vector(I32, lanes), 0))

    def lane(self, value: Any, index: int) -> Any:
        return self.extract_element(value, constant(I32, index))

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls a function by its name: one of LLVM's own, or of the C library."""
        known = self.module.globals
        if name not in known:
            ir.Function(self.module, ir.FunctionType(result, [argument.type for argument in arguments]), name)
        return self.call(known[name], arguments)

    @contextmanager
    def loop(self, begin: Any, end: Any, step: int = 1) -> Iterator[Any]:
        """The body for begin, begin + step, … as long as that is less than end."""
        before = self.block
        body, after = (self.append_basic_block(name) for name in ("loop", "after"))
        self.cbranch(self.icmp_signed("<", begin, end), body, after)
        self.position_at_end(body)
        index = self.phi(I64)
        index.add_incoming(begin, before)
        yield index
        following = self.add(index, i64(step))
        index.add_incoming(following, self.block)
        self.cbranch(self.icmp_signed("<", following, end), body, after)
        self.position_at_end(after)

    @contextmanager
    def repeat(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        """The body again and again. Yields the turn, from 0 on, and `leave`, which ends the loop where a condition
        holds."""
        before = self.block
        body, after = (self.append_basic_block(name) for name in ("repeat", "after"))
        self.branch(body)
        self.position_at_end(body)
        turn = self.phi(I64)
        turn.add_incoming(i64(0), before)

        def leave(condition: Any) -> None:
            stay = self.append_basic_block("stay")
            self.cbranch(condition, after, stay)
            self.position_at_end(stay)

        yield turn, leave
        turn.add_incoming(self.add(turn, i64(1)), self.block)
        self.branch(body)
        self.position_at_end(after)


class Compiled:
    """A module's functions, as long as it lives."""

    def __init__(self, module: Any) -> None:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        binding.initialize_native_asmparser()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=1
        )
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        self._engine = binding.create_mcjit_compiler(parsed, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))
