"""Flows in one process: each is judged as in its own, is executed once, and prints nothing to standard output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.rule_files import FLOWS, PREFECT, problems, write
from tidepool import settings
from tidepool.deploy.config import flows

SELL, DELIVER = "rule_shop.sells.sell", "rule_shop.delivers.deliver"
LIBRARY = "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent / 'lib'))\n"
NOT_FOUND = "ModuleNotFoundError: No module named 'rule_helper' (rule_shop/delivers.py:1)"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules)
    for name in [each for each in sys.modules if each.startswith("rule_")]:
        monkeypatch.delitem(sys.modules, name)


def shop(folder: Path, sells: str, delivers: str, **more: str) -> Path:
    """Return a repository with two flows, the code above them, and more files of the package."""
    text = PREFECT.replace("rule_flows.sell", SELL).replace("rule_flows.deliver", DELIVER)
    write(folder, "prefect.yaml", "", text)
    files = {"sells": f"{sells}{FLOWS}", "delivers": f"{delivers}{FLOWS}", "__init__": "", **more}
    for name, code in files.items():
        path = folder / "rule_shop" / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return folder


def reversed_order(repository: Path) -> None:
    """Let the deployments change places."""
    file = repository / "prefect.yaml"
    head, first, second = file.read_text().split("  - name: ")[0:3]
    file.write_text(f"{head}  - name: {second}  - name: {first}")


@pytest.mark.parametrize(
    ("changing", "using", "message"),
    [
        (f"{LIBRARY}import rule_helper\n", "import rule_helper\n", NOT_FOUND),
        # The path as it was before: the module is known all the same.
        (f"{LIBRARY}import rule_helper\nsys.path.pop(0)\n", "import rule_helper\n", NOT_FOUND),
        (
            f"{LIBRARY}import rule_space.rule_helper\n",
            "import rule_space.rule_helper\n",
            "No module named 'rule_space'",
        ),
        ("import sys\nsys.path = [*sys.path, __file__[:-8] + 'lib']\n", "import rule_helper\n", NOT_FOUND),
        ("import os\nos.environ['RULE_SHOP'] = 'x'\n", "import os\nos.environ['RULE_SHOP']\n", "KeyError: 'RULE_SHOP'"),
        ("import os\nos.environ.pop('HOME')\n", "", ""),
        ("import os\nos.chdir('docs')\n", "open('runbooks/sell.md')\n", "FileNotFoundError"),
        ("import os\nos.chdir('docs')\n", "open('docs/runbooks/sell.md')\n", ""),
        (
            "from rule_shop import state\nstate.ready = True\nimport os\nos.environ['RULE_SHOP'] = 'x'\n",
            "from rule_shop import state\nstate.ready\n",
            "AttributeError",
        ),
    ],
)
def test_what_a_flow_changes_of_the_process_decides_about_no_other(
    tmp_path: Path, changing: str, using: str, message: str
) -> None:
    more = {"lib__in__rule_helper": "", "lib__in__rule_space__in__rule_helper": "", "state": ""}
    repository = shop(tmp_path, changing, using, **more)
    path, before = sys.path, (list(sys.path), settings.environment(), Path.cwd())
    found = problems(repository)
    reversed_order(repository)
    for name in [each for each in sys.modules if each.startswith("rule_")]:
        del sys.modules[name]
    assert [each.partition(": ")[2] for each in problems(repository)] == [each.partition(": ")[2] for each in found]
    assert [message in each for each in found] == ([True] if message else [])
    assert sys.path is path
    assert ([each for each in sys.path if each != str(repository)], settings.environment(), Path.cwd()) == before


def test_what_a_shared_module_changes_is_there_for_each_flow_that_imports_it(tmp_path: Path) -> None:
    using = "from rule_shop import common\nimport os, rule_helper\nos.environ['RULE_SHOP']\n"
    common = f"{LIBRARY}import os\nos.environ['RULE_SHOP'] = 'x'\n"
    assert problems(shop(tmp_path, using, using, common=common, lib__in__rule_helper="")) == []


def test_a_helper_of_one_name_is_that_of_each_flow(tmp_path: Path) -> None:
    using = "import sys\nsys.path.insert(0, __file__.rpartition('/')[0] + '/{}')\nfrom rule_helper import {}\n"
    repository = shop(
        tmp_path, using.format("a", "x"), using.format("b", "y"), a__in__rule_helper="x = 1", b__in__rule_helper="y = 1"
    )
    assert problems(repository) == []
    assert flows.load(repository, SELL).fn.__globals__["x"] == 1
    assert Path(sys.modules["rule_helper"].__file__ or "").parent.name == "a"  # where its types are looked up
    assert flows.load(repository, DELIVER).fn.__globals__["y"] == 1
    assert Path(sys.modules["rule_helper"].__file__ or "").parent.name == "b"


COUNT = "from pathlib import Path\nwith Path(__file__ + '.count').open('a') as file:\n    file.write('x')\n"


@pytest.mark.parametrize("end", ["", "1 / 0\n", "import no_such_module\n", "raise SystemExit\n"])
@pytest.mark.parametrize("change", ["", "import os\nos.environ['RULE_SHOP'] = 'x'\n"])
def test_a_module_is_executed_once_and_its_error_is_one_problem(tmp_path: Path, end: str, change: str) -> None:
    sells = f"{COUNT}{change}{end}"
    repository = shop(tmp_path, sells, "")
    file = repository / "prefect.yaml"
    file.write_text(file.read_text().replace(DELIVER, "rule_shop.sells.deliver"))
    found = [*problems(repository), *problems(repository, "staging")]
    assert (repository / "rule_shop" / "sells.py.count").read_text() == "x"
    assert len(found) == (2 if end else 0)  # one for each environment
    for each in found:
        assert each.startswith("prefect.yaml:20: deployments[sell].entrypoint: its module cannot be imported: ")
        assert each.endswith(" (also in deployments[deliver] at line 34)")
    (repository / "rule_shop" / "sells.py").write_text(f"MENDED = True\n{FLOWS}")
    sys.modules.pop("rule_shop.sells", None)
    assert problems(repository) == []
    assert "MENDED" in flows.load(repository, SELL).fn.__globals__


def test_an_error_of_a_module_that_two_flows_import_is_one_problem(tmp_path: Path) -> None:
    using = "from rule_shop import common\n"
    assert problems(shop(tmp_path, using, using, common="import no_such_module\n")) == [
        (
            "prefect.yaml:20: deployments[sell].entrypoint: its module cannot be imported: ModuleNotFoundError: "
            "No module named 'no_such_module' (rule_shop/common.py:1) (also in deployments[deliver] at line 34)"
        )
    ]


def test_what_a_module_prints_goes_to_standard_error(tmp_path: Path) -> None:
    printing = "import os\nprint('by print')\nos.system('echo by a process')\n"
    repository = shop(tmp_path, printing, "")
    (repository / "rule_steps.py").write_text(f"print('by a step')\n{(repository / 'rule_steps.py').read_text()}")
    command = [sys.executable, "-m", "tidepool.cli", "validate", "-e", "production"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.stdout == "no problems: production\n", done.stderr
    for each in ("by print", "by a process", "by a step"):
        assert each in done.stderr


def test_a_flow_that_is_run_here_keeps_what_its_module_changes(tmp_path: Path) -> None:
    path = f"{LIBRARY}\nimport rule_helper\n"
    repository = shop(tmp_path, path, "", lib__in__rule_helper="", lib__in__rule_later="")
    assert flows.flow_of(repository, SELL).name == "sell"
    assert sys.path[0].endswith("lib")


BEGIN = "and imports begin at the repository's folder"
INSTALL = "install the project with `pip install -e .`, here and in the image, or name it"


@pytest.mark.parametrize(
    ("statement", "place", "advice"),
    [
        ("import rule_helper", "rule_shop/rule_helper", "write `from rule_shop import rule_helper`"),
        ("import rule_helper as r  # ours", "rule_shop/rule_helper", "write `import rule_shop.rule_helper as r`"),
        ("from rule_helper import a, b", "rule_shop/rule_helper", "write `from rule_shop.rule_helper import a, b`"),
        ("from rule_helper import (a,\n  b)", "rule_shop/rule_helper", "write `from rule_shop.rule_helper import …`"),
        ("import rule_helper.x", "rule_shop/rule_helper/x", "write `import rule_shop.rule_helper.x`"),
        ("from rule_helper.x import a", "rule_lib/rule_helper/x", "write `from rule_lib.rule_helper.x import a`"),
        ("import json, rule_helper", "rule_lib/rule_helper", "write `import rule_lib.rule_helper`"),
        ("import rule_helper", "src/rule_helper/x", f"{INSTALL} src.rule_helper"),
        ("import rule_helper.x", "src/rule_helper/x", f"{INSTALL} src.rule_helper.x"),
    ],
)
def test_the_advice_about_a_module_in_another_folder_is_what_to_write(
    tmp_path: Path, statement: str, place: str, advice: str
) -> None:
    repository = shop(tmp_path, f"{statement}\n", "")
    file = repository / f"{place}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    lies = file if file.stem == "rule_helper" else file.parent
    [found] = problems(repository)
    assert found.endswith(f"(rule_shop/sells.py:1); it lies in {lies.relative_to(repository)}, {BEGIN}: {advice}")


def test_the_advice_about_a_folder_that_an_import_cannot_name_and_about_none(tmp_path: Path) -> None:
    repository = shop(tmp_path, "", "import rule_helper\n")
    [found] = problems(repository)
    assert found.endswith("No module named 'rule_helper' (rule_shop/delivers.py:1)")
    repository = write(tmp_path / "other", "prefect.yaml", "rule_flows.sell", "rule_shop.flow.sell")
    folder = repository / "src" / "rule_shop"
    folder.mkdir(parents=True)
    (folder / "flow.py").write_text(FLOWS)
    [found] = problems(repository)
    assert found.endswith(f"it lies in src/rule_shop, {BEGIN}: {INSTALL} src.rule_shop.flow")
