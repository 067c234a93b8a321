"""The shape of the code: sizes, imports that only go downwards, and words that PyTorch users know."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FT = ROOT / "ft"
SOURCES = sorted(FT.rglob("*.py"))

MOST_LINES_OF_FUNCTION, MOST_LINES_OF_MODULE = 80, 350
MOST_MODULES_AT_THE_TOP, MOST_MODULES_IN_A_PACKAGE = 9, 12

# From the top down: a module imports only from its own layer and from those after it.
TOP_LAYERS = (
    "__main__",
    "api",
    "cli",
    "finetune",
    "session",
    "setup",
    "explain",
    "report",
    "export",
    "evaluation",
    "inference",
)
LOWER_LAYERS = ("checkpoint", "train", "distributed", "data", "model", "settings", "config", "checks", "io", "device")
LAYERS = (*TOP_LAYERS, *LOWER_LAYERS, "errors")

# `import ft`, `--help` and a wrong flag do not wait for these packages: only here a function may import modules that
# import them.
SLOW_PACKAGES = {"torch", "pyarrow"}
WAIT_FOR_NO_SLOW_PACKAGE = ("ft", "ft.cli")
# This one waits for signal handlers, so that an interrupt while modules are imported ends with a message.
AFTER_SIGNAL_HANDLERS = "ft.__main__ imports ft.cli.main"

# Words for what PyTorch's documentation has other words for.
PRIVATE_WORDS = {
    r"no numbers?( any ?more| at all)?\b(?! of)": "NaN or inf; not a number",
    r"(?<!there )is no (file|tokenizer|checkpoint|folder|directory|number|model|UTF-8|JSON|GPT-2)": "is not a ...",
    r"no UTF-8": "not valid UTF-8",
    r"leisurely": "at idle priority",
    r"\bDesk\b|_desk\b": "buffer pair",
    r"in hand\b": "held, read",
    r"surest": "most confident",
    r"lies? in\b|lay in\b": "is in, is saved to",
    r"\bsay\(|_say\b|\btold\b|\btells?\b(?!\()|\bspeaks?\b|\bsays so\b": "returns, prints, reports",
    r"gives? back|given back": "returns",
    r"rooms? (of its own|for)": "memory, disk space",
    r"\b[Jj]udg(e|es|ed|ing)\b": "evaluate, score",
    r"\bwhole\b(?! numbers?|-network)": "full, complete, valid",
    r"\b[Ff]olders?\b|_folder|Folder": "directory",
    r"learnt|by heart|nobody's business|for its own sake|wholly": "learned; memorize",
    r"goes on\b|go on\b": "continues",
    r"([Oo]ptimis|[Ii]nitialis|[Tt]okenis|[Rr]ecognis|[Ss]erialis|[Nn]ormalis)(e|es|ed|er|ers|ing|ation)\b": "-ize",
    r"[Bb]ehaviour|[Cc]olour|[Nn]eighbour": "American spelling",
}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path):
    """The dotted name of a module of `ft`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


def imported_modules(node):
    """The modules of `ft` that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "ft"]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ft":
        submodules = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in submodules]
    return []


def imports_of(path):
    """Each import of a module of `ft` that is executed, and whether it is inside a function."""

    def visit(node, in_function):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        yield from ((name, in_function) for name in imported_modules(node))
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or is_function)

    return list(visit(parse(path), False))


def external_imports(module):
    """The packages other than `ft` that are imported together with a module, by its own statements."""
    path = ROOT / (module.replace(".", "/") + ".py")
    body = parse(path if path.exists() else path.with_suffix("") / "__init__.py").body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def layer_of(module):
    """`ft.train.loop` -> `train`; None for `ft` itself."""
    return module.split(".")[1] if "." in module else None


def functions():
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_functions_and_modules_are_short():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in functions() if lines > MOST_LINES_OF_FUNCTION} == {}
    assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES_OF_MODULE} == {}


def test_packages_are_small():
    packages = defaultdict(list)
    for path in SOURCES:
        if path.parent == FT or path.name != "__init__.py":
            packages[path.parent].append(path.name)
    at_the_top = set(packages[FT]) - {"__main__.py"}  # which Python names, for `python -m ft`
    assert len(at_the_top) <= MOST_MODULES_AT_THE_TOP, at_the_top
    too_large = {str(package): names for package, names in packages.items() if len(names) > MOST_MODULES_IN_A_PACKAGE}
    assert too_large == {}


def test_imports_go_downwards():
    assert {layer_of(module) for module in MODULES} - {None} == set(LAYERS)
    upwards = [
        f"{name_of(path)} imports {module}"
        for path in SOURCES
        if layer_of(name_of(path)) is not None
        for module, _ in imports_of(path)
        if layer_of(module) is None or LAYERS.index(layer_of(module)) < LAYERS.index(layer_of(name_of(path)))
    ]
    assert upwards == []


def test_imports_of_modules_are_acyclic():
    graph = {name_of(path): {module for module, _ in imports_of(path)} for path in SOURCES}
    finished = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in sorted(graph[module]):
                visit(imported, [*path, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_only_slow_packages_are_imported_inside_functions():
    graph = {name_of(path): [module for module, inside in imports_of(path) if not inside] for path in SOURCES}

    def is_slow(module):
        return bool(external_imports(module) & SLOW_PACKAGES) or any(map(is_slow, graph[module]))

    inside = [(name_of(path), module) for path in SOURCES for module, inside in imports_of(path) if inside]
    unneeded = [
        f"{importing} imports {module}"
        for importing, module in inside
        if (importing.rpartition(".")[0] not in WAIT_FOR_NO_SLOW_PACKAGE and importing not in WAIT_FOR_NO_SLOW_PACKAGE)
        or not is_slow(module)
    ]
    assert [pair for pair in unneeded if pair != AFTER_SIGNAL_HANDLERS] == []


def test_no_module_reads_its_own_source():
    reading = r"inspect\.(getsource|getsourcelines|findsource)|ast\.parse|tokenize\.|linecache"
    assert [str(path) for path in SOURCES if re.search(reading, path.read_text())] == []


@pytest.mark.parametrize("words", PRIVATE_WORDS, ids=lambda words: PRIVATE_WORDS[words])
def test_no_private_words(words):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if path.name != "general_text.py"  # holds a text to measure perplexity on
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(words, line)
    ]
    assert found == [], f"write: {PRIVATE_WORDS[words]}"
