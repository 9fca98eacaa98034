"""Imports of a repository's modules, each as in a process of its own.

The process of a run imports the module of one flow. A check imports those of all flows in one process, one after the
other. What a module changes in it (`sys.path`, the current folder, environment variables) and what it can import only
because of that must not decide whether the next one can be imported.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidepool.settings import environment, replace_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Modules = dict[str, Any]
Stamp = dict[str, tuple[int, int] | None]
"""Time and size of files, by their paths; None for one that does not exist."""

# By a module that was imported: the modules that its process has and others have not, with the stamps of their files.
_OWN: dict[str, tuple[Modules, Stamp]] = {}


def importable(repository: Path) -> None:
    """Put the repository's folder on the path, as `prefect deploy` in it does."""
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))


@contextmanager
def as_in_its_own_process(repository: Path, module: str) -> Iterator[None]:
    """Import a module inside of the block as a process does that imports no other, in the repository's folder.

    Afterwards path, current folder and environment are as before. What the module prints goes to standard error.
    Installed packages are shared by all imports, because many cannot be imported twice. Modules of the repository
    are, too, unless their import changed the process: then another one executes them again, as its process would.
    They stay in `sys.modules` until the next import, so that the flow can be looked at.
    """
    importable(repository)
    here = f"{repository}:{module}"
    own, written = _OWN.pop(here, ({}, {}))
    for others, _ in _OWN.values():
        _take_away(others)
    if written != stamp(written):
        _take_away(own)
        own = {}
    sys.modules.update(own)
    shared, process = dict(sys.modules), _Process(repository)
    try:
        with stdout_to_stderr(), redirect_stdout(sys.stderr):
            yield
    finally:
        changed = process.restore()
        new = {name: each for name, each in sys.modules.items() if shared.get(name) is not each}
        own |= _not_shared(repository, new, changed=changed)
        _OWN[here] = own, stamp(filter(None, map(_file, own.values())))


def stamp(files: Iterable[str]) -> Stamp:
    """Return time and size of files, which change when a file is written again."""
    found: Stamp = {}
    for each in files:
        try:
            status = Path(each).stat()
        except OSError:
            found[each] = None
        else:
            found[each] = status.st_mtime_ns, status.st_size
    return found


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect standard output to standard error, below Python: prints of child processes and libraries too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class _Process:
    """The state of this process that a module's import may change."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._path, self._entries = sys.path, list(sys.path)
        self._environment = environment()
        self._folder = Path.cwd()
        os.chdir(repository)

    def restore(self) -> bool:
        """Undo what was changed, and return True if something was.

        What an installed package adds to the path is its own, and stays: it is imported once only.
        """
        entries = [each for each in sys.path if each in self._entries or not _is_installed(str(each))]
        packages = [each for each in sys.path if each not in entries]
        changed = (entries, environment()) != (self._entries, self._environment) or not self._is_here()
        sys.path = self._path
        sys.path[:] = [*self._entries, *packages]
        if environment() != self._environment:
            replace_environment(self._environment)
        os.chdir(self._folder)
        return changed

    def _is_here(self) -> bool:
        try:
            return Path.cwd() == self._repository.resolve()
        except FileNotFoundError:  # the module has removed it
            return False


def _not_shared(repository: Path, new: Modules, *, changed: bool) -> Modules:
    """Return those of newly imported modules that another import has to find by itself."""
    places = {entry for each in sys.path for entry in (str(each), os.path.realpath(each))}
    unknown = {name for name, module in new.items() if not _is_found(repository, name, module, places)}
    if not (changed or unknown):
        return {}
    return {name: each for name, each in new.items() if name in unknown or _is_of(repository, each)}


def _is_found(repository: Path, name: str, module: Any, places: set[str]) -> bool:
    """Return True if an import that does not change the path finds a module, too."""
    if not (file := _file(module)):
        return True
    folder = os.path.dirname(os.path.dirname(file) if Path(file).name.startswith("__init__.") else file)  # noqa: PTH120
    for _ in range(name.count(".")):
        folder = os.path.dirname(folder)  # noqa: PTH120 - of each module of each package, where pathlib takes long
    if folder in places:
        return True
    if _is_of(repository, module):
        return False
    top, dot, _ = name.partition(".")
    specs = (finder.find_spec(top, None) for finder in sys.meta_path)
    spec = next((each for each in specs if each is not None), None)
    return spec is not None and bool(dot or spec.origin == file)


def _is_of(repository: Path, module: Any) -> bool:
    """Return True if a module is one of the repository's own, or a folder of them."""
    inside = (f"{repository}{os.sep}", f"{repository.resolve()}{os.sep}")
    file = _file(module)
    folders = [file] if file else [str(each) for each in vars(module).get("__path__", ())] if _has_dict(module) else []
    return any(each.startswith(inside) and not _is_installed(each) for each in folders)


def _file(module: Any) -> str:
    """Return the file of a module, without the functions by which some modules import lazily; empty if it has none."""
    return str(vars(module).get("__file__") or "") if _has_dict(module) else ""


def _has_dict(module: Any) -> bool:
    return hasattr(type(module), "__dict__") and isinstance(getattr(module, "__dict__", None), dict)


def _is_installed(place: str) -> bool:
    return "site-packages" in Path(place).parts


def _take_away(modules: Mapping[str, Any]) -> None:
    for name, each in modules.items():
        if sys.modules.get(name) is each:
            del sys.modules[name]


# --- a module that is not found ------------------------------------------------------------------------------------

_FROM = re.compile(r"from\s+(?P<module>[\w.]+)\s+import\s+(?P<names>.+)")
_IMPORT = re.compile(r"import\s+(?P<module>[\w.]+)(?P<alias>\s+as\s+\w+)?")


def elsewhere(repository: Path, name: str, statement: str = "", file: str = "") -> str:
    """Return the advice about a module that is not found and lies in another folder of the repository; empty if not.

    Args:
        repository: The folder at which imports begin.
        name: The module as it is imported.
        statement: The line of the import.
        file: The file of this line. A script of this file finds the modules beside it.
    """
    folders = [each for each in Path(file).parents if repository in each.parents] if file else []
    with suppress(OSError):  # which this user may not read
        folders += sorted(each for each in repository.iterdir() if each.name.isidentifier() and each.is_dir())
    top = name.partition(".")[0]
    text = statement.partition("#")[0].strip()
    imported = _FROM.fullmatch(text) or _IMPORT.fullmatch(text)
    imported = imported if imported and imported["module"].split(".")[0] == top else None
    module = imported["module"] if imported else name
    for folder in folders:
        found = next((each for each in (folder / f"{top}.py", folder / top) if _is_module(each)), None)
        if found is not None:
            break
    else:
        return ""
    place, above = found.relative_to(repository), folder.relative_to(repository).parts
    lies = f"; it lies in {place}, and imports begin at the repository's folder"
    if above[0] == "src" and not (repository / "src" / "__init__.py").exists():
        return f"{lies}: install the project with `pip install -e .`, here and in the image, or name it src.{module}"
    if wrong := next((each for each in above if not each.isidentifier()), ""):
        return f"{lies}: rename {wrong}, because the name of a folder in an import has letters, digits and _ only"
    package = ".".join(above)
    if imported and "names" in imported.groupdict():
        names = imported["names"]
        names = "…" if names.startswith("(") or names.endswith("\\") else names
        return f"{lies}: write `from {package}.{module} import {names}`"
    if imported and module == top and not imported["alias"]:
        return f"{lies}: write `from {package} import {top}`"
    return f"{lies}: write `import {package}.{module}{(imported and imported['alias']) or ''}`"


def _is_module(path: Path) -> bool:
    return path.is_file() if path.suffix else any(path.glob("*.py"))
