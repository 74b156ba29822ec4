"""The project's own files agree with each other."""

from __future__ import annotations

import re
import runpy
import subprocess
from importlib import import_module
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import peft_input_tuning
from dependency_groups import GROUPS, group
from peft_input_tuning import engines, training
from peft_input_tuning.tested_versions import NEWEST_TESTED

ROOT = Path(__file__).parent.parent
NAME = "peft-input-tuning"
EXTRAS = {"inspect", "metrics", "gguf", "embeddings"}


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(path: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text(path).splitlines())
    return [Requirement(line) for line in lines if line]


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is not a pin"
    return specifier.version


def declared(extra: str = "") -> list[Requirement]:
    """What the metadata asks for: of the package itself, or of one extra."""
    all_of_them = [Requirement(line) for line in requires(NAME) or []]
    if not extra:
        return [r for r in all_of_them if r.marker is None]
    return [r for r in all_of_them if r.marker is not None and r.marker.evaluate({"extra": extra})]


def pinned_here(path: str) -> dict[str, str]:
    """The versions that a file of constraints has for this Python."""
    here = [pin for pin in pins(path) if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): version_of(pin) for pin in here}


def newest_pin(package: str) -> Version:
    """The newest version of a package in constraints.txt, on whatever Python."""
    return max(Version(version_of(pin)) for pin in pins("constraints.txt") if canonicalize_name(pin.name) == package)


def repository_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone of the repository")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


# ---- metadata -------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    assert peft_input_tuning.__version__ == version(NAME)
    (latest, *_) = re.findall(r"^## \[(\d[^]]*)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert latest == peft_input_tuning.__version__


def test_the_extras():
    said = metadata(NAME)
    assert set(said.get_all("Provides-Extra")) == EXTRAS
    assert said["Requires-Python"] == ">=3.10"
    assert {r.name for r in declared()} == {"torch", "transformers", "peft", "accelerate", "jinja2"}


def test_the_licence():
    assert metadata(NAME)["License-Expression"] == "Apache-2.0"
    licence = text("LICENSE")
    assert "Apache License" in licence
    assert "The peft_input_tuning authors" in licence


@pytest.mark.parametrize("wanted", ["", *sorted(EXTRAS), *(f"group {name}" for name in GROUPS if name != "publish")])
def test_each_dependency_is_pinned_within_its_bounds(wanted):
    """What a release is built with is the newest there is: its environment has nothing else."""
    pinned: dict[str, list[str]] = {}
    for pin in pins("constraints.txt"):
        pinned.setdefault(canonicalize_name(pin.name), []).append(version_of(pin))
    needed = group(wanted.removeprefix("group ")) if wanted.startswith("group ") else declared(wanted)
    assert needed
    for requirement in needed:
        assert canonicalize_name(requirement.name) in pinned, f"{requirement.name} is not in constraints.txt"
        for pin in pinned[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(pin), f"{requirement} and {requirement.name}=={pin}"


def test_the_lowest_pins_are_the_lower_bounds_of_the_metadata():
    needed = declared() + group("test")
    bounds = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in needed}
    bounds.pop("torch")  # constraints-lowest.txt says why
    lowest = pinned_here("constraints-lowest.txt")
    assert set(lowest) == set(bounds)
    for name, bound in bounds.items():
        assert Requirement(f"{name}=={bound}").specifier.contains(lowest[name]), name


def test_the_newest_tested_versions_are_those_of_the_constraints():
    assert set(NEWEST_TESTED) == {"transformers", "peft"}
    for name, minor in NEWEST_TESTED.items():
        assert newest_pin(name).release[:2] == Version(minor).release, name


def test_the_environments_without_constraints_have_the_torch_of_the_constraints():
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", text("Makefile"), re.MULTILINE)
    assert Version(torch) == newest_pin("torch")


def test_the_readme_names_the_versions_that_were_run():
    said = " ".join(text("README.md").split())
    lowest = {pin.name: version_of(pin) for pin in pins("constraints-lowest.txt")}
    for name, title in {"transformers": "transformers", "peft": "PEFT", "accelerate": "accelerate"}.items():
        low, high = lowest[name], str(newest_pin(name))
        versions = f"{title} {low}" if low == high else f"{title} {low} to {high}"
        assert re.search(rf"ran with .*{re.escape(versions)}(?: and|,) ", said), versions
    assert f" torch {newest_pin('torch')} " in said


@pytest.mark.parametrize("text_of_it", ["built", "now"])
def test_the_links_of_the_packages_page_lead_to_files_of_its_release(text_of_it):
    """A package index has no `docs/` beside the README."""
    page = (
        str(metadata(NAME).get_payload())
        if text_of_it == "built"
        else runpy.run_path(str(ROOT / "setup.py"))["page"]()
    )
    urls = dict(line.split(", ") for line in metadata(NAME).get_all("Project-URL"))
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) > 10
    ours = re.compile(rf"{re.escape(urls['Repository'])}/(blob|raw)/v{re.escape(version(NAME))}/([^#]+)")
    paths = {match[2]: match[1] for link in links if (match := ours.match(link))}
    assert {link for link in links if not re.match(r"https?://|#", link)} == set()
    assert {"LICENSE", "CONTRIBUTING.md"} <= set(paths)
    for path, kind in paths.items():
        assert kind == ("raw" if path.endswith(".svg") else "blob"), path
        if text_of_it == "now":
            assert (ROOT / path).exists(), path


def test_the_address_of_the_project_stands_in_one_file():
    """So that it is set once, before the first release."""
    address = dict(line.split(", ") for line in metadata(NAME).get_all("Project-URL"))["Repository"]
    written = [path for path in repository_files() if path.suffix in {".md", ".toml", ".py", ".cfg", ".cff", ".yml"}]
    assert [path.name for path in written if address in path.read_text(encoding="utf-8")] == ["pyproject.toml"]


def test_the_classifiers_name_the_pythons_that_tests_ran_on():
    (said,) = re.findall(r"^(Classifiers name .*?)Before others", text("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    named = re.findall(r"Python :: (3\.\d+)", " ".join(metadata(NAME).get_all("Classifier")))
    assert named
    assert set(named) == set(re.findall(r"\b3\.\d+", said))


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load(text("CITATION.cff"))
    assert (said["cff-version"], said["type"], said["version"]) == ("1.2.0", "software", version(NAME))
    assert said["license"] == metadata(NAME)["License-Expression"]
    assert said["message"]
    assert said["authors"] == [{"name": metadata(NAME)["Author"]}]
    assert said["preferred-citation"]["title"] in text("README.md")
    assert [author["family-names"] for author in said["preferred-citation"]["authors"]][:2] == ["An", "Li"]


def test_type_checkers_read_a_users_code_of_all_that_is_public():
    imported = set(re.findall(r"\b\w+\b", text("tests/consumer.py").split("def ")[0]))
    for public in (peft_input_tuning, training, engines):
        assert set(public.__all__) <= imported
    (check,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    assert re.search(r"/mypy .*--strict .*tests/consumer\.py", check)
    assert "/basedpyright " in check
    assert 'include = ["tests/consumer.py"]' in text("pyproject.toml")


def test_the_types_are_shipped_and_the_tests_are_not():
    assert (Path(peft_input_tuning.__file__).parent / "py.typed").exists()
    assert 'include = ["peft_input_tuning*"]' in text("pyproject.toml")


# ---- commands -------------------------------------------------------------------------------------------------------

TARGETS = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.cfg", ".ci/run"])
def test_the_targets_that_a_text_names_exist(path):
    named = set(re.findall(r"^make ([a-z-]+)|`(?:\w+=\S+ )?make ([a-z-]+)[ `]", text(path), re.MULTILINE))
    named = {target for pair in named for target in pair if target}
    assert named
    assert named <= TARGETS


def test_make_help_lists_every_target():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert listed == TARGETS


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "Makefile", ".ci/run"])
def test_the_files_that_a_text_names_exist(path):
    named = re.findall(r"(?<![\w/.])((?:examples|tests|docs|peft_input_tuning)/[\w./-]+\w|[A-Z]+\.md)", text(path))
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: str) -> set[str]:
    """What links to a page's headings are called."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES)
def test_no_link_is_broken(path):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", text(path)):
        if "://" in target:
            continue
        page = (ROOT / path).parent / target if target else ROOT / path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_page_of_the_api_has_every_public_name():
    said = re.findall(r"^::: peft_input_tuning\.([\w.]+)$", text("docs/api.md"), re.MULTILINE)
    assert {name for name in said if "." not in name} == set(peft_input_tuning.__all__) - {"__version__"}
    for room in ("training", "engines", "familiarity"):
        names = import_module(f"peft_input_tuning.{room}").__all__
        assert {name for name in said if name.startswith(f"{room}.")} == {f"{room}.{name}" for name in names}


def test_continuous_integration_runs_the_commands_of_the_readme():
    lines = text(".ci/run").replace("\\\n", "").splitlines()
    commands = [line.split()[1] for line in lines if line.startswith("make ")]
    assert commands == ["check", "docs", "test", "test-newest", "test-slow"]


def test_runs_on_other_versions_keep_their_outcomes_apart():
    """`make compatibility` reads pytest's cache: what it says must come from the environment that it names."""
    recipes = [line for line in text("Makefile").splitlines() if line.startswith("\t") and "$(PYTEST)" in line]
    assert {"-o cache_dir=" in line for line in recipes if not line.startswith("\t$(VENV)/bin/")} == {True}


# ---- files ----------------------------------------------------------------------------------------------------------


def test_no_file_holds_a_path_of_one_machine():
    homes = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp|opt|mnt)/\w")
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if homes.search(line)]
    assert not found, "\n".join(found)


def test_the_top_level_is_what_it_should_be():
    wanted = {"peft_input_tuning", "examples", "tests", "setup.cfg", "pyproject.toml", "LICENSE", "README.md"}
    wanted |= {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "Makefile", ".ci"}
    assert wanted <= {path.relative_to(ROOT).parts[0] for path in repository_files()}
