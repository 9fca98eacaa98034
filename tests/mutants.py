"""Mutation testing (`make mutants`): how many small faults in important modules do the tests notice?

A *mutant* is the code with one fault: a comparison reversed, a number off by one, a condition negated, a statement
removed. It is *killed* when a test fails, and *survives* otherwise. Of all mutants a random sample (`--seed`,
`--number`) is tried, in a random order. The results file is written as it goes, and continued when it exists; the
reason why a survivor may live is written there by hand.

The operators are cosmic-ray's, and three of ours. Not mutated, because no behaviour depends on it: annotations,
`if TYPE_CHECKING`, decorators, what is logged, type variables, the `*` before keyword-only parameters. cosmic-ray
replaces `+` by each of eleven other operators; most end in a TypeError, which any test notices. Here there is one
replacement for each operator, and for `<` the other bound, so that the figure is not flattered.

Each mutant is written into a copy of the tree, never into the checkout. Its tests run in a fork of a process that has
imported the heavy packages once: first those that need no Prefect server, then, if it survives them, those that do.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import parso
import pytest
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.provider import OperatorProvider

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[1]
# Folder or module; its fast tests, which need no Prefect server; its slower ones. The first entry that fits counts.
TESTS = [
    ("storage.py", "integration/storage", "integration/results"),
    ("compute/batches.py", "unit/batches unit/runner", "integration/batches"),
    ("compute/runner/recorder.py", "unit/tracker", "integration/task_runs"),
    ("compute/runner/", "unit/tracker unit/runner", "integration/batches integration/runner_truth"),
    ("compute/clusters/kubernetes/api.py", "unit/kubernetes_api", "integration/kubernetes_cluster"),
    ("compute/clusters/kubernetes/usage.py", "unit/cluster_usage", "integration/kubernetes_cluster"),
    ("compute/clusters/kubernetes/pod_status.py", "unit/pod_status", "integration/kubernetes_cluster"),
    ("compute/clusters/kubernetes/cluster.py", "", "integration/kubernetes_cluster"),
    ("compute/clusters/kubernetes/", "unit/cluster_manifest", "integration/kubernetes_cluster"),
    ("compute/clusters/preload/", "unit/preload", "integration/dask_scheduler integration/compute"),
    ("compute/clusters/", "unit/local_cluster", "unit/runner integration/compute"),
    ("deploy/reconcile/work_pool.py", "unit/work_pool", "integration/deploy_apply"),
    ("deploy/reconcile/plan.py", "unit/plan", "integration/deploy_apply"),
    ("deploy/reconcile/apply.py", "unit/apply", "integration/deploy_apply"),
    ("deploy/reconcile/", "unit/comparison", "integration/deploy_apply integration/deploy_command"),
    ("deploy/config/yaml_source.py", "unit/yaml_source", "unit/validate_rules unit/config_checks"),
    ("deploy/config/fixes.py", "unit/validate_fix", "unit/config_checks"),
    ("deploy/config/environments.py", "unit/environments", "unit/validate_rules unit/config_checks"),
    ("deploy/config/schedules.py", "unit/plan unit/validate_rules", "integration/deploy_apply"),
    ("deploy/config/automations.py", "unit/automations unit/validate_rules", "unit/config_checks"),
    ("deploy/config/", "unit/validate_rules", "unit/config_checks integration/deploy_validate"),
]  # fmt: skip
# Imported once, before the forks. None of them starts a thread or reads the settings of a test.
HEAVY = [
    "pandas", "prefect.flows", "prefect.events.schemas.automations", "prefect.client.orchestration",
    "prefect.deployments.steps.core", "hypothesis", "sqlalchemy.ext.asyncio", "prefect.cli.deploy", "prefect_dask",
    "distributed", "kr8s.asyncio", "s3fs", "moto.server", "cryptography.x509", "httpx", "typer", "jsonschema",
]  # fmt: skip


class RemoveStatement:
    """Replaces a call, an `await`, a `raise` or the setting of an attribute or item by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt":
            statement = node.children[0]
            target = statement.children[0] if statement.type == "expr_stmt" else None
            if statement.type in ("atom_expr", "raise_stmt") or (target is not None and target.type == "atom_expr"):
                yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:  # noqa: ARG002 - the base class's interface
        statement = node.children[0]
        node.children[0] = parso.parse(statement.get_first_leaf().prefix + "pass")
        return node


class NegateCondition:
    """Negates the conditions that cosmic-ray's AddNot leaves: of `elif` and of a comprehension."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for condition in self._conditions(node):
            yield condition.start_pos, condition.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        condition = self._conditions(node)[index]
        at = node.children.index(condition)
        node.children[at] = parso.parse(f" (not ({condition.get_code().strip()}))")
        return node

    @staticmethod
    def _conditions(node: Any) -> list[Any]:
        if node.type in ("comp_if", "old_comp_if"):
            return [node.children[1]]
        if node.type == "if_stmt":
            return [node.children[at + 1] for at, child in enumerate(node.children) if child == "elif"]
        return []


class SwapMembership:
    """Replaces `in` by `not in`, and the reverse."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "comparison":
            for each in node.children[1::2]:
                if each.get_code().split() in (["in"], ["not", "in"]):
                    yield each.start_pos, each.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        each = [one for one in node.children[1::2] if one.get_code().split() in (["in"], ["not", "in"])][index]
        other = " not in" if each.get_code().split() == ["in"] else " in"
        node.children[node.children.index(each)] = parso.parse(other)
        return node


PROVIDED = [
    "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitOr_BitAnd", "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq", "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    "ExceptionReplacer", "NumberReplacer", "ZeroIterationForLoop",
]  # fmt: skip
OPERATORS: dict[str, Any] = {
    **{name: OperatorProvider()[name]() for name in PROVIDED},
    **{each.__name__: each() for each in (RemoveStatement, NegateCondition, SwapMembership)},
}


def without_behaviour(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the ranges of code whose faults change nothing that a user could notice."""
    found: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            found += node.decorator_list
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.append(node)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("cast", "TypeVar") or re.fullmatch(
                r"(.*\blog|run_log\(\))\.(debug|info|warning|error|exception)", called
            ):
                found += [node] if called != "cast" else node.args[:1]
    nodes: list[Any] = [node for node in found if node is not None]
    return [((each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)) for each in nodes]


def mutants(files: list[Path]) -> list[dict[str, Any]]:
    """List all mutants: file, operator, and which occurrence of what it replaces."""
    found = []
    for path in files:
        source = path.read_text()
        excluded, counts = without_behaviour(source), dict.fromkeys(OPERATORS, 0)
        stack: list[Any] = [parso.parse(source)]
        while stack:  # in the order in which cosmic-ray visits them
            node = stack.pop()
            stack += reversed(getattr(node, "children", []))
            for name, operator in OPERATORS.items():
                for start, end in operator.mutation_positions(node):
                    if not any(first <= start and end <= last for first, last in excluded):
                        file = str(path.relative_to(TOP))
                        found.append({"file": file, "operator": name, "occurrence": counts[name], "line": start[0]})
                    counts[name] += 1
    return found


def mutate(mutant: dict[str, Any]) -> str | None:
    """Return the file's text with the fault, and note both lines; None if it is the same program, or not one."""
    source = (TOP / mutant["file"]).read_text()
    try:
        code = MutationVisitor.mutate_code(source, OPERATORS[mutant["operator"]], mutant["occurrence"])
        same = code is None or ast.dump(ast.parse(code)) == ast.dump(ast.parse(source))
    except (SyntaxError, AttributeError):  # the latter: cosmic-ray replaces no `except module.Error`
        return None
    if same or code is None:
        return None
    pairs = enumerate(zip(source.splitlines(), code.splitlines(), strict=False), 1)
    number, before, after = next((at, *pair) for at, pair in pairs if pair[0] != pair[1])
    if before.strip() == "*,":
        return None
    mutant |= {"line": number, "before": before.strip(), "after": after.strip()}
    return code


class Tree:
    """A copy of the repository, in which mutants are tried; the checkout stays as it is."""

    kept: Tree | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "mutant-output.txt"
        ignored = (".git", ".venv", ".*_cache", "__pycache__", ".hypothesis", "build")
        shutil.copytree(TOP, folder, ignore=shutil.ignore_patterns(*ignored))
        self._time = int(time.time())
        os.environ["PYTHONPATH"] = str(folder)  # of the processes that tests start
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def write(self, file: str, text: str) -> None:
        """Replace a file; bytecode of its former text is never taken for it."""
        (self.folder / file).write_text(text)
        self._time += 2
        os.utime(self.folder / file, (self._time, self._time))

    def run(self, tests: str, server: str, seconds: float) -> tuple[str, float]:
        """Run tests in a fork; return the test that failed, `time limit` or nothing, and the seconds it took."""
        begun = time.monotonic()
        self.output.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setsid()
            self._child(tests.split(), server)
        ended, status = 0, 0
        while not ended and time.monotonic() - begun < seconds:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what the tests have started
        took = time.monotonic() - begun
        if not ended:
            os.waitpid(child, 0)
            return "time limit", took
        printed = self.output.read_text(errors="replace")
        if status == 0:
            return "", took
        if "+ Timeout +" in printed:  # pytest-timeout has ended the process
            return "time limit of a test", took
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
        return failed[1] if failed else f"exit status {status}: {printed[-300:]}", took

    def _child(self, tests: list[str], server: str) -> None:
        code = 1
        try:
            with self.output.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder))
            if server:
                importlib.import_module("tidepool.local.server").running_server = lambda home: contextlib.nullcontext(
                    SimpleNamespace(home=home, api=server)
                )
            code = pytest.main(
                [
                    "-x",
                    "-q",
                    "-m",
                    "not stock",
                    "-p",
                    "no:cacheprovider",
                    "-W",
                    "ignore::pytest.PytestAssertRewriteWarning",
                    "--tb=line",
                    *tests,
                ]
            )
        except BaseException:  # noqa: BLE001 - the fork must not go on in the parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(int(code))


def tests_of(file: str, stage: str) -> str:
    """Return the tests of a file in a stage."""
    fast, slow = next(tests for part, *tests in TESTS if file.startswith(f"tidepool/{part}"))
    return re.sub(r"(\w+)/(\w+)", r"tests/\1/test_\2.py", fast if stage == "fast" else slow)


@contextlib.contextmanager
def prefect_server() -> Iterator[str]:
    """Start the Prefect server that the tests of all mutants share."""
    from tidepool.local.server import Home, running_server

    with tempfile.TemporaryDirectory() as folder, running_server(Home(Path(folder))) as server:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tidepool"]:
            del sys.modules[name]  # each fork imports the mutant's
        yield server.api


def attempt(job: tuple[int, dict[str, Any], str, str, Path]) -> tuple[int, dict[str, Any]]:
    """Try a mutant with its tests of a stage, in a copy of the tree that this process keeps."""
    at, mutant, stage, server, folder = job
    tree = Tree.kept = Tree.kept or Tree(folder / f"tree-{os.getpid()}")
    tests = tests_of(mutant["file"], stage)
    failed, took = "", 0.0
    if tests:
        # The same tests without a mutant, once, whichever process comes first: they must pass, and give the time limit.
        clean = folder / hashlib.sha256(tests.encode()).hexdigest()
        if not clean.exists():
            failed, took = tree.run(tests, server, 3600)
            if failed:
                raise RuntimeError(
                    f"{failed} fails without a mutant: {tree.output.read_text(errors='replace')[-3000:]}"
                )
            clean.write_text(str(120 + 5 * took))  # the machine may get busier
        text = mutate(mutant)
        assert text is not None  # only such are in the sample
        tree.write(mutant["file"], text)
        failed, took = tree.run(tests, server, float(clean.read_text()))
        tree.write(mutant["file"], (TOP / mutant["file"]).read_text())
    return at, {**mutant, "tried": stage, "killed_by": failed, "seconds": round(took)}


def page(known: dict[str, Any]) -> str:
    """Return the figure, the survivors with the reason why each may live, and the kills by a time limit, as Markdown.

    Of the latter the reason says how a person has found that it hangs: a test may just have been slow.
    """
    done = [each for each in known["mutants"] if each.get("tried")]
    left = [each for each in done if not each["killed_by"]]
    killed, size = len(done) - len(left), len(known["mutants"])
    lines = [
        "# Mutants\n",
        f"`make mutants`: {size} random ones of {known['of']} mutants of {known['commit']}, seed {known['seed']};",
        f"{len(done)} of {size} tried. **Killed: {killed} ({killed / max(len(done), 1):.0%}).** The tests are in",
        "tests/mutants.py: `fast` where only the first of them were run.\n",
        "| survivor | code | mutant | tests | why it may live |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(each) for each in sorted(left, key=lambda one: (one["file"], one["line"]))]
    if hung := [each for each in done if "time limit" in each["killed_by"]]:
        lines += ["\n| killed by a time limit | code | mutant | tests | why it hangs |\n|---|---|---|---|---|"]
        lines += [_row(each) for each in sorted(hung, key=lambda one: (one["file"], one["line"]))]
    return "\n".join(lines) + "\n"


def _row(each: dict[str, Any]) -> str:
    before, after = (f"`` {each[name]} ``".replace("|", "\\|") for name in ("before", "after"))
    tests = "fast" if each["tried"] == "fast" else "all"
    return f"| {each['file']}:{each['line']} | {before} | {after} | {tests} | {each.get('reason', '')} |"


def main() -> None:
    """Draw the sample, or continue it, and try what was not tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stage", choices=("fast", "slow"), action="append", help="default: both")
    parser.add_argument("--only", default="", help="part of the file names")
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("--results", type=Path, default=TOP / "benchmarks" / "results" / "mutants.json")
    chosen = parser.parse_args()
    folders = [TOP / "tidepool" / part for part, *_ in TESTS]
    files = sorted({path for folder in folders for path in [folder, *folder.rglob("*.py")] if path.is_file()})
    code = hashlib.sha256("".join(path.read_text() for path in files).encode()).hexdigest()[:12]
    known = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    if [known.get(name) for name in ("code", "seed")] != [code, chosen.seed] or len(known["mutants"]) < chosen.number:
        everything = mutants(files)
        random.Random(chosen.seed).shuffle(everything)  # noqa: S311 - a sample
        sample = itertools.islice((each for each in everything if mutate(each) is not None), chosen.number)
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=TOP, text=True).strip()
        known = {"code": code, "commit": commit, "seed": chosen.seed, "of": len(everything), "mutants": list(sample)}

    def save() -> None:
        chosen.results.write_text(json.dumps(known, indent=1) + "\n")
        chosen.results.with_suffix(".md").write_text(page(known))

    save()
    for name in HEAVY:
        importlib.import_module(name)
    for stage in chosen.stage or ("fast", "slow"):
        before = {None} if stage == "fast" else {"fast"}
        before |= {stage, "slow"} if chosen.again else set()
        todo = {
            at: each
            for at, each in enumerate(known["mutants"])
            if chosen.only in each["file"] and each.get("tried") in before and not each.get("killed_by")
        }
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(prefect_server()) if stage == "slow" and todo else ""
            # Not `multiprocessing.Pool`: its processes may not have children, such as a local Dask cluster's.
            context = multiprocessing.get_context("fork")
            pool = stack.enter_context(ProcessPoolExecutor(chosen.jobs, mp_context=context))
            jobs = [(at, each, stage, server, folder) for at, each in todo.items()]
            for number, ended in enumerate(as_completed([pool.submit(attempt, job) for job in jobs]), 1):
                at, done = ended.result()
                known["mutants"][at] |= done
                save()
                told = f"{done['file']}:{done['line']} {done['after']} | {done['killed_by'] or 'SURVIVED'}"
                print(f"{stage} {number}/{len(jobs)} {done['seconds']} s {told}", flush=True)  # noqa: T201 - the command's
    print(page(known))  # noqa: T201 - the command's


if __name__ == "__main__":
    main()
