"""The house of the design, read from the source: floors, third parties, cycles, sizes, names, and what no file may hold.

Every rule is a function over modules ``{dotted name: source}``, so each is also shown a violation that it must find.
"""

import ast
import graphlib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Tree = dict[str, str]

FLOORS = {
    0: "errors config schedule plan views sections command",
    1: "task dist report losses masks draws card lars",
    2: "models data probes",
    3: "objectives train interop inspect",
    4: "cli pretrain finetune",
}
FLOOR = {unit: floor for floor, units in FLOORS.items() for unit in units.split()}
FEW_THIRD_PARTIES = {"report": {"rich"}, "card": set(), "probes": {"torch", "numpy"}} | {
    word: {"yaml", "pydantic"} for word in FLOORS[0].split()
}
FEW_THIRD_PARTIES |= {tool: {"torch"} for tool in ("task", "dist", "losses", "masks", "draws", "lars")}
HOMES = {  # third party -> where it may be imported
    "timm": r"vitssl\.models\..*|vitssl\.data\.augment|vitssl\.interop\.timm",
    "accelerate": r"vitssl\.train\..*",
    "deepspeed": r"vitssl\.train\..*",
    "webdataset": r"vitssl\.data\..*",
    "datasets": r"vitssl\.data\..*",
    "pyarrow": r"vitssl\.data\..*",
    "transformers": r"vitssl\.interop\.\w+",
    "onnx": r"vitssl\.interop\.\w+",
    "onnxruntime": r"vitssl\.interop\.\w+",
}
MAX_LINES, MAX_FUNCTION = 300, 80


def read_tree() -> Tree:
    """Every module of the library and the programs."""
    paths = [path for part in ("vitssl", "pretrain", "finetune") for path in (ROOT / part).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {names[path]: path.read_text() for path in sorted(paths)}


def unit(module: str) -> str:
    """The part of the house a module belongs to: a file of the library's root, a sub-package, or a program."""
    parts = module.split(".")
    return parts[0] if parts[0] != "vitssl" else parts[1] if len(parts) > 1 else "vitssl"


def imports(tree: Tree, module: str) -> set[str]:
    """Dotted names that a module imports anywhere in it, also below ``if TYPE_CHECKING`` and inside functions."""
    found: set[str] = set()
    package = module if any(other.startswith(module + ".") for other in tree) else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(tree[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in tree or source == "vitssl" else source for name in inner}
    return found


def inner_imports(tree: Tree) -> list[tuple[str, str]]:
    """(module, imported module) within the house."""
    homes = ("vitssl", "pretrain", "finetune")
    return [(module, name) for module in tree for name in sorted(imports(tree, module)) if name.split(".")[0] in homes]


def unknown_units(tree: Tree) -> list[str]:
    return [module for module in tree if unit(module) not in FLOOR and module != "vitssl"]


def climbing(tree: Tree) -> list[str]:
    """A module imports its own unit and lower floors; on floor 0 the other words too, and nothing beside it elsewhere."""
    found = []
    for module, name in inner_imports(tree):
        here, there = unit(module), unit(name)
        if here == there or "vitssl" in (here, there):
            continue
        allowed = FLOOR[there] < FLOOR[here] or FLOOR[here] == FLOOR[there] == 0
        found += [] if allowed else [f"{module} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})"]
    return found


def cycles(tree: Tree) -> list[str]:
    """Units that import each other, directly or by way of others."""
    graph: dict[str, set[str]] = {}
    for module, name in inner_imports(tree):
        if unit(module) != unit(name) and "vitssl" not in (unit(module), unit(name)):
            graph.setdefault(unit(module), set()).add(unit(name))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def strangers(tree: Tree) -> list[str]:
    """Third parties outside their homes, and any that a frugal part of the house does without."""
    found = []
    for module in tree:
        for name in sorted({name.split(".")[0] for name in imports(tree, module)}):
            if name in sys.stdlib_module_names or name in ("vitssl", "pretrain", "finetune"):
                continue
            few = FEW_THIRD_PARTIES.get(unit(module))
            if not re.fullmatch(HOMES.get(name, ".*"), module) or (few is not None and name not in few):
                found.append(f"{module} imports {name}")
    return found


def calls(tree: Tree, matches, *, homes: str) -> list[str]:
    """Places outside ``homes`` that make a call whose function ``matches``."""
    return [
        f"{module}:{node.lineno}"
        for module in tree
        if not re.fullmatch(homes, module)
        for node in ast.walk(ast.parse(tree[module]))
        if isinstance(node, ast.Call) and matches(node.func)
    ]


def printing(tree: Tree) -> list[str]:
    return calls(tree, lambda call: isinstance(call, ast.Name) and call.id == "print", homes=r"vitssl\.(report|cli)")


def waiting(tree: Tree) -> list[str]:
    """``.item()`` makes the host wait for the device."""
    homes = r"vitssl\.(report|probes\..*)"
    return calls(tree, lambda call: isinstance(call, ast.Attribute) and call.attr == "item", homes=homes)


def unpickling(tree: Tree) -> list[str]:
    """``torch.load``, ``pickle`` and what is built on it: only foreign weights may be read with them, in one place."""
    pickles = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    named = [f"{module} imports {name}" for module in tree for name in imports(tree, module) if name.split(".")[0] in pickles]

    def loads(call: ast.expr) -> bool:
        owner = call.value.id if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) else ""
        return isinstance(call, ast.Attribute) and call.attr == "load" and owner in ("torch", "np", "numpy")

    return named + calls(tree, loads, homes=r"vitssl\.interop\.files")


def long_files(tree: Tree) -> list[str]:
    counts = {module: len(source.splitlines()) for module, source in tree.items()}
    return [f"{module} has {count} lines" for module, count in counts.items() if count > MAX_LINES]


def long_functions(tree: Tree) -> list[str]:
    functions = [
        (module, node)
        for module in tree
        for node in ast.walk(ast.parse(tree[module]))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = [(f"{module}.{node.name}", node.end_lineno - node.lineno + 1) for module, node in functions]
    return [f"{name} has {size} lines" for name, size in sizes if size > MAX_FUNCTION]


def drawers(tree: Tree) -> list[str]:
    """Names under which anything is kept."""
    return [module for module in tree if {"utils", "util", "misc", "common", "helpers", "helper"} & set(module.split("."))]


def undescribed(tree: Tree) -> list[str]:
    return [module for module, source in tree.items() if not ast.get_docstring(ast.parse(source))]


def unfinished(tree: Tree) -> list[str]:
    """Comments that put work off."""
    return [
        f"{module}:{token.start[0]}"
        for module, source in tree.items()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX)\b", token.string)
    ]


LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION
PLANTED = {  # rule -> trees of which each breaks it
    unknown_units: [{"vitssl.attic": ""}],
    climbing: [
        {"vitssl.config": "from vitssl.task import Rule"},
        {"vitssl.plan": "import vitssl.models.encoder"},
        {"vitssl.masks": "from vitssl import draws"},
        {"vitssl.data.loader": "from vitssl.models.encoder import Encoder"},
        {"vitssl.train.loop": "def f():\n    from vitssl import objectives"},
        {"vitssl.train.loop": "from vitssl.inspect.pictures import sheet"},
        {"vitssl.inspect.pictures": "from pretrain.config import read"},
        {"pretrain.run": "from finetune.config import read"},
        {"vitssl.cli": "import pretrain.run"},
        {"vitssl.data.index": "from ..models import encoder"},
        {"vitssl.models": "from .data import x", "vitssl.models.data": "", "vitssl.data.y": "from ..models import data"},
    ],
    cycles: [
        {"vitssl.plan": "from vitssl.views import View", "vitssl.views": "from vitssl.plan import Plan"},
        {
            "vitssl.data.a": "import vitssl.models.b",
            "vitssl.models.b": "from vitssl.probes import c",
            "vitssl.probes.c": "from vitssl.data import a",
        },
    ],
    strangers: [
        {"vitssl.views": "import torch"},
        {"vitssl.report": "import torch"},
        {"vitssl.probes.knn": "import sklearn"},
        {"vitssl.data.loader": "from timm.data import Mixup"},
        {"pretrain.run": "from accelerate import Accelerator"},
        {"vitssl.objectives.mae": "def f():\n    import deepspeed"},
        {"vitssl.train.loop": "import webdataset as wds"},
        {"vitssl.models.encoder": "import transformers"},
    ],
    printing: [{"vitssl.train.loop": "def f():\n    print(1)"}, {"pretrain.run": "print('x')"}],
    waiting: [{"vitssl.losses": "x.sum().item()"}],
    unpickling: [
        {"vitssl.train.a": "import torch\ntorch.load(path)"},
        {"vitssl.train.a": "from pickle import loads"},
        {"finetune.run": "import numpy as np\nnp.load(path, allow_pickle=True)"},
    ],
    long_files: [{"vitssl.a": "\n" * (MAX_LINES + 1)}],
    long_functions: [
        {"vitssl.a": LONG_FUNCTION},
        {"vitssl.a": "class A:\n    " + LONG_FUNCTION.replace("\n", "\n    ").strip()},
    ],
    drawers: [{"vitssl.utils": ""}, {"vitssl.models.helpers": ""}, {"vitssl.misc.a": ""}],
    undescribed: [{"vitssl.a": "x = 1\n'''not a docstring'''"}],
    unfinished: [{"vitssl.a": "x = 1  # TODO: more"}, {"vitssl.a": "# FIXME"}],
}
SOUND = {
    "vitssl.errors": '"""Doc."""\nclass E(Exception): ...',
    "vitssl.config": '"""Doc, TODO in words."""\nimport yaml\nfrom vitssl.errors import E',
    "vitssl.dist": '"""Doc."""\nimport torch\nfrom vitssl.config import E',
    "vitssl.report": '"""Doc."""\nfrom rich.text import Text\nprint(values.item())',
    "vitssl.models": '"""Doc."""',
    "vitssl.models.encoder": '"""Doc."""\nimport timm\nfrom . import heads\nfrom vitssl import dist',
    "vitssl.models.heads": '"""Doc."""\nitem = {}\nitem.items()',
    "vitssl.train.loop": '"""Doc."""\nimport accelerate\nfrom vitssl.models.encoder import Encoder',
    "pretrain.run": '"""Doc."""\nimport json\nfrom pretrain.config import read\njson.load(file)',
    "pretrain.config": '"""Doc."""\nfrom vitssl.train.loop import fit',
}
RULES = pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)


@pytest.fixture(scope="module")
def house() -> Tree:
    return read_tree()


@RULES
def test_the_house_stands(rule, house: Tree):
    assert rule(house) == []


@RULES
def test_each_rule_finds_what_breaks_it(rule):
    assert [tree for tree in PLANTED[rule] if not rule(tree)] == []


@RULES
def test_no_rule_finds_fault_with_a_sound_house(rule):
    assert rule(SOUND) == []


def test_the_whole_tree_was_read(house: Tree):
    assert {"vitssl", "vitssl.train.loop", "vitssl.data.sources", "pretrain.__main__", "finetune.run"} <= set(house)
    assert ("vitssl.train.session", "vitssl.data.feed") in inner_imports(house)
    assert ("vitssl.train.loop", "vitssl.dist") in inner_imports(house)


def test_test_files_keep_to_the_size_too():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
