"""The lower bounds of setup.py are versions that tests are run with."""

import ast
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def required(*extras: str) -> list[Requirement]:
    """What setup.py requires, and these extras of it do."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func.id == "setup")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    lines = ast.literal_eval(keywords["install_requires"])
    of_extras = ast.literal_eval(keywords["extras_require"])
    return [Requirement(line) for line in sum((of_extras[extra] for extra in extras), lines)]


def pinned(file: str) -> dict[str, list[Version]]:
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(Version(next(iter(pin.specifier)).version))
    return pins


def test_lower_bounds_are_tested():
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for requirement in required("gcs", "gguf", "tfds", "video"):
        name = canonicalize_name(requirement.name)
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        assert oldest[name] == bounds, requirement
        assert all(requirement.specifier.contains(version) for version in newest[name]), requirement


def test_everything_that_tests_install_is_pinned():
    newest = pinned("constraints.txt")
    for requirement in required("serve", "test", "test-all", "test-page", "ui"):
        name = canonicalize_name(requirement.name)
        assert all(requirement.specifier.contains(version) for version in newest[name]), requirement
