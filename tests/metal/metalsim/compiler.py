"""From Metal text to a shared library, each access to memory and each step of which calls the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from metalsim import parser, toolchain
from metalsim.instrument import instrument
from metalsim.language import CompileError
from metalsim.preprocess import preprocess

HERE = Path(__file__).parent
_CLANG = (*toolchain.ZIG, "clang")
_FLAGS = (
    "-std=c++14",
    "-nostdinc",
    "-nostdinc++",
    "-fsigned-char",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    "-ftrivial-auto-var-init=pattern",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-gline-tables-only",
    "-fsanitize=array-bounds,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-Wimplicit-float-conversion",
    "-Wimplicit-int-float-conversion",
    "-Wno-duplicate-decl-specifier",
    "-Wno-c++17-extensions",
    "-Wno-unknown-attributes",
    "-Wno-user-defined-literals",
)
# What PYTORCH_MPS_FAST_MATH lets Metal's compiler do, and <metal_stdlib> rounds what Metal approximates otherwise.
_FAST_MATH = ("-ffast-math", "-ffp-contract=fast")
# A kernel runs for a short time here and compiles for a long one, but the optimiser is who makes use of fast math.
_OPTIMISE = {False: "-O0", True: "-O2"}


def compile_library(source: str, fast_math: bool) -> tuple[list[parser.Kernel], Path]:
    """The kernels of a Metal source and a shared library of them, whose symbols the emulator knows."""
    shader = parser.parse(preprocess(source))
    if not shader.kernels:
        raise CompileError("the source has no kernel")
    text = _translation_unit(shader)
    include = HERE / "include"
    flags = (*_FLAGS, *_FAST_MATH) if fast_math else _FLAGS
    inputs = [
        text,
        *flags,
        toolchain.target(),
        toolchain.clang_version(),
        include / "emulator",
        *include.glob("*.h"),
        HERE / "instrument.py",
    ]
    build = partial(_build, text, flags, _OPTIMISE[fast_math])
    return shader.kernels, toolchain.cached("kernels.so", inputs, build)


def _build(text: str, flags: Sequence[str], optimise: str, path: Path) -> None:
    source, plain, instrumented = (path.with_suffix(end) for end in (".cpp", ".ll", ".instrumented.ll"))
    source.write_text(text)
    machine = ("-target", toolchain.target())
    emit = ("-O1", "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-I", str(HERE / "include" / "emulator"))
    done = toolchain.run((*_CLANG, *machine, *flags, *emit, str(source), "-o", str(plain)))
    for line in done.stderr.splitlines():
        if "implicit conversion" in line and ("to 'bfloat'" in line or "(aka '__bf16')" in line.split(" to ")[-1]):
            raise CompileError(f"Metal has no implicit conversion to bfloat: {line}")
    instrumented.write_text(instrument(plain.read_text()))
    made = path.with_suffix(".o")
    toolchain.run((*_CLANG, *machine, optimise, "-fPIC", "-w", "-c", str(instrumented), "-o", str(made)))
    toolchain.link([made], path)


def _translation_unit(shader: parser.Shader) -> str:
    def declare(variable: parser.ThreadgroupVariable) -> str:
        shape = f"{variable.type} {variable.dimensions}"
        return (
            f"threadgroup {variable.type} (&{variable.name}){variable.dimensions} = "
            f'metal::emulator::threadgroup_variable<{variable.site}, {shape}>("{variable.name}", __builtin_LINE());'
        )

    lines = ["#include <metal_stdlib>\n", shader.render(declare), "\n"]
    for i, kernel in enumerate(shader.kernels):
        function = f"emulator_function_{i}"
        lines.append(f"using {function} = metal::emulator::Kernel<decltype(&{kernel.function})>;\n")
        rows = [f"{function}::BufferAt<{kernel.parameters.index(p)}>::parameter" for p in kernel.buffers]
        lines.append(
            f'extern "C" const metal::host::Parameter emulator_parameters_{i}[] = {{{", ".join(rows) or "{}"}}};\n'
        )
        arguments = [
            f"{function}::BufferAt<{n}>::from(buffers[{p.buffer}])"
            if p.buffer is not None
            else f"{function}::builtin<{n}>(position->{p.builtin})"
            for n, p in enumerate(kernel.parameters)
        ]
        lines.append(
            f'extern "C" void emulator_kernel_{i}(const metal::emulator::Position* position, const ulong* buffers) '
            f"{{ {kernel.function}({', '.join(arguments)}); }}\n"
        )
    return "".join(lines)
