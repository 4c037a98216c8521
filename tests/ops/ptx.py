"""Translates the PTX of the CUDA kernels to C++ that runs on the CPU (ptx_runtime.h).

Each kernel becomes a function, and each instruction a call named after it: ``add.rn.f32 %f1, %f2,
%f3;`` is ``put(f1, add_<f32>(f2, f3));``. An instruction that the runtime lacks does not compile.
"""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
_SIZES = {"pred": 1, "b16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}
# The default rounding, or parts of a name that say nothing more.
_IMPLIED = {"rn", "lo", "uni", "sync", "bfly"}
_ASSERTION = "boxes name an image that the features do not hold"


def compile_ptx(kernels: Mapping[str, str], path: Path) -> Path:
    """Compiles kernels (name in C++ -> PTX) to a shared library of ptx_runtime.h's functions."""
    source = path.with_suffix(".cpp")
    source.write_text(translate(kernels))
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-fwrapv", "-ffp-contract=off"]
    # Two such libraries in one process must not share their state.
    flags += ["-fvisibility=hidden", "-fno-gnu-unique", f"-I{FOLDER}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(path)], check=True)
    return path


def translate(kernels: Mapping[str, str]) -> str:
    """C++ of kernels, with a table of their names and parameters."""
    functions, entries = [], []
    for number, (name, ptx) in enumerate(kernels.items()):
        body, parameters = _Kernel(name, ptx).translate()
        functions.append(f"static void kernel_{number}() {{\n{body}\n}}\n")
        layout = ", ".join(f"{{{begin}, {size}}}" for begin, size in parameters)
        entries.append(f'{{"{name}", kernel_{number}, {{{layout}}}}},')
    table = ["const std::vector<Entry> entries = {", *entries, "};", "}"]
    return "\n".join(['#include "ptx_runtime.h"', "namespace ptx {", *functions, *table])


class _Kernel:
    def __init__(self, name: str, ptx: str) -> None:
        self.name = name
        text = re.sub(r"//.*", "", ptx)
        head, body = re.search(r"\.entry \w+\((.*?)\)[^{]*\{(.*)\}", text, re.DOTALL).groups()
        # What an address names: all other symbols are texts of assertions.
        self.symbols = dict.fromkeys(re.findall(r"[.\s](?:b8|u32|u64) ([\w$]+)", text), 0)
        self.parameters: list[tuple[int, int]] = []
        end = 0
        declared = r"\.param (?:\.align (\d+) )?\.[a-z](\d+) (\w+)(?:\[(\d+)\])?"
        for align, bits, symbol, count in re.findall(declared, head):
            size = int(count or 1) * int(bits) // 8
            begin = -(-end // int(align or size)) * int(align or size)
            self.symbols[symbol] = begin
            self.parameters.append((begin, size))
            end = begin + size
        # Vectors get other brackets than scopes, whose registers have different names anyway.
        body = re.sub(r"\{([^;{}\n]+)\}", r"(\1)", body)
        self.statements = re.sub(r"[{}]", "", body).split(";")

    def translate(self) -> tuple[str, list[tuple[int, int]]]:
        registers: dict[str, int] = {}
        lines = []
        for number, statement in enumerate(self.statements):
            statement = " ".join(statement.split())
            while label := re.match(r"(\$\w+): ?", statement):
                lines.append(f"{_plain(label[1])}:;")
                statement = statement[label.end() :]
            if found := re.match(r"\.reg \.(\w+) (.*)", statement):
                for name, count in re.findall(r"([%\w]+)(?:<(\d+)>)?", found[2]):
                    names = [f"{name}{i}" for i in range(int(count))] if count else [name]
                    registers |= dict.fromkeys(map(_plain, names), _SIZES[found[1]])
            elif statement and not statement.startswith(".") and "[param" not in statement:
                lines.append(self._instruction(statement, f'"{self.name}:{number}"'))
        body = "\n".join(lines)
        used = set(re.findall(r"\w+", body))
        declarations = [
            f"{'bool' if size == 1 else f'uint{8 * size}_t'} {name} = 0;"
            for name, size in registers.items()
            if name in used
        ]
        return "\n".join([*declarations, body]), self.parameters

    def _instruction(self, statement: str, place: str) -> str:
        guard = re.match(r"@(!?)(%\w+) ", statement)
        if guard:
            code = self._instruction(statement[guard.end() :], place)
            return f"if ({guard[1]}{_plain(guard[2])}) {{ {code} }}"
        name, _, rest = statement.partition(" ")
        # Without the brackets of vectors.
        operands = re.findall(r"\[[^]]*\]|[^\s,()]+", rest)
        operation, *parts = name.split(".")
        if operation == "call":
            return f'return emulation::check(false, "{_ASSERTION}");'
        if operation == "ret":
            return "return;"
        if operation == "bra":
            return f"goto {_plain(operands[0])};"
        if operation == "bar":
            return f"emulation::machine.wait_for_block({place});"
        kind = parts[-1]
        if operation in ("ld", "st"):
            address = next(o for o in operands if o.startswith("["))
            values = [self._value(o) for o in operands if o != address]
            base, _, offset = address[1:-1].partition("+")
            where = f"{self._value(base)} + {offset or 0}"
            memory = f"{parts[0]}_memory({where}, {len(values)} * sizeof({kind}), {place})"
            return f"{operation}_<{kind}>({', '.join([memory, *values])});"
        if operation == "mov" and len(operands) > 2:
            if rest.startswith("("):
                values = map(self._value, [operands[-1], *operands[:-1]])
                return f"unpack<{kind}>({', '.join(values)});"
            values = map(self._value, operands[1:])
            return f"put({_plain(operands[0])}, pack<{kind}>({', '.join(values)}));"
        target, *inputs = operands
        values = [self._value(operand) for operand in inputs]
        if operation == "vote":
            return f"put({_plain(target)}, emulation::ballot({values[0]}, {place}));"
        if operation == "shfl":
            call = f"emulation::shuffle_xor({values[0]}, {values[1]}, {place})"
            return f"put({_plain(target.split('|')[0])}, {call});"
        types = parts[-2:] if operation == "cvt" else parts[-1:]
        rest = [p for p in parts[: len(parts) - len(types)] if p not in _IMPLIED]
        function = "_".join([operation, *rest]) + "_"
        return f"put({_plain(target)}, {function}<{', '.join(types)}>({', '.join(values)}));"

    def _value(self, operand: str) -> str:
        """An operand as 64 bits."""
        if operand in ("%tid.x", "%ctaid.x"):
            index = "thread_index" if operand == "%tid.x" else "block_index"
            return f"emulation::machine.{index}.x"
        if operand.startswith("%"):
            return _plain(operand)
        if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
            return f"0x{found[1]}ull"
        if re.fullmatch(r"-?\d+", operand):
            return f"{operand}{'ll' if int(operand) < 2**63 else 'ull'}"
        return str(self.symbols[operand])


def _plain(name: str) -> str:
    """A name in C++."""
    return name.replace("%", "r_").replace("$", "")
