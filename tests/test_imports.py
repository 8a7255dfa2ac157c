"""The dependency rule, on every import of every module, nested ones included: no waivers.

`infra -> jobs -> pipeline -> video_dit -> torch`, never backwards, and no module does work when it is imported.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Modules at or below `inside` (and not below `outside`) import nothing at or below `never`.

    With `deep`, nothing that they import, directly or through our own modules, may do so either.
    """

    inside: str
    never: tuple[str, ...]
    outside: str | None = None
    deep: bool = False


TREES = ("video_dit", "pipeline", "jobs", "infra", "benchmarks")

RULES = (
    Rule("video_dit", never=("ray", "av", "decord", "pipeline", "jobs", "infra", "benchmarks", "tests")),
    Rule("video_dit", never=("torch.distributed", "video_dit.parallel"), outside="video_dit.parallel"),
    Rule("pipeline", never=("torch.distributed", "jobs", "infra", "benchmarks", "tests")),
    Rule("pipeline.stages", never=("ray",), deep=True),
    Rule("jobs", never=("torch", "ray", "infra", "benchmarks", "tests")),
    Rule("infra", never=("torch", "ray", "benchmarks", "tests")),
    Rule("benchmarks", never=("torch.distributed", "jobs", "infra", "tests")),
)

# What may be called while a module is imported: builders of constants, types and declarations. The last name counts
# (`dataclasses.field` is `field`), `pa.*` is any call on `pa`; our dataclasses, enums and named tuples are free too.
MAY_CALL = {
    *("bool", "bytes", "dict", "float", "frozenset", "int", "len", "list", "max", "min", "range", "set", "sorted"),
    *("str", "sum", "tuple", "zip", "items", "keys", "values", "Fraction", "MappingProxyType", "Path", "partial"),
    *("NamedTuple", "NewType", "ParamSpec", "TypeVar", "cast", "namedtuple", "field", "fields", "getLogger"),
    *("math.*", "re.compile", "Struct", "pa.*", "torch.device", "torch.finfo"),
    *("APIRouter", "Body", "ConfigDict", "Depends", "Field", "File", "Form", "Header", "Query", "model_json_schema"),
    *("Column", "Float", "ForeignKey", "Index", "MetaData", "String", "Table", "UniqueConstraint"),
}


# --- the tree -------------------------------------------------------------------------------------------------------


def load(root: Path) -> dict[str, ast.Module]:
    """Every module below `root` that the rules speak of: dotted name -> syntax tree."""
    modules = {}
    for path in sorted(path for tree in TREES for path in (root / tree).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return modules


def is_below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def home(module: str) -> str:
    """The name that people import: a package's `__init__` is the package."""
    return module.removesuffix(".__init__")


# --- imports --------------------------------------------------------------------------------------------------------


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Each dotted name that a module imports, at any depth, with its line."""
    plain = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    bound = {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in plain if not alias.asname}
    bound |= {alias.asname: alias.name for alias in plain if alias.asname}
    for node in ast.walk(tree):
        for name in named(node, module, bound):
            yield name, node.lineno


def named(node: ast.AST, module: str, bound: dict[str, str]) -> list[str]:
    """What one node imports. Of `from a import b` both `a` and `a.b`, since `b` may be a module.

    `torch.distributed` after `import torch` is an import in all but form: `bound` has the local names of modules.
    """
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            return [base, *(f"{base}.{alias.name}" for alias in node.names)]
        case ast.Attribute(value=ast.Name(id=local)) if local in bound:
            return [f"{bound[local]}.{node.attr}"]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            is_import = last(node.func) in ("import_module", "__import__")
            return [name] if is_import else []
    return []


def last(node: ast.expr) -> str:
    """`field` of `dataclasses.field`."""
    return ast.unparse(node).rpartition(".")[2]


def broken_imports(modules: dict[str, ast.Module]) -> list[str]:
    """One line for each import that a rule forbids."""
    found = {module: list(imports(module, tree)) for module, tree in modules.items()}
    names = {home(module): {name for name, _ in pairs} for module, pairs in found.items()}
    return sorted(
        {
            f"{module}:{line} imports {' -> '.join(path)}"
            for rule in RULES
            for module in found
            if applies(rule, home(module))
            for name, line in found[module]
            if (path := way(name, rule, names))
        }
    )


def applies(rule: Rule, module: str) -> bool:
    return is_below(module, rule.inside) and not (rule.outside and is_below(module, rule.outside))


def way(name: str, rule: Rule, names: dict[str, set[str]]) -> list[str]:
    """How importing `name` breaks the rule: [name], or with `deep` the shortest path to what is forbidden, or []."""
    paths, seen = [[name]], {name}
    for path in paths:
        if any(is_below(path[-1], top) for top in rule.never):
            return path
        inner = names.get(path[-1], set()) | parents(path[-1]) if rule.deep else set()
        paths.extend([*path, other] for other in sorted(inner - seen))
        seen |= inner
    return []


def parents(name: str) -> set[str]:
    """The packages that importing `name` runs first: a and a.b of a.b.c."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


# --- work at import -------------------------------------------------------------------------------------------------


def broken_loads(modules: dict[str, ast.Module]) -> list[str]:
    """One line for each statement that does work when its module is imported."""
    free = value_classes(modules)
    return [
        f"{module}:{node.lineno} does work at import: {ast.unparse(node).splitlines()[0][:80]}"
        for module, tree in modules.items()
        for node in work(tree.body, free)
    ]


def value_classes(modules: dict[str, ast.Module]) -> set[str]:
    """Names of our classes that only hold values: dataclasses, enums and named tuples."""
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = ("dataclass", "NamedTuple", "Enum", "IntEnum", "StrEnum")
    return {
        node.name
        for node in classes
        for mark in [*node.bases, *node.decorator_list]
        if last(mark.func if isinstance(mark, ast.Call) else mark) in kinds
    }


def work(body: list[ast.stmt], free: set[str]) -> Iterator[ast.stmt]:
    """The statements of a module's or class's body that do more than declare. Decorators count as declarations."""
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
                continue
            case ast.ClassDef():
                yield from work(node.body, free)
                continue
            case ast.If(test=test, orelse=[]) if ast.unparse(test).endswith("TYPE_CHECKING"):
                yield from work(node.body, free)
                continue
            case ast.If(test=test, orelse=[]) if ast.unparse(test) == "__name__ == '__main__'":
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                values = [value for value in [*node.args.defaults, *node.args.kw_defaults] if value]
            case ast.Assign(value=value) | ast.AugAssign(value=value) | ast.AnnAssign(value=value):
                values = [value] if value else []
            case _:
                values = None
        if values is None or any(not may_call(call, free) for value in values for call in calls(value)):
            yield node


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that evaluating an expression makes; a lambda's body waits."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls(child)


def may_call(call: ast.Call, free: set[str]) -> bool:
    name = ast.unparse(call.func)
    return not (MAY_CALL | free).isdisjoint({name, last(call.func), f"{name.partition('.')[0]}.*"})


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules():
    return load(ROOT)


def plant(root: Path, files: dict[str, str]) -> dict[str, ast.Module]:
    """A fake tree of path (without .py) -> text."""
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return load(root)


def test_the_tree_keeps_the_dependency_rule(modules):
    assert {"video_dit.shapes", "pipeline.store", "pipeline.stages.__init__"} <= set(modules)  # the walk sees them
    assert broken_imports(modules) == []


def test_no_module_does_work_at_import(modules):
    assert broken_loads(modules) == []


@pytest.mark.parametrize(
    ("path", "text", "imported"),
    [
        ("video_dit/model", "import ray", "ray"),
        ("video_dit/model", "def f():\n    from ray import data", "ray"),
        ("video_dit/model", "if TYPE_CHECKING:\n    from pipeline import store", "pipeline.store"),
        ("video_dit/model", "def f():\n    return importlib.import_module('pipeline.store')", "pipeline.store"),
        ("video_dit/model", "def f():\n    return __import__('jobs')", "jobs"),
        ("video_dit/model", "import torch.distributed as dist", "torch.distributed"),
        ("video_dit/model", "import torch.nn\ndef f():\n    torch.distributed.barrier()", "torch.distributed"),
        ("video_dit/model", "from . import parallel", "video_dit.parallel"),
        ("video_dit/diffusion/loss", "from ..parallel.mesh import Mesh", "video_dit.parallel.mesh"),
        ("video_dit/parallel/mesh", "from pipeline.errors import KinorayError", "pipeline.errors"),
        ("pipeline/train", "from torch.distributed import barrier", "torch.distributed"),
        ("pipeline/train", "from jobs.recipes import toy", "jobs.recipes"),
        ("pipeline/stages/probe", "class Probe:\n    def run(self):\n        import ray.data", "ray.data"),
        ("jobs/train_video", "import torch", "torch"),
        ("jobs/train_video", "from benchmarks import common", "benchmarks"),
        ("benchmarks/packing", "from jobs import recipes", "jobs"),
    ],
)
def test_a_forbidden_import_is_named(tmp_path, path, text, imported):
    problems = broken_imports(plant(tmp_path, {path: text}))
    assert all(problem.startswith(path.replace("/", ".") + ":") for problem in problems)
    assert any(problem.endswith(f" imports {imported}") for problem in problems)


def test_a_stage_may_not_reach_ray_through_other_modules(tmp_path):
    files = {
        "pipeline/stages/probe": "from pipeline import middle",
        "pipeline/middle": "def helper():\n    from . import cluster",
        "pipeline/cluster": "import ray",
    }
    assert broken_imports(plant(tmp_path, files)) == [
        "pipeline.stages.probe:1 imports pipeline.middle -> pipeline.cluster -> ray"
    ]


def test_a_package_runs_before_its_modules(tmp_path):
    files = {"pipeline/__init__": "import ray", "pipeline/stages/probe": "import pipeline.errors"}
    assert broken_imports(plant(tmp_path, files)) == [
        "pipeline.stages.probe:1 imports pipeline.errors -> pipeline -> ray"
    ]


def test_imports_along_the_arrows_are_free(tmp_path):
    files = {
        "video_dit/model": "import torch\nimport xformers.ops\nfrom .shapes import Stride\ntorch.nn.Linear",
        "video_dit/parallel/mesh": "import torch.distributed as dist\nfrom video_dit import model",
        "pipeline/errors": "import enum",
        "pipeline/train": "import ray, torch\nfrom video_dit.parallel import mesh",
        "pipeline/stages/decode": "import av\nfrom pipeline.errors import ClipRejected",
        "jobs/train_video": "from pipeline.train import train\nfrom jobs import recipes",
        "benchmarks/packing": "import torch, ray\nfrom video_dit.parallel import mesh\nfrom pipeline import train",
    }
    assert broken_imports(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    "text",
    [
        "print('hello')",
        "import torch\ntorch.set_num_threads(1)",
        "MODEL = load('weights')",
        "SIZES = [measure(x) for x in range(3)]",
        "try:\n    import xformers\nexcept ImportError:\n    xformers = None",
        "class A:\n    table = build()",
        "def f(x=build()):\n    return x",
        "if TYPE_CHECKING:\n    run()",
        "if sys.platform == 'linux':\n    A = 1",
    ],
)
def test_work_at_import_is_found(tmp_path, text):
    (problem,) = broken_loads(plant(tmp_path, {"video_dit/model": text}))
    assert problem.startswith("video_dit.model:")


DECLARATIONS = '''"""Docstring."""
import pyarrow as pa
logger = logging.getLogger(__name__)
T = TypeVar("T")
WORD = re.compile(r"[a-z]+")
SCHEMA = pa.schema([("a", pa.int32())])
SQUARES = {n: n**2 for n in range(3)}
LATER = lambda: run()
@dataclass(frozen=True)
class Config:
    sizes: list[int] = field(default_factory=list)
    def __post_init__(self): run()
TINY = Config(sizes=[1])
if TYPE_CHECKING:
    from x import y
@torch.no_grad()
def f(config=Config()): return run()
if __name__ == "__main__":
    run()
'''


def test_declarations_are_not_work(tmp_path):
    assert broken_loads(plant(tmp_path, {"video_dit/model": DECLARATIONS})) == []
