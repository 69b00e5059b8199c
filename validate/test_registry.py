"""The table of backends keeps its rules, and so do the imports of the whole package."""

import ast
import importlib
import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import torch
from flashstudy import backends
from flashstudy.backends import BACKENDS, load, why_not

ROOT = pathlib.Path(backends.__file__).resolve().parents[1]
# A file that goes on with a step where its own kernel ends: no step, and no row, of its own.
PARTS = {"v7_wide_heads": {"v7_hopper_backward"}}
STEPS = sorted({p.stem for p in (ROOT / "kernels").glob("v[0-9]*_*.py")} - {*PARTS})
# What users call runs several steps, and these two modules bring them together: `hopper` a forward
# and a backward that are files of their own, `__init__` whichever step suits the tensors.
JOINED = {"hopper": {"v6_persistent", "v7_hopper_backward", "v7_wide_heads"}}
JOINING = {"__init__", *JOINED}
PACKAGES = {"kernels", "backends", "bench", "validate", "figures", "block"}


# ---- The table -----------------------------------------------------------------------------------


def test_standard_and_library_rows_come_before_the_ladder_in_its_order():
    own = [BACKENDS[n].target.startswith("kernels.") for n in BACKENDS]
    assert own == sorted(own)
    ladder = [n for n in BACKENDS if BACKENDS[n].target.startswith("kernels.")]
    assert ladder == sorted(ladder, key=lambda n: int(n[1:].split("_")[0]))
    assert next(iter(BACKENDS)) == "naive"


def test_labels_are_unique():
    labels = [row.label for row in BACKENDS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", BACKENDS)
def test_row_is_well_formed(name):
    row = BACKENDS[name]
    assert row.family in ("standard", "flash", "auto")
    assert row.cpu in (None, "native", "interpreter")
    assert row.dtypes
    assert set(row.dtypes) <= {torch.float16, torch.bfloat16, torch.float32}
    assert len(row.capability) == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_target_is_a_function_of_the_contract(name):
    """Read from the source: a module that needs a GPU's package need not import here."""
    module, function = BACKENDS[name].target.split(":")
    source = ROOT / (module.replace(".", "/") + ".py")
    names = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = [a.arg for a in node.args.args + node.args.kwonlyargs]
        elif isinstance(node, ast.Assign):
            names |= {t.id: None for t in node.targets if isinstance(t, ast.Name)}
    assert function in names, f"{source} defines no {function}"
    arguments = names[function]
    if arguments is None:  # made by a call; the module imports everywhere
        arguments = list(inspect.signature(load(name)).parameters)
    assert arguments[:5] == ["q", "k", "v", "causal", "scale"]


def test_every_step_has_a_row_and_every_row_a_step():
    rows = {n: r.target for n, r in BACKENDS.items() if r.target.startswith("kernels.")}
    assert sorted(rows) == STEPS
    for name, target in rows.items():
        module = target.removeprefix("kernels.").split(":")[0]
        if "def attention(" in _text(name):
            assert module == name
        else:  # a backward alone: its row runs the module that joins it to a forward
            assert name in JOINED[module]


def test_every_step_has_a_line_in_the_ladder():
    text = (ROOT / "kernels" / "README.md").read_text()
    assert not [s for s in (*STEPS, *PARTS) if f"{s}.py" not in text]


@pytest.mark.parametrize(("module", "steps"), JOINED.items())
def test_records_of_joined_steps_are_of_all_their_sources(module, steps, tmp_path, monkeypatch):
    """A change in one of the joined files makes measurements new; in another file it does not."""
    from flashstudy.bench import common

    (name,) = (n for n, r in BACKENDS.items() if r.target == f"kernels.{module}:attention")
    for folder in ("kernels", "backends"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(common, "ROOT", tmp_path)

    def source():
        return common.source.__wrapped__(name, ())

    before = source()
    with open(tmp_path / "kernels" / "v3_tma.py", "a") as file:
        file.write("# changed\n")
    assert source() == before
    for step in (module, *steps):
        with open(tmp_path / "kernels" / f"{step}.py", "a") as file:
            file.write("# changed\n")
        assert source() != before
        before = source()


def _text(step):
    return (ROOT / "kernels" / f"{step}.py").read_text()


def test_the_table_stays_short():
    lines = (ROOT / "backends" / "__init__.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) - len(BACKENDS) < 70


# ---- why_not and load ----------------------------------------------------------------------------


@pytest.fixture
def row(monkeypatch):
    """Add a row of the table for one test."""

    def add(**fields):
        fields = {"label": "x", "family": "flash", "target": "backends.naive:attention"} | fields
        monkeypatch.setitem(BACKENDS, "x", backends.Backend(**fields))
        return "x"

    return add


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"expected one of naive, .*got 'flash3'"):
        why_not("flash3", "cpu")


def test_naive_runs_anywhere():
    for dtype in BACKENDS["naive"].dtypes:
        assert why_not("naive", "cpu", dtype, backward=True) is None


def test_a_row_for_gpus_says_so_on_a_cpu(row):
    assert why_not(row(cpu=None), "cpu") == "needs a CUDA GPU"


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not("naive", "cuda") == "torch sees no CUDA GPU"


def test_an_old_gpu_is_refused_with_both_numbers(row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert why_not(row(capability=(8, 0)), "cuda") is None
    assert why_not(row(capability=(8, 6)), "cuda") is None
    why = why_not(row(capability=(9, 0)), "cuda")
    assert "9.0" in why
    assert "8.6" in why


def test_a_dtype_outside_the_row_is_refused(row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    name = row(dtypes=(torch.float16,))
    assert why_not(name, "cuda", torch.float16) is None
    assert why_not(name, "cuda", torch.float32) == "does not take float32"


def test_backward_is_refused_where_the_row_has_none(row):
    name = row(backward=False, cpu="native")
    assert why_not(name, "cpu") is None
    assert why_not(name, "cpu", backward=True) == "has no backward"


def test_the_interpreter_is_asked_for_and_takes_no_bf16(row, monkeypatch):
    name = row(cpu="interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in why_not(name, "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(name, "cpu", torch.float16) is None
    assert "bfloat16" in why_not(name, "cpu", torch.bfloat16)


def test_a_missing_package_is_a_reason(row):
    why = why_not(row(package="no_such_package.sub", cpu="native"), "cpu")
    assert why.startswith("package no_such_package does not import:")


def test_a_package_that_breaks_on_import_is_a_reason(row, monkeypatch, tmp_path):
    (tmp_path / "built_for_another_torch.py").write_text("raise OSError('undefined symbol: _ZN')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "undefined symbol" in why_not(
        row(package="built_for_another_torch", cpu="native"), "cpu"
    )


def test_a_bug_in_a_package_is_not_a_reason(row, monkeypatch, tmp_path):
    (tmp_path / "package_with_a_bug.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        why_not(row(package="package_with_a_bug", cpu="native"), "cpu")


def test_an_import_error_in_our_own_code_is_raised(row, monkeypatch):
    name = row(target="backends.of_this_test:attention", cpu="native")
    with pytest.raises(ImportError):
        load(name)
    module = types.ModuleType("flashstudy.backends.of_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(AttributeError):
        load(name)
    module.attention = print
    assert load(name) is print


# ---- Who may import whom -------------------------------------------------------------------------


def _imports(path):
    """(absolute dotted names, relative names with their dots) imported anywhere in a file."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = {f"{base.rstrip('.') if not node.level else base}"}
            if not node.module or not node.level:  # `from . import x`, `from flashstudy import x`
                names = {f"{base}{'' if base.endswith('.') else '.'}{a.name}" for a in node.names}
            (relative if node.level else absolute).update(names)
    return absolute, relative


def _ours(names):
    """The parts of this project among absolute imports: kernels, backends, block, …"""
    parts = [n.split(".") for n in names]
    return {p[1] if len(p) > 1 else "" for p in parts if p[0] == "flashstudy"}


def _files(folder):
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", _files("kernels"), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_their_host_only(path):
    absolute, relative = _imports(path)
    roots = {n.split(".")[0] for n in absolute}
    assert roots <= {"torch", "triton"} | sys.stdlib_module_names
    steps = {n.lstrip(".").split(".")[0] for n in relative if not n.lstrip(".").startswith("_")}
    if path.stem in JOINED | PARTS:
        assert steps == (JOINED | PARTS)[path.stem]
    elif path.stem not in JOINING:  # a step never imports another step, nor do the shared parts
        assert not steps
    assert all(n.startswith(".") and not n.startswith("..") for n in relative)


def test_block_imports_torch_only():
    absolute, relative = _imports(ROOT / "block.py")
    assert {n.split(".")[0] for n in absolute} <= {"torch"} | sys.stdlib_module_names
    assert not relative


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("backends", {"backends"}),
        ("bench", {"bench", "backends", "block", "validate", "figures", ""}),
        ("validate", PACKAGES | {""}),
        ("figures", {"figures", "backends"}),
    ],
)
def test_folders_import_what_they_may(folder, allowed):
    for path in _files(folder):
        absolute, relative = _imports(path)
        assert _ours(absolute) <= allowed, path
        assert not any(n.startswith("..") for n in relative), path
        if folder == "backends":  # kernels are named by string and imported on first use
            assert "kernels" not in _ours(absolute)


@pytest.mark.parametrize("folder", ["backends", "kernels"])
def test_importing_queries_no_device(folder):
    """Importing must work, and mean the same, on a machine without a GPU."""
    for path in _files(folder):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            assert not [c for c in calls if "cuda" in c or "manual_seed" in c], path


def test_importing_the_table_imports_no_kernel_and_no_library():
    """Choosing a backend decides what is imported, and TRITON_INTERPRET may still be set."""
    code = (
        "import sys, flashstudy.backends\n"
        "bad = [m for m in sys.modules if m.startswith(('flashstudy.kernels', 'flash_attn'))]\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_folder_can_be_copied(tmp_path):
    """Alone, under another name, without this package: it imports and computes."""
    copy = tmp_path / "my_attention"
    copy.mkdir()
    for path in _files("kernels"):
        (copy / path.name).write_bytes(path.read_bytes())
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flashstudy":
            raise ImportError("the copy must not need " + name)
sys.meta_path.insert(0, Hide())
import torch
from my_attention.v1_flash import attention
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (5, 9, 9))
o = attention(q, k, v)
want = torch.softmax(q.double() @ k.double().mT / 4, -1) @ v.double()
error = (o - want).abs().max().item()
assert error < 1e-5, error
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_resolve():
    package = importlib.import_module("flashstudy")
    assert all(callable(getattr(package, n)) for n in package.__all__)


@pytest.mark.parametrize(
    "sizes", [(1, 1), (128, 128), (127, 512), (512, 127), (300, 300), (640, 200)]
)
def test_flex_gets_the_block_mask_that_torch_makes_of_the_whole_mask(sizes):
    from flashstudy.backends import flex
    from torch.nn.attention.flex_attention import create_block_mask

    offset = sizes[1] - sizes[0]
    theirs = create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, *sizes, device="cpu")
    ours = flex._causal(*sizes, torch.device("cpu"))
    assert ours.seq_lengths == theirs.seq_lengths == sizes
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("num_blocks", "indices"):
        for kind in ("kv", "full_kv", "q", "full_q"):
            a, b = (getattr(mask, f"{kind}_{name}") for mask in (ours, theirs))
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"{kind}_{name}"


def test_the_block_mask_of_flex_needs_no_memory_that_grows_with_the_square():
    from flashstudy.backends import flex
    from flashstudy.bench import common

    n = 8192
    made, _ = common.peak(
        lambda: flex._causal.__wrapped__(n, n, torch.device("cpu")), torch.device("cpu")
    )
    assert made < 64 * (n // flex.BLOCK) ** 2 + 2**16  # 10 n² = 671 MB by torch's create_block_mask
