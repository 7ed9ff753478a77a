"""The repository as a whole: who imports whom, what the built package holds, what configs and documents refer to."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import softvq_hf


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "training").rglob("*.yaml"))


@pytest.fixture(scope="module")
def built_package(tmp_path_factory):
    """The package as it is installed: `softvq_hf` with `pipelines/` in its place."""
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", folder]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return folder


def lint_imports(package, config):
    command = [Path(sys.executable).with_name("lint-imports"), "--config", config, "--no-cache", "--no-logo"]
    return subprocess.run(
        command, cwd=package, env={"PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=120
    )


def test_import_contracts(built_package):
    result = lint_imports(built_package, ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr
    kept, broken = re.search(r"Contracts: (\d+) kept, (\d+) broken", result.stdout).groups()
    assert int(kept) >= 4 and int(broken) == 0


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/autoencoder_softvq.py", "import softvq_hf.schedulers.scheduling_stochastic_interpolant"),
        ("models/autoencoder_softvq.py", "import softvq_hf.models.transformer_dit_1d"),
        ("models/autoencoder_softvq.py", "import numpy"),
        ("data/__init__.py", "import softvq_hf.losses.adversarial"),
        ("pipelines/pipeline_softvq.py", "import softvq_hf.training.checkpointing"),
        ("losses/adversarial.py", "import softvq_hf"),
    ],
)
def test_import_contracts_see_a_breach(built_package, file, line):
    path = built_package / "softvq_hf" / file
    source = path.read_text()
    path.write_text(f"{source}\n{line}\n")
    try:
        result = lint_imports(built_package, ROOT / "pyproject.toml")
    finally:
        path.write_text(source)
    assert result.returncode == 1 and "BROKEN" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("package", ["models", "schedulers"])
def test_models_and_schedulers_import_only_torch_diffusers_and_the_standard_library(package):
    files = sorted((ROOT / "src/softvq_hf" / package).glob("[a-z]*.py"))
    assert files
    for file in files:
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} uses relative imports"
                imported.add(node.module.partition(".")[0])
        assert imported <= {"torch", "diffusers"} | sys.stdlib_module_names, file


def test_built_package_is_complete(built_package):
    package = built_package / "softvq_hf"
    sources = {path.relative_to(ROOT / "src/softvq_hf"): path for path in (ROOT / "src/softvq_hf").rglob("*.*")}
    sources |= {Path("pipelines", path.name): path for path in (ROOT / "pipelines").glob("*.*")}
    sources = {name: path for name, path in sources.items() if path.suffix != ".pyc"}
    assert {Path("py.typed"), Path("training/templates/model_card.md"), Path("pipelines/pipeline_softvq.py")} <= set(
        sources
    )
    for name, path in sources.items():
        assert (package / name).read_bytes() == path.read_bytes()


def test_constraints_pin_every_dependency():
    required = {Requirement(line).name.lower() for line in requires("softvq-hf")}
    pinned = {
        Requirement(line).name.lower().replace("_", "-"): line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert {name.replace("_", "-") for name in required} <= set(pinned)
    # a pair from the package index that fits together; other torch files have no torchvision
    assert pinned["torch"] == "torch==2.15.0" and pinned["torchvision"] == "torchvision==0.29.2"
    # what torch brings itself, for the machine it is installed on
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]


def test_versions_agree():
    version = re.search(r'version="(.+)"', (ROOT / "setup.py").read_text()).group(1)
    assert softvq_hf.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text()), "metadata belongs to setup.py"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_are_mappings(config):
    assert isinstance(yaml.safe_load(config.read_text()), dict)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        assert linked.is_relative_to(ROOT)
        if document.is_relative_to(ROOT / "docs"):
            assert linked.is_relative_to(ROOT / "docs"), f"{target} leaves the site"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "Makefile"], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document):
    text = document.read_text().replace("$(QUICKSTART)", "training/configs/quickstart")
    named = re.findall(r"(?<![\w/.-])((?:training|pipelines|docs|tests|src)/[\w./-]+\.(?:py|yaml|md|png|svg))", text)
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{document.name} names {missing}"
