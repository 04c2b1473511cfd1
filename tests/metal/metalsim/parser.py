"""A front end for the Metal Shading Language: finds the kernels of a source and rewrites what C++ lacks.

``parse`` takes preprocessed text and returns a ``Shader``: its kernels with the roles of their parameters, its
threadgroup variables, and the tokens in which ``Shader.render`` replaces

- attributes (``[[buffer(0)]]``, ``[[kernel]]``, ...) and the word ``kernel`` by nothing: they have been read here;
- floating literals without a suffix by float ones, as Metal has no double, and ``1.0h`` by ``half(1.0f)``;
- ``float4(a, b)`` and ``vec<T, 2>(a, b)`` by ``metal::make<float4>(a, b)``;
- declarations of threadgroup variables by what the back end wants there.

Line breaks stay where they are, so that the lines of diagnostics are those of the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from metalsim.language import (
    ADDRESS_SPACES,
    BUILTIN_TYPES,
    BUILTINS,
    FLOAT,
    MAX_BUFFERS,
    MAX_THREADS_PER_GROUP,
    REFUSED,
    VECTORS,
    CompileError,
    Token,
    tokenise,
    wrong_positions,
)


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: bound to the buffer of that index, or a builtin such as thread_position_in_grid."""

    name: str
    declaration: str
    buffer: int | None
    builtin: str | None

    @property
    def constant(self) -> bool:
        return "constant" in self.declaration.split()


@dataclass(frozen=True)
class Kernel:
    """What a host can launch: ``function`` is ``name`` or, for a template, ``name<arguments>``."""

    host_name: str
    function: str
    parameters: tuple[Parameter, ...]
    max_threads: int | None
    """A threadgroup's, as [[max_total_threads_per_threadgroup(n)]] says. None: it says nothing."""

    @property
    def buffers(self) -> list[Parameter]:
        return sorted((p for p in self.parameters if p.buffer is not None), key=lambda p: p.buffer or 0)


@dataclass(frozen=True)
class ThreadgroupVariable:
    """``threadgroup type name[d0][d1];`` in a kernel's body; dimensions are the text in brackets."""

    type: str
    name: str
    dimensions: str
    site: int


@dataclass
class Shader:
    tokens: list[Token]
    kernels: list[Kernel] = field(default_factory=list)
    # (first token, last token, variables) of each declaration.
    declarations: list[tuple[int, int, list[ThreadgroupVariable]]] = field(default_factory=list)
    # (first token, last token) of each explicit instantiation of a kernel.
    instantiations: list[tuple[int, int]] = field(default_factory=list)
    # The token that each function begins with, behind its template header.
    functions: list[int] = field(default_factory=list)

    def render(
        self,
        declare: Callable[[ThreadgroupVariable], str],
        function: str = "",
        instantiations: bool = True,
        words: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """The source as C++, each threadgroup variable declared as the back end wants it.

        ``function`` is put before each function, and ``words`` are replaced. Without ``instantiations`` those of
        kernels are left out.
        """
        texts = [
            words.get(token.text, token.text) if token.replacement is None else token.replacement
            for token in self.tokens
        ]
        for first, last, variables in self.declarations:
            _replace(texts, first, last, " ".join(declare(variable) for variable in variables))
        for first in self.functions:
            texts[first] = function + texts[first]
        for first, last in [] if instantiations else self.instantiations:
            _replace(texts, first, last, "")
        return "".join(texts)


def _replace(texts: list[str], first: int, last: int, text: str) -> None:
    """Put ``text`` in the place of texts [first, last], and keep the number of lines."""
    newlines = "".join(re.sub(r"[^\n]", "", part) for part in texts[first : last + 1])
    texts[first] = text + newlines
    texts[first + 1 : last + 1] = [""] * (last - first)


def parse(text: str) -> Shader:
    """Parse preprocessed Metal source. Raises CompileError with the line where it is not Metal."""
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = tokenise(text)
        # Positions of the tokens that mean something; everything below walks these.
        self.code = [i for i, token in enumerate(self.tokens) if token.kind not in ("space", "directive")]
        self.definitions: dict[str, tuple[tuple[Parameter, ...], int | None]] = {}
        self.shader = Shader(self.tokens)

    def parse(self) -> Shader:
        self._refuse_words()
        self._attributes = self._take_attributes()
        self._functions()
        self._address_spaces()
        self._literals()
        self._constructors()
        return self.shader

    # Access by position among the code tokens.

    def _text(self, position: int) -> str:
        return self.tokens[self.code[position]].text if 0 <= position < len(self.code) else ""

    def _fail(self, position: int, message: str) -> CompileError:
        return CompileError(f"line {self.tokens[self.code[min(position, len(self.code) - 1)]].line}: {message}")

    def _close(self, position: int, pairs: str = "()[]{}") -> int:
        """The position of the bracket that closes the one at ``position``."""
        depth = 0
        for i in range(position, len(self.code)):
            text = self._text(i)
            if len(text) == 1 and text in pairs:
                depth += 1 if pairs.index(text) % 2 == 0 else -1
                if depth == 0:
                    return i
        raise self._fail(position, f"'{self._text(position)}' is never closed")

    def _source(self, first: int, last: int) -> str:
        """The text of code tokens [first, last), a space between them."""
        return " ".join(self._text(i) for i in range(first, last))

    # The passes.

    def _refuse_words(self) -> None:
        for position, i in enumerate(self.code):
            token = self.tokens[i]
            if token.kind == "name" and token.text in REFUSED:
                raise self._fail(position, REFUSED[token.text])
            before, after = self._text(position - 1), self._text(position + 1)
            if token.text == "[" and after != "[" and before in ("=", "(", ",", "return"):
                raise self._fail(position, "Metal has no lambdas")

    def _take_attributes(self) -> dict[int, list[tuple[str, str]]]:
        """Remove every [[...]] from the code; the (name, argument) pairs, by the position of the token that follows."""
        attributes: dict[int, list[tuple[str, str]]] = {}
        code: list[int] = []
        position = 0
        while position < len(self.code):
            if self._text(position) != "[" or self._text(position + 1) != "[":
                code.append(self.code[position])
                position += 1
                continue
            end = self._close(position, "[]")
            i = position + 2
            while i < end - 1:
                name, argument = self._text(i), ""
                if self._text(i + 1) == "(":
                    close = self._close(i + 1)
                    argument = " ".join(self._text(j) for j in range(i + 2, close))
                    i = close
                attributes.setdefault(len(code), []).append((name, argument))
                i += 2  # past the name or the bracket, and a comma
            for j in range(position, end + 1):
                self.tokens[self.code[j]].replacement = ""
            position = end + 1
        self.code = code
        return attributes

    def _attributes_in(self, first: int, last: int) -> list[tuple[str, str]]:
        return [pair for i in range(first, last + 1) for pair in self._attributes.get(i, [])]

    def _functions(self) -> None:
        """Walk the declarations outside functions; structs and namespaces are walked into."""
        position = statement = 0  # where the walk is, and where the declaration that it is in began
        while position < len(self.code):
            text = self._text(position)
            if text == "template":
                position = statement = self._template(position)
            elif text == "kernel" or ("kernel", "") in self._attributes.get(position, []):
                position = statement = self._definition(position, template=False)
            elif text == "(" and self._is_function(statement, position):
                self.shader.functions.append(self.code[statement])
                position = statement = self._end_of_function(position)
            elif text in ("(", "[") or (text == "{" and not self._is_scope(position)):
                position = self._close(position) + 1
            else:
                position += 1
                if text in (";", "{", "}") or (
                    text == ":" and self._text(position - 2) in ("public", "private", "protected")
                ):
                    statement = position
        names = [kernel.host_name for kernel in self.shader.kernels]
        for name in names:
            if names.count(name) > 1:
                raise CompileError(f"two kernels have the host name {name!r}")

    def _is_function(self, statement: int, parenthesis: int) -> bool:
        """Whether the parenthesis opens the parameters of the function that the declaration declares."""
        if self._text(statement) in ("using", "typedef", "static_assert", ""):
            return False
        words = [self._text(i) for i in range(statement, parenthesis)]
        if "operator" in words:
            return words[-1] != "operator"  # operator()(...): the second pair
        return (
            "=" not in words and words[-1].isidentifier() and words[-1] not in ("alignas", "decltype", "__attribute__")
        )

    def _end_of_function(self, parenthesis: int) -> int:
        """The position behind a function, of which ``parenthesis`` opens the parameters."""
        position = self._close(parenthesis) + 1
        while self._text(position) not in ("{", ";", ":"):
            position = self._close(position) + 1 if self._text(position) == "(" else position + 1
        if self._text(position) == ":":  # a constructor's initialisers
            while self._text(position) in (":", ","):
                while self._text(position) not in ("(", "{"):
                    position += 1
                position = self._close(position) + 1
        if self._text(position) == ";":
            return position + 1
        self._refuse_threadgroup_variables(position, self._close(position))
        return self._close(position) + 1

    def _is_scope(self, brace: int) -> bool:
        """Whether the brace opens a namespace or a class, not a function's body or an initialiser."""
        i = brace - 1
        while i >= 0 and self._text(i) not in (";", "}", "{", ")"):
            if self._text(i) in ("namespace", "struct", "class", "union", "enum"):
                return True
            i -= 1
        return False

    def _template(self, position: int) -> int:
        if self._text(position + 1) == "<":
            after = self._close(position + 1, "<>") + 1
            head = after
            while self._text(head) not in (";", "{", "(", ""):
                if self._text(head) == "kernel" or ("kernel", "") in self._attributes.get(head, []):
                    return self._definition(after, template=True)
                head += 1
            return after
        end = position
        while self._text(end) not in (";", ""):
            end += 1
        attributes = self._attributes_in(position, end)
        words = {self._text(i) for i in range(position, end)}
        if "kernel" not in words and ("kernel", "") not in attributes:
            return end + 1
        host_name = next((argument for name, argument in attributes if name == "host_name"), None)
        if host_name is None:
            raise self._fail(position, 'an explicit instantiation of a kernel needs [[host_name("...")]]')
        self._blank_kernel(position, end)
        self.shader.instantiations.append((self.code[position], self.code[min(end, len(self.code) - 1)]))
        close = next((i for i in range(position, end) if self._text(i) == "(" and self._text(i - 1) != "decltype"), end)
        if any(self._text(i) == "decltype" for i in range(position, end)):
            # template decltype(name<arguments>) name<arguments>;
            opening = next(i for i in range(position, end) if self._text(i) == "decltype")
            first = self._close(opening + 1) + 1
            function = self._source(first, end)
        else:
            void = next((i for i in range(position, close) if self._text(i) == "void"), None)
            if void is None:
                raise self._fail(position, "a kernel returns void")
            function = self._source(void + 1, close)
        name = function.split("<")[0].strip()
        if name not in self.definitions:
            raise self._fail(position, f"no template kernel {name!r} has been defined before this instantiation")
        self._add("".join(re.findall(r'"([^"]*)"', host_name)), function, *self.definitions[name], position)
        return end + 1

    def _blank_kernel(self, first: int, last: int) -> None:
        for i in range(first, last):
            if self._text(i) == "kernel":
                self.tokens[self.code[i]].replacement = ""

    def _definition(self, position: int, template: bool) -> int:
        opening = position
        while self._text(opening) != "(":
            opening += 1
            if opening >= len(self.code):
                raise self._fail(position, "a kernel without parameters")
        attributes = dict(self._attributes_in(position, opening))
        host_name = "".join(re.findall(r'"([^"]*)"', attributes.get("host_name", "")))
        self._blank_kernel(position, opening)
        self.shader.functions.append(self.code[position])
        name, result = self._text(opening - 1), self._text(opening - 2)
        if result != "void":
            raise self._fail(position, f"kernel {name!r} must return void")
        close = self._close(opening)
        parameters = tuple(self._parameters(name, opening, close))
        if self._text(close + 1) != "{":
            return close + 1
        for attribute in attributes.keys() - {"kernel", "host_name", "max_total_threads_per_threadgroup"}:
            raise self._fail(position, f"unknown attribute [[{attribute}]] of kernel {name!r}")
        threads = attributes.get("max_total_threads_per_threadgroup")
        self.definitions[name] = parameters, None if threads is None else self._threads(position, threads)
        if not template:
            self._add(host_name or name, name, *self.definitions[name], position)
        end = self._close(close + 1)
        self._threadgroup_variables(close + 1, end)
        return end + 1

    def _threads(self, position: int, text: str) -> int:
        """A number of threads a group: a literal, a constant at program scope, or a product of these."""
        constants = dict(re.findall(r"constexpr u?int (\w+) = (\d+)u? ;", self._source(0, len(self.code))))
        factors = [constants.get(factor, factor).rstrip("u") for factor in text.split(" * ")]
        threads = math.prod(int(factor) if factor.isdigit() else 0 for factor in factors)
        if not 0 < threads <= MAX_THREADS_PER_GROUP:
            raise self._fail(position, f"max_total_threads_per_threadgroup({text}) is not 1 to {MAX_THREADS_PER_GROUP}")
        return threads

    def _add(
        self, host_name: str, function: str, parameters: tuple[Parameter, ...], max_threads: int | None, position: int
    ) -> None:
        indices = sorted(p.buffer for p in parameters if p.buffer is not None)
        if indices != list(range(len(indices))):
            raise self._fail(
                position, f"kernel {host_name!r} declares buffers {indices}: arguments bind to 0, 1, 2, ..."
            )
        if len(indices) > MAX_BUFFERS:
            raise self._fail(position, f"kernel {host_name!r} declares {len(indices)} buffers, Metal has {MAX_BUFFERS}")
        self.shader.kernels.append(Kernel(host_name, function, parameters, max_threads))

    def _parameters(self, kernel: str, opening: int, close: int) -> Iterator[Parameter]:
        starts = [opening + 1]
        depth = 0
        for i in range(opening + 1, close):
            text = self._text(i)
            depth += (text in "([{<") - (text in ")]}>") if len(text) == 1 else 0
            if text == "," and depth == 0:
                starts.append(i + 1)
        ends = [*(start - 1 for start in starts[1:]), close]
        positions: dict[str, str] = {}
        automatic = 0
        for first, last in zip(starts, ends, strict=True):
            words = range(first, last)
            if not words:
                continue
            declaration = self._source(first, last)
            name = self._text(words[-1])
            attributes = self._attributes_in(first, last)
            buffer = builtin = None
            for attribute, argument in attributes:
                if attribute == "buffer":
                    if not argument.isdigit():
                        raise self._fail(first, f"kernel {kernel!r}: [[buffer({argument})]] is not a number")
                    buffer = int(argument)
                elif attribute in BUILTINS:
                    builtin = attribute
                    positions[attribute] = self._text(words[0])
                elif attribute == "threadgroup":
                    raise self._fail(first, f"kernel {kernel!r}: PyTorch sets no dynamic threadgroup memory ({name})")
                else:
                    raise self._fail(first, f"kernel {kernel!r}: unknown attribute [[{attribute}]] of {name}")
            if buffer is None and builtin is None:
                if not {"device", "constant"} & {self._text(i) for i in words}:
                    raise self._fail(first, f"kernel {kernel!r}: {name} is neither a buffer nor has an attribute")
                buffer, automatic = automatic, automatic + 1
            yield Parameter(name, declaration, buffer, builtin)
        if automatic and any(a == "buffer" for a, _ in self._attributes_in(opening, close)):
            raise self._fail(opening, f"kernel {kernel!r}: give every buffer its [[buffer(n)]] or none")
        if wrong := wrong_positions(positions):
            raise self._fail(opening, f"kernel {kernel!r}: {wrong}")

    def _threadgroup_statements(self, opening: int, close: int) -> Iterator[tuple[int, int]]:
        """(first, semicolon) of the statements in a body which declare threadgroup variables, not pointers."""
        for i in range(opening + 1, close):
            if self._text(i) == "threadgroup" and self._text(i - 1) in ("{", "}", ";"):
                end = i
                while self._text(end) != ";":
                    end += 1
                name = next((j for j in range(i, end) if self._text(j) in ("[", "=", ",")), end)
                if not {"*", "&"} & {self._text(j) for j in range(i, name)}:
                    yield i, end

    def _refuse_threadgroup_variables(self, opening: int, close: int) -> None:
        for first, _ in self._threadgroup_statements(opening, close):
            raise self._fail(first, "threadgroup variables can be declared in kernels only")

    def _threadgroup_variables(self, opening: int, close: int) -> None:
        site = 0
        for first, end in self._threadgroup_statements(opening, close):
            # The type ends where the first declarator begins: the name before '[' or ',' or the end, outside <>.
            declarators: list[list[int]] = [[]]
            depth = 0
            for i in range(first + 1, end):
                text = self._text(i)
                if text == "=":
                    raise self._fail(i, "a threadgroup variable cannot be initialised")
                depth += (text in "(<[") - (text in ")>]") if len(text) == 1 else 0
                if text == "," and depth == 0:
                    declarators.append([])
                else:
                    declarators[-1].append(i)
            head = declarators[0]
            depth = 0
            name_at = head[-1]
            for i in head:
                text = self._text(i)
                depth += (text == "<") - (text == ">")
                if text == "[" and depth == 0:
                    name_at = i - 1
                    break
            kind = " ".join(self._text(i) for i in head if i < name_at)
            declarators[0] = [i for i in head if i >= name_at]
            variables = []
            for declarator in declarators:
                dimensions = " ".join(self._text(i) for i in declarator[1:])
                variables.append(ThreadgroupVariable(kind, self._text(declarator[0]), dimensions, site))
                site += 1
            self.shader.declarations.append((self.code[first], self.code[end], variables))

    def _address_spaces(self) -> None:
        """Metal wants an address space on every pointer and reference, ``thread`` too."""
        types = set(BUILTIN_TYPES)
        for i in range(len(self.code)):
            if self._text(i) in ("typename", "class", "struct") and self._text(i + 1).isidentifier():
                types.add(self._text(i + 1))
        for i in range(len(self.code)):
            if self._text(i) not in types or self._text(i - 1) in (".", "->", "typename", "class", "struct"):
                continue
            before, after = i - 1, i + 1
            while self._text(after) in ADDRESS_SPACES | {"const", "volatile"}:
                after += 1
            if self._text(after) not in ("*", "&"):
                continue
            while self._text(before) in ("const", "volatile", "metal", "::", "constexpr", "static"):
                before -= 1
            words = {self._text(j) for j in range(before, after)}
            if not words & ADDRESS_SPACES:
                mark = "pointer" if self._text(after) == "*" else "reference"
                raise self._fail(i, f"a {mark} to {self._text(i)} needs an address space: device, constant, ...")

    def _literals(self) -> None:
        for position, i in enumerate(self.code):
            token = self.tokens[i]
            if token.kind != "number" or token.text[:2].lower() in ("0x", "0b"):
                continue
            match = FLOAT.match(token.text)
            if match is None:
                if token.text.lower().endswith("h"):
                    raise self._fail(position, f"{token.text}: the suffix h needs a decimal point")
                continue
            number, suffix = match.group(), token.text[match.end() :]
            if suffix in ("", "f", "F"):
                token.replacement = f"{number}f"
            elif suffix in ("h", "H"):
                token.replacement = f"half({number}f)"
            elif suffix in ("bf", "BF"):
                token.replacement = f"bfloat({number}f)"
            else:
                raise self._fail(position, f"{token.text} is no Metal literal")

    def _constructors(self) -> None:
        """``float4(...)`` in an expression: C++ has no vector constructors of several arguments."""
        for position in range(len(self.code)):
            is_called = self._text(position + 1) == "(" and self._text(position + 2) not in ("&", "*")
            if self._text(position) in VECTORS and is_called:
                self.tokens[self.code[position]].replacement = f"metal::make<{self._text(position)}>"
            elif self._text(position) == "vec" and self._text(position + 1) == "<":
                close = self._close(position + 1, "<>")
                if self._text(close + 1) == "(" and self._text(close + 2) not in ("&", "*"):
                    qualifier = "" if self._text(position - 1) == "::" else "metal::"
                    self.tokens[self.code[position]].replacement = f"{qualifier}make<metal::vec"
                    self.tokens[self.code[close]].replacement = ">>"
