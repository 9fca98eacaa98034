from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from tidepool import settings as module
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in module.variables():
        monkeypatch.delenv(name, raising=False)
    module.settings.cache_clear()
    yield
    module.settings.cache_clear()


def test_a_variable_sets_its_group_and_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROOT", "s3://bucket/prefix")
    monkeypatch.setenv("TIDEPOOL_SMALL_MEMORY_GIB", "0.5")
    current = module.settings()
    assert current.storage.root == "s3://bucket/prefix"
    assert current.small.memory_gib == 0.5
    assert current.small.workers == 2, "the group's other fields keep their defaults"


def test_a_misspelt_variable_is_an_error_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROTO", "s3://bucket")
    with pytest.raises(
        UsageError, match=r"^unknown setting TIDEPOOL_STORAGE_ROTO; did you mean TIDEPOOL_STORAGE_ROOT\?$"
    ):
        module.settings()


def test_an_unknown_name_without_a_similar_one_refers_to_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_XYZZY", "1")
    with pytest.raises(UsageError, match=r"^unknown setting TIDEPOOL_XYZZY; `tidepool settings` lists the known ones$"):
        module.settings()


def test_a_value_that_is_not_accepted_names_variable_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "cloud")
    with pytest.raises(UsageError) as error:
        module.settings()
    assert str(error.value) == (
        "TIDEPOOL_COMPUTE_PROVIDER: input should be 'local', 'threads', 'address' or 'kubernetes', not 'cloud'"
    )


def test_invalid_json_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_WORKER_TOLERATIONS", "[")
    with pytest.raises(
        UsageError, match=r'^a TIDEPOOL_\* variable is not valid JSON: .*"kubernetes".*: Expecting value: '
    ):
        module.settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        module.settings().storage.root = "s3://elsewhere"  # type: ignore[misc]


def test_every_setting_has_a_description() -> None:
    described = set()
    for group in ast.parse(Path(module.__file__).read_text()).body:
        for setting, below in pairwise(group.body) if isinstance(group, ast.ClassDef) else ():
            match setting, below:
                case ast.AnnAssign(target=ast.Name(field)), ast.Expr(value=ast.Constant(value=str())):
                    described.add((group.name, field))
    for variable, (group, field) in module.variables().items():
        annotation = module.Settings.model_fields[group].annotation
        assert annotation is not None
        assert (annotation.__name__, field) in described, f"{variable} has no description"


def test_effective_returns_value_and_source_and_masks_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_NOTIFY_URLS", "slack://T1/B2/C3")
    rows = {variable: (value, origin) for variable, value, origin in module.effective()}
    assert rows["TIDEPOOL_NOTIFY_URLS"] == ("**********", "environment")
    assert rows["TIDEPOOL_COMPUTE_PROVIDER"] == ("local", "default")
    assert set(rows) == set(module.variables())


def test_an_unknown_size_names_the_sizes() -> None:
    with pytest.raises(UsageError, match="unknown size 'huge'; known: small, medium, large"):
        module.settings().size("huge")


def test_set_variables_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "local")  # monkeypatch puts it back afterwards
    module.set_variables({"TIDEPOOL_COMPUTE_PROVIDER": "threads"})
    assert module.settings().compute.provider == "threads"


def test_set_variables_refuses_an_unknown_setting() -> None:
    with pytest.raises(
        UsageError, match="unknown setting TIDEPOOL_COMPUTE_PROVIDERS; did you mean TIDEPOOL_COMPUTE_PROVIDER"
    ):
        module.set_variables({"TIDEPOOL_COMPUTE_PROVIDERS": "threads"})


def test_repository_is_found_from_a_folder_below(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    top = Path(str(tmp_path))
    (top / "prefect.yaml").write_text("name: x\n")
    (top / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(top / "a" / "b")
    assert module.repository() == top


def test_outside_a_repository_the_message_names_the_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UsageError, match=r"no prefect\.yaml in .* or above it"):
        module.repository()


def test_a_short_shared_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.settings().kubernetes.shared_key is None
    module.settings.cache_clear()
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_SHARED_KEY", "hunter2")
    with pytest.raises(UsageError) as error:
        module.settings()
    assert str(error.value) == "TIDEPOOL_KUBERNETES_SHARED_KEY: string should have at least 32 characters"
    monkeypatch.setenv("TIDEPOOL_KUBERNETES_SHARED_KEY", "hunter2" * 5)
    assert "hunter2" not in str(module.effective()) + repr(module.settings())
