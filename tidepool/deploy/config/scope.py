"""Names that `{{ … }}` may refer to in a prefect file: outputs of its steps, environment variables, Prefect variables.

Prefect replaces a name that it does not know by nothing: the key is dropped, and the deploy succeeds.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from typing_extensions import is_typeddict

from tidepool.deploy.config import flows, imports, placeholders
from tidepool.errors import UsageError, did_you_mean
from tidepool.settings import PREFIX, environment, reject_unknown, variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tidepool.deploy.config.yaml_lines import Finding, Place

# Of a step's inputs, those that Prefect itself takes.
_RESERVED = ("id", "requires")
# Prefect fills these in when a run starts.
_RUN_TIME_NAMES = ("flow", "flow_run", "deployment", "work_pool", "work_queue")
_PREFECT_2 = "prefect.projects.steps."
_NAME = re.compile(r"[\w.\-\[\]$]+")  # of Prefect's placeholders
_FIRST_WORD = re.compile(r"\$?[\w\-]+")
# In these, `{{ … }}` that Prefect does not read may be meant for another program.
_FREE = ("parameters", "schedules", "description", "build", "push", "pull")


@dataclass(frozen=True)
class Scope:
    """The names that a placeholder at one place may have.

    Attributes:
        steps: Types of the outputs of each earlier step with an id; None for a step that does not declare them.
        outputs: Types of the outputs of all earlier steps, by their own names: Prefect accepts these too.
        functions: Name of the function of each earlier step with an id.
        open: True if an earlier step does not declare its outputs.
        unclear: True if the steps do not have the form of steps, which is a problem of its own.
        later: Ids of the steps that run later.
        declared: Environment variables that pyproject.toml lists.
        may_be_empty: Environment variables that may be empty or unset.
        deploying: A deploy follows: environment variables must have their values now.
        variables: Prefect variables that exist or will; None if that is not known, without a server.
        blocks: Blocks that exist, as `type/name`; None if that is not known.
    """

    steps: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    unclear: bool = False
    later: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()
    may_be_empty: tuple[str, ...] = ()
    deploying: bool = False
    variables: frozenset[str] | None = None
    blocks: frozenset[str] | None = None

    def problems(self, value: Any, place: Place = ()) -> Iterator[Finding]:
        """Yield the placeholders inside a value that would be replaced by nothing, or not at all."""
        for inside, text in placeholders.texts(value, place):
            for name in placeholders.in_braces(text):
                if message := self._problem(name, inside):
                    yield inside, message

    def _problem(self, name: str, place: Place) -> str:
        if name.startswith(placeholders.RUN_TIME):
            return ""
        if not _NAME.fullmatch(name):
            return self._expression(name, place)
        if name.startswith(placeholders.VARIABLE):
            return self._missing(name, placeholders.VARIABLE, self.variables, "Prefect variable")
        if name.startswith(placeholders.BLOCK):
            block = "/".join(name.removeprefix(placeholders.BLOCK).split(".")[:2])
            return (
                "" if self.blocks is None or block in self.blocks else f"{_shown(name)}: the server has no such block"
            )
        return self._variable(name.lstrip("$")) if name.startswith("$") else self._output(name)

    def _missing(self, name: str, prefix: str, known: frozenset[str] | None, kind: str) -> str:
        wanted = name.removeprefix(prefix)
        if known is None or wanted in known:
            return ""
        return f"{_shown(name)}: unknown {kind} {wanted!r}{did_you_mean(wanted, sorted(known))}"

    def _expression(self, text: str, place: Place) -> str:
        """Return a problem of braces that Prefect leaves as they are, unless they may be meant for another program."""
        first = _FIRST_WORD.match(text)
        word = first.group() if first else ""
        if place[:1] and place[0] in _FREE and not (word.startswith("$") or word in ("prefect", *self.steps)):
            return ""
        return f"{_shown(text)} is not a name, so Prefect leaves it as text: filters and expressions are not possible"

    def _variable(self, name: str) -> str:
        set_now = environment()
        if name.startswith(PREFIX):
            try:
                reject_unknown([name])
            except UsageError as error:
                return str(error)
        elif name not in set_now and name not in (*self.declared, *self.may_be_empty):
            known = sorted({*self.declared, *self.may_be_empty, *variables()})
            advice = "set it, or list it in `variables` of [tool.tidepool] in pyproject.toml"
            return f"unknown environment variable {name}{did_you_mean(name, known, advice)}"
        if self.deploying and not set_now.get(name) and name not in self.may_be_empty:
            advice = "list it in `may_be_empty` of [tool.tidepool] in pyproject.toml if that is right"
            return f"environment variable {name} is {'empty' if name in set_now else 'not set'}: set it, or {advice}"
        return ""

    def _output(self, name: str) -> str:
        head, *rest = re.split(r"[.\[]", name)
        if head not in self.steps:
            if self.unclear or head in self.outputs or (self.open and not rest):
                return ""
            if head in self.later:
                return f"{_shown(name)}: step {head!r} runs later"
            hint = did_you_mean(head, sorted(self.steps))
            if head in _RUN_TIME_NAMES:
                hint = f"; of the run that is it is {{{{ {placeholders.RUN_TIME}{name} }}}}"
            return f"{_shown(name)}: unknown step {head!r}{hint}"
        outputs = self.steps[head]
        if outputs is None or not rest or rest[0] in outputs:
            return ""
        return f"{_shown(name)}: step {head!r} has no output {rest[0]!r}{did_you_mean(rest[0], sorted(outputs))}"

    def function(self, text: str) -> str:
        """Return the name of the function whose output a whole placeholder is; empty if it is none."""
        return (
            self.functions.get(placeholders.in_braces(text)[0].split(".")[0], "") if placeholders.is_whole(text) else ""
        )

    def is_text(self, text: str) -> bool:
        """Return True if a text with placeholders remains a text, whatever their values are."""
        if not placeholders.is_whole(text):
            return True
        head, *rest = placeholders.in_braces(text)[0].split(".")
        outputs = self.steps.get(head) or self.outputs
        return outputs.get(rest[0] if rest else head) is str


def after_steps(repository: Path, manifest: Mapping[str, Any], scope: Scope) -> tuple[Scope, list[Finding]]:
    """Return the scope of what is deployed after the build and push steps, and the problems of all steps."""
    imports.importable(repository)
    found: list[Finding] = []
    listed = [
        ((phase, index), step)
        for phase in ("build", "push", "pull")
        for index, step in enumerate(_list(manifest.get(phase)))
        if isinstance(step, dict) and step
    ]
    ids = [(place[0], str(inputs["id"])) for place, step in listed if "id" in (inputs := _inputs(step))]
    scope = replace(scope, later=tuple(name for _, name in ids))
    deployed = scope
    for place, step in listed:
        if place[0] == "pull" and scope.deploying:
            scope = replace(scope, deploying=False)  # these run later, elsewhere
        scope, problems = _step(repository, step, place, scope)
        found += problems
        if place[0] != "pull":
            deployed = scope
    return deployed, found


def _step(repository: Path, step: Mapping[str, Any], place: Place, scope: Scope) -> tuple[Scope, list[Finding]]:
    """Return the scope after a step, and its problems."""
    name, inputs = next(iter(step.items()))
    place = (*place, name)
    found: list[Finding] = []
    if len(step) > 1:
        found.append((place, f"a step is one key with its inputs below it, not also {', '.join(list(step)[1:])}"))
    if not isinstance(inputs, dict):
        return scope, [*found, (place, "inputs must be a mapping; write {} for none")]
    found += scope.problems(inputs, place)
    outputs: Mapping[str, Any] | None = None
    try:
        function = _import(repository, str(name))
    except UsageError as error:
        # By `requires` Prefect installs a package that is missing; one that is there stays as it is.
        if not inputs.get("requires") or find_spec(str(name).split(".", 1)[0]):
            found.append((place, str(error)))
    else:
        found += [((*place, *inside), message) for inside, message in _inputs_problems(function, inputs)]
        outputs = _outputs(function)
    own = {str(inputs["id"]): outputs} if inputs.get("id") else {}
    return (
        replace(
            scope,
            steps={**scope.steps, **own},
            functions={**scope.functions, **dict.fromkeys(own, str(name))},
            outputs={**scope.outputs, **(outputs or {})},
            open=scope.open or outputs is None,
            later=tuple(each for each in scope.later if each not in own),
        ),
        found,
    )


def _import(repository: Path, name: str) -> Callable[..., Any]:
    """Import the function of a step.

    Raises:
        UsageError: it does not exist.
    """
    module, _, attribute = name.rpartition(".")
    try:
        with imports.as_in_its_own_process(repository, module):
            loaded = import_module(module)
    except (Exception, SystemExit) as error:
        now = f"prefect.deployments.steps.{attribute.removesuffix('_project')}"
        hint = f"; in Prefect 3 it is {now}" if name.startswith(_PREFECT_2) else ""
        raise UsageError(f"cannot import step {name}: {type(error).__name__}: {error}{hint}") from error
    known = [each for each, value in vars(loaded).items() if callable(value) and not each.startswith("_")]
    function = getattr(loaded, attribute, None)
    if not callable(function):
        raise UsageError(f"unknown step {name}{did_you_mean(attribute, known, f'{module} has no such function')}")
    return cast("Callable[..., Any]", function)


def _inputs_problems(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Iterator[Finding]:
    given = {str(key): value for key, value in inputs.items() if key not in _RESERVED}
    parameters = inspect.signature(function).parameters
    kinds = {each.kind for each in parameters.values()}
    unknown = [] if inspect.Parameter.VAR_KEYWORD in kinds else [key for key in given if key not in parameters]
    for key in unknown:
        yield (key,), f"unknown input of this step{did_you_mean(key, list(parameters))}"
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and key not in given and not unknown:  # an unknown input may be the missing one, misspelt
            yield (), f"missing input {key!r}, which the step requires"


def _outputs(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """Return the types of a step's outputs, if it declares them by a TypedDict."""
    declared = flows.annotation(function, "return")
    return get_type_hints(declared) if is_typeddict(declared) else None


def _inputs(step: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = next(iter(step.values()))
    return inputs if isinstance(inputs, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(name: str) -> str:
    return f"{{{{ {name} }}}}"
