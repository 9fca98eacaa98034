"""Promises of the repository about itself: maps, version, names, runbooks, decisions, locked requirements."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tidepool import settings
from tidepool.deploy.config.house_rules import HouseRules
from tidepool.local import server

TOP = Path(__file__).parents[2]


def tracked() -> list[Path]:
    """Tracked and new files of the repository: those of a fresh clone."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    )
    return [TOP / name for name in listed.stdout.splitlines() if (TOP / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        try:
            found.append((path.relative_to(TOP), path.read_text()))
        except UnicodeDecodeError:
            continue
    return found


def test_the_readme_maps_every_top_level_entry() -> None:
    readme = (TOP / "README.md").read_text()
    entries = {path.relative_to(TOP).parts[0] for path in tracked()}
    missing = sorted(entry for entry in entries if not re.search(rf"`{re.escape(entry)}/?`", readme))
    assert missing == [], "top-level entries missing in the README's map"


def test_the_architecture_page_maps_every_package() -> None:
    page = (TOP / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\| `(tidepool[a-z._]*)` \|", page, re.MULTILINE)
    packages = {
        str(path.parent.relative_to(TOP)).replace("/", ".")
        for path in tracked()
        if path.name == "__init__.py" and path.is_relative_to(TOP / "tidepool")
    }
    assert sorted(rooms) == sorted(packages), "docs/architecture.md, The rooms: one line for each package of tidepool/"


def test_the_paths_in_the_guides_exist() -> None:
    """Files and folders of this repository, such as `tidepool/settings.py` in "Where do I change …"."""
    top_level = "|".join(sorted({re.escape(path.relative_to(TOP).parts[0]) for path in tracked()}))
    path_of_ours = re.compile(rf"`((?:{top_level})(?:/[\w./-]*)?)`")
    for guide in (
        "docs/architecture.md",
        "CONTRIBUTING.md",
        "docs/glossary.md",
        "docs/deploying.md",
        "docs/validate.md",
        "docs/security.md",
    ):
        named = path_of_ours.findall((TOP / guide).read_text())
        missing = sorted({name for name in named if not (TOP / name).exists()})
        assert missing == [], f"{guide} names files that do not exist"
    changes = (TOP / "docs" / "architecture.md").read_text().split("## Where do I change", 1)[1]
    rows = [row for row in re.findall(r"^\| .+ \|$", changes, re.MULTILINE) if not row.startswith("| change |")]
    assert len(rows) >= 20
    assert [row for row in rows if not path_of_ours.search(row)] == [], "rows that name no file"


def test_the_make_commands_of_the_pages_exist() -> None:
    makefiles = [TOP / "Makefile", *(TOP / "make").glob("*.mk")]
    own = "docs/own-repository.md"  # of the repository that `tidepool init` writes
    targets = make_targets(*makefiles)
    theirs = make_targets(TOP / "tidepool" / "author" / "repository" / "Makefile.jinja")
    command = re.compile(r"(?:^|`)make ([a-z][a-z -]+)", re.MULTILINE)
    found = [
        (path, name)
        for path, text in texts()
        if path.suffix == ".md"
        for names in command.findall(text)
        for name in (names.split() if str(path) == own else names.split()[:1])
    ]
    assert len(found) > 50
    wrong = [each for each in found if each[1] not in (theirs if str(each[0]) == own else targets)]
    assert sorted(f"{path}: make {name}" for path, name in wrong) == []


def make_targets(*makefiles: Path) -> set[str]:
    """Names of the commands of Makefiles."""
    found = (re.findall(r"^([a-z][a-z-]*):", path.read_text(), re.MULTILINE) for path in makefiles)
    return {name for names in found for name in names}


@pytest.mark.parametrize("page", sorted((TOP / "docs" / "decisions").glob("*.md")), ids=lambda page: page.stem[:4])
def test_every_decision_has_the_same_headings(page: Path) -> None:
    text = page.read_text()
    assert re.match(rf"# {page.stem[:4]} \S", text), f"{page.name}: the title is '# {page.stem[:4]} Title'"
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Options", "Decision", "Consequences"]
    parts = re.split(r"^## .+$", text, flags=re.MULTILINE)
    assert all(part.strip() for part in parts), f"{page.name}: an empty part"


def test_the_version_is_the_changelogs_newest() -> None:
    version = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[([^\]]+)\]", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


def test_every_named_variable_is_a_setting() -> None:
    """A misspelt TIDEPOOL_* name in a manifest or a page would otherwise only be refused at run time."""
    known = set(settings.variables())
    places = (
        "helm/",
        "k8s/",
        "environments/",
        "docs/",
        "prefect.yaml",
        "Dockerfile",
        "README.md",
        "Makefile",
        "make/",
        ".github/",
    )
    wrong = {
        f"{path}: {name}"
        for path, text in texts()
        if str(path).startswith(places)
        for name in re.findall(r"\bTIDEPOOL_[A-Z0-9_]*[A-Z0-9]\b", text)
        if name not in known and not any(variable.startswith(f"{name}_") for variable in known)
    }
    assert wrong == set()


def test_the_page_of_the_checks_lists_every_house_rule() -> None:
    page = (TOP / "docs" / "validate.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, re.MULTILINE)
    rules = {name: field.default for name, field in HouseRules.model_fields.items()}
    assert {name: yaml.safe_load(default) for name, default in rows} == rules


def test_the_tests_of_prefect_dask_are_those_of_the_locked_release() -> None:
    locked = re.search(r"^prefect-dask==\S+", (TOP / "requirements" / "runtime.txt").read_text(), re.MULTILINE)
    assert locked
    assert f"{locked[0]} --hash=sha256:" in (TOP / "tests" / "prefect_dask" / "source.txt").read_text()


def test_requirements_are_hashed_and_name_no_host() -> None:
    for path in sorted((TOP / "requirements").glob("*.txt")):
        text = path.read_text()
        assert "://" not in text, f"{path.name} names a download address"
        pinned = re.findall(r"^[a-z0-9].*==.*$", text, re.MULTILINE)
        assert pinned, path.name
        assert all(line.endswith("\\") for line in pinned), f"{path.name} has a requirement without a hash"


def test_the_charts_server_records_in_batches_as_the_local_one_does() -> None:
    """The chart cannot import the local server's settings; decision 0013 applies to both."""
    values = yaml.safe_load((TOP / "helm/tidepool/values.yaml").read_text())
    assert values["server"]["env"] == server.RECORD_IN_BATCHES
