"""Which of the library's code a notebook can reach, found from its text; nothing is run.

From the names that a notebook uses, names are followed through the definitions of the library's
modules, each a whole without its docstrings and comments. What a module executes when it is
imported counts wherever it is imported, with all that it names. A module that is handed on as a
value counts whole, and so does the library where code imports or evaluates what no text names.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pai_utils.support.code import LIBRARY, facts_of, file_of, imported, syntax

# Decorators that only change what they decorate.
PURE = {"cache", "contextmanager", "dataclass", "inference_mode", "no_grad"}
NAME = re.compile(r"\w+(\.\w+)*")
DYNAMIC = re.compile(
    r"(.*\.)?(import_module|__import__|__subclasses__|__init_subclass__)|eval|exec|globals"
    r"|sys\.modules.*"
)


class Code(NamedTuple):
    """A statement, and absolute names that it reaches: used, or only imported."""

    text: str
    reaches: frozenset[tuple[str, bool]]


class Module(NamedTuple):
    """What a module's names may stand for, what it defines, and what importing it executes."""

    meanings: dict[str, set[str]]
    definitions: dict[str, list[Code]]
    executed: list[Code]


class Library:
    """The library below a folder, as text."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module] = {}

    def digest(self, source: str) -> str:
        """A digest of all code of the library that a notebook's code can reach."""
        try:
            tree = syntax(source)
            waiting = _code(tree, imported(tree)).reaches - {("globals", True)}  # its own
        except SyntaxError:  # a command of IPython
            waiting = frozenset({("eval", True)})
        known: set[tuple[str, bool]] = set()
        texts: set[str] = set()
        while waiting := waiting - known:
            known |= waiting
            found = {code for name, used in waiting for code in self._named(name, used)}
            texts |= {code.text for code in found}
            waiting = frozenset().union(*(code.reaches for code in found))
        return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()

    def _named(self, name: str, used: bool) -> Iterator[Code]:
        """What an absolute name stands for, if used, and what its module executes."""
        if used and DYNAMIC.fullmatch(name):
            for path in self.root.glob(f"{LIBRARY}/**/*.py"):
                place = ".".join(path.relative_to(self.root).with_suffix("").parts)
                yield from self._named(place.removesuffix(".__init__"), True)
        module, parts = None, name.split(".")
        rest: list[str] = []
        for end in range(1, len(parts) + 1) if parts[0] == LIBRARY else ():
            if module is None or file_of(".".join(parts[:end]), self.root):
                module, rest = self._module(".".join(parts[:end])), parts[end:]
                yield from module.executed
        if module is None or (not used and rest != ["*"]):
            return
        for each in module.meanings.keys() & rest[:1] or module.meanings:
            yield from module.definitions.get(each, ())
            others = (".".join([target, *rest[1:]]) for target in module.meanings[each])
            yield Code("", frozenset((other, True) for other in others))

    def _module(self, name: str) -> Module:
        """A module, read once."""
        if name not in self._modules:
            path = file_of(name, self.root)
            assert path is not None, name
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            tree = syntax(path.read_text(encoding="utf-8"))
            facts = Code(facts_of(path), frozenset())
            module = self._modules[name] = Module(imported(tree, package), {}, [facts])
            roles = [_role(node) for node in tree.body]
            for own in {own for own, _ in roles if own}:
                module.meanings.setdefault(own, set()).add(f"{name}.{own}")
            for node, (own, executed) in zip(tree.body, roles, strict=True):
                code = _code(node, module.meanings, package, f"{name}: ")
                module.definitions.setdefault(own, []).append(code)
                if executed:
                    module.executed.append(code)
            lazy = path.with_suffix(".pyi")  # names that are imported when they are used
            if lazy.is_file():
                module.meanings.update(imported(syntax(lazy.read_text(encoding="utf-8")), package))
        return self._modules[name]


def _code(
    node: ast.AST, meanings: Mapping[str, set[str]], package: str = "", place: str = ""
) -> Code:
    reaches = {(n, False) for names in imported(node, package).values() for n in names}
    for used in _names(node):
        head, dot, rest = used.partition(".")
        reaches |= {(target + dot + rest, True) for target in meanings.get(head, {head})}
    # What is imported and not used changes nothing.
    text = "" if isinstance(node, (ast.Import, ast.ImportFrom)) else place + ast.dump(node)
    return Code(text, frozenset(reaches))


def _names(node: ast.AST) -> Iterator[str]:
    """Names that code uses, with the attributes that are asked of them, as `pai.plots.curves`."""
    match node:
        case ast.Name() | ast.Attribute() if NAME.fullmatch(name := ast.unparse(node)):
            yield name
        case ast.Call(func, [ast.Constant(str(name)), *_]) if DYNAMIC.fullmatch(ast.unparse(func)):
            yield name  # of a module, which the text says
        case ast.FunctionDef("__init_subclass__"):
            yield "__init_subclass__"
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _names(child)


def _role(node: ast.stmt) -> tuple[str, bool]:
    """The name that a statement defines, if any, and whether it may do more than that."""
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
            decorators = (next(_names(each), "") for each in node.decorator_list)
            return name, not PURE.issuperset(each.rpartition(".")[2] for each in decorators)
        case ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name)):
            return name, any(isinstance(each, ast.Call) for each in ast.walk(node))
        case ast.If(ast.Name("TYPE_CHECKING")):
            return "", False
    return "", True
