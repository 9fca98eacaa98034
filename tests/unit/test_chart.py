"""`tidepool chart`: the chart and the objects of the cluster in a folder, and whose folder it may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidepool.author import chart
from tidepool.errors import TidepoolError, UsageError

TOP = Path(__file__).parents[2]
SOURCES = {"chart": "helm/tidepool", "cluster": "k8s/cluster", "crds": "k8s/crds"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_it_writes_the_files_of_this_checkout(tmp_path: Path) -> None:
    chart.write(tmp_path / "a" / "platform")
    written = tmp_path / "a" / "platform"
    assert {each.name for each in written.iterdir()} == SOURCES.keys() == set(chart.WRITTEN)
    for name, source in SOURCES.items():
        assert contents(written / name) == contents(TOP / source)
    assert (written / "chart" / ".helmignore").is_file()
    assert not [each for each in written.rglob("*") if each.is_symlink()]


def test_an_earlier_version_is_replaced_as_a_whole(tmp_path: Path) -> None:
    chart.write(tmp_path)
    gone, changed = tmp_path / "chart" / "templates" / "former.yaml", tmp_path / "cluster" / "admission.yaml"
    gone.write_text("former")
    changed.write_text("former")
    chart.write(tmp_path)
    assert not gone.exists()
    assert changed.read_text() != "former"


@pytest.mark.parametrize("name", ["notes.txt", "chart/Chart.yaml", "chart/x cluster/x crds/x"])
def test_a_folder_with_other_content_stays_as_it_is(tmp_path: Path, name: str) -> None:
    for each in name.split():
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text("ours")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="has other content; choose a new or empty folder, nothing was written"):
        chart.write(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("ours")
    with pytest.raises(UsageError, match="file has other content; choose a new or empty folder"):
        chart.write(tmp_path / "file")
    with pytest.raises(TidepoolError, match="Not a directory; the chart was not written"):
        chart.write(tmp_path / "file" / "below")


def test_an_installation_without_the_files_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "_FOLDER", tmp_path / "nowhere")
    with pytest.raises(TidepoolError, match=r"^this installation of tidepool has no chart/: install its wheel"):
        chart.write(tmp_path / "platform")
    assert list(tmp_path.iterdir()) == []
